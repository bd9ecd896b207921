"""Devices whose clock is years off: their updates count, their times spoil nothing."""

import time
from dataclasses import replace
from datetime import UTC, datetime

import numpy as np
import pytest

from ops.dead_letters import TIME_S_MAX, _clock, select, time_of
from shared.messages import decode, encode, split
from shared.model_image import ModelImage
from shared.transport.dead_letters import Letter
from tests.builders import System, add_one, device_of, update_of, weights

NOW_S = 1_790_000_000.0  # 2026
SKEWED = {"1970": 0.0, "2038": 2.0**31, "far ahead": 4e18, "an hour ahead": NOW_S + 3600, "2000": 946_684_800.0}


def latencies(system):
    """Return count and sum of the latency histogram."""
    [family] = system.metrics.latency.collect()
    named = {sample.name.rpartition("_")[2]: sample.value for sample in family.samples if "le" not in sample.labels}
    return named["count"], named["sum"]


@pytest.fixture
def system():
    system = System(buffer_size=1, staleness="constant")
    system.clock.time_s = NOW_S
    return system


@pytest.mark.parametrize("created_at", SKEWED.values(), ids=SKEWED)
def test_an_update_of_a_wrong_clock_counts_and_its_latency_does_not(system, created_at):
    system.publish(np.ones(7, np.float32), created_at=created_at)
    system.publish(np.ones(7, np.float32), created_at=NOW_S - 7)
    system.drain()
    assert system.weights.tolist() == [2] * 7
    assert system.metrics.updates.labels("job", "applied")._value.get() == 2
    count, total = latencies(system)
    assert count == 1
    assert 7 <= total < 10


@pytest.mark.parametrize(("ahead_s", "latency_s"), [(0, 0), (59, 0), (-86_400, 86_400), (-80 * 86_400, 80 * 86_400)])
def test_a_clock_a_little_off_and_a_long_wait_in_an_outbox_are_measured(system, ahead_s, latency_s):
    system.publish(np.ones(7, np.float32), created_at=NOW_S + ahead_s)
    system.drain()
    count, total = latencies(system)
    assert (count, pytest.approx(total, abs=1)) == (1, latency_s)


@pytest.mark.parametrize("created_at", [0.0, 4e18])
def test_parts_of_an_update_age_by_the_servers_clock_alone(created_at):
    system = System(np.zeros(100, np.float32), buffer_size=1, parts_age_max_s=100.0, commit_age_max_s=1.0)
    system.clock.time_s = NOW_S
    parts = list(split(encode(update_of(weights(1, 100), update_id="a/i/0", created_at=created_at)), 200))
    assert len(parts) == 2
    system.send_bytes(parts[0], "a", "a/i/0")
    system.drain()
    system.clock.time_s += 99
    system.aggregator.step()
    assert system.aggregator.state.partial
    system.send_bytes(parts[1], "a", "a/i/0")
    system.drain()
    assert system.metrics.updates.labels("job", "applied")._value.get() == 1


def test_what_is_known_of_a_client_has_the_servers_time(system):
    system.publish(weights(1), created_at=0.0)
    system.drain()
    assert system.store.clients["a"]["seen"] == NOW_S


def test_a_device_before_1970_sends_updates_that_are_taken(tmp_path):
    start = {"w": np.zeros((2, 3), np.float32)}
    system = System(ModelImage.of(start), buffer_size=1)
    system.clock.time_s = -1e6
    device = device_of(tmp_path, system, add_one, lambda: {"w": np.zeros((2, 3), np.float32)})
    device.worker.step()
    body = device.outbox.oldest().body()
    assert decode(body, len(body)).created_at == 0.0
    device.publisher.step()
    system.clock.time_s = NOW_S
    system.drain()
    assert system.metrics.updates.labels("job", "applied")._value.get() == 1


# --- dead letters: their time is the aggregator's, unless the broker put them there by itself


def letter_of(rejected_at, created_at):
    body = encode(update_of(weights(1), created_at=created_at))
    return Letter(1, body, "a", "a/i/0", "broker:maxlen", "", rejected_at, "update.job.a", {}, {}, (0, 1))


@pytest.mark.parametrize("rejected_at", [0, 2**31, int(TIME_S_MAX) - 1, int(TIME_S_MAX), 2**62, 2**64 - 1, None])
@pytest.mark.parametrize("created_at", [0.0, NOW_S, 1e300])
def test_any_time_of_a_letter_can_be_shown_and_selected_by(rejected_at, created_at):
    letter = letter_of(rejected_at, created_at)
    at = time_of(letter)
    assert at is None or 0 <= at < TIME_S_MAX
    assert _clock(at)
    selection = select((), False, None, None, "1h")
    assert selection.fits(letter, time.time()) in (True, False)


def test_a_letter_that_the_broker_moved_has_the_brokers_time_not_the_devices():
    moved = datetime(2026, 9, 21, 12, 0, tzinfo=UTC)
    letter = replace(letter_of(0, 0.0), headers={"x-death": [{"time": moved, "count": 1}]})
    assert time_of(letter) == moved.timestamp()
    for strange in ([], [7], "x", [{"time": 7}], None):
        assert time_of(replace(letter, headers={"x-death": strange})) == 0
    assert time_of(replace(letter, reason="checksum", rejected_at=5)) == 5  # the aggregator wrote its own
