"""The broker port on RabbitMQ 3.10 to 4.x: quorum queues, publisher confirms, one active consumer."""

import logging
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Sequence
from concurrent.futures import Future
from functools import partial
from typing import Any

import pika
import pika.exceptions

from shared.errors import BrokerUnavailable, PublishRefused, PublishUnconfirmed, Reason, SettingsError
from shared.messages import CONTENT_TYPE
from shared.transport import topology
from shared.transport.link import Channel, Link, Step, parameters
from shared.transport.names import (
    DEAD_EXCHANGE,
    EXCHANGE,
    HEADER_CRC32,
    HEADER_DETAIL,
    HEADER_REASON,
    HEADER_REPLAYED,
    PART,
    dead_queue,
    device_login,
    queue,
    routing_key,
)
from shared.transport.ports import Delivery, Outgoing
from shared.transport.topology import QueueLimits

log = logging.getLogger("fedmq.broker")

INBOX_BYTES_MAX = 2**24  # received but not yet folded: beyond 16 MiB the socket is left unread ...
INBOX_BYTES_LOW = 2**21  # ... until 2 MiB are left: receiving and folding take turns with the interpreter's lock
PAUSE_S = 0.2
DETAIL_CHARS_MAX = 1000  # an AMQP header
BACKOFF_S_MAX = 4.0  # between two attempts of an aggregator to connect: there are only one or two
NOBODY = ""  # client of a message that came by another key than this job's: no update's client is that
UNKNOWN = "unknown"  # its dead letter's
BURY_S_MAX = 3.0  # how long `close` waits for dead letters to be confirmed


class RabbitSink:
    """Publishes with mandatory and a confirm; waiting threads never touch the connection."""

    def __init__(self, url: str, client: str) -> None:
        self._login = parameters(url, client).credentials.username
        self._unconfirmed: dict[int, tuple[str, Future[None]]] = {}  # owner thread only, as the next two
        self._returned: dict[str, str] = {}
        self._sequence = 0
        self._channel: Channel = None
        self.link = Link(url, f"fedmq worker {client}", self._prepare, self._on_down)

    def publish(self, message: Outgoing, timeout_s: float) -> None:
        """Publish and wait for the confirm."""
        outcome: Future[None] = Future()
        if not self.link.call(partial(self._send, message, outcome)):
            raise BrokerUnavailable(str(self.link.problem))
        try:
            outcome.result(timeout_s)
        except TimeoutError as error:
            blocked = f" (it blocks publishers: {self.link.blocked})" if self.link.blocked else ""
            raise PublishUnconfirmed(f"no confirm from the broker within {timeout_s:g} s{blocked}") from error

    def close(self) -> None:
        """Close the connection."""
        self.link.close()

    def _prepare(self, channel: Channel) -> list[Step]:
        self._channel, self._sequence = channel, 0
        channel.add_on_return_callback(self._on_return)
        return [partial(channel.confirm_delivery, self._on_confirm)]

    def _send(self, message: Outgoing, outcome: "Future[None]") -> None:
        properties = pika.BasicProperties(
            content_type=CONTENT_TYPE,
            delivery_mode=2,
            message_id=message.update_id,
            timestamp=int(time.time()),
            type=PART if message.is_part else "update",
            user_id=self._login if self._login in (message.client, device_login(message.job, message.client)) else None,
            headers=None if message.crc32 is None else {HEADER_CRC32: message.crc32},
        )
        self._sequence += 1
        self._unconfirmed[self._sequence] = (message.update_id, outcome)
        key = routing_key(message.job, message.client)
        try:
            self._channel.basic_publish(EXCHANGE, key, message.body, properties, mandatory=True)
        except pika.exceptions.AMQPError as error:  # the channel is closing: `_on_down` ends the others
            del self._unconfirmed[self._sequence]
            outcome.set_exception(BrokerUnavailable(str(error)))

    def _on_return(self, _channel: Channel, method: Any, properties: Any, _body: bytes) -> None:
        """Note an unroutable message; its confirm follows."""
        self._returned[properties.message_id] = method.reply_text

    def _on_confirm(self, frame: Any) -> None:
        method = frame.method
        last = method.delivery_tag
        tags = [tag for tag in self._unconfirmed if tag <= last] if method.multiple else [last]
        for tag in tags:
            update_id, outcome = self._unconfirmed.pop(tag, ("", None))
            if outcome is None:
                continue
            returned = self._returned.pop(update_id, None)
            if returned is not None:
                outcome.set_exception(PublishRefused(f"{returned}: no queue takes it, no aggregator has run this job"))
            elif isinstance(method, pika.spec.Basic.Nack):
                outcome.set_exception(PublishRefused("the queue does not take it (nack): it is full or has no leader"))
            else:
                outcome.set_result(None)

    def _on_down(self, problem: Exception) -> None:
        refused = isinstance(problem, SettingsError) or any(f": {code} " in str(problem) for code in (404, 406))
        for _, outcome in self._unconfirmed.values():
            outcome.set_exception(PublishRefused(str(problem)) if refused else PublishUnconfirmed(str(problem)))
        self._unconfirmed.clear()
        self._returned.clear()


class RabbitSource:
    """Consumes a job's quorum queue.

    Messages are received by the connection's thread while the caller folds. Acks are cumulative: a tag is
    acked when all before it are settled, so a rejected message that waits for its dead-letter confirm holds
    back the acks behind it, never the other way round.

    Args:
        url: AMQP URL.
        job: the job's id.
        prefetch: deliveries held unacked.
        limits: of queues that do not exist yet.
    """

    def __init__(self, url: str, job: str, prefetch: int, limits: QueueLimits | None = None) -> None:
        self._job, self._prefetch, self._limits = job, prefetch, limits or QueueLimits()
        self._changed = threading.Condition()
        self._inbox: deque[Delivery] = deque()
        self._inbox_bytes = 0
        self._full = False
        self._epoch = 0
        self._stale_epoch = -1  # of a connection given up by `recover`
        self._open: OrderedDict[int, bool] = OrderedDict()  # tag -> acked out of order; owner thread only, as the rest
        self._dead: dict[int, int] = {}  # publish sequence on the dead-letter channel -> delivery tag
        self._dead_sequence = 0
        self._waiting: set[int] = set()  # tags acked before their dead letter is confirmed
        self._given_up = False  # a dead letter was not taken: nothing more is acked on this connection
        self._channel: Channel = None
        self._dead_channel: Channel = None
        self.link = Link(
            url, f"fedmq aggregator {job}", self._prepare, self._on_down, self._pause_when_full, BACKOFF_S_MAX
        )

    def receive(self, limit: int, wait_s: float) -> list[Delivery]:
        """Take up to `limit` deliveries from the inbox."""
        with self._changed:
            if not self._inbox and wait_s > 0:
                self._changed.wait_for(lambda: self._inbox, wait_s)
            deliveries = [self._inbox.popleft() for _ in range(min(limit, len(self._inbox)))]
            self._inbox_bytes -= sum(len(delivery.body) for delivery in deliveries)
            self._changed.notify_all()
            return deliveries

    def ack(self, deliveries: Sequence[Delivery]) -> None:
        """Ack those of the present connection."""
        epoch = self._epoch  # once: a reconnect may come in between
        tags = [delivery.tag[1] for delivery in deliveries if delivery.tag[0] == epoch]
        self.link.call(partial(self._settle, epoch, tags))

    def reject(self, delivery: Delivery, reason: Reason, detail: str) -> None:
        """Publish to the dead letters."""
        if delivery.tag[0] == self._epoch:
            self.link.call(partial(self._bury, delivery, str(reason), detail[:DETAIL_CHARS_MAX]))

    def recover(self) -> None:
        """Reconnect: the broker delivers again what was not acked."""
        with self._changed:
            self._inbox.clear()
            self._inbox_bytes = 0
            if self.link.ready.is_set():
                self._stale_epoch = self._epoch  # what still arrives of it comes again, in order
            self._changed.notify_all()
        self.link.reconnect("asking for everything unacked again")

    def close(self) -> None:
        """Close the connection, after the acks and dead letters handed over before."""
        done = threading.Event()

        def look() -> None:
            if self._dead:
                self._channel.connection.ioloop.call_later(0.01, look)
            else:
                done.set()

        if self.link.call(look):
            done.wait(BURY_S_MAX)
        self.link.close()

    def _prepare(self, channel: Channel) -> list[Step]:
        self._channel = channel

        def open_dead_channel(callback: Any) -> None:
            self._channel.connection.channel(on_open_callback=partial(self._on_dead_channel, callback))

        def consume(callback: Any) -> None:
            channel.add_on_cancel_callback(lambda _frame: self.link.reconnect("the queue was deleted"))
            channel.basic_consume(queue(self._job), self._on_message, callback=callback)

        return [
            *topology.steps(channel, self._job, self._limits, self.link.server_version()),
            partial(channel.basic_qos, prefetch_count=self._prefetch),
            open_dead_channel,
            consume,
        ]

    def _on_dead_channel(self, callback: Any, channel: Channel) -> None:
        self._dead_channel, self._dead_sequence = channel, 0
        channel.add_on_close_callback(lambda _channel, error: self.link.reconnect(f"dead-letter channel: {error}"))
        channel.add_on_return_callback(self._on_dead_return)
        channel.confirm_delivery(self._on_buried, callback=callback)

    def _on_message(self, _channel: Channel, method: Any, properties: Any, body: bytes) -> None:
        self._open[method.delivery_tag] = False
        key = text(method.routing_key)
        client = key.rsplit(".", 1)[-1]
        if key != routing_key(self._job, client):  # RabbitMQ 3 checks the key a login may use, not the header CC
            client = NOBODY
        tag = (self._epoch, method.delivery_tag)
        headers, is_part = properties.headers or {}, properties.type == PART
        crc32 = headers.get(HEADER_CRC32)
        delivery = Delivery(
            body, client, properties.user_id, text(properties.message_id), tag, HEADER_REPLAYED in headers, is_part,
            crc32 if isinstance(crc32, int) else None,
        )  # fmt: skip
        with self._changed:
            if self._epoch == self._stale_epoch:
                return
            self._inbox.append(delivery)
            self._inbox_bytes += len(body)
            self._changed.notify_all()

    def _pause_when_full(self) -> None:
        """Leave all but a trickle unread while the inbox is full; wake now and then for acks and heartbeats.

        Both threads hold the interpreter's lock most of the time. Were they to run side by side, each of the many
        short numpy calls of a fold would wait for the lock: taking turns in large pieces is twice as fast.
        """
        with self._changed:
            was_full = self._full
            self._full = self._inbox_bytes > (INBOX_BYTES_LOW if was_full else INBOX_BYTES_MAX)
            if self._full:
                self._full = not self._changed.wait_for(lambda: self._inbox_bytes <= INBOX_BYTES_LOW, PAUSE_S)
        if self._full != was_full:
            self.link.read_slowly(self._full)

    def _settle(self, epoch: int, tags: Sequence[int]) -> None:
        if epoch != self._epoch or self._given_up:
            return
        fresh = {tag for tag in tags if self._open.get(tag) is False}
        early = fresh.intersection(self._dead.values())
        self._waiting |= early
        fresh -= early
        last = None
        while self._open:
            tag, acked = next(iter(self._open.items()))
            if tag in fresh:
                last = tag
                fresh.discard(tag)
            elif not acked:
                break
            del self._open[tag]
        if last is not None:
            self._channel.basic_ack(last, multiple=True)
        for tag in fresh:  # behind one that is still open
            self._open[tag] = True
            self._channel.basic_ack(tag)

    def _bury(self, delivery: Delivery, reason: str, detail: str) -> None:
        epoch, tag = delivery.tag
        if epoch != self._epoch:
            return
        self._dead_sequence += 1
        self._dead[self._dead_sequence] = tag
        properties = pika.BasicProperties(
            content_type=CONTENT_TYPE,
            delivery_mode=2,
            message_id=delivery.update_id or None,
            timestamp=int(time.time()),
            type=PART if delivery.is_part else "update",
            headers={HEADER_REASON: reason, HEADER_DETAIL: detail},
        )
        key = routing_key(self._job, delivery.client or UNKNOWN)
        self._dead_channel.basic_publish(DEAD_EXCHANGE, key, delivery.body, properties, mandatory=True)

    def _on_dead_return(self, _channel: Channel, method: Any, _properties: Any, _body: bytes) -> None:
        """Give up the connection before the confirm that follows: the message comes again, the queue is declared."""
        self._given_up = True
        self.link.reconnect(f"no queue takes the dead letters: {method.reply_text}")

    def _on_buried(self, frame: Any) -> None:
        method = frame.method
        if isinstance(method, pika.spec.Basic.Nack):
            self._given_up = True
            self.link.reconnect("the dead-letter queue does not take a message (nack)")
            return
        last = method.delivery_tag
        buried = [sequence for sequence in self._dead if sequence <= last] if method.multiple else [last]
        safe = {self._dead.pop(sequence) for sequence in buried if sequence in self._dead}
        self._settle(self._epoch, sorted(safe & self._waiting))
        self._waiting -= safe

    def _on_down(self, _problem: Exception) -> None:
        with self._changed:
            self._epoch += 1
            self._inbox.clear()
            self._inbox_bytes = 0
            self._full = False
        self._open.clear()
        self._dead.clear()
        self._waiting.clear()
        self._given_up = False


def text(value: str | bytes | None) -> str:
    """Return a short string of AMQP as text: pika leaves it bytes where it is none.

    What is not UTF-8 becomes question marks, which no id of ours has; it gets no longer, so that it can be sent on.
    """
    return value.decode(errors="replace").replace("\ufffd", "?") if isinstance(value, bytes) else value or ""


def queue_depths(url: str, job: str, timeout_s: float) -> dict[str, int]:
    """Ask the broker how many messages wait in the job's queues; -1 where there is no queue.

    Raises:
        BrokerUnavailable, SettingsError: as for any connection.
    """
    depths = {"updates": -1, "consumers": -1, "dead": -1}
    for name, declared in (("updates", queue(job)), ("dead", dead_queue(job))):
        done = threading.Event()

        def note(frame: Any, name: str = name, done: threading.Event = done) -> None:
            depths[name] = frame.method.message_count
            if name == "updates":
                depths["consumers"] = frame.method.consumer_count
            done.set()

        def prepare(channel: Channel, declared: str = declared, note: Any = note) -> list[Step]:
            def ask(callback: Any) -> None:
                channel.queue_declare(declared, passive=True, callback=lambda frame: (note(frame), callback()))

            return [ask]

        link = Link(url, f"fedmq status {job}", prepare, lambda _problem: None)
        deadline = time.monotonic() + timeout_s
        try:
            while not done.is_set():
                try:
                    link.wait_ready(0.1)
                except BrokerUnavailable as error:
                    if ": 404 " in str(error):
                        break
                    if time.monotonic() >= deadline:
                        raise
        finally:
            link.close()
    return depths
