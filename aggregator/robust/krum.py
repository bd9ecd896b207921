"""Krum and Multi-Krum: the rows that lie closest to most others."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from aggregator.robust.blocks import columns_of
from aggregator.robust.protocols import Rows
from aggregator.state import State
from shared.rules import krum_chosen
from shared.vector import Vector

Matrix = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Krum:
    """The mean of the rows with the best scores; Krum is that of the best one alone.

        score_i = sum of the K - f - 2 smallest ||rows_i - rows_j||^2, j != i
        out = mean of the m rows with the smallest scores, ties to the lower index

    Against f attackers it needs K >= 2 f + 3 rows. Memory: K x K distances; time O(K^2 n).

    Source: Blanchard et al., "Machine Learning with Adversaries: Byzantine Tolerant Gradient Descent", NeurIPS 2017,
    section 4; m <= K - f - 2 from El Mhamdi et al., arXiv:1802.07927.

    Attributes:
        attackers: f >= 1.
        chosen: m >= 1; 0: as many as may be, K - f - 2.
    """

    attackers: int
    chosen: int = 1
    arrays: Mapping[str, float] = field(default_factory=dict)

    def combine(self, state: State, rows: Rows) -> Vector:
        """Return the chosen row, or the mean of the chosen ones in the first of the rows, which is overwritten."""
        order = np.argsort(krum_scores(squared_distances(rows), self.attackers), kind="stable")
        best = np.sort(order[: krum_chosen(rows.shape[0], self.attackers, self.chosen)])
        result: Vector = rows[int(best[0])]
        if best.size == 1:
            return result
        for columns in columns_of(rows):
            result[columns] = rows[best, columns].mean(axis=0, dtype=np.float64)
        return result


def squared_distances(rows: Rows) -> Matrix:
    """Return ||rows_i - rows_j||^2, in float64 from the rows' products, infinite on the diagonal.

    Args:
        rows: float32 [K, n], finite.

    Returns:
        float64 [K, K], >= 0; off by about 1e-16 of the squared norms.
    """
    products = np.zeros((rows.shape[0], rows.shape[0]))
    for columns in columns_of(rows):
        block = rows[:, columns].astype(np.float64)  # a product of two float32 is exact in it
        products += block @ block.T
    squares = np.diagonal(products)
    distances: Matrix = np.maximum(squares[:, None] + squares[None, :] - 2.0 * products, 0.0)
    np.fill_diagonal(distances, np.inf)
    return distances


def krum_scores(distances: Matrix, attackers: int) -> npt.NDArray[np.float64]:
    """Return each row's sum of its K - f - 2 smallest squared distances to others.

    Args:
        distances: float64 [K, K], infinite on the diagonal.
        attackers: f, with K - f - 2 >= 1.
    """
    near = distances.shape[0] - attackers - 2
    scores: npt.NDArray[np.float64] = np.sort(distances, axis=1)[:, :near].sum(axis=1)
    return scores
