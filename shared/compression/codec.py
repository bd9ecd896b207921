"""What every codec does."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from shared.layout import Layout
from shared.vector import Vector

Params = Mapping[str, str | int | float]


@dataclass(frozen=True, slots=True)
class Encoded:
    """What travels: the payload and, under `codec` in the message, what its decoder needs beside the name."""

    payload: bytes
    params: Params


class Decoded(Protocol):
    """A checked delta, still compressed: it can add itself, but is never inflated to model size."""

    def add_into(self, total: Vector, weight: float) -> None:
        """Add `weight * delta` to `total` (float32 [n]) in place, block by block."""

    def squared_norm(self) -> float:
        """Return ||delta||^2, from the compressed form."""


class Stage(Protocol):
    """What one part of a pipeline says of itself; the registry refuses pipelines by it."""

    @property
    def name(self) -> str:
        """How it stands in the codec's string."""

    @property
    def unbiased(self) -> bool:
        """E[what arrives] = x."""

    @property
    def contraction(self) -> bool:
        """E||x - what arrives||^2 < ||x||^2 for every x != 0: what error feedback needs."""


class Codec(Protocol):
    """One way to write a delta down.

    `decode` may be handed any bytes. It bounds every size by the layout before memory is spent, and raises
    `RejectedUpdate` and nothing else.
    """

    @property
    def name(self) -> str:
        """Its canonical string, as it stands in the message."""

    @property
    def feedback(self) -> bool:
        """Whether what it does not send is to be kept and added to the next delta (`ef | ...`)."""

    @property
    def exact(self) -> bool:
        """Whether decoding gives the same bits on every machine (a rotation, a matrix product, does not)."""

    def payload_bytes_max(self, layout: Layout) -> int:
        """Return the largest payload it makes of a delta of this layout, in bytes."""

    def encode(self, delta: Vector, layout: Layout, rng: np.random.Generator) -> Encoded:
        """Compress `delta` (float32 [n], finite); `rng` drives stochastic rounding and seeds."""

    def decode(self, payload: bytes | memoryview, params: Params, layout: Layout) -> Decoded:
        """Check a payload and return the delta ready to be added."""
