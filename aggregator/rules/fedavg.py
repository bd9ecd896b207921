"""FedAvg: synchronous rounds, the yardstick of every asynchronous rule."""

from dataclasses import dataclass

from aggregator.arrival import Arrival
from aggregator.rules.averaging import Stretch
from aggregator.state import State
from shared.errors import Reason, RejectedUpdate


@dataclass(frozen=True, slots=True)
class Rounds:
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
        buffer_size: K.
    """

    buffer_size: int
    kind: str = ""

    def factor(self, state: State, arrival: Arrival) -> float:
        """Take one update of each client."""
        client = arrival.update.client
        if state.contributions_of(client):
            raise RejectedUpdate(
                Reason.SURPLUS,
                f"{client} is in the round of version {state.version} already, with {len(state.buffer)} of "
                f"{self.buffer_size} updates: rule fedavg takes one of each worker",
            )
        return 1.0

    def folded(self, state: State, arrival: Arrival, mass: float) -> None:
        """The buffer itself remembers who is in the round."""

    def stretch(self, state: State) -> Stretch:
        """Step as far as the mean says."""
        return Stretch()
