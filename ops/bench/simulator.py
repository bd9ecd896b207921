"""`fedmq bench simulator`: what a trip costs beside its training, a fleet's memory, and what a second process is worth.

Each number is of a process of its own. Costs are processor time, so that a busy neighbour changes them little; the two
sides of a ratio take turns.
"""

import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ops.simulation.database import Database
from ops.simulation.executor import executor_of, one_thread
from ops.simulation.plan import Plan, path_of_task, plan_of
from ops.simulation.simulator import Simulator
from worker.task import Task
from worker.training import Trainer

NOISE = str(Path(__file__).with_name("tasks") / "noise.py")
PARAMS, PARAMS_LARGE = 100_000, 1_000_000
CODECS = ("none", "int8", "int8 | zstd")
FEW, MANY = 100, 10_000
TRIPS_LEAST, RATIO_MOST, GIGABYTES_MOST, SPEEDUP_LEAST = 1500, 1.1, 1.5, 1.7
FLOWER = {FEW: "137", MANY: "48 (1,000 clients)"}  # trips a second on this machine, see the simulation engine's row
WARM_UP = 0.1  # of a run: the first pulls, imports and processes that start are not measured
GIGA = 1e9


def run(trips: int, repeats: int, out: Path | None) -> None:
    """Measure everything; print the tables and write them to a file if there is one."""
    tables = "\n\n".join([overhead_table(trips, repeats), memory_table(trips), speedup_table(repeats)])
    print(tables)
    if out is not None:
        out.write_text(tables + "\n")


def overhead_table(trips: int, repeats: int) -> str:
    """Return the cost of a trip whose training adds noise, for few clients and many."""
    lines = [
        f"| codec, {PARAMS:,} parameters | microseconds a trip, {FEW} clients | {MANY:,} clients | ratio, at most "
        f"{RATIO_MOST} | trips/s a core, at least {TRIPS_LEAST:,} | Flower |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for codec in CODECS:
        measured: dict[int, list[float]] = {FEW: [], MANY: []}
        for _ in range(repeats):
            for clients, costs in measured.items():
                given = {"task": NOISE, "clients": clients, "updates": trips, "codec": codec}
                costs.append(child(given, PARAMS)["processor_s"])
        few, many = (1e6 * statistics.median(costs) for costs in measured.values())
        ratio = statistics.median(b / a for a, b in zip(*measured.values(), strict=True))
        lines.append(
            f"| {codec} | {few:.0f} | {many:.0f} | {ratio:.2f} | {1e6 / few:,.0f} | {' / '.join(FLOWER.values())} |"
        )
    return "\n".join(lines)


def memory_table(trips: int) -> str:
    """Return what a large fleet takes."""
    lines = [
        f"| {MANY:,} clients, {PARAMS_LARGE:,} parameters | GB resident, at most {GIGABYTES_MOST} | with the training "
        "processes |",
        "|---|---:|---:|",
    ]
    for codec, processes in (("int8 | zstd", 1), ("none", 1), ("tiny", 1), ("int8 | zstd", 2)):
        given = {"task": NOISE, "clients": MANY, "updates": max(300, trips // 4), "codec": codec}
        measured = child(given, PARAMS_LARGE, processes)
        own, all_of_them = measured["resident_bytes"] / GIGA, measured["resident_bytes_all"] / GIGA
        lines.append(f"| {codec}, processes {processes} | {own:.2f} | {all_of_them:.2f} |")
    return "\n".join(lines)


def speedup_table(repeats: int) -> str:
    """Return what a second process is worth where the training takes the time."""
    task, updates = ("mnist", 200) if os.environ.get("FEDMQ_DATA") else ("digits", 1500)
    given = {"task": task, "clients": FEW, "updates": updates}
    pairs = [tuple(child(given, PARAMS, processes)["wall_s"] for processes in (1, 2)) for _ in range(repeats)]
    one, two = (statistics.median(seconds) for seconds in zip(*pairs, strict=True))
    gain = statistics.median(a / b for a, b in pairs)
    return "\n".join([
        f"| task | seconds a trip, 1 process | 2 processes | times as fast, at least {SPEEDUP_LEAST} |",
        "|---|---:|---:|---:|",
        f"| {task} | {one:.4f} | {two:.4f} | {gain:.2f} |",
    ])  # fmt: skip


def child(given: Mapping[str, Any], params: int, processes: int = 1) -> dict[str, float]:
    """Measure one plan in a process of its own."""
    text = json.dumps({"given": dict(given), "processes": processes})
    done = subprocess.run(
        [sys.executable, "-m", "ops.bench.simulator", text], check=True, stdout=subprocess.PIPE, text=True,
        env=os.environ | {"FEDMQ_NOISE_PARAMS": str(params)}, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    measured: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return measured


def measure(plan: Plan, processes: int) -> dict[str, float]:
    """Run a plan; return processor and wall seconds a trip after the warm-up, and the most bytes resident."""
    task = path_of_task(plan.fleet.task)
    trainer = Trainer(Task.load(task))
    _ = trainer.layout
    one_thread()
    executor = executor_of(task, trainer, processes, plan.fleet.seed)
    with tempfile.TemporaryDirectory() as folder:
        simulator = Simulator(plan, trainer, executor, Database(Path(folder) / "run.sqlite"))
        started, wall, processor = 0, 0.0, 0.0
        for _ in simulator.run():
            if not started and simulator.progress() >= WARM_UP:
                started, wall, processor = simulator.published, time.perf_counter(), time.process_time()
        trips = simulator.published - started
        wall, processor = time.perf_counter() - wall, time.process_time() - processor
        executor.close()
    own, largest_child = (
        1024 * resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    )
    return {
        "processor_s": processor / trips, "wall_s": wall / trips, "resident_bytes": own,
        "resident_bytes_all": own + (processes * largest_child if processes > 1 else 0),
    }  # fmt: skip


if __name__ == "__main__":
    asked = json.loads(sys.argv[1])
    print(json.dumps(measure(plan_of({"evaluations": 20, "seed": 3} | asked["given"]), asked["processes"])))
