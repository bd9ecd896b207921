"""Time as a passed object, so that a simulation can bring its own."""

import threading
import time
from datetime import UTC, datetime
from typing import Protocol


class Clock(Protocol):
    """What a loop may ask of time."""

    def now(self) -> float:
        """Return unix seconds: for records that other machines read."""

    def monotonic(self) -> float:
        """Return seconds that never run backwards: for intervals."""

    def local(self) -> datetime:
        """Return what a clock on the wall shows: for the hours of a day."""

    def wait(self, stop: threading.Event, seconds: float) -> None:
        """Let `seconds` pass, or less when `stop` is set."""


class SystemClock:
    """The machine's own clock."""

    def now(self) -> float:
        """Return unix seconds."""
        return time.time()

    def monotonic(self) -> float:
        """Return seconds since an arbitrary start."""
        return time.monotonic()

    def local(self) -> datetime:
        """Return this machine's local time."""
        return datetime.now().astimezone()

    def wait(self, stop: threading.Event, seconds: float) -> None:
        """Sleep until `seconds` have passed or `stop` is set."""
        stop.wait(seconds)


class VirtualClock:
    """A clock that stands still until somebody moves it; starts at 0 s."""

    def __init__(self) -> None:
        self.time_s = 0.0

    def now(self) -> float:
        """Return virtual seconds."""
        return self.time_s

    def monotonic(self) -> float:
        """Return virtual seconds."""
        return self.time_s

    def local(self) -> datetime:
        """Return virtual time as UTC: the same on every machine."""
        return datetime.fromtimestamp(self.time_s, UTC)

    def wait(self, stop: threading.Event, seconds: float) -> None:
        """Move the clock forward at once, unless `stop` is set."""
        if not stop.is_set():
            self.time_s += seconds
