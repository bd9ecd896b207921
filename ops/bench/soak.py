"""`fedmq bench soak`: an hour of fifty workers in ten minutes, and whether anything grows.

Fifty workers of ten seconds a training make 18,000 updates in an hour; here they send them in ten minutes, over five
connections, and pull every version. Some updates are sent twice, some are too old, some are damaged. Every second
memory, files and threads of the three programs are looked at, every few seconds the keys of the store and the depth of
the queue. At the end the account must be exact: what was sent is what became of it.
"""

import re
import statistics
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ops.bench.end_to_end import Servers, aggregator_environment, running, say, wait
from ops.bench.load import Load, arguments, outcome
from ops.bench.process import descendants, load_average, open_files, resident_bytes, threads
from ops.bench.safety import Pair
from ops.bench.updates import JOB, model_of
from ops.servers import PrivateServer, private_rabbitmq, private_redis, stop_port_mapper
from shared.errors import FedMQError
from shared.store.redis import RedisStore
from shared.transport.rabbitmq import queue_depths

NUM_PARAMS = 100_000
CODEC = "int8 | zstd"
CONNECTIONS, CLIENTS, RATE = 5, 50, 30.0
STALENESS_MAX = 100
GROWTH_MAX = 1.05  # last quarter beside the first
QUARTERS = 4
WARM_UP_S = 60.0  # before the first quarter: until updates can be stale, and the stored versions are complete
LOOK_S, COUNT_S = 1.0, 5.0
MIB = 2**20
# A quorum queue holds messages in memory until its write-ahead log is full, 512 MiB by default: in ten minutes that is
# a saw of three teeth, which hides what grows.
RABBITMQ = "raft.wal_max_size_bytes = 16777216\n"
BOUNDED = {  # what grows to a bound that ten minutes do not reach: kind of key -> the bound
    "ledger": "100,000 commits", "outcomes": "30 days", "meta": "one hour of versions", "refused": "65,536 ids",
    "evaluations": "10,000 entries", "stage": "the commit under way",
}  # fmt: skip


@dataclass(slots=True)
class Watch:
    """What was seen.

    Attributes:
        series: what -> [(seconds, value)].
        kinds: kind of key -> [(seconds, number of keys, bytes)].
    """

    series: dict[str, list[tuple[float, float]]] = field(default_factory=dict)
    kinds: dict[str, list[tuple[float, int, int]]] = field(default_factory=dict)

    def note(self, at_s: float, values: Mapping[str, float]) -> None:
        """Add a value to each series."""
        for name, value in values.items():
            self.series.setdefault(name, []).append((at_s, value))


def kind_of(key: str) -> str:
    """Return the kind of a key of a job: its name up to the first number or client."""
    return re.split(r":|\d", key.split("}:", 1)[-1], maxsplit=1)[0] or "?"


def quarters(points: list[tuple[float, float]], start_s: float, stop_s: float) -> list[float]:
    """Return the median of each quarter of a stretch of time."""
    each = (stop_s - start_s) / QUARTERS
    return [
        statistics.median(value for at, value in points if start_s + index * each <= at < start_s + (index + 1) * each)
        for index in range(QUARTERS)
    ]


def look(aggregator: int, servers: Servers) -> dict[str, float]:
    """Return memory, files and threads of the three programs, now."""
    found = {
        "aggregator, MB": resident_bytes(aggregator) / 1e6, "aggregator, files": open_files(aggregator),
        "aggregator, threads": threads(aggregator),
    }  # fmt: skip
    for name, server in (("broker", servers.rabbitmq), ("Redis", servers.redis)):
        pids = descendants(_pid(server))
        found[f"{name}, MB resident"] = sum(resident_bytes(pid) for pid in pids) / 1e6
        found[f"{name}, files"] = sum(open_files(pid) for pid in pids)
    return found


def count(store: RedisStore, servers: Servers) -> tuple[dict[str, float], dict[str, tuple[int, int]]]:
    """Return what the store holds - in all, and by kind of key - and how many updates wait."""
    redis = store._redis
    keys = [key.decode() for key in redis.scan_iter(count=1000)]
    with redis.pipeline(transaction=False) as pipe:
        for key in keys:
            pipe.memory_usage(key, samples=0)
        sizes = [size or 0 for size in pipe.execute()]
    kinds: dict[str, tuple[int, int]] = {}
    for key, size in zip(keys, sizes, strict=True):
        number, total = kinds.get(kind_of(key), (0, 0))
        kinds[kind_of(key)] = (number + 1, total + size)
    bounded = sum(total for kind, (_, total) in kinds.items() if kind in BOUNDED)
    used = float(redis.info("memory")["used_memory"])
    lasting = sum(number for kind, (number, _) in kinds.items() if kind not in BOUNDED)
    values = {
        "Redis used_memory, MB": used / 1e6, "the same without bounded records, MB": (used - bounded) / 1e6,
        "keys without bounded records": float(lasting),
        "updates in the queue": float(queue_depths(servers.rabbitmq.url, JOB, 10)["updates"]),
    }  # fmt: skip
    return values, kinds


def soak(minutes: float, servers: Servers, folder: Path) -> tuple[Watch, float, dict[str, Any]]:
    """Run the load; return what was seen, when the warm-up ended, and the account.

    Args:
        minutes: of load, after the warm-up.
        servers: running.
        folder: for the aggregator's log.
    """
    store, watch, warm_s = RedisStore(servers.redis.url, JOB), Watch(), WARM_UP_S * min(1.0, minutes / 2)
    store.create(model_of(NUM_PARAMS), time.time())
    given = {"FEDMQ_CODEC": CODEC, "FEDMQ_STALENESS_MAX": str(STALENESS_MAX)}
    with running(aggregator_environment(servers, **given), folder) as process:
        wait(lambda: bool(store.job()))
        load = Load(
            servers.rabbitmq.url, servers.redis.url, JOB, NUM_PARAMS, CODEC, CONNECTIONS, CLIENTS, RATE, STALENESS_MAX
        )
        with sending(arguments(load)) as sender:
            started, counted = time.monotonic(), 0.0
            while (now := time.monotonic() - started) < warm_s + 60 * minutes:
                watch.note(now, look(process.pid, servers))
                if now - counted >= COUNT_S:
                    counted = now
                    values, kinds = count(store, servers)
                    watch.note(now, values)
                    for kind, (number, size) in kinds.items():
                        watch.kinds.setdefault(kind, []).append((now, number, size))
                    _progress(now, watch)
                time.sleep(LOOK_S)
        sent = sender["sent"]
        due = Counter({name: sent.get(name, 0) for name in ("applied", "stale", "duplicate", "rejected")})
        try:
            wait(lambda: sum(store.totals().values()) >= due.total(), 120)
        except TimeoutError:
            say("not every update was settled")
        account = {"sent": due, "settled": Counter(store.totals()), "pulls": sent.get("pulls", 0)}
        account["problems"] = sender["problems"]
        account["dead"] = queue_depths(servers.rabbitmq.url, JOB, 10)["dead"]
    return watch, warm_s, account


@contextmanager
def sending(command: list[str]) -> Iterator[dict[str, Any]]:
    """Have a process send for as long as the block lasts; what it sent is in the yielded dictionary after it.

    Args:
        command: of the process: it says `ready`, sends until its input ends, and prints JSON.
    """
    result: dict[str, Any] = {}
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        if process.stdout is None or process.stdout.readline().strip() != "ready":
            raise FedMQError("the senders did not start; their messages stand above")
        yield result
        result |= outcome(process.communicate(timeout=120)[0])
    finally:
        process.kill()
        process.wait()


def _progress(now: float, watch: Watch) -> None:
    names = ("aggregator, MB", "Redis used_memory, MB", "broker, MB resident", "updates in the queue")
    say(f"{now:5.0f} s: " + ", ".join(f"{name} {watch.series[name][-1][1]:.0f}" for name in names))


def _pid(server: PrivateServer) -> int:
    if server.process is None:
        raise FedMQError(f"the private {server.name} does not run")
    return server.process.pid


@contextmanager
def soak_servers(folder: Path, rabbitmq: str = RABBITMQ) -> Iterator[Pair]:
    """Run a broker with settings of its own, and a store, for as long as the block lasts."""
    pair = Pair(private_rabbitmq(folder / "rabbitmq", rabbitmq), private_redis(folder / "redis"))
    try:
        pair.redis.start()
        pair.rabbitmq.start()
        yield pair
    finally:
        pair.rabbitmq.stop()
        pair.redis.stop()
        stop_port_mapper(pair.rabbitmq)


LIMITED = (  # these must not grow; the rest of Redis and the broker is shown beside them
    "aggregator, MB", "aggregator, files", "aggregator, threads", "the same without bounded records, MB",
    "keys without bounded records", "Redis, files", "broker, MB resident", "broker, files",
)  # fmt: skip
SLACK = {"MB": 1.0, "files": 4.0, "threads": 1.0, "keys": 4.0}  # a file or a key more at a time is no growth


def grown(name: str, values: list[float]) -> bool:
    """Tell whether what is limited was more in the last quarter than in the first."""
    slack = next((extra for unit, extra in SLACK.items() if unit in name), 0.0)
    return name in LIMITED and values[-1] > GROWTH_MAX * values[0] + slack


def run(minutes: float, out: Path | None) -> None:
    """Soak, print the tables and write them to a file if there is one.

    Raises:
        AssertionError: something grew, or the account is not exact.
    """
    load = load_average()
    with tempfile.TemporaryDirectory(prefix="fedmq-bench-") as name, soak_servers(Path(name)) as servers:
        watch, warm_s, account = soak(minutes, servers, Path(name))
    stop_s = warm_s + 60 * minutes
    medians = {name: quarters(points, warm_s, stop_s) for name, points in watch.series.items()}
    lines = [
        f"{minutes:g} minutes after {warm_s:.0f} s of warm-up, {sum(account['sent'].values()):,} updates, "
        f"{account['pulls']:,} pulls; load average {load:.1f} to {load_average():.1f}.", "",
        *_growth(medians), "", *_kinds(watch.kinds), "", *_account(account),
    ]  # fmt: skip
    print("\n".join(lines))
    if out is not None:
        out.write_text("\n".join(lines) + "\n")
    problems = [name for name, values in medians.items() if grown(name, values)] + account["problems"]
    if account["sent"] != account["settled"]:
        problems.append(f"sent {dict(account['sent'])}, settled {dict(account['settled'])}")
    if problems:
        raise AssertionError("; ".join(problems))


def _growth(medians: Mapping[str, list[float]]) -> Iterator[str]:
    yield f"| median of each quarter | 1 | 2 | 3 | 4 | last over first, at most {GROWTH_MAX:g} |"
    yield "|---|---:|---:|---:|---:|---:|"
    for name, values in medians.items():
        ratio = f"{values[-1] / values[0]:.3f}" if values[0] else "-"
        mark = " **grew**" if grown(name, values) else "" if name in LIMITED else " (no limit)"
        yield f"| {name} | " + " | ".join(f"{value:,.1f}" for value in values) + f" | {ratio}{mark} |"


def _kinds(kinds: Mapping[str, list[tuple[float, int, int]]]) -> Iterator[str]:
    yield "| kind of key | keys at first | at last | kB at first | at last | grows to |"
    yield "|---|---:|---:|---:|---:|---|"
    for kind, seen in sorted(kinds.items()):
        (_, first, small), (_, last, large) = seen[0], seen[-1]
        bound = BOUNDED.get(kind, "")
        yield f"| {kind} | {first:,} | {last:,} | {small / 1e3:,.0f} | {large / 1e3:,.0f} | {bound} |"


def _account(account: Mapping[str, Any]) -> Iterator[str]:
    yield "| | applied | stale | duplicate | rejected |\n|---|---:|---:|---:|---:|"
    for name in ("sent", "settled"):
        counts = (account[name][outcome] for outcome in ("applied", "stale", "duplicate", "rejected"))
        yield f"| {name} | " + " | ".join(f"{number:,}" for number in counts) + " |"
    yield f"\n{account['dead']:,} dead letters."
