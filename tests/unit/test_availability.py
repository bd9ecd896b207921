"""When clients are there: the share of time, the pattern, and that the next time is truly the next."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ops.simulation.availability import Availability, parse_availability

HOUR, DAY = 3600, 86400
SPECS = [
    "always",
    "diurnal(8)",
    "diurnal(hours=5.3, spread=3)",
    "diurnal(24)",
    "churn(on=0.3, period_min=7)",
    "churn(0.01, 0.02)",
    "churn(1)",
    "diurnal(1) & churn(0.05, 90)",
    "churn(0.5) & diurnal(8)",
]


def share_of_time(spec, client=None, clients=400):
    fleet = Availability(spec, 0.0, clients, 3)
    rng = np.random.default_rng(0)
    chosen = rng.integers(clients, size=20_000) if client is None else [client] * 20_000
    return np.mean(
        [fleet.available(int(c), float(t)) for c, t in zip(chosen, rng.uniform(0, 90 * DAY, 20_000), strict=True)]
    )


@pytest.mark.parametrize(
    ("spec", "share"),
    [
        ("always", 1.0),
        ("diurnal(8)", 1 / 3),
        ("diurnal(24)", 1.0),
        ("churn(0.8)", 0.8),
        ("churn(0.1, 240)", 0.1),
        ("always & diurnal(6) & churn(0.5)", 0.125),
    ],
)
def test_clients_are_there_the_share_of_time_asked_for(spec, share):
    assert share_of_time(spec) == pytest.approx(share, abs=0.02)
    assert share_of_time(spec, client=7) == pytest.approx(share, abs=0.03)


def windows(fleet, client, days, step_s=60):
    there = [fleet.available(client, float(t)) for t in range(0, days * DAY, step_s)]
    borders = np.flatnonzero(np.diff(there)) + 1
    return there, borders * step_s


def test_a_day_has_one_window_at_the_clients_own_hour():
    fleet = Availability("diurnal(8)", 0.0, 200, 3)
    begins = []
    for client in range(40):
        there, borders = windows(fleet, client, 3)
        assert np.mean(there) == pytest.approx(1 / 3, abs=0.002)
        assert len(borders) in (5, 6)
        begins.append(next(b for b in borders if there[b // 60]) / HOUR % 24)
    assert min(begins) < 3
    assert max(begins) > 21  # over the whole day


def test_spread_says_over_how_many_hours_the_windows_begin():
    together = Availability("diurnal(8, spread=0)", 0.0, 50, 3)
    assert all(together.available(c, 0.0) and together.available(c, 8 * HOUR - 1.0) for c in range(50))
    assert not any(together.available(c, 8.0 * HOUR) for c in range(50))
    near = Availability("diurnal(8, spread=4)", 0.0, 50, 3)
    assert all(near.available(c, 4.0 * HOUR) for c in range(50))
    assert not any(near.available(c, 12.0 * HOUR) for c in range(50))
    assert 5 < sum(near.available(c, 2.0 * HOUR) for c in range(50)) < 45


def test_churn_changes_only_between_slots_and_not_for_all_at_once():
    fleet = Availability("churn(0.5, 10)", 0.0, 30, 3)
    phases = set()
    for client in range(8):
        _, borders = windows(fleet, client, 1, step_s=1)
        assert 40 < len(borders) < 105  # of 144 slots every second one changes
        assert len({int(b) % 600 for b in borders}) == 1
        phases.add(int(borders[0]) % 600)
    assert len(phases) > 5


@given(st.sampled_from(SPECS), st.integers(0, 9), st.floats(0, 1e7), st.integers(0, 2**40))
def test_the_next_time_is_available_and_none_before_it_is(spec, client, time_s, seed):
    fleet = Availability(spec, 0.0, 10, seed)
    found = fleet.next_available(client, time_s)
    assert found >= time_s
    assert fleet.available(client, found)
    assert fleet.next_available(client, found) == found
    assert fleet.available(client, time_s) == (found == time_s)
    if found > time_s:
        assert found == int(found)  # days and slots begin at whole seconds, so that their borders are exact
        assert not fleet.available(client, math.nextafter(found, 0.0))
        between = np.linspace(time_s, found, 50, endpoint=False)
        assert not any(fleet.available(client, float(t)) for t in between)


@given(st.sampled_from(SPECS), st.integers(0, 9), st.integers(0, 1000), st.floats(-1e-6, 1e-6))
def test_borders_of_days_and_slots_are_no_trap(spec, client, number, near):
    fleet = Availability(spec, 0.0, 10, 1)
    time_s = max(0.0, fleet.next_available(client, number * 1234.0) + near)
    assert fleet.available(client, fleet.next_available(client, time_s))


@pytest.mark.parametrize("spec", ["diurnal(8)", "churn(0.5)"])
def test_the_seed_and_the_client_decide_and_other_clients_do_not(spec):
    def there(clients, seed, client=4):
        fleet = Availability(spec, 0.5, clients, seed)
        return [(fleet.available(client, t * 1800.0), fleet.drops(client, t)) for t in range(96)]

    assert there(5, 1) == there(50, 1)
    assert there(5, 1) != there(5, 2)
    assert there(5, 1) != there(5, 1, client=3)


def test_trips_are_lost_in_the_share_asked_for_and_at_any_point_of_them():
    fleet = Availability("always", 0.2, 10, 3)
    drops = [fleet.drops(client, trip) for client in range(10) for trip in range(3000)]
    lost = [drop for drop in drops if drop is not None]
    assert len(lost) / len(drops) == pytest.approx(0.2, abs=0.01)
    assert 0 < min(lost) < 0.01
    assert 0.99 < max(lost) < 1
    assert np.mean(lost) == pytest.approx(0.5, abs=0.02)
    assert fleet.drops(3, 77) == fleet.drops(3, 77)


def test_nothing_is_lost_by_default():
    fleet = Availability("always", 0.0, 2, 3)
    assert {fleet.drops(1, trip) for trip in range(1000)} == {None}


def test_the_patterns_are_read_in_the_common_grammar():
    assert [str(c) for c in parse_availability(" diurnal(6)&churn ")] == [
        "diurnal(hours=6, spread=24)",
        "churn(on=0.8, period_min=30)",
    ]


@pytest.mark.parametrize(
    ("spec", "dropout", "clients", "message"),
    [
        ("", 0, 1, "must be one of always, diurnal"),
        ("sometimes", 0, 1, "must be one of always, diurnal"),
        ("diurnal(0)", 0, 1, r"hours is 0, must be a number in \(0, 24\]"),
        ("churn(0)", 0, 1, "on is 0"),
        ("churn(0.5) & churn(0.6)", 0, 1, "each pattern may be given once"),
        ("always", 1, 1, "dropout of 1"),
        ("always", -0.1, 1, "dropout of -0.1"),
        ("always", 0, 0, "0 clients"),
    ],
)
def test_arguments_are_checked(spec, dropout, clients, message):
    with pytest.raises(ValueError, match=message):
        Availability(spec, dropout, clients, 3)
