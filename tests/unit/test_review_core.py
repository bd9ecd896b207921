"""What a review of parts, rejections and commits asked of them: each test is a way in which they could go wrong."""

import zlib
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pika
import pytest

from aggregator import partial
from aggregator.admission import Admission, admit
from aggregator.aggregator import Aggregator
from shared.clock import VirtualClock
from shared.errors import BrokerUnavailable, Reason, RejectedUpdate
from shared.messages import ENVELOPE_BYTES_MAX, PART_BYTES_MIN, Part, decode, encode, split
from shared.metrics import AggregatorMetrics, WorkerMetrics
from shared.transport import rabbitmq
from shared.transport.ports import Delivery, Outgoing
from tests.builders import JOB, System, delivery_of, model_of, packed, record_of, update_of, weights
from worker.outbox import Outbox
from worker.publisher import Publisher

N = 400  # parameters: 1600 bytes of float32, in parts of 500 bytes four
TINY = PART_BYTES_MIN + 1  # the smallest update in two parts


class Marked:
    """A source whose deliveries say that an operator sent them once more, while `on`."""

    on = False

    def __init__(self, inner):
        self.inner = inner

    def __getattr__(self, name):
        return getattr(self.inner, name)

    def receive(self, limit, wait_s):
        return [replace(delivery, replayed=self.on) for delivery in self.inner.receive(limit, wait_s)]


def system_of(**settings):
    return System(np.zeros(N, np.float32), **{"buffer_size": 1, "staleness": "constant"} | settings)


def parts_of(number=0, seed=0, client="a", part_bytes=500):
    update = update_of(weights(seed, N), update_id=f"{client}/i/{number}")
    return update, list(split(encode(update), part_bytes))


def send(system, update, bodies, message_id=None):
    message_id = update.update_id if message_id is None else message_id
    for body in bodies:
        system.broker.sink().publish(Outgoing(update.job, update.client, message_id, body, True), 1.0)


def settled(system):
    system.drain()
    system.aggregator.finish()


# Parts that are given up


def with_replayed_parts():
    """Return a system that holds two of four replayed parts of an update whose outcome is known."""
    system = system_of(parts_age_max_s=100.0)
    system.source.close()
    system.start(Marked)
    update, bodies = parts_of()
    system.send_bytes(packed(record_of(update) | {"checksum": 1}), "a", update.update_id)
    system.drain()
    system.source.on = True
    send(system, update, bodies[:2])
    settled(system)
    system.source.on = False
    assert list(system.aggregator.state.partial) == ["a"]
    return system


def test_replayed_parts_are_given_up_once():
    system = with_replayed_parts()
    system.clock.time_s += 101
    for _ in range(5):
        system.step()
    settled(system)
    assert system.outcomes() == [("a/i/0", "rejected"), ("a/i/0", "duplicate")]
    assert not system.aggregator.state.partial
    assert not system.store._kept


def test_replayed_parts_that_a_newer_update_displaces_leave_no_record():
    system = with_replayed_parts()
    send(system, *parts_of(1))
    settled(system)
    assert system.outcomes()[-1] == ("a/i/1", "applied")
    assert not system.store._kept


def test_parts_that_name_no_message_id_are_dropped_when_the_whole_is_rejected():
    system = system_of()
    update = update_of(weights(0, N), update_id="a/i/0")
    broken = replace(update, payload=np.full(N, np.nan, "<f4").tobytes())
    send(system, update, split(encode(broken), 500), message_id="")
    settled(system)
    assert system.broker.dead[0].reason == "not_finite"
    assert not system.aggregator.state.partial
    assert not system.store._kept


def test_a_standby_gives_up_nothing_on_what_it_knows_of_old():
    system = system_of(parts_age_max_s=100.0)
    update, bodies = parts_of()
    send(system, update, bodies[:2])
    settled(system)
    standby = Aggregator(
        system.settings, system.broker.source(JOB), system.store, system.clock, AggregatorMetrics(), poll_s=0.0
    )
    standby.step()
    system.clock.time_s += 90
    send(system, update, bodies[2:3])
    settled(system)
    system.clock.time_s += 20
    standby.step()
    assert standby._account.entries == []


def test_nobody_looks_at_all_unfinished_updates_in_every_step(monkeypatch):
    system, looks = system_of(parts_age_max_s=100.0), []
    abandoned = partial.abandoned
    monkeypatch.setattr(partial, "abandoned", lambda *given: looks.append(given) or abandoned(*given))
    send(system, parts_of()[0], parts_of()[1][:2])
    for _ in range(99):
        system.step()
        system.clock.time_s += 1
    assert len(looks) <= 2
    system.clock.time_s += 5
    settled(system)
    assert system.outcomes() == [("a/i/0", "rejected")]


# Room for parts


def tiny_part(client, count=2):
    size = (count - 1) * PART_BYTES_MIN + 1
    return replace(update_of(weights(0, N), update_id=f"{client}/i/0"), payload=b"x", part=Part(0, count, size))


def test_so_many_updates_may_be_unfinished(monkeypatch):
    monkeypatch.setattr(partial, "PARTIALS_MAX", 3)
    state = system_of().aggregator.state
    for client in "abc":
        assert partial.take(state, tiny_part(client), 300, 10**9, 0.0) is None
    with pytest.raises(RejectedUpdate, match="one more update: 3 are unfinished") as caught:
        partial.take(state, tiny_part("d"), 300, 10**9, 0.0)
    assert caught.value.reason is Reason.INCOMPLETE
    assert partial.take(state, replace(tiny_part("a"), part=Part(1, 2, TINY), payload=b"y" * 64), 300, 10**9, 0.0)


def test_tiny_parts_count_as_what_the_store_needs_for_each():
    state = system_of().aggregator.state
    room = 3 * 100 * partial.PART_BYTES_LEAST
    for client in "abc":
        partial.take(state, tiny_part(client, 100), 300, room, 0.0)
    with pytest.raises(RejectedUpdate, match=f"parts_bytes_max is {room}"):
        partial.take(state, tiny_part("d"), 300, room, 0.0)


def test_a_message_without_its_payload_has_its_limit_also_in_parts():
    system = system_of()
    update, bodies = parts_of()
    record = record_of(decode(bodies[0], 10**6)) | {"part": 0, "parts": 4, "payload_bytes": 1600}
    system.send_bytes(packed(record | {"more": bytes(2 * ENVELOPE_BYTES_MAX)}), "a", update.update_id)
    settled(system)
    assert system.broker.dead[0].reason == "too_large"
    assert str(ENVELOPE_BYTES_MAX) in system.broker.dead[0].detail


# What a commit leaves as it is stored


def test_what_another_rule_remembered_is_gone_also_where_no_update_came_in_between():
    system = System(np.zeros(N, np.float32), buffer_size=1, server_optimizer="momentum")
    update = system.publish(weights(1, N))
    settled(system)
    system.restart(rule="fednova", buffer_size=2)
    assert not system.aggregator.state.arrays["momentum_m"].any()
    system.send(update)  # a duplicate: the commit changes no array
    settled(system)
    assert system.outcomes()[-1] == (update.update_id, "duplicate")
    system.restart()
    assert not system.aggregator.state.arrays["momentum_m"].any()


# What a disk or a sender damaged


def test_a_payload_is_checked_also_where_the_message_is_proven():
    """A publisher reckons the crc32 of what it reads; only the payload's own checksum is from before the disk."""
    body = packed(record_of(update_of(weights(1))) | {"checksum": 1})
    delivery = replace(delivery_of(body), crc32=zlib.crc32(body))
    with pytest.raises(RejectedUpdate) as caught:
        admit(delivery, Admission(JOB, model_of(weights(1)).layout, 10**6, 10**6), 3)
    assert caught.value.reason is Reason.CHECKSUM


class Into:
    """A sink that publishes into a system."""

    def __init__(self, system):
        self.sink = system.broker.sink()

    def publish(self, message, timeout_s):
        self.sink.publish(message, timeout_s)


@pytest.mark.parametrize("part_bytes", [500, 10**6])
def test_an_update_the_disk_damaged_is_rejected_and_holds_up_nobody(tmp_path, part_bytes):
    system, outbox = system_of(), Outbox(tmp_path, "a", 10, 10**6, sync=False)
    for seed in range(2):
        update = update_of(weights(seed, N), update_id=outbox.next_id())
        body = bytearray(encode(update))
        body[body.find(update.payload) + 9] ^= 1 - seed  # of the first one
        outbox.put(bytes(body))
    publisher = Publisher(JOB, "a", outbox, Into(system), VirtualClock(), WorkerMetrics(), 1.0)
    publisher.part_bytes = part_bytes
    assert [publisher.step(), publisher.step(), publisher.step()] == [True, True, False]
    settled(system)
    assert [outcome for _, outcome in system.outcomes()] == ["rejected", "applied"]
    assert len(system.broker.dead[0].body) == min(part_bytes, len(body))
    np.testing.assert_array_equal(system.weights, weights(1, N))


# Dead letters that RabbitMQ does not take


class Channel:
    """What a source needs of a channel; notes what is acked."""

    def __init__(self):
        self.acked = []

    def basic_ack(self, tag, multiple=False):
        self.acked.append((tag, multiple))

    def basic_publish(self, *_message, **_options):
        pass


class NoLink:
    """A connection that runs what is handed over at once, and is told to reconnect."""

    def __init__(self, *_given):
        self.problem, self.reconnects = BrokerUnavailable("away"), []

    def call(self, function):
        function()
        return True

    def reconnect(self, why):
        self.reconnects.append(why)


@pytest.fixture
def source(monkeypatch):
    """Return a source with three deliveries, of which it has rejected the first two."""
    monkeypatch.setattr(rabbitmq, "Link", NoLink)
    source = rabbitmq.RabbitSource("amqp://localhost", JOB, 8)
    source._channel, source._dead_channel = Channel(), Channel()
    for tag in (1, 2, 3):
        method = SimpleNamespace(delivery_tag=tag, routing_key=f"update.{JOB}.a")
        source._on_message(None, method, pika.BasicProperties(message_id=f"a/i/{tag}"), b"body")
    source.deliveries = source.receive(3, 0.0)
    for delivery in source.deliveries[:2]:
        source.reject(delivery, Reason.CODEC, "why")
    return source


def answer(kind, tag, multiple=False):
    return SimpleNamespace(method=kind(tag, multiple=multiple))


ACK, NACK = pika.spec.Basic.Ack, pika.spec.Basic.Nack


def test_rejected_deliveries_are_acked_with_their_dead_letters_whichever_comes_first(source):
    source._on_buried(answer(ACK, 1))
    assert source._channel.acked == [], "its rejection is not durable yet"
    source.ack(source.deliveries)
    assert source._channel.acked == [(1, True), (3, False)]
    source._on_buried(answer(ACK, 2))
    assert source._channel.acked == [(1, True), (3, False), (2, True)]
    assert not source._open
    assert not source._dead
    assert not source._waiting


def test_many_dead_letters_are_confirmed_at_once(source):
    source.ack(source.deliveries)
    assert source._channel.acked == [(3, False)]
    source._on_buried(answer(ACK, 2, multiple=True))
    assert source._channel.acked == [(3, False), (2, True)]


def test_nothing_is_acked_once_a_dead_letter_came_back(source):
    source._on_dead_return(None, SimpleNamespace(reply_text="NO_ROUTE"), None, b"")
    source._on_buried(answer(ACK, 2, multiple=True))  # as the broker confirms what it returned
    source.ack(source.deliveries)
    assert source._channel.acked == []
    assert source.link.reconnects == ["no queue takes the dead letters: NO_ROUTE"]


def test_nothing_is_acked_once_a_dead_letter_was_refused(source):
    source.ack(source.deliveries[:2])
    source._on_buried(answer(NACK, 1))
    source._on_buried(answer(ACK, 2, multiple=True))
    assert source._channel.acked == []
    assert source.link.reconnects


def test_the_next_connection_acks_again(source):
    source._on_buried(answer(NACK, 1))
    source._on_down(BrokerUnavailable("asked for"))
    source.ack(source.deliveries)  # of the connection before: no matter
    source._on_message(None, SimpleNamespace(delivery_tag=1, routing_key="u.j.a"), pika.BasicProperties(), b"again")
    source.ack(source.receive(1, 0.0))
    assert source._channel.acked == [(1, True)]


def test_a_delivery_stands_for_what_was_published(source):
    assert source.deliveries[0] == Delivery(b"body", "a", None, "a/i/1", (0, 1))


# What only a mutant told


def test_parts_that_make_more_than_announced_are_rejected_at_once():
    state = system_of().aggregator.state
    part = replace(tiny_part("a", 3), payload=bytes(100))
    assert partial.take(state, part, 300, 10**9, 0.0) is None
    with pytest.raises(RejectedUpdate, match="2 of 3 parts have 200 bytes, they announce 129"):
        partial.take(state, replace(part, part=Part(1, 3, 129)), 300, 10**9, 0.0)


def test_another_update_of_the_client_drops_no_parts():
    system = system_of()
    update, bodies = parts_of(1)
    send(system, update, bodies[:3])
    system.drain()
    system.publish(weights(5, N), update_id="a/i/0")
    system.drain()
    send(system, update, bodies[3:])
    settled(system)
    assert system.outcomes() == [("a/i/0", "applied"), ("a/i/1", "applied")]


def test_a_restart_gives_every_unfinished_update_its_time_again():
    system = system_of(parts_age_max_s=100.0)
    update, bodies = parts_of()
    send(system, update, bodies[:3])
    settled(system)
    system.clock.time_s += 10_000
    system.restart()
    system.step()
    system.clock.time_s += 100
    system.step()
    assert list(system.aggregator.state.partial) == ["a"]
    system.clock.time_s += 1
    system.step()
    settled(system)
    assert system.outcomes() == [("a/i/0", "rejected")]


def test_a_reload_gives_every_unfinished_update_its_time_again_and_no_more():
    system = system_of(parts_age_max_s=100.0)
    send(system, parts_of()[0], parts_of()[1][:2])
    settled(system)
    system.clock.time_s += 50
    system.aggregator._reload()
    system.step()
    system.clock.time_s += 90
    system.step()
    assert list(system.aggregator.state.partial) == ["a"]
    system.clock.time_s += 11
    system.step()
    assert not system.aggregator.state.partial


def test_an_update_is_abandoned_after_its_age_not_at_it():
    state = system_of().aggregator.state
    partial.take(state, tiny_part("a"), 300, 10**9, 5.0)
    assert not partial.abandoned(state, 10.0, 15.0)
    assert list(partial.abandoned(state, 10.0, 15.1)) == ["a"]


def test_the_ledger_has_the_bytes_of_all_messages_also_over_a_restart():
    system = system_of()
    update, bodies = parts_of()
    send(system, update, [*bodies[:3], bodies[0]])
    settled(system)
    system.restart()
    send(system, update, bodies[3:])
    settled(system)
    assert system.store.ledger[-1]["updates"][0]["bytes"] == sum(len(body) for body in bodies)


def test_parts_under_one_id_with_other_envelopes_do_not_mix():
    system = system_of()
    ours = update_of(weights(0, N), update_id="a/i/0", num_samples=1)
    theirs = update_of(weights(7, N), update_id="a/i/0", num_samples=9)
    send(system, ours, list(split(encode(ours), 500))[:3])
    send(system, theirs, split(encode(theirs), 500))
    settled(system)
    entry = system.store.ledger[-1]["updates"][-1]
    assert (entry["outcome"], entry["num_samples"]) == ("applied", 9)
    np.testing.assert_array_equal(system.weights, weights(7, N))


def test_a_part_that_the_store_returns_otherwise_is_not_used():
    system = system_of()
    update, bodies = parts_of()
    send(system, update, bodies[:3])
    settled(system)
    system.store._kept["part:a/i/0:1"] = bytes(499)
    send(system, update, bodies[3:])
    settled(system)
    assert "part 1 of a/i/0 is not stored any more" in system.broker.dead[0].detail
    assert not system.weights.any()


def test_the_parts_behind_a_rejection_are_no_dead_letters():
    system = system_of()
    update, bodies = parts_of()
    send(system, update, [bodies[0][:-1], *bodies[1:]])
    settled(system)
    assert system.outcomes() == [("a/i/0", "rejected")] + 3 * [("a/i/0", "duplicate")]
    assert len(system.broker.dead) == 1
    assert not system.aggregator.state.partial


def test_a_stale_update_is_stale_once():
    system = system_of(staleness_max=0)
    stale = update_of(weights(2, N), update_id="b/i/0")
    system.publish(weights(1, N))
    for _ in range(2):
        system.send(stale)
        settled(system)
    assert [outcome for _, outcome in system.outcomes()] == ["applied", "stale", "duplicate"]
    assert system.store.load().refused == {"b/i/0": "stale"}
    assert not system.broker.dead


def test_a_damaged_copy_of_an_applied_update_is_a_duplicate():
    system = system_of()
    update = system.publish(weights(1, N))
    system.send_bytes(packed(record_of(update) | {"checksum": 1}), "a", update.update_id)
    settled(system)
    assert [outcome for _, outcome in system.outcomes()] == ["applied", "duplicate"]
    assert system.store.load().refused == {}


def test_every_fold_is_in_the_commit_that_names_it():
    """A sum is written whenever it changed, also where the store has one already."""
    system = system_of(buffer_size=3)
    for number in range(3):
        system.publish(weights(number, N))
        settled(system)
        system.restart()
    np.testing.assert_allclose(system.weights, sum(weights(n, N) for n in range(3)) / 3, rtol=1e-5, atol=1e-6)


class Fails:
    """A sink that notes what it takes and fails at one message."""

    def __init__(self, at):
        self.at, self.bodies, self.kinds = at, [], []

    def publish(self, message, timeout_s):
        if len(self.bodies) == self.at:
            self.at = -1
            raise BrokerUnavailable("away")
        self.bodies.append(message.body)
        self.kinds.append((message.is_part, message.crc32 == zlib.crc32(message.body)))


def publisher_into(folder, sink, updates):
    outbox = Outbox(folder, "a", 10, 10**6, sync=False)
    for seed in range(updates):
        outbox.put(encode(update_of(weights(seed, N), update_id=outbox.next_id())))
    publisher = Publisher(JOB, "a", outbox, sink, VirtualClock(), WorkerMetrics(), 1.0)
    publisher.part_bytes = 500
    return publisher, outbox


def parts_in(sink):
    """Return (sequence of the update, part) of what a sink took."""
    updates = [decode(body, 10**6) for body in sink.bodies]
    return [(int(update.update_id[-1]), update.part.index, len(update.payload)) for update in updates]


FOUR = [(0, 500), (1, 500), (2, 500), (3, 100)]
THREE = [(0, 700), (1, 700), (2, 200)]


def test_what_is_confirmed_of_an_update_is_not_sent_again(tmp_path):
    publisher, outbox = publisher_into(tmp_path, Fails(2), 2)
    with pytest.raises(BrokerUnavailable):
        publisher.step()
    assert len(outbox) == 2
    assert [publisher.step(), publisher.step(), publisher.step()] == [True, True, False]
    assert parts_in(publisher._sink) == [(number, *part) for number in range(2) for part in FOUR]
    assert publisher._sink.kinds == 8 * [(True, True)]


def test_an_update_that_is_cut_anew_is_sent_from_its_beginning(tmp_path):
    publisher, outbox = publisher_into(tmp_path, Fails(2), 1)
    with pytest.raises(BrokerUnavailable):
        publisher.step()
    publisher.part_bytes = 700
    assert publisher.step()
    assert parts_in(publisher._sink) == [(0, *part) for part in [*FOUR[:2], *THREE]]
    assert len(outbox) == 0
