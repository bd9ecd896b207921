"""The evaluator: measures each new version on held-out data, for the store and for Prometheus."""

import logging
import socket
import threading

from ops.status import metrics_text
from ops.tensorboard import writer as tensorboard
from shared import metrics_push
from shared.clock import Clock, SystemClock
from shared.command import stop_on_signals, wait_for_servers
from shared.config import EvaluatorSettings
from shared.errors import SettingsError, TaskError, Unavailable, VersionGone
from shared.layout import difference
from shared.logs import log_to_stderr
from shared.metrics import EvaluatorMetrics, of_job, serve
from shared.store.ports import ModelStore
from shared.store.redis import RedisStore
from worker.task import Context, Task, read, write

log = logging.getLogger("fedmq.evaluator")

HELP = "Evaluate each new version on held-out data; write the numbers to the store and to Prometheus."


class Evaluator:
    """The loop; versions that come faster than it measures are skipped."""

    def __init__(
        self, settings: EvaluatorSettings, task: Task, store: ModelStore, clock: Clock, metrics: EvaluatorMetrics
    ) -> None:
        self.settings, self.stop = settings, threading.Event()
        self._task, self._store, self._clock, self._metrics = task, store, clock, metrics
        self._model = task.build()
        self._layout = read(self._model).layout
        self._version = -1
        self._curves = (
            tensorboard(settings.tensorboard_dir, "FEDMQ_TENSORBOARD_DIR") if settings.tensorboard_dir else None
        )
        self.problem: str | None = None

    def step(self) -> bool:
        """Evaluate the newest version if it is new; tell whether it was.

        Raises:
            StoreUnavailable, TaskError, SettingsError: as for a worker.
        """
        head = self._store.head()
        if head is None or head.version == self._version:
            return False
        try:
            image = self._store.model(head.version)
        except VersionGone:
            return False
        if image.layout.hash != self._layout.hash:
            raise SettingsError(
                f"task {self._task.name} does not fit job {self.settings.job!r}: "
                f"{difference(self._layout, image.layout)}"
            )
        write(self._model, image)
        self._version = head.version
        metrics = self._task.evaluate(self._model, Context("", head.version, 0, self.settings.task_settings))
        self._store.record_evaluation(head.version, metrics)
        for name, value in metrics.items():
            self._metrics.evaluation.labels(name).set(value)
            if self._curves is not None:
                self._curves.add_scalar(name, value, head.version)
        self._metrics.version.set(head.version)
        log.info("version %d: %s", head.version, metrics_text(metrics))
        return True

    def close(self) -> None:
        """Write the end of the curves."""
        if self._curves is not None:
            self._curves.close()

    def run(self) -> None:
        """Step until stopped."""
        while not self.stop.is_set():
            try:
                worked = self.step()
                self.problem = None
            except (Unavailable, TaskError) as error:
                self.problem, worked = str(error), False
                log.error("%s; going on", error, exc_info=error.__cause__ if isinstance(error, TaskError) else None)
            if not worked:
                self._clock.wait(self.stop, self.settings.poll_s)


def run(settings: EvaluatorSettings) -> None:
    """Run until SIGTERM."""
    log_to_stderr(settings.log_level, settings.log_format, job=settings.job)
    stop = threading.Event()
    stop_on_signals(stop)
    task = Task.load(settings.task, needs=("build", "evaluate"))
    metrics = EvaluatorMetrics()
    store = RedisStore(settings.store_url, settings.job)
    wait_for_servers(store.head, settings.wait_s, stop)
    evaluator = Evaluator(settings, task, store, SystemClock(), metrics)
    evaluator.stop = stop
    stop_serving = serve(
        of_job(metrics.registry, settings.job),
        settings.metrics_port,
        lambda: evaluator.problem,
        settings.metrics_cert,
        settings.metrics_key,
    )
    stop_pushing = metrics_push.start(metrics.registry, settings, "evaluator", socket.gethostname())
    try:
        log.info("evaluating job %s with task %s", settings.job, task.name)
        evaluator.run()
    finally:
        evaluator.close()
        stop_serving()
        stop_pushing()
        store.close()
