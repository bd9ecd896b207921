"""The names on the broker (public contract, version 1)."""

VHOST = "fedmq"
EXCHANGE = "fedmq.updates"  # durable, topic
DEAD_EXCHANGE = "fedmq.dead"  # durable, topic; messages with the headers below
LOG_EXCHANGE = "amq.rabbitmq.log"  # where RabbitMQ publishes its own log (log.exchange = true)
LOG_LEVELS = ("warning", "error")  # its routing keys of failed logins and refusals
AUDIT_QUEUE = "fedmq.audit"  # what of that is about refusals, until `fedmq exporter` took it
PART = "update-part"  # AMQP type of a part of an update; `update` of a whole one
HEADER_REASON = "fedmq-reason"
HEADER_CRC32 = "fedmq-crc32"  # of the whole body; optional
HEADER_DETAIL = "fedmq-detail"
HEADER_REPLAYED = "fedmq-replayed"  # unix seconds; an operator sent a dead letter once more

OPERATOR = "fedmq-operator"  # logins of the whole installation; the same at RabbitMQ and Redis
EXPORTER = "fedmq-exporter"
REDIS_EXPORTER = "fedmq-redis-exporter"


def device_login(job: str, client: str) -> str:
    """Return the login of a device. Ids have no dots: one dot is a device, two are a service of a job."""
    return f"{job}.{client}"


def service_login(role: str, job: str) -> str:
    """Return the login of a job's aggregator or evaluator."""
    return f"fedmq.{role}.{job}"


def routing_key(job: str, client: str) -> str:
    """Return the key a client publishes under; a topic permission can pin a login to it."""
    return f"update.{job}.{client}"


def queue(job: str) -> str:
    """Return the job's quorum queue."""
    return f"fedmq.updates.{job}"


def dead_queue(job: str) -> str:
    """Return the quorum queue of the job's dead letters."""
    return f"fedmq.dead.{job}"
