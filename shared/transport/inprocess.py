"""The broker port inside one process: same guarantees, no server, encoded bytes all the same."""

import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from shared.errors import PublishRefused, Reason
from shared.transport.ports import Delivery, Outgoing


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """A rejected message with the headers it carries in the dead-letter queue."""

    body: bytes
    client: str
    update_id: str
    reason: str
    detail: str


class InProcessBroker:
    """The queues of any number of jobs. Thread-safe.

    Args:
        dead_max: dead letters kept, the newest; None: all.
    """

    def __init__(self, dead_max: int | None = None) -> None:
        self.dead: deque[DeadLetter] = deque(maxlen=dead_max)
        self._queues: dict[str, deque[Outgoing]] = {}
        self._sources: dict[str, list[InProcessSource]] = {}
        self._changed = threading.Condition()

    def sink(self) -> "InProcessSink":
        """Return a publisher."""
        return InProcessSink(self)

    def source(self, job: str) -> "InProcessSource":
        """Return a consumer of a job's queue, which exists from now on."""
        with self._changed:
            self._queues.setdefault(job, deque())
            source = InProcessSource(self, job)
            self._sources.setdefault(job, []).append(source)
            return source

    def depth(self, job: str) -> int:
        """Return how many messages wait undelivered."""
        with self._changed:
            return len(self._queues.get(job, ()))


class InProcessSink:
    """Publishes into an `InProcessBroker`; a return is the confirm."""

    def __init__(self, broker: InProcessBroker) -> None:
        self._broker = broker

    def publish(self, message: Outgoing, timeout_s: float) -> None:
        """Append to the job's queue."""
        broker = self._broker
        with broker._changed:
            if message.job not in broker._queues:
                raise PublishRefused(f"no queue for job {message.job!r}: no aggregator has started it yet")
            broker._queues[message.job].append(message)
            broker._changed.notify_all()

    def close(self) -> None:
        """Nothing to close."""


class InProcessSource:
    """Consumes a job's queue; only the oldest open source of a job is served."""

    def __init__(self, broker: InProcessBroker, job: str) -> None:
        self._broker, self._job = broker, job
        self._unacked: dict[tuple[int, int], Outgoing] = {}
        self._epoch, self._sequence = 0, 0

    def receive(self, limit: int, wait_s: float) -> list[Delivery]:
        """Pop up to `limit` messages."""
        broker = self._broker
        with broker._changed:
            if wait_s > 0:
                broker._changed.wait_for(self._ready, wait_s)
            deliveries: list[Delivery] = []
            while self._ready() and len(deliveries) < limit:
                message = broker._queues[self._job].popleft()
                self._sequence += 1
                tag = (self._epoch, self._sequence)
                self._unacked[tag] = message
                delivery = Delivery(message.body, message.client, None, message.update_id, tag, crc32=message.crc32)
                deliveries.append(delivery)
            return deliveries

    def _ready(self) -> bool:
        sources = self._broker._sources[self._job]
        return bool(sources) and sources[0] is self and bool(self._broker._queues[self._job])

    def ack(self, deliveries: Sequence[Delivery]) -> None:
        """Forget these."""
        with self._broker._changed:
            for delivery in deliveries:
                self._unacked.pop(delivery.tag, None)

    def reject(self, delivery: Delivery, reason: Reason, detail: str) -> None:
        """Copy to the dead letters."""
        with self._broker._changed:
            if delivery.tag in self._unacked:
                self._broker.dead.append(DeadLetter(delivery.body, delivery.client, delivery.update_id, reason, detail))

    def recover(self) -> None:
        """Put everything unacked back at the head of the queue, in order."""
        with self._broker._changed:
            self._broker._queues[self._job].extendleft(reversed(self._unacked.values()))
            self._unacked.clear()
            self._epoch += 1
            self._broker._changed.notify_all()

    def close(self) -> None:
        """Give back what is unacked and let the next source take over."""
        self.recover()
        with self._broker._changed:
            if self in self._broker._sources[self._job]:
                self._broker._sources[self._job].remove(self)
            self._broker._changed.notify_all()
