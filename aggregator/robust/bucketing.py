"""Bucketing: mean over small random groups first, so that honest rows look more alike."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from aggregator.robust.blocks import columns_of
from aggregator.robust.protocols import Combiner, Rows
from aggregator.state import State
from shared.rules import bucket_count
from shared.vector import Vector


@dataclass(frozen=True, slots=True)
class Bucketing:
    """A combiner over the means of random buckets.

    rows are shuffled and cut into ceil(K / size) buckets, the last one may be smaller; f attackers spoil at most f of
    them. The shuffle is drawn from the version, so that a buffer folded again after a crash gives the same bytes.

    Source: Karimireddy, He, Jaggi, "Byzantine-Robust Learning on Heterogeneous Datasets via Bucketing",
    arXiv:2006.09365, algorithm 1.

    Attributes:
        size: s >= 2, rows of a bucket.
        inner: what combines the means.
    """

    size: int
    inner: Combiner

    @property
    def arrays(self) -> Mapping[str, float]:
        """What the combiner of the means keeps."""
        return self.inner.arrays

    def combine(self, state: State, rows: Rows) -> Vector:
        """Return what the combiner makes of the means; the rows are overwritten."""
        order = np.random.default_rng(state.version).permutation(rows.shape[0])
        count = bucket_count(rows.shape[0], self.size)
        for columns in columns_of(rows):
            block = rows[order, columns]  # a copy: the means are written where rows stand
            for index in range(count):
                bucket = block[index * self.size : (index + 1) * self.size]
                rows[index, columns] = bucket.mean(axis=0, dtype=np.float64)
        return self.inner.combine(state, rows[:count])
