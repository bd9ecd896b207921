"""`fedmq bench safety`: what checksums, the duplicate check, the ledger and the durable commit cost end to end.

The production aggregator drains a backlog, with a Redis that writes each commit to its disk before it answers; another
one without all that (`safety_off`) drains the same backlog, with a Redis without an append-only file. They take turns,
and the cost is the median of the pairs' ratios.
"""

import statistics
import tempfile
from dataclasses import dataclass
from pathlib import Path

from ops.bench.end_to_end import Run, aggregator_rate, say
from ops.bench.main import count_of
from ops.bench.process import load_average
from ops.bench.updates import encoded_update, model_of
from ops.servers import PrivateServer, PrivateServers, private_redis

COST_MAX = 0.15
BACKLOG_BYTES, BACKLOG_UPDATES = 2e9, 15_000  # of a run, at most: ten seconds, twenty commits
FORGETTING = {"appendonly": "no", "appendfsync": "no"}


@dataclass(frozen=True, slots=True)
class Pair:
    """One broker and one of two stores."""

    rabbitmq: PrivateServer
    redis: PrivateServer


@dataclass(frozen=True, slots=True)
class Cost:
    """One model size.

    Attributes:
        num_params: of the model.
        updates: in each backlog.
        safe: the runs as in production.
        bare: the runs without safety, each beside one of the others.
    """

    num_params: int
    updates: int
    safe: list[Run]
    bare: list[Run]

    @property
    def share(self) -> float:
        """Median of what safety costs of the throughput without it."""
        return statistics.median(self.pairs)

    @property
    def pairs(self) -> list[float]:
        """What it costs in each pair."""
        return [1 - safe.rate / bare.rate for safe, bare in zip(self.safe, self.bare, strict=True)]


def cost(num_params: int, repeats: int, kept: Pair, forgotten: Pair, folder: Path) -> Cost:
    """Measure one model size; who goes first alternates.

    Args:
        num_params: of the model.
        repeats: pairs.
        kept: servers of the production run.
        forgotten: servers of the other.
        folder: for logs.
    """
    body = encoded_update(model_of(num_params), 999_999_999)[1]
    updates = int(min(BACKLOG_UPDATES, BACKLOG_BYTES / len(body)))
    found = Cost(num_params, updates, [], [])

    def safe() -> None:
        found.safe.append(aggregator_rate(kept, body, updates, num_params, folder))

    def bare() -> None:
        given = {"FEDMQ_DURABLE": "false"}
        run = aggregator_rate(forgotten, body, updates, num_params, folder, "ops.bench.safety_off", **given)
        found.bare.append(run)

    for index in range(repeats):
        for measure in (safe, bare) if index % 2 else (bare, safe):
            measure()
        say(f"{num_params:>10,}  {index + 1}: safe {found.safe[-1].rate:7.1f}/s, without {found.bare[-1].rate:7.1f}/s")
    return found


def run(sizes: str, repeats: int, out: Path | None) -> None:
    """Measure and print; write the table to `out` if given.

    Args:
        sizes: of models, comma separated.
        repeats: pairs of runs.
        out: file, or none.

    Raises:
        AssertionError: safety costs more than it may.
    """
    load, counts = load_average(), [count_of(size) for size in sizes.split(",")]
    with tempfile.TemporaryDirectory(prefix="fedmq-bench-") as name, PrivateServers() as servers:
        folder = Path(name)
        forgetful = private_redis(folder / "forgetful", FORGETTING)
        forgetful.start()
        try:
            kept, forgotten = Pair(servers.rabbitmq, servers.redis), Pair(servers.rabbitmq, forgetful)
            costs = [cost(size, repeats, kept, forgotten, folder) for size in counts]
        finally:
            forgetful.stop()
    lines = table(costs, (load, load_average()))
    print("\n".join(lines))
    if out is not None:
        out.write_text("\n".join(lines) + "\n")
    worst = max(found.share for found in costs)
    if worst > COST_MAX:
        raise AssertionError(f"safety costs {worst:.1%} of the throughput; limit {COST_MAX:.0%}")


def table(costs: list[Cost], load: tuple[float, float]) -> list[str]:
    """Return a row a model size."""
    lines = [
        f"Medians; load average {load[0]:.1f} to {load[1]:.1f}:",
        "",
        f"| parameters | updates a run | safe, updates/s | without | cost, at most {COST_MAX:.0%} | of each pair "
        "| processor time an update, µs: safe | without |",
        "|---:|---:|---:|---:|---:|---|---:|---:|",
    ]
    for found in costs:
        rates = [statistics.median(run.rate for run in runs) for runs in (found.safe, found.bare)]
        times = [1e6 * statistics.median(run.processor_s for run in runs) for runs in (found.safe, found.bare)]
        lines.append(
            f"| {found.num_params:,} | {found.updates:,} | {rates[0]:,.0f} | {rates[1]:,.0f} | {found.share:.1%} "
            f"| {', '.join(f'{pair:.0%}' for pair in found.pairs)} | {times[0]:,.0f} | {times[1]:,.0f} |"
        )
    return lines
