"""Mean staleness against concurrency and buffer size.

    python -m ops.experiments.staleness [--updates 4000] [--out runs/staleness]

While one device is on its trip, C - 1 updates of others arrive on average (C trips are under way at any time: Little's
law), and every K of them make a version:

    mean staleness = (C - 1) / K,   about C / K

whatever the distribution of the durations, as the mean over applied updates. Nothing is trained here.
"""

import argparse
import os
import statistics
import sys
from itertools import product
from pathlib import Path

from ops.simulation.database import Database
from ops.simulation.executor import InThisProcess
from ops.simulation.plan import plan_of
from ops.simulation.simulator import Simulator
from worker.task import Task
from worker.training import Trainer

TASK = str(Path(__file__).parents[1] / "bench" / "tasks" / "noise.py")
SPEEDS = {
    "all alike": ("constant(60)", True),
    "half-normal, each trip": ("half_normal(60)", False),
    "log-normal, each device": ("lognormal(60, 1.0)", True),
}
CONCURRENCY, BUFFER_SIZE, CLIENTS = (10, 50, 200), (1, 5, 20), 200


def mean_staleness(speed: str, concurrency: int, buffer_size: int, updates: int) -> float:
    """Run one fleet; return the mean staleness once every device has been heard about ten times."""
    name, persistent = SPEEDS[speed]
    plan = plan_of({
        "task": TASK, "clients": CLIENTS, "concurrency": concurrency, "speed": name, "persistent": persistent,
        "buffer_size": buffer_size, "updates": updates + 10 * concurrency, "staleness_max": 100_000, "codec": "none",
        "evaluations": 1,
    })  # fmt: skip
    trainer = Trainer(Task.load(TASK))
    *_, history = Simulator(plan, trainer, InThisProcess(trainer), Database(None)).run()
    return statistics.mean(history.staleness[10 * concurrency :])


def table(updates: int) -> list[str]:
    """Return the Markdown table."""
    lines = [f"| C | K | (C - 1) / K | {' | '.join(SPEEDS)} |", "|---:|---:|---:|" + "---:|" * len(SPEEDS)]
    for concurrency, buffer_size in product(CONCURRENCY, BUFFER_SIZE):
        found = [f"{mean_staleness(speed, concurrency, buffer_size, updates):.2f}" for speed in SPEEDS]
        lines.append(f"| {concurrency} | {buffer_size} | {(concurrency - 1) / buffer_size:.2f} | {' | '.join(found)} |")
    return lines


def main() -> None:
    """Print the table, and leave it behind."""
    os.environ.setdefault("FEDMQ_NOISE_PARAMS", "1000")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--updates", type=int, default=4000)
    parser.add_argument("--out", type=Path, default=Path("runs/staleness"))
    given = parser.parse_args()
    lines = table(given.updates)
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "table.md").write_text("\n".join(lines) + "\n")
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
