"""Whether a training may begin now: room in the outbox and on the disk, allowed hours, the owner's own command.

Publishing goes on whatever the gate says, and so does the uptake of what became of updates.
"""

import math
import shlex
import threading
from dataclasses import dataclass

from shared.clock import Clock
from shared.config import WorkerSettings
from shared.hours import open_for, seconds_until_open
from worker.outbox import Outbox
from worker.ready import ask

LOOK_S = 60.0  # the wall clock and the command are asked again at least so often
FULL_S = 0.2  # an outbox may have room at any moment
DISK_S = 5.0
COMMAND_S_MAX = 30.0


@dataclass(frozen=True, slots=True)
class Pause:
    """Why no training may begin.

    Attributes:
        cause: `outbox`, `disk`, `hours` or `command`: the log says it once for each.
        reason: with the numbers.
        wait_s: look again after so long.
    """

    cause: str
    reason: str
    wait_s: float


class Gate:
    """Asks everything that may hold up a training, the cheapest first.

    Args:
        settings: of the worker.
        outbox: of the worker.
        clock: time.
    """

    def __init__(self, settings: WorkerSettings, outbox: Outbox, clock: Clock) -> None:
        self._hours, self._command = settings.hours, shlex.split(settings.ready_command)
        self._outbox, self._clock = outbox, clock
        self._ready_until = -1.0  # monotonic: the command's consent, for one training

    def pause(self, stop: threading.Event) -> Pause | None:
        """Return why no training may begin now, None when one may.

        Args:
            stop: ends the command.
        """
        if self._outbox.is_full():
            return Pause("outbox", f"the outbox is full ({len(self._outbox)} updates): training pauses", FULL_S)
        if problem := self._outbox.no_room():
            return Pause("disk", f"{problem}: training pauses until there is room", DISK_S)
        local = self._clock.local()
        if not open_for(self._hours, local):
            left_s = seconds_until_open(self._hours, local)
            reason = f"it is {local:%a %H:%M}, outside FEDMQ_HOURS={self._hours}: training pauses for {span(left_s)}"
            return Pause("hours", reason, min(LOOK_S, max(0.1, left_s)))
        return self._ask(stop) if self._command else None

    def used(self) -> None:
        """Note that a training was begun: the next one needs the command's consent anew."""
        self._ready_until = -1.0

    def _ask(self, stop: threading.Event) -> Pause | None:
        if self._clock.monotonic() < self._ready_until:
            return None
        answer = ask(self._command, COMMAND_S_MAX, stop)
        if not answer.ready:
            return Pause("command", f"FEDMQ_READY_COMMAND says no, training pauses: {answer.reason}", LOOK_S)
        self._ready_until = self._clock.monotonic() + LOOK_S
        return None


def span(seconds: float) -> str:
    """Return seconds as hours and minutes."""
    minutes = math.ceil(seconds / 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min"
