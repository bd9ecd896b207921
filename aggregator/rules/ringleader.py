"""Ringleader: asynchronous SGD in rounds, in which every worker counts as much and none waits."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from aggregator.arrival import Arrival
from aggregator.record import Delta
from aggregator.rules.memory import Memory, recall
from aggregator.rules.rule import NEEDS_NOTHING, Needs, begin_next_version, note
from aggregator.server_optimizer import ServerOptimizer
from aggregator.state import State
from shared.errors import Reason, RejectedUpdate

ROUND = "ringleader"
HERE, NEXT = "here", "next"
REPEATS_MAX = 100  # updates of one worker in a round's table: what waits for a slow one is bounded


@dataclass(frozen=True, slots=True)
class Ringleader:
    """A table with the mean delta of every worker in this round, and n steps along the mean of the table.

        G_i, b_i: sum and number of client i's deltas in this round
        step:     w <- w + server_lr * (1 / n) sum_i G_i / b_i

        phase 1   collect until b_i >= 1 for all n workers; the update that completes the table begins phase 2
        phase 2   exactly n versions, one for each worker, at its first update of the phase; further updates of a worker
                  that has had its version go to the table of the next round

    Deltas stand for -gamma * gradient, so workers take one local step; longer updates are rejected. The delay of what
    is in the table is at most 2 n - 2 versions, whatever the workers' speeds, and the time to a given accuracy is of
    the optimal order. In the paper a worker keeps its model until its version has come; here it always pulls the
    newest, which in phase 2 is a fresher one and in phase 1 the same.

    The table holds means, in int8 once a worker has sent several (the sum that the steps follow is of those means, as
    written). A further client takes the place of the one heard from longest ago, so that a round can end although a
    worker has gone for good and another came.

    Use it: one-step workers with non-IID data. One that is gone and not replaced holds the job up: its round never
    ends. Memory: two vectors of model size besides the weights; in the store up to two int8 updates of each client.
    Source: Ringleader ASGD, ICLR 2026, arXiv:2509.22860, algorithm 1.

    Attributes:
        memory: says who must go, and writes records.
        optimizer: what steps along the mean.
        server_lr: eta > 0; the workers' learning rate times it is the paper's gamma.
    """

    memory: Memory
    optimizer: ServerOptimizer
    server_lr: float
    name: str = "ringleader"
    buffer_kind: str = "ringleader"
    sums: tuple[str, ...] = ()
    needs: Needs = NEEDS_NOTHING

    @property
    def arrays(self) -> Mapping[str, float]:
        """The sums of both tables, which change roles; what the optimizer remembers."""
        return {**self.optimizer.arrays, "ringleader_0": 0.0, "ringleader_1": 0.0}

    def fold(self, state: State, arrival: Arrival) -> float:
        """Enter the delta in this round's table, or in the next one's."""
        client, turn = arrival.update.client, self._round(state)
        if arrival.update.num_steps > 1:
            raise RejectedUpdate(
                Reason.RULE,
                f"{arrival.update.num_steps} local steps; rule ringleader takes gradients, updates of one step: have "
                "the task train one step at a time, or choose another rule (ace, ca2fl)",
            )
        own = NEXT if client in turn["stepped"] else HERE
        if turn[own].get(client, 0) >= REPEATS_MAX:
            raise RejectedUpdate(
                Reason.SURPLUS,
                f"{client} has {REPEATS_MAX} updates in the round already; it waits for "
                f"{self.memory.clients - len(turn[HERE])} workers that were not heard yet",
            )
        gone = self.memory.displaced(turn[HERE], client)
        leaving = [(table, other, recall(state, _name(turn, table, other))) for other in gone for table in (HERE, NEXT)]
        table = own
        self._enter(state, turn, table, arrival)
        for left, other, mean in leaving:
            self._leave(state, turn, left, other, mean)
        turn[HERE][client] = turn[HERE].pop(client)  # the newest heard, also with an update of the next round
        if table == NEXT and len(turn["stepped"]) >= len(
            turn[HERE]
        ):  # FEDMQ_CLIENTS was lowered: nobody is left to come
            self._begin_round(state, turn)
            table = HERE
        if table == HERE and (turn["stepped"] or len(turn[HERE]) >= self.memory.clients):
            turn["stepped"][client] = turn["due"] = True
        return note(state, arrival, arrival.weight)

    def advance(self, state: State) -> bool:
        """Step if a worker has got its version; after the last of them begin the next round."""
        turn = self._round(state)
        if not turn["due"]:
            return False
        turn["due"] = False
        gradient = state.arrays[_array(turn, HERE)]
        self.optimizer.step(state, gradient, 1.0 / self.memory.clients, self.server_lr, 1.0)
        if len(turn["stepped"]) >= len(turn[HERE]):
            self._begin_round(state, turn)
        return begin_next_version(state)

    def _round(self, state: State) -> dict[str, Any]:
        """Return where the round stands: client -> b_i of both tables, and who has had its version."""
        fresh: dict[str, Any] = {"parity": 0, HERE: {}, NEXT: {}, "stepped": {}, "due": False}
        turn: dict[str, Any] = state.facts.setdefault(ROUND, fresh)
        return turn

    def _enter(self, state: State, turn: dict[str, Any], table: str, arrival: Arrival) -> None:
        """Take a delta into its client's mean, G / b <- (b * G / b + Delta) / (b + 1)."""
        client, counts, sums = arrival.update.client, turn[table], state.arrays[_array(turn, table)]
        name, count = _name(turn, table, client), counts.get(client, 0)
        old, new = recall(state, name), Delta(arrival.delta, arrival.weight)
        if old is None:
            record, mean = self.memory.shortener.record_of(arrival, state.model.layout)
        else:
            parts = [(old, count / (count + 1)), (new, 1 / (count + 1))]
            record, mean = self.memory.shortener.sum_of(parts, state.model.layout)
            old.add_into(sums, -1.0)
        state.kept.put(name, record)
        mean.add_into(sums, 1.0)
        counts[client] = count + 1

    def _leave(self, state: State, turn: dict[str, Any], table: str, client: str, mean: Delta | None) -> None:
        """Take a client that was displaced out of a table."""
        if mean is not None:
            mean.add_into(state.arrays[_array(turn, table)], -1.0)
        state.kept.drop(_name(turn, table, client))
        turn[table].pop(client, None)
        turn["stepped"].pop(client, None)

    def _begin_round(self, state: State, turn: dict[str, Any]) -> None:
        """Make the next round's table this round's."""
        for client in turn[HERE]:
            state.kept.drop(_name(turn, HERE, client))
        state.arrays[_array(turn, HERE)].fill(0.0)
        turn |= {"parity": 1 - turn["parity"], HERE: turn[NEXT], NEXT: {}, "stepped": {}}


def _parity(turn: Mapping[str, Any], table: str) -> int:
    """Return which of two places a table has: they change roles, so that nothing is copied."""
    return int(turn["parity"] if table == HERE else 1 - turn["parity"])


def _array(turn: Mapping[str, Any], table: str) -> str:
    return f"ringleader_{_parity(turn, table)}"


def _name(turn: Mapping[str, Any], table: str, client: str) -> str:
    return f"round{_parity(turn, table)}:{client}"
