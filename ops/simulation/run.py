"""`fedmq simulate`: run a plan, show how it goes, leave the report behind; go on where an interrupted run stopped."""

import json
import logging
import sqlite3
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from ops import report
from ops.history import History
from ops.screen import table_of
from ops.simulation.database import Database, Records
from ops.simulation.executor import executor_of, one_thread
from ops.simulation.plan import Plan, path_of_task, plain_plan, plan_of
from ops.simulation.simulator import HOUR_S, Simulator
from shared.command import stop_on_signals
from shared.errors import FedMQError, SettingsError
from worker.task import Task
from worker.training import Trainer, seed_everything

CHECKPOINT, RESULT = "simulation.sqlite", "result.json"


@dataclass(frozen=True, slots=True)
class Result:
    """What a simulation came to.

    Attributes:
        plan: what was run.
        history: its evaluations and what became of the updates.
        sha256: of the final weights' file.
        virtual_s: how much time passed in it.
        wall_s: how long it took here, over all its pieces.
        published: updates.
        lost: trips that were lost in mid-training.
        aborted: trips that came too late for their round.
        failures: message -> trainings that raised it.
        target_row: the row of the history where the target was reached, None: it was not.
    """

    plan: Plan
    history: History
    sha256: str
    virtual_s: float
    wall_s: float
    published: int
    lost: int
    aborted: int
    failures: dict[str, int]
    target_row: int | None


def simulate(
    plan: Plan, out: Path, processes: int = 1, show: Callable[[Simulator], None] | None = None,
    stop: threading.Event | None = None,
) -> Result:  # fmt: skip
    """Run a plan to its end.

    Args:
        plan: what to run.
        out: folder for what it leaves behind; what it holds of the same plan is gone on with, or returned.
        processes: trainings at once; changes nothing but the time it takes.
        show: called after each evaluation.
        stop: when set, the run ends with a checkpoint, to be gone on with.

    Raises:
        SettingsError: the folder holds another simulation, or the task does not fit.
        FedMQError: nothing can happen any more, though the end is not reached; or the disk is full.
        KeyboardInterrupt: it was asked to stop.
    """
    if (done := stored_result(out)) is not None:
        _refuse_another(out, done.plan, plan)
        return done
    task, seed = path_of_task(plan.fleet.task), plan.fleet.seed
    seed_everything(seed)  # a task may draw when it is imported
    trainer = Trainer(Task.load(task, needs=("build", "train", "evaluate")))
    _ = trainer.layout
    one_thread()
    database = _open(out, plan)
    executor = executor_of(task, trainer, processes, seed)
    try:
        with _quiet():
            result = _run(Simulator(plan, trainer, executor, database, stop), Records(database, "state"), show, out)
    except sqlite3.Error as error:
        raise FedMQError(f"the checkpoint {out / CHECKPOINT} cannot be used: {error}") from error
    finally:
        executor.close()
        database.close()
    _remove_checkpoint(out)
    return result


@contextmanager
def _quiet() -> Iterator[None]:
    """Leave out what one worker or one aggregator would warn of: thousands do, and the history counts it."""
    levels = {logger: logger.level for logger in map(logging.getLogger, ("fedmq.aggregator", "fedmq.worker"))}
    for logger in levels:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in levels.items():
            logger.setLevel(level)


def _run(
    simulator: Simulator, records: Records, show: Callable[[Simulator], None] | None, out: Path
) -> Result:  # fmt: skip
    started, before_s = time.monotonic(), float(records.get("wall_s", b"0"))
    for _ in simulator.run():
        records["wall_s"] = repr(before_s + time.monotonic() - started).encode()
        if show is not None:
            show(simulator)
    result = _result(simulator, before_s + time.monotonic() - started)
    simulator.model().save(out / "model.safetensors")
    leave_behind(result, out)
    return result


def leave_behind(result: Result, out: Path) -> None:
    """Write `history.csv`, `report.html`, `curves.png` and, last, `result.json`."""
    fleet, aggregator = result.plan.fleet, result.plan.aggregator
    result.history.save_csv(out / "history.csv")
    title = f"FedMQ: {fleet.task}, {fleet.clients:,} simulated devices, {aggregator.rule}"
    report.save(result.history, out, title, shown_settings(result), clients=fleet.clients, virtual=True)
    plain = {
        "plan": plain_plan(result.plan, given=True), "history": result.history.dump(), "sha256": result.sha256,
        "virtual_s": result.virtual_s, "wall_s": result.wall_s, "published": result.published, "lost": result.lost,
        "aborted": result.aborted, "failures": result.failures, "target_row": result.target_row,
    }  # fmt: skip
    temporary = out / (RESULT + ".new")
    temporary.write_text(json.dumps(plain))
    temporary.replace(out / RESULT)


def shown_settings(result: Result) -> dict[str, Any]:
    """Return what the report says of a run, one line each."""
    ended = {
        "virtual hours": f"{result.virtual_s / HOUR_S:.2f}", "updates published": f"{result.published:,}",
        "trips lost in mid-training": f"{result.lost:,}", "trips too late for their round": f"{result.aborted:,}",
        "trainings that raised": f"{sum(result.failures.values()):,}", "parameters": f"{result.history.num_params:,}",
        "sha256 of the final weights": result.sha256,
    }  # fmt: skip
    return ended | plain_plan(result.plan)


def stored_result(out: Path) -> Result | None:
    """Return what a finished simulation left in a folder, None when there is none."""
    path = out / RESULT
    if not path.is_file():
        return None
    try:
        plain = json.loads(path.read_text())
        history, plan = History.restored(plain.pop("history")), plan_of(plain.pop("plan"), str(path))
        return Result(plan=plan, history=history, **plain)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SettingsError(f"{path} cannot be read ({error}): give another folder, or remove it") from error


def _open(out: Path, plan: Plan) -> Database:
    """Open the folder's checkpoint; one of another plan is refused."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        database = Database(out / CHECKPOINT)
    except OSError as error:
        raise SettingsError(f"--out {out} cannot be used: {error.strerror}") from error
    except sqlite3.Error as error:
        busy = "locked" in str(error)
        what = "another simulation is running there" if busy else f"its {CHECKPOINT} is damaged ({error})"
        raise SettingsError(f"--out {out} cannot be used: {what}; give another --out") from error
    try:
        stored = Records(database, "state").get("plan")
        if stored is not None:
            _refuse_another(out, plan_of(json.loads(stored), str(out / CHECKPOINT)), plan)
    except Exception:
        database.close()
        raise
    return database


def _refuse_another(out: Path, theirs: Plan, ours: Plan) -> None:
    a, b = plain_plan(theirs), plain_plan(ours)
    differing = [f"{name}={a.get(name)!r}, not {b.get(name)!r}" for name in a | b if a.get(name) != b.get(name)]
    if not differing:
        return
    raise SettingsError(f"{out} holds another simulation ({'; '.join(differing)}): give another --out, or remove it")


def _remove_checkpoint(out: Path) -> None:
    for suffix in ("", "-wal", "-shm"):
        (out / (CHECKPOINT + suffix)).unlink(missing_ok=True)


def _result(simulator: Simulator, wall_s: float) -> Result:
    return Result(
        simulator.plan, simulator.history, simulator.model().sha256, simulator.clock.time_s, wall_s,
        simulator.published, simulator.counts.lost, simulator.counts.aborted, dict(simulator.failures),
        simulator.target_row(),
    )  # fmt: skip


def command(given: dict[str, Any], processes: int, out: Path) -> None:
    """Run one simulation from the command line: a bar while it runs, a table and a last line at the end."""
    plan, console, stop = plan_of(given), Console(), threading.Event()
    stop_on_signals(stop)
    fleet, aggregator = plan.fleet, plan.aggregator
    console.print(
        f"{fleet.task}: {fleet.clients:,} devices, {fleet.in_flight} at work at once; {aggregator.rule}, "
        f"codec {aggregator.codec}, downlink {aggregator.downlink}; seed {fleet.seed}"
    )
    columns = (BarColumn(), TextColumn("{task.percentage:3.0f} %  {task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        bar = progress.add_task("starting", total=1.0)
        said = [False]

        def show(simulator: Simulator) -> None:
            if simulator.resumed and not said[0]:
                progress.console.print(f"going on after {simulator.published:,} updates, from the checkpoint in {out}/")
            said[0] = True
            row = simulator.history.rows[-1]
            text = (
                f"{row.time_s / HOUR_S:.2f} h, version {row.version:,}, {simulator.published:,} updates, "
                f"{fleet.metric} {row.metrics.get(fleet.metric, float('nan')):.3f}"
            )
            progress.update(bar, completed=simulator.progress(), description=text)

        result = simulate(plan, out, processes, show, stop)
    console.print(table_of(result.history, "The run"))
    for message, count in Counter(result.failures).most_common(3):
        console.print(f"{count} trainings raised: {message}")
    console.print(f"left in {out}/: report.html, curves.png, history.csv, model.safetensors")
    print(last_line(result))


def last_line(result: Result) -> str:
    """Say what was reached, in one line."""
    line = f"after {result.virtual_s / HOUR_S:.2f} virtual hours: {result.history.last_line()}"
    fleet = result.plan.fleet
    if not fleet.target:
        return line
    if result.target_row is None:
        return f"{line}; {fleet.metric} {fleet.target:g} not reached"
    row = result.history.rows[result.target_row]
    return (
        f"{line}; {fleet.metric} {fleet.target:g} after {row.time_s / HOUR_S:.2f} h, {row.trips:,} trips, "
        f"{row.bytes_sent / 1e6:.2f} MB up, {row.bytes_pulled / 1e6:.1f} MB down"
    )
