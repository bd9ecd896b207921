"""The worker's loop.

pull -> train -> delta -> + residual -> compress -> encode -> outbox        (publishing: see publisher.py)
"""

import logging
import math
import operator
import threading
import time
import zlib
from typing import Any

import numpy as np

from shared.clock import Clock
from shared.compression import AUTO, Codec, parse
from shared.config import WorkerSettings
from shared.errors import SettingsError, TaskError, Unavailable, VersionGone
from shared.layout import difference
from shared.messages import (
    ENVELOPE_BYTES_MAX,
    METRICS_MAX,
    NAME_CHARS_MAX,
    NUM_SAMPLES_MAX,
    NUM_STEPS_MAX,
    Update,
    encode,
)
from shared.metrics import WorkerMetrics
from shared.model_image import ModelImage
from shared.store.ports import WorkerStore
from shared.vector import NORM_MAX, Vector, squared_norm
from worker.auto import CHOICES, AutoCodec
from worker.outbox import Outbox
from worker.publisher import Publisher
from worker.replica import Replica
from worker.residual import HORIZONS, Residual
from worker.task import Context, Model, Task, TrainResult, read, write

log = logging.getLogger("fedmq.worker")

RETRY_S = (0.5, 60.0)  # first and longest wait after a training that gave no update, or a store that is away
FLUSH_S = 20.0  # how long a worker that ends tries to get its last updates out


class Worker:
    """One worker of one job. `step` trains once; `run` repeats it until stopped.

    Args:
        settings: checked settings.
        task: what to train.
        store: where models are pulled from.
        outbox: where finished updates wait.
        publisher: who gets them out of there.
        clock: time.
        metrics: what it counts.
    """

    def __init__(
        self, settings: WorkerSettings, task: Task, store: WorkerStore, outbox: Outbox, publisher: Publisher,
        clock: Clock, metrics: WorkerMetrics,
    ) -> None:  # fmt: skip
        self.settings, self.stop = settings, threading.Event()
        self.updates_made = 0
        self._task, self._store, self._outbox, self._publisher = task, store, outbox, publisher
        self._clock, self._metrics = clock, metrics
        self._auto = AutoCodec()
        self._residual = Residual(outbox, store, metrics)
        self._model: Model = None
        self._own: ModelImage | None = None  # this task's own model, for its layout
        self._replica = Replica(store, metrics)  # what the model is loaded from
        self._revision: int | None = None  # of the head last pulled; None while the store is away
        self._job: dict[str, Any] = {}
        self._said: str | None = None

    def step(self) -> bool:
        """Pull, train once, put the update into the outbox; tell whether there is an update.

        Raises:
            StoreUnavailable: the model cannot be pulled and none was before.
            TaskError: the training raised or gave nothing to send.
            SettingsError: this worker cannot serve the job at all; the message says why.
        """
        if not self._pull():
            return False
        context = self._context()
        started = time.perf_counter()
        result, delta = self._train(context)
        train_seconds = time.perf_counter() - started
        self._metrics.train.observe(train_seconds)
        codec = self._codec(delta, train_seconds, context.seed)
        horizon, rng = HORIZONS * int(self._job["staleness_max"]), np.random.default_rng(context.seed)
        encoded = self._residual.encode(codec, delta, self._image.layout, self._version, self._revision, horizon, rng)
        update = Update(
            job=self.settings.job,
            client=self.settings.client_id,
            update_id=self._outbox.next_id(),
            base_version=self._version,
            num_samples=result.num_samples,
            num_steps=result.num_steps,
            layout=self._image.layout.hash,
            codec={"name": codec.name, **encoded.params},
            payload=encoded.payload,
            metrics=dict(result.metrics),
            train_seconds=train_seconds,
            created_at=self._clock.now(),
        )
        self._residual.put(encode(update))
        self.updates_made += 1
        self._metrics.outbox.set(len(self._outbox))
        self._publisher.wake.set()
        return True

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
                if self._outbox.is_full():
                    self._say(f"the outbox is full ({len(self._outbox)} updates): training pauses")
                    self._clock.wait(self.stop, 0.2)
                    continue
                rest_s = self.settings.pause_s if self.step() else 0.5
                retry_s = RETRY_S[0]
            except TaskError as error:
                self._metrics.failures.inc()
                log.error("%s; going on", error, exc_info=error.__cause__)
                rest_s, retry_s = retry_s, min(RETRY_S[1], 2 * retry_s)
            except Unavailable as error:
                self._say(f"{error}; waiting for it")
                rest_s, retry_s = retry_s, min(RETRY_S[1], 2 * retry_s)
            if rest_s:
                self._clock.wait(self.stop, rest_s)

    def _done(self) -> bool:
        return bool(self.settings.updates_max) and self.updates_made >= self.settings.updates_max

    def _pull(self) -> bool:
        """Load the newest weights if they are newer than what is at hand; one small read when not.

        While the store is away, the worker trains on from the weights it has. Tells whether there are
        weights to train from: not while the job has not started.
        """
        try:
            head = self._store.head()
            if head is not None and (self._replica.differs(head) or head.layout != self._image.layout.hash):
                self._job = self._store.job()
                if not self._job:
                    self._not_started()
                    return False
                self._check(self._replica.pull(head))
                log.debug("pulled version %d", head.version)
        except VersionGone as error:  # it was replaced while we pulled: look again
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
    def _image(self) -> ModelImage:
        """This task's own model as an image; built once."""
        if self._own is None:
            self._model = self._task.build()
            self._own = read(self._model)
        return self._own

    def _check(self, base: ModelImage) -> None:
        """Compare this task's model with the job's; a difference cannot be mended by waiting."""
        mine, theirs = self._image.layout, base.layout
        if mine.hash != theirs.hash:
            raise SettingsError(
                f"task {self._task.name} does not fit job {self.settings.job!r}: {difference(mine, theirs)}"
            )
        limit = int(self._job["update_bytes_max"])
        name = self._job["codec"]
        names = CHOICES if name == AUTO else (name,)
        size = max(parse(each).payload_bytes_max(theirs) for each in names) + ENVELOPE_BYTES_MAX
        if size > limit:
            raise SettingsError(
                f"an update of {theirs.num_params} parameters as {name} may take {size} bytes, the job's "
                f"update_bytes_max is {limit}: choose a smaller FEDMQ_CODEC for the job, or raise "
                "FEDMQ_UPDATE_BYTES_MAX (and max_message_size of RabbitMQ)"
            )

    def _codec(self, delta: Vector, train_seconds: float, seed: int) -> Codec:
        """Return the job's codec for this update; `auto` leaves it to this worker."""
        name = self._job["codec"]
        if name != AUTO:
            return parse(name)
        return self._auto.codec(delta, self._image.layout, train_seconds, seed)

    def _context(self) -> Context:
        settings = self.settings
        stream = (settings.seed, zlib.crc32(settings.client_id.encode()), self._outbox.next_sequence)
        seed = int(np.random.SeedSequence(stream).generate_state(1, np.uint32)[0])
        return Context(settings.client_id, self._version, seed, settings.task_settings, self.stop.is_set)

    def _train(self, context: Context) -> tuple[TrainResult, Any]:
        """Train from the base weights; return the result and the delta (float32 [n])."""
        assert self._base is not None, "pulled before"  # noqa: S101
        write(self._model, self._base)
        # A half-precision model holds the base only as rounded: the delta is relative to what training started from.
        exact = all(spec.dtype == "float32" for spec in self._base.layout.averaged)
        start = self._base.weights if exact else read(self._model).weights
        result = _checked(self._task.train(self._model, context), self._task.name)
        after = read(self._model)
        if after.layout != self._base.layout:
            raise TaskError(
                f"train() of {self._task.name} changed the model's tensors: "
                f"{difference(after.layout, self._base.layout)}"
            )
        delta = after.weights
        delta -= start
        norm = math.sqrt(squared_norm(delta))
        if not norm <= NORM_MAX:  # nor NaN
            finite = math.isfinite(norm)
            what = f"a delta of norm {norm:.4g}, above {NORM_MAX:g}" if finite else "weights that are not finite"
            raise TaskError(f"train() of {self._task.name} gave {what}: the update is not sent")
        return result, delta

    def _say(self, message: str) -> None:
        """Log a condition once, not at every turn."""
        if message != self._said:
            log.warning("%s", message)
            self._said = message


def _checked(result: TrainResult, task: str) -> TrainResult:
    """Return a task's result as plain numbers; numbers of numpy or torch are fine, metrics that are not finite go.

    Raises:
        TaskError: it cannot be sent; the message says why.
    """
    try:
        num_samples, num_steps = operator.index(result.num_samples), operator.index(result.num_steps)
        metrics = {name: float(value) for name, value in result.metrics.items()}
    except (TypeError, ValueError, AttributeError) as error:
        raise TaskError(
            f"train() of {task} must report whole numbers of samples and steps and a dict of numbers: {error}"
        ) from error
    if not (0 < num_samples <= NUM_SAMPLES_MAX and 0 < num_steps <= NUM_STEPS_MAX):
        raise TaskError(f"train() of {task} reports {num_samples} samples and {num_steps} steps: both must be positive")
    if len(metrics) > METRICS_MAX or not all(isinstance(name, str) and len(name) <= NAME_CHARS_MAX for name in metrics):
        raise TaskError(
            f"train() of {task}: at most {METRICS_MAX} metrics, their names up to {NAME_CHARS_MAX} characters"
        )
    return TrainResult(num_samples, num_steps, {name: value for name, value in metrics.items() if math.isfinite(value)})
