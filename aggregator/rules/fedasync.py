"""FedAsync: every update moves the model towards the worker's own."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from aggregator.arrival import Arrival
from aggregator.rules.rule import Needs
from aggregator.state import Contribution, State
from shared.vector import mix


@dataclass(frozen=True, slots=True)
class FedAsync:
    """Asynchronous mixing, in its exact form.

        w_{v+1} = (1 - a) w_v + a (w_base + Delta),   a = alpha * s(tau)

    w_base are the weights the worker started from, so a stale update also pulls the model back towards them.

    Use it: when single updates must show at once; FedBuff is steadier. Memory: none besides the weights; the
    aggregator keeps the last few base versions at hand and the store keeps staleness_max of them.
    Source: Xie, Koyejo, Gupta, "Asynchronous Federated Optimization", arXiv:1903.03934, algorithm 1.

    Attributes:
        alpha: mixing weight of a fresh update, in (0, 1].
    """

    alpha: float
    name: str = "fedasync"
    buffer_kind: str = "fedasync"
    sums: tuple[str, ...] = ()
    arrays: Mapping[str, float] = field(default_factory=dict)
    needs: Needs = Needs(base=True)

    def fold(self, state: State, arrival: Arrival) -> float:
        """Mix the worker's model in."""
        if arrival.base is None:
            raise ValueError(f"FedAsync needs the weights of version {arrival.update.base_version}")
        alpha = self.alpha * arrival.weight
        mix(state.weights, arrival.base, alpha)
        arrival.delta.add_into(state.weights, alpha)
        state.buffer.append(Contribution(arrival.update.update_id, arrival.staleness, alpha, 1.0))
        return alpha

    def advance(self, state: State) -> bool:
        """Each update is a version."""
        if not state.buffer:
            return False
        state.buffer.clear()
        state.version += 1
        return True
