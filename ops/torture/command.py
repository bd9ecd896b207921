"""`fedmq torture`: run seeds until one fails or all are through, and print the account."""

import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from ops.torture import schedule, simulator
from ops.torture.account import Totals, commit, regression, show
from ops.torture.shrink import fails_as, shrink
from shared.errors import FedMQError

BATCH = 50  # seeds between two looks at the progress


class TortureFailed(FedMQError):  # noqa: N818 - a finding, not a mistake of the caller
    """A promise was broken."""


def many(first: int, seeds: int, actions: int, processes: int, out: Path | None) -> None:
    """Run many seeds.

    Args:
        first: seed.
        seeds: how many.
        actions: of each schedule.
        processes: at once; the account is the same.
        out: file for the shortened schedule of the first failure; None: print it only.

    Raises:
        TortureFailed: a promise was broken; the shortest way there was printed.
    """
    console, totals, started = Console(), Totals(), time.monotonic()
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("seeds", total=seeds)
        for batch in _batches(first, seeds, actions, processes):
            totals.add(batch)
            found = f", {len(totals.failed)} failed" * bool(totals.failed)
            progress.update(task, completed=totals.seeds, description=f"seeds{found}")
    show(console, totals, time.monotonic() - started)
    if totals.failed:
        seed, found = min(totals.failed)
        explain(console, seed, actions, found, out)
        raise TortureFailed(f"{len(totals.failed)} of {totals.seeds} seeds failed; the first is {seed}: {found}")


def one(seed: int, actions: int, out: Path | None) -> None:
    """Replay one seed and print what happens, line by line.

    Args:
        seed: which.
        actions: of the schedule.
        out: as of `many`.

    Raises:
        TortureFailed: a promise was broken.
    """
    console = Console(soft_wrap=True, highlight=False, markup=False)
    plan = schedule.draw(seed, actions)
    console.print(f"seed {seed}, commit {commit()}: {plan.job}")
    outcome = simulator.run(plan, verbose=True)
    for line in outcome.trace:
        console.print(line)
    totals = Totals()
    totals.count(seed, outcome)
    show(Console(), totals, 1.0)
    if outcome.violation is not None:
        explain(console, seed, actions, str(outcome.violation), out)
        raise TortureFailed(f"seed {seed}: {outcome.violation}")


def explain(console: Console, seed: int, actions: int, found: str, out: Path | None) -> None:
    """Print seed and commit of a failure, and the shortest schedule that still fails."""
    console.print(f"\nseed {seed} (--events {actions}), commit {commit()}:\n  {found}", highlight=False, markup=False)
    plan = schedule.draw(seed, actions)
    checker = found.partition(":")[0]
    short = shrink(plan, fails_as(checker))
    again = simulator.run(short)
    console.print(
        f"{len(short.events)} of its {len(plan.events)} events are enough: {again.violation}. As a regression test, "
        f"tests/simulation/regressions/<name>.json:", highlight=False, markup=False,
    )  # fmt: skip
    text = regression(short, str(again.violation))
    console.print(text, highlight=False, markup=False, soft_wrap=True)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(text)


def _batches(first: int, seeds: int, actions: int, processes: int) -> Iterator[Totals]:
    """Run batches, in this process or in several; come back with each as it is done."""
    starts = range(first, first + seeds, BATCH)
    sizes = [min(BATCH, first + seeds - start) for start in starts]
    if processes == 1:
        yield from map(batch, starts, sizes, [actions] * len(sizes))
        return
    with ProcessPoolExecutor(processes) as pool:
        yield from pool.map(batch, starts, sizes, [actions] * len(sizes))


def batch(first: int, seeds: int, actions: int) -> Totals:
    """Run some seeds."""
    totals = Totals()
    for seed in range(first, first + seeds):
        totals.count(seed, simulator.run(schedule.draw(seed, actions)))
    return totals
