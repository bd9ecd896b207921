"""What every aggregation rule does."""

from typing import Protocol

from aggregator.state import State
from shared.compression import Decoded
from shared.messages import Update
from shared.vector import Vector


class Rule(Protocol):
    """Pure arithmetic: no clock, no I/O; only the vectors of the state are changed in place."""

    @property
    def name(self) -> str:
        """Its name in the registry."""

    @property
    def buffer_kind(self) -> str:
        """What its open buffer is a sum of: one of another kind must not be continued."""

    @property
    def arrays(self) -> tuple[str, ...]:
        """Model-size vectors it keeps in `State.arrays`, zero at first."""

    @property
    def needs_base(self) -> bool:
        """Whether `fold` wants the weights the worker started from."""

    def fold(
        self, state: State, update: Update, delta: Decoded, staleness: int, weight: float, base: Vector | None
    ) -> float:
        """Take one update in, in place.

        Args:
            state: changed in place; its version is not yet moved.
            update: the message, for its counts.
            delta: the update's delta, still compressed.
            staleness: tau in versions, >= 0.
            weight: s(tau) in (0, 1].
            base: float32 [n], weights of `update.base_version`, where `needs_base`.

        Returns:
            The factor the delta was given, for the ledger.
        """

    def advance(self, state: State) -> bool:
        """Make the next version if enough is buffered, in place; tell whether it did."""
