"""Seconds of a transfer: latency plus bits over the client's own rate."""

import math

import numpy as np
import pytest

from ops.simulation.network import Network


def test_seconds_are_latency_plus_bits_over_the_rate():
    network = Network(80, 8, 50, 0.0, 2, seed=1)
    assert network.down_seconds(0, 1_000_000) == pytest.approx(0.05 + 0.1)
    assert network.up_seconds(1, 1_000_000) == pytest.approx(0.05 + 1.0)
    assert network.up_seconds(1, 0) == 0.05


def test_zero_is_no_limit():
    network = Network(0, 8, 20, 1.0, 3, seed=1)
    assert [network.down_seconds(client, 10**9) for client in range(3)] == [0.02] * 3
    assert network.up_seconds(0, 10**9) > 1
    assert Network(0, 0, 0, 1.0, 3, seed=1).up_seconds(2, 10**9) == 0


def test_rates_are_log_normal_over_the_clients_and_the_same_up_and_down():
    clients = 5000
    network = Network(8, 4, 0, 0.5, clients, seed=1)
    rates = np.array([1 / network.down_seconds(client, 1_000_000) for client in range(clients)])
    assert np.log(rates).mean() == pytest.approx(0, abs=4 * 0.5 / math.sqrt(clients))
    assert np.log(rates).std() == pytest.approx(0.5, rel=0.05)
    up = np.array([2 / network.up_seconds(client, 1_000_000) for client in range(clients)])
    np.testing.assert_allclose(up, rates)


def test_the_seed_decides_and_other_clients_do_not():
    one, more, other = (Network(1, 1, 0, 0.5, n, seed) for n, seed in ((3, 1), (9, 1), (3, 2)))
    assert one.up_seconds(2, 999) == more.up_seconds(2, 999) != other.up_seconds(2, 999)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((-1, 1, 0, 0, 1), "down_mbps is -1"),
        ((1, math.inf, 0, 0, 1), "up_mbps is inf"),
        ((1, 1, math.nan, 0, 1), "latency_ms is nan"),
        ((1, 1, 0, -1, 1), "spread of -1"),
        ((1, 1, 0, 0, 0), "0 clients"),
    ],
)
def test_arguments_are_checked(arguments, message):
    with pytest.raises(ValueError, match=message):
        Network(*arguments, seed=1)
