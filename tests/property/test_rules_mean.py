"""Rules with a robust combiner: updates are kept one by one, and what the combiner gets is what the mean is of."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import aggregator.rules
from shared.rules import AVERAGING
from tests.builders import NUM_PARAMS, System, weights
from tests.rule_oracles import oracle_of
from tests.rule_scenarios import FAULTS, SCENARIOS, BlindStore, check_outcomes, play, settings_of


class MeanOfRows:
    """A combiner that takes the mean after all, notes the rows, and remembers what it returned last."""

    def __init__(self):
        self.arrays = {"fake_last": 0.0}
        self.seen, self.used = [], True

    def combine(self, state, rows):
        self.seen.append(rows.copy())
        state.arrays["fake_last"][:] = rows.mean(axis=0)
        rows[0] = rows.mean(axis=0)
        return rows[0]


@pytest.fixture
def combiner(monkeypatch):
    fake = MeanOfRows()
    monkeypatch.setattr(aggregator.rules, "combiner_of", lambda _: fake if fake.used else None)
    return fake


@pytest.mark.parametrize("rule", AVERAGING)
@pytest.mark.parametrize("codec", ["float32", "all | int8 | zstd"])
def test_the_mean_of_the_rows_is_the_rules_own_mean_whatever_happens_on_the_way(rule, codec, monkeypatch):
    fake = MeanOfRows()
    monkeypatch.setattr(aggregator.rules, "combiner_of", lambda _: fake)

    @settings(max_examples=60)
    @given(settings_of(rule), SCENARIOS, FAULTS)
    def holds(drawn, scenario, faults):
        store, oracle = BlindStore(), oracle_of(weights(99), **drawn)
        store.faults = list(faults)
        system = System(weights(99), store, **drawn)
        play(system, oracle, scenario, codec)
        assert system.store.head().version == len(oracle.versions) - 1
        scale = max(1.0, max(np.abs(version).max() for version in oracle.versions))
        np.testing.assert_allclose(system.weights, oracle.versions[-1], rtol=0, atol=1e-5 * scale)
        check_outcomes(system, oracle)
        slots = {f"slot:{place}" for place in range(len(oracle.buffer))}
        assert set(system.store._kept) == slots
        if system.store.head().revision:
            stored = system.store.load()
            assert set(stored.kept) == slots
            assert stored.arrays.keys() == (oracle.arrays().keys() - {"delta_sum"}) | {"fake_last"}

    holds()


def of(value):
    return np.full(NUM_PARAMS, value, np.float32)


def test_rows_are_weighed_so_that_their_mean_is_the_step(combiner):
    system = System(buffer_size=2, weight_by_samples=True, staleness="constant")
    system.publish(of(1), num_samples=10)
    system.publish(of(4), num_samples=30)
    system.drain()
    [rows] = combiner.seen
    np.testing.assert_allclose(rows, [of(1 * 10 * 2 / 40), of(4 * 30 * 2 / 40)], rtol=1e-6)
    np.testing.assert_allclose(system.weights, 3.25, rtol=1e-6)


def test_a_throttled_repeat_is_a_row_of_its_own_and_no_part_of_the_divisor(combiner):
    system = System(robust="throttle(2)", buffer_size=2)
    for client, value in (("a", 3), ("a", 6), ("b", 6)):
        system.publish(of(value), update_id=f"{client}/i/{system.sequence}")
    system.drain()
    [rows] = combiner.seen
    np.testing.assert_allclose(rows, [of(3 * 1.5), of(3 * 1.5), of(6 * 1.5)], rtol=1e-6)
    np.testing.assert_allclose(system.weights, (3 + 6 / 2 + 6) / 2, rtol=1e-6)


def test_a_repeat_neither_fills_a_buffer_nor_dilutes_it():
    system = System(robust="throttle(2)", buffer_size=2, weight_by_samples=True)
    for client, value, num_samples in (("a", 3, 10), ("a", 6, 1000), ("b", 6, 30)):
        system.publish(of(value), update_id=f"{client}/i/{system.sequence}", num_samples=num_samples)
        system.drain()
        assert system.store.head().version == (client == "b")
    np.testing.assert_allclose(system.weights, (3 * 10 + 6 * 1000 / 2 + 6 * 30) / 40, rtol=1e-6)


def test_a_buffer_of_sums_is_not_continued_update_by_update(combiner):
    combiner.used = False
    system = System(buffer_size=3)
    system.publish(of(1))
    system.drain()
    system.aggregator.finish()
    combiner.used = True
    with pytest.raises(Exception, match="open buffer is of fedbuff, these settings are of fedbuff of kept updates"):
        system.restart()


def test_an_open_buffer_of_another_combiner_is_continued():
    """Its updates are kept as they came."""
    system = System(robust="median", buffer_size=4, staleness="constant")
    for value in (1, 2):
        system.publish(of(value))
    system.drain()
    system.aggregator.finish()
    system.restart(robust="trimmed_mean(0.3)")
    for value in (4, 100):
        system.publish(of(value))
    system.drain()
    np.testing.assert_allclose(system.weights, 3, rtol=1e-6)  # of 2 and 4


def test_a_lowered_buffer_size_makes_a_version_of_all_that_is_kept(combiner):
    system = System(buffer_size=5)
    for value in (1, 2, 3):
        system.publish(of(value))
    system.drain()
    system.aggregator.finish()
    system.restart(buffer_size=1)
    system.publish(of(6))
    system.drain()
    assert len(combiner.seen[0]) == 4
    np.testing.assert_allclose(system.weights, 3, rtol=1e-6)
    assert system.store._kept == {}


@given(st.integers(1, 6), st.integers(0, 2**32 - 1))
@settings(max_examples=30)
def test_a_norm_limit_is_not_undone_by_the_momentum(size, seed):
    """w is the staleness weight alone: were the guard's factor in it, the momentum would hold what was cut off."""
    rng = np.random.default_rng(seed)
    system = System(robust="norm(0.5)", server_optimizer="momentum(0.5)", buffer_size=1)
    m, x = np.zeros(NUM_PARAMS), np.zeros(NUM_PARAMS)
    for _ in range(size):
        delta = rng.standard_normal(NUM_PARAMS).astype(np.float32) * np.float32(10)
        system.publish(delta)
        system.drain()
        norm = np.linalg.norm(delta.astype(np.float64))
        m = 0.5 * m + 0.5 * delta * min(1, 0.5 / norm)
        x = x + m
    np.testing.assert_allclose(system.weights, x, atol=1e-5)
