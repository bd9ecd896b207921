"""Publish -> broker -> fold -> commit -> ack on private servers, beside consumers that only receive and ack.

Each round fills a queue with a backlog of updates, lets a consumer connect while another one holds the queue
(single active consumer), opens the gate, and measures until every message is settled: by the production aggregator
as a process of its own, with durable commits; by a plain pika consumer; by our transport that only acks.
"""

import os
import statistics
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import pika
import pika.adapters.utils.io_services_utils

from ops.bench.process import processor_seconds, resident_bytes
from ops.bench.updates import JOB, encoded_update, model_of, with_id
from ops.servers import PrivateServer, PrivateServers, free_port
from shared.store.redis import RedisStore
from shared.transport import names
from shared.transport.ports import Outgoing
from shared.transport.rabbitmq import RabbitSink, RabbitSource, queue_depths

BACKLOG_BYTES = 800e6  # per round: long enough to measure, short enough to repeat
BACKLOG_UPDATES = (60, 5000)
DRAIN_S_MAX = 300.0
PREFETCH = 1024  # of every consumer, the default of the aggregator
PIKA_READ_BYTES = (4096, 1024 * 100)  # pika 1.4's own: per recv, per event
PUBLISHES = 40  # measured one by one, each with its confirm


class Servers(Protocol):
    """A broker and a store."""

    @property
    def rabbitmq(self) -> PrivateServer:
        """The broker."""

    @property
    def redis(self) -> PrivateServer:
        """The store."""


@dataclass(frozen=True, slots=True)
class Drain:
    """What one model size gave: rates in updates/s, memory in bytes, medians over the rounds."""

    num_params: int
    updates: int
    message_bytes: int
    publish: float
    aggregator: float
    bare_pika: float
    bare_transport: float
    ratio: float
    peak_bytes: int
    idle_bytes: int


@dataclass(frozen=True, slots=True)
class Run:
    """One backlog drained by an aggregator of its own.

    Attributes:
        rate: updates/s.
        peak_bytes: resident, at most.
        idle_bytes: resident before there was any model.
        processor_s: of the aggregator's processor time for each update.
    """

    rate: float
    peak_bytes: float
    idle_bytes: float
    processor_s: float


def drain(num_params: int, repeats: int, servers: PrivateServers, folder: Path) -> Drain:
    """Measure one model size; the three consumers take turns, `ratio` is the median of the rounds' ratios."""
    body = encoded_update(model_of(num_params), 999_999_999)[1]
    count = int(min(BACKLOG_UPDATES[1], max(BACKLOG_UPDATES[0], BACKLOG_BYTES / len(body))))
    rounds: list[tuple[float, ...]] = []
    for index in range(repeats):
        publish = _publish_rate(servers, body)
        pika_rate = _rate(servers, body, count, _plain_pika(servers))
        transport = _rate(servers, body, count, _transport_only(servers))
        run = aggregator_rate(servers, body, count, num_params, folder)
        rounds.append((publish, run.rate, pika_rate, transport, run.peak_bytes, run.idle_bytes))
        say(
            f"{num_params:>10,}  {index + 1}: aggregator {run.rate:7.1f}/s, pika {pika_rate:7.1f}/s, "
            f"transport {transport:7.1f}/s"
        )
    publish, rate, pika_rate, transport, _, idle = (statistics.median(c) for c in zip(*rounds, strict=True))
    ratio = statistics.median(row[1] / row[2] for row in rounds)
    return Drain(
        num_params,
        count,
        len(body),
        publish,
        rate,
        pika_rate,
        transport,
        ratio,
        int(max(r[4] for r in rounds)),
        int(idle),
    )


def _rate(servers: PrivateServers, body: bytes, count: int, consumer: Iterator[int]) -> float:
    """Time a consumer: the first `next` connects it, each further one settles some messages and tells how many."""
    with gate(servers, body, count):
        next(consumer)
    started, settled = time.perf_counter(), 0
    while settled < count:
        settled += next(consumer)
    elapsed_s = time.perf_counter() - started
    getattr(consumer, "close", lambda: None)()
    return count / elapsed_s


def _plain_pika(servers: PrivateServers) -> Iterator[int]:
    """Consume with pika as it comes, acking every eighth message with all before it.

    Our transport lets pika read the socket in large pieces; the limit we compare with is pika without that.
    """
    transport = pika.adapters.utils.io_services_utils._AsyncTransportBase
    patched = transport._MAX_RECV_BYTES, transport._MAX_CONSUME_BYTES
    transport._MAX_RECV_BYTES, transport._MAX_CONSUME_BYTES = PIKA_READ_BYTES
    connection = pika.BlockingConnection(pika.URLParameters(servers.rabbitmq.url))
    try:
        channel = connection.channel()
        channel.basic_qos(prefetch_count=PREFETCH)
        stream = channel.consume(names.queue(JOB), inactivity_timeout=0.05)
        next(stream)  # subscribes
        yield 0
        seen = 0
        for method, _properties, _body in stream:
            if method is None:
                yield 0
                continue
            seen += 1
            if seen % 8 == 0 or method.delivery_tag % 8 == 4:
                channel.basic_ack(method.delivery_tag, multiple=True)
            yield 1
    finally:
        transport._MAX_RECV_BYTES, transport._MAX_CONSUME_BYTES = patched
        connection.close()


def _transport_only(servers: PrivateServers) -> Iterator[int]:
    """Consume with our own transport, acking everything at once."""
    source = RabbitSource(servers.rabbitmq.url, JOB, PREFETCH)
    try:
        source.link.wait_ready(10)
        yield 0
        while True:
            deliveries = source.receive(16, 1.0)
            source.ack(deliveries)
            yield len(deliveries)
    finally:
        source.close()


def aggregator_rate(
    servers: Servers, body: bytes, count: int, num_params: int, folder: Path, module: str = "aggregator",
    **settings: str,
) -> Run:  # fmt: skip
    """Let a fresh aggregator process drain a backlog.

    Args:
        servers: broker and store; the store is emptied.
        body: of the updates in the backlog, which differ by their ids.
        count: how many.
        num_params: of the model.
        folder: for its log.
        module: what is run: `aggregator`, or something that runs it.
        settings: `FEDMQ_*` variables, beside those of every run.
    """
    store = RedisStore(servers.redis.url, JOB)
    store._redis.flushdb()
    environment = aggregator_environment(servers, **settings)
    with ExitStack() as stack:
        with gate(servers, body, count):
            process = stack.enter_context(running(environment, folder, module))
            wait(lambda: "waiting for version 0" in health(environment["FEDMQ_METRICS_PORT"]))
            idle = resident_bytes(process.pid)
            store.create(model_of(num_params), time.time())
            wait(lambda: bool(store.job()))
        started, used = time.perf_counter(), processor_seconds(process.pid)
        wait(lambda: (store.totals().get("applied", 0)) >= count)
        rate, spent = count / (time.perf_counter() - started), processor_seconds(process.pid) - used
        return Run(rate, resident_bytes(process.pid, "VmHWM"), idle, spent / count)


def aggregator_environment(servers: Servers, **settings: str) -> dict[str, str]:
    """Return the environment of an aggregator: those of a benchmark, and the settings given."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("FEDMQ_")}
    return inherited | {
        "FEDMQ_BROKER_URL": servers.rabbitmq.url, "FEDMQ_STORE_URL": servers.redis.url, "FEDMQ_JOB": JOB,
        "FEDMQ_CODEC": "int8", "FEDMQ_STALENESS_MAX": "100000", "FEDMQ_PREFETCH": str(PREFETCH),
        "FEDMQ_METRICS_PORT": str(free_port()),
    } | settings  # fmt: skip


@contextmanager
def running(
    environment: dict[str, str], folder: Path, module: str = "aggregator"
) -> "Iterator[subprocess.Popen[bytes]]":
    """Run a program for as long as the block lasts; its log is `aggregator.log` of the folder."""
    with (folder / "aggregator.log").open("ab") as log:
        process = subprocess.Popen([sys.executable, "-m", module], env=environment, stdout=log, stderr=log)
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@contextmanager
def gate(servers: Servers, body: bytes, count: int) -> Iterator[None]:
    """Fill a fresh queue and hold it as its active consumer; leaving the block hands it to the next one."""
    connection = pika.BlockingConnection(pika.URLParameters(servers.rabbitmq.url))
    channel = connection.channel()
    channel.queue_delete(names.queue(JOB))
    source = RabbitSource(servers.rabbitmq.url, JOB, 1)  # declares exchange and queues; first, so it is active
    source.link.wait_ready(10)
    channel.confirm_delivery()  # without confirms a quorum queue loses the last few when the channel closes
    for sequence in range(count):
        update_id, message = with_id(body, sequence)
        properties = pika.BasicProperties(delivery_mode=2, message_id=update_id)
        channel.basic_publish(names.EXCHANGE, names.routing_key(JOB, "bench"), message, properties)
    connection.close()
    # one message is held by the gate
    wait(lambda: queue_depths(servers.rabbitmq.url, JOB, 5)["updates"] >= count - 1)
    try:
        yield
    finally:
        source.close()


def _publish_rate(servers: PrivateServers, body: bytes) -> float:
    """Return publishes per second of one worker that waits for each confirm."""
    source = RabbitSource(servers.rabbitmq.url, JOB, PREFETCH)
    source.link.wait_ready(10)
    sink = RabbitSink(servers.rabbitmq.url, "bench")
    sink.link.wait_ready(10)
    try:
        started = time.perf_counter()
        for sequence in range(PUBLISHES):
            sink.publish(Outgoing(JOB, "bench", f"bench/0/{sequence}", body), 60)
            source.ack(source.receive(16, 0))
        return PUBLISHES / (time.perf_counter() - started)
    finally:
        sink.close()
        source.close()


def wait(condition: Callable[[], bool], timeout_s: float = DRAIN_S_MAX, poll_s: float = 0.01) -> None:
    """Return when a condition is true.

    Raises:
        TimeoutError: it does not come true.
    """
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError("the benchmark's condition did not come true; see its aggregator.log")
        time.sleep(poll_s)


def health(port: str) -> str:
    """Return what an aggregator says of itself, nothing while it is not there."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/healthz", timeout=5) as answer:
            return str(answer.read())
    except urllib.error.HTTPError as error:
        return str(error.read())
    except OSError:
        return ""


def say(line: str) -> None:
    """Print progress beside the tables."""
    print(f"  {line}", file=sys.stderr, flush=True)
