"""Guards against flooding: a client that sends fast must not own the buffer.

Robust rules bound what a share of the *buffer* can do, not a share of the clients: without one of these guards a
single fast attacker is as many as he likes. They count what the open buffer holds already, and are only as good
as the client's name: the broker's login must pin it (README, the contract).
"""

from aggregator.arrival import Arrival
from aggregator.state import State
from shared.errors import Reason, RejectedUpdate

THROTTLED_MIN = 1e-3  # a repeat that would weigh less is refused, so that the list of contributions stays bounded


class OneSlot:
    """Take one update of a client into each buffer; it has at most 1 / K of the mass, unless that goes by samples.

    A second one is rejected; with error feedback its worker takes the mass back and sends it with a later update.

    Source: BASGD's one buffer a worker (Yang, Li, arXiv:2003.00937), turned into one place a worker.
    """

    def weigh(self, state: State, arrival: Arrival) -> float:
        """Return 1, or reject."""
        if state.contributions_of(arrival.update.client):
            raise RejectedUpdate(
                Reason.SURPLUS, f"client {arrival.update.client} has its one place in the buffer of version "
                f"{state.version + 1} already; {len(state.buffer)} updates are in it",
            )  # fmt: skip
        return 1.0

    def applied(self, state: State, arrival: Arrival) -> None:
        """Nothing is remembered but the buffer itself."""


class Throttle:
    """Weigh the c-th repeat of a client in one buffer q^-c; it does not fill the buffer.

    The client's first update counts fully, so that it has at most (1 + 1/q + 1/q^2 + ...) / K = (1 + 1 / (q - 1)) / K
    of the mass. Repeats below 1e-3 are rejected.

    Source: THROTTLE, algorithms notes, section 1.7 (q = 1.1 was best there without attackers).

    Args:
        q: >= 1.01.
    """

    def __init__(self, q: float) -> None:
        self._q = q

    def weigh(self, state: State, arrival: Arrival) -> float:
        """Return q^-c, or reject."""
        repeats = state.contributions_of(arrival.update.client)
        left = float(self._q**-repeats)
        if left < THROTTLED_MIN:
            raise RejectedUpdate(
                Reason.SURPLUS, f"client {arrival.update.client} has {repeats} updates in the buffer of version "
                f"{state.version + 1} already; one more would weigh {left:.2g}",
            )  # fmt: skip
        return left

    def applied(self, state: State, arrival: Arrival) -> None:
        """Nothing is remembered but the buffer itself."""
