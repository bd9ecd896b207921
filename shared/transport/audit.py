"""RabbitMQ's own log of failed logins and refusals, out of the queue in which it waits."""

import re
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from shared.transport.link import Channel, Link, Step
from shared.transport.names import AUDIT_QUEUE, LOG_EXCHANGE, LOG_LEVELS

BACKOFF_S_MAX = 4.0  # between two attempts to connect
PREFETCH = 256  # lines held unacked
LINE_BYTES_MAX = 2**14  # of the log, looked at: a client can make a line longer than anybody wants to read


@dataclass(frozen=True, slots=True)
class LogLine:
    """One event of RabbitMQ's log, all its lines together.

    Attributes:
        text: without colours, times and process ids.
        at: unix seconds by RabbitMQ's clock.
        tag: connection and delivery tag.
    """

    text: str
    at: float
    tag: tuple[int, int]


class AuditQueue:
    """Takes RabbitMQ's log, of levels warning and above; each event at least once.

    The log's exchange exists from some seconds after RabbitMQ's first start on, so no definitions can bind to it: this
    does, at every connection.

    Args:
        url: AMQP URL.
    """

    def __init__(self, url: str) -> None:
        self._changed = threading.Condition()
        self._inbox: deque[LogLine] = deque()
        self._epoch = 0
        self._channel: Channel = None
        self.link = Link(url, "fedmq audit", self._prepare, self._on_down, backoff_s_max=BACKOFF_S_MAX)

    def take(self, limit: int, wait_s: float = 0.0) -> list[LogLine]:
        """Return up to so many events; they come again unless they are acked."""
        with self._changed:
            if not self._inbox and wait_s > 0:
                self._changed.wait_for(lambda: self._inbox, wait_s)
            return [self._inbox.popleft() for _ in range(min(limit, len(self._inbox)))]

    def ack(self, lines: Sequence[LogLine]) -> None:
        """Let RabbitMQ forget events, and all that came before them."""
        tags = [line.tag[1] for line in lines if line.tag[0] == self._epoch]
        if tags:
            self.link.call(partial(self._settle, self._epoch, max(tags)))

    def close(self) -> None:
        """Close the connection."""
        self.link.close()

    def _prepare(self, channel: Channel) -> list[Step]:
        self._channel = channel

        def consume(callback: Callable[..., None]) -> None:
            channel.add_on_cancel_callback(lambda _frame: self.link.reconnect("the queue was deleted"))
            channel.basic_consume(AUDIT_QUEUE, self._on_message, callback=callback)

        bind = partial(channel.queue_bind, AUDIT_QUEUE, LOG_EXCHANGE)
        return [
            *(partial(bind, level) for level in LOG_LEVELS),
            partial(channel.basic_qos, prefetch_count=PREFETCH),
            consume,
        ]

    def _on_message(self, _channel: Channel, method: Any, properties: Any, body: bytes) -> None:
        line = LogLine(plain(body), float(properties.timestamp or time.time()), (self._epoch, method.delivery_tag))
        with self._changed:
            self._inbox.append(line)
            self._changed.notify_all()

    def _on_down(self, _problem: Exception) -> None:
        with self._changed:
            self._epoch += 1
            self._inbox.clear()

    def _settle(self, epoch: int, tag: int) -> None:
        if epoch == self._epoch:
            self._channel.basic_ack(tag, multiple=True)


_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
_HEAD = re.compile(r"^\d{4}-\d\d-\d\d[ T]\S+ \[\w+\] <[\d.]+> ?", re.M)


def plain(body: bytes) -> str:
    """Return an event as it was meant: RabbitMQ writes time, level and process before each of its lines."""
    if len(body) > LINE_BYTES_MAX:  # its ends say most
        body = body[: LINE_BYTES_MAX // 2] + b" ... " + body[-LINE_BYTES_MAX // 2 :]
    text = _COLOUR.sub("", body.decode(errors="replace"))
    return _HEAD.sub("", text).strip()
