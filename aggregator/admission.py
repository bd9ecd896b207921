"""Decode and check a delivery: nothing received is trusted, sizes are bounded before memory is spent."""

from dataclasses import dataclass

from shared.compression import Decoded, codec_of
from shared.errors import Reason, RejectedUpdate
from shared.layout import Layout
from shared.messages import ENVELOPE_BYTES_MAX, Update, decode
from shared.transport.names import device_login
from shared.transport.ports import Delivery


@dataclass(frozen=True, slots=True)
class Admission:
    """What a message is checked against.

    Attributes:
        job: the job's id.
        layout: the job's layout.
        message_bytes_max: largest message, in bytes.
        update_bytes_max: largest payload of an update in parts, in bytes.
    """

    job: str
    layout: Layout
    message_bytes_max: int
    update_bytes_max: int


def admit(delivery: Delivery, admission: Admission, committed_version: int) -> Update:
    """Return the update, or the part of one; all but its payload is checked.

    Args:
        delivery: a received message.
        admission: what it is checked against.
        committed_version: newest version anybody can have pulled.

    Raises:
        RejectedUpdate: with the reason and the numbers; nothing else, whatever the bytes.
    """
    update = decode(delivery.body, admission.message_bytes_max, delivery.crc32)
    if update.job != admission.job:
        raise RejectedUpdate(Reason.JOB, f"the message says job {update.job!r}, this is {admission.job!r}")
    if update.client != delivery.client:
        raise RejectedUpdate(Reason.CLIENT, f"client {update.client!r} published under the key of {delivery.client!r}")
    if delivery.user_id not in (None, update.client, device_login(update.job, update.client)):
        raise RejectedUpdate(Reason.CLIENT, f"client {update.client!r} is logged in as {delivery.user_id!r}")
    if delivery.update_id and delivery.update_id != update.update_id:
        raise RejectedUpdate(
            Reason.MALFORMED, f"message_id {delivery.update_id[:64]!r}, but update_id {update.update_id[:64]!r}"
        )
    if update.layout != admission.layout.hash:
        raise RejectedUpdate(Reason.LAYOUT, f"layout {update.layout[:12]!r}, the job's is {admission.layout.hash[:12]}")
    if update.base_version > committed_version:
        raise RejectedUpdate(
            Reason.BASE_VERSION,
            f"base_version {update.base_version} was never published; newest is {committed_version}",
        )
    envelope = len(delivery.body) - len(update.payload)
    if envelope > ENVELOPE_BYTES_MAX:
        raise RejectedUpdate(
            Reason.TOO_LARGE, f"{envelope} bytes without its payload; a message has at most {ENVELOPE_BYTES_MAX}"
        )
    codec = codec_of(update.codec.get("name"))
    limit = codec.payload_bytes_max(admission.layout) + ENVELOPE_BYTES_MAX
    size = update.part.payload_bytes if update.part else len(delivery.body)
    if size > limit:
        raise RejectedUpdate(Reason.TOO_LARGE, f"{size} bytes; {codec.name} needs at most {limit} here")
    if size > admission.update_bytes_max:
        raise RejectedUpdate(
            Reason.TOO_LARGE, f"an update of {size} bytes; update_bytes_max is {admission.update_bytes_max}"
        )
    return update


def delta_of(update: Update, admission: Admission) -> Decoded:
    """Return the delta of an admitted update, still compressed, ready to be added.

    Raises:
        RejectedUpdate: its payload is not what its codec says.
    """
    return codec_of(update.codec.get("name")).decode(update.payload, update.codec, admission.layout)
