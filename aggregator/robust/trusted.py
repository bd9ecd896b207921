"""Guards that compare an update with what the server itself would have learned.

The server's own data is trained on by one worker like any other, FEDMQ_TRUSTED_CLIENT: the aggregator needs no torch
and no data. That worker's updates are kept and never folded. Whoever can publish under its name can turn these guards
round, so its login at the broker must be its own.
"""

import math
from typing import NamedTuple

import numpy as np

from aggregator.arrival import Arrival
from aggregator.record import read_record, write_record
from aggregator.robust.norms import norm_of
from aggregator.state import State
from shared.compression import Decoded
from shared.errors import Reason, RejectedUpdate
from shared.messages import Update
from shared.vector import Vector, squared_norm

TRUSTED = "trusted"  # of `State.kept` the update, of `State.facts` its id


class Reference(NamedTuple):
    """The trusted client's newest update.

    Attributes:
        update_id: its id.
        delta: v, still compressed.
        norm: ||v||.
    """

    update_id: str
    delta: Decoded
    norm: float


class TrustedUpdate:
    """The newest update of the trusted client: in the store with the state, at hand in memory.

    Memory: it and one vector of model size, made once.
    """

    def __init__(self) -> None:
        self._at_hand: Reference | None = None
        self._scratch: Vector | None = None

    def keep(self, state: State, update: Update, delta: Decoded) -> None:
        """Replace the one before."""
        state.kept.put(TRUSTED, write_record(update.codec, update.payload))
        state.facts[TRUSTED] = update.update_id
        self._at_hand = Reference(update.update_id, delta, math.sqrt(delta.squared_norm()))

    def of(self, state: State) -> Reference:
        """Return it as this state has it.

        Raises:
            RejectedUpdate: there is none yet; taking updates in unseen would be unsafe.
        """
        update_id = str(state.facts.get(TRUSTED, ""))
        if self._at_hand is None or self._at_hand.update_id != update_id:
            record = state.kept.get(TRUSTED)
            if record is None:
                raise RejectedUpdate(
                    Reason.SUSPICIOUS, "the trusted client has not sent anything yet that this could be compared with"
                )
            delta = read_record(record, state.model.layout).delta
            self._at_hand = Reference(update_id, delta, math.sqrt(delta.squared_norm()))
        return self._at_hand

    def distance(self, state: State, delta: Decoded, factor: float) -> float:
        """Return ||v - factor * delta||, not finite where float32 overflows.

        Args:
            state: whose v it is.
            delta: the other update.
            factor: of it, finite.
        """
        if self._scratch is None:
            self._scratch = np.empty_like(state.weights)
        self._scratch.fill(0.0)
        self.of(state).delta.add_into(self._scratch, 1.0)
        with np.errstate(over="ignore", invalid="ignore"):
            delta.add_into(self._scratch, -factor)
        return math.sqrt(squared_norm(self._scratch))


class AflGuard:
    """Take what lies near the server's own update: accept iff ||g - v|| <= lambda * ||v||.

    v should be about as long as g: let the trusted worker train with the others' own settings.

    Source: Fang et al., "AFLGuard: Byzantine-robust Asynchronous Federated Learning", arXiv:2212.06325, algorithm 2.

    Args:
        trusted: where v comes from.
        distance: lambda > 0; 1.5 in the paper. From 1 on an update of nothing is accepted.
    """

    def __init__(self, trusted: TrustedUpdate, distance: float) -> None:
        self._trusted, self._distance = trusted, distance

    def weigh(self, state: State, arrival: Arrival) -> float:
        """Return 1, or reject."""
        norm = self._trusted.of(state).norm
        distance = self._trusted.distance(state, arrival.delta, arrival.weight)
        if not distance <= self._distance * norm:  # nor NaN
            raise RejectedUpdate(
                Reason.SUSPICIOUS, f"its distance from the trusted update is {distance:.4g}; {self._distance:g} x "
                f"{norm:.4g} = {self._distance * norm:.4g} is allowed",
            )  # fmt: skip
        return 1.0

    def applied(self, state: State, arrival: Arrival) -> None:
        """Nothing is remembered."""


class Zeno:
    """Take what points where the server's own update points, at that one's length.

        g <- g ||v|| / ||g||                                      first: a long g must not fail for its length
        accept iff  rate <v, g> - rho ||g||^2 + rate epsilon ||v||^2 >= 0

    As ||g|| = ||v|| by then, that is cos(v, g) >= rho / rate - epsilon. epsilon is relative to ||v||^2, unlike in the
    paper: an absolute one means something else in every model and at every time of the training.

    Source: Xie, Koyejo, Gupta, "Zeno++: Robust Fully Asynchronous SGD", arXiv:1903.07020, algorithm 2, with v and g
    as deltas; the authors' code takes the ||g||^2 after rho before the normalisation.

    Args:
        trusted: where v comes from.
        rho: >= 0; 0.001 to 0.01 in the paper.
        epsilon: >= 0; 0 to 0.1 in the paper, absolute there.
        rate: gamma > 0; 1, as deltas hold the workers' learning rate already.
    """

    def __init__(self, trusted: TrustedUpdate, rho: float, epsilon: float, rate: float) -> None:
        self._trusted, self._rho, self._epsilon, self._rate = trusted, rho, epsilon, rate

    def weigh(self, state: State, arrival: Arrival) -> float:
        """Return ||v|| / ||g||, or reject; an update of nothing is accepted as it is."""
        norm, own = norm_of(arrival), self._trusted.of(state).norm
        if norm == 0:
            return 1.0
        factor = own / norm
        # <v, g> from the distance of vectors of the same length: nothing cancels, however long g was.
        inner = own**2 - self._trusted.distance(state, arrival.delta, factor * arrival.weight) ** 2 / 2
        score = self._rate * inner + (self._rate * self._epsilon - self._rho) * own**2
        if not (score >= 0 and own > 0):  # nor NaN
            cosine, least = inner / own**2 if own else 0.0, self._rho / self._rate - self._epsilon
            raise RejectedUpdate(
                Reason.SUSPICIOUS, f"its cosine with the trusted update is {cosine:.4g}, at least {least:.4g} is "
                f"wanted; its norm is {norm:.4g}, the trusted one's {own:.4g}",
            )  # fmt: skip
        return factor

    def applied(self, state: State, arrival: Arrival) -> None:
        """Nothing is remembered."""
