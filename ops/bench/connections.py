"""`fedmq bench connections`: two thousand connected workers that rarely send, beside ten that send as much.

The same updates a second in both runs, so that only connections and clients differ; they take turns.
"""

import resource
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from ops.bench.connected import Fleet, arguments
from ops.bench.end_to_end import Servers, aggregator_environment, running, say, wait
from ops.bench.process import load_average
from ops.bench.soak import look, sending, soak_servers
from ops.bench.updates import JOB, model_of
from shared.store.redis import RedisStore
from shared.transport.rabbitmq import queue_depths

NUM_PARAMS, CODEC = 100_000, "int8"
FEW = 10
RATE = 33.0  # updates/s: one a minute of each of two thousand
SETTLE_S, WATCH_S = 10.0, 30.0  # before, and while memory is looked at
GROWTH_MAX = 1.05
STALENESS_MAX = "100000"  # the sleepers train from version 0
FILES_EACH = 2  # descriptors of a connection: one of the broker, one of the fleet


@dataclass(frozen=True, slots=True)
class Seen:
    """One run: medians over its seconds.

    Attributes:
        values: what -> number.
        connect_s: until all were connected.
        confirmed: updates.
        lost: connections.
    """

    values: dict[str, float]
    connect_s: float
    confirmed: int
    lost: int


def measure(connections: int, servers: Servers, folder: Path) -> Seen:
    """Connect a fleet, look at the aggregator, and check that every update was applied.

    Args:
        connections: how many.
        servers: broker and store; the store is emptied.
        folder: for the aggregator's log.

    Raises:
        TimeoutError: an update that was confirmed was not applied.
    """
    store = RedisStore(servers.redis.url, JOB)
    store._redis.flushdb()
    store.create(model_of(NUM_PARAMS), time.time())
    environment = aggregator_environment(servers, FEDMQ_CODEC=CODEC, FEDMQ_STALENESS_MAX=STALENESS_MAX)
    with running(environment, folder) as process:
        wait(lambda: bool(store.job()))
        started = time.monotonic()
        with sending(arguments(Fleet(servers.rabbitmq.url, connections, RATE, NUM_PARAMS, CODEC))) as sent:
            connect_s = time.monotonic() - started
            time.sleep(SETTLE_S)
            looks = []
            until = time.monotonic() + WATCH_S
            while time.monotonic() < until:
                looks.append(look(process.pid, servers))
                time.sleep(1.0)
        wait(lambda: store.totals().get("applied", 0) == sent["confirmed"], 60)
        wait(lambda: queue_depths(servers.rabbitmq.url, JOB, 10)["updates"] == 0, 60)
    values = {name: statistics.median(seen[name] for seen in looks) for name in looks[0]}
    return Seen(values, connect_s, int(sent["confirmed"]), int(sent["lost"]))


def run(connections: int, repeats: int, out: Path | None) -> None:
    """Measure, print the table and write it to a file if there is one.

    Raises:
        AssertionError: the aggregator's memory grew, or connections were lost.
    """
    allow_files(FILES_EACH * connections + 1000)
    load, seen = load_average(), dict[int, list[Seen]]({FEW: [], connections: []})
    with tempfile.TemporaryDirectory(prefix="fedmq-bench-") as name, soak_servers(Path(name)) as servers:
        for index in range(repeats):
            for number, found in seen.items():
                found.append(measure(number, servers, Path(name)))
                memory = found[-1].values["aggregator, MB"]
                say(f"{index + 1}: {number:,} connected in {found[-1].connect_s:.1f} s, aggregator {memory:.1f} MB")
    lines = table(connections, seen, (load, load_average()))
    print("\n".join(lines))
    if out is not None:
        out.write_text("\n".join(lines) + "\n")
    few, many = (median_of(found, "aggregator, MB") for found in seen.values())
    lost = sum(run.lost for found in seen.values() for run in found)
    if many > GROWTH_MAX * few or lost:
        raise AssertionError(f"aggregator {few:.1f} MB with {FEW}, {many:.1f} MB with {connections:,}; {lost} lost")


def allow_files(needed: int) -> None:
    """Raise this process' limit of open files, which its children inherit, as far as the system lets it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < needed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(needed, hard) if hard > 0 else needed, hard))


def median_of(found: list[Seen], name: str) -> float:
    """Return the median of one value over the runs."""
    return statistics.median(run.values[name] for run in found)


def table(connections: int, seen: dict[int, list[Seen]], load: tuple[float, float]) -> list[str]:
    """Return what was looked at, for few and many."""
    runs, few, many = len(seen[FEW]), seen[FEW], seen[connections]
    lines = [
        f"{RATE:g} updates/s of {NUM_PARAMS:,} parameters in both; medians of {runs}; load average {load[0]:.1f} to "
        f"{load[1]:.1f}.", "", f"| | {FEW} connected | {connections:,} connected | ratio |", "|---|---:|---:|---:|",
    ]  # fmt: skip
    for name in few[0].values:
        a, b = median_of(few, name), median_of(many, name)
        limit = f" (at most {GROWTH_MAX:g})" if name == "aggregator, MB" else ""
        lines.append(f"| {name} | {a:,.1f} | {b:,.1f} | {b / a:.2f}{limit} |")
    rows = {
        "seconds until all are connected": "connect_s",
        "updates confirmed and applied": "confirmed",
        "lost": "lost",
    }
    for name, attribute in rows.items():
        a, b = (statistics.median(getattr(run, attribute) for run in found) for found in (few, many))
        lines.append(f"| {name} | {a:,.1f} | {b:,.1f} | |")
    return lines
