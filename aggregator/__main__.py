"""`python -m aggregator`: the aggregator as a program; `fedmq aggregator` is the same."""

import logging
import socket
import threading

import typer

from aggregator.aggregator import Aggregator
from aggregator.recorder import Recorder
from shared import metrics_push, supported
from shared.clock import Clock, SystemClock
from shared.command import settings_command, stop_on_signals, wait_for_servers
from shared.config import AggregatorSettings
from shared.errors import SettingsError, Unavailable
from shared.logs import log_to_stderr
from shared.metrics import AggregatorMetrics, of_job, serve
from shared.model_image import ModelImage
from shared.store.ports import StateStore
from shared.store.redis import RedisStore
from shared.transport.rabbitmq import RabbitSource
from shared.transport.topology import QueueLimits

log = logging.getLogger("fedmq.aggregator")

STUCK_S = 60.0  # a step that lasts longer is reported by /healthz
CONNECT_S = 6.0

HELP = "Consume updates, average them, store model versions. A second one on the same job stands by."


def run(settings: AggregatorSettings) -> None:
    """Run until SIGTERM."""
    log_to_stderr(settings.log_level, settings.log_format, job=settings.job)
    stop = threading.Event()
    stop_on_signals(stop)
    clock, metrics = SystemClock(), AggregatorMetrics()
    initial = ModelImage.from_file(settings.init_model) if settings.init_model else None
    running: list[Aggregator] = []
    waiting = "starting"

    def health() -> str | None:
        if not running:
            return waiting
        aggregator = running[0]
        idle_s = clock.monotonic() - aggregator.stepped_at
        return aggregator.problem or (f"no step for {idle_s:.0f} s" if idle_s > STUCK_S else None) or _broker(source)

    stop_serving = serve(
        of_job(metrics.registry, settings.job),
        settings.metrics_port,
        health,
        settings.metrics_cert,
        settings.metrics_key,
    )
    stop_pushing = metrics_push.start(metrics.registry, settings, "aggregator", socket.gethostname())
    store = RedisStore(settings.store_url, settings.job, settings.durable, settings.store_replicas)
    wait_for_servers(lambda: log.info("Redis %s, commits durable", store.check()), settings.wait_s, stop)
    limits = QueueLimits(
        settings.queue_bytes_max, settings.queue_updates_max, settings.dead_bytes_max, settings.dead_age_max_s
    )
    source = RabbitSource(settings.broker_url, settings.job, settings.prefetch, limits)
    try:
        wait_for_servers(lambda: source.link.wait_ready(CONNECT_S), settings.wait_s, stop)
        version = supported.check("RabbitMQ", source.link.server_version())
        log.info("RabbitMQ %s, queue of job %s", version, settings.job)
        waiting = f"waiting for version 0 of job {settings.job!r}"
        if not start_job(store, initial, settings.job, clock, stop):
            return
        del initial  # of model size; the aggregator reads what is stored
        received = (
            Recorder(source, settings.record_dir, settings.job, settings.record_bytes_max)
            if settings.record_dir
            else source
        )
        aggregator = Aggregator(settings, received, store, clock, metrics)
        aggregator.stop = stop
        store.announce(aggregator.describe())
        running.append(aggregator)
        log.info(
            "job %s at version %d, revision %d, %d in the buffer; rule %s",
            settings.job, aggregator.state.version, aggregator.state.revision, len(aggregator.state.buffer),
            settings.rule,
        )  # fmt: skip
        aggregator.run()
        log.info("stopped at version %d, revision %d", aggregator.state.version, aggregator.state.revision)
    finally:
        source.close()
        store.close()
        stop_serving()
        stop_pushing()


def start_job(store: StateStore, initial: ModelImage | None, job: str, clock: Clock, stop: threading.Event) -> bool:
    """See to it that the job has a version 0; tell whether it has one (False: stopped while waiting).

    Raises:
        SettingsError: the job exists with another layout than the given starting model.
    """
    said = False
    while not stop.is_set():
        try:
            if initial is not None and store.create(initial, clock.now()):
                log.info("job %s starts from the given model, %d parameters", job, initial.layout.num_params)
            head = store.head()
        except Unavailable as error:
            log.warning("%s; waiting", error)
            clock.wait(stop, 1.0)
            continue
        if head is not None:
            if initial is not None and head.layout != initial.layout.hash:
                raise SettingsError(
                    f"job {job!r} exists with another layout than FEDMQ_INIT_MODEL's: choose another job"
                )
            return True
        if not said:
            log.warning(
                "job %s has no model yet: run `fedmq models init TASK --job %s` where torch is installed, or give me "
                "FEDMQ_INIT_MODEL - or, if it had one, `fedmq restore FILE`; waiting", job, job,
            )  # fmt: skip
            said = True
        clock.wait(stop, 0.5)
    return False


def _broker(source: RabbitSource) -> str | None:
    return None if source.link.ready.is_set() else str(source.link.problem)


app = typer.Typer(add_completion=False)
settings_command(app, "aggregator", AggregatorSettings, run, HELP)

if __name__ == "__main__":
    app()
