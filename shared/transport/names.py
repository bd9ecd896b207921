"""The names on the broker (public contract, version 1)."""

VHOST = "fedmq"
EXCHANGE = "fedmq.updates"  # durable, topic
DEAD_EXCHANGE = "fedmq.dead"  # durable, topic; messages with the headers below
PART = "update-part"  # AMQP type of a part of an update; `update` of a whole one
HEADER_REASON = "fedmq-reason"
HEADER_CRC32 = "fedmq-crc32"  # of the whole body; optional
HEADER_DETAIL = "fedmq-detail"
HEADER_REPLAYED = "fedmq-replayed"  # unix seconds; an operator sent a dead letter once more


def routing_key(job: str, client: str) -> str:
    """Return the key a client publishes under; a topic permission can pin a login to it."""
    return f"update.{job}.{client}"


def queue(job: str) -> str:
    """Return the job's quorum queue."""
    return f"fedmq.updates.{job}"


def dead_queue(job: str) -> str:
    """Return the quorum queue of the job's dead letters."""
    return f"fedmq.dead.{job}"
