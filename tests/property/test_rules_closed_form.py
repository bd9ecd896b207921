"""Every rule through broker, loop and store, against float64 formulas written independently in `rule_oracles.py`.

A scenario publishes updates of several workers, trained from any version somebody could have pulled, redelivers some,
lets the aggregator work in pieces, kills it in between, and compares what is stored at the end with the formula: the
weights, every outcome, the open buffer, what optimizers remember, which records are kept.
"""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aggregator.rules import RULES
from shared.rules import RULES as SPECS
from tests.builders import NUM_PARAMS, System, weights
from tests.rule_oracles import ORACLES, Oracle, oracle_of
from tests.rule_scenarios import ACTIONS, FAULTS, SCENARIOS, BlindStore, check_outcomes, play, settings_of


def check(system: System, oracle: Oracle, tolerance=1e-5) -> None:
    """Compare what is durable with the formula."""
    stored = system.store.load()
    assert stored.head.version == len(oracle.versions) - 1
    scale = max(1.0, max(np.abs(version).max() for version in oracle.versions))
    np.testing.assert_allclose(system.weights, oracle.versions[-1], rtol=0, atol=tolerance * scale)
    check_outcomes(system, oracle)
    assert system.unacked == 0
    if stored.head.revision == 0:
        return
    expected = oracle.arrays()
    assert stored.arrays.keys() == expected.keys()
    for name, array in expected.items():
        atol = tolerance * max(1.0, 10 * np.abs(array).max())
        np.testing.assert_allclose(stored.arrays[name], array, rtol=0, atol=atol, err_msg=name)
    assert set(stored.kept) == set(system.store._kept) == oracle.kept()


def job(start=None, faults=(), **drawn):
    """Return a system and its oracle."""
    start = weights(99) if start is None else start
    store = BlindStore()
    store.faults = list(faults)
    return System(start, store, **drawn), oracle_of(start, **drawn)


def tolerance_of(rule):
    """Ringleader writes the mean of several updates anew: float16 here, where tensors are small."""
    return 2e-3 if rule == "ringleader" else 1e-5


def test_every_rule_has_an_oracle_here():
    assert ORACLES.keys() == RULES.keys() == SPECS.keys()


@pytest.mark.parametrize("rule", sorted(RULES))
def test_a_rule_is_its_formula_whatever_happens_on_the_way(rule):
    @settings(max_examples=100)
    @given(settings_of(rule), SCENARIOS)
    def holds(drawn, scenario):
        system, oracle = job(**drawn)
        play(system, oracle, scenario)
        check(system, oracle, tolerance_of(rule))

    holds()


@pytest.mark.parametrize("rule", sorted(RULES))
def test_a_rule_is_its_formula_although_commits_fail(rule):
    @settings(max_examples=100)
    @given(settings_of(rule), SCENARIOS, FAULTS)
    def holds(drawn, scenario, faults):
        system, oracle = job(faults=faults, **drawn)
        play(system, oracle, scenario)
        check(system, oracle, tolerance_of(rule))

    holds()


@pytest.mark.parametrize("rule", sorted(RULES))
def test_a_rule_is_its_formula_of_compressed_deltas(rule):
    @settings(max_examples=40)
    @given(settings_of(rule), SCENARIOS)
    def holds(drawn, scenario):
        system, oracle = job(**drawn)
        play(system, oracle, scenario, codec="all | int8 | zstd")
        check(system, oracle, tolerance_of(rule))

    holds()


def whole_sixties(seed):
    """Return a delta whose means of up to five are whole numbers, which float16 holds."""
    return 60 * np.random.default_rng(seed).integers(-8, 9, NUM_PARAMS).astype(np.float32)


@settings(max_examples=100)
@given(settings_of("ringleader"), st.lists(ACTIONS, min_size=5, max_size=25))
def test_ringleader_is_its_formula_to_the_last_bits_where_means_are_whole_numbers(drawn, scenario):
    system, oracle = job(**drawn | {"robust": ""})  # a norm limit would leave no whole numbers
    play(system, oracle, scenario, delta_of=whole_sixties)
    check(system, oracle)


def deltas(*values):
    return [np.full(NUM_PARAMS, value, np.float32) for value in values]


def test_fedbuff_divides_by_k_not_by_the_sum_of_weights():
    """Two fresh and two stale updates, tau 3: (1 + 1 + 1/2 + 1/2) * 1 / 4, not / 3 (FedScale) and not / 1 (FLSim)."""
    system = System(buffer_size=1, staleness="polynomial(0.5)")
    for delta in deltas(0, 0, 0):
        system.publish(delta)
        system.drain()
    system.restart(buffer_size=4)
    for delta, base in zip(deltas(1, 1, 1, 1), (3, 3, 0, 0), strict=True):
        system.publish(delta, base_version=base)
    system.drain()
    np.testing.assert_allclose(system.weights, 3 / 4, rtol=1e-6)


def test_fedbuff_by_samples_divides_by_the_number_of_samples():
    system = System(buffer_size=2, weight_by_samples=True, server_lr=0.5)
    for delta, num_samples in zip(deltas(1, 4), (10, 30), strict=True):
        system.publish(delta, num_samples=num_samples)
    system.drain()
    np.testing.assert_allclose(system.weights, 0.5 * (10 * 1 + 30 * 4) / 40, rtol=1e-6)


def test_fedbuff_ignores_samples_unless_told():
    system = System(buffer_size=2)
    for delta, num_samples in zip(deltas(1, 4), (10, 30), strict=True):
        system.publish(delta, num_samples=num_samples)
    system.drain()
    np.testing.assert_allclose(system.weights, 2.5, rtol=1e-6)


@pytest.mark.parametrize(("lag", "expected"), [(0, 10.0), (1, 10 / 2**0.5), (2, 10 / 3**0.5)])
def test_staleness_is_counted_before_the_version_moves(lag, expected):
    system = System(buffer_size=1, staleness="polynomial(0.5)")
    for delta in deltas(0, 0):
        system.publish(delta)
        system.drain()
    system.publish(deltas(10)[0], base_version=2 - lag)
    system.drain()
    np.testing.assert_allclose(system.weights, expected, rtol=1e-6)
    entry = system.store.ledger[-1]["updates"][0]
    assert (entry["staleness"], entry["version"]) == (lag, 2)


def test_the_updates_of_one_buffer_are_equally_fresh():
    """The version does not move within a buffer, so the last of K is as fresh as the first."""
    system = System(buffer_size=3)
    for delta in deltas(1, 1, 1):
        system.publish(delta)
    system.drain()
    assert [e["staleness"] for c in system.store.ledger for e in c["updates"]] == [0, 0, 0]


def test_fedasync_moves_towards_the_workers_own_model_not_along_its_delta():
    system = System(rule="fedasync", alpha=0.5, staleness="constant")
    system.publish(deltas(8)[0])  # x1 = 0.5 * 0 + 0.5 * 8 = 4
    system.drain()
    system.publish(deltas(2)[0], base_version=0)  # x2 = 0.5 * 4 + 0.5 * (0 + 2) = 3
    system.drain()
    np.testing.assert_allclose(system.weights, 3.0, rtol=1e-6)


def test_fedasync_does_not_compound_its_alpha():
    """Plato multiplies alpha by s(tau) for good; a fresh update after a stale one must count fully again."""
    system = System(rule="fedasync", alpha=0.5, staleness="polynomial(2)")
    for delta, base in zip(deltas(0, 0, 6), (0, 0, 2), strict=True):
        system.publish(delta, base_version=base)
        system.drain()
    np.testing.assert_allclose(system.weights, 3.0, rtol=1e-6)


@pytest.mark.parametrize("name", ["int8 | zstd", "int4", "float16"])
def test_a_compressed_delta_is_weighed_like_any_other(name):
    system = System(buffer_size=2, codec=name, staleness="polynomial(0.5)", server_lr=2.0)
    for _ in range(2):
        system.publish(deltas(7)[0], codec=name)
    system.drain()
    for _ in range(2):
        system.publish(deltas(7)[0], codec=name, base_version=0)
    system.drain()
    np.testing.assert_allclose(system.weights, 2 * 7 * (1 + 2**-0.5), rtol=2e-3)
