"""QAFeL's logistic regression on the mushrooms: what the hidden state is worth.

    FEDMQ_DATA=... python -m ops.bench.qafel [--steps 10000] [--seeds 3] [--processes 2] [--out FILE]

100 clients hold consecutive parts of the data; each trip is ten full-batch gradient steps (lr 2) from what the server
published; the server averages K = 10 deltas weighted by (1 + staleness)^-0.5 and steps with lr 0.1. Deltas and
publications go through the production codecs. `hidden` publishes Q(x - xhat) and everybody adds it to xhat; `naive`
publishes Q(x).

Source: Ortega and Jafarkhani, arXiv:2308.00263, section 6; the numbers beside ours are those of algorithms notes, 7.1.
The start rate is not given there; 3 clients in flight on average come nearest to the published curve of FedBuff.
"""

import argparse
import heapq
import os
import statistics
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from aggregator.staleness import polynomial
from shared.compression import parse
from shared.errors import SettingsError
from shared.layout import Layout
from shared.vector import Vector

CLIENTS, BUFFER_SIZE, LOCAL_STEPS, CLIENT_LR, SERVER_LR, IN_FLIGHT = 100, 10, 10, 2.0, 0.1, 3.0
FEATURES, SAMPLES = 112, 8124
OPTIMUM = 0.014484174216922262  # f*, of the regularised loss over all the data
MEAN_TRIP = (2 / np.pi) ** 0.5  # of a half-normal duration
LAYOUT = Layout.of([("w", (FEATURES,), "float32")])
UP = "all | qsgd(4)"
EXPERIMENTS = {  # name -> codec up, codec down, how it is published, published f - f* at 1,000, 5,000 and 10,000
    "FedBuff": ("float32", "float32", "naive", ("8.80e-3", "1.115e-3", "8.32e-4")),
    "QAFeL, QSGD s=4 up, s=8 down": (UP, "all | qsgd(8)", "hidden", ("9.01e-3", "1.112e-3", "8.47e-4")),
    "naive, the same": (UP, "all | qsgd(8)", "naive", ("8.86e-3", "4.92e-3", "6.29e-3")),
    "QAFeL, top 10 % down": (UP, "all | topk(0.1)", "hidden", ("", "", "7.95e-4")),
    "naive, top 10 % down": (UP, "all | topk(0.1)", "naive", ("", "", "7.17, diverges")),
}  # fmt: skip


@dataclass
class Server:
    """The server's weights and what it published of them."""

    down: str
    how: str
    rng: np.random.Generator
    weights: Vector = field(default_factory=lambda: np.zeros(FEATURES, np.float32))
    published: Vector = field(default_factory=lambda: np.zeros(FEATURES, np.float32))

    def publish(self) -> int:
        """Publish the newest weights; return the bytes."""
        base = self.published if self.how == "hidden" else np.zeros(FEATURES, np.float32)
        published = base.copy()
        size = through(self.down, self.weights - base, self.rng, published, 1.0)
        self.published = published
        return size


def through(codec: str, delta: Vector, rng: np.random.Generator, total: Vector, weight: float) -> int:
    """Encode a delta, add what arrives to `total`; return the bytes of the payload."""
    encoder = parse(codec)
    encoded = encoder.encode(delta, LAYOUT, rng)
    encoder.decode(encoded.payload, encoded.params, LAYOUT).add_into(total, weight)
    return len(encoded.payload)


def run_one(name: str, steps: int, seed: int) -> tuple[list[float], float, float]:
    """Run one experiment; return f - f* at a tenth, half and all of the steps, and mean payload bytes up and down."""
    up, down, how, _ = EXPERIMENTS[name]
    inputs, labels = mushrooms()
    clients = [inputs[p] * labels[p, None] for p in np.array_split(np.arange(SAMPLES), CLIENTS)]
    rng = np.random.default_rng(seed)
    server = Server(down, how, rng)
    buffer, buffered, version, starts = np.zeros(FEATURES, np.float32), 0, 0, 0.0
    flights: list[tuple[float, int, int, int, Vector]] = []
    losses: list[float] = []
    sent: list[int] = []
    published: list[int] = []
    while version < steps:
        if not flights or flights[0][0] > starts:
            trip = (starts + abs(float(rng.standard_normal())), len(sent) + len(flights), int(rng.integers(CLIENTS)))
            heapq.heappush(flights, (*trip, version, server.published))
            starts += MEAN_TRIP / IN_FLIGHT
            continue
        _, _, client, base_version, base = heapq.heappop(flights)
        weight = polynomial(version - base_version, 0.5)
        sent.append(through(up, local_delta(clients[client], base), rng, buffer, weight))
        buffered += 1
        if buffered == BUFFER_SIZE:
            server.weights += np.float32(SERVER_LR / BUFFER_SIZE) * buffer
            buffer[:], buffered, version = 0, 0, version + 1
            published.append(server.publish())
            if version in (steps // 10, steps // 2, steps):
                losses.append(loss(server.weights, inputs, labels) - OPTIMUM)
    return losses, statistics.mean(sent), statistics.mean(published)


def local_delta(signed: npt.NDArray[np.float64], base: Vector) -> Vector:
    """Take the local gradient steps; return after minus before."""
    start = base.astype(np.float64)
    w = start.copy()
    for _ in range(LOCAL_STEPS):
        slope = 1 / (1 + np.exp(np.minimum(signed @ w, 500)))
        w -= CLIENT_LR * (w / SAMPLES - slope @ signed / len(signed))
    return (w - start).astype(np.float32)


def loss(weights: Vector, inputs: npt.NDArray[np.float64], labels: npt.NDArray[np.float64]) -> float:
    """Return the regularised logistic loss over all the data."""
    w = weights.astype(np.float64)
    return float(np.logaddexp(0, -labels * (inputs @ w)).mean() + w @ w / (2 * SAMPLES))


def mushrooms() -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Read the data: inputs [8124, 112], labels of -1 and 1."""
    folder = os.environ.get("FEDMQ_DATA")
    if not folder:
        raise SettingsError("the experiment reads $FEDMQ_DATA/mushrooms/mushroom.libsvm: set FEDMQ_DATA")
    inputs, labels = np.zeros((SAMPLES, FEATURES)), np.zeros(SAMPLES)
    for row, line in enumerate((Path(folder) / "mushrooms" / "mushroom.libsvm").read_text().splitlines()):
        label, *pairs = line.split()
        labels[row] = 1.0 if label == "2" else -1.0
        for pair in pairs:
            column, value = pair.split(":")
            inputs[row, int(column) - 1] = float(value)
    return inputs, labels


def main(arguments: list[str] | None = None) -> None:
    """Run all and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args(arguments)
    jobs = [(name, given.steps, seed) for name in EXPERIMENTS for seed in range(given.seeds)]
    with ProcessPoolExecutor(given.processes) as pool:
        results: list[Any] = list(pool.map(run_one, *zip(*jobs, strict=True)))
    at = " | ".join(f"{steps:,}" for steps in (given.steps // 10, given.steps // 2, given.steps))
    lines = [
        f"| f - f* at step | {at} | published | bytes up | down |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for index, (name, (*_, reference)) in enumerate(EXPERIMENTS.items()):
        group = results[index * given.seeds : (index + 1) * given.seeds]
        cells = [_spread([losses[point] for losses, _, _ in group]) for point in range(3)]
        up, down = (statistics.mean(row[column] for row in group) for column in (1, 2))
        published = " / ".join(reference).strip(" /")
        lines.append(f"| {name} | {' | '.join(cells)} | {published} | {up:.0f} | {down:.0f} |")
    print("\n".join(lines))
    if given.out:
        given.out.write_text("\n".join(lines) + "\n")


def _spread(values: list[float]) -> str:
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.3g} ± {spread:.1g}"


if __name__ == "__main__":
    try:
        main()
    except SettingsError as error:
        sys.exit(str(error))
