"""Every error FedMQ raises, branched by what the caller must do.

    FedMQError
    |-- Unavailable              retry the same bytes later
    |   |-- BrokerUnavailable
    |   |-- StoreUnavailable
    |   `-- PublishUnconfirmed   the broker may or may not have it: publish again under the same update_id
    |-- PublishRefused           the broker said no: keep the update, say why, retry slowly
    |-- RejectedUpdate(reason)   dead-letter the message, never retry it
    |-- VersionConflict          somebody else committed: reload and fold again
    |-- VersionGone              that model version is no longer stored: pull the newest
    |-- DiskFull                 no room for a file: wait for some, and write the same bytes again
    |-- TaskError                the user's task raised: report it and go on
    `-- SettingsError            say what to change and exit with 2

"Too stale" is an outcome of an update, not an error.
"""

from enum import StrEnum


class FedMQError(Exception):
    """Base of every error below."""


class Unavailable(FedMQError):  # noqa: N818 - the state of a server, as gRPC and HTTP call it
    """A server cannot be reached or did not answer; the same bytes may be sent again."""


class BrokerUnavailable(Unavailable):
    """RabbitMQ cannot be reached."""


class StoreUnavailable(Unavailable):
    """Redis cannot be reached, or did not make the write durable."""


class PublishUnconfirmed(Unavailable):
    """No confirm came: the broker may or may not hold the message."""


class PublishRefused(FedMQError):  # noqa: N818 - the AMQP outcome's own name
    """The broker answered that it does not take the message."""


class VersionConflict(FedMQError):  # noqa: N818 - the usual name of a failed compare-and-set
    """The store moved on since this state was loaded."""


class VersionGone(FedMQError):  # noqa: N818
    """The model version asked for is not (or no longer) stored."""


class DiskFull(FedMQError):  # noqa: N818 - the state of a disk
    """There is no room for a file, or less than is to stay free."""


class TaskError(FedMQError):
    """The user's task raised, or returned something that cannot be used."""


class SettingsError(FedMQError):
    """Wrong settings or usage; the message says what to change."""


class Reason(StrEnum):
    """Why an update is rejected: the metric's label and the dead letter's header at once."""

    TOO_LARGE = "too_large"  # the message exceeds update_bytes_max, or the payload is not of the size its codec implies
    MALFORMED = "malformed"  # not the msgpack map of the contract
    FORMAT = "format"  # a contract version this aggregator does not speak
    JOB = "job"  # addressed to another job
    CLIENT = "client"  # client, routing key and broker login do not agree
    LAYOUT = "layout"  # made for a model with other tensors
    BASE_VERSION = "base_version"  # trained from a version that was never published
    NUM_SAMPLES = "num_samples"  # not positive, or beyond the limit
    CHECKSUM = "checksum"  # the payload's crc32 is not the one announced
    CODEC = "codec"  # an unknown codec, or a payload its decoder refuses
    NOT_FINITE = "not_finite"  # NaN, infinity, or values whose squared norm overflows float32
    RULE = "rule"  # the aggregation rule cannot use it, e.g. several local steps where it takes one
    INCOMPLETE = "incomplete"  # sent in parts, and not put together: parts never came, or there was no room
    SURPLUS = "surplus"  # its client has its share of the open buffer already
    SUSPICIOUS = "suspicious"  # a defence took it for an attack


DETAIL_CHARS_MAX = 500


class RejectedUpdate(FedMQError):  # noqa: N818 - the outcome's name in the contract
    """The message can never be applied.

    Attributes:
        reason: one of `Reason`; metric label and dead-letter header.
        detail: what was wrong, with the numbers.
    """

    def __init__(self, reason: Reason, detail: str) -> None:
        detail = detail[:DETAIL_CHARS_MAX]  # it may quote what was received
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail
