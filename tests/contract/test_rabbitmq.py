"""What only RabbitMQ has: restarts, names and arguments, logins, alarms, heartbeats."""

import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager

import pika
import pika.exceptions
import psutil
import pytest

from ops.servers import PrivateServer, PrivateServers, free_port, private_rabbitmq, stop_port_mapper
from shared.errors import (
    BrokerUnavailable,
    FedMQError,
    PublishRefused,
    PublishUnconfirmed,
    Reason,
    SettingsError,
    Unavailable,
)
from shared.messages import CONTENT_TYPE
from shared.transport.link import parameters
from shared.transport.names import DEAD_EXCHANGE, EXCHANGE, HEADER_REPLAYED, VHOST, dead_queue, queue, routing_key
from shared.transport.ports import Delivery, Outgoing
from shared.transport.rabbitmq import INBOX_BYTES_MAX, RabbitSink, RabbitSource, queue_depths
from shared.transport.topology import QueueLimits
from shared.urls import hide_password
from tests.contract.brokers import (
    Rabbit,
    message,
    numbers,
    plain_channel,
    publish,
    publish_when_back,
    receive,
    receive_until,
    refuse,
)
from tests.contract.faults import frozen, listed, rabbitmqctl, silent_host, unreachable_host, wait_until

MARKER = 1_000_000
MESSAGE_BYTES_MAX = 12 * 10**6  # of the suite's own broker
PASSWORD = "s3cret"


@pytest.fixture
def rabbit(servers: PrivateServers) -> Iterator[Rabbit]:
    adapter = Rabbit(servers.rabbitmq.url)
    yield adapter
    adapter.close()


@pytest.fixture(scope="module")
def _own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PrivateServer]:
    server = private_rabbitmq(tmp_path_factory.mktemp("rabbitmq"), f"max_message_size = {MESSAGE_BYTES_MAX}\n")
    try:
        server.start()
        yield server
    finally:
        server.stop()
        stop_port_mapper(server)


@pytest.fixture
def own(_own: PrivateServer) -> Iterator[PrivateServer]:
    """Yield a RabbitMQ that a test may stop, freeze or alarm; it runs again afterwards."""
    yield _own
    if _own.process is None:
        _own.start()


@pytest.fixture
def faulty(own: PrivateServer) -> Iterator[Rabbit]:
    """Yield adapters of that RabbitMQ."""
    adapter = Rabbit(own.url)
    yield adapter
    adapter.close()


def login(server: PrivateServer, configure: str = "", write: str = "", read: str = "") -> str:
    """Add a login with the given permissions on the virtual host; return its name, its password is PASSWORD."""
    name = f"dev-{uuid.uuid4().hex[:8]}"
    rabbitmqctl(server, "add_user", name, PASSWORD)
    rabbitmqctl(server, "set_permissions", "-p", VHOST, name, configure, write, read)
    return name


def as_login(url: str, name: str, password: str = PASSWORD) -> str:
    return url.replace("fedmq:fedmq@", f"{name}:{password}@")


def on_vhost(url: str, vhost: str) -> str:
    return url.removesuffix(VHOST) + vhost


# Faults of the server


def test_a_broker_that_crashes_between_publish_and_ack_delivers_again(
    own: PrivateServer, faulty: Rabbit, job: str
) -> None:
    source, sink = faulty.source(job), faulty.sink()
    publish(sink, job, range(5))
    before = receive(source, 5)
    source.ack(before[:2])
    wait_until(lambda: unacked(own, job) == 3)
    own.kill()
    own.start()
    publish_when_back(sink, message(job, MARKER))
    after = receive_until(source, MARKER)
    assert numbers(after) == [2, 3, 4, MARKER]
    source.ack(before)  # of a connection that is gone
    source.ack(after)
    source.close()
    assert queue_depths(own.url, job, 10.0)["updates"] == 0


def test_while_the_broker_is_down_everybody_knows_and_waits(own: PrivateServer, faulty: Rabbit, job: str) -> None:
    source, sink = faulty.source(job), faulty.sink()
    publish(sink, job, range(2))
    held = receive(source, 2)
    own.stop()
    wait_until(lambda: not sink.link.ready.is_set() and not source.link.ready.is_set())
    started = time.monotonic()
    with pytest.raises(BrokerUnavailable, match=f"127.0.0.1:{own.port}"):
        sink.publish(message(job, 2), 30.0)
    source.ack(held[:1])
    refuse(source, held[1], Reason.JOB, "detail")
    source.recover()
    assert source.receive(10, 0.0) == []
    assert time.monotonic() - started < 2.0
    late = RabbitSink(own.url, "late")  # a program started before its broker
    try:
        with pytest.raises(BrokerUnavailable, match="refused"):
            late.link.wait_ready(0.5)
        own.start()
        late.link.wait_ready(30.0)
        publish_when_back(late, message(job, 3, "late"))
        publish_when_back(sink, message(job, MARKER))
        assert numbers(receive_until(source, MARKER)) == [0, 1, 3, MARKER]
    finally:
        late.close()


def test_a_frozen_broker_leaves_a_publish_unconfirmed_and_is_noticed(own: PrivateServer, job: str) -> None:
    adapter = Rabbit(f"{own.url}?heartbeat=2")
    source, sink = adapter.source(job), adapter.sink()
    try:
        with frozen(own):
            started = time.monotonic()
            with pytest.raises(PublishUnconfirmed, match="within 1 s"):
                sink.publish(message(job, 0), 1.0)
            assert time.monotonic() - started < 3.0
            wait_until(lambda: not sink.link.ready.is_set() and not source.link.ready.is_set(), 15.0)
        publish_when_back(sink, message(job, 1))
        assert numbers(receive_until(source, 1))[-1] == 1  # 0 may come once, twice or not: it was never confirmed
    finally:
        adapter.close()


def test_a_connection_closed_by_an_operator_is_opened_again(servers: PrivateServers, rabbit: Rabbit, job: str) -> None:
    source, sink = rabbit.source(job), rabbit.sink()
    publish(sink, job, range(3))
    receive(source, 2)
    epoch = source._epoch
    rabbitmqctl(servers.rabbitmq, "close_all_connections", "--global", "maintenance")
    wait_until(lambda: source._epoch > epoch)
    publish_when_back(sink, message(job, MARKER))
    assert numbers(receive_until(source, MARKER)) == [0, 1, 2, MARKER]


def test_a_deleted_queue_is_declared_and_consumed_again(servers: PrivateServers, rabbit: Rabbit, job: str) -> None:
    source, sink = rabbit.source(job), rabbit.sink()
    rabbitmqctl(servers.rabbitmq, "delete_queue", "-p", VHOST, queue(job))
    publish_when_back(sink, message(job, 0))
    assert numbers(receive(source, 1)) == [0]


def test_a_rejected_message_is_not_lost_when_its_dead_letter_queue_was_deleted(
    servers: PrivateServers, rabbit: Rabbit, job: str
) -> None:
    source = rabbit.source(job)
    publish(rabbit.sink(), job, [0])
    [delivery] = receive(source, 1)
    rabbitmqctl(servers.rabbitmq, "delete_queue", "-p", VHOST, dead_queue(job))
    refuse(source, delivery, Reason.JOB, "detail")
    [delivery] = receive(source, 1)  # it comes again, and the queue is back
    refuse(source, delivery, Reason.JOB, "detail")
    wait_until(lambda: [letter.body for letter in rabbit.letters(job)] == [b"a 0"])


def test_many_reconnects_leak_neither_sockets_nor_threads(rabbit: Rabbit, job: str) -> None:
    source, process = rabbit.source(job), psutil.Process()
    publish(rabbit.sink(), job, [0])
    receive(source, 1)
    files, threads = process.num_fds(), threading.active_count()
    for _ in range(10):
        source.recover()
        receive(source, 1)
    assert process.num_fds() <= files + 1
    assert threading.active_count() <= threads


def test_an_ack_that_meets_a_reconnect_is_harmless(rabbit: Rabbit, job: str) -> None:
    source = rabbit.source(job)
    publish(rabbit.sink(), job, range(3))
    new: list[Delivery] = []

    class Interrupted(Sequence[Delivery]):
        """Deliveries whose connection is replaced while they are being acked."""

        def __init__(self, deliveries: list[Delivery]) -> None:
            self._deliveries = deliveries

        def __len__(self) -> int:
            return len(self._deliveries)

        def __getitem__(self, index: int) -> Delivery:  # type: ignore[override]
            if index == len(self):
                source.recover()
                new.extend(receive(source, 3))
            return self._deliveries[index]

    source.ack(Interrupted(receive(source, 3)))
    source.close()
    assert numbers(new) == [0, 1, 2]
    assert numbers(receive(rabbit.source(job), 3)) == [0, 1, 2]


def test_a_publish_that_meets_a_closing_channel_fails_alone(rabbit: Rabbit, job: str) -> None:
    source, sink = rabbit.source(job), rabbit.sink()
    publish(sink, job, range(3))
    connection = sink.link._connection
    sink.link.call(lambda: sink._channel.close())  # as the broker does when it refuses a publish
    with pytest.raises(Unavailable):
        sink.publish(message(job, 3), 2.0)
    wait_until(lambda: sink.link._connection is not connection and sink.link.ready.is_set())
    assert sink._unconfirmed == {}, "publishes of the lost connection are still waited for"
    publish(sink, job, [MARKER])
    assert numbers(receive(source, 4)) == [0, 1, 2, MARKER]


# Heartbeats and memory


def test_a_busy_caller_costs_no_heartbeat(servers: PrivateServers, job: str) -> None:
    adapter = Rabbit(f"{servers.rabbitmq.url}?heartbeat=2")
    source, sink = adapter.source(job), adapter.sink()
    try:
        publish(sink, job, [0])
        [delivery] = receive(source, 1)
        connections, epoch = (sink.link._connection, source.link._connection), source._epoch
        end = time.monotonic() + 8.0  # four heartbeats; pika gives up after 7 s, the broker after 4 s
        while time.monotonic() < end:
            sum(range(10_000))  # holds the interpreter, as training does
        publish(sink, job, [1])
        source.ack([delivery, *receive(source, 1)])
        assert (sink.link._connection, source.link._connection) == connections
        assert source._epoch == epoch
        source.close()
        assert queue_depths(servers.rabbitmq.url, job, 10.0)["updates"] == 0
    finally:
        adapter.close()


def test_a_slow_receiver_bounds_what_is_held_in_memory(servers: PrivateServers, job: str) -> None:
    count, size = 300, 10**6
    adapter = Rabbit(f"{servers.rabbitmq.url}?heartbeat=2")
    try:
        adapter.source(job).close()
        sink = adapter.sink()
        body = os.urandom(size)
        for sequence in range(count):
            sink.publish(message(job, sequence, body=body), 60.0)
        source = adapter.source(job, prefetch=256)
        epoch, peak = source._epoch, 0
        end = time.monotonic() + 10.0  # more than the 7 s after which pika calls a silent connection dead
        while time.monotonic() < end:
            peak = max(peak, source._inbox_bytes)
            time.sleep(0.01)
        assert INBOX_BYTES_MAX < peak <= INBOX_BYTES_MAX + 2 * size  # one that fills it, one on its way
        seen: list[int] = []
        while len(seen) < count:
            deliveries = receive(source, 1)
            peak = max(peak, source._inbox_bytes)
            seen += numbers(deliveries)
            source.ack(deliveries)
        assert seen == list(range(count))
        assert peak <= INBOX_BYTES_MAX + 2 * size
        assert source._epoch == epoch
    finally:
        adapter.close()


def test_acks_reach_the_broker_while_the_inbox_is_full(servers: PrivateServers, rabbit: Rabbit, job: str) -> None:
    source, sink = rabbit.source(job, prefetch=64), rabbit.sink()
    body = os.urandom(4 * 10**6)
    for sequence in range(16):
        sink.publish(message(job, sequence, body=body), 60.0)
    wait_until(lambda: source._inbox_bytes > INBOX_BYTES_MAX)
    source.ack(receive(source, 2))
    wait_until(lambda: unacked(servers.rabbitmq, job) == 14)
    assert numbers(receive(source, 14)) == list(range(2, 16))


def test_a_memory_alarm_leaves_publishes_unconfirmed(own: PrivateServer, faulty: Rabbit, job: str) -> None:
    source, sink = faulty.source(job), faulty.sink()
    publish(sink, job, [0])
    rabbitmqctl(own, "set_vm_memory_high_watermark", "0.00001")
    try:
        for sequence in (1, 2):
            started = time.monotonic()
            with pytest.raises(PublishUnconfirmed, match=r"within 1.5 s .*block.*memory"):
                sink.publish(message(job, sequence), 1.5)
            assert time.monotonic() - started < 3.0
    finally:
        rabbitmqctl(own, "set_vm_memory_high_watermark", "0.4")
    publish_when_back(sink, message(job, MARKER))
    assert sink.link.blocked is None
    assert numbers(receive_until(source, MARKER)) == [0, 1, 2, MARKER]


# Names, arguments, properties


def test_the_names_are_those_of_the_contract() -> None:
    assert (VHOST, EXCHANGE, DEAD_EXCHANGE) == ("fedmq", "fedmq.updates", "fedmq.dead")
    assert (queue("j"), dead_queue("j"), routing_key("j", "c")) == ("fedmq.updates.j", "fedmq.dead.j", "update.j.c")


def test_exchanges_and_queues_are_as_in_the_contract(servers: PrivateServers, rabbit: Rabbit, job: str) -> None:
    rabbit.source(job)
    with plain_channel(rabbit.url) as channel:
        channel.exchange_declare("fedmq.updates", passive=True)
        channel.exchange_declare("fedmq.dead", passive=True)
        channel.queue_declare(f"fedmq.updates.{job}", passive=True)
        channel.queue_declare(f"fedmq.dead.{job}", passive=True)
        channel.exchange_declare("fedmq.updates", "topic", durable=True)  # the same: no 406
        channel.exchange_declare("fedmq.dead", "topic", durable=True)
        quorum = {"x-queue-type": "quorum"}
        updates = quorum | {"x-single-active-consumer": True, "x-dead-letter-exchange": "fedmq.dead"}
        updates |= {"x-overflow": "reject-publish", "x-max-length-bytes": 8 * 2**30, "x-max-length": 1_000_000}
        dead = quorum | {"x-max-length-bytes": 2**30, "x-message-ttl": 30 * 86_400_000}
        channel.queue_declare(f"fedmq.updates.{job}", durable=True, arguments=updates)
        channel.queue_declare(f"fedmq.dead.{job}", durable=True, arguments=dead)
    kinds = {row["name"]: row for row in listed(servers.rabbitmq, "queues", "name", "type", "arguments", vhost=VHOST)}
    assert {kinds[f"fedmq.{name}.{job}"]["type"] for name in ("updates", "dead")} == {"quorum"}
    bindings = {
        (row["source_name"], row["destination_name"], row["routing_key"])
        for row in listed(
            servers.rabbitmq, "bindings", "source_name", "destination_name", "routing_key", vhost=VHOST
        )
    }  # fmt: skip
    assert ("fedmq.updates", f"fedmq.updates.{job}", f"update.{job}.*") in bindings
    assert ("fedmq.dead", f"fedmq.dead.{job}", f"update.{job}.*") in bindings


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("updates", {"x-queue-type": "classic"}),
        ("updates", {"x-queue-type": "quorum"}),
        ("updates", {"x-queue-type": "quorum", "x-dead-letter-exchange": DEAD_EXCHANGE}),
        ("dead", {"x-queue-type": "classic"}),
        ("dead", {}),
    ],
)
def test_another_kind_of_queue_is_refused_under_these_names(
    rabbit: Rabbit, job: str, name: str, arguments: dict[str, object]
) -> None:
    rabbit.source(job).close()
    with (
        pytest.raises(pika.exceptions.ChannelClosedByBroker, match=r"406.*inequivalent"),
        plain_channel(rabbit.url) as channel,
    ):
        channel.queue_declare(f"fedmq.{name}.{job}", durable=True, arguments=arguments)


@pytest.mark.parametrize(("kind", "durable"), [("direct", True), ("topic", False)])
@pytest.mark.parametrize("name", [EXCHANGE, DEAD_EXCHANGE])
def test_another_kind_of_exchange_is_refused_under_these_names(
    rabbit: Rabbit, job: str, name: str, kind: str, durable: bool
) -> None:
    rabbit.source(job).close()
    with (
        pytest.raises(pika.exceptions.ChannelClosedByBroker, match=r"406.*inequivalent"),
        plain_channel(rabbit.url) as channel,
    ):
        channel.exchange_declare(name, kind, durable=durable)


def test_a_queue_that_an_operator_declared_otherwise_is_used_as_it_is(rabbit: Rabbit, job: str) -> None:
    with plain_channel(rabbit.url) as channel:
        channel.queue_declare(queue(job), durable=True, arguments={"x-queue-type": "quorum", "x-max-length": 1000})
    source = rabbit.source(job)
    publish(rabbit.sink(), job, [0])
    [delivery] = receive(source, 1)
    refuse(source, delivery, Reason.JOB, "detail")
    wait_until(lambda: [letter.reason for letter in rabbit.letters(job)] == ["job"])


def test_a_published_message_has_the_properties_of_the_contract(rabbit: Rabbit, job: str) -> None:
    rabbit.source(job)
    sink = rabbit.sink("dev")
    with plain_channel(rabbit.url) as channel:
        spy = channel.queue_declare("", exclusive=True).method.queue
        channel.queue_bind(spy, "fedmq.updates", f"update.{job}.#")
        before = int(time.time())
        sink.publish(message(job, 3, "dev", b"body"), 10.0)
        method, properties, body = wait_until(
            lambda: (got := channel.basic_get(spy, auto_ack=True))[0] is not None and got
        )
    assert (method.exchange, method.routing_key, body) == ("fedmq.updates", f"update.{job}.dev", b"body")
    assert CONTENT_TYPE == properties.content_type == "application/vnd.fedmq.update+msgpack"
    assert (properties.delivery_mode, properties.message_id, properties.type) == (2, "dev/i/3", "update")
    assert before <= properties.timestamp <= time.time()
    assert properties.user_id is None


def test_a_dead_letter_has_the_headers_of_the_contract(rabbit: Rabbit, job: str) -> None:
    source = rabbit.source(job)
    publish(rabbit.sink("dev"), job, [3], "dev")
    refuse(source, receive(source, 1)[0], Reason.NOT_FINITE, "NaN")
    with plain_channel(rabbit.url) as channel:
        method, properties, body = wait_until(
            lambda: (got := channel.basic_get(f"fedmq.dead.{job}", auto_ack=True))[0] is not None and got
        )
    assert (method.exchange, method.routing_key, body) == ("fedmq.dead", f"update.{job}.dev", b"dev 3")
    assert properties.headers.pop("x-delivery-count", 0) == 0  # the broker's own
    assert properties.headers == {"fedmq-reason": "not_finite", "fedmq-detail": "NaN"}
    assert (properties.delivery_mode, properties.message_id, properties.type) == (2, "dev/i/3", "update")


def test_the_simplest_client_needs_a_routing_key_and_a_body(rabbit: Rabbit, job: str) -> None:
    source = rabbit.source(job)
    with plain_channel(rabbit.url) as channel:
        channel.basic_publish("fedmq.updates", f"update.{job}.esp32_7", b"body")
    [delivery] = receive(source, 1)
    assert (delivery.body, delivery.client, delivery.user_id, delivery.update_id) == (b"body", "esp32_7", None, "")
    refuse(source, delivery, Reason.MALFORMED, "no map")
    wait_until(lambda: [letter.client for letter in rabbit.letters(job)] == ["esp32_7"])


# Logins


def test_the_broker_vouches_for_a_client_that_logs_in_as_itself(
    servers: PrivateServers, rabbit: Rabbit, job: str
) -> None:
    name = login(servers.rabbitmq, write=EXCHANGE)
    source, url = rabbit.source(job), as_login(rabbit.url, name)
    publish(rabbit.sink(name, url), job, [0], name)
    publish(rabbit.sink("other", url), job, [1], "other")
    deliveries = receive(source, 2)
    assert [(d.client, d.user_id) for d in deliveries] == [(name, name), ("other", None)]


def test_nobody_can_publish_under_the_user_id_of_another(servers: PrivateServers, rabbit: Rabbit, job: str) -> None:
    name = login(servers.rabbitmq, write=EXCHANGE)
    source = rabbit.source(job)
    with (
        pytest.raises(pika.exceptions.ChannelClosedByBroker, match=r"406.*user_id"),
        plain_channel(as_login(rabbit.url, name)) as channel,
    ):
        channel.confirm_delivery()
        properties = pika.BasicProperties(user_id="fedmq")
        channel.basic_publish(EXCHANGE, routing_key(job, "fedmq"), b"forged", properties)
    publish(rabbit.sink(), job, [MARKER])
    assert numbers(receive(source, 1)) == [MARKER]


def test_a_topic_permission_pins_a_login_to_its_own_key(servers: PrivateServers, rabbit: Rabbit, job: str) -> None:
    name = login(servers.rabbitmq, write=EXCHANGE)
    rabbitmqctl(
        servers.rabbitmq, "set_topic_permissions", "-p", VHOST, name, EXCHANGE, rf"^update\.[^.]+\.{name}$", ""
    )  # fmt: skip
    source, sink = rabbit.source(job), rabbit.sink(name, as_login(rabbit.url, name))
    with pytest.raises(PublishRefused, match="403"):
        sink.publish(message(job, 0, "somebody-else"), 10.0)
    publish_when_back(sink, message(job, 1, name))
    assert numbers(receive(source, 1)) == [1]


def test_a_login_without_permission_to_publish_is_refused(servers: PrivateServers, rabbit: Rabbit, job: str) -> None:
    rabbit.source(job)
    sink = rabbit.sink(url=as_login(rabbit.url, login(servers.rabbitmq)))
    started = time.monotonic()
    with pytest.raises(PublishRefused, match="403") as caught:
        sink.publish(message(job, 0), 10.0)
    assert time.monotonic() - started < 5.0
    assert PASSWORD not in str(caught.value)


def test_a_login_that_may_not_declare_is_told_at_start(servers: PrivateServers, job: str) -> None:
    name = login(servers.rabbitmq, write=".*", read=".*")
    source = RabbitSource(as_login(servers.rabbitmq.url, name), job, 10)
    try:
        with pytest.raises(SettingsError, match="403"):
            source.link.wait_ready(10.0)
    finally:
        source.close()


# What the broker refuses


def test_a_message_over_the_brokers_limit_is_refused(faulty: Rabbit, job: str) -> None:
    source, sink = faulty.source(job), faulty.sink()
    sink.publish(message(job, 0, body=bytes(MESSAGE_BYTES_MAX)), 30.0)
    with pytest.raises(PublishRefused, match="406"):
        sink.publish(message(job, 1, body=bytes(MESSAGE_BYTES_MAX + 1)), 30.0)
    publish_when_back(sink, message(job, 2))
    assert numbers(receive(source, 2)) == [0, 2]


def test_a_full_queue_refuses_and_takes_again_when_there_is_room(rabbit: Rabbit, job: str) -> None:
    full = {"x-queue-type": "quorum", "x-max-length": 3, "x-overflow": "reject-publish"}
    with plain_channel(rabbit.url) as channel:
        channel.queue_declare(queue(job), durable=True, arguments=full)
        channel.queue_bind(queue(job), EXCHANGE, routing_key(job, "*"))
    sink = rabbit.sink()
    confirmed: list[int] = []

    def refused() -> bool:  # a quorum queue takes a few more than its limit
        try:
            publish(sink, job, [len(confirmed)])
        except PublishRefused as error:
            assert "nack" in str(error)
            return True
        confirmed.append(len(confirmed))
        return False

    wait_until(refused)
    source = rabbit.source(job)
    deliveries = receive(source, len(confirmed))
    assert numbers(deliveries) == confirmed
    source.ack(deliveries)
    publish_when_back(sink, message(job, MARKER))


def test_a_publish_before_any_aggregator_ever_ran_is_refused(own: PrivateServer, job: str) -> None:
    vhost = f"fresh-{job}"
    rabbitmqctl(own, "add_vhost", vhost)
    rabbitmqctl(own, "set_permissions", "-p", vhost, "fedmq", ".*", ".*", ".*")
    adapter = Rabbit(on_vhost(own.url, vhost))
    try:
        sink = adapter.sink()
        started = time.monotonic()
        with pytest.raises(PublishRefused, match="404"):
            sink.publish(message(job, 0), 10.0)
        assert time.monotonic() - started < 5.0
        source = adapter.source(job)
        publish_when_back(sink, message(job, 1))
        assert numbers(receive(source, 1)) == [1]
    finally:
        adapter.close()


# URLs and what is wrong with them


@pytest.mark.parametrize("path", ["", "/", "?heartbeat=7", "/?heartbeat=7", "/fedmq?heartbeat=7"])
def test_the_virtual_host_is_fedmq_unless_the_url_names_one(path: str) -> None:
    parsed = parameters(f"amqp://login:{PASSWORD}@host:5673{path}", "name")
    assert (parsed.host, parsed.port, parsed.virtual_host) == ("host", 5673, "fedmq")
    assert parsed.heartbeat == (7 if "heartbeat" in path else 15)


def test_a_url_can_name_another_virtual_host() -> None:
    assert parameters("amqp://host/%2F", "name").virtual_host == "/"
    assert parameters("amqps://host/fleet", "name").virtual_host == "fleet"


@pytest.mark.parametrize(
    "url",
    [
        "",
        "nonsense",
        f"http://fedmq:{PASSWORD}@host:5672/fedmq",
        f"amqp://fedmq:{PASSWORD}@",
        f"amqp://fedmq:{PASSWORD}@host:port/fedmq",
        f"amqp://fedmq:{PASSWORD}@host:123456/fedmq",
        f"amqp://fedmq:{PASSWORD}@host:5672/fedmq?heartbeat=often",
        f"amqp://fedmq:{PASSWORD}@[::1/fedmq",
        f"amqp://fedmq:{PASSWORD}/with/slashes@host:5672/fedmq",
        f"amqp://fedmq:{PASSWORD}#with-a-hash@host:5672/fedmq",
        f"amqp://fedmq:{PASSWORD}@with-an-at@host:5672:5672/fedmq",
    ],
)
def test_a_bad_url_is_a_settings_error_without_the_password(url: str) -> None:
    for make in (lambda: RabbitSink(url, "a"), lambda: RabbitSource(url, "job", 10), lambda: queue_depths(url, "j", 1)):
        with pytest.raises(SettingsError, match="FEDMQ_BROKER_URL") as caught:
            make()
        assert PASSWORD not in str(caught.value)
        assert hide_password(url) in str(caught.value)


def problem_of(url: str, job: str, wait_s: float = 9.3) -> FedMQError:
    """Return what a sink and a source say of a URL within `wait_s`: the same, and never the password."""
    started, problems = time.monotonic(), []
    sink, source = RabbitSink(url, "a"), RabbitSource(url, job, 10)
    try:
        for link in (sink.link, source.link):
            with pytest.raises((SettingsError, BrokerUnavailable)) as caught:
                link.wait_ready(max(0.1, wait_s - (time.monotonic() - started)))
            problems.append(caught.value)
        with pytest.raises(BrokerUnavailable) as refused:
            sink.publish(message(job, 0), 10.0)
        assert time.monotonic() - started < 10.0
    finally:
        sink.close()
        source.close()
    assert type(problems[0]) is type(problems[1])
    for problem in (*problems, refused.value):
        assert PASSWORD not in str(problem)
        assert hide_password(url) in str(problem)
    return problems[0]


def test_a_wrong_password_is_a_settings_error(servers: PrivateServers, job: str) -> None:
    problem = problem_of(as_login(servers.rabbitmq.url, "fedmq"), job)
    assert isinstance(problem, SettingsError)
    assert "password" in str(problem)


def test_an_unknown_login_is_a_settings_error(servers: PrivateServers, job: str) -> None:
    problem = problem_of(as_login(servers.rabbitmq.url, "nobody"), job)
    assert isinstance(problem, SettingsError)


def test_a_missing_virtual_host_is_a_settings_error(servers: PrivateServers, job: str) -> None:
    problem = problem_of(on_vhost(servers.rabbitmq.url, "nowhere"), job)
    assert isinstance(problem, SettingsError)
    assert "virtual host" in str(problem)


def test_a_virtual_host_without_permissions_is_a_settings_error(servers: PrivateServers, job: str) -> None:
    name = f"stranger-{job[-6:]}"
    rabbitmqctl(servers.rabbitmq, "add_user", name, PASSWORD)
    problem = problem_of(as_login(servers.rabbitmq.url, name), job)
    assert isinstance(problem, SettingsError)
    assert "permissions" in str(problem)


@pytest.mark.parametrize(("host", "reason"), [("127.0.0.1:1", "refused"), ("no-such-host.invalid:5672", "not known")])
def test_a_host_without_a_broker_is_unavailable(job: str, host: str, reason: str) -> None:
    problem = problem_of(f"amqp://fedmq:{PASSWORD}@{host}/fedmq", job, 2.0)
    assert isinstance(problem, BrokerUnavailable)
    assert reason in str(problem)


def test_a_host_that_drops_packets_or_says_nothing_is_unavailable() -> None:
    with unreachable_host() as lossy, silent_host() as silent, ThreadPoolExecutor() as pool:
        urls = [f"amqp://fedmq:{PASSWORD}@127.0.0.1:{port}/fedmq" for port in (lossy, silent)]
        problems = list(pool.map(problem_of, urls, ["job", "job"]))
    assert all(isinstance(problem, BrokerUnavailable) for problem in problems)
    assert "timed out" in str(problems[0])
    assert "Timeout" in str(problems[1])


def test_tls_to_a_port_without_it_is_unavailable(servers: PrivateServers, job: str) -> None:
    problem = problem_of(f"amqps://fedmq:{PASSWORD}@127.0.0.1:{servers.rabbitmq.port}/fedmq", job, 2.0)
    assert isinstance(problem, BrokerUnavailable)
    assert "SSL" in str(problem)


def test_a_message_names_the_broker_however_short_the_wait(job: str) -> None:
    with silent_host() as port:
        sink = RabbitSink(f"amqp://fedmq:{PASSWORD}@127.0.0.1:{port}/fedmq", "a")
        try:
            with pytest.raises(BrokerUnavailable, match=f"127.0.0.1:{port}"):
                sink.link.wait_ready(0.3)
            with pytest.raises(BrokerUnavailable, match=f"127.0.0.1:{port}"):
                sink.publish(message(job, 0), 1.0)
        finally:
            sink.close()


@pytest.mark.parametrize("host", [silent_host, unreachable_host])
def test_a_connection_on_its_way_is_given_up_at_once(job: str, host: Callable[[], AbstractContextManager[int]]) -> None:
    with host() as port:
        sink = RabbitSink(f"amqp://fedmq:{PASSWORD}@127.0.0.1:{port}/fedmq", "a")
        with pytest.raises(BrokerUnavailable):
            sink.link.wait_ready(0.3)
        started = time.monotonic()
        sink.close()
        assert time.monotonic() - started < 3.0
        assert not sink.link._thread.is_alive()


def test_closing_between_two_attempts_begins_no_other(job: str) -> None:
    port = free_port()
    sink = RabbitSink(f"amqp://fedmq:{PASSWORD}@127.0.0.1:{port}/fedmq", "a")
    with pytest.raises(BrokerUnavailable, match="refused"):
        sink.link.wait_ready(1.0)
    with socket.create_server(("127.0.0.1", port)):  # now an attempt would last until it times out
        started = time.monotonic()
        sink.close()
        assert time.monotonic() - started < 3.0
        assert not sink.link._thread.is_alive()


def test_failed_attempts_leak_no_sockets() -> None:
    process = psutil.Process()
    files = process.num_fds()
    sink = RabbitSink(f"amqp://fedmq:{PASSWORD}@127.0.0.1:1/fedmq", "a")
    attempts: set[int] = set()
    try:
        wait_until(lambda: attempts.add(id(sink.link.problem)) or len(attempts) >= 4)
    finally:
        sink.close()
    wait_until(lambda: process.num_fds() <= files)


# Status


def test_queue_depths_counts_what_waits(servers: PrivateServers, rabbit: Rabbit, job: str) -> None:
    source, sink = rabbit.source(job), rabbit.sink()
    publish(sink, job, range(3))
    for delivery in receive(source, 2):
        refuse(source, delivery, Reason.JOB, "detail")
    url = servers.rabbitmq.url
    wait_until(lambda: queue_depths(url, job, 5.0) == {"updates": 0, "consumers": 1, "dead": 2})
    source.close()
    wait_until(lambda: queue_depths(url, job, 5.0) == {"updates": 1, "consumers": 0, "dead": 2})


def test_queue_depths_of_an_unknown_job_are_minus_one_at_once(servers: PrivateServers, job: str) -> None:
    started = time.monotonic()
    assert queue_depths(servers.rabbitmq.url, job, 5.0) == {"updates": -1, "consumers": -1, "dead": -1}
    assert time.monotonic() - started < 3.0


def test_queue_depths_says_why_it_cannot_ask(servers: PrivateServers, job: str) -> None:
    with pytest.raises(BrokerUnavailable, match="refused"):
        queue_depths("amqp://127.0.0.1:1/fedmq", job, 1.0)
    with pytest.raises(SettingsError):
        queue_depths(as_login(servers.rabbitmq.url, "fedmq"), job, 5.0)


def test_the_servers_version_is_known(rabbit: Rabbit, job: str) -> None:
    assert rabbit.source(job).link.server_version().split(".")[0].isdigit()
    assert rabbit.sink().link.server_version() == rabbit.source(job).link.server_version()


def unacked(server: PrivateServer, job: str) -> int:
    rows = listed(server, "queues", "name", "messages_unacknowledged", vhost=VHOST)
    return next(int(row["messages_unacknowledged"]) for row in rows if row["name"] == queue(job))


# Limits


def test_a_queue_over_its_limit_refuses_what_comes_and_keeps_what_it_has(rabbit: Rabbit, job: str) -> None:
    source = RabbitSource(rabbit.url, job, 4, QueueLimits(updates_max=5))
    source.link.wait_ready(10)
    sink = rabbit.sink()
    confirmed: list[int] = []

    def refused() -> bool:
        try:
            publish(sink, job, [len(confirmed)])
        except PublishRefused as error:
            assert "full" in str(error)
            return True
        confirmed.append(len(confirmed))
        return False

    wait_until(refused)
    assert len(confirmed) < 30
    for _ in range(len(confirmed)):  # nothing that was confirmed gave way to what came later
        source.ack(receive(source, 1))
    publish_when_back(sink, message(job, MARKER))
    assert numbers(receive(source, 1)) == [MARKER]
    source.close()


def test_dead_letters_over_their_limit_give_way_to_newer_ones(rabbit: Rabbit, job: str) -> None:
    source = RabbitSource(rabbit.url, job, 64, QueueLimits(dead_bytes_max=2000, dead_age_max_s=3600))
    source.link.wait_ready(10)
    sink = rabbit.sink()
    for sequence in range(30):
        sink.publish(message(job, sequence, body=f"{sequence:03d}".encode() * 100), 30.0)
        refuse(source, receive(source, 1)[0], Reason.CHECKSUM, "detail")
    wait_until(lambda: queue_depths(rabbit.url, job, 5.0)["dead"] <= 7)
    bodies = [letter.body[:3] for letter in rabbit.letters(job)]
    assert bodies == [f"{sequence:03d}".encode() for sequence in range(30 - len(bodies), 30)]
    assert 4 <= len(bodies) <= 7
    source.close()


def test_dead_letters_expire(rabbit: Rabbit, job: str) -> None:
    source = RabbitSource(rabbit.url, job, 64, QueueLimits(dead_age_max_s=1.0))
    source.link.wait_ready(10)
    publish(rabbit.sink(), job, range(2))
    for delivery in receive(source, 2):
        refuse(source, delivery, Reason.CHECKSUM, "detail")
    wait_until(lambda: queue_depths(rabbit.url, job, 5.0)["dead"] == 0)
    source.close()


def test_a_replayed_message_and_a_part_are_told_from_others(rabbit: Rabbit, job: str) -> None:
    source = rabbit.source(job)
    with plain_channel(rabbit.url) as channel:
        spy = channel.queue_declare("", exclusive=True).method.queue
        channel.queue_bind(spy, EXCHANGE, f"update.{job}.#")
        rabbit.sink().publish(Outgoing(job, "a", "a/i/0", b"part", True), 10.0)
        [ordinary] = receive(source, 1)
        _, properties, _ = wait_until(lambda: (got := channel.basic_get(spy, auto_ack=True))[0] is not None and got)
        assert properties.type == "update-part"
        headers = pika.BasicProperties(headers={HEADER_REPLAYED: 1})
        channel.basic_publish(EXCHANGE, f"update.{job}.a", b"again", headers)
    [replayed] = receive(source, 1)
    assert (ordinary.replayed, replayed.replayed) == (False, True)


@pytest.mark.parametrize("header", ["CC", "BCC"])
def test_what_came_by_another_jobs_key_is_nobodys(rabbit: Rabbit, job: str, header: str) -> None:
    """RabbitMQ 3 compares the routing key with what a login may use, not the keys in these headers."""
    source, other = rabbit.source(job), f"{job}-other"
    with plain_channel(rabbit.url) as channel:
        properties = pika.BasicProperties(headers={header: [routing_key(job, "victim")]})
        channel.basic_publish(EXCHANGE, routing_key(other, "cam"), b"from outside", properties)
    [delivery] = receive(source, 1)
    assert delivery.client == ""
    refuse(source, delivery, Reason.CLIENT, "published under the key of ''")
    wait_until(lambda: [letter.body for letter in rabbit.letters(job)] == [b"from outside"])


def test_a_queue_that_somebody_else_has_is_waited_for(servers: PrivateServers, rabbit: Rabbit, job: str) -> None:
    with plain_channel(servers.rabbitmq.url) as channel:
        channel.queue_declare(queue(job), exclusive=True)
        source = RabbitSource(servers.rabbitmq.url, job, 8)
        try:
            with pytest.raises(BrokerUnavailable, match="405 RESOURCE_LOCKED"):
                source.link.wait_ready(5)
            channel.connection.close()
            source.link.wait_ready(20)
        finally:
            source.close()
