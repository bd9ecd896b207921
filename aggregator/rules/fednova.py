"""FedNova: average what workers learned per local step."""

import math
from dataclasses import dataclass

from aggregator.arrival import Arrival
from aggregator.rules.averaging import Stretch
from aggregator.state import State

STEPS = "fednova_steps"  # sum of n_i a_i over the open buffer, n_i = 1 unless by samples


def effective_steps(num_steps: int, momentum: float = 0.0, proximal: float = 0.0) -> float:
    """Return by how many gradients' worth a worker's delta is long: the 1-norm of its accumulation vector.

        plain SGD            a = Q
        momentum m           a = [Q - m (1 - m^Q) / (1 - m)] / (1 - m)
        proximal, p = lr mu  a = [1 - (1 - p)^Q] / p          which is a <- (1 - p) a + 1, Q times from 0

    Args:
        num_steps: Q >= 1.
        momentum: m of the local SGD, in [0, 0.9999].
        proximal: p, local lr times mu, in [0, 1); 0: none.

    Returns:
        a in [1, inf); 1 for a single step.

    Source: Wang et al., arXiv:2007.07481, section 4.
    """
    if proximal:
        return -math.expm1(num_steps * math.log1p(-proximal)) / proximal
    return (num_steps - momentum * (1 - momentum**num_steps) / (1 - momentum)) / (1 - momentum)


@dataclass(frozen=True, slots=True)
class PerStep:
    """Normalised averaging, for workers that take different numbers of local steps.

        d_i = Delta_i / a_i;    w_{v+1} = w_v + server_lr * tau_eff * sum_i p_i s(tau_i) d_i

    over a buffer of K, with p_i = 1 / K or n_i / sum n, and a_i what num_steps of the update come to
    (`effective_steps`). tau_eff is `steps` if that is given, else the buffer's own sum p_i a_i. Why: in FedBuff a
    worker that took ten times the steps pulls ten times as hard, and the job ends at another objective than the sum of
    theirs.

    Use it: where workers train as many steps as they manage, and their data differ. Fix `steps` for a steady step
    length. Memory: as FedBuff, and one number for the open buffer.
    Source: Wang et al., "Tackling the Objective Inconsistency Problem in Heterogeneous Federated Optimization",
    arXiv:2007.07481; `JYWa/FedNova distoptim/FedNova.py`.

    Attributes:
        steps: tau_eff; 0: the mean of the buffer's own.
        momentum: of the workers' SGD, in [0, 0.9999].
        proximal: the workers' lr times mu, in [0, 1); not together with momentum.
    """

    steps: float = 0.0
    momentum: float = 0.0
    proximal: float = 0.0

    @property
    def kind(self) -> str:
        """The sum holds deltas divided by what momentum and the proximal term make of their steps."""
        return f"(momentum={self.momentum:g}, proximal={self.proximal:g})"

    def factor(self, state: State, arrival: Arrival) -> float:
        """Take the delta per effective step."""
        return 1.0 / self._effective(arrival)

    def folded(self, state: State, arrival: Arrival, mass: float) -> None:
        """Add up the steps."""
        state.facts[STEPS] = state.facts.get(STEPS, 0.0) + mass * self._effective(arrival)

    def stretch(self, state: State) -> Stretch:
        """Step tau_eff times the mean of d_i."""
        own = state.facts.pop(STEPS) / sum(contribution.mass for contribution in state.buffer)
        return Stretch(gradient=self.steps or own)

    def _effective(self, arrival: Arrival) -> float:
        return effective_steps(arrival.update.num_steps, self.momentum, self.proximal)
