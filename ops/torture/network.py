"""The way to the broker and from it, with everything that can happen there."""

from collections import deque
from collections.abc import Sequence
from dataclasses import replace

from ops.torture.fate import Fate, Killed, World
from ops.torture.history import History
from ops.torture.jobs import JOB
from shared.errors import BrokerUnavailable, PublishRefused, PublishUnconfirmed, Reason
from shared.transport.inprocess import DeadLetter, InProcessBroker
from shared.transport.ports import Delivery, Outgoing


class Network:
    """What workers publish goes through here; the broker may have a message and deliver it later.

    Args:
        world: time.
        broker: where messages end.
        history: what the broker was given.
    """

    def __init__(self, world: World, broker: InProcessBroker, history: History) -> None:
        self._world, self._sink, self._history = world, broker.sink(), history
        self._overtaken: list[Outgoing] = []  # wait until another message has passed them
        self._replayed: dict[int, bytes] = {}  # what an operator sent once more, by the object it is

    def send(self, message: Outgoing, fate: Fate) -> None:
        """Have the broker take a message; what it holds back it has confirmed all the same."""
        body = message.body
        if (given := fate.take("corrupt")) is not None:
            body = damaged(body, given["place"])
        if (given := fate.take("truncated")) is not None:
            body = body[: int(given["place"] * len(body))]
        sent = _with(message, body)
        copies = [sent]
        if (given := fate.take("corrupt_copy")) is not None:
            copies.insert(0 if given["first"] else 1, _with(message, damaged(message.body, given["place"])))
        if (given := fate.take("duplicate")) is not None:
            self._later(sent, given["after_s"])
        if (given := fate.take("delay")) is not None:
            for copy in copies:
                self._later(copy, given["seconds"])
        elif fate.take("reorder") is not None:
            self._overtaken += copies
        else:
            self._arrive(copies)

    def replay(self, letter: DeadLetter) -> None:
        """Publish a dead letter once more, marked as such."""
        body = bytes(bytearray(letter.body))  # another object: the message itself may still be in the queue
        self._replayed[id(body)] = body
        self._history.replayed.add(letter.update_id)
        self._sink.publish(Outgoing(JOB, letter.client, letter.update_id, body), 1.0)

    def marked(self, delivery: Delivery) -> Delivery:
        """Return a delivery as it arrives: one that was replayed says so."""
        return replace(delivery, replayed=True) if id(delivery.body) in self._replayed else delivery

    def settle(self) -> None:
        """Let everything that is held back arrive."""
        self._arrive([])

    @property
    def quiet(self) -> bool:
        """Whether nothing is held back for another message."""
        return not self._overtaken

    def _later(self, message: Outgoing, seconds: float) -> None:
        self._world.later(seconds, lambda: self._arrive([message]))

    def _arrive(self, messages: list[Outgoing]) -> None:
        overtaken, self._overtaken = self._overtaken, []
        for message in (*messages, *overtaken):
            self._history.accepted(message)
            self._sink.publish(message, 1.0)


class TortureSink:
    """One worker's way to the broker."""

    def __init__(self, network: Network, world: World, fate: Fate, history: History) -> None:
        self._network, self._world, self._fate, self._history = network, world, fate, history

    def publish(self, message: Outgoing, timeout_s: float) -> None:
        """Publish, more or less."""
        fate = self._fate
        fate.before("publish")
        attempt = self._history.attempted(message)
        if self._world.time_s < self._world.broker_away_s:
            raise BrokerUnavailable("the broker is away")
        if fate.take("publish_refused") is not None:
            raise PublishRefused("the queue is full")
        if fate.take("message_lost") is not None:
            raise PublishUnconfirmed("no confirm: the message never arrived")
        self._network.send(message, fate)
        if fate.take("confirm_lost") is not None:
            raise PublishUnconfirmed("no confirm: the confirm was lost")
        fate.after()
        attempt.confirmed()

    def close(self) -> None:
        """Nothing to close."""


class TortureSource:
    """One aggregator's consumer, which may lose its channel.

    As RabbitMQ's it is sent as much as fits the window at once, and hands that out bit by bit.

    Args:
        broker: of the job.
        job: its id.
        prefetch: the window.
        network: the way from it.
        world: time.
        fate: of the aggregator.
    """

    def __init__(
        self, broker: InProcessBroker, job: str, prefetch: int, network: Network, world: World, fate: Fate
    ) -> None:  # fmt: skip
        self._broker, self._job, self._prefetch, self._network = broker, job, prefetch, network
        self._inner, self._world, self._fate = broker.source(job), world, fate
        self._inbox: deque[Delivery] = deque()

    def receive(self, limit: int, wait_s: float) -> list[Delivery]:
        """Hand out what is here."""
        self._fate.before("receive")
        if self._world.time_s >= self._world.broker_away_s:
            self._inbox += self._inner.receive(self._prefetch - self.unacked, 0.0)
        deliveries = [self._network.marked(self._inbox.popleft()) for _ in range(min(limit, len(self._inbox)))]
        self._fate.after()
        return deliveries

    def ack(self, deliveries: Sequence[Delivery]) -> None:
        """Ack; none of it, or only the first ones, may reach the broker."""
        try:
            self._fate.before("ack")
        except Killed:
            self._inner.ack(deliveries[: len(deliveries) // 2])
            raise
        if (given := self._fate.take("ack_lost")) is not None:
            self._inner.ack(deliveries[: int(given["sent"] * len(deliveries))])
            self.reconnect()
            return
        self._inner.ack(deliveries)
        self._fate.after()

    def reject(self, delivery: Delivery, reason: Reason, detail: str) -> None:
        """Copy to the dead letters."""
        self._fate.before("reject")
        self._inner.reject(delivery, reason, detail)
        self._fate.after()

    def recover(self) -> None:
        """Have it all again."""
        self._fate.before("recover")
        self._inbox.clear()
        self._inner.recover()
        self._fate.after()

    def close(self) -> None:
        """Give back what is unacked and let the next consumer take over."""
        self._inbox.clear()
        self._inner.close()

    def reconnect(self) -> None:
        """Lose the channel: everything unacked is delivered again, to the next consumer if there is one."""
        self.close()
        self._broker._sources[self._job].append(self._inner)

    @property
    def unacked(self) -> int:
        """How many deliveries are not acked."""
        return len(self._inner._unacked)


def damaged(body: bytes, place: float) -> bytes:
    """Return a message with one bit flipped.

    Args:
        body: of an update or a part.
        place: in [0, 1), where.
    """
    bit = int(place * 8 * len(body))
    index = bit // 8
    return body[:index] + bytes([body[index] ^ (1 << bit % 8)]) + body[index + 1 :]


def _with(message: Outgoing, body: bytes) -> Outgoing:
    return Outgoing(message.job, message.client, message.update_id, body, message.is_part, message.crc32)
