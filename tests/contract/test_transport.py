"""What every adapter of `UpdateSink` and `UpdateSource` guarantees."""

import hashlib
import threading
import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from shared.errors import PublishRefused, Reason
from shared.transport.ports import Delivery, UpdateSource
from tests.contract.brokers import (
    Broker,
    InProcess,
    Letter,
    Rabbit,
    message,
    number,
    numbers,
    publish,
    receive,
    receive_until,
    refuse,
)
from tests.contract.faults import wait_until

MARKER = 1_000_000  # number of the message after which nothing else is expected
REASON, DETAIL = Reason.CHECKSUM, "the payload's crc32 is 1, the message says 2"

Again = Callable[[UpdateSource], UpdateSource]


@pytest.fixture(params=["inprocess", "rabbitmq"])
def broker(request: pytest.FixtureRequest) -> Iterator[Broker]:
    adapter = InProcess() if request.param == "inprocess" else Rabbit(request.getfixturevalue("servers").rabbitmq.url)
    yield adapter
    adapter.close()


@pytest.fixture(params=["close", "recover"])
def again(request: pytest.FixtureRequest, broker: Broker, job: str) -> Again:
    """Have everything unacked delivered again, to a new source or to the same."""

    def deliver_again(source: UpdateSource) -> UpdateSource:
        if request.param == "recover":
            source.recover()
            return source
        source.close()
        return broker.source(job)

    return deliver_again


def remaining(broker: Broker, source: UpdateSource, job: str) -> list[int]:
    """Return the numbers of everything that is still to come to this source."""
    publish(broker.sink("marker"), job, [MARKER], "marker")
    return numbers(receive_until(source, MARKER))[:-1]


def settled_letters(broker: Broker, source: UpdateSource, job: str) -> list[Letter]:
    """Return all dead letters of rejects made before: a marker is rejected and waited for."""
    publish(broker.sink("marker"), job, [MARKER], "marker")
    refuse(source, receive_until(source, MARKER)[-1], Reason.JOB, "marker")
    wait_until(lambda: any(letter.client == "marker" for letter in broker.letters(job)))
    return broker.letters(job)[:-1]


# Publishing and receiving


def test_a_confirmed_publish_is_received_once_as_it_was_sent(broker: Broker, job: str) -> None:
    source, sink = broker.source(job), broker.sink("dev_1-B")
    body = bytes(range(256))
    sink.publish(message(job, 7, "dev_1-B", body), 30.0)
    [delivery] = receive(source, 1)
    assert (delivery.body, delivery.client, delivery.update_id) == (body, "dev_1-B", "dev_1-B/i/7")
    assert delivery.user_id is None
    assert remaining(broker, source, job) == []


def test_messages_arrive_in_the_order_of_their_publishes(broker: Broker, job: str) -> None:
    source, sink = broker.source(job), broker.sink()
    for sequence in range(60):
        sink.publish(message(job, sequence, f"client{sequence % 3}"), 30.0)
    assert numbers(receive(source, 60)) == list(range(60))


def test_more_than_the_prefetch_comes_as_acks_make_room(broker: Broker, job: str) -> None:
    source, sink = broker.source(job, prefetch=8), broker.sink()
    publish(sink, job, range(50))
    seen: list[int] = []
    while len(seen) < 50:
        deliveries = receive(source, 1) + list(source.receive(3, 0.0))
        seen += numbers(deliveries)
        source.ack(deliveries)
    assert seen == list(range(50))


def test_publishers_on_many_threads_lose_and_repeat_nothing(broker: Broker, job: str) -> None:
    source = broker.source(job)
    clients = [f"client{index}" for index in range(6)]
    sinks = [broker.sink(client) for client in clients]
    threads = [
        threading.Thread(target=publish, args=(sink, job, range(40), client))
        for sink, client in zip(sinks, clients, strict=True)
    ]
    for thread in threads:
        thread.start()
    seen: dict[str, list[int]] = {client: [] for client in clients}
    for _ in range(6 * 40):
        [delivery] = receive(source, 1)
        seen[delivery.client].append(number(delivery))
        source.ack([delivery])
    for thread in threads:
        thread.join()
    assert seen == {client: list(range(40)) for client in clients}


@pytest.mark.parametrize("size", [0, 1, 10**6, 10 * 2**20], ids=["empty", "1 B", "1 MB", "10 MiB"])
def test_bodies_of_any_size_arrive_unchanged(broker: Broker, job: str, size: int) -> None:
    source, sink = broker.source(job), broker.sink()
    body = np.random.default_rng(size).bytes(size)
    sink.publish(message(job, 0, body=body), 60.0)
    [delivery] = receive(source, 1, 60.0)
    assert len(delivery.body) == size
    assert hashlib.sha256(delivery.body).digest() == hashlib.sha256(body).digest()


def test_receive_returns_at_most_its_limit(broker: Broker, job: str) -> None:
    source, sink = broker.source(job), broker.sink()
    publish(sink, job, range(10))
    assert source.receive(0, 0.0) == []
    received: list[Delivery] = []
    while len(received) < 10:
        some = source.receive(3, 1.0)
        assert len(some) <= 3
        received += some
    assert numbers(received) == list(range(10))


def test_receive_waits_for_the_first_delivery_only_as_long_as_told(broker: Broker, job: str) -> None:
    source = broker.source(job)
    started = time.monotonic()
    assert source.receive(10, 0.0) == []
    assert time.monotonic() - started < 1.0
    assert source.receive(10, 0.4) == []
    assert 0.4 <= time.monotonic() - started < 5.0


def test_receive_wakes_as_soon_as_a_message_is_there(broker: Broker, job: str) -> None:
    source, sink = broker.source(job), broker.sink()
    publisher = threading.Timer(0.2, publish, args=(sink, job, [0]))
    publisher.start()
    started = time.monotonic()
    assert numbers(source.receive(10, 20.0)) == [0]
    assert time.monotonic() - started < 5.0
    publisher.join()


def test_a_publish_to_a_job_nobody_consumes_is_refused(broker: Broker, job: str) -> None:
    source, sink = broker.source(job), broker.sink()
    with pytest.raises(PublishRefused, match="no aggregator"):
        sink.publish(message(f"{job}-other", 0), 10.0)
    publish(sink, job, [1])
    assert numbers(receive(source, 1)) == [1]


def test_jobs_do_not_see_each_other(broker: Broker, job: str) -> None:
    other = f"{job}-b"
    source, other_source, sink = broker.source(job), broker.source(other), broker.sink()
    publish(sink, job, [1, 2])
    publish(sink, other, [3])
    assert remaining(broker, source, job) == [1, 2]
    assert remaining(broker, other_source, other) == [3]


def test_the_queue_keeps_messages_while_nobody_consumes(broker: Broker, job: str) -> None:
    broker.source(job).close()
    publish(broker.sink(), job, range(5))
    assert remaining(broker, broker.source(job), job) == list(range(5))


# Acks


def test_what_is_not_acked_comes_again_and_acked_does_not(broker: Broker, job: str, again: Again) -> None:
    source = broker.source(job)
    publish(broker.sink(), job, range(10))
    deliveries = receive(source, 6)
    source.ack(deliveries[:4])
    source = again(source)
    assert remaining(broker, source, job) == [4, 5, 6, 7, 8, 9]


def test_acks_in_any_order_count(broker: Broker, job: str, again: Again) -> None:
    source = broker.source(job)
    publish(broker.sink(), job, range(6))
    deliveries = receive(source, 6)
    source.ack([deliveries[4]])
    source.ack([deliveries[2], deliveries[1]])
    source = again(source)
    assert remaining(broker, source, job) == [0, 3, 5]


def test_a_message_comes_again_however_often_it_is_not_acked(broker: Broker, job: str, again: Again) -> None:
    source = broker.source(job)
    publish(broker.sink(), job, [0])
    for _ in range(4):
        assert numbers(receive(source, 1)) == [0]
        source = again(source)
    source.ack(receive(source, 1))
    source = again(source)
    assert remaining(broker, source, job) == []


def test_acks_given_right_before_close_count(broker: Broker, job: str) -> None:
    source = broker.source(job)
    publish(broker.sink(), job, range(30))
    source.ack(receive(source, 20))
    source.close()
    assert remaining(broker, broker.source(job), job) == list(range(20, 30))


def test_acks_of_an_earlier_connection_are_harmless(broker: Broker, job: str) -> None:
    source = broker.source(job)
    publish(broker.sink(), job, range(5))
    old = receive(source, 5)
    source.recover()
    new = receive(source, 5)
    source.ack(old)
    source.reject(old[0], REASON, DETAIL)
    source.ack(new[:2])
    source.close()
    source = broker.source(job)
    assert numbers(receive(source, 3)) == [2, 3, 4]
    assert settled_letters(broker, source, job) == []


def test_acks_of_nothing_are_harmless(broker: Broker, job: str) -> None:
    source = broker.source(job)
    source.ack([])
    publish(broker.sink(), job, [0])
    [delivery] = receive(source, 1)
    source.ack([delivery])
    source.ack([delivery])
    assert remaining(broker, source, job) == []


def test_recover_keeps_the_order(broker: Broker, job: str) -> None:
    source = broker.source(job)
    publish(broker.sink(), job, range(20))
    receive(source, 7)
    source.recover()
    assert numbers(receive(source, 20)) == list(range(20))


# Rejects


def test_a_rejected_message_moves_to_the_dead_letters_once(broker: Broker, job: str, again: Again) -> None:
    source = broker.source(job)
    publish(broker.sink("dev"), job, [0], "dev")
    [delivery] = receive(source, 1)
    refuse(source, delivery, REASON, DETAIL)
    [letter] = settled_letters(broker, source, job)
    assert (letter.body, letter.client, letter.reason, letter.detail) == (b"dev 0", "dev", "checksum", DETAIL)
    assert letter.update_id in (None, "dev/i/0")
    source = again(source)
    assert remaining(broker, source, job) == []
    assert len(broker.letters(job)) == 2  # the marker's and this one


def test_rejecting_one_in_the_middle_does_not_ack_the_others(broker: Broker, job: str, again: Again) -> None:
    source = broker.source(job)
    publish(broker.sink(), job, range(5))
    deliveries = receive(source, 5)
    refuse(source, deliveries[2], REASON, DETAIL)
    wait_until(lambda: broker.letters(job))
    source = again(source)
    assert {0, 1, 3, 4} <= set(remaining(broker, source, job))


def test_a_rejected_message_that_is_not_acked_comes_again(broker: Broker, job: str, again: Again) -> None:
    """Its aggregator died before the commit that says what became of it; the dead letter is there already."""
    source = broker.source(job)
    publish(broker.sink(), job, range(3))
    deliveries = receive(source, 3)
    source.reject(deliveries[1], REASON, DETAIL)
    source.ack(deliveries[:1])
    wait_until(lambda: [letter.body for letter in broker.letters(job)] == [b"a 1"])
    source = again(source)
    assert remaining(broker, source, job) == [1, 2]


def test_a_rejected_message_does_not_wait_for_the_acks_before_it(broker: Broker, job: str, again: Again) -> None:
    source = broker.source(job)
    publish(broker.sink(), job, range(5))
    deliveries = receive(source, 5)
    refuse(source, deliveries[2], REASON, DETAIL)
    settled = settled_letters(broker, source, job)
    assert [letter.body for letter in settled] == [b"a 2"]
    source = again(source)
    assert remaining(broker, source, job) == [0, 1, 3, 4]


def test_acks_behind_and_before_a_reject_count(broker: Broker, job: str, again: Again) -> None:
    source = broker.source(job)
    publish(broker.sink(), job, range(6))
    deliveries = receive(source, 6)
    refuse(source, deliveries[1], REASON, DETAIL)
    source.ack([deliveries[0], deliveries[2], deliveries[3]])
    assert [letter.body for letter in settled_letters(broker, source, job)] == [b"a 1"]
    source = again(source)
    assert remaining(broker, source, job) == [4, 5]


def test_a_reject_right_before_close_is_carried_out(broker: Broker, job: str) -> None:
    source = broker.source(job)
    publish(broker.sink(), job, range(3))
    deliveries = receive(source, 3)
    source.ack(deliveries[:1])
    refuse(source, deliveries[1], REASON, DETAIL)
    source.close()
    source = broker.source(job)
    assert remaining(broker, source, job) == [2]
    assert [letter.body for letter in broker.letters(job)] == [b"a 1"]


def test_every_reason_and_any_detail_arrive(broker: Broker, job: str) -> None:
    source = broker.source(job)
    publish(broker.sink(), job, range(len(Reason)))
    detail = "Größe → \x00\n" + 3000 * "x"
    for delivery, reason in zip(receive(source, len(Reason)), Reason, strict=True):
        refuse(source, delivery, reason, detail)
    letters = settled_letters(broker, source, job)
    assert [letter.reason for letter in letters] == [str(reason) for reason in Reason]
    assert all(letter.detail[:1000] == detail[:1000] for letter in letters)


def test_a_large_message_can_be_rejected(broker: Broker, job: str) -> None:
    source = broker.source(job)
    body = np.random.default_rng(0).bytes(4 * 2**20)
    broker.sink().publish(message(job, 0, body=body), 30.0)
    refuse(source, receive(source, 1)[0], Reason.TOO_LARGE, DETAIL)
    [letter] = settled_letters(broker, source, job)
    assert letter.body == body


# One active consumer


def test_a_second_source_stands_by_until_the_first_closes(broker: Broker, job: str) -> None:
    first, second = broker.source(job), broker.source(job)
    publish(broker.sink(), job, range(6))
    deliveries = receive(first, 4)
    assert second.receive(10, 0.3) == []
    first.ack(deliveries[:2])
    first.close()
    assert remaining(broker, second, job) == [2, 3, 4, 5]


def test_a_closed_source_receives_nothing(broker: Broker, job: str) -> None:
    source = broker.source(job)
    publish(broker.sink(), job, range(3))
    receive(source, 1)
    source.close()
    assert source.receive(10, 0.0) == []
    assert remaining(broker, broker.source(job), job) == [0, 1, 2]


def test_a_standby_that_leaves_disturbs_nobody(broker: Broker, job: str) -> None:
    first, second = broker.source(job), broker.source(job)
    publish(broker.sink(), job, range(4))
    deliveries = receive(first, 4)
    second.close()
    first.ack(deliveries)
    assert remaining(broker, first, job) == []
