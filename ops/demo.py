"""The main job to watch: ten workers, non-IID data, compressed updates, FedBuff - embedded or on real servers."""

import tempfile
import time
import uuid
from contextlib import ExitStack
from pathlib import Path

from rich.console import Console

from ops import report
from ops.fleet import PROCESS_S_MAX, Fleet
from ops.history import History
from ops.plan import Plan, plan, simulation
from ops.screen import Screen, table_of
from ops.servers import servers_or_urls
from ops.simulation.database import Database
from ops.simulation.executor import InThisProcess
from ops.simulation.simulator import Simulator
from shared.errors import FedMQError, TaskError
from shared.model_image import ModelImage
from shared.store.redis import RedisStore
from shared.transport.rabbitmq import queue_depths
from worker.task import Task, read
from worker.training import Trainer

__all__ = ["embedded", "on_servers", "plan"]

SCRAPE_S = 1.0  # between two looks at what the workers pulled
QUIET_S_MAX = 120.0  # without any progress on the servers, the demo gives up and shows the logs


def embedded(job: Plan) -> History:
    """Run in this process, without servers, in virtual time."""
    trainer = Trainer(Task.load(job.task, needs=("build", "train", "evaluate")))
    simulator = Simulator(simulation(job), trainer, InThisProcess(trainer), Database(None))
    with Screen(job, "virtual time, in-process broker and store") as screen:
        for history in simulator.run():
            screen.show(history)
    if simulator.failures:
        raise TaskError(
            f"{sum(simulator.failures.values())} trainings raised; the first: {next(iter(simulator.failures))}"
        )
    _leave_behind(job, history, simulator.model(), "embedded")
    return history


def on_servers(job: Plan, broker_url: str | None, store_url: str | None) -> History:
    """Run for real: servers, one aggregator, one evaluator and the workers as processes.

    Raises:
        FedMQError: a process failed, nothing moved for two minutes, or an update is not accounted for.
    """
    task = Task.load(job.task, needs=("build", "train", "evaluate"))
    name = f"demo-{uuid.uuid4().hex[:8]}"
    console = Console()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fedmq-demo-")))
        if not broker_url:
            console.print("starting a private RabbitMQ and Redis on free ports ...")
        broker_url, store_url = stack.enter_context(servers_or_urls(broker_url, store_url))
        store = RedisStore(store_url, name)
        initial = folder / "version-0.safetensors"
        read(task.build()).save(initial)
        fleet = stack.enter_context(Fleet(job, name, broker_url, store_url, folder))
        fleet.start(initial)
        with Screen(job, f"RabbitMQ and Redis, {job.workers + 2} processes, job {name}") as screen:
            history = _watch(job, store, fleet, screen)
            history.pulled(*fleet.pulled())
            fleet.stop_workers()
            history = _drain(store, fleet, screen, history, broker_url, name)
        fleet.stop_all()
        head = store.head()
        if head is None:
            raise FedMQError("the job vanished from the store")
        _leave_behind(job, history, store.model(head.version), "RabbitMQ and Redis")
        _account(history, fleet.published(), console)
        return history


def _watch(job: Plan, store: RedisStore, fleet: Fleet, screen: Screen) -> History:
    """Follow the ledger and the evaluations until enough updates were applied."""
    history = History(0)
    started = moved = time.monotonic()
    revision, evaluated, scraped = 0, -1, started
    while len(history.staleness) < job.updates:
        fleet.check()
        head = store.head()
        if head is not None and head.revision > revision:
            history.num_params = head.num_params
            entries = list(store.ledger(revision))
            revision = entries[-1]["revision"] if entries else revision
            for entry in entries:
                history.add_entries(entry["updates"])
            moved = time.monotonic()
        if time.monotonic() - scraped > SCRAPE_S:
            history.pulled(*fleet.pulled())
            scraped = time.monotonic()
        version, metrics = store.newest_evaluation()
        if version > evaluated:
            evaluated = version
            history.evaluated(time.monotonic() - started, version, metrics)
            screen.show(history)
        if time.monotonic() - moved > QUIET_S_MAX:
            raise FedMQError(
                f"nothing moved for {QUIET_S_MAX:.0f} s; the aggregator's log ends:\n{fleet.log('aggregator')}"
            )
        time.sleep(0.1)
    return history


def _drain(store: RedisStore, fleet: Fleet, screen: Screen, history: History, broker_url: str, name: str) -> History:
    """Wait until every published update is settled and the newest version evaluated."""
    deadline = time.monotonic() + PROCESS_S_MAX
    published = fleet.published()
    while True:
        fleet.check()
        final = History(history.num_params, rows=history.rows)
        final.pulled(history.bytes_pulled, history.pulls)
        for entry in store.ledger():
            final.add_entries(entry["updates"])
        head, (version, metrics) = store.head(), store.newest_evaluation()
        settled = sum(final.outcomes[outcome] for outcome in ("applied", "stale", "rejected"))
        if head is not None and settled >= published and version == head.version:
            break
        if time.monotonic() > deadline:
            depth = queue_depths(broker_url, name, 5.0)["updates"]
            raise FedMQError(
                f"{published} updates published, {dict(final.outcomes)} settled, {depth} still in the queue"
            )
        time.sleep(0.2)
    final.evaluated(history.rows[-1].time_s if history.rows else 0.0, version, metrics)
    screen.show(final)
    return final


def _account(history: History, published: int, console: Console) -> None:
    """Check and print that every update is accounted for."""
    applied, refused, rejected = (history.outcomes[outcome] for outcome in ("applied", "stale", "rejected"))
    console.print(
        f"published {published} = applied {applied} + refused {refused} + rejected {rejected}; "
        f"seen twice and not applied again: {history.outcomes['duplicate']}"
    )
    if published != applied + refused + rejected:
        raise FedMQError(f"{published} published, but {applied} + {refused} + {rejected} settled: an update is lost")


def _leave_behind(job: Plan, history: History, model: ModelImage, where: str) -> None:
    """Write the files and print the table and the last line."""
    history.save_csv(job.out / "history.csv")
    model.save(job.out / "model.safetensors")
    settings = {
        "task": job.task, "where": where, "workers": job.workers, "rule": "fedbuff", "buffer_size": job.buffer_size,
        "codec": job.codec, "downlink": job.downlink, "seed": job.seed, "parameters": f"{history.num_params:,}",
    }  # fmt: skip
    report.save(history, job.out, f"FedMQ: {job.task}, {job.workers} workers", settings)
    console = Console()
    console.print(table_of(history, "The run"))
    console.print(f"left in {job.out}/: report.html, curves.png, history.csv, model.safetensors")
