"""Rescaled: every worker gets the same say, however often it sends."""

from dataclasses import dataclass
from typing import Any

from aggregator.arrival import Arrival
from aggregator.rules.averaging import Stretch
from aggregator.state import State

INTERVALS = "rescaled"
TABLE_ENTRIES_MAX = 10_000  # clients remembered where their number is not given


@dataclass(frozen=True, slots=True)
class Interval:
    """What a client's next update changes in the table.

    Attributes:
        length: T_i, in updates of the whole fleet; 0: not known yet.
        before: T_i until now; 0: was not known.
    """

    length: float
    before: float


@dataclass(frozen=True, slots=True)
class Rescaled:
    """FedBuff with weights against participation bias.

        T_i <- (1 - smoothing) T_i + smoothing * (updates the fleet had accepted since client i's last one)
        w_i  = T_i / mean_j T_j, in [1 / weight_max, weight_max]
        g    = (1 / K) sum_i w_i s(tau_i) Delta_i

    A worker that is twice as fast sends twice as often and counts half each time. T_i is counted in accepted updates,
    not seconds: it does not depend on the aggregator's pace, and a replay gives the same. Weight 1 for a client that
    was seen once; the mean is over all that have been seen twice. A rejoining client's first gap is long; weight_max
    bounds what that does.

    Use it: where speed and data go together, e.g. slow workers with rare classes; cheaper than ca2fl or ace. Memory: as
    FedBuff, and two numbers for each of at most `clients` clients (10,000 where that is not given): the one longest
    unheard gives way.
    Source: Rescaled ASGD, arXiv:2605.13434 (step sizes proportional to computation times), w_i = (1 / rate_i) /
    mean_j (1 / rate_j); algorithms.md, 1.7.

    Attributes:
        smoothing: in (0, 1]; 1: only the last interval counts.
        weight_max: >= 1; 1 turns the weights off.
        clients: entries of the table; 0: 10,000.
    """

    smoothing: float
    weight_max: float
    clients: int = 0
    kind: str = ""

    def factor(self, state: State, arrival: Arrival) -> float:
        """Return w_i."""
        fleet = self._fleet(state)
        return self._weight(fleet, self._interval(fleet, arrival.update.client))

    def folded(self, state: State, arrival: Arrival, mass: float) -> None:
        """Count the update and write down when its client was heard."""
        fleet, client = self._fleet(state), arrival.update.client
        self._note(fleet, client, self._interval(fleet, client))

    def stretch(self, state: State) -> Stretch:
        """Step as far as the mean says."""
        return Stretch()

    def _fleet(self, state: State) -> dict[str, Any]:
        """Return the table: updates accepted, sum and number of known T_j, client -> [its last, T], oldest first."""
        fresh: dict[str, Any] = {"count": 0, "sum": 0.0, "known": 0, "clients": {}}
        table: dict[str, Any] = state.facts.setdefault(INTERVALS, fresh)
        return table

    def _interval(self, fleet: dict[str, Any], client: str) -> Interval:
        """Return how long the client's interval is with this update."""
        if client not in fleet["clients"]:
            return Interval(0.0, 0.0)
        last, before = fleet["clients"][client]
        gap = float(fleet["count"] + 1 - last)
        return Interval((1 - self.smoothing) * before + self.smoothing * gap if before else gap, before)

    def _weight(self, fleet: dict[str, Any], interval: Interval) -> float:
        if not interval.length:
            return 1.0
        known = fleet["known"] + (not interval.before)
        mean = (fleet["sum"] - interval.before + interval.length) / known
        return float(min(self.weight_max, max(1.0 / self.weight_max, interval.length / mean)))

    def _note(self, fleet: dict[str, Any], client: str, interval: Interval) -> None:
        """Count this update, and write the client's interval down as the newest entry."""
        fleet["count"] += 1
        table = fleet["clients"]
        if client in table:
            self._remove(fleet, client)
        while len(table) >= (self.clients or TABLE_ENTRIES_MAX):
            self._remove(fleet, next(iter(table)))
        table[client] = [fleet["count"], interval.length]
        fleet["sum"] += interval.length
        fleet["known"] += interval.length > 0

    def _remove(self, fleet: dict[str, Any], client: str) -> None:
        _, length = fleet["clients"].pop(client)
        fleet["sum"] -= length
        fleet["known"] -= length > 0
