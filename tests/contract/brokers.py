"""The two adapters of the broker port behind one face, for the suite that runs over both."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import pika

from shared.errors import Reason
from shared.transport.inprocess import InProcessBroker
from shared.transport.names import HEADER_DETAIL, HEADER_REASON, dead_queue
from shared.transport.ports import Delivery, Outgoing, UpdateSink, UpdateSource
from shared.transport.rabbitmq import RabbitSink, RabbitSource
from tests.contract.faults import wait_until

READY_S = 10.0  # a local broker takes a connection within milliseconds


@dataclass(frozen=True)
class Letter:
    """A dead letter, whichever broker holds it."""

    body: bytes
    client: str
    update_id: str | None  # None: the adapter does not keep it
    reason: str
    detail: str


class Broker(Protocol):
    """What the suite needs of an adapter."""

    def sink(self, client: str = "a") -> UpdateSink:
        """Return a connected publisher."""

    def source(self, job: str, prefetch: int = 64) -> UpdateSource:
        """Return a connected consumer."""

    def letters(self, job: str) -> list[Letter]:
        """Return the job's dead letters, oldest first."""

    def close(self) -> None:
        """Close every connection."""


class InProcess:
    """The in-process adapter."""

    def __init__(self) -> None:
        self._broker = InProcessBroker()

    def sink(self, client: str = "a") -> UpdateSink:
        """Return a publisher."""
        return self._broker.sink()

    def source(self, job: str, prefetch: int = 64) -> UpdateSource:
        """Return a consumer."""
        return self._broker.source(job)

    def letters(self, job: str) -> list[Letter]:
        """Return the dead letters."""
        return [Letter(letter.body, letter.client, None, letter.reason, letter.detail) for letter in self._broker.dead]

    def close(self) -> None:
        """Nothing is open."""


class Rabbit:
    """The RabbitMQ adapter, and a plain client to look at what it did."""

    def __init__(self, url: str) -> None:
        self.url = url
        self._opened: list[Any] = []
        self._letters: dict[str, list[Letter]] = {}

    def sink(self, client: str = "a", url: str | None = None) -> RabbitSink:
        """Return a connected publisher."""
        sink = RabbitSink(url or self.url, client)
        self._opened.append(sink)
        sink.link.wait_ready(READY_S)
        return sink

    def source(self, job: str, prefetch: int = 64, url: str | None = None) -> RabbitSource:
        """Return a connected consumer."""
        source = RabbitSource(url or self.url, job, prefetch)
        self._opened.append(source)
        source.link.wait_ready(READY_S)
        return source

    def letters(self, job: str) -> list[Letter]:
        """Take the dead letters out of their queue; return all ever seen."""
        seen = self._letters.setdefault(job, [])
        with plain_channel(self.url) as channel:
            while True:
                method, properties, body = channel.basic_get(dead_queue(job), auto_ack=True)
                if method is None:
                    return seen
                reason, detail = (properties.headers[name] for name in (HEADER_REASON, HEADER_DETAIL))
                client = method.routing_key.rsplit(".", 1)[-1]
                seen.append(Letter(body, client, properties.message_id, reason, detail))

    def close(self) -> None:
        """Close every connection."""
        for opened in self._opened:
            opened.close()


class plain_channel:  # noqa: N801 - used as a function
    """Open a channel as any AMQP client would, for the length of a `with` block."""

    def __init__(self, url: str) -> None:
        self._parameters = pika.URLParameters(url)
        self._parameters.socket_timeout = self._parameters.stack_timeout = READY_S

    def __enter__(self) -> Any:
        self._connection = pika.BlockingConnection(self._parameters)
        return self._connection.channel()

    def __exit__(self, *_: object) -> None:
        if self._connection.is_open:
            self._connection.close()


def message(job: str, sequence: int, client: str = "a", body: bytes | None = None) -> Outgoing:
    """Return the n-th message of a client."""
    return Outgoing(job, client, f"{client}/i/{sequence}", f"{client} {sequence}".encode() if body is None else body)


def publish(sink: UpdateSink, job: str, sequences: Iterable[int], client: str = "a") -> None:
    """Publish numbered messages, each confirmed."""
    for sequence in sequences:
        sink.publish(message(job, sequence, client), 30.0)


def publish_when_back(sink: UpdateSink, outgoing: Outgoing, timeout_s: float = 30.0) -> None:
    """Publish as a worker does: again and again until the broker confirms."""
    from shared.errors import PublishRefused, Unavailable

    problems: list[Exception] = []

    def published() -> bool:
        try:
            sink.publish(outgoing, 5.0)
        except (Unavailable, PublishRefused) as error:
            problems.append(error)
            return False
        return True

    wait_until(published, timeout_s, lambda: f"publishing fails: {problems[-1]!r}")


def receive(source: UpdateSource, count: int, timeout_s: float = 15.0) -> list[Delivery]:
    """Return the next `count` deliveries."""
    deliveries: list[Delivery] = []

    def enough() -> bool:
        deliveries.extend(source.receive(count - len(deliveries), 0.2))
        return len(deliveries) == count

    wait_until(enough, timeout_s, lambda: f"{len(deliveries)} of {count} came: {numbers(deliveries)}")
    return deliveries


def receive_until(source: UpdateSource, last: int, timeout_s: float = 30.0) -> list[Delivery]:
    """Return the next deliveries up to the one with number `last`, published after all that matter: a marker.

    Whatever was to come has come when the marker does, so nobody has to wait for what does not come.
    """
    deliveries: list[Delivery] = []

    def marked() -> bool:
        deliveries.extend(source.receive(1, 0.2))
        return bool(deliveries) and number(deliveries[-1]) == last

    wait_until(marked, timeout_s, lambda: f"the marker {last} did not come, but {numbers(deliveries)}")
    return deliveries


def refuse(source: UpdateSource, delivery: Delivery, reason: Reason, detail: str) -> None:
    """Reject a delivery and ack it, as an aggregator does with a commit in between."""
    source.reject(delivery, reason, detail)
    source.ack([delivery])


def number(delivery: Delivery) -> int:
    """Return the number a test published a message under."""
    return int(delivery.update_id.rsplit("/", 1)[-1])


def numbers(deliveries: Iterable[Delivery]) -> list[int]:
    """Return the numbers, in order."""
    return [number(delivery) for delivery in deliveries]


Make = Callable[[], Broker]
