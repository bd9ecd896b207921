"""What every codec does."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from shared.errors import Reason, RejectedUpdate
from shared.vector import Vector

Params = Mapping[str, str | int | float]


@dataclass(frozen=True, slots=True)
class Encoded:
    """What travels: the payload and, under `codec` in the message, the name and what its decoder needs."""

    payload: bytes
    params: Params


class Decoded(Protocol):
    """A checked delta, still compressed: it can add itself, but is never inflated to model size."""

    def add_into(self, total: Vector, weight: float) -> None:
        """Add `weight * delta` to `total` (float32 [n]) in place, block by block."""


class Codec(Protocol):
    """One way to write a delta down.

    `decode` may be handed any bytes. It bounds every size by `num_params` before memory is spent, and raises
    `RejectedUpdate` and nothing else.
    """

    @property
    def name(self) -> str:
        """Its canonical string, as it stands in the message."""

    def payload_bytes(self, num_params: int) -> int:
        """Return the exact payload size, or its upper bound where the codec is not of fixed size."""

    def encode(self, delta: Vector, rng: np.random.Generator) -> Encoded:
        """Compress `delta` (float32 [n], finite); `rng` drives stochastic rounding."""

    def decode(self, payload: bytes | memoryview, params: Params, num_params: int) -> Decoded:
        """Check the payload of a delta of `num_params` elements and return it ready to be added."""


def check_size(codec: Codec, payload: bytes | memoryview, num_params: int) -> None:
    """Raise `RejectedUpdate` unless the payload of a fixed-size codec has exactly its size."""
    expected = codec.payload_bytes(num_params)
    if len(payload) != expected:
        raise RejectedUpdate(
            Reason.TOO_LARGE if len(payload) > expected else Reason.CODEC,
            f"{codec.name} payload of {len(payload)} bytes; {num_params} parameters take {expected}",
        )
