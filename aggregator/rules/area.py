"""AREA: workers send how much their model moved since they last sent, and the server adds that up."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from aggregator.arrival import Arrival
from aggregator.rules.mean import SUM
from aggregator.rules.rule import Needs, begin_next_version, note
from aggregator.state import State
from shared.vector import add_scaled

START = Needs(start=True)


@dataclass(frozen=True, slots=True)
class Area:
    """Aggregation of everybody's latest model, with the memory at the workers.

        worker i:             sends y_new - y_mem;  y_mem <- y_mem + what of it arrives
        at K arrivals:        w_{v+1} = w_v + (1 / n) * sum(received)

    All y_mem begin at version 0, so that w = (1 / n) sum_i y_i holds after every version: each worker counts as much,
    however fast it is. Neither staleness weights nor a server_lr, which would break that sum; and it is exact only
    because an update is applied exactly once. A worker that never reports counts as version 0 does; one that loses its
    state folder, or a device beyond `clients`, counts twice from then on: keep FEDMQ_STATE_DIR, and give the right n.

    Use it: where slow workers hold data that no other has, the server may keep nothing of each worker, and their number
    is known. Memory: one vector of model size besides the weights; one at each worker.
    Source: AREA, AISTATS 2025, arXiv:2405.10123; `APPFL area_aggregator.py`.

    Attributes:
        buffer_size: K >= 1.
        clients: n >= 1.
    """

    buffer_size: int
    clients: int
    name: str = "area"
    buffer_kind: str = "area"
    sums: tuple[str, ...] = (SUM,)
    arrays: Mapping[str, float] = field(default_factory=dict)
    needs: Needs = START

    def fold(self, state: State, arrival: Arrival) -> float:
        """Add what the worker's model moved by."""
        arrival.delta.add_into(state.arrays[SUM], arrival.weight)
        return note(state, arrival, arrival.weight)

    def advance(self, state: State) -> bool:
        """Move the mean of all workers' models when K updates are buffered."""
        if len(state.buffer) < self.buffer_size:
            return False
        add_scaled(state.weights, state.arrays[SUM], 1.0 / self.clients)
        state.arrays[SUM].fill(0.0)
        return begin_next_version(state)
