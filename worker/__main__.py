"""`python -m worker`: a worker as a program; `fedmq worker` is the same."""

import logging
import threading

import typer

from shared.clock import SystemClock
from shared.command import log_to_stderr, settings_command, stop_on_signals, wait_for_servers
from shared.config import WorkerSettings
from shared.metrics import WorkerMetrics, serve
from shared.store.redis import RedisStore
from shared.transport.rabbitmq import RabbitSink
from worker.outbox import Outbox
from worker.publisher import Publisher
from worker.task import Task
from worker.training import Trainer
from worker.worker import Worker

log = logging.getLogger("fedmq.worker")

CONNECT_S = 6.0
HELP = "Train a task on this device's data and publish one compressed update at a time."


def run(settings: WorkerSettings) -> None:
    """Run until SIGTERM, or until `updates_max`."""
    log_to_stderr(settings.log_level)
    stop = threading.Event()
    stop_on_signals(stop)
    task = Task.load(settings.task)
    clock, metrics = SystemClock(), WorkerMetrics()
    folder = settings.state_dir.expanduser() / settings.job / settings.client_id
    outbox = Outbox(folder, settings.client_id, settings.outbox_updates_max, settings.outbox_bytes_max)
    store = RedisStore(settings.store_url, settings.job)
    wait_for_servers(store.head, settings.wait_s, stop)
    sink = RabbitSink(settings.broker_url, settings.client_id)
    stop_serving = serve(
        metrics.registry, settings.metrics_port, lambda: None if sink.link.ready.is_set() else str(sink.link.problem)
    )
    try:
        wait_for_servers(lambda: sink.link.wait_ready(CONNECT_S), settings.wait_s, stop)
        publisher = Publisher(
            settings.job, settings.client_id, outbox, sink, clock, metrics, settings.confirm_timeout_s
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


app = typer.Typer(add_completion=False)
settings_command(app, "worker", WorkerSettings, run, HELP)

if __name__ == "__main__":
    app()
