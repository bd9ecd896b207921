"""What every aggregation rule does."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from aggregator.arrival import Arrival
from aggregator.state import State


@dataclass(frozen=True, slots=True)
class Needs:
    """What a rule asks of the aggregator.

    Attributes:
        base: `fold` wants the weights the worker started from, so the store keeps them.
        start: workers begin from version 0, so the store keeps it.
    """

    base: bool = False
    start: bool = False


class Rule(Protocol):
    """Pure arithmetic: no clock, no I/O but reading `State.kept`; only the state is changed, in place."""

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
        """

    def advance(self, state: State) -> bool:
        """Make the next version if enough is buffered, in place; tell whether it did."""
