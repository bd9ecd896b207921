"""Rejections in the log: the first of each reason, then counts - and none forgotten."""

import logging
import re
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aggregator.reject_log import EVERY_S, RejectLog
from shared.errors import Reason, RejectedUpdate
from tests.builders import System, weights

CHECKSUM, LAYOUT = (RejectedUpdate(reason, f"detail of {reason}") for reason in (Reason.CHECKSUM, Reason.LAYOUT))


@pytest.fixture
def said(caplog):
    caplog.set_level(logging.INFO, "fedmq.aggregator")
    return lambda: [record.getMessage() for record in caplog.records]


def test_the_first_of_each_reason_is_said_and_the_rest_counted_once_a_minute(said):
    log = RejectLog()
    for second in range(100):
        log.note(f"phone-{second}", CHECKSUM, second)
        log.note("other", LAYOUT, second) if second == 30 else None
    log.tell(1000.0)
    assert said() == [
        "rejected an update of phone-0: checksum: detail of checksum",
        "rejected an update of other: layout: detail of layout",
        "rejected 59 more updates: checksum; the newest of phone-59: detail of checksum",
        "rejected 40 more updates: checksum; the newest of phone-99: detail of checksum",
    ]


def test_after_a_quiet_minute_the_next_one_is_said_as_it_is(said):
    log = RejectLog()
    for second in (0, EVERY_S + 1, EVERY_S + 2):
        log.note("a", CHECKSUM, second)
    assert [line.split()[1] for line in said()] == ["an", "an"]


@given(st.lists(st.tuples(st.sampled_from([CHECKSUM, LAYOUT]), st.floats(0, 40)), max_size=60))
def test_no_rejection_is_forgotten_and_no_minute_has_more_than_one_line_of_a_reason(events):
    lines, log, now, times = [], RejectLog(), 0.0, []
    handler = logging.Handler()
    handler.emit = lambda record: (lines.append(record.getMessage()), times.append(now))
    logger = logging.getLogger("fedmq.aggregator")
    logger.addHandler(handler)
    try:
        for error, gap_s in events:
            now += gap_s
            log.note("a", error, now)
        for _ in range(3):
            now += EVERY_S
            log.tell(now)
    finally:
        logger.removeHandler(handler)
    for reason in ("checksum", "layout"):
        mine = [(line, at) for line, at in zip(lines, times, strict=True) if reason in line]
        counted = sum(int(match[1]) if (match := re.match(r"rejected (\d+) more", line)) else 1 for line, _ in mine)
        assert counted == sum(error.reason == reason for error, _ in events)
        assert all(later - earlier >= EVERY_S - 1e-6 for (_, earlier), (_, later) in pairwise(mine))


def test_an_aggregator_says_the_count_also_when_no_more_come(said):
    system = System(commit_age_max_s=0.5)
    for sequence in range(20):
        update = system.publish(weights(sequence), layout="0" * 64)
        assert update
    system.drain()
    assert sum("rejected an update" in line for line in said()) == 1
    system.clock.time_s += EVERY_S + 1
    system.aggregator.step()
    assert said()[-1].startswith("rejected 19 more updates: layout; the newest of a: ")
    assert system.metrics.rejected.labels("job", "layout")._value.get() == 20
