"""An update as rules keep it in `State.kept`: how it was encoded, and its payload, without a copy too many.

u32 length of the head; the head, msgpack {"codec": map, "scale": float}; the payload
"""

import struct
from collections.abc import Mapping
from dataclasses import dataclass

import msgpack

from shared.compression import Decoded, decode
from shared.layout import Layout
from shared.messages import Scalar
from shared.vector import Vector

_LENGTH = struct.Struct("<I")


@dataclass(frozen=True, slots=True)
class Delta:
    """A delta as a rule takes it.

    Attributes:
        delta: as it travelled.
        scale: its factor: s(tau), what guards left of it.
    """

    delta: Decoded
    scale: float = 1.0

    def add_into(self, total: Vector, factor: float) -> None:
        """Add `factor * scale * delta` to `total` (float32 [n]) in place."""
        self.delta.add_into(total, factor * self.scale)


def write_record(codec: Mapping[str, Scalar], payload: bytes, scale: float = 1.0) -> bytes:
    """Return a record.

    Args:
        codec: name and parameters, as in an update.
        payload: of that codec.
        scale: the factor the delta is taken with.
    """
    head = msgpack.packb({"codec": dict(codec), "scale": scale})
    return b"".join((_LENGTH.pack(len(head)), head, payload))  # a Packer would copy the payload twice more


def read_record(record: bytes, layout: Layout) -> Delta:
    """Return the delta of a record; it reads from the record's own bytes.

    Args:
        record: what `write_record` returned.
        layout: of the model it was made for.
    """
    (length,) = _LENGTH.unpack_from(record)
    start = _LENGTH.size + length
    head = msgpack.unpackb(memoryview(record)[_LENGTH.size : start])
    return Delta(decode(head["codec"], memoryview(record)[start:], layout), head["scale"])
