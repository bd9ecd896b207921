"""Allowed hours: every minute of a week against the plain reading, the way over midnight, changes of the clock."""

import math
from datetime import datetime, timedelta
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.config import WorkerSettings, load
from shared.errors import SettingsError
from shared.hours import DAYS, open_for, parse, seconds_until_open

MONDAY = datetime(2026, 3, 2)  # a Monday
WEEK = [MONDAY + timedelta(minutes=15 * quarter) for quarter in range(7 * 96)]


def at(day, clock):
    hour, minute = (int(part) for part in clock.split(":"))
    return MONDAY + timedelta(days=DAYS.index(day), hours=hour, minutes=minute)


@pytest.mark.parametrize(
    ("spec", "plainly"),
    [
        ("", lambda day, hour: True),
        ("0-24", lambda day, hour: True),
        ("9-17", lambda day, hour: 9 <= hour < 17),
        ("22-6", lambda day, hour: hour >= 22 or hour < 6),
        ("22-24", lambda day, hour: hour >= 22),
        ("1:30-5,12-13", lambda day, hour: 1.5 <= hour < 5 or 12 <= hour < 13),
        ("sat-sun 0-24", lambda day, hour: day in (5, 6)),
        ("mon-fri 22-6", lambda day, hour: (day <= 4 and hour >= 22) or (1 <= day <= 5 and hour < 6)),
        ("fri-mon 8-9", lambda day, hour: day in (4, 5, 6, 0) and 8 <= hour < 9),
        ("sun 23-1", lambda day, hour: (day == 6 and hour >= 23) or (day == 0 and hour < 1)),
        (" MON  9-10 , tue 11-12 ", lambda day, hour: (day == 0 and 9 <= hour < 10) or (day == 1 and 11 <= hour < 12)),
    ],
)
def test_it_is_open_when_it_says_so_all_week(spec, plainly):
    for moment in WEEK:
        hour = moment.hour + moment.minute / 60
        assert open_for(spec, moment) == plainly(moment.weekday(), hour), moment


@pytest.mark.parametrize(
    ("spec", "now", "minutes"),
    [
        ("22-6", at("wed", "12:00"), 600), ("22-6", at("wed", "23:00"), 0), ("22-6", at("wed", "5:59"), 0),
        ("22-6", at("wed", "6:00"), 960), ("mon 9-10", at("mon", "10:00"), 7 * 1440 - 60),
        ("mon 9-10", at("sun", "9:00"), 1440), ("sat-sun 0-24", at("fri", "23:59"), 1),
        ("9-10,14-15", at("tue", "10:00"), 240),
    ],
)  # fmt: skip
def test_it_says_how_long_until_it_opens(spec, now, minutes):
    assert seconds_until_open(spec, now) == 60 * minutes
    if minutes:
        assert seconds_until_open(spec, now + timedelta(seconds=12.5)) == 60 * minutes - 12.5


spans = st.tuples(st.integers(0, 6), st.integers(0, 6), st.integers(0, 1439), st.integers(1, 1440)).filter(
    lambda s: s[2] != s[3]
)


@given(st.lists(spans, min_size=1, max_size=3), st.integers(0, 7 * 1440 - 1), st.integers(0, 59))
def test_it_opens_at_the_time_it_named_and_not_before(given_spans, minute, second):
    spec = ",".join(
        f"{DAYS[a]}-{DAYS[b]} {start // 60}:{start % 60:02d}-{end // 60}:{end % 60:02d}"
        for a, b, start, end in given_spans
    )
    now = MONDAY + timedelta(minutes=minute, seconds=second)
    left_s = seconds_until_open(spec, now)
    assert (left_s == 0) == open_for(spec, now)
    assert open_for(spec, now + timedelta(seconds=left_s))
    if left_s:
        assert not open_for(spec, now + timedelta(seconds=left_s - 1))
        assert not open_for(spec, now + timedelta(seconds=math.floor(left_s / 2)))


def test_the_wall_clock_decides_when_the_clock_is_changed():
    """Berlin, 29 March 2026: 2:00 becomes 3:00; 25 October: 3:00 becomes 2:00."""
    zone = ZoneInfo("Europe/Berlin")

    def walls(year, month, day):
        start = datetime(year, month, day, tzinfo=zone).timestamp()
        return [datetime.fromtimestamp(start + 60 * minute, zone) for minute in range(6 * 60)]

    spring, autumn = walls(2026, 3, 29), walls(2026, 10, 25)
    assert sum(open_for("2-4", wall) for wall in spring) == 60  # the hour from 2 to 3 did not happen
    assert sum(open_for("2-4", wall) for wall in autumn) == 180  # it happened twice
    before = datetime(2026, 3, 29, 1, 30, tzinfo=zone)
    assert seconds_until_open("3-4", before) == 90 * 60  # in truth 30 minutes: whoever waits looks again each minute


@pytest.mark.parametrize(
    "spec",
    ["25-3", "22", "22-6-7", "22:60-6", "mon", "monday 9-10", "9-9", "24-6", "0-24:30", "22-6,", "-1-5", "9\u201310"],
)
def test_what_cannot_be_read_is_named(spec):
    with pytest.raises(ValueError, match=r"is not of the form|is empty|is no time of a day"):
        parse(spec)
    with pytest.raises(SettingsError, match=r"FEDMQ_HOURS="):
        load(WorkerSettings, {"hours": spec})
