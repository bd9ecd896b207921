"""Bytes to a target accuracy: MNIST, 100 non-IID workers, FedBuff, one run per codec and seed.

    FEDMQ_DATA=... python -m ops.bench.bytes_to_target [--seeds 3] [--processes 2] [--out FOLDER]     # 20 minutes

The whole system runs in one process in virtual time (`ops/embedded.py`): the production worker and aggregator, real
training, real encoded messages. Each worker has four label shards of 150 images, a mean trip of its own
(log-normal, mean 1.2 s) and rests 4.8 s on average after each (exponential). The target is reached when the mean of the
last five evaluations is there; the run goes on to a fixed number of updates for the final accuracy.
"""

import argparse
import csv
import json
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from ops.embedded import Embedded
from shared.config import AggregatorSettings, WorkerSettings
from worker.task import Task

TASK = "mnist_wide"
WORKERS, BUFFER_SIZE, SERVER_LR, LR, BATCH, SHARDS = 100, 10, 1.0, 0.15, 30, 4
SAMPLES = 600  # images of a worker
SETTINGS = {
    "shares": str(WORKERS), "samples": str(SAMPLES), "partition": f"shards({SHARDS})", "lr": str(LR),
    "batch": str(BATCH),
}  # fmt: skip
REST_S = 4.8  # mean; with trips of 1.2 s a fifth of the devices is busy at a time
TARGET, WINDOW = 0.97, 5  # accuracy; evaluations it is averaged over
UPDATES, EVALUATE_EVERY = 2_500, 5  # trips in all; versions between two evaluations
FINAL = 10  # evaluations the final accuracy is averaged over
CONFIGURATIONS = {  # name -> codec, downlink
    "float32": ("none", "off"),
    "int8": ("int8", "off"),
    "NF4": ("nf4", "off"),
    "safe": ("safe", "on"),
    "balanced": ("balanced", "on"),
    "tiny": ("tiny", "on"),
    "auto": ("auto", "on"),
}


@dataclass(frozen=True, slots=True)
class Run:
    """One run. Bytes are those of whole messages up, and of everything the workers fetched down.

    Attributes:
        name: of the configuration.
        seed: of everything random.
        trips: updates applied when the target was reached; 0: never.
        up: bytes sent until then.
        down: bytes pulled until then.
        pulls: how often something was pulled until then.
        final: mean accuracy of the last evaluations.
        staleness: mean over the run, versions.
        curve: (updates, bytes up, accuracy) of each evaluation.
    """

    name: str
    seed: int
    trips: int
    up: int
    down: int
    pulls: int
    final: float
    staleness: float
    curve: list[tuple[int, int, float]]


def run_one(name: str, seed: int, updates: int = UPDATES) -> Run:
    """Run one configuration."""
    codec, downlink = CONFIGURATIONS[name]
    settings = AggregatorSettings(
        job="bench", buffer_size=BUFFER_SIZE, server_lr=SERVER_LR, codec=codec, downlink=downlink, commit_interval_s=0.0
    )
    folder = Path(tempfile.gettempdir())
    workers = [
        WorkerSettings(
            job="bench", client_id=f"worker-{i}", task=TASK, seed=seed, state_dir=folder,
            task_settings=SETTINGS | {"share": str(i)},
        )
        for i in range(WORKERS)
    ]  # fmt: skip
    trips_s = [float(x) for x in np.random.default_rng(seed).lognormal(0.0, 0.6, WORKERS)]
    system = Embedded(Task.load(TASK, needs=("build", "train", "evaluate")), settings, workers, trips_s, seed, REST_S)
    reached: tuple[int, int, int, int] | None = None
    try:
        for history in system.run(updates, EVALUATE_EVERY):
            recent = [row.accuracy for row in history.rows[-WINDOW:]]
            if reached is None and len(recent) == WINDOW and statistics.mean(recent) >= TARGET:
                row = history.rows[-1]
                reached = (row.updates, row.bytes_sent, row.bytes_pulled, history.pulls)
    finally:
        system.close()
    final = statistics.mean(row.accuracy for row in history.rows[-FINAL:])
    curve = [(row.updates, row.bytes_sent, row.accuracy) for row in history.rows]
    staleness = sum(history.staleness) / max(1, len(history.staleness))
    return Run(name, seed, *(reached or (0, 0, 0, 0)), final, staleness, curve)


def kept(name: str, seed: int, updates: int, folder: Path) -> Run:
    """Run one configuration, or read what it gave when it was run before."""
    path = folder / f"{name}-{seed}-{updates}.json"
    if not path.exists():
        path.write_text(json.dumps(asdict(run_one(name, seed, updates))))
    return Run(**json.loads(path.read_text()))


def table(runs: list[Run]) -> list[str]:
    """Return the Markdown table, means over the seeds with the standard deviation of the trips."""
    by_name: dict[str, list[Run]] = defaultdict(list)
    for run in runs:
        by_name[run.name].append(run)
    base = by_name["float32"]
    lines = [
        "| codec, downlink | trips to 97 % | x float32 | MB up | fewer bytes up | MB down | fewer bytes down "
        "| final accuracy | minus float32, points |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for name, group in by_name.items():
        downlink = CONFIGURATIONS[name][1]
        final = _mean(group, "final")
        label = f"{name}, {downlink}" if name != "float32" else "float32 (`none`), off"
        if not all(run.trips for run in group):
            missed = sum(not run.trips for run in group)
            lines.append(f"| {label} | not reached in {missed} of {len(group)} | | | | | | {final:.4f} | |")
            continue
        trips, up, down = (_mean(group, field) for field in ("trips", "up", "down"))
        spread = statistics.stdev(run.trips for run in group) if len(group) > 1 else 0.0
        lines.append(
            f"| {label} | {trips:,.0f} ± {spread:,.0f} | {trips / _mean(base, 'trips'):.2f} | {up / 1e6:.2f} "
            f"| {_mean(base, 'up') / up:.0f} | {down / 1e6:.0f} | {_mean(base, 'down') / down:.1f} "
            f"| {final:.4f} | {100 * (final - _mean(base, 'final')):+.2f} |"
        )
    return lines


def draw(runs: list[Run], path: Path) -> None:
    """Draw accuracy against bytes sent, one curve a configuration (mean over the seeds)."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(10, 5.6), dpi=100, constrained_layout=True)
    colors = plt.get_cmap("viridis")(np.linspace(0, 0.92, len(CONFIGURATIONS)))
    for color, name in zip(colors, CONFIGURATIONS, strict=True):
        curves = [run.curve for run in runs if run.name == name]
        if not curves:
            continue
        points = [np.mean([curve[i] for curve in curves], axis=0) for i in range(1, min(map(len, curves)))]
        sent = [point[1] / 1e6 for point in points]
        smooth = [float(np.mean([p[2] for p in points[max(0, i - WINDOW + 1) : i + 1]])) for i in range(len(points))]
        axes.plot(sent, smooth, color=color, linewidth=2.2, label=_label(name, runs))
    axes.axhline(TARGET, color="#9aa5b1", linewidth=1, linestyle="--")
    axes.annotate("97 %", (axes.get_xlim()[0], TARGET), (4, 4), textcoords="offset points", color="#616e7c")
    axes.set(xscale="log", xlabel="megabytes sent by all devices together", ylabel="accuracy on the test images")
    axes.set_ylim(0.85, 0.985)
    axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(0.0, 0.86), title="bytes to 97 %, beside float32")
    axes.set_title("MNIST, 100 workers with four label shards each, FedBuff: accuracy against bytes", loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.3)
    figure.savefig(path)
    plt.close(figure)


def _label(name: str, runs: list[Run]) -> str:
    """Say how many times fewer bytes were sent until the target than as float32."""
    sent = {n: [run.up for run in runs if run.name == n] for n in ("float32", name)}
    if name == "float32" or not all(sent[name]) or not all(sent["float32"]):
        return name
    return f"{name}: {statistics.mean(sent['float32']) / statistics.mean(sent[name]):.0f}x fewer"


def _mean(group: list[Run], field: str) -> float:
    return statistics.mean(float(getattr(run, field)) for run in group)


def main(arguments: list[str] | None = None) -> None:
    """Run the experiment."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--updates", type=int, default=UPDATES)
    parser.add_argument("--only", default=",".join(CONFIGURATIONS), help="configurations, comma separated")
    parser.add_argument("--out", type=Path, default=Path("runs/bytes_to_target"))
    given = parser.parse_args(arguments)
    given.out.mkdir(parents=True, exist_ok=True)
    names = given.only.split(",")
    jobs = [(name, seed, given.updates, given.out) for seed in range(given.seeds) for name in names]
    runs: list[Run] = []
    started = time.monotonic()
    with ProcessPoolExecutor(given.processes) as pool:
        for run in pool.map(kept, *zip(*jobs, strict=True)):
            runs.append(run)
            print(
                f"{time.monotonic() - started:6.0f} s  {run.name} seed {run.seed}: {run.trips} trips, "
                f"{run.up / 1e6:.2f} MB up, {run.down / 1e6:.1f} MB down, final {run.final:.4f}, "
                f"staleness {run.staleness:.1f}", file=sys.stderr, flush=True,
            )  # fmt: skip
    lines = table(sorted(runs, key=lambda run: (list(CONFIGURATIONS).index(run.name), run.seed)))
    print("\n".join(lines))
    (given.out / "table.md").write_text("\n".join(lines) + "\n")
    _save(runs, given.out / "runs.csv")
    draw(runs, given.out / "accuracy_bytes.png")


def _save(runs: list[Run], path: Path) -> None:
    names = [field.name for field in fields(Run) if field.name != "curve"]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, names, extrasaction="ignore")
        writer.writeheader()
        rows: list[dict[str, Any]] = [asdict(run) for run in runs]
        writer.writerows(rows)


if __name__ == "__main__":
    main()
