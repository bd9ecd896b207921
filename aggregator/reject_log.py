"""Rejections in the log: the first of each reason as it is, then how many more, once a minute.

One device that is wrong, or hostile, sends as many updates as it likes: a line for each would fill the disk, and bury
what else the log has to say. The dead letters have them all.
"""

import logging
import math
from dataclasses import dataclass

from shared.errors import Reason, RejectedUpdate

log = logging.getLogger("fedmq.aggregator")

EVERY_S = 60.0


@dataclass(slots=True)
class _Quiet:
    """What came of a reason since the log last named it."""

    until_s: float
    count: int = 0
    newest: str = ""


class RejectLog:
    """Counts what the log does not say."""

    def __init__(self) -> None:
        self._quiet: dict[Reason, _Quiet] = {}
        self._due_s = math.inf  # when the first count is to be said; monotonic

    def note(self, client: str, error: RejectedUpdate, now_s: float) -> None:
        """Log a rejection, or count it.

        Args:
            client: who sent it.
            error: why.
            now_s: monotonic.
        """
        self.tell(now_s)
        quiet = self._quiet.get(error.reason)
        if quiet is None:
            log.warning("rejected an update of %s: %s", client, error)
            self._quiet[error.reason] = _Quiet(now_s + EVERY_S)
            self._due_s = min(self._due_s, now_s + EVERY_S)
        else:
            quiet.count, quiet.newest = quiet.count + 1, f"of {client}: {error.detail}"

    def tell(self, now_s: float) -> None:
        """Log the counts that are due; call now and then."""
        if now_s < self._due_s:
            return
        for reason, quiet in list(self._quiet.items()):
            if now_s < quiet.until_s:
                continue
            if quiet.count:
                log.warning("rejected %d more updates: %s; the newest %s", quiet.count, reason, quiet.newest)
                self._quiet[reason] = _Quiet(now_s + EVERY_S)
            else:
                del self._quiet[reason]
        self._due_s = min((quiet.until_s for quiet in self._quiet.values()), default=math.inf)
