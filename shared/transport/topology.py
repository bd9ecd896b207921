"""What a job needs at the broker: exchanges, its two queues, their bindings.

Exchanges belong to the installation (broker_config/definitions.json): they are looked for, and declared only where
they are missing. The queues are the job's own and are declared; one that exists with other arguments, or that this
login may not declare, is used as it is, and the log says what differs. RabbitMQ closes the channel of a declaration
it refuses, so each has a channel of its own.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from shared.transport.link import Channel, Step
from shared.transport.names import DEAD_EXCHANGE, EXCHANGE, dead_queue, queue, routing_key

log = logging.getLogger("fedmq.broker")

REFUSED, MISSING, DIFFERENT = 403, 404, 406


@dataclass(frozen=True, slots=True)
class QueueLimits:
    """What the queues of a job may hold.

    Attributes:
        bytes_max: of updates; beyond, publishers are refused and keep theirs.
        updates_max: the same as a number of messages.
        dead_bytes_max: of dead letters; the oldest go.
        dead_age_max_s: so long a dead letter is kept, seconds.
    """

    bytes_max: int = 8 * 2**30
    updates_max: int = 1_000_000
    dead_bytes_max: int = 2**30
    dead_age_max_s: float = 2_592_000.0


def steps(channel: Channel, job: str, limits: QueueLimits, server_version: str) -> list[Step]:
    """Return the steps that leave everything in place, or close the channel with the reason.

    Args:
        channel: of the connection that needs them.
        job: the job's id.
        limits: of queues that do not exist yet.
        server_version: of RabbitMQ, e.g. `3.10.8`.
    """
    updates, dead, binding = queue(job), dead_queue(job), routing_key(job, "*")
    served, kept = queue_arguments(limits, server_version)
    return [
        partial(_exchange, channel, EXCHANGE),
        partial(_exchange, channel, DEAD_EXCHANGE),
        partial(_queue, channel, dead, kept),
        partial(_bind, channel, dead, DEAD_EXCHANGE, binding),
        partial(_queue, channel, updates, served),
        partial(_bind, channel, updates, EXCHANGE, binding),
    ]


def queue_arguments(limits: QueueLimits, server_version: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the arguments of the queue of updates and of that of dead letters."""
    quorum: dict[str, Any] = {"x-queue-type": "quorum"}
    major = server_version.split(".", maxsplit=1)[0]
    if major.isdigit() and int(major) >= 4:  # 4.0 drops after 20 returns: restarts must not burn good updates
        quorum["x-delivery-limit"] = -1
    served = quorum | {
        "x-single-active-consumer": True, "x-dead-letter-exchange": DEAD_EXCHANGE, "x-overflow": "reject-publish",
        "x-max-length-bytes": limits.bytes_max, "x-max-length": limits.updates_max,
    }  # fmt: skip
    kept = quorum | {"x-max-length-bytes": limits.dead_bytes_max, "x-message-ttl": int(1000 * limits.dead_age_max_s)}
    return served, kept


def _exchange(channel: Channel, name: str, callback: Callable[..., None]) -> None:
    def missing(_code: int, _text: str) -> None:
        channel.exchange_declare(name, "topic", durable=True, callback=callback)

    _attempt(channel, lambda trial, done: trial.exchange_declare(name, passive=True, callback=done), callback, missing)


def _queue(channel: Channel, name: str, arguments: dict[str, Any], callback: Callable[..., None]) -> None:
    def declare(trial: Channel, done: Callable[..., None]) -> None:
        trial.queue_declare(name, durable=True, arguments=arguments, callback=done)

    def look(trial: Channel, done: Callable[..., None]) -> None:
        trial.queue_declare(name, passive=True, callback=done)

    def refused(code: int, text: str) -> None:
        def used_as_it_is(_frame: Any = None) -> None:
            why = "it differs" if code == DIFFERENT else "this login may not declare it"
            log.warning("queue %s is used as it is, %s: %d %s", name, why, code, text)
            callback()

        if code == DIFFERENT:
            used_as_it_is()
        else:  # where it is missing as well, the refusal is what there is to say
            _attempt(channel, look, used_as_it_is, lambda *_: declare(channel, callback))

    _attempt(channel, declare, callback, refused)


def _bind(channel: Channel, name: str, exchange: str, key: str, callback: Callable[..., None]) -> None:
    def refused(code: int, text: str) -> None:
        log.warning("queue %s: its binding to %s is taken for granted: %d %s", name, exchange, code, text)
        callback()

    _attempt(channel, lambda trial, done: trial.queue_bind(name, exchange, key, callback=done), callback, refused)


def _attempt(
    channel: Channel, action: Callable[[Channel, Callable[..., None]], None], done: Callable[..., None],
    refused: Callable[[int, str], None],
) -> None:  # fmt: skip
    """Try something on a channel of its own; then call `done`, or `refused` with the broker's code and words."""
    answered: list[bool] = []

    def opened(trial: Channel) -> None:
        def succeeded(_frame: Any) -> None:
            answered.append(True)
            trial.close()
            done()

        def closed(_trial: Channel, error: Any) -> None:
            code = getattr(error, "reply_code", None)
            if answered:
                return
            if code in (REFUSED, MISSING, DIFFERENT):
                refused(code, str(error.reply_text))
            elif (
                channel.is_open and channel.connection.is_open
            ):  # on the one whose end ends the connection, for its reason
                action(channel, lambda _frame: done())

        trial.add_on_close_callback(closed)
        action(trial, succeeded)

    channel.connection.channel(on_open_callback=opened)
