"""The worker's loop.

pull -> train -> delta -> + residual -> compress -> encode -> outbox        (publishing: see publisher.py)
"""

import hashlib
import logging
import math
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from shared.clock import Clock
from shared.compression import AUTO, Codec, parse
from shared.config import WorkerSettings
from shared.errors import DiskFull, FedMQError, TaskError, Unavailable, VersionGone
from shared.layout import Layout
from shared.messages import PART_BYTES, Update, encode
from shared.metrics import WorkerMetrics
from shared.model_image import ModelImage
from shared.store.ports import WorkerStore
from shared.vector import Vector
from worker.auto import AutoCodec
from worker.fit import check_layout, check_size
from worker.gate import DISK_S, Gate
from worker.outbox import Outbox
from worker.publisher import Publisher
from worker.replica import Replica
from worker.residual import HORIZONS, KEPT_FOR_EVER, REFUSED, Residual
from worker.task import Context
from worker.training import Trained, Trainer, Training

log = logging.getLogger("fedmq.worker")

ROUND_UPDATES_MAX = 3  # in one synchronous round: a refused update is made good, but not for ever
RETRY_S = (0.5, 60.0)  # first and longest wait after a training that gave no update, or a store that is away
SHORT_S = 1.0  # in a longer pause the store is asked what became of updates
TELL_S = 60.0  # between two lines of the log that say how far it is
FLUSH_S = 20.0  # how long a worker that ends tries to get its last updates out


@dataclass(frozen=True, slots=True)
class Round:
    """A worker's part in a synchronous round.

    Attributes:
        version: the round's; -1: none yet.
        since: when that version was made; tells apart the rounds of a job that was begun anew.
        update_id: of its last update.
        updates: how many it made in the round.
        said: whether the log says that it waits.
        cursor: of the outcomes read so far.
        refused: whether its last update is among those.
    """

    version: int = -1
    since: float = 0.0
    update_id: str = ""
    updates: int = 0
    said: bool = False
    cursor: int = 0
    refused: bool = False

    def with_update(self, version: int, since: float, update_id: str) -> "Round":
        """Return it after one more update."""
        same = (version, since) == (self.version, self.since)
        return Round(version, since, update_id, self.updates + 1 if same else 1, cursor=self.cursor if same else 0)


class Worker:
    """One worker of one job. `step` trains once; `run` repeats it until stopped.

    Args:
        settings: checked settings.
        trainer: the task and its model.
        store: where models are pulled from.
        outbox: where finished updates wait.
        publisher: who gets them out of there.
        clock: time.
        metrics: what it counts.
        replica: how it pulls; its own when None.
    """

    def __init__(
        self, settings: WorkerSettings, trainer: Trainer, store: WorkerStore, outbox: Outbox, publisher: Publisher,
        clock: Clock, metrics: WorkerMetrics, replica: Replica | None = None,
    ) -> None:  # fmt: skip
        self.settings, self.stop = settings, threading.Event()
        self.updates_made = 0
        self._trainer, self._store, self._outbox, self._publisher = trainer, store, outbox, publisher
        self._clock, self._metrics = clock, metrics
        self._auto = AutoCodec()
        self._residual = Residual(outbox, store, metrics)
        self._gate = Gate(settings, outbox, clock)
        self._paused = ""  # why no training begins, as the log has it
        self._replica = replica or Replica(store, metrics)  # the weights to train from
        self._since = 0.0  # when the head's version was made
        self._round = Round()
        self._revision: int | None = None  # of the head last pulled; None while the store is away
        self._job: dict[str, Any] = {}
        self._said: str | None = None
        self._told_s = -math.inf  # when the log last said how far it is; monotonic

    def step(self) -> bool:
        """Pull, train once, put the update into the outbox; tell whether there is an update.

        Raises:
            StoreUnavailable: the model cannot be pulled and none was before.
            TaskError: the training raised or gave nothing to send.
            SettingsError: this worker cannot serve the job at all; the message says why.
        """
        training = self.begin()
        if training is None:
            return False
        self.finish(training, self._trainer.train(training), self._clock.now)
        return True

    def begin(self) -> Training | None:
        """Pull the newest weights and say what to train; None while there is nothing to.

        Raises:
            StoreUnavailable, SettingsError: as of `step`.
        """
        if not self._pull() or self._waits_for_the_round():
            return None
        assert self._base is not None, "pulled"  # noqa: S101
        horizon = KEPT_FOR_EVER if self._area else HORIZONS * int(self._job.get("staleness_max", 0))
        start = self._start if self._area else None
        self._residual.prepare(self._layout, self._version, self._revision, horizon, start)
        return Training(self._context(), self._base)

    def finish(self, training: Training, trained: Trained, now: Callable[[], float]) -> None:
        """Compress and encode what was trained, and put the update into the outbox.

        Args:
            training: what `begin` returned last.
            trained: what came of it; its delta is changed.
            now: the time it was finished.
        """
        self._metrics.train.observe(trained.seconds)
        version, delta, seed = training.context.version, trained.delta, training.context.seed
        codec = self._codec(delta, trained.seconds, seed)
        if self._area:
            delta += training.base.weights
        encoded = self._residual.encode(codec, delta, self._layout, version, np.random.default_rng(seed))
        update = Update(
            job=self.settings.job,
            client=self.settings.client_id,
            update_id=self._outbox.next_id(),
            base_version=version,
            num_samples=trained.result.num_samples,
            num_steps=trained.result.num_steps,
            layout=self._layout.hash,
            codec={"name": codec.name, **encoded.params},
            payload=encoded.payload,
            metrics=dict(trained.result.metrics),
            train_seconds=trained.seconds,
            created_at=max(0.0, now()),  # the contract knows no time before 1970, a device without a battery does
        )
        self._keep(encode(update))
        self.updates_made += 1
        self._round = self._round.with_update(version, self._since, update.update_id)
        self._metrics.outbox.set(len(self._outbox))
        self._publisher.wake.set()
        self._tell()

    def _keep(self, body: bytes) -> None:
        """Put a finished update into the outbox; on a full disk wait for room, for what was trained must not be lost.

        Raises:
            DiskFull: there was none until the worker was asked to end.
            FedMQError: the disk does not work.
        """
        while True:
            try:
                self._residual.put(body)
                return
            except DiskFull as error:
                if self.stop.is_set():
                    raise DiskFull(f"{error}: what was trained last is lost") from error
                self._say(f"{error}: a finished update waits for room")
                self._clock.wait(self.stop, DISK_S)
            except OSError as error:
                raise FedMQError(f"an update cannot be written into FEDMQ_STATE_DIR: {error}") from error

    def run(self) -> None:
        """Step until stopped, publishing in a thread beside; then get the last updates out.

        Raises:
            SettingsError: this worker cannot serve the job at all.
        """
        publishing = threading.Thread(target=self._publisher.run, args=(self.stop,), name="publisher", daemon=True)
        publishing.start()
        flush_s = FLUSH_S
        try:
            self._loop()
        except KeyboardInterrupt:  # asked twice: what waits stays in the outbox
            flush_s = 0.0
            raise
        finally:
            self.stop.set()
            self._publisher.wake.set()
            deadline = self._clock.monotonic() + flush_s
            publishing.join(flush_s)
            left_s = deadline - self._clock.monotonic()
            if len(self._outbox) and (publishing.is_alive() or not self._publisher.flush(left_s)):
                log.warning("%d updates stay in the outbox for the next start", len(self._outbox))

    def _loop(self) -> None:
        retry_s = RETRY_S[0]
        while not self.stop.is_set() and not self._done():
            try:
                if self._pauses():
                    continue
                trained = self.step()
                if trained:
                    self._gate.used()
                rest_s = self.settings.pause_s if trained else 0.5
                retry_s = RETRY_S[0]
            except DiskFull as error:
                log.error("%s", error)
                rest_s = DISK_S
            except TaskError as error:
                self._gate.used()
                self._metrics.failures.inc()
                log.error("%s; going on", error, exc_info=error.__cause__)
                rest_s, retry_s = retry_s, min(RETRY_S[1], 2 * retry_s)
            except Unavailable as error:
                self._say(f"{error}; waiting for it")
                rest_s, retry_s = retry_s, min(RETRY_S[1], 2 * retry_s)
            if rest_s:
                self._clock.wait(self.stop, rest_s)

    def _pauses(self) -> bool:
        """Wait a little if no training may begin, and hear meanwhile what became of updates; tell whether it was so."""
        pause = self._gate.pause(self.stop)
        cause = pause.cause if pause else ""
        if self._paused and cause != self._paused:
            log.info("training goes on")
        if pause is None:
            self._paused = ""
            return False
        if cause != self._paused:
            log.warning("%s", pause.reason)
            self._paused = cause
        if pause.wait_s > SHORT_S:
            self._residual.hear()
        self._clock.wait(self.stop, pause.wait_s)
        return True

    def _done(self) -> bool:
        return bool(self.settings.updates_max) and self.updates_made >= self.settings.updates_max

    def _pull(self) -> bool:
        """Load the newest weights if they are newer than what is at hand; one small read when not.

        While the store is away, the worker trains on from the weights it has. Tells whether there are
        weights to train from: not while the job has not started.
        """
        try:
            head = self._store.head()
            if head is not None:
                self._job = self._store.job()  # also when no version is new: its rule may be
                if not self._job:
                    self._not_started()
                    return False
                self._since = head.created_at
                self._publisher.part_bytes = int(self._job.get("part_bytes", PART_BYTES))
            if head is not None and (self._replica.differs(head) or head.layout != self._layout.hash):
                self._check(self._replica.pull(head))
                log.debug("pulled version %d", head.version)
        except VersionGone as error:  # it was replaced while we pulled: look again
            if self.settings.downlink_bytes_per_s and not self.stop.is_set():
                self._say(f"{error}; replaced while it was pulled? FEDMQ_DOWNLINK_BYTES_PER_S may be too low for it")
            log.debug("%s", error)
            return False
        except Unavailable as error:
            if self._base is None:
                raise
            self._say(f"{error}; training on from version {self._version}")
            self._revision = None
            return True
        if head is None:
            self._not_started()
            return False
        self._said, self._revision = None, head.revision
        self._metrics.version.set(self._version)
        return True

    def _not_started(self) -> None:
        self._round = Round()
        self._say(f"job {self.settings.job!r} has not started yet: waiting for an aggregator and a model")
        self._replica.forget()

    @property
    def _base(self) -> ModelImage | None:
        """The weights to train from."""
        return self._replica.image

    @property
    def _version(self) -> int:
        """Their version; -1 while there are none."""
        return self._replica.version

    @property
    def _layout(self) -> Layout:
        """Of this task's own model."""
        return self._trainer.layout

    @property
    def _rule(self) -> str:
        """Name of the job's rule, without its parameters."""
        return str(self._job.get("rule", "")).partition("(")[0].strip()

    @property
    def _area(self) -> bool:
        """Whether updates are differences to what this worker sent before (rule area), not to the pulled weights."""
        return self._rule == "area"

    def _waits_for_the_round(self) -> bool:
        """In synchronous rounds a worker takes part once: it waits for the next version, unless its update was refused.

        Raises:
            StoreUnavailable: what became of the update cannot be read.
        """
        taken = self._round
        if self._rule != "fedavg" or (taken.version, taken.since) != (self._version, self._since):
            return False
        after = taken.cursor if self._revision is None or self._revision >= taken.cursor else 0  # a store set back
        told, cursor = self._store.outcomes(self.settings.client_id, after)
        refused = taken.refused or any(i == taken.update_id and outcome in REFUSED for i, outcome in told)
        self._round = taken = replace(taken, cursor=cursor, refused=refused)
        if refused and taken.updates < ROUND_UPDATES_MAX:
            log.warning("the update of this round was refused: training again")
            return False
        if not taken.said:
            log.info("took part in the round of version %d: waiting for the next", self._version)
            self._round = replace(taken, said=True)
        return True

    def _start(self) -> Vector:
        """Return the weights of version 0, which all memories of rule area start from."""
        try:
            return self._store.model(0).weights
        except VersionGone:
            assert self._base is not None, "pulled"  # noqa: S101
            log.warning("version 0 is not stored any more: this worker's memory starts from version %d", self._version)
            return self._base.weights

    def _check(self, base: ModelImage) -> None:
        """Compare this task's model with the job's; a difference cannot be mended by waiting."""
        check_layout(self._trainer.task.name, self.settings.job, self._layout, base.layout)
        check_size(base.layout, self._job)

    def _codec(self, delta: Vector, train_seconds: float, seed: int) -> Codec:
        """Return the job's codec for this update; `auto` leaves it to this worker."""
        name = self._job["codec"]
        if name != AUTO:
            return parse(name)
        return self._auto.codec(delta, self._layout, train_seconds, seed)

    def _context(self) -> Context:
        settings = self.settings
        stream = f"{settings.seed} {settings.client_id} {self._outbox.next_sequence}"
        seed = int.from_bytes(hashlib.sha256(stream.encode()).digest()[:4], "little")
        return Context(settings.client_id, self._version, seed, settings.task_settings, self.stop.is_set)

    def _tell(self) -> None:
        """Log how far it is, once a minute."""
        now_s = self._clock.monotonic()
        if now_s >= self._told_s + TELL_S:
            self._told_s = now_s
            log.info(
                "%d updates made, the last from version %d; %d wait in the outbox",
                self.updates_made, self._version, len(self._outbox),
            )  # fmt: skip

    def _say(self, message: str) -> None:
        """Log a condition once, not at every turn."""
        if message != self._said:
            log.warning("%s", message)
            self._said = message
