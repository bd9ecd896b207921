"""FedAsync: every update moves the model towards the worker's own."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from aggregator.arrival import Arrival
from aggregator.rules.rule import Needs, begin_next_version, note
from aggregator.state import State
from shared.vector import mix

BASE = Needs(base=True)


@dataclass(frozen=True, slots=True)
class FedAsync:
    """Asynchronous mixing, in its exact form.

        w_{v+1} = (1 - a) w_v + a (w_base + Delta),   a = min(1, alpha * s(tau))

    w_base are the weights the worker started from, so a stale update also pulls the model back towards them. A guard
    may scale s(tau) up, but never beyond the worker's own model.

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
    needs: Needs = BASE

    def fold(self, state: State, arrival: Arrival) -> float:
        """Mix the worker's model in."""
        if arrival.base is None:
            raise ValueError(f"FedAsync needs the weights of version {arrival.update.base_version}")
        alpha = min(1.0, self.alpha * arrival.weight)
        mix(state.weights, arrival.base, alpha)
        arrival.delta.add_into(state.weights, alpha)
        return note(state, arrival, alpha)

    def advance(self, state: State) -> bool:
        """Each update is a version."""
        return bool(state.buffer) and begin_next_version(state)
