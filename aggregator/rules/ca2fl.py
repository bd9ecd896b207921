"""CA2FL: a buffer of K updates, calibrated with what all other workers sent last."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from aggregator.arrival import Arrival
from aggregator.rules.mean import SUM
from aggregator.rules.memory import Memory
from aggregator.rules.rule import NEEDS_NOTHING, Needs, begin_next_version, note
from aggregator.server_optimizer import ServerOptimizer
from aggregator.state import State
from shared.vector import BLOCK_ELEMENTS, Vector

CACHED = "ca2fl_cached"  # H = sum_i h_i: a sum, so that `clients` may change


def calibrate(total: Vector, cached: Vector, updates: int, clients: int) -> None:
    """Turn the sum of differences into the calibrated direction, and bring the sum of caches up to date.

        total  <- cached / n + total / K;       cached <- cached + total (as it was)

    Args:
        total: float32 [num_params], sum of Delta_i - h_i over the buffer; becomes v; changed in place.
        cached: float32 [num_params], sum of h_i as of before the buffer; changed in place.
        updates: K.
        clients: n.
    """
    scratch = np.empty((2, min(BLOCK_ELEMENTS, total.size)), np.float32)
    for start in range(0, total.size, BLOCK_ELEMENTS):
        s, h = total[start : start + BLOCK_ELEMENTS], cached[start : start + BLOCK_ELEMENTS]
        mean, difference = scratch[0, : s.size], scratch[1, : s.size]
        np.multiply(h, np.float32(1 / clients), out=mean)
        np.multiply(s, np.float32(1 / updates), out=difference)
        np.add(h, s, out=h)
        np.add(mean, difference, out=s)


@dataclass(frozen=True, slots=True)
class Ca2fl:
    """Cached update calibration.

        on arrival:       sum <- sum + Delta_i - h_i;   h_i <- Delta_i                (h_i = 0 at first)
        at K arrivals:    v = hbar + sum / K;   w <- w + server_lr * v;   hbar <- hbar + sum / n;   sum <- 0

    with hbar = (1 / n) sum_i h_i as of before the buffer. v is the mean over all n workers of what each sent last, but
    for the noise of which K came: workers that report seldom count as much as others. A client's second update in one
    buffer is calibrated by its first. No staleness weights.

    Use it: non-IID data and up to some thousand workers whose number is known. Try a server_lr below 1: old caches
    answer slowly. Memory: two vectors of model size besides the weights; in the store one int8 update of each client.
    Source: Wang et al., "Tackling the Data Heterogeneity in Asynchronous Federated Learning with Cached Update
    Calibration", ICLR 2024, algorithm 2.

    Attributes:
        memory: of the caches h_i.
        optimizer: what steps along v.
        buffer_size: K >= 1.
        server_lr: eta_g > 0.
    """

    memory: Memory
    optimizer: ServerOptimizer
    buffer_size: int
    server_lr: float
    name: str = "ca2fl"
    buffer_kind: str = "ca2fl"
    sums: tuple[str, ...] = (SUM,)
    needs: Needs = NEEDS_NOTHING

    @property
    def arrays(self) -> Mapping[str, float]:
        """The sum of all caches; what the optimizer remembers."""
        return {**self.optimizer.arrays, CACHED: 0.0}

    def fold(self, state: State, arrival: Arrival) -> float:
        """Add what is new in the update, and cache it."""
        exchange = self.memory.exchange(state, arrival)
        exchange.new.add_into(state.arrays[SUM], 1.0)
        if exchange.own is not None:
            exchange.own.add_into(state.arrays[SUM], -1.0)
        for delta in exchange.displaced:
            delta.add_into(state.arrays[CACHED], -1.0)
        return note(state, arrival, arrival.weight)

    def advance(self, state: State) -> bool:
        """Step along the calibrated direction when K updates are buffered."""
        if len(state.buffer) < self.buffer_size:
            return False
        direction = state.arrays[SUM]
        calibrate(direction, state.arrays[CACHED], len(state.buffer), self.memory.clients)
        self.optimizer.step(state, direction, 1.0, self.server_lr, 1.0)
        direction.fill(0.0)
        return begin_next_version(state)
