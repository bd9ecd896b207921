"""What every aggregation rule does."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from aggregator.arrival import Arrival
from aggregator.state import Contribution, State


@dataclass(frozen=True, slots=True)
class Needs:
    """What a rule asks of the aggregator.

    Attributes:
        base: `fold` wants the weights the worker started from, so the store keeps them.
        start: workers begin from version 0, so the store keeps it.
    """

    base: bool = False
    start: bool = False


NEEDS_NOTHING = Needs()


class Rule(Protocol):
    """Pure arithmetic: no clock, no I/O but reading `State.kept`; only the state is changed, in place.

    A read of `State.kept` may find no server. So all reading is done in `fold`, before anything is changed: the same
    update is then folded again. `advance` does not read.
    """

    @property
    def name(self) -> str:
        """Its name in the registry."""

    @property
    def buffer_kind(self) -> str:
        """What its open buffer is a sum of: one of another kind must not be continued."""

    @property
    def sums(self) -> tuple[str, ...]:
        """Model-size vectors of `State.arrays` that are zero while the buffer is empty."""

    @property
    def arrays(self) -> Mapping[str, float]:
        """Model-size vectors of `State.arrays` that last, and what they are filled with at first."""

    @property
    def needs(self) -> Needs:
        """What it asks of the aggregator."""

    def fold(self, state: State, arrival: Arrival) -> float:
        """Take one update in, in place.

        Args:
            state: changed in place; its version is not yet moved.
            arrival: the update.

        Returns:
            The factor the delta was given, for the ledger.

        Raises:
            RejectedUpdate: this rule cannot use it; then nothing was changed.
            StoreUnavailable: the store did not answer; then nothing was changed.
        """

    def advance(self, state: State) -> bool:
        """Make the next version if enough is buffered, in place; tell whether it did."""


def note(state: State, arrival: Arrival, weight: float, mass: float = 1.0) -> float:
    """Write an update into the open buffer; return its weight.

    Args:
        state: changed.
        arrival: the update.
        weight: factor its delta was given.
        mass: its share in the divisor.
    """
    state.buffer.append(Contribution(arrival.update.update_id, arrival.staleness, weight, mass))
    return weight


def begin_next_version(state: State) -> bool:
    """Close the open buffer and count one version up; return True."""
    state.buffer.clear()
    state.version += 1
    return True
