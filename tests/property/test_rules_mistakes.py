"""Mistakes of published code (algorithms notes, section 8), by their numbers there: a small sum for each."""

import numpy as np
import pytest

from tests.builders import NUM_PARAMS, System


def of(value):
    return np.full(NUM_PARAMS, value, np.float32)


def send(system, *updates):
    """Publish (client, value, base_version) one by one."""
    for client, value, base in updates:
        system.publish(of(value), update_id=f"{client}/i/{system.sequence}", base_version=base)
        system.drain()


def newest(system):
    found = system.weights
    assert (found == found[0]).all()
    return float(found[0])


@pytest.mark.parametrize("rule", ["fedbuff", "fedavg", "fednova", "rescaled", "ca2fl"])
def test_1_a_buffer_is_averaged_not_summed(rule):
    """FLSim's reducer sums: its server_lr is eta / K."""
    clients = {"clients": 4} if rule in ("rescaled", "ca2fl") else {}
    system = System(rule=rule, buffer_size=4, server_lr=0.5, **clients)
    send(system, *((client, 6, 0) for client in "abcd"))
    assert newest(system) == pytest.approx(3)


@pytest.mark.parametrize("rule", ["fedbuff", "fednova", "rescaled"])
def test_2_nothing_divides_by_the_weight_of_a_mean_staleness(rule):
    """FLSim divides by s(1): a fresh update counts 1.41 there, one of tau = 1 exactly 1."""
    system = System(rule=rule, buffer_size=1, staleness="polynomial(0.5)")
    send(system, ("a", 0, 0), ("a", 1, 1))
    assert newest(system) == pytest.approx(1)
    send(system, ("a", 1, 1))
    assert newest(system) == pytest.approx(1 + 2**-0.5)


def test_5_what_is_left_in_a_buffer_is_no_version():
    system = System(buffer_size=3)
    send(system, ("a", 1, 0), ("b", 1, 0))
    system.aggregator.finish()
    assert (system.store.head().version, newest(system)) == (0, 0)


def test_6_fedbuff_has_a_server_lr_and_weighs_by_staleness_not_by_samples():
    """Plato's has neither; its comment says by samples, its code does not."""
    system = System(buffer_size=2, server_lr=0.5, staleness="polynomial(0.5)")
    send(system, ("a", 0, 0), ("b", 0, 0), ("a", 0, 0), ("b", 0, 0), ("a", 0, 0), ("b", 0, 0))
    system.publish(of(8), update_id="a/i/90", base_version=0, num_samples=1000)  # tau = 3
    system.publish(of(8), update_id="b/i/91", base_version=3, num_samples=1)
    system.drain()
    assert newest(system) == pytest.approx(0.5 * (8 / 2 + 8) / 2)


def test_6_a_stale_update_leaves_no_mark_on_the_next_fresh_one():
    """Plato multiplies its alpha by s(tau) for good."""
    system = System(rule="fedasync", alpha=0.5, staleness="polynomial(2)")
    send(system, ("a", 0, 0), ("a", 0, 0), ("a", 0, 0), ("a", 8, 3))
    assert newest(system) == pytest.approx(4)


@pytest.mark.parametrize("tau", range(1, 5))
def test_7_the_root_is_of_one_plus_tau(tau):
    """NVFlare: 1 / (1 + tau^0.5), with tau one too high."""
    system = System(buffer_size=1, staleness="polynomial(0.5)")
    send(system, *[("a", 0, 0)] * tau, ("a", 1, 0))
    assert newest(system) == pytest.approx((1 + tau) ** -0.5)


def test_8_the_model_is_moved_not_replaced_by_an_average_of_models():
    """FedScale: the weighed mean of the workers' models; of two stale ones it would be 3, not 4."""
    system = System(of(2), buffer_size=2, staleness="constant")
    send(system, ("a", 1, 0), ("b", 1, 0))  # 3
    send(system, ("a", 1, 0), ("b", 1, 0))  # their models are 3; the step is 1
    assert newest(system) == pytest.approx(4)


def test_9_a_delta_is_relative_to_its_own_base_and_divided_by_k():
    """APPFL: worker's model - current model, / n clients, not / K."""
    system = System(of(10), buffer_size=2, staleness="constant")
    send(system, ("a", 4, 0), ("b", 4, 0), ("a", 4, 0), ("b", 4, 0))
    assert newest(system) == pytest.approx(18)


@pytest.mark.parametrize("rule", ["ace", "aced", "ringleader"])
def test_9_what_a_client_sent_last_replaces_what_it_sent_before(rule):
    """APPFL's MIFA never resets its sum: the same delta twice would step 1, then 2."""
    system = System(rule=rule, clients=1)
    send(system, ("a", 1, 0), ("a", 1, 1), ("a", 1, 2))
    assert newest(system) == pytest.approx(3)


@pytest.mark.parametrize("rule", ["fedbuff", "fedavg", "fednova", "rescaled", "ca2fl", "area"])
def test_9_a_buffer_begins_at_zero_again(rule):
    clients = {"clients": 2} if rule in ("rescaled", "ca2fl", "area") else {}
    system = System(rule=rule, buffer_size=2, **clients)
    send(system, ("a", 4, 0), ("b", 2, 0))
    assert newest(system) == pytest.approx(3)
    send(system, ("a", 0, 1), ("b", 0, 1))
    assert newest(system) == pytest.approx(3)


def test_10_deltas_are_added_not_weights():
    """FedML adds weight * model to the model: it doubles."""
    system = System(of(5), buffer_size=1)
    send(system, ("a", 0, 0), ("a", 1, 1))
    assert newest(system) == pytest.approx(6)


def test_12_fedbuff_divides_by_k_once():
    system = System(buffer_size=5, staleness="constant")
    send(system, *((client, 1, 0) for client in "abcde"))
    assert newest(system) == pytest.approx(1)


def test_12_ca2fl_calibrates_with_the_caches_of_before():
    """AFL-Lib overwrites the caches first: its differences, and so the calibration, are 0.

    n = 4, K = 2. Buffer one: h = 0, hbar = 0, v = (8 + 4) / 2 = 6. Then h = (8, 4, 0, 0), hbar = 3.
    Buffer two, of a with 10 and c with 6: v = 3 + ((10 - 8) + (6 - 0)) / 2 = 7. Then hbar = (10 + 4 + 6) / 4 = 5.
    Buffer three, of d twice, 2 then 4: v = 5 + ((2 - 0) + (4 - 2)) / 2 = 7.
    """
    system = System(rule="ca2fl", buffer_size=2, clients=4)
    send(system, ("a", 8, 0), ("b", 4, 0))
    assert newest(system) == pytest.approx(6)
    send(system, ("a", 10, 1), ("c", 6, 0))
    assert newest(system) == pytest.approx(13)
    send(system, ("d", 2, 0), ("d", 4, 2))
    assert newest(system) == pytest.approx(20)


def test_12_fadas_divides_by_the_largest_v_so_far():
    """AFL-Lib divides by sqrt(v), which has forgotten the first gradient: beta2 = 0 makes v = g^2."""
    system = System(rule="fadas(1,0,0,1e-8)", buffer_size=1, server_lr=1.0)
    send(system, ("a", 100, 0))
    assert newest(system) == pytest.approx(1)
    send(system, ("a", 1, 1))
    assert newest(system) == pytest.approx(1 + 1 / 100)  # 2 with sqrt(v)


def test_13_a_hinge_with_a_slope_below_one_never_weighs_up():
    """flgo lacks the + 1: 1 / (0.1 * 1) = 10."""
    system = System(buffer_size=1, staleness="hinge(0.1,0)")
    send(system, ("a", 0, 0), ("a", 1.1, 0))
    assert newest(system) == pytest.approx(1)


@pytest.mark.parametrize(("base", "divisor"), [(3, 1), (2, 1), (1, 2), (0, 3)])
def test_14_fadas_counts_every_delay_of_a_buffer_in_full(base, divisor):
    """Its code misses one version for all workers but one; here eta / tau_max, eta up to tau_c = 1."""
    system = System(rule="fadas(1,0,0,1e-8)", buffer_size=2, server_lr=1.0)
    send(system, *[("a", 0, 0), ("b", 0, 0)] * 3)  # version 3, nothing moved
    send(system, ("a", 5, base), ("b", 5, 3))
    assert newest(system) == pytest.approx(1 / divisor)


def test_14_a_delta_of_fadas_holds_nothing_of_what_the_server_did_since():
    """Its code adds x_{t-1} - x_t to all but one of them: with beta1 = 0 zero deltas must not move the model."""
    system = System(rule="fadas(1,0,0,1e-8)", buffer_size=1, server_lr=1.0)
    send(system, ("a", 5, 0), ("a", 0, 0))
    assert newest(system) == pytest.approx(1)
