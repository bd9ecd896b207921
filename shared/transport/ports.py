"""What the loops need of a message broker.

Every adapter moves encoded bytes and passes `tests/contract/test_transport.py`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from shared.errors import Reason


@dataclass(frozen=True, slots=True)
class Outgoing:
    """A message ready to be published.

    Attributes:
        job, client: they make the routing key `update.<job>.<client>`.
        update_id: AMQP message_id.
        body: the encoded update, or a part of one.
        is_part: the latter; AMQP type `update-part` instead of `update`.
        crc32: of the body; None: the payload's own checksum must do.
    """

    job: str
    client: str
    update_id: str
    body: bytes
    is_part: bool = False
    crc32: int | None = None


@dataclass(frozen=True, slots=True)
class Delivery:
    """A received message that waits for its ack.

    Attributes:
        body: what was published.
        client: last word of the routing key; "" when that is not a key of this job.
        user_id: login the broker vouches for, None when the publisher named none.
        update_id: AMQP message_id, "" when missing.
        tag: the adapter's own handle.
        replayed: an operator sent a dead letter once more.
        is_part: the publisher says that it is a part of an update.
        crc32: of the body, as the publisher has it; None when it gave none.
    """

    body: bytes
    client: str
    user_id: str | None
    update_id: str
    tag: tuple[int, int]
    replayed: bool = False
    is_part: bool = False
    crc32: int | None = None


class UpdateSink(Protocol):
    """Where a worker publishes. Safe to call from any one thread at a time."""

    def publish(self, message: Outgoing, timeout_s: float) -> None:
        """Publish, and return once the broker confirms that the message is safe with it.

        Raises:
            PublishUnconfirmed: no answer within `timeout_s`; the broker may have it.
            PublishRefused: the broker does not take it: no queue, no permission, over its limit.
            BrokerUnavailable: there is no connection now.
        """

    def close(self) -> None:
        """Close the connection; unconfirmed messages stay unconfirmed."""


class UpdateSource(Protocol):
    """Where the aggregator receives. At most one source of a job is served at a time; others stand by.

    Each message is delivered at least once: what is not acked comes again, to this source or another.
    """

    def receive(self, limit: int, wait_s: float) -> list[Delivery]:
        """Return up to `limit` deliveries in order; wait up to `wait_s` for the first."""

    def ack(self, deliveries: Sequence[Delivery]) -> None:
        """Tell the broker to forget these; call it only when their effect is durable.

        A rejected one is forgotten once its copy is safe with the dead letters too. Deliveries of an earlier
        connection are ignored: the broker sends them again.
        """

    def reject(self, delivery: Delivery, reason: Reason, detail: str) -> None:
        """Hand a copy of a message to the dead letters; `ack` the delivery as any other, when that is durable.

        After a crash between the two the message comes again, and may stand twice among the dead letters.
        """

    def recover(self) -> None:
        """Have every delivery that is not acked delivered again."""

    def close(self) -> None:
        """Close the connection; what is not acked will be delivered again."""
