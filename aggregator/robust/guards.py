"""All guards of a job, one after the other."""

from collections.abc import Sequence
from dataclasses import replace

from aggregator.arrival import Arrival
from aggregator.robust.protocols import Guard
from aggregator.robust.trusted import TrustedUpdate
from aggregator.state import State
from shared.compression import Decoded
from shared.messages import Update


class Guards:
    """What stands between an admitted update and the rule.

    Args:
        guards: in the order they act; their factors multiply.
        trusted_client: whose updates are the reference and never folded; "": nobody's.
        trusted: where its updates go.
    """

    def __init__(self, guards: Sequence[Guard], trusted_client: str, trusted: TrustedUpdate) -> None:
        self._guards, self.trusted_client, self._trusted = tuple(guards), trusted_client, trusted

    def weigh(self, state: State, arrival: Arrival) -> float:
        """Return what the guards leave of an update, times its weight so far.

        Args:
            state: not changed.
            arrival: the update, its weight without the staleness.

        Raises:
            RejectedUpdate: by the first guard that takes it for bad.
        """
        for guard in self._guards:
            arrival = replace(arrival, weight=arrival.weight * guard.weigh(state, arrival))
        return arrival.weight

    def applied(self, state: State, arrival: Arrival) -> None:
        """Note that the update weighed last was taken in."""
        for guard in self._guards:
            guard.applied(state, arrival)

    def trust(self, state: State, update: Update, delta: Decoded) -> None:
        """Keep an update of the trusted client."""
        self._trusted.keep(state, update, delta)
