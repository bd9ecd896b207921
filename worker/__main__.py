"""`python -m worker`: a worker as a program; `fedmq worker` is the same."""

import logging
import threading

import typer

from shared import metrics_push
from shared.clock import Clock, SystemClock
from shared.command import settings_command, stop_on_signals, wait_for_servers
from shared.config import WorkerSettings
from shared.errors import DiskFull
from shared.logs import log_to_stderr
from shared.metrics import WorkerMetrics, of_job, serve
from shared.store.redis import RedisStore
from shared.transport.rabbitmq import RabbitSink
from worker import check
from worker.gate import DISK_S
from worker.outbox import Outbox
from worker.pace import Pace
from worker.publisher import Publisher
from worker.task import Task
from worker.training import Trainer
from worker.worker import Worker

log = logging.getLogger("fedmq.worker")

CONNECT_S = 6.0
HELP = "Train a task on this device's data and publish one compressed update at a time."


def run(settings: WorkerSettings) -> None:
    """Run until SIGTERM, or until `updates_max`."""
    log_to_stderr(settings.log_level, settings.log_format, job=settings.job, client=settings.client_id)
    stop = threading.Event()
    stop_on_signals(stop)
    task = Task.load(settings.task)
    clock, metrics = SystemClock(), WorkerMetrics()
    outbox = open_outbox(settings, clock, stop)
    downlink = Pace(settings.downlink_bytes_per_s, clock, stop)
    store = RedisStore(settings.store_url, settings.job, pace=downlink if downlink.rate else None)
    wait_for_servers(store.head, settings.wait_s, stop)
    sink = RabbitSink(settings.broker_url, settings.client_id)
    stop_serving = serve(
        of_job(metrics.registry, settings.job),
        settings.metrics_port,
        lambda: None if sink.link.ready.is_set() else str(sink.link.problem),
        settings.metrics_cert,
        settings.metrics_key,
    )
    stop_pushing = metrics_push.start(metrics.registry, settings, "worker", settings.client_id)
    try:
        wait_for_servers(lambda: sink.link.wait_ready(CONNECT_S), settings.wait_s, stop)
        publisher = Publisher(
            settings.job, settings.client_id, outbox, sink, clock, metrics, settings.confirm_timeout_s,
            Pace(settings.uplink_bytes_per_s, clock, stop),
        )  # fmt: skip
        worker = Worker(settings, Trainer(task), store, outbox, publisher, clock, metrics)
        worker.stop = stop
        log.info(
            "worker %s of job %s, task %s, %d updates waiting", settings.client_id, settings.job, task.name, len(outbox)
        )
        worker.run()
        log.info("stopped after %d updates, %d still in the outbox", worker.updates_made, len(outbox))
    finally:
        sink.close()
        store.close()
        outbox.close()
        stop_serving()
        stop_pushing()


def open_outbox(settings: WorkerSettings, clock: Clock, stop: threading.Event) -> Outbox:
    """Open this worker's outbox; on a full disk wait for the little room it needs."""
    folder, said = settings.state_dir.expanduser() / settings.job / settings.client_id, False
    while True:
        try:
            return Outbox(
                folder, settings.client_id, settings.outbox_updates_max, settings.outbox_bytes_max,
                free_min_bytes=settings.disk_free_min_bytes,
            )  # fmt: skip
        except DiskFull as error:
            if not said:
                log.warning("%s; waiting for room", error)
            said = True
        clock.wait(stop, DISK_S)
        if stop.is_set():
            raise KeyboardInterrupt


app = typer.Typer(add_completion=False)
settings_command(app, "worker", WorkerSettings, run, HELP, check.run)

if __name__ == "__main__":
    app()
