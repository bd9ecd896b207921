"""Combiners that take each coordinate for itself: the median, and the mean without the extremes."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from aggregator.robust.blocks import columns_of
from aggregator.robust.protocols import Rows
from aggregator.state import State
from shared.rules import trimmed_rows
from shared.vector import Vector


@dataclass(frozen=True, slots=True)
class Median:
    """The middle value of each coordinate; of an even number of rows, halfway between the middle two.

        out_j = median(rows_1j, ..., rows_Kj)

    Fewer than K / 2 attackers leave every coordinate within the range of the honest rows. It is biased where updates
    are skewed (different data on every client): `bucketing` before it helps.

    Source: Yin et al., "Byzantine-Robust Distributed Learning", arXiv:1803.01498, definition 1.
    """

    arrays: Mapping[str, float] = field(default_factory=dict)

    def combine(self, state: State, rows: Rows) -> Vector:
        """Return the medians, in the first of the rows, which are overwritten."""
        low, high = (rows.shape[0] - 1) // 2, rows.shape[0] // 2
        for columns in columns_of(rows):
            block = rows[:, columns]
            block.sort(axis=0)
            np.multiply(block[low], np.float32(0.5), out=block[low])
            if high != low:  # halves are added, as the sum of two large values would overflow
                np.multiply(block[high], np.float32(0.5), out=block[high])
            np.add(block[low], block[high], out=block[0])
        result: Vector = rows[0]
        return result


@dataclass(frozen=True, slots=True)
class TrimmedMean:
    """The mean of each coordinate without its largest and its smallest values.

        out_j = mean of rows_1j, ..., rows_Kj in order, but for the first t and the last t,   t = floor(share * K)

    Every coordinate is trimmed for itself (FedML trims whole clients by their number of samples). At most t
    attackers leave every coordinate within the range of the honest rows.

    Source: Yin et al., arXiv:1803.01498, definition 2.

    Attributes:
        share: beta in [0, 0.5), of the rows, on each side.
    """

    share: float
    arrays: Mapping[str, float] = field(default_factory=dict)

    def combine(self, state: State, rows: Rows) -> Vector:
        """Return the trimmed means, in the first of the rows, which are overwritten."""
        count = rows.shape[0]
        trimmed = trimmed_rows(self.share, count)
        for columns in columns_of(rows):
            block = rows[:, columns]
            block.sort(axis=0)
            block[0] = block[trimmed : count - trimmed].mean(axis=0, dtype=np.float64)
        result: Vector = rows[0]
        return result
