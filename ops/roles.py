r"""What each login may do at the broker: one table, from which definitions.json and the logins of devices are made.

RabbitMQ looks for these regular expressions in names, of which none is empty. They end in `\z`, not in `$`, which also
fits before a line feed at the end: `^$` would let a login read a queue of the name "\n". A topic permission is asked
besides, about the routing key; a login without one for an exchange may use any key there.
"""

import re
from dataclasses import dataclass, field

from shared.transport.names import (
    AUDIT_QUEUE,
    DEAD_EXCHANGE,
    EXCHANGE,
    EXPORTER,
    LOG_EXCHANGE,
    LOG_LEVELS,
    OPERATOR,
    dead_queue,
    device_login,
    queue,
    routing_key,
    service_login,
)

NOTHING, EVERYTHING = r"^\z", ".*"


@dataclass(frozen=True, slots=True)
class Permission:
    """What a login may do with names that fit; regular expressions.

    Attributes:
        write: publish to an exchange, bind a queue; of a topic permission: publish under a key.
        read: consume, get, purge; bind to an exchange; of a topic permission: bind with a key.
        configure: declare and delete; means nothing in a topic permission.
    """

    write: str
    read: str
    configure: str = NOTHING


@dataclass(frozen=True, slots=True)
class BrokerRole:
    """What a login may do at the broker.

    Attributes:
        login: its name.
        permission: on the virtual host.
        topics: exchange -> what it may do there, by routing key.
        tags: of the management API, which lets nobody in without one.
    """

    login: str
    permission: Permission
    topics: dict[str, Permission] = field(default_factory=dict)
    tags: tuple[str, ...] = ()


def device(job: str, client: str) -> BrokerRole:
    """Publishes under its own key, and nothing else."""
    own = Permission(write=_exactly(routing_key(job, client)), read=NOTHING)
    return BrokerRole(device_login(job, client), Permission(write=_exactly(EXCHANGE), read=NOTHING), {EXCHANGE: own})


def aggregator(job: str) -> BrokerRole:
    """Declares its job's two queues, consumes updates, buries rejected ones; it cannot publish updates."""
    queues = [queue(job), dead_queue(job)]
    keys = f"^{re.escape(routing_key(job, ''))}"
    return BrokerRole(
        service_login("aggregator", job),
        Permission(
            configure=_exactly(*queues),
            write=_exactly(DEAD_EXCHANGE, *queues),  # a queue is written to when it is bound
            read=_exactly(EXCHANGE, DEAD_EXCHANGE, *queues),  # an exchange is read from when a queue is bound to it
        ),
        {EXCHANGE: Permission(write=NOTHING, read=keys), DEAD_EXCHANGE: Permission(write=keys, read=keys)},
    )


def operator() -> BrokerRole:
    """Does everything, the management API included."""
    return BrokerRole(OPERATOR, Permission(EVERYTHING, EVERYTHING, EVERYTHING), tags=("administrator",))


def exporter() -> BrokerRole:
    """Takes the broker's own log out of its queue, which it binds; how long another queue is, anybody may ask."""
    allowed = Permission(write=_exactly(AUDIT_QUEUE), read=_exactly(AUDIT_QUEUE, LOG_EXCHANGE))
    levels = Permission(write=NOTHING, read=_exactly(*LOG_LEVELS))
    return BrokerRole(EXPORTER, allowed, {LOG_EXCHANGE: levels})


def _exactly(*names: str) -> str:
    escaped = [re.escape(name) for name in names]
    return rf"^{escaped[0]}\z" if len(escaped) == 1 else rf"^({'|'.join(escaped)})\z"
