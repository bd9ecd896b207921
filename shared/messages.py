"""Update: the record that crosses the wire, and its bytes (public contract, version 1).

The envelope knows nothing of codecs: it carries the codec's name, parameters and payload. Decoding bounds
every size before memory is spent and raises `RejectedUpdate` and nothing else.
"""

import math
import re
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import msgpack

from shared.errors import Reason, RejectedUpdate

FORMAT = 1
CONTENT_TYPE = "application/vnd.fedmq.update+msgpack"
ENVELOPE_BYTES_MAX = 64 * 2**10  # everything but the payload
PART_BYTES = 8 * 2**20  # of payload in a message; what is longer travels in parts
PART_BYTES_MIN = 64  # smaller ones are all envelope
PARTS_MAX = 2**16
METRICS_MAX = 64  # numbers a worker may attach
MAPS_MAX = 16  # in one message, which has three: 16 MiB of small ones would take 350 MB and a second
NAME_CHARS_MAX = 64  # a metric's name
NUM_SAMPLES_MAX = 10**9
NUM_STEPS_MAX = 10**9
ID = re.compile(r"[A-Za-z0-9_-]{1,64}")
UPDATE_ID = re.compile(r"([A-Za-z0-9_-]{1,64})/([A-Za-z0-9_-]{1,64})/([0-9]{1,18})")

Scalar = str | int | float


@dataclass(frozen=True, slots=True)
class Part:
    """Which slice of an update's payload a message carries.

    Attributes:
        index: 0 for the first.
        count: slices in all, at least 2.
        payload_bytes: of the whole payload.
    """

    index: int
    count: int
    payload_bytes: int


@dataclass(frozen=True, slots=True)
class Update:
    """One finished local training, relative to the weights it started from.

    Attributes:
        job: the job's id.
        client: the worker's id.
        update_id: `<client>/<incarnation>/<sequence>`, the same however often it is sent.
        base_version: the model version the worker started from.
        num_samples: examples in its local data, 1 to 1e9.
        num_steps: local optimizer steps, 1 to 1e9.
        layout: hash of the model's layout, hex.
        codec: `{"name": ...}` and what the decoder needs.
        payload: the encoded delta (weights after - weights before), or the slice of it that `part` says.
        metrics: finite numbers the task reports, e.g. `loss`.
        train_seconds: wall time of the training.
        created_at: unix seconds when it was finished.
        part: None when the payload is whole.
    """

    job: str
    client: str
    update_id: str
    base_version: int
    num_samples: int
    num_steps: int
    layout: str
    codec: Mapping[str, Scalar]
    payload: bytes
    metrics: Mapping[str, float]
    train_seconds: float
    created_at: float
    part: Part | None = None


_NAMES = tuple(field.name for field in fields(Update) if field.name != "part")


def encode(update: Update) -> bytes:
    """Write an update, or a part of one, as the contract's msgpack map."""
    record: dict[str, Any] = {"format": FORMAT} | {name: getattr(update, name) for name in _NAMES}
    record["checksum"] = zlib.crc32(update.payload)
    if (part := update.part) is not None:
        record |= {"part": part.index, "parts": part.count, "payload_bytes": part.payload_bytes}
    return msgpack.packb(record, use_bin_type=True)  # type: ignore[no-any-return]


def split(body: bytes, part_bytes: int) -> Iterator[bytes]:
    """Yield the messages an encoded update travels as: itself, or its parts in order.

    Args:
        body: what `encode` returned for a whole update.
        part_bytes: of payload in a message, at most.
    """
    if len(body) <= part_bytes:
        yield body
        return
    update = decode(body, len(body))
    size = len(update.payload)
    part_bytes = max(part_bytes, -(-size // PARTS_MAX))
    count = -(-size // part_bytes)
    if count < 2:
        yield body
        return
    slices = memoryview(update.payload)
    for index in range(count):
        piece = bytes(slices[index * part_bytes : (index + 1) * part_bytes])
        yield encode(replace(update, payload=piece, part=Part(index, count, size)))


def decode(body: bytes, message_bytes_max: int, crc32: int | None = None) -> Update:
    """Read and check one message.

    Args:
        body: whatever arrived.
        message_bytes_max: the job's limit for a message, in bytes.
        crc32: what the body's should be, which proves the payload too; None when its sender did not say.

    Raises:
        RejectedUpdate: too large, malformed, of another format, a value out of range, or a wrong checksum.
    """
    if len(body) > message_bytes_max:
        raise RejectedUpdate(
            Reason.TOO_LARGE,
            f"message of {len(body)} bytes; message_bytes_max is {message_bytes_max}: send it in parts",
        )
    if crc32 is not None and (actual := zlib.crc32(body)) != crc32:
        raise RejectedUpdate(Reason.CHECKSUM, f"the message's crc32 is {actual}, its sender says {crc32}")
    try:
        record = unpacked(body)
    except Exception as error:  # msgpack raises ValueError, its own types, UnicodeDecodeError, RecursionError, ...
        raise RejectedUpdate(Reason.MALFORMED, f"not a msgpack map: {type(error).__name__}: {error}") from error
    if not isinstance(record, dict):
        raise RejectedUpdate(Reason.MALFORMED, f"a msgpack {type(record).__name__}, not a map")
    if record.get("format") != FORMAT or type(record["format"]) is not int:
        raise RejectedUpdate(Reason.FORMAT, f"format {_shown(record.get('format'))}; this aggregator speaks {FORMAT}")
    update = Update(
        job=_identifier(record, "job"),
        client=_identifier(record, "client"),
        update_id=_text(record, "update_id", 256),
        base_version=_whole(record, "base_version", 0, 2**53, Reason.BASE_VERSION),
        num_samples=_whole(record, "num_samples", 1, NUM_SAMPLES_MAX, Reason.NUM_SAMPLES),
        num_steps=_whole(record, "num_steps", 1, NUM_STEPS_MAX, Reason.MALFORMED),
        layout=_text(record, "layout", 64),
        codec=_scalars(record, "codec"),
        payload=_payload(record),
        metrics=_numbers(record, "metrics"),
        train_seconds=_number(record, "train_seconds"),
        created_at=_number(record, "created_at"),
        part=_part(record),
    )
    match = UPDATE_ID.fullmatch(update.update_id)
    if match is None or match[1] != update.client:
        raise RejectedUpdate(
            Reason.MALFORMED, f"update_id {update.update_id!r} is not {update.client}/<incarnation>/<sequence>"
        )
    return update


def unpacked(body: bytes) -> Any:
    """Read msgpack from anybody: sizes, depth and the number of maps are bounded before memory is spent.

    Raises:
        Exception: whatever msgpack likes, when it is none or goes beyond.
    """
    return msgpack.unpackb(
        body, raw=False, strict_map_key=True, max_map_len=METRICS_MAX, max_array_len=0, max_ext_len=0,
        max_str_len=ENVELOPE_BYTES_MAX, max_bin_len=len(body), object_hook=_counting(MAPS_MAX),
    )  # fmt: skip


def _counting(maps_max: int) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Return a hook that stops the reading of a message at its first map too many."""
    left = iter(range(maps_max))

    def hook(record: dict[str, Any]) -> dict[str, Any]:
        if next(left, None) is None:
            raise ValueError(f"more than {maps_max} maps in one message")
        return record

    return hook


def _shown(value: object) -> str:
    """Return what a message says, for a refusal: of a map only that it is one, for maps may be nested."""
    plain = value is None or isinstance(value, str | int | float)
    return repr(value)[:40] if plain else f"a {type(value).__name__}"


def _text(record: Mapping[str, Any], name: str, chars_max: int) -> str:
    value = record.get(name)
    if not isinstance(value, str) or not 0 < len(value) <= chars_max:
        raise RejectedUpdate(Reason.MALFORMED, f"{name} must be a string of 1 to {chars_max} characters")
    return value


def _identifier(record: Mapping[str, Any], name: str) -> str:
    value = _text(record, name, 64)
    if not ID.fullmatch(value):
        raise RejectedUpdate(Reason.MALFORMED, f"{name} {value!r} is not of {ID.pattern}")
    return value


def _whole(record: Mapping[str, Any], name: str, low: int, high: int, reason: Reason) -> int:
    value = record.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise RejectedUpdate(reason, f"{name} must be a whole number from {low} to {high}, got {_shown(value)}")
    return value


def _number(record: Mapping[str, Any], name: str) -> float:
    value = record.get(name)
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value) or value < 0:
        raise RejectedUpdate(Reason.MALFORMED, f"{name} must be a finite number >= 0, got {_shown(value)}")
    return float(value)


def _numbers(record: Mapping[str, Any], name: str) -> dict[str, float]:
    value = record.get(name)
    if not isinstance(value, dict):
        raise RejectedUpdate(Reason.MALFORMED, f"{name} must be a map of numbers")
    for key, number in value.items():
        plain = isinstance(number, int | float) and not isinstance(number, bool)
        if not isinstance(key, str) or len(key) > NAME_CHARS_MAX or not plain or not math.isfinite(number):
            raise RejectedUpdate(Reason.MALFORMED, f"{name}: {str(key)[:64]!r} must be a finite number")
    return {key: float(number) for key, number in value.items()}


def _scalars(record: Mapping[str, Any], name: str) -> dict[str, Scalar]:
    value = record.get(name)
    if not isinstance(value, dict) or not all(
        isinstance(key, str) and isinstance(item, str | int | float) for key, item in value.items()
    ):
        raise RejectedUpdate(Reason.MALFORMED, f"{name} must be a map of strings and numbers")
    return value


def _part(record: Mapping[str, Any]) -> Part | None:
    if "part" not in record and "parts" not in record:
        return None
    count = _whole(record, "parts", 2, PARTS_MAX, Reason.MALFORMED)
    index = _whole(record, "part", 0, count - 1, Reason.MALFORMED)
    size = _whole(record, "payload_bytes", (count - 1) * PART_BYTES_MIN + 1, 2**53, Reason.MALFORMED)
    if not 0 < len(record["payload"]) < size:
        raise RejectedUpdate(
            Reason.MALFORMED, f"part {index} has {len(record['payload'])} of {size} bytes of payload in {count} parts"
        )
    return Part(index, count, size)


def _payload(record: Mapping[str, Any]) -> bytes:
    payload, checksum = record.get("payload"), record.get("checksum")
    if not isinstance(payload, bytes):
        raise RejectedUpdate(Reason.MALFORMED, "payload must be binary")
    actual = zlib.crc32(payload)
    if checksum != actual:
        raise RejectedUpdate(Reason.CHECKSUM, f"the payload's crc32 is {actual}, the message says {_shown(checksum)}")
    return payload
