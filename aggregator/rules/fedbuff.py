"""FedBuff: average K updates, then step."""

from collections.abc import Mapping
from dataclasses import dataclass

from aggregator.arrival import Arrival
from aggregator.rules.mean import Mean
from aggregator.rules.rule import NEEDS_NOTHING, Needs
from aggregator.server_optimizer import ServerOptimizer
from aggregator.state import State


@dataclass(frozen=True, slots=True)
class FedBuff:
    """Buffered asynchronous aggregation.

        on arrival:        sum <- sum + s(tau_i) * Delta_i
        at K arrivals:     w_{v+1} = w_v + server_lr * sum / K;  sum <- 0

    or, instead of adding server_lr * g, whatever the server optimizer does with g = sum / K. The divisor is K, not
    the sum of the weights: a buffer of stale updates takes a smaller step. With `weight_by_samples`, Delta_i also
    counts n_i times and the divisor is sum n_i.

    Use it: by default. Memory: one vector of model size besides the weights and the optimizer's.
    Source: Nguyen et al., "Federated Learning with Buffered Asynchronous Aggregation", arXiv:2106.06639, alg. 1.

    Attributes:
        mean: of the buffer.
        optimizer: what steps along it.
        server_lr: eta_g > 0.
    """

    mean: Mean
    optimizer: ServerOptimizer
    server_lr: float
    name: str = "fedbuff"
    needs: Needs = NEEDS_NOTHING

    @property
    def buffer_kind(self) -> str:
        """Sums with and without sample weights do not mix, nor do sums and kept updates."""
        return self.name + self.mean.kind

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
        return self.mean.fold(state, arrival)

    def advance(self, state: State) -> bool:
        """Step when K updates are buffered."""
        if not self.mean.full(state):
            return False
        g = self.mean.take(state)
        self.optimizer.step(state, g.vector, g.scale, self.server_lr, g.staleness_weight)
        return self.mean.begin_next(state)
