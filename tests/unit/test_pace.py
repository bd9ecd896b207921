"""The limit on bytes per second: closed forms under a clock that stands still, and how the publisher keeps to it."""

import math
import threading

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.clock import VirtualClock
from shared.config import WorkerSettings, load
from shared.errors import SettingsError
from shared.messages import PART_BYTES, decode
from shared.metrics import WorkerMetrics
from tests.builders import encode, update_of
from worker.outbox import Outbox
from worker.pace import Pace
from worker.publisher import Publisher


def test_each_piece_waits_until_those_before_are_paid_for():
    clock = VirtualClock()
    pace, began = Pace(1000, clock), []
    for size in (500, 2000, 100, 100):
        assert pace.take(size)
        began.append(clock.time_s)
    assert began == [0.0, 0.5, 2.5, 2.6]


def test_nothing_is_saved_up_while_nothing_is_sent():
    clock = VirtualClock()
    pace = Pace(1000, clock)
    pace.take(1000)
    clock.time_s = 100.0
    pace.take(1000)
    pace.take(1000)
    assert clock.time_s == 101.0


@given(st.lists(st.tuples(st.floats(0, 5), st.integers(1, 10_000)), min_size=1, max_size=30), st.integers(100, 10**6))
def test_no_interval_holds_more_than_the_rate_and_one_piece(arrivals, rate):
    """s_i = max(a_i, s_{i-1} + n_{i-1} / rate)."""
    clock = VirtualClock()
    pace, began, expected, free = Pace(rate, clock), [], [], -math.inf
    for gap_s, size in arrivals:
        clock.time_s += gap_s
        expected.append(max(clock.time_s, free))
        free = expected[-1] + size / rate
        assert pace.take(size)
        began.append((clock.time_s, size))
    np.testing.assert_allclose([at for at, _ in began], expected, rtol=1e-9)
    for first in range(len(began)):
        for last in range(first, len(began)):
            inside = sum(size for _, size in began[first : last + 1])
            assert inside <= rate * (began[last][0] - began[first][0]) * (1 + 1e-9) + began[last][1] + 1e-6


def test_without_a_rate_nothing_waits():
    clock = VirtualClock()
    pace = Pace(0, clock)
    assert all(pace.take(10**9) for _ in range(10))
    assert clock.time_s == 0
    assert pace.part_bytes(PART_BYTES) == PART_BYTES


def test_it_gives_up_when_the_time_is_over_and_keeps_the_turn():
    clock = VirtualClock()
    pace = Pace(1000, clock)
    pace.take(5000)
    assert not pace.take(1000, timeout_s=2.0)
    assert clock.time_s == 2.0
    assert pace.take(1000, timeout_s=3.0)  # what was refused was not charged
    assert clock.time_s == 5.0


def test_a_stop_ends_the_waiting_at_once():
    clock, stop = VirtualClock(), threading.Event()
    pace = Pace(1000, clock, stop)
    assert pace.take(5000)
    stop.set()
    assert not pace.take(1000)
    assert clock.time_s == 0


@pytest.mark.parametrize(
    ("rate", "piece", "part"),
    [(1024, 1024, 4096), (10_000, 10_000, 20_000), (10**6, 10**6, 2 * 10**6), (10**9, 2**20, PART_BYTES)],
)
def test_pieces_and_parts_are_worth_a_second_or_two_within_bounds(rate, piece, part):
    pace = Pace(rate, VirtualClock())
    assert (pace.piece_bytes, pace.part_bytes(PART_BYTES)) == (piece, part)
    assert pace.part_bytes(1000) == 1000  # never more than the job's


class Recording:
    """A sink that keeps what it gets, with the time."""

    def __init__(self, clock):
        self.clock, self.sent = clock, []

    def publish(self, message, timeout_s):
        self.sent.append((self.clock.time_s, message))


@pytest.fixture
def publisher_at(tmp_path):
    def build(rate, updates=1, params=10_000):
        clock = VirtualClock()
        outbox, sink = Outbox(tmp_path, "a", 10, 10**8, sync=False), Recording(clock)
        for sequence in range(updates):
            delta = np.random.default_rng(sequence).standard_normal(params, np.float32)
            outbox.put(encode(update_of(delta, update_id=outbox.next_id())))
        pace = Pace(rate, clock)
        return Publisher("job", "a", outbox, sink, clock, WorkerMetrics(), 7.0, pace), outbox, sink, clock

    return build


def test_an_update_leaves_in_parts_at_the_rate(publisher_at):
    publisher, outbox, sink, _ = publisher_at(rate=2000)
    assert publisher.step()
    assert len(outbox) == 0
    parts = [decode(message.body, 10**6, message.crc32) for _, message in sink.sent]
    assert [part.part.index for part in parts] == list(range(10))  # 40,000 bytes of payload in parts of 4,096
    assert (
        b"".join(part.payload for part in parts)
        == np.random.default_rng(0).standard_normal(10_000, np.float32).tobytes()
    )
    paid = np.cumsum([0, *(len(message.body) / 2000 for _, message in sink.sent)])
    np.testing.assert_allclose([at for at, _ in sink.sent], paid[:-1])


def test_a_stop_between_two_parts_keeps_the_update_and_the_parts_that_are_confirmed(publisher_at):
    publisher, outbox, sink, _ = publisher_at(rate=2000)
    stop = threading.Event()
    publish = sink.publish

    def third_time(message, timeout_s):
        publish(message, timeout_s)
        if len(sink.sent) == 3:
            stop.set()

    sink.publish = third_time
    publisher.run(stop)
    assert (len(sink.sent), len(outbox)) == (3, 1)
    assert publisher.flush(1000.0)
    assert [decode(m.body, 10**6).part.index for _, m in sink.sent] == list(range(10))


def test_the_last_updates_of_a_worker_that_ends_keep_to_the_rate_and_to_the_time(publisher_at):
    publisher, outbox, sink, clock = publisher_at(rate=2000)
    assert not publisher.flush(5.0)  # it takes 20 s
    assert clock.time_s == pytest.approx(5.0)
    assert len(outbox) == 1
    assert sum(len(message.body) for _, message in sink.sent) <= 2000 * 5.0 + 5000


@pytest.mark.parametrize("name", ["uplink_bytes_per_s", "downlink_bytes_per_s"])
@pytest.mark.parametrize("value", [1, 1023, -5])
def test_a_rate_too_small_to_work_with_is_refused(name, value):
    with pytest.raises(SettingsError, match="at least 1024 bytes per second"):
        load(WorkerSettings, {name: str(value)})
