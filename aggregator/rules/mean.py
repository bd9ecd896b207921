"""The mean of a buffer, which most rules step along: as a running sum, or update by update for a robust combiner."""

import logging
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from aggregator.arrival import Arrival
from aggregator.record import read_record, write_record
from aggregator.robust import Combiner, Rows
from aggregator.rules.rule import begin_next_version, note
from aggregator.staleness import constant
from aggregator.state import State
from shared.vector import Vector

log = logging.getLogger("fedmq.aggregator")

SUM = "delta_sum"


@dataclass(frozen=True, slots=True)
class Gradient:
    """The pseudo-gradient of a full buffer: g = scale * vector.

    Attributes:
        vector: float32 [n], in the state or of the combiner.
        scale: factor, 1 / divisor where `vector` is a sum.
        staleness_weight: mean of s(tau) in the buffer.
    """

    vector: Vector
    scale: float
    staleness_weight: float


@dataclass(frozen=True, slots=True)
class Mean:
    """What a buffer of K updates comes to.

        g = sum_i w_i n_i Delta_i / sum_i n_i          n_i = 1, or num_samples; w_i = s(tau_i) and what guards leave

    The divisor is K (sum n_i), not the sum of the weights: a buffer of stale updates takes a smaller step.

    Without a combiner the deltas are added up as they come, and none is kept: one vector of model size. A combiner
    needs them one by one: each is kept as it came, in the store (`slot:<place in the buffer>`), and the full buffer
    becomes a matrix [K, n] whose rows w_i n_i K / sum n_i * Delta_i have the mean above; memory: K vectors.

    With `distinct` the buffer is full when K different clients are in it. A further update of one of them, which the
    guard has weighed down, is added and counts neither for that nor in the divisor (mass 0): however often a client
    sends, it neither fills the buffer nor dilutes the others.

    Attributes:
        buffer_size: K >= 1.
        by_samples: weigh each update by its num_samples.
        distinct: count clients, not updates.
        combiner: takes the mean's place.
        weigh: s(tau) as the aggregator weighs, for optimizers that must know how stale g is.
    """

    buffer_size: int
    by_samples: bool = False
    distinct: bool = False
    combiner: Combiner | None = None
    weigh: Callable[[int], float] = constant

    @property
    def kind(self) -> str:
        """How an open buffer of it differs from others of the same rule."""
        return " by samples" * self.by_samples + " of kept updates" * (self.combiner is not None)

    @property
    def sums(self) -> tuple[str, ...]:
        """The running sum, unless updates are kept."""
        return (SUM,) if self.combiner is None else ()

    @property
    def arrays(self) -> dict[str, float]:
        """What the combiner remembers."""
        return {} if self.combiner is None else dict(self.combiner.arrays)

    def mass_of(self, state: State, arrival: Arrival) -> float:
        """Return the share in the divisor that an update is going to have."""
        if self.distinct and state.contributions_of(arrival.update.client):
            return 0.0
        return self._share(arrival)

    def fold(self, state: State, arrival: Arrival, factor: float = 1.0) -> float:
        """Add an update; return the factor its delta was given.

        Args:
            state: changed in place.
            arrival: the update.
            factor: of the rule's own, besides the weight.
        """
        mass = self.mass_of(state, arrival)
        weight = arrival.weight * self._share(arrival) * factor
        if self.combiner is None:
            arrival.delta.add_into(state.arrays[SUM], weight)
        else:
            self._keep(state, arrival, fills=self._counted(state) + (mass > 0) >= self.buffer_size)
        return note(state, arrival, weight, mass)

    def full(self, state: State) -> bool:
        """Tell whether the buffer holds K updates, or K clients."""
        return len(state.buffer) >= self.buffer_size and self._counted(state) >= self.buffer_size

    def take(self, state: State) -> Gradient:
        """Return the pseudo-gradient of a full buffer."""
        masses = [contribution.mass for contribution in state.buffer]
        divisor = sum(masses)
        freshness = sum(c.mass * self.weigh(c.staleness) for c in state.buffer) / divisor
        if self.combiner is None:
            return Gradient(state.arrays[SUM], 1.0 / divisor, freshness)
        return Gradient(self.combiner.combine(state, self._rows(state, divisor)), 1.0, freshness)

    def begin_next(self, state: State) -> bool:
        """Empty the buffer and count one version up; return True."""
        if self.combiner is None:
            state.arrays[SUM].fill(0.0)
        for place in range(len(state.buffer)):
            state.kept.drop(f"slot:{place}")
        return begin_next_version(state)

    def _share(self, arrival: Arrival) -> float:
        return float(arrival.update.num_samples) if self.by_samples else 1.0

    def _counted(self, state: State) -> int:
        return sum(contribution.mass > 0 for contribution in state.buffer)

    def _keep(self, state: State, arrival: Arrival, fills: bool) -> None:
        """Keep an update as it came; if it fills the buffer, have all at hand, as `advance` must not read."""
        names = [f"slot:{place}" for place in range(len(state.buffer))] if fills else []
        records = {name: state.kept.get(name) for name in names}  # all reading before any change
        for name, record in records.items():
            if record is None:
                log.error("%s of the open buffer is not stored; it counts as zero", name)
            else:
                state.kept.put(name, record)
        state.kept.put(f"slot:{len(state.buffer)}", write_record(arrival.update.codec, arrival.update.payload))

    def _rows(self, state: State, divisor: float) -> Rows:
        """Decode the kept updates into float32 [K, n]."""
        rows = np.zeros((len(state.buffer), state.weights.size), np.float32)
        for place, contribution in enumerate(state.buffer):
            record = state.kept.get(f"slot:{place}")
            if record is not None:
                delta = read_record(record, state.model.layout)
                delta.add_into(rows[place], contribution.weight * len(rows) / divisor)
        return rows
