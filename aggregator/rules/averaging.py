"""The rules that step along the mean of a buffer: one mechanism, and what each of them does besides."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from aggregator.arrival import Arrival
from aggregator.rules.mean import Mean
from aggregator.rules.rule import NEEDS_NOTHING, Needs
from aggregator.server_optimizer import ServerOptimizer
from aggregator.state import State


@dataclass(frozen=True, slots=True)
class Stretch:
    """What a step is multiplied with.

    Attributes:
        gradient: the pseudo-gradient, before the optimizer sees it.
        lr: the server_lr.
    """

    gradient: float = 1.0
    lr: float = 1.0


class Besides(Protocol):
    """What a rule does besides averaging. Pure: changes nothing but `State.facts`."""

    @property
    def kind(self) -> str:
        """How its open buffer differs from others of the same rule."""

    def factor(self, state: State, arrival: Arrival) -> float:
        """Return the rule's own factor of an update; changes nothing.

        Raises:
            RejectedUpdate: the rule cannot use it.
        """

    def folded(self, state: State, arrival: Arrival, mass: float) -> None:
        """Note an update that was folded.

        Args:
            state: its facts may be changed.
            arrival: the update.
            mass: its share in the divisor; 0 for a repeat that does not count.
        """

    def stretch(self, state: State) -> Stretch:
        """Return what the step of a full buffer is multiplied with; its own facts of the buffer may go."""


@dataclass(frozen=True, slots=True)
class Nothing:
    """Plain averaging."""

    kind: str = ""

    def factor(self, state: State, arrival: Arrival) -> float:
        """Take each update as it is."""
        return 1.0

    def folded(self, state: State, arrival: Arrival, mass: float) -> None:
        """Remember nothing."""

    def stretch(self, state: State) -> Stretch:
        """Step as far as the mean says."""
        return Stretch()


@dataclass(frozen=True, slots=True)
class Averaging:
    """A buffer of K updates, then a step along their mean.

        on arrival:        sum <- sum + s(tau_i) * factor_i * Delta_i
        at K arrivals:     g = stretch.gradient * sum / K;   the optimizer steps along g with stretch.lr * server_lr

    Memory: one vector of model size besides the weights and the optimizer's; see `Mean` for combiners.

    Attributes:
        name: in the registry.
        mean: of the buffer.
        optimizer: what steps along it.
        server_lr: eta_g > 0.
        besides: what the rule does besides.
    """

    name: str
    mean: Mean
    optimizer: ServerOptimizer
    server_lr: float
    besides: Besides = Nothing()
    needs: Needs = NEEDS_NOTHING

    @property
    def buffer_kind(self) -> str:
        """Sums of different rules do not mix, nor with and without sample weights, nor sums and kept updates."""
        return self.name + self.besides.kind + self.mean.kind

    @property
    def sums(self) -> tuple[str, ...]:
        """The running sum."""
        return self.mean.sums

    @property
    def arrays(self) -> Mapping[str, float]:
        """What optimizer and combiner remember."""
        return {**self.optimizer.arrays, **self.mean.arrays}

    def fold(self, state: State, arrival: Arrival) -> float:
        """Add the weighted delta to the running sum."""
        factor, mass = self.besides.factor(state, arrival), self.mean.mass_of(state, arrival)
        weight = self.mean.fold(state, arrival, factor)
        self.besides.folded(state, arrival, mass)
        return weight

    def advance(self, state: State) -> bool:
        """Step when K updates are buffered."""
        if not self.mean.full(state):
            return False
        g, stretch = self.mean.take(state), self.besides.stretch(state)
        self.optimizer.step(
            state, g.vector, stretch.gradient * g.scale, stretch.lr * self.server_lr, g.staleness_weight
        )  # fmt: skip
        return self.mean.begin_next(state)
