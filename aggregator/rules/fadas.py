"""FADAS: an adaptive server whose steps shrink with the worst delay of a buffer."""

from dataclasses import dataclass

from aggregator.arrival import Arrival
from aggregator.rules.averaging import Stretch
from aggregator.state import State


@dataclass(frozen=True, slots=True)
class DelayAdaptive:
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
        delay: tau_c >= 0, staleness that costs nothing, versions.
    """

    delay: float
    kind: str = ""

    def factor(self, state: State, arrival: Arrival) -> float:
        """Take each update as it is."""
        return 1.0

    def folded(self, state: State, arrival: Arrival, mass: float) -> None:
        """The buffer itself remembers the staleness."""

    def stretch(self, state: State) -> Stretch:
        """Divide the step by the largest staleness, if that is beyond the delay."""
        longest = max(contribution.staleness for contribution in state.buffer)
        return Stretch(lr=1.0 if longest <= self.delay else 1.0 / longest)
