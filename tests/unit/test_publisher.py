"""The publisher: an update leaves the outbox only when the broker has confirmed it."""

import threading
from itertools import pairwise

import pytest

from shared.clock import VirtualClock
from shared.errors import BrokerUnavailable, PublishRefused, PublishUnconfirmed
from shared.metrics import WorkerMetrics
from worker.outbox import Outbox
from worker.publisher import RETRY_S, Publisher


class ScriptedSink:
    """Raises what it is told to, then confirms."""

    def __init__(self, *errors):
        self.errors, self.seen, self.after = list(errors), [], lambda: None

    def publish(self, message, timeout_s):
        self.seen.append((message.update_id, message.body, timeout_s))
        error = self.errors.pop(0) if self.errors else None
        self.after()
        if error:
            raise error


class Stop(threading.Event):
    """Ends a loop that would otherwise go on for ever when it is broken."""

    turns = 0

    def is_set(self):
        self.turns += 1
        return super().is_set() or self.turns > 60


@pytest.fixture
def parts(tmp_path):
    """Return a function that builds a publisher over an outbox of two updates."""

    def build(*errors):
        outbox = Outbox(tmp_path, "a", 10, 1000, sync=False)
        for body in (b"one", b"three"):
            outbox.put(body)
        sink, clock, metrics = ScriptedSink(*errors), VirtualClock(), WorkerMetrics()
        return Publisher("job", "a", outbox, sink, clock, metrics, 7.0), outbox, sink, clock, metrics

    return build


OUTCOMES = [
    (PublishUnconfirmed("no confirm"), "unknown"),
    (PublishRefused("no queue"), "refused"),
    (BrokerUnavailable("away"), "unavailable"),
]


def test_confirmed_updates_leave_in_order(parts):
    publisher, outbox, sink, _, metrics = parts()
    assert [publisher.step(), publisher.step(), publisher.step()] == [True, True, False]
    assert sink.seen == [
        (f"a/{outbox.incarnation}/0", b"one", 7.0),
        (f"a/{outbox.incarnation}/1", b"three", 7.0),
    ]
    assert len(outbox) == 0
    assert metrics.published.labels("confirmed")._value.get() == 2
    assert metrics.sent_bytes._value.get() == 8
    assert metrics.outbox._value.get() == 0


@pytest.mark.parametrize(("error", "outcome"), OUTCOMES)
def test_anything_but_a_confirm_keeps_the_update_and_its_id(parts, error, outcome):
    publisher, outbox, sink, _, metrics = parts(error)
    with pytest.raises(type(error)):
        publisher.step()
    assert len(outbox) == 2
    assert metrics.published.labels(outcome)._value.get() == 1
    assert metrics.sent_bytes._value.get() == 0
    assert publisher.step()
    assert sink.seen[0] == sink.seen[1]
    assert metrics.published.labels("confirmed")._value.get() == 1


@pytest.mark.parametrize(("error", "outcome"), OUTCOMES)
def test_run_goes_on_after_every_error_and_backs_off(parts, error, outcome):
    publisher, outbox, sink, clock, _ = parts(error, error, error)
    stop = Stop()
    sink.after = lambda: stop.set() if len(sink.seen) == 5 else None
    publisher.run(stop)
    assert len(outbox) == 0
    assert [update_id for update_id, _, _ in sink.seen].count(f"a/{outbox.incarnation}/0") == 4
    assert clock.time_s == pytest.approx(RETRY_S[0] * (1 + 2 + 4))
    assert publisher.problem is None


def test_the_backoff_is_bounded(parts):
    publisher, _, sink, clock, _ = parts(*[BrokerUnavailable("away")] * 30)
    stop = Stop()
    times = []
    sink.after = lambda: (times.append(clock.time_s), stop.set() if len(times) == 25 else None)
    publisher.run(stop)
    assert max(b - a for a, b in pairwise(times)) == RETRY_S[1]
    assert publisher.problem == "away"


def test_flush_publishes_all_that_is_left(parts):
    publisher, outbox, _, _, _ = parts(BrokerUnavailable("away"))
    assert publisher.flush(10.0)
    assert len(outbox) == 0


def test_flush_goes_on_when_the_disk_does_not_read(parts):
    publisher, outbox, _, _, _ = parts(OSError("Input/output error"))
    assert publisher.flush(10.0)
    assert len(outbox) == 0


def test_flush_gives_up_in_time_and_loses_nothing(parts):
    publisher, outbox, _, clock, _ = parts(*[BrokerUnavailable("away")] * 100)
    assert not publisher.flush(3.0)
    assert 3.0 <= clock.time_s < 4.0
    assert len(outbox) == 2
