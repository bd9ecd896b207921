"""Centered clipping: no row pulls the aggregate further than a radius."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from aggregator.robust.blocks import columns_of
from aggregator.robust.protocols import Rows
from aggregator.state import State
from shared.vector import Vector

CENTER = "center"


@dataclass(frozen=True, slots=True)
class CenteredClipping:
    """The last aggregate, moved towards each row by a bounded step.

        v <- v + (1 / K) sum_i (rows_i - v) min(1, radius / ||rows_i - v||)      `iterations` times

    v begins as the aggregate of the version before (zero at first) and is kept with the state. One row moves it by
    at most radius / K an iteration. Memory: one lasting vector.

    Source: Karimireddy, He, Jaggi, "Learning from History for Byzantine Robust Optimization", arXiv:2012.10333,
    algorithm 2.

    Attributes:
        radius: tau > 0, a norm of deltas.
        iterations: >= 1; the paper uses 1, 3 without momentum.
    """

    radius: float
    iterations: int = 1
    arrays: Mapping[str, float] = field(default_factory=lambda: {CENTER: 0.0})

    def combine(self, state: State, rows: Rows) -> Vector:
        """Move the center in place and return a copy of it, in the first of the rows, which is overwritten."""
        center = state.arrays[CENTER]
        for _ in range(self.iterations):
            shares = clip_factors(center, rows, self.radius) / rows.shape[0]
            kept, taken = np.float32(1.0 - shares.sum()), shares.astype(np.float32)
            for columns in columns_of(rows):
                center[columns] = kept * center[columns] + taken @ rows[:, columns]
        result: Vector = rows[0]
        result[:] = center  # whoever steps along it may change it, and the center lasts
        return result


def clip_factors(center: Vector, rows: Rows, radius: float) -> "np.ndarray[tuple[int], np.dtype[np.float64]]":
    """Return min(1, radius / ||rows_i - center||) of every row.

    Args:
        center: float32 [n].
        rows: float32 [K, n].
        radius: > 0.
    """
    squares = np.zeros(rows.shape[0])
    for columns in columns_of(rows):
        difference = rows[:, columns].astype(np.float64)
        difference -= center[columns]
        squares += np.einsum("ij,ij->i", difference, difference)
    return radius / np.maximum(np.sqrt(squares), radius)
