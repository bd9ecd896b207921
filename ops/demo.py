"""The main job to watch: ten workers, non-IID data, compressed updates, FedBuff - embedded or on real servers."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from rich.console import Console
from rich.live import Live
from rich.table import Table

from ops import report
from ops.embedded import Embedded
from ops.history import History
from ops.servers import servers_or_urls
from shared.config import AggregatorSettings, WorkerSettings
from shared.errors import FedMQError, SettingsError
from shared.model_image import ModelImage
from shared.store.redis import RedisStore
from shared.transport.rabbitmq import queue_depths
from worker.task import Task, read

PROCESS_S_MAX = 120.0  # for a process to come up, or to end after SIGTERM
QUIET_S_MAX = 120.0  # without any progress on the servers, the demo gives up and shows the logs
RATE_S = 2.0  # updates/s is taken over about so long
PLAIN_LINE_S = 2.0  # between two progress lines where there is no terminal


@dataclass(frozen=True, slots=True)
class Plan:
    """What is run.

    Attributes:
        task: built-in name or file.
        updates: local trainings in all.
        workers: number of devices.
        codec: how updates are encoded.
        buffer_size: FedBuff's K.
        seed: of everything random.
        out: folder for what it leaves behind.
    """

    task: str
    updates: int
    workers: int
    codec: str
    buffer_size: int
    seed: int
    out: Path


DEFAULT_UPDATES = {"digits": 3000, "mnist": 1200}


def plan(
    task: str, updates: int | None, workers: int, codec: str, buffer_size: int, seed: int, out: Path | None
) -> Plan:
    """Fill in what depends on the task.

    Raises:
        SettingsError: fewer workers or updates than make sense.
    """
    updates = DEFAULT_UPDATES.get(Path(task).stem, 1000) if updates is None else updates
    if workers < 1 or buffer_size < 1 or updates < buffer_size:
        raise SettingsError(
            f"--workers {workers}, --buffer-size {buffer_size}, --updates {updates}: at least 1, 1, one buffer"
        )
    name = "demo" if task == "digits" else f"demo-{Path(task).stem}"
    out = out or Path("runs") / name
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SettingsError(f"--out {out} cannot be used: {error.strerror}") from error
    try:
        import matplotlib  # noqa: F401
        import torch  # noqa: F401
    except ModuleNotFoundError as error:
        raise SettingsError(f"the demo needs {error.name}: pip install 'fedmq[demo]'") from error
    return Plan(task, updates, workers, codec, buffer_size, seed, out)


def embedded(job: Plan) -> History:
    """Run in this process, without servers, in virtual time."""
    import torch

    torch.manual_seed(job.seed)
    task = Task.load(job.task, needs=("build", "train", "evaluate"))
    settings = AggregatorSettings(**_job_settings(job), commit_interval_s=0.0)
    workers = [_worker_settings(job, index, Path(tempfile.gettempdir())) for index in range(job.workers)]
    system = Embedded(task, settings, workers, mean_trips_s(job.workers, job.seed), job.seed)
    every = max(1, job.updates // job.buffer_size // 60)
    try:
        with Screen(job, "virtual time, in-process broker and store") as screen:
            for history in system.run(job.updates, every):
                screen.show(history)
        _leave_behind(job, history, system.model(), "embedded")
        return history
    finally:
        system.close()


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
        fleet = stack.enter_context(_Fleet(job, name, broker_url, store_url, folder))
        fleet.start(initial)
        with Screen(job, f"RabbitMQ and Redis, {job.workers + 2} processes, job {name}") as screen:
            history = _watch(job, store, fleet, screen)
            fleet.stop_workers()
            history = _drain(store, fleet, screen, history, broker_url, name)
        fleet.stop_all()
        head = store.head()
        if head is None:
            raise FedMQError("the job vanished from the store")
        _leave_behind(job, history, store.model(head.version), "RabbitMQ and Redis")
        _account(history, fleet.published(), console)
        return history


def mean_trips_s(workers: int, seed: int) -> list[float]:
    """Draw each worker's mean seconds per trip: log-normal, the slowest several times the fastest."""
    return [float(x) for x in np.random.default_rng(seed).lognormal(0.0, 0.6, workers)]


def _job_settings(job: Plan) -> dict[str, Any]:
    return {"job": "demo", "codec": job.codec, "buffer_size": job.buffer_size, "rule": "fedbuff", "server_lr": 1.0}


def _worker_settings(job: Plan, index: int, folder: Path) -> WorkerSettings:
    settings = {"share": str(index), "shares": str(job.workers)}
    return WorkerSettings(
        job="demo", client_id=f"worker-{index}", task=job.task, task_settings=settings, state_dir=folder, seed=job.seed
    )


class _Fleet:
    """The processes of one demo on servers."""

    def __init__(self, job: Plan, name: str, broker_url: str, store_url: str, folder: Path) -> None:
        self._job, self._name, self._folder = job, name, folder
        self._urls = {
            "FEDMQ_BROKER_URL": broker_url,
            "FEDMQ_STORE_URL": store_url,
            "FEDMQ_JOB": name,
            "FEDMQ_WAIT_S": "30",
        }
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._stopped: set[str] = set()

    def __enter__(self) -> "_Fleet":
        """Nothing runs yet."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Kill what still runs."""
        for process in self._processes.values():
            if process.poll() is None:
                process.kill()
                process.wait()

    def start(self, initial: Path) -> None:
        """Start the aggregator, the evaluator and the workers; the slower ones rest longer between trainings."""
        job = self._job
        given = {f"FEDMQ_{key.upper()}": str(value) for key, value in _job_settings(job).items() if key != "job"}
        self._start("aggregator", ["-m", "aggregator"], given | {
            "FEDMQ_INIT_MODEL": str(initial), "FEDMQ_COMMIT_INTERVAL_S": "0.05", "FEDMQ_COMMIT_AGE_MAX_S": "1",
        })  # fmt: skip
        self._start("evaluator", ["-m", "ops.cli", "evaluator"], {"FEDMQ_TASK": job.task, "FEDMQ_POLL_S": "0.2"})
        for index, trip_s in enumerate(mean_trips_s(job.workers, job.seed)):
            settings = json.dumps({"share": str(index), "shares": str(job.workers)})
            self._start(f"worker-{index}", ["-m", "worker"], {
                "FEDMQ_CLIENT_ID": f"worker-{index}", "FEDMQ_TASK": job.task, "FEDMQ_TASK_SETTINGS": settings,
                "FEDMQ_STATE_DIR": str(self._folder / "state"), "FEDMQ_SEED": str(job.seed),
                "FEDMQ_PAUSE_S": f"{0.04 * trip_s:.3f}", "OMP_NUM_THREADS": "1",
            })  # fmt: skip

    def check(self) -> None:
        """Raise if a process ended that should run."""
        for name, process in self._processes.items():
            if name not in self._stopped and process.poll() is not None:
                raise FedMQError(f"{name} ended with exit code {process.returncode}; its log ends:\n{self.log(name)}")

    def stop_workers(self) -> None:
        """Have every worker finish and publish what it has."""
        self._stop([name for name in self._processes if name.startswith("worker-")])

    def stop_all(self) -> None:
        """End the rest in good order."""
        self._stop(["aggregator", "evaluator"])

    def published(self) -> int:
        """Count the updates the workers made and got confirmed, from their outboxes."""
        made = 0
        for path in (self._folder / "state" / self._name).glob("*/outbox.json"):
            left = len(list(path.parent.glob("*.update")))
            made += int(json.loads(path.read_text())["next_sequence"]) - left
        return made

    def log(self, name: str, chars: int = 1500) -> str:
        """Return the end of a process's log."""
        return (self._folder / f"{name}.log").read_text(errors="replace")[-chars:]

    def _start(self, name: str, arguments: list[str], environment: dict[str, str]) -> None:
        inherited = {
            key: value for key, value in os.environ.items() if not key.startswith("FEDMQ_") or key == "FEDMQ_DATA"
        }
        with (self._folder / f"{name}.log").open("wb") as log:
            self._processes[name] = subprocess.Popen(
                [sys.executable, *arguments], env=inherited | self._urls | environment, stdin=subprocess.DEVNULL,
                stdout=log, stderr=log,
            )  # fmt: skip

    def _stop(self, names: list[str]) -> None:
        self._stopped.update(names)
        for name in names:
            self._processes[name].send_signal(signal.SIGTERM)
        for name in names:
            code = self._processes[name].wait(PROCESS_S_MAX)
            if code != 0:
                raise FedMQError(f"{name} ended with exit code {code}; its log ends:\n{self.log(name)}")


def _watch(job: Plan, store: RedisStore, fleet: _Fleet, screen: "Screen") -> History:
    """Follow the ledger and the evaluations until enough updates were applied."""
    history = History(0)
    started = moved = time.monotonic()
    revision, evaluated = 0, -1
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


def _drain(store: RedisStore, fleet: _Fleet, screen: "Screen", history: History, broker_url: str, name: str) -> History:
    """Wait until every published update is settled and the newest version evaluated."""
    deadline = time.monotonic() + PROCESS_S_MAX
    published = fleet.published()
    while True:
        fleet.check()
        final = History(history.num_params, rows=history.rows)
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
        "codec": job.codec, "seed": job.seed, "parameters": f"{history.num_params:,}",
    }  # fmt: skip
    report.save(history, job.out, f"FedMQ: {job.task}, {job.workers} workers", settings)
    console = Console()
    console.print(_table(history, "The run"))
    console.print(f"left in {job.out}/: report.html, curves.png, history.csv, model.safetensors")


def _table(history: History, title: str) -> Table:
    table = Table(title=title, title_justify="left")
    for column in ("version", "updates", "staleness", "MB sent", "accuracy", "loss"):
        table.add_column(column, justify="right")
    step = max(1, -(-len(history.rows) // 10))
    shown = history.rows[::step]
    for row in shown if shown[-1:] == history.rows[-1:] else [*shown, history.rows[-1]]:
        table.add_row(
            str(row.version), str(row.updates), f"{row.staleness_mean:.2f}", f"{row.bytes_sent / 1e6:.2f}",
            f"{row.accuracy:.3f}", f"{row.loss:.3f}",
        )  # fmt: skip
    return table


class Screen:
    """Live progress: a panel on a terminal, a line now and then elsewhere."""

    def __init__(self, job: Plan, where: str) -> None:
        self._job, self._console = job, Console()
        self._console.print(
            f"{job.task}: {job.workers} workers, FedBuff of {job.buffer_size}, codec {job.codec}; {where}"
        )
        self._live = Live(console=self._console, refresh_per_second=8, transient=True)
        self._printed = time.monotonic()
        self._rate_from = (self._printed, 0)

    def __enter__(self) -> "Screen":
        """Start the panel."""
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Remove the panel."""
        if self._console.is_terminal:
            self._live.stop()

    def show(self, history: History) -> None:
        """Show the newest evaluation."""
        row, now = history.rows[-1], time.monotonic()
        since, updates = self._rate_from
        rate = (row.updates - updates) / max(1e-9, now - since)
        if now - since >= RATE_S:
            self._rate_from = (now, row.updates)
        if self._console.is_terminal:
            done = min(1.0, row.updates / self._job.updates)
            panel = Table.grid(padding=(0, 2))
            panel.add_row("version", "updates", "updates/s", "staleness", "accuracy", "")
            bar = "█" * int(30 * done) + "░" * (30 - int(30 * done))
            panel.add_row(
                f"[bold]{row.version}[/]", f"[bold]{row.updates}[/]", f"[bold]{rate:.0f}[/]",
                f"[bold]{row.staleness_mean:.2f}[/]", f"[bold green]{row.accuracy:.3f}[/]", f"[blue]{bar}[/]",
            )  # fmt: skip
            self._live.update(panel)
        elif now - self._printed >= PLAIN_LINE_S:
            self._printed = now
            self._console.print(
                f"version {row.version}, {row.updates} updates, {rate:.0f} updates/s, "
                f"staleness {row.staleness_mean:.2f}, accuracy {row.accuracy:.3f}"
            )
