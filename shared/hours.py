"""Allowed hours: `22-6`, `1:30-5,12-13`, `mon-fri 22-6,sat-sun 0-24`; in local time, empty is always.

A span over midnight belongs to the day it begins on: `fri 22-6` ends on Saturday at 6. What counts is what the wall
clock shows at each look: where it is put forward over an opening, the hours are open at the next look after it; where
it is put back, the hour that comes twice is open twice.
"""

import re
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache

DAYS = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")
DAY_MINUTES = 24 * 60
_DAY = "|".join(DAYS)
_TIME = r"(\d{1,2})(?::(\d\d))?"
_SPAN = re.compile(rf"(?:({_DAY})(?:-({_DAY}))? +)?{_TIME}-{_TIME}")


@dataclass(frozen=True, slots=True)
class Span:
    """When it is open.

    Attributes:
        days: on which it begins, 0 is Monday.
        start: minutes since midnight, 0 to 1439.
        minutes: how long, 1 to 1440.
    """

    days: frozenset[int]
    start: int
    minutes: int


@lru_cache
def parse(spec: str) -> tuple[Span, ...]:
    """Read allowed hours; none for an empty text.

    Raises:
        ValueError: it cannot be read; the message says which part.
    """
    return tuple(_span(part.strip().lower()) for part in spec.split(",")) if spec.strip() else ()


def open_for(spec: str, local: datetime) -> bool:
    """Tell whether a training may begin.

    Args:
        spec: as of `parse`.
        local: what the wall clock shows.
    """
    spans = parse(spec)
    return not spans or any(_holds(span, local) for span in spans)


def seconds_until_open(spec: str, local: datetime) -> float:
    """Return the seconds of wall time until a training may begin, 0 when it may now.

    A change of the clock on the way makes it an hour more or less: look again.
    """
    if open_for(spec, local):
        return 0.0
    today, now_min = local.weekday(), local.hour * 60 + local.minute
    starts = (
        ahead * DAY_MINUTES + span.start
        for span in parse(spec)
        for ahead in range(8)
        if (today + ahead) % 7 in span.days and ahead * DAY_MINUTES + span.start > now_min
    )
    return 60.0 * (min(starts) - now_min) - local.second - local.microsecond / 1e6


def _holds(span: Span, local: datetime) -> bool:
    today, now_min = local.weekday(), local.hour * 60 + local.minute
    since_today, since_yesterday = now_min - span.start, now_min - span.start + DAY_MINUTES
    return (today in span.days and 0 <= since_today < span.minutes) or (
        (today - 1) % 7 in span.days and since_yesterday < span.minutes
    )


def _span(part: str) -> Span:
    match = _SPAN.fullmatch(part)
    if match is None:
        raise ValueError(f"{part!r} is not of the form 22-6, 1:30-5 or mon-fri 22-6")
    start, end = _minutes(part, match[3], match[4]), _minutes(part, match[5], match[6])
    if start in (DAY_MINUTES, end):
        raise ValueError(f"{part!r} is empty; 0-24 is the whole day")
    first = DAYS.index(match[1]) if match[1] else 0
    last = DAYS.index(match[2] or match[1]) if match[1] else 6
    days = frozenset((first + ahead) % 7 for ahead in range((last - first) % 7 + 1))
    return Span(days, start, (end - start) % DAY_MINUTES or DAY_MINUTES)


def _minutes(part: str, hour: str, minute: str | None) -> int:
    minutes = int(hour) * 60 + int(minute or 0)
    if minutes > DAY_MINUTES or int(minute or 0) > 59:
        raise ValueError(f"{part!r}: {hour}{':' + minute if minute else ''} is no time of a day")
    return minutes
