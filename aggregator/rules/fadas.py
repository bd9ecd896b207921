"""FADAS: an adaptive server whose steps shrink with the worst delay of a buffer."""

from collections.abc import Mapping
from dataclasses import dataclass

from aggregator.arrival import Arrival
from aggregator.rules.mean import Mean
from aggregator.rules.rule import NEEDS_NOTHING, Needs
from aggregator.server_optimizer import Adaptive
from aggregator.state import State


@dataclass(frozen=True, slots=True)
class Fadas:
    """AMSGrad on the mean of K deltas, with a delay-adaptive step.

        g = (1 / K) sum_i Delta_i
        m <- beta1 m + (1 - beta1) g;   v <- beta2 v + (1 - beta2) g^2;   vh <- max(vh, v)
        w_{v+1} = w_v + eta_t m / (sqrt(vh) + epsilon)
        eta_t = server_lr                        if tau_max <= delay,   tau_max the largest staleness in the buffer
              = server_lr / tau_max              otherwise

    No staleness weights and no bias correction. The division by tau_max is the authors' code; their theorem has
    min(eta, 1 / tau_max). tau is counted before the version moves, and deltas are relative to what each worker
    started from; their code misses one version for all but one worker of a buffer.

    Use it: transformers and other models that want Adam, with large and uneven delays. Memory: four vectors of model
    size besides the weights.
    Source: Wang et al., "FADAS: Towards Federated Adaptive Asynchronous Optimization", ICML 2024, arXiv:2407.18365;
    `yujiaw98/FADAS g_delay_adaptive.py`.

    Attributes:
        mean: of the buffer.
        optimizer: AMSGrad.
        server_lr: eta > 0; a step is about that for every weight.
        delay: tau_c >= 0, staleness that costs nothing, versions.
    """

    mean: Mean
    optimizer: Adaptive
    server_lr: float
    delay: float
    name: str = "fadas"
    needs: Needs = NEEDS_NOTHING

    @property
    def buffer_kind(self) -> str:
        """Its sum is unweighted."""
        return self.name + self.mean.kind

    @property
    def sums(self) -> tuple[str, ...]:
        """The running sum."""
        return self.mean.sums

    @property
    def arrays(self) -> Mapping[str, float]:
        """The averages m, v and the largest v; what a combiner remembers."""
        return {**self.optimizer.arrays, **self.mean.arrays}

    def fold(self, state: State, arrival: Arrival) -> float:
        """Add the delta to the running sum."""
        return self.mean.fold(state, arrival)

    def advance(self, state: State) -> bool:
        """Step when K updates are buffered."""
        if not self.mean.full(state):
            return False
        g = self.mean.take(state)
        longest = max(contribution.staleness for contribution in state.buffer)
        lr = self.server_lr if longest <= self.delay else self.server_lr / longest
        self.optimizer.step(state, g.vector, g.scale, lr, g.staleness_weight)
        return self.mean.begin_next(state)
