"""Simulated clients: the production worker and publisher, thousands of them, without a model each.

All share one trainer, one set of counters and the newest pulled weights. A client is made when it sets out and dropped
as soon as its update is encoded, so what one has of its own between two trips is its folder and which version it holds:
when it pulls, the deltas or the snapshot it would fetch are counted in bytes, and the weights they lead to - the same
for everybody, as the hash in the head proves - are taken from the shared ones.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from ops.simulation.database import ClientFolder, Folders
from shared.clock import Clock
from shared.config import WorkerSettings
from shared.metrics import WorkerMetrics
from shared.model_image import ModelImage
from shared.published import Plan, carry_out, plan
from shared.store.inprocess import InProcessStore
from shared.store.ports import Head, WorkerStore
from shared.transport.ports import UpdateSink
from worker.outbox import STATE as OUTBOX_STATE
from worker.outbox import Outbox
from worker.publisher import Publisher
from worker.replica import Replica
from worker.training import Trainer
from worker.worker import Worker

NOTHING_HELD = (-1, "")
OUTBOX_UPDATES_MAX, OUTBOX_BYTES_MAX = 100, 2**40
CONFIRM_S = 60.0


class SharedWeights:
    """The newest weights anybody pulled. Never changed in place: trainings under way hold them."""

    def __init__(self, store: WorkerStore, trainer: Trainer) -> None:
        self._store = store
        self.image = ModelImage(trainer.layout)
        self.version, self.sha256 = NOTHING_HELD

    def of(self, head: Head) -> ModelImage:
        """Return the weights the head announces for workers."""
        sha256 = head.published or head.sha256
        if sha256 != self.sha256:
            self.image = self._next(head) if head.published else self._store.model(head.version)
            self.version, self.sha256 = head.version, sha256
        return self.image

    def _next(self, head: Head) -> ModelImage:
        way = plan(self._store.published(self.version), head.version, self.version) if self.sha256 else None
        if way is None:
            way = plan(self._store.published(-1), head.version, -1)
        assert way is not None, "the aggregator has just published it"  # noqa: S101
        image = carry_out(way, self._store, None if way.snapshot is not None else self.image.copy())
        assert image.sha256 == head.published, "the head's hash"  # noqa: S101
        return image


class SimulatedReplica(Replica):
    """Counts what a client would fetch; the weights are the shared ones.

    Args:
        store: of the job.
        metrics: what is counted.
        shared: the newest weights.
        held: version and hash of the weights the client has.

    Attributes:
        fetched_bytes: by this client's pull.
    """

    def __init__(
        self, store: WorkerStore, metrics: WorkerMetrics, shared: SharedWeights, held: tuple[int, str]
    ) -> None:  # fmt: skip
        super().__init__(store, metrics)
        self._shared = shared
        self.fetched_bytes = 0
        head = store.head()
        assert head is not None, "the job has begun"  # noqa: S101
        # Where the held version is not the head's, a pull comes before these weights are looked at.
        self.image, (self.version, self.sha256) = shared.of(head), held

    def pull(self, head: Head) -> ModelImage:
        """Move to the head's version."""
        if head.published:
            return super().pull(head)
        image = self._shared.of(head)
        self._count("model", image.data.size)
        return self._take(image, head)

    def _follow(self, way: Plan, head: Head) -> ModelImage | None:
        self._count("deltas" if way.snapshot is None else "snapshot", way.size_bytes)
        return self._take(self._shared.of(head), head)

    def _count(self, how: str, size_bytes: int) -> None:
        super()._count(how, size_bytes)
        self.fetched_bytes += size_bytes


class StoreAsOf:
    """A store that does not tell yet what became of updates after some revision; for a client that sets out again."""

    def __init__(self, store: InProcessStore, revision: int) -> None:
        self._store, self._revision = store, revision

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def outcomes(self, client: str, after: int) -> tuple[list[tuple[str, str]], int]:
        """Return what became of a client's updates up to the revision."""
        return self._store.outcomes(client, after, self._revision)


@dataclass(slots=True)
class Client:
    """One client on a trip."""

    worker: Worker
    outbox: Outbox
    replica: SimulatedReplica


class Clients:
    """Makes clients when they set out and again when they publish; in between there are only their folders.

    Args:
        store: of the job.
        sink: of the broker.
        folders: what they keep.
        trainer: of the task.
        clock: virtual time.
        job: its id.
        seed: of everything the workers do.
        name_of: client -> its id.
        settings_of: client -> its task settings.
        held: client -> version and hash of the weights it holds.
    """

    def __init__(
        self, store: InProcessStore, sink: UpdateSink, folders: Folders, trainer: Trainer, clock: Clock, job: str,
        seed: int, name_of: Callable[[int], str], settings_of: Callable[[int], dict[str, str]],
        held: dict[int, tuple[int, str]],
    ) -> None:  # fmt: skip
        self._store, self._sink, self._folders, self._trainer = store, sink, folders, trainer
        self._clock, self._job = clock, job
        self._name_of, self._settings_of, self.held = name_of, settings_of, held
        self._metrics = WorkerMetrics()
        self._shared = SharedWeights(store, trainer)
        self._out: dict[int, Client] = {}
        self._senders: dict[int, tuple[Outbox, Publisher]] = {}  # of those on a trip
        self._settings = WorkerSettings(job=job, seed=seed, state_dir=Path(), confirm_timeout_s=CONFIRM_S)

    def set_out(self, number: int, revision: int | None = None) -> Client:
        """Make a client, with what it kept.

        Args:
            number: which.
            revision: as if the store were not beyond it; None: as it is.
        """
        store: WorkerStore = self._store
        if revision is not None:
            store = cast("WorkerStore", StoreAsOf(self._store, revision))
        outbox, publisher = self._sender(number)
        settings = self._settings.model_copy(
            update={"client_id": self._name_of(number), "task_settings": self._settings_of(number)}
        )
        replica = SimulatedReplica(store, self._metrics, self._shared, self.held.get(number, NOTHING_HELD))
        worker = Worker(settings, self._trainer, store, outbox, publisher, self._clock, self._metrics, replica)
        self._out[number] = Client(worker, outbox, replica)
        return self._out[number]

    def pulled(self, number: int) -> None:
        """Note which weights a client that set out has pulled."""
        replica = self._out[number].replica
        self.held[number] = replica.version, replica.sha256

    def out(self, number: int) -> Client:
        """Return a client that set out and has not come back."""
        return self._out[number]

    def trained(self, number: int) -> None:
        """Drop a client's worker, which may hold a residual; what it keeps is in its folder."""
        self._out.pop(number, None)

    def come_back(self, number: int) -> None:
        """Drop a client from memory."""
        self._out.pop(number, None)
        self._senders.pop(number, None)

    def publish(self, number: int) -> bool:
        """Send the update that waits in a client's outbox; tell whether there was one."""
        return self._sender(number)[1].step()

    def _sender(self, number: int) -> tuple[Outbox, Publisher]:
        """Return how a client publishes: at hand, or made from its folder."""
        if number not in self._senders:
            name = self._name_of(number)
            outbox = Outbox(self._folder(number), name, OUTBOX_UPDATES_MAX, OUTBOX_BYTES_MAX)
            publisher = Publisher(self._job, name, outbox, self._sink, self._clock, self._metrics, CONFIRM_S)
            self._senders[number] = outbox, publisher
        return self._senders[number]

    def _folder(self, number: int) -> ClientFolder:
        folder = self._folders.folder(number)
        if not folder.names():  # ids that do not depend on the run
            folder.write(OUTBOX_STATE, b'{"incarnation": "simulated", "next_sequence": 0}')
        return folder
