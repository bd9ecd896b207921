"""What is going to happen to one process, and what is the same for all of them: time, servers that are away, the trace.

A fault is made ready by an event of the schedule and strikes at the next port call it fits; until then nothing happens.
"""

import heapq
from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any, NoReturn

EPOCH_S = 1_700_000_000.0  # unix time at which every run begins
KILLS = ("aggregator_killed", "worker_killed", "power_cut", "evaluator_killed")


class Killed(BaseException):
    """The process is gone; nothing may catch it on the way."""


class World:
    """What all processes share.

    Args:
        verbose: write down what happens.

    Attributes:
        time_s: virtual, never back.
        store_away_s, broker_away_s: until when that server is away.
        struck: how often each fault really struck.
        deaths: how often which kind of process died before, in or after which call.
        trace: what happened, line by line; None when nobody wants to know.
    """

    def __init__(self, verbose: bool = False) -> None:
        self.time_s = self.store_away_s = self.broker_away_s = 0.0
        self.struck: Counter[str] = Counter()
        self.deaths: Counter[str] = Counter()
        self.trace: list[str] | None = [] if verbose else None
        self._later: list[tuple[float, int, Callable[[], None]]] = []
        self._number = 0

    def later(self, seconds: float, action: Callable[[], None]) -> None:
        """Have something happen after some time, unless it happens before by `hurry`."""
        self._number += 1
        heapq.heappush(self._later, (self.time_s + seconds, self._number, action))

    def move_to(self, time_s: float) -> None:
        """Let time pass, and what is due happen."""
        while self._later and self._later[0][0] <= time_s:
            due_s, _, action = heapq.heappop(self._later)
            self.time_s = max(self.time_s, due_s)
            action()
        self.time_s = max(self.time_s, time_s)

    def hurry(self) -> None:
        """Let everything that was to happen later happen, in order."""
        while self._later:
            self.move_to(self._later[0][0])

    @property
    def quiet(self) -> bool:
        """Whether nothing is to happen later."""
        return not self._later

    def strikes(self, fault: str) -> None:
        """Note that a fault struck."""
        self.struck[fault] += 1
        if self.trace is not None:
            self.trace.append(f"{self.time_s:9.3f}   !! {fault}")

    def note(self, who: str, what: str) -> None:
        """Write a line of the trace; callers ask first whether there is one, for the line costs time."""
        if self.trace is not None:
            self.trace.append(f"{self.time_s:9.3f} {who}: {what}")


class MachineClock:
    """A machine's clock: the wall clock may jump, the monotonic one may not."""

    def __init__(self, world: World) -> None:
        self._world, self.offset_s = world, 0.0

    def now(self) -> float:
        """Return unix seconds as this machine believes."""
        return EPOCH_S + self._world.time_s + self.offset_s

    def monotonic(self) -> float:
        """Return virtual seconds."""
        return self._world.time_s

    def local(self) -> datetime:
        """Return this machine's wall time, as UTC."""
        return datetime.fromtimestamp(self.now(), UTC)

    def wait(self, stop: object, seconds: float) -> None:
        """Let time pass for everybody."""
        self._world.move_to(self._world.time_s + seconds)


class Fate:
    """The faults that are ready for one process.

    Args:
        world: where they are counted.
        who: the process.
    """

    def __init__(self, world: World, who: str) -> None:
        self.world, self.who = world, who
        self._ready: dict[str, dict[str, Any]] = {}
        self._call = ""  # under way
        self.last: dict[str, Any] = {}  # parameters of the kill that struck
        self.pause: Callable[[dict[str, Any]], bool] | None = None  # what standing still means; tells whether it did

    def prepare(self, fault: str, given: dict[str, Any]) -> None:
        """Make a fault ready; one of the same name that is ready already is replaced."""
        self._ready[fault] = dict(given)

    def clear(self) -> None:
        """Let nothing more happen."""
        self._ready.clear()

    def take(self, fault: str) -> dict[str, Any] | None:
        """Return a ready fault's parameters and count it as struck; None when there is none."""
        if not self._ready or (given := self._ready.pop(fault, None)) is None:
            return None
        self.world.strikes(fault)
        return given

    def before(self, call: str) -> None:
        """Begin a call of a port.

        Raises:
            Killed: the process dies before it.
        """
        if self.world.trace is not None:
            self.world.note(self.who, call)
        if not self._ready:
            return
        self._call = call.partition(" ")[0]
        for kill in KILLS:
            if self._due(kill) and not self._ready[kill]["after"]:
                self.die(kill, "before")
        if self.pause is not None and self._due("aggregator_paused"):
            given = self._ready.pop("aggregator_paused")
            if self.pause(given):
                self.world.strikes("aggregator_paused")

    def after(self) -> None:
        """End a call of a port.

        Raises:
            Killed: the process dies after it.
        """
        if self._ready:
            for kill in KILLS:
                given = self._ready.get(kill)
                if given is not None and given["calls"] <= 0:
                    self.die(kill, "after")

    def _due(self, fault: str) -> bool:
        """Count a call down; tell whether a fault that waits for its moment strikes at this one."""
        given = self._ready.get(fault)
        if given is None or given["call"] not in ("", self._call):
            return False
        given["calls"] -= 1
        return bool(given["calls"] <= 0)

    def die(self, kill: str, when: str) -> NoReturn:
        """End the process.

        Args:
            kill: by which fault.
            when: before, in or after the call under way.

        Raises:
            Killed: always.
        """
        if kill in self._ready:
            self.last = self._ready[kill]
            self.world.strikes(kill)
        self._ready.clear()
        self.world.deaths[f"{self.who.rstrip('0123456789')} {when} {self._call}"] += 1
        raise Killed(kill)
