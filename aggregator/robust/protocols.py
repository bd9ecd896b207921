"""What every defence does."""

from collections.abc import Mapping
from typing import Protocol

import numpy as np
import numpy.typing as npt

from aggregator.arrival import Arrival
from aggregator.state import State
from shared.vector import Vector

Rows = npt.NDArray[np.float32]  # [updates, n]


class Guard(Protocol):
    """Looks at one update before the rule does."""

    def weigh(self, state: State, arrival: Arrival) -> float:
        """Return what is left of the update, a factor; changes nothing.

        Args:
            state: before the update.
            arrival: the update; `weight` is what the guards before left of it, without its staleness, so that
                weight * delta is what this one judges.

        Returns:
            In [0, 1], or above 1 where the update is scaled up to a known norm.

        Raises:
            RejectedUpdate: it is not used at all.
        """

    def applied(self, state: State, arrival: Arrival) -> None:
        """Note that the update this guard weighed last was taken in; changes `State.facts` at most.

        What is rejected later, by another guard or by the rule, must leave no trace: it costs nothing to send.
        """


class Combiner(Protocol):
    """Takes the place of the mean over a buffer."""

    @property
    def arrays(self) -> Mapping[str, float]:
        """Model-size vectors of `State.arrays` it keeps, and what they are filled with at first."""

    def combine(self, state: State, rows: Rows) -> Vector:
        """Return what stands for all rows.

        Args:
            state: its own arrays may be changed in place.
            rows: float32 [updates, n], weighed deltas whose mean the rule would take; may be overwritten.

        Returns:
            float32 [n]; may be a view into `rows`.
        """
