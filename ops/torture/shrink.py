"""Make a failing schedule short: drop events while the same checker still finds something.

Source: Zeller, Hildebrandt, "Simplifying and Isolating Failure-Inducing Input", IEEE TSE 28(2), 2002 (ddmin).
"""

from collections.abc import Callable
from dataclasses import replace

from ops.torture.schedule import Event, Schedule
from ops.torture.simulator import run

RUNS_MAX = 1500


def fails_as(checker: str) -> Callable[[Schedule], bool]:
    """Return a test whether a schedule fails before a checker."""

    def fails(schedule: Schedule) -> bool:
        violation = run(schedule).violation
        return violation is not None and violation.checker == checker

    return fails


def shrink(schedule: Schedule, fails: Callable[[Schedule], bool], runs_max: int = RUNS_MAX) -> Schedule:
    """Return a shorter schedule that still fails.

    Args:
        schedule: one that fails.
        fails: tells whether another does.
        runs_max: how many to try at most.
    """
    events, size, left = list(schedule.events), max(1, len(schedule.events) // 2), runs_max
    while left > 0:
        start, shorter = 0, False
        while start < len(events) and left > 0:
            rest = events[:start] + events[start + size :]
            left -= 1
            if fails(_with(schedule, rest)):
                events, shorter = rest, True
            else:
                start += size
        if size == 1 and not shorter:
            break
        size = max(1, size // 2)
    return _with(schedule, events)


def _with(schedule: Schedule, events: list[Event]) -> Schedule:
    return replace(schedule, events=tuple(events))
