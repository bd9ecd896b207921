"""Looking at dead letters on a real RabbitMQ: nothing is lost, nothing changes its place but what is removed."""

import random
import socket
import time

import pika
import pytest

from shared.errors import BrokerUnavailable, PublishRefused, Reason, SettingsError
from shared.transport import dead_letters
from shared.transport.dead_letters import DeadLetters
from shared.transport.names import (
    EXCHANGE,
    HEADER_DETAIL,
    HEADER_REASON,
    HEADER_REPLAYED,
    dead_queue,
    queue,
    routing_key,
)
from tests.contract.brokers import Rabbit, plain_channel, publish, receive
from tests.contract.faults import listed, silent_host, wait_until

QUORUM = {"x-queue-type": "quorum"}


@pytest.fixture
def broker(servers):
    adapter = Rabbit(servers.rabbitmq.url)
    yield adapter
    adapter.close()


@pytest.fixture
def url(servers):
    return servers.rabbitmq.url


def put(url, job, numbers, **properties):
    """Put letters into a job's queue as nobody in particular."""
    with plain_channel(url) as channel:
        channel.confirm_delivery()
        channel.queue_declare(dead_queue(job), durable=True, arguments=QUORUM)
        channel.queue_bind(dead_queue(job), "amq.topic", routing_key(job, "*"))
        for number in numbers:
            given = pika.BasicProperties(delivery_mode=2, message_id=f"a/i/{number}", **properties)
            channel.basic_publish("amq.topic", routing_key(job, "a"), str(number).encode(), given)


def look(url, job, remove=(), stop_after=None):
    """Return the numbers of the letters in order; remove some."""
    seen = []
    with DeadLetters(url, job) as box:
        for letter in box.letters():
            seen.append(int(letter.body))
            if seen[-1] in remove:
                box.remove(letter)
            if len(seen) == stop_after:
                break
    return seen


def depth(url, job):
    with plain_channel(url) as channel:
        return channel.queue_declare(dead_queue(job), passive=True).method.message_count


def test_a_letter_is_shown_as_the_aggregator_buried_it(broker, url, job):
    source, sink, before = broker.source(job), broker.sink(), int(time.time())
    publish(sink, job, [3])
    (delivery,) = receive(source, 1)
    source.reject(delivery, Reason.SURPLUS, "two of its updates are in the buffer")
    source.ack([delivery])
    wait_until(lambda: depth(url, job) == 1)
    with DeadLetters(url, job) as box:
        (letter,) = box.letters()
    assert (letter.number, letter.body, letter.client, letter.update_id) == (1, b"a 3", "a", "a/i/3")
    assert (letter.reason, letter.detail) == ("surplus", "two of its updates are in the buffer")
    assert letter.routing_key == routing_key(job, "a")
    assert before <= letter.rejected_at <= time.time() + 1
    assert letter.properties["type"] == "update"


def test_what_the_broker_moved_by_itself_says_so(url, job):
    put(url, job, [1], headers={"x-first-death-reason": "delivery_limit"})
    put(url, job, [2])
    put(url, job, [3], headers={HEADER_REASON: "codec", HEADER_DETAIL: "why"}, timestamp=77)
    with DeadLetters(url, job) as box:
        letters = list(box.letters())
    assert [letter.reason for letter in letters] == ["broker:delivery_limit", "broker:unknown", "codec"]
    assert [letter.rejected_at for letter in letters] == [None, None, 77]


@pytest.mark.parametrize("count", [0, 1, 64, 65, 1000])
def test_however_often_one_looks_the_letters_and_their_order_stay(url, job, count):
    put(url, job, range(count))
    for stop_after in (None, None, 1, 10, None, 65, None):
        assert look(url, job, stop_after=stop_after) == list(range(count))[:stop_after]
        assert depth(url, job) == count, "the letters are back when the look is over"


def test_letters_that_come_during_a_look_stay_behind_the_others(url, job):
    put(url, job, range(100))
    with DeadLetters(url, job) as box:
        first = next(box.letters())
        put(url, job, [100, 101])
        assert first.body == b"0"
    assert look(url, job) == list(range(102))


@pytest.mark.parametrize("seed", range(4))
def test_exactly_what_is_removed_goes(url, job, seed):
    """RabbitMQ forgets acks that it holds back when their channel closes: more than 32 at once show it."""
    rng = random.Random(seed)
    left = list(range(rng.choice([40, 300, 900])))
    put(url, job, left)
    for share in (0.02, 0.5, 0.9, 0.3):
        gone = set(rng.sample(left, max(1, int(share * len(left)))))
        assert look(url, job, remove=gone) == left
        left = [number for number in left if number not in gone]
        assert depth(url, job) == len(left)
    assert look(url, job, remove=left) == left
    assert depth(url, job) == 0


def test_one_window_with_many_acks_loses_none(url, job):
    put(url, job, range(64))
    for kept in (32, 1):
        look(url, job, remove=range(kept, 64))
        assert look(url, job) == list(range(kept))
        put(url, job, range(kept, 64))


def test_whole_windows_go_at_once(url, job):
    put(url, job, range(200))
    look(url, job, remove=range(64, 128))
    assert look(url, job) == [*range(64), *range(128, 200)]


def test_there_are_never_more_windows_than_channels_for_them(url, job, monkeypatch):
    monkeypatch.setattr(dead_letters, "WINDOW_LETTERS", 2)
    monkeypatch.setattr(dead_letters, "WINDOWS_MAX", 7)
    put(url, job, range(100))
    for _ in range(2):
        with DeadLetters(url, job) as box:
            assert [int(letter.body) for letter in box.letters()] == list(range(100))
            assert len(box._windows) <= 7


def test_an_error_on_the_way_hides_nothing_and_loses_nothing(url, job):
    put(url, job, range(200))
    with pytest.raises(ZeroDivisionError), DeadLetters(url, job) as box:
        for letter in box.letters():
            if letter.number == 70:
                box.remove(letter)
                raise ZeroDivisionError
    wait_until(lambda: depth(url, job) == 199)
    assert sorted(look(url, job)) == [number for number in range(200) if number != 69]


def test_while_one_looks_another_sees_fewer_and_neither_waits_for_ever(url, job, monkeypatch):
    monkeypatch.setattr(dead_letters, "SILENCE_S_MAX", 0.3)
    put(url, job, range(10))
    with DeadLetters(url, job) as box:
        list(box.letters())
        with DeadLetters(url, job) as other:
            assert other.count == 0
            assert list(other.letters()) == []
    one, two = DeadLetters(url, job), DeadLetters(url, job)
    assert (one.count, two.count) == (10, 10)
    assert len(list(one.letters())) == 10
    assert list(two.letters()) == []
    two.close()
    one.close()
    assert look(url, job) == list(range(10))


def test_the_queue_has_no_delivery_limit_that_looking_could_use_up(broker, url, job, servers):
    source = broker.source(job)
    source.close()
    (row,) = [row for row in listed(servers.rabbitmq, "queues", "name", "arguments", vhost="fedmq")
              if row["name"] == dead_queue(job)]  # fmt: skip
    assert "x-delivery-limit" not in str(row) or "-1" in str(row)
    with plain_channel(url) as channel:
        channel.basic_publish("", dead_queue(job), b"1", pika.BasicProperties(delivery_mode=2))
    for _ in range(30):
        assert look(url, job) == [1]
    with DeadLetters(url, job) as box:
        (letter,) = box.letters()
        assert int(letter.headers["x-delivery-count"]) == 30


# --- sent again


def test_a_letter_sent_again_is_the_same_message_with_a_mark(broker, url, job):
    source, sink = broker.source(job), broker.sink()
    publish(sink, job, [3])
    (delivery,) = receive(source, 1)
    assert not delivery.replayed
    source.reject(delivery, Reason.SURPLUS, "why")
    source.ack([delivery])
    wait_until(lambda: depth(url, job) == 1)
    with DeadLetters(url, job) as box:
        for letter in box.letters():
            box.send_again(letter)
            box.remove(letter)
    (again,) = receive(source, 1)
    assert (again.body, again.client, again.update_id) == (delivery.body, delivery.client, delivery.update_id)
    assert again.replayed
    assert again.user_id is None
    assert depth(url, job) == 0


def test_the_mark_says_when_and_the_old_headers_stay_behind(url, job):
    put(url, job, [1], headers={HEADER_REASON: "codec", "x": "y"}, content_type="some/type", type="update-part")
    with plain_channel(url) as channel:
        channel.exchange_declare(EXCHANGE, "topic", durable=True)
        channel.queue_declare(queue(job), durable=True, arguments=QUORUM)
        channel.queue_bind(queue(job), EXCHANGE, routing_key(job, "*"))
        before = int(time.time())
        with DeadLetters(url, job) as box:
            box.send_again(next(box.letters()))
        _, properties, body = channel.basic_get(queue(job), auto_ack=True)
    assert body == b"1"
    assert set(properties.headers) - {"x-delivery-count"} == {HEADER_REPLAYED}
    assert before <= properties.headers[HEADER_REPLAYED] <= time.time()
    assert (properties.content_type, properties.type, properties.delivery_mode) == ("some/type", "update-part", 2)


def test_a_letter_that_nobody_takes_stays(url, job):
    put(url, job, [1])
    with plain_channel(url) as channel:
        channel.exchange_declare(EXCHANGE, "topic", durable=True)
    with pytest.raises(PublishRefused, match="no queue takes updates"), DeadLetters(url, job) as box:
        for letter in box.letters():
            box.send_again(letter)
            box.remove(letter)
    wait_until(lambda: depth(url, job) == 1)


def test_a_full_queue_is_a_refusal(url, job):
    put(url, job, [1, 2])
    with plain_channel(url) as channel:
        channel.exchange_declare(EXCHANGE, "topic", durable=True)
        limits = QUORUM | {"x-max-length": 1, "x-overflow": "reject-publish"}
        channel.queue_declare(queue(job), durable=True, arguments=limits)
        channel.queue_bind(queue(job), EXCHANGE, routing_key(job, "*"))
        for number in range(5):  # a quorum queue's limit is approximate
            channel.basic_publish(EXCHANGE, routing_key(job, "a"), b"%d" % number)
        wait_until(lambda: channel.queue_declare(queue(job), passive=True).method.message_count)
    with pytest.raises(PublishRefused, match="full"), DeadLetters(url, job) as box:
        for letter in box.letters():
            box.send_again(letter)
            box.remove(letter)
    wait_until(lambda: depth(url, job) == 2)


# --- errors


def test_a_job_nobody_ran_is_named(url, job):
    with pytest.raises(SettingsError, match=f"no aggregator has run job '{job}'"):
        DeadLetters(url, job)


@pytest.mark.parametrize(
    ("spoil", "kind", "words"),
    [
        (lambda url: url.replace("fedmq:fedmq@", "fedmq:wrong@"), SettingsError, "refuses this login"),
        (lambda url: url.rsplit("/", 1)[0] + "/nowhere", SettingsError, "refuses this virtual host"),
        (lambda url: "amqp://fedmq:fedmq@127.0.0.1:1/fedmq", BrokerUnavailable, "cannot reach RabbitMQ"),
        (lambda url: "http://127.0.0.1/", SettingsError, "is no AMQP URL"),
    ],
    ids=["password", "vhost", "port", "url"],
)
def test_what_is_wrong_with_the_connection_is_said_as_elsewhere(url, job, spoil, kind, words):
    with pytest.raises(kind, match=words) as caught:
        DeadLetters(spoil(url), job)
    assert "wrong" not in str(caught.value).replace("is wrong", ""), "no password in a message"


def test_a_silent_host_is_given_up(job, monkeypatch):
    monkeypatch.setattr("shared.transport.link.SOCKET_TIMEOUT_S", 1)
    started = time.monotonic()
    with silent_host() as port, pytest.raises(BrokerUnavailable):
        DeadLetters(f"amqp://fedmq:fedmq@127.0.0.1:{port}/fedmq", job)
    assert time.monotonic() - started < 8


def test_a_connection_that_breaks_gives_everything_back(url, job):
    put(url, job, range(10))
    with pytest.raises(BrokerUnavailable), DeadLetters(url, job) as box:
        for letter in box.letters():
            if letter.number == 5:
                box._connection._impl._transport._sock.shutdown(socket.SHUT_RDWR)
                box.send_again(letter)
    wait_until(lambda: depth(url, job) == 10)
