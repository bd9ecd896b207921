"""FedAvg: synchronous rounds, the yardstick of every asynchronous rule."""

from collections.abc import Mapping
from dataclasses import dataclass

from aggregator.arrival import Arrival
from aggregator.rules.mean import Mean
from aggregator.rules.rule import NEEDS_NOTHING, Needs
from aggregator.server_optimizer import ServerOptimizer
from aggregator.state import State
from shared.errors import Reason, RejectedUpdate


@dataclass(frozen=True, slots=True)
class FedAvg:
    """Rounds of K workers, who all train from the same version.

        w_{v+1} = w_v + server_lr * sum_i n_i Delta_i / sum_i n_i        over K clients, n_i = 1 or num_samples

    The round is the open buffer: the settings refuse every update that is not trained from the newest version
    (staleness_max is 0), and a client's second update of a round is rejected as surplus. With server_lr 1 the new
    version is the mean of the workers' models. There must be K workers at work, or a round never ends; more than K
    are over-selection: the fastest K make the round, the others' work is refused as stale.

    Use it: as the baseline to compare with. Memory: one vector of model size besides the weights.
    Source: McMahan et al., "Communication-Efficient Learning of Deep Networks from Decentralized Data",
    arXiv:1602.05629, algorithm 1; with a server optimizer: Reddi et al., arXiv:2003.00295.

    Attributes:
        mean: of the round.
        optimizer: what steps along it.
        server_lr: eta_g > 0.
    """

    mean: Mean
    optimizer: ServerOptimizer
    server_lr: float
    name: str = "fedavg"
    needs: Needs = NEEDS_NOTHING

    @property
    def buffer_kind(self) -> str:
        """A round is of one client once, so no other rule's buffer can be continued as one."""
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
        """Add the delta to the round, unless its client is in it."""
        client = arrival.update.client
        if self.mean.repeats(state, client):
            raise RejectedUpdate(
                Reason.SURPLUS,
                f"{client} is in the round of version {state.version} already, with {len(state.buffer)} of "
                f"{self.mean.buffer_size} updates: rule fedavg takes one of each worker",
            )
        return self.mean.fold(state, arrival)

    def advance(self, state: State) -> bool:
        """End the round when K clients are in it."""
        if not self.mean.full(state):
            return False
        g = self.mean.take(state)
        self.optimizer.step(state, g.vector, g.scale, self.server_lr, g.staleness_weight)
        return self.mean.begin_next(state)
