"""FedNova: average what workers learned per local step."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from aggregator.arrival import Arrival
from aggregator.rules.mean import Mean
from aggregator.rules.rule import NEEDS_NOTHING, Needs
from aggregator.server_optimizer import ServerOptimizer
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
class FedNova:
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
        mean: of the buffer.
        optimizer: what steps along tau_eff times the mean of d_i.
        server_lr: eta_g > 0.
        steps: tau_eff; 0: the mean of the buffer's own.
        momentum: of the workers' SGD, in [0, 0.9999].
        proximal: the workers' lr times mu, in [0, 1); not together with momentum.
    """

    mean: Mean
    optimizer: ServerOptimizer
    server_lr: float
    steps: float = 0.0
    momentum: float = 0.0
    proximal: float = 0.0
    name: str = "fednova"
    needs: Needs = NEEDS_NOTHING

    @property
    def buffer_kind(self) -> str:
        """The sum holds deltas divided by what momentum and the proximal term make of their steps."""
        return f"{self.name}(momentum={self.momentum:g}, proximal={self.proximal:g}){self.mean.kind}"

    @property
    def sums(self) -> tuple[str, ...]:
        """The running sum of s(tau_i) n_i d_i."""
        return self.mean.sums

    @property
    def arrays(self) -> Mapping[str, float]:
        """What optimizer and combiner remember."""
        return {**self.optimizer.arrays, **self.mean.arrays}

    def fold(self, state: State, arrival: Arrival) -> float:
        """Add the delta per effective step to the running sum."""
        steps = effective_steps(arrival.update.num_steps, self.momentum, self.proximal)
        mass = self.mean.mass_of(state, arrival)
        weight = self.mean.fold(state, arrival, 1.0 / steps)
        state.facts[STEPS] = state.facts.get(STEPS, 0.0) + mass * steps
        return weight

    def advance(self, state: State) -> bool:
        """Step when K updates are buffered."""
        if not self.mean.full(state):
            return False
        g = self.mean.take(state)
        own = state.facts.pop(STEPS) / sum(contribution.mass for contribution in state.buffer)
        stretch = self.steps or own
        self.optimizer.step(state, g.vector, stretch * g.scale, self.server_lr, g.staleness_weight)
        return self.mean.begin_next(state)
