"""Guards that bound an update's norm: one huge update must not undo the work of many."""

import math
from statistics import median

from aggregator.arrival import Arrival
from aggregator.state import State

NORMS = "norms"  # of `State.facts`
NORMS_MIN = 10  # a median of fewer says little


class NormLimit:
    """Scale down what is longer than a fixed limit: factor = min(1, C / ||g||).

    Source: Sun et al., "Can You Really Backdoor Federated Learning?", arXiv:1911.07963, norm bounding.

    Args:
        limit: C > 0, a norm of deltas.
    """

    def __init__(self, limit: float) -> None:
        self._limit = limit

    def weigh(self, state: State, arrival: Arrival) -> float:
        """Return the factor, in (0, 1]."""
        return factor_to(self._limit, norm_of(arrival))

    def applied(self, state: State, arrival: Arrival) -> None:
        """Nothing is remembered."""


class NormMedian:
    """Scale down what is longer than updates usually are: factor = min(1, C / ||g||), C = a * median of the last W.

    The norms are those of updates that were applied, after the clipping: an attacker raises the median by at most
    the factor a in the time it takes him to send half of a window (`one_slot` makes that long). Norms of zero are
    not remembered: a window of them would clip everything to nothing for good.

    There is NO bound before 10 norms are known, in a new job; put `norm(limit)` before it to bound those too.

    Source: the median of accepted norms as the limit, algorithms notes, section 4; after arXiv:1911.07963.

    Args:
        factor: a > 0; 1.5 to 2 leaves honest updates alone.
        window: W >= 10, updates.
    """

    def __init__(self, factor: float, window: int) -> None:
        self._factor, self._window = factor, window
        self._clipped = 0.0  # norm of the update last weighed

    def weigh(self, state: State, arrival: Arrival) -> float:
        """Return the factor, in (0, 1]."""
        norms, norm = state.facts.get(NORMS, ()), norm_of(arrival)
        left = 1.0 if len(norms) < NORMS_MIN else factor_to(self._factor * median(norms), norm)
        self._clipped = left * norm
        return left

    def applied(self, state: State, arrival: Arrival) -> None:
        """Remember the clipped norm of the update that `weigh` saw last."""
        if self._clipped > 0:
            state.facts[NORMS] = [*state.facts.get(NORMS, ()), self._clipped][-self._window :]


def norm_of(arrival: Arrival) -> float:
    """Return the norm of what is left of an update: weight * ||delta||; infinite where its square is."""
    return arrival.weight * math.sqrt(arrival.delta.squared_norm())


def factor_to(limit: float, norm: float) -> float:
    """Return min(1, limit / norm).

    Args:
        limit: > 0.
        norm: >= 0.
    """
    return 1.0 if norm <= limit else limit / norm
