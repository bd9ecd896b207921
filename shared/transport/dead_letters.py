"""The dead letters of a job: looked at one after the other, sent again, removed.

Whoever looks takes letters out of the queue and gives them back when it closes. A quorum queue puts what is given back
behind all that was given back before; so each look takes every letter, and they keep their order. While one looks,
another sees fewer letters or none, and letters that two give back at once may change places, as after an interruption.
Giving back counts as a delivery attempt (`x-delivery-count`): that does no harm while the queue has no delivery limit -
the aggregator declares none, so let no policy set one for `fedmq.dead.*`.

RabbitMQ hands out as many letters at once as the prefetch allows, whole bodies. So they are taken in windows of a few,
each by a channel of its own, and dropped once seen: memory does not grow with the queue, here or there.
"""

import contextlib
import time
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import pika
import pika.exceptions
from pika.adapters.utils.connection_workflow import AMQPConnectorException

from shared.errors import PublishRefused, SettingsError
from shared.transport.link import explain, parameters
from shared.transport.names import (
    EXCHANGE,
    HEADER_DETAIL,
    HEADER_REASON,
    HEADER_REPLAYED,
    dead_queue,
)
from shared.urls import hide_password

WINDOW_LETTERS = 64  # taken at once: RabbitMQ holds their bodies in memory meanwhile, up to 16 MiB each
WINDOWS_MAX = 100  # a channel each: they grow where there are more letters than that many hold, which are small ones
ACKS_MAX = 16  # on their way to a quorum queue; it takes 32
SILENCE_S_MAX = 2.0  # no letter for so long: somebody else has taken the rest
BACK_S_MAX = 5.0  # how long `close` waits until the letters stand in their queue again
BLOCKED_S_MAX = 30.0  # RabbitMQ is low on memory or disk and takes no publishes


@dataclass(frozen=True, slots=True)
class Letter:
    """One dead letter.

    Attributes:
        number: its place in the queue, 1 the oldest.
        body: the message as it was received.
        client: last word of the routing key.
        update_id: AMQP message_id, "" when missing.
        reason: `fedmq-reason`, or `broker:` and RabbitMQ's own word where it moved the message by itself.
        detail: `fedmq-detail`.
        rejected_at: unix seconds, None when nobody wrote them down.
        routing_key: it was published under.
        properties: what else AMQP says of it, by name.
        headers: all of them.
        handle: the window's number and the delivery tag.
    """

    number: int
    body: bytes
    client: str
    update_id: str
    reason: str
    detail: str
    rejected_at: float | None
    routing_key: str
    properties: Mapping[str, Any]
    headers: Mapping[str, Any]
    handle: tuple[int, int]


@dataclass(slots=True)
class _Window:
    """Letters in hand, on a channel of their own.

    Attributes:
        channel: they came by.
        size: how many it takes at most.
        consumer: its tag.
        received: how many came.
        inbox: those of them that nobody has seen yet; a few.
        removed: delivery tags that are to be acked at the end.
    """

    channel: Any
    size: int
    consumer: str = ""
    received: int = 0
    inbox: deque[tuple[Any, Any, bytes]] = field(default_factory=deque)
    removed: list[int] = field(default_factory=list)

    def note(self, _channel: Any, method: Any, properties: Any, body: bytes) -> None:
        """Take in a letter that arrived."""
        self.received += 1
        self.inbox.append((method, properties, body))


class DeadLetters:
    """The dead letters of one job over a connection of its own, for the length of a `with` block.

    Args:
        url: AMQP URL.
        job: the job's id.

    Raises:
        BrokerUnavailable: RabbitMQ does not answer.
        SettingsError: it refuses the login, or the job has no queue.
    """

    def __init__(self, url: str, job: str) -> None:
        self._url, self._job = url, job
        self._windows: list[_Window] = []
        self._publishing: Any = None
        self._exhausted = False  # somebody else has the rest
        given = parameters(url, f"fedmq deadletters {job}")
        given.blocked_connection_timeout = BLOCKED_S_MAX
        with self._translated():
            self._connection = pika.BlockingConnection(given)
        try:
            with self._translated():
                self._asking = self._connection.channel()
            self.count = self._ready()  # letters now; those that come later are not looked at
        except BaseException:
            self._disconnect()
            raise

    def __enter__(self) -> "DeadLetters":
        """Return itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close; an error that is on its way is not hidden by another."""
        if error is None:
            self.close()
            return
        self._exhausted = True  # whoever interrupts does not want to wait for the rest
        with contextlib.suppress(Exception):
            self.close()

    def letters(self) -> Iterator[Letter]:
        """Yield the letters there were at the start, oldest first, each once; they go back when this is closed."""
        number = 0
        while (window := self._next_window()) is not None:
            for method, properties, body in self._taken(window):
                number += 1
                yield self._letter(number, method, properties, body)

    def send_again(self, letter: Letter) -> None:
        """Publish the same bytes to the updates once more, under the same key; return when RabbitMQ has them.

        `user_id` is not kept: RabbitMQ takes it only from that login.

        Raises:
            PublishRefused: no queue takes it.
            BrokerUnavailable: it may or may not have been published.
        """
        properties = pika.BasicProperties(
            content_type=letter.properties.get("content_type"),
            delivery_mode=2,
            message_id=letter.update_id or None,
            timestamp=int(time.time()),
            type=letter.properties.get("type"),
            headers={HEADER_REPLAYED: int(time.time())},
        )
        with self._translated():
            if self._publishing is None:
                self._publishing = self._connection.channel()
                self._publishing.confirm_delivery()
            try:
                self._publishing.basic_publish(EXCHANGE, letter.routing_key, letter.body, properties, mandatory=True)
            except pika.exceptions.UnroutableError as error:
                raise PublishRefused(
                    f"no queue takes updates of job {self._job!r}: start its aggregator once"
                ) from error
            except pika.exceptions.NackError as error:
                raise PublishRefused(
                    f"the queue of job {self._job!r} does not take a message (nack): it is full or has no leader"
                ) from error

    def remove(self, letter: Letter) -> None:
        """Have a letter go when this is closed: acks in between would draw further letters."""
        window, tag = letter.handle
        self._windows[window].removed.append(tag)

    def close(self) -> None:
        """Remove what is to go, give back the rest in order, and return when it stands in the queue again."""
        try:
            for _ in self.letters():  # those nobody wanted to see: only all together keep their order
                pass
            with self._translated():
                for window in self._windows:
                    window.channel.basic_cancel(window.consumer)
                    self._settle(window)
            deadline = time.monotonic() + BACK_S_MAX
            back = self._ready() if self._windows else 0
            # One after the other, each only when those before it stand in the queue: a channel's letters go back when
            # its process has ended, which is some time after RabbitMQ said that the channel is closed.
            for window in self._windows:
                with self._translated():
                    window.channel.close()
                back += window.received - len(window.removed)
                while self._ready() < back and time.monotonic() < deadline:
                    time.sleep(0.002)
        finally:
            self._disconnect()

    def _settle(self, window: _Window) -> None:
        """Ack what is to go, and return when the queue knows.

        RabbitMQ holds back acks to a quorum queue when many are on their way, and forgets those when the channel
        closes. Taking one more letter is a command behind them in the queue's log, so its answer says that they have
        arrived; there is hardly ever one more, as all are in hand, and it goes back with them.
        """
        if len(window.removed) == window.received > 0:
            window.channel.basic_ack(window.removed[-1], multiple=True)
            window.channel.basic_get(dead_queue(self._job))
            return
        for start in range(0, len(window.removed), ACKS_MAX):
            for tag in window.removed[start : start + ACKS_MAX]:
                window.channel.basic_ack(tag)
            window.channel.basic_get(dead_queue(self._job))

    def _next_window(self) -> _Window | None:
        """Return the window that is open, or open the next one; None when there is no more to take."""
        left = self.count - sum(window.size for window in self._windows)
        if self._windows and self._windows[-1].received < self._windows[-1].size and not self._exhausted:
            return self._windows[-1]
        if left <= 0 or self._exhausted:
            return None
        size = min(left, max(WINDOW_LETTERS, -(-self.count // WINDOWS_MAX)))
        with self._translated():
            channel = self._connection.channel()
            channel.basic_qos(prefetch_count=size)
            window = _Window(channel, size)
            self._windows.append(window)
            window.consumer = channel.basic_consume(dead_queue(self._job), window.note)
        return window

    def _taken(self, window: _Window) -> Iterator[tuple[Any, Any, bytes]]:
        """Yield what comes, until the window is full or nothing comes any more."""
        while window.inbox or (window.received < window.size and self._arrived(window)):
            yield window.inbox.popleft()
        self._exhausted = window.received < window.size

    def _arrived(self, window: _Window) -> bool:
        """Wait for another letter; tell whether one came."""
        before, deadline = window.received, time.monotonic() + SILENCE_S_MAX
        with self._translated():
            while window.received == before and time.monotonic() < deadline:
                self._connection.process_data_events(time_limit=SILENCE_S_MAX / 10)
        return window.received > before

    def _letter(self, number: int, method: Any, properties: Any, body: bytes) -> Letter:
        headers = dict(properties.headers or {})
        named = {name: getattr(properties, name) for name in ("content_type", "type", "user_id", "app_id")}
        reason = headers.get(HEADER_REASON) or f"broker:{headers.get('x-first-death-reason', 'unknown')}"
        return Letter(
            number, body, method.routing_key.rsplit(".", 1)[-1], properties.message_id or "", str(reason),
            str(headers.get(HEADER_DETAIL, "")), properties.timestamp, method.routing_key,
            {name: value for name, value in named.items() if value is not None}, headers,
            (len(self._windows) - 1, method.delivery_tag),
        )  # fmt: skip

    def _ready(self) -> int:
        with self._translated():
            declared = self._asking.queue_declare(dead_queue(self._job), passive=True)
        return int(declared.method.message_count)

    def _disconnect(self) -> None:
        with contextlib.suppress(Exception):  # it may be closed, or half-open
            if self._connection.is_open:
                self._connection.close()

    @contextlib.contextmanager
    def _translated(self) -> Iterator[None]:
        """Translate pika's errors once."""
        try:
            yield
        except pika.exceptions.ChannelClosedByBroker as error:
            if error.reply_code == 404:
                raise SettingsError(
                    f"RabbitMQ at {hide_password(self._url)} has no queue {dead_queue(self._job)!r}: no aggregator has "
                    f"run job {self._job!r} there; check --job and FEDMQ_BROKER_URL"
                ) from error
            raise explain(error, self._url) from error
        except (pika.exceptions.AMQPError, AMQPConnectorException, OSError) as error:
            raise explain(error, self._url) from error
