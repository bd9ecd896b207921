"""`fedmq simulate compare`: run every simulation of an experiment, some at once, and leave the report behind."""

import logging
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from ops.simulation import tensorboard
from ops.simulation.comparison import Outcome, leave_behind
from ops.simulation.experiment import Experiment, Run, read
from ops.simulation.run import simulate, stored_result
from ops.simulation.simulator import HOUR_S
from ops.simulation.summary import numbers_of
from ops.tensorboard import check as check_tensorboard
from shared.command import stop_on_signals
from shared.errors import FedMQError, SettingsError

LOG = "log.txt"  # in a run's folder: what went wrong in it
ERROR_CHARS_MAX = 4000
POLL_S = 0.5  # between two looks at whether to stop

log = logging.getLogger("fedmq.simulation")


def command(path: Path, out: Path | None, processes: int, with_tensorboard: bool) -> None:
    """Run a comparison from the command line.

    Raises:
        SettingsError: the experiment needs a change; nothing was run.
        FedMQError: some runs failed; the report has the others.
    """
    if with_tensorboard:
        check_tensorboard("--tensorboard")
    experiment, console, stop = read(path), Console(), threading.Event()
    stop_on_signals(stop)
    out = out or Path("runs") / path.stem
    console.print(
        f"{experiment.title}: {len(experiment.variants)} variants x {len(experiment.seeds)} seeds = "
        f"{len(experiment.runs)} runs; {processes} at once", markup=False, highlight=False,
    )  # fmt: skip
    columns = (BarColumn(), TextColumn("{task.completed} of {task.total} runs"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task("", total=len(experiment.runs))

        def show(outcome: Outcome) -> None:
            console.print(line_of(outcome), markup=False, highlight=False, soft_wrap=True)
            progress.advance(bar)

        try:
            outcomes = compare(experiment, out, processes, show, stop)
        except KeyboardInterrupt:
            console.print("stopped; the same command goes on where it was")
            raise
    leave_behind(experiment, outcomes, out)
    for outcome in outcomes if with_tensorboard else ():
        if outcome.result is not None:
            tensorboard.write(outcome.result, out / "tensorboard" / outcome.run.folder)
    console.print(f"left in {out}/: report.html and its pictures, table.md, results.csv, curves.csv", highlight=False)
    if failed := sum(outcome.result is None for outcome in outcomes):
        raise FedMQError(f"{failed} of {len(outcomes)} runs failed; the same command tries them again")


def line_of(outcome: Outcome) -> str:
    """Say what a run came to, in one line."""
    name, result = f"{outcome.run.variant.name}, seed {outcome.run.seed}", outcome.result
    if result is None:
        return f"{name}: failed: {outcome.error}"
    metric = result.plan.fleet.metric
    raised = f"; {sum(result.failures.values())} trainings raised" if result.failures else ""
    return (
        f"{name}: {result.history.trips:,} trips, {result.virtual_s / HOUR_S:.2f} virtual hours, final {metric} "
        f"{numbers_of(result).final:.4f}, took {result.wall_s:.0f} s{raised}"
    )


def compare(
    experiment: Experiment,
    out: Path,
    processes: int = 1,
    show: Callable[[Outcome], None] = lambda _: None,
    stop: threading.Event | None = None,
) -> list[Outcome]:
    """Run what is not there yet. Whole simulations run at once; the results do not depend on how many.

    Args:
        experiment: what to run.
        out: folder; finished runs in it are kept as they are, interrupted ones are gone on with.
        processes: to be used together; a single run that is left has all of them for its trainings.
        show: called after each run.
        stop: when set, the runs under way end with a checkpoint, to be gone on with.

    Returns:
        One a run, in the experiment's order.

    Raises:
        SettingsError: the folder holds runs of another experiment.
        KeyboardInterrupt: it was asked to stop.
    """
    stop = stop or threading.Event()
    outcomes = _stored(experiment.runs, out)
    for outcome in outcomes.values():
        show(outcome)
    waiting = [run for run in experiment.runs if run.folder not in outcomes]
    at_once = max(1, min(processes, len(waiting)))
    each = max(1, processes // at_once)
    ended = _here(waiting, out, each, stop) if at_once == 1 else _beside(waiting, out, at_once, each, stop)
    for outcome in ended:
        outcomes[outcome.run.folder] = outcome
        show(outcome)
    return [outcomes[run.folder] for run in experiment.runs]


def _stored(runs: Sequence[Run], out: Path) -> dict[Path, Outcome]:
    """Return the runs that are finished."""
    found, problems = {}, []
    for run in runs:
        try:
            if stored_result(out / run.folder) is not None:
                found[run.folder] = Outcome(run, simulate(run.plan, out / run.folder))
        except SettingsError as error:
            problems.append(str(error))
    if problems:
        raise SettingsError("\n  ".join([f"--out {out} does not fit:", *problems]))
    return found


# --- in this process


def _here(runs: Sequence[Run], out: Path, processes: int, stop: threading.Event) -> Iterator[Outcome]:
    for run in runs:
        yield _outcome(run, out, attempt(run, out / run.folder, processes, stop))


def attempt(run: Run, folder: Path, processes: int, stop: threading.Event) -> str:
    """Run one simulation; return what is wrong, or nothing.

    Raises:
        KeyboardInterrupt: it was asked to stop.
    """
    with _logged(folder):
        try:
            simulate(run.plan, folder, processes, stop=stop)
        except FedMQError as error:
            log.error("%s", error, exc_info=error.__cause__)
            return str(error)
        except Exception as error:
            log.exception("the simulation raised")
            return f"{type(error).__name__}: {error}; see {folder / LOG}"
    return ""


@contextmanager
def _logged(folder: Path) -> Iterator[None]:
    """Let warnings go into a file of the run, which is made when there is one, and not between the progress lines."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / LOG).unlink(missing_ok=True)  # of an attempt before this one
    handler = logging.FileHandler(folder / LOG, encoding="utf-8", delay=True)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    fedmq = logging.getLogger("fedmq")
    before, fedmq.propagate = fedmq.propagate, False
    fedmq.addHandler(handler)
    try:
        yield
    finally:
        fedmq.removeHandler(handler)
        handler.close()
        fedmq.propagate = before


def _outcome(run: Run, out: Path, error: str) -> Outcome:
    result = None if error else stored_result(out / run.folder)
    return Outcome(run, result, error)


# --- in processes beside this one


@dataclass(frozen=True, slots=True)
class _Running:
    run: Run
    process: BaseProcess
    errors: Connection


def _beside(runs: Sequence[Run], out: Path, at_once: int, each: int, stop: threading.Event) -> Iterator[Outcome]:
    """Run several at once, a process for each: one that is killed takes no other with it."""
    waiting, running = list(runs), dict[int, _Running]()
    try:
        while waiting or running:
            while waiting and len(running) < at_once:
                started = _start(waiting.pop(0), out, each)
                running[started.process.sentinel] = started
            for sentinel in wait(list(running), timeout=POLL_S):
                assert isinstance(sentinel, int), "only sentinels are waited for"  # noqa: S101
                ended = running.pop(sentinel)
                if not stop.is_set():
                    yield _ended(ended, out)
            if stop.is_set():
                raise KeyboardInterrupt
    finally:  # each makes a checkpoint, to be gone on with
        for left in running.values():
            left.process.terminate()
        for left in running.values():
            left.process.join()


def _start(run: Run, out: Path, each: int) -> _Running:
    spawn = multiprocessing.get_context("spawn")
    errors, answer = spawn.Pipe(duplex=False)
    process = spawn.Process(target=_child, args=(answer, run, out / run.folder, each), name=str(run.folder))
    process.start()
    answer.close()
    return _Running(run, process, errors)


def _ended(running: _Running, out: Path) -> Outcome:
    running.process.join()
    try:
        error = str(running.errors.recv())
    except EOFError:
        error = f"its process died with exit code {running.process.exitcode} (killed, or out of memory)"
    running.errors.close()
    return _outcome(running.run, out, error)


def _child(answer: Connection, run: Run, folder: Path, processes: int) -> None:
    """Run one simulation in a process of its own, which ends with its parent."""
    stop = threading.Event()
    stop_on_signals(stop)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to all; the parent says when to end
    threading.Thread(target=_follow_parent, daemon=True).start()
    with suppress(KeyboardInterrupt):
        answer.send(attempt(run, folder, processes, stop)[:ERROR_CHARS_MAX])


def _follow_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)
