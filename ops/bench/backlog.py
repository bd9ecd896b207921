"""`fedmq bench backlog`: how steadily a large backlog of small updates drains, by a process with durable commits.

The updates are those of the digits model, 9,610 parameters, in int8; all are trained from version 0, as after a long
time in which nobody aggregated. With the staleness that takes, the aggregator has to know all their ids until the end.
"""

import statistics
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pika

from ops.bench.end_to_end import aggregator_environment, health, running, say, wait
from ops.bench.process import load_average, processor_seconds, resident_bytes
from ops.bench.updates import JOB, encoded_update, model_of, with_id
from ops.servers import PrivateServers
from shared.store.redis import RedisStore
from shared.transport import names
from shared.transport.rabbitmq import RabbitSource, queue_depths

NUM_PARAMS = 9_600  # of the digits model, in whole rows of a hundred
TENTHS = 10
STEADY = 1.25  # processor time of the dearest tenth beside the median one, at most
DRAIN_S_MAX = 1800.0
POLL_S = 0.02


@dataclass(frozen=True, slots=True)
class Backlog:
    """What one drain gave.

    Attributes:
        rates: updates/s of each tenth.
        costs: seconds of the aggregator's processor time for each update of a tenth: other work on the machine
            disturbs them little.
        resident: bytes of the aggregator at the end of each tenth.
    """

    rates: list[float]
    costs: list[float]
    resident: list[float]


def drain(updates: int, servers: PrivateServers, folder: Path) -> Backlog:
    """Fill a queue, start an aggregator, and watch it.

    Args:
        updates: in the queue.
        servers: broker and store.
        folder: for the aggregator's log.
    """
    body = encoded_update(model_of(NUM_PARAMS), 999_999_999)[1]
    store = RedisStore(servers.redis.url, JOB)
    fill(servers.rabbitmq.url, body, updates)
    environment = aggregator_environment(servers)
    found = Backlog([], [], [])
    with ExitStack() as stack:
        process = stack.enter_context(running(environment, folder))
        wait(lambda: "waiting for version 0" in health(environment["FEDMQ_METRICS_PORT"]))
        store.create(model_of(NUM_PARAMS), time.time())
        wait(lambda: _applied(store) > 0)
        before, since, used = _applied(store), time.perf_counter(), processor_seconds(process.pid)
        for tenth in range(1, TENTHS + 1):
            due = updates * tenth // TENTHS
            wait(partial(_reached, store, due), DRAIN_S_MAX, POLL_S)
            applied, now, spent = _applied(store), time.perf_counter(), processor_seconds(process.pid)
            found.rates.append((applied - before) / (now - since))
            found.costs.append((spent - used) / (applied - before))
            found.resident.append(resident_bytes(process.pid))
            cost_us, size_mb = 1e6 * found.costs[-1], found.resident[-1] / 1e6
            say(f"tenth {tenth}: {found.rates[-1]:,.0f}/s, {cost_us:.0f} us an update, {size_mb:.0f} MB")
            before, since, used = applied, now, spent
        wait(lambda: queue_depths(servers.rabbitmq.url, JOB, 5)["updates"] == 0)
    return found


def fill(url: str, body: bytes, updates: int) -> None:
    """Publish a backlog; every message is safe with the broker when it returns."""
    source = RabbitSource(url, JOB, 1)  # declares exchange and queues
    source.link.wait_ready(10)
    source.close()
    connection = pika.BlockingConnection(pika.URLParameters(url))
    channel = connection.channel()
    for sequence in range(updates):
        update_id, message = with_id(body, sequence)
        properties = pika.BasicProperties(delivery_mode=2, message_id=update_id)
        channel.basic_publish(names.EXCHANGE, names.routing_key(JOB, "bench"), message, properties)
        if sequence % 1000 == 999:
            connection.process_data_events()
    wait(lambda: queue_depths(url, JOB, 5)["updates"] == updates)  # no confirms: the queue itself says so
    connection.close()


def _reached(store: RedisStore, due: int) -> bool:
    return _applied(store) >= due


def _applied(store: RedisStore) -> int:
    return store.totals().get("applied", 0)


def run(updates: int, out: Path | None) -> None:
    """Measure one backlog; print the table and write it to a file if there is one.

    Raises:
        AssertionError: the rate is not steady.
    """
    with tempfile.TemporaryDirectory(prefix="fedmq-bench-") as folder, PrivateServers() as servers:
        load = load_average()
        found = drain(updates, servers, Path(folder))
    lines = table(updates, found, (load, load_average()))
    print("\n".join(lines))
    if out is not None:
        out.write_text("\n".join(lines) + "\n")
    slowdown = max(found.costs) / statistics.median(found.costs)
    if slowdown > STEADY:
        raise AssertionError(f"an update of the dearest tenth costs {slowdown:.2f} times the median; limit {STEADY:g}")


def table(updates: int, found: Backlog, load: tuple[float, float]) -> list[str]:
    """Return the tenths, and what is to be steady."""
    tenths = range(1, TENTHS + 1)
    median, slowest = statistics.median(found.rates), min(found.rates)
    fastest, dearest = max(found.rates) / median, max(found.costs) / statistics.median(found.costs)
    return [
        f"{updates:,} updates of {NUM_PARAMS:,} parameters, int8; load average {load[0]:.1f} to {load[1]:.1f}:",
        "",
        "| tenth | " + " | ".join(str(tenth) for tenth in tenths) + " |",
        "|---|" + "---:|" * TENTHS,
        "| updates/s | " + " | ".join(f"{rate:,.0f}" for rate in found.rates) + " |",
        "| processor time, µs an update | " + " | ".join(f"{1e6 * cost:.0f}" for cost in found.costs) + " |",
        "| aggregator, MB | " + " | ".join(f"{size / 1e6:.0f}" for size in found.resident) + " |",
        "",
        f"Median {median:,.0f}/s, the slowest tenth {median / slowest:.2f} times slower, the fastest {fastest:.2f} "
        f"times faster; the dearest tenth costs {dearest:.2f} times the median's processor time (at most {STEADY:g}).",
    ]
