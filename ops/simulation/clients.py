"""Simulated clients: the production worker and publisher, thousands of them, without a model each.

All share one trainer, one set of counters and the newest pulled weights. What a client has of its own between two trips
is its folder and which version it holds: when it pulls, the deltas or the snapshot it would fetch are counted in bytes,
and the weights they lead to - the same for everybody, as the hash in the head proves - are taken from the shared ones.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ops.simulation.database import Folders
from shared.clock import Clock
from shared.config import WorkerSettings
from shared.metrics import WorkerMetrics
from shared.model_image import ModelImage
from shared.published import Plan, carry_out, plan
from shared.store.ports import Head, WorkerStore
from shared.transport.ports import UpdateSink
from worker.outbox import STATE as OUTBOX_STATE
from worker.outbox import Outbox
from worker.publisher import Publisher
from worker.replica import Replica
from worker.training import Trainer
from worker.worker import Worker


class SharedWeights:
    """The newest weights anybody pulled. Never changed in place: trainings under way hold them."""

    def __init__(self, store: WorkerStore, trainer: Trainer) -> None:
        self._store = store
        self.image = ModelImage(trainer.layout)
        self.version, self.sha256 = -1, ""

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

    Attributes:
        fetched_bytes: by the last pull.
    """

    def __init__(self, store: WorkerStore, metrics: WorkerMetrics, shared: SharedWeights) -> None:
        super().__init__(store, metrics)
        self._shared = shared
        self.fetched_bytes = 0

    def pull(self, head: Head) -> ModelImage:
        """Move to the head's version."""
        if head.published:
            return super().pull(head)
        image = self._shared.of(head)
        self._count("model", image.data.size)
        return self._take(image, head)

    def hold(self, version: int, sha256: str) -> None:
        """Hold a version, not its weights."""
        self.image, self.version, self.sha256 = (None if version < 0 else self._shared.image), version, sha256

    def _follow(self, way: Plan, head: Head) -> ModelImage | None:
        self._count("deltas" if way.snapshot is None else "snapshot", way.size_bytes)
        return self._take(self._shared.of(head), head)

    def _count(self, how: str, size_bytes: int) -> None:
        super()._count(how, size_bytes)
        self.fetched_bytes += size_bytes


@dataclass(slots=True)
class Client:
    """One client on a trip."""

    worker: Worker
    publisher: Publisher
    outbox: Outbox
    replica: SimulatedReplica


class Clients:
    """Makes clients when they set out, and forgets them at checkpoints.

    Args:
        store: of the job.
        sink: of the broker.
        folders: what they keep.
        trainer: of the task.
        clock: virtual time.
        job: its id.
        seed: of everything the workers do.
    """

    def __init__(
        self,
        store: WorkerStore,
        sink: UpdateSink,
        folders: Folders,
        trainer: Trainer,
        clock: Clock,
        job: str,
        seed: int,
    ) -> None:
        self._store, self._sink, self._folders, self._trainer = store, sink, folders, trainer
        self._clock, self._job, self._seed = clock, job, seed
        self._metrics = WorkerMetrics()
        self._shared = SharedWeights(store, trainer)
        self._clients: dict[int, Client] = {}
        self.held: dict[int, tuple[int, str]] = {}  # client -> version and hash of the weights it holds

    def client(self, number: int, settings: Mapping[str, str]) -> Client:
        """Return a client, with what it kept.

        Args:
            number: which.
            settings: of its task.
        """
        if number not in self._clients:
            self._clients[number] = self._made(number, settings)
        return self._clients[number]

    def rest(self, number: int) -> None:
        """Let a client hold no weights until its next trip."""
        replica = self._clients[number].replica
        self.held[number] = replica.version, replica.sha256
        replica.hold(*self.held[number])

    def forget(self) -> None:
        """Drop all clients from memory; what they keep is in their folders."""
        for number in self._clients:
            self.rest(number)
        self._clients.clear()

    def _made(self, number: int, task_settings: Mapping[str, str]) -> Client:
        name = f"client-{number}"
        settings = WorkerSettings.model_construct(
            job=self._job, client_id=name, task_settings=dict(task_settings), seed=self._seed, updates_max=0,
            confirm_timeout_s=60.0, pause_s=0.0, state_dir=Path(),
        )  # fmt: skip
        folder = self._folders.folder(number)
        if not folder.names():  # ids that do not depend on the run
            folder.write(OUTBOX_STATE, b'{"incarnation": "simulated", "next_sequence": 0}')
        outbox = Outbox(folder, name, 100, 2**40)
        publisher = Publisher(self._job, name, outbox, self._sink, self._clock, self._metrics, 60.0)
        replica = SimulatedReplica(self._store, self._metrics, self._shared)
        replica.hold(*self.held.get(number, (-1, "")))
        worker = Worker(
            settings, self._trainer, self._store, outbox, publisher, self._clock, self._metrics, replica
        )  # fmt: skip
        return Client(worker, publisher, outbox, replica)
