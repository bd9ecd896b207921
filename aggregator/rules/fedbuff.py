"""FedBuff: average K updates, then step."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from aggregator.arrival import Arrival
from aggregator.rules.rule import Needs
from aggregator.server_optimizer import sgd
from aggregator.state import Contribution, State


@dataclass(frozen=True, slots=True)
class FedBuff:
    """Buffered asynchronous aggregation.

        on arrival:        sum <- sum + s(tau_i) * Delta_i
        at K arrivals:     w_{v+1} = w_v + server_lr * sum / K;  sum <- 0

    The divisor is K, not the sum of the weights: a buffer of stale updates takes a smaller step. With
    `weight_by_samples`, Delta_i also counts n_i times and the divisor is sum n_i.

    Use it: by default. Memory: one vector of model size besides the weights.
    Source: Nguyen et al., "Federated Learning with Buffered Asynchronous Aggregation", arXiv:2106.06639, alg. 1.

    Attributes:
        buffer_size: K >= 1.
        server_lr: eta_g > 0.
        weight_by_samples: weigh each update by its num_samples.
    """

    buffer_size: int
    server_lr: float
    weight_by_samples: bool = False
    name: str = "fedbuff"
    sums: tuple[str, ...] = ("delta_sum",)
    arrays: Mapping[str, float] = field(default_factory=dict)
    needs: Needs = Needs()

    @property
    def buffer_kind(self) -> str:
        """Sums with and without sample weights do not mix."""
        return "fedbuff by samples" if self.weight_by_samples else "fedbuff"

    def fold(self, state: State, arrival: Arrival) -> float:
        """Add the weighted delta to the running sum."""
        mass = float(arrival.update.num_samples) if self.weight_by_samples else 1.0
        weight = arrival.weight * mass
        arrival.delta.add_into(state.arrays["delta_sum"], weight)
        state.buffer.append(Contribution(arrival.update.update_id, arrival.staleness, weight, mass))
        return weight

    def advance(self, state: State) -> bool:
        """Step when K updates are buffered."""
        if len(state.buffer) < self.buffer_size:
            return False
        divisor = sum(contribution.mass for contribution in state.buffer)
        sgd(state.weights, state.arrays["delta_sum"], divisor, self.server_lr)
        state.arrays["delta_sum"].fill(0.0)
        state.buffer.clear()
        state.version += 1
        return True
