"""What every selection does: which elements of the body travel, and how their positions do."""

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from shared.compression.codec import Params, Stage
from shared.compression.tensors import Indices, Values
from shared.vector import Vector

SHARE = (1e-6, 0.25)  # smallest and largest share; beyond a quarter, positions cost more than a quantizer of all values


@dataclass(frozen=True, slots=True)
class Selected:
    """Chosen elements.

    Attributes:
        indices: int64 [k], ascending positions in the body.
        values: float32 [k], what is to be sent for them.
        section: the bytes that tell their positions.
        params: what else the decoder needs to know.
    """

    indices: Indices
    values: Vector
    section: bytes
    params: Params


class Selection(Stage, Protocol):
    """One way to leave elements out."""

    def count_max(self, size: int) -> int:
        """Return the most elements chosen of `size`."""

    def section_bytes_max(self, size: int) -> int:
        """Return the most bytes their positions take."""

    def select(self, body: Values, rng: np.random.Generator) -> Selected:
        """Choose."""

    def locate(self, section: memoryview, params: Params, size: int) -> Indices:
        """Read the positions; raises `RejectedUpdate` and nothing else."""


def share_of(share: float, size: int) -> int:
    """Return how many elements a share of `size` is: k = ceil(p n)."""
    return min(size, int(np.ceil(share * size)))
