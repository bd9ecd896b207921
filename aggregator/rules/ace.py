"""ACE and ACED: every update is a version, along the mean of what all workers sent last."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass

from aggregator.arrival import Arrival
from aggregator.rules.memory import Memory
from aggregator.rules.rule import NEEDS_NOTHING, Needs, begin_next_version, note
from aggregator.server_optimizer import ServerOptimizer
from aggregator.state import State

log = logging.getLogger("fedmq.aggregator")

LATEST = "latest_sum"  # sum of what each client sent last: a sum, so that `clients` may change


@dataclass(frozen=True, slots=True)
class Ace:
    """All-client engagement.

        u <- u + (Delta_i - U_i) / n;    U_i <- Delta_i              (U_i = 0 at first)
        w <- w + server_lr * u

    u is the mean over all n workers of their latest deltas, also of those that are slow: none counts more for sending
    more often. A worker not heard yet counts as 0. No staleness weights; the authors recommend one local step.

    Use it: non-IID data and up to some thousand workers whose number is known, when single updates must show at once.
    A delta is added again with every version until its worker sends another: n workers call for about 1 / n of
    FedBuff's server_lr. Memory: one vector of model size besides the weights; in the store one int8 update of each
    client.
    Source: ACE, arXiv:2511.19066; the incremental form of IA2SGD and DuDe-ASGD.

    Attributes:
        memory: of what each worker sent last.
        optimizer: what steps along u.
        server_lr: eta > 0.
    """

    memory: Memory
    optimizer: ServerOptimizer
    server_lr: float
    name: str = "ace"
    buffer_kind: str = "ace"
    sums: tuple[str, ...] = ()
    needs: Needs = NEEDS_NOTHING

    @property
    def arrays(self) -> Mapping[str, float]:
        """The sum of the latest deltas; what the optimizer remembers."""
        return {**self.optimizer.arrays, LATEST: 0.0}

    def fold(self, state: State, arrival: Arrival) -> float:
        """Put the update in the place of its client's last one."""
        exchange = self.memory.exchange(state, arrival)
        exchange.new.add_into(state.arrays[LATEST], 1.0)
        for delta in exchange.old:
            delta.add_into(state.arrays[LATEST], -1.0)
        return note(state, arrival, arrival.weight)

    def advance(self, state: State) -> bool:
        """Each update is a version."""
        if not state.buffer:
            return False
        self.optimizer.step(state, state.arrays[LATEST], 1.0 / self.memory.clients, self.server_lr, 1.0)
        return begin_next_version(state)


@dataclass(frozen=True, slots=True)
class Aced:
    """ACE without those that are too late: the mean over workers whose latest update is fresh enough.

        A = { i : v - base_version of client i's latest update <= staleness },      v the version before the step
        w <- w + server_lr * (1 / |A|) sum_{i in A} U_i

    What expires is subtracted from the sum and dropped. An update that is itself too old enters nothing, also not its
    client's former one, which is older; the version moves all the same, without a step if A is empty.

    Every update is a version: a worker's latest is about n versions old when it comes, and serves until the next comes
    about n versions later. With a `staleness` far below n hardly anybody is in A; 2 n is the default.

    Use it: as ace, where workers come and go. Memory: as ace, for at most staleness + 1 clients.
    Source: ACED, arXiv:2511.19066.

    Attributes:
        memory: of the latest updates of A.
        optimizer: what steps along the mean.
        server_lr: eta > 0.
        staleness: largest age of an update that counts, versions, >= 0.
    """

    memory: Memory
    optimizer: ServerOptimizer
    server_lr: float
    staleness: int
    name: str = "aced"
    buffer_kind: str = "aced"
    sums: tuple[str, ...] = ()
    needs: Needs = NEEDS_NOTHING

    @property
    def arrays(self) -> Mapping[str, float]:
        """The sum of the latest deltas; what the optimizer remembers."""
        return {**self.optimizer.arrays, LATEST: 0.0}

    def fold(self, state: State, arrival: Arrival) -> float:
        """Take off what expires, put the update in the place of its client's last one."""
        latest, client = state.arrays[LATEST], arrival.update.client
        heard = self.memory.heard(state)
        expired = [other for other, base in heard.items() if state.version - base > self.staleness and other != client]
        if arrival.staleness > self.staleness:
            for delta in self.memory.release(state, [*expired, client]):
                delta.add_into(latest, -1.0)
            return note(state, arrival, 0.0)
        exchange = self.memory.exchange(state, arrival, expired)
        exchange.new.add_into(latest, 1.0)
        for delta in exchange.old:
            delta.add_into(latest, -1.0)
        return note(state, arrival, arrival.weight)

    def advance(self, state: State) -> bool:
        """Each update is a version."""
        if not state.buffer:
            return False
        fresh = len(self.memory.heard(state))
        if fresh:
            self.optimizer.step(state, state.arrays[LATEST], 1.0 / fresh, self.server_lr, 1.0)
        else:
            state.arrays[LATEST].fill(0.0)  # of nobody: without what rounding left
        return begin_next_version(state)
