"""What attackers send."""

import numpy as np
import pytest

from ops.simulation.attacks import attackers, hurry, parse_attack, spoil
from tests.builders import weights


def spoiled(text, seed=1):
    delta = weights(2, 1000)
    spoil(delta, parse_attack(text), seed)
    return delta


def test_sign_flip():
    np.testing.assert_array_equal(spoiled("sign_flip(2)"), -2 * weights(2, 1000))
    np.testing.assert_array_equal(spoiled("sign_flip"), -weights(2, 1000))


def test_noise_has_the_norm_asked_for_and_nothing_of_the_delta():
    delta, noise = weights(2, 1000), spoiled("noise(3)")
    assert np.linalg.norm(noise) == pytest.approx(3 * np.linalg.norm(delta), rel=1e-5)
    assert abs(noise @ delta) < 0.2 * np.linalg.norm(noise) * np.linalg.norm(delta)
    np.testing.assert_array_equal(noise, spoiled("noise(3)"))
    assert not np.array_equal(noise, spoiled("noise(3)", 2))


def test_noise_on_nothing_is_nothing():
    delta = np.zeros(10, np.float32)
    spoil(delta, parse_attack("noise(3)"), 1)
    assert not delta.any()


def test_flood_leaves_the_delta_and_takes_less_time():
    np.testing.assert_array_equal(spoiled("flood(7)"), weights(2, 1000))
    assert hurry(parse_attack("flood(7)")) == 7
    assert hurry(parse_attack("sign_flip(2) & flood")) == 10
    assert hurry(parse_attack("sign_flip(2)")) == 1


def test_parts_follow_each_other():
    np.testing.assert_array_equal(spoiled("sign_flip(2) & flood & sign_flip(3)"), 6 * weights(2, 1000))


def test_a_share_of_the_clients_attacks():
    chosen = attackers(0.2, 1000, 3)
    assert len(chosen) == 200
    assert chosen == attackers(0.2, 1000, 3) != attackers(0.2, 1000, 4)
    assert chosen <= set(range(1000))
    assert attackers(0, 10, 1) == frozenset()


@pytest.mark.parametrize("text", ["flip", "noise(0)", "flood(0.5)", "noise & ", "flood(1,2)"])
def test_what_is_no_attack(text):
    with pytest.raises(ValueError, match=r"must be|is not of"):
        parse_attack(text)
