"""Server optimizers against their papers, coordinate by coordinate in Python's floats, over many steps."""

import math
import tracemalloc

import numpy as np
import pytest

from aggregator.server_optimizer import OPTIMIZERS, amsgrad, optimizer_of
from aggregator.state import State
from shared.choices import parse
from shared.config import AggregatorSettings, load
from shared.errors import SettingsError
from shared.rules import ADAPTIVE, SERVER_OPTIMIZERS
from shared.vector import BLOCK_ELEMENTS
from tests.builders import model_of, weights

TEXTS = ("sgd", "momentum(0.7)", "momentum(0)", "adagrad(0.01)", "adam", "adam(0.5,0.9,0.01)", "yogi(0.9,0.99,0.01)")
FADAS = amsgrad("fadas", 0.9, 0.99, 1e-8)
EVERY = [optimizer_of(text) for text in TEXTS] + [FADAS]


def state_of(optimizer, start):
    arrays = {name: np.full(start.size, first, np.float32) for name, first in optimizer.arrays.items()}
    return State(0, 0, 0, model_of(start.copy()), arrays)


def sign(number):
    return (number > 0) - (number < 0)


class Coordinate:
    """One weight, and what its optimizer remembers of it."""

    def __init__(self, text, x):
        choice = None if text == "fadas" else parse(text, SERVER_OPTIMIZERS)
        self.name, self.x, self.m, self.peak = "fadas" if choice is None else choice.name, x, 0.0, 0.0
        self.p = {"beta1": 0.9, "beta2": 0.99, "epsilon": 1e-8} if choice is None else choice.numbers
        self.v = 0.0 if choice is None or "epsilon" not in self.p else self.p["epsilon"] ** 2

    def step(self, g, eta, w):
        if self.name == "sgd":
            self.x += eta * g
            return
        if self.name == "momentum":
            beta = self.p["beta"]
            self.m = (1 - (1 - beta) * w) * self.m + (1 - beta) * g
            self.x += eta * w * self.m
            return
        b1, b2 = self.p.get("beta1", 0.0), self.p.get("beta2", 0.0)
        self.m = b1 * self.m + (1 - b1) * g
        match self.name:
            case "adagrad":
                self.v += g**2
            case "adam" | "fadas":
                self.v = b2 * self.v + (1 - b2) * g**2
            case "yogi":
                self.v -= (1 - b2) * g**2 * sign(self.v - g**2)
        self.peak = max(self.peak, self.v)
        size = self.peak if self.name == "fadas" else self.v
        self.x += eta * self.m / (math.sqrt(size) + self.p["epsilon"])


def test_every_optimizer_of_the_table_is_built_and_no_other():
    assert OPTIMIZERS.keys() == SERVER_OPTIMIZERS.keys()
    for name in OPTIMIZERS:
        assert optimizer_of(name).name == name


@pytest.mark.parametrize("text", [*TEXTS, "fadas"])
@pytest.mark.parametrize("size", [1.0, 1e-4, 1e4])
def test_sixty_steps_are_the_formula(text, size):
    optimizer = FADAS if text == "fadas" else optimizer_of(text)
    start = weights(1)
    state, expected = state_of(optimizer, start), [Coordinate(text, float(x)) for x in start]
    for step in range(60):
        gradient = np.float32(size * (10 if step % 13 == 0 else 1)) * weights(step + 2)
        scale, eta, w = 1 / (1 + step % 4), 0.1 + 0.05 * (step % 3), 1.0 if step % 3 else 0.4
        optimizer.step(state, gradient, scale, eta, w)
        for coordinate, g in zip(expected, gradient, strict=True):
            coordinate.step(scale * float(g), eta, w)
    moved = max(abs(c.x - float(x)) for c, x in zip(expected, start, strict=True))
    np.testing.assert_allclose(state.weights, [c.x for c in expected], rtol=0, atol=2e-6 * max(1, moved))


@pytest.mark.parametrize("optimizer", EVERY, ids=lambda o: o.name)
def test_blocks_are_joined_without_gap_or_overlap(optimizer):
    """Coordinates are independent: a long vector of one repeated pattern moves like the pattern, wherever it is cut."""
    pattern, repeats = 11, (2 * BLOCK_ELEMENTS) // 11 + 3
    short, long = state_of(optimizer, weights(0, pattern)), state_of(optimizer, np.tile(weights(0, pattern), repeats))
    for step in range(3):
        gradient = weights(step + 1, pattern)
        optimizer.step(short, gradient, 0.5, 0.1, 0.7)
        optimizer.step(long, np.tile(gradient, repeats), 0.5, 0.1, 0.7)
    np.testing.assert_array_equal(long.weights, np.tile(short.weights, repeats))
    for name in optimizer.arrays:
        np.testing.assert_array_equal(long.arrays[name], np.tile(short.arrays[name], repeats), err_msg=name)


@pytest.mark.parametrize("optimizer", EVERY, ids=lambda o: o.name)
def test_no_temporary_is_of_model_size_and_the_gradient_stays(optimizer):
    state, gradient = state_of(optimizer, weights(0, 2**21)), weights(1, 2**21)
    before = gradient.copy()
    optimizer.step(state, gradient, 0.5, 0.1, 1.0)
    tracemalloc.start()
    optimizer.step(state, gradient, 0.5, 0.1, 1.0)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < gradient.nbytes / 8
    np.testing.assert_array_equal(gradient, before)


@pytest.mark.parametrize("optimizer", EVERY, ids=lambda o: o.name)
def test_nothing_comes_of_a_zero_gradient_at_first(optimizer):
    state = state_of(optimizer, weights(0))
    optimizer.step(state, np.zeros(7, np.float32), 1.0, 1.0, 1.0)
    np.testing.assert_array_equal(state.weights, weights(0))


def test_no_two_optimizers_share_an_array():
    """So that a job that changes its optimizer starts the new one afresh."""
    names = [name for optimizer in (*map(optimizer_of, OPTIMIZERS), FADAS) for name in optimizer.arrays]
    assert len(names) == len(set(names))
    assert "delta_sum" not in names


@pytest.mark.parametrize("name", ["adagrad", "adam", "yogi"])
@pytest.mark.parametrize("epsilon", [1e-12, 1e-3])
def test_the_smallest_epsilon_is_no_zero_in_float32(name, epsilon):
    text = f"{name}(epsilon={epsilon})"
    optimizer = optimizer_of(text)
    assert optimizer.arrays[f"{name}_v"] == pytest.approx(epsilon**2)
    state = state_of(optimizer, weights(0))
    assert state.arrays[f"{name}_v"].min() > 0
    optimizer.step(state, np.zeros(7, np.float32), 1.0, 1.0, 1.0)
    assert np.isfinite(state.weights).all()


@pytest.mark.parametrize("text", ["adam(epsilon=0)", "adam(epsilon=1e-30)", "yogi(1)", "momentum(1)", "momentum(-0.1)"])
def test_impossible_values_are_refused_with_the_range(text):
    with pytest.raises(SettingsError, match=r"must be a number in "):
        load(AggregatorSettings, {"server_optimizer": text})


def test_the_momentum_of_fresh_updates_is_fedavgm():
    """In sum form m <- beta m + g, x <- x + (1 - beta) eta m: torch's SGD with momentum and that lr."""
    optimizer, total, x = optimizer_of("momentum(0.8)"), np.zeros(7), np.zeros(7)
    state = state_of(optimizer, np.zeros(7, np.float32))
    for step in range(30):
        total = 0.8 * total + weights(step)
        x += 0.2 * 0.5 * total
        optimizer.step(state, weights(step), 1.0, 0.5, 1.0)
    np.testing.assert_allclose(state.weights, x, atol=1e-5)


def test_the_momentum_of_stale_updates_is_flsims():
    """One update of weight w: beta' = beta + (1 - beta)(1 - w), gradient w Delta, lr w eta; its m is a sum."""
    beta, optimizer, total, x = 0.8, optimizer_of("momentum(0.8)"), np.zeros(7), np.zeros(7)
    state = state_of(optimizer, np.zeros(7, np.float32))
    for step in range(30):
        w = 1 / math.sqrt(1 + step % 5)
        total = (beta + (1 - beta) * (1 - w)) * total + w * weights(step)
        x += (1 - beta) * 0.5 * w * total
        optimizer.step(state, np.float32(w) * weights(step), 1.0, 0.5, w)
    np.testing.assert_allclose(state.weights, x, atol=1e-5)


@pytest.mark.parametrize(("given", "used"), [(1.7, 1.0), (-0.3, 0.0)])
def test_the_momentum_takes_no_weight_beyond_its_range(given, used):
    states = [state_of(optimizer_of("momentum(0.8)"), weights(0)) for _ in range(2)]
    for step in range(3):
        for state, w in zip(states, (given, used), strict=True):
            optimizer_of("momentum(0.8)").step(state, weights(step), 1.0, 0.5, w)
    np.testing.assert_array_equal(states[0].weights, states[1].weights)


def test_adam_is_not_bias_corrected():
    """The first step of FedAdam is eta (1 - beta1) g / (sqrt((1 - beta2) g^2 + ...) + eps), of torch's Adam eta."""
    state = state_of(optimizer_of("adam"), np.zeros(7, np.float32))
    optimizer_of("adam").step(state, np.ones(7, np.float32), 1.0, 0.1, 1.0)
    expected = 0.1 * 0.1 / (math.sqrt(0.99 * 1e-6 + 0.01) + 1e-3)
    np.testing.assert_allclose(state.weights, expected, rtol=1e-5)


def test_yogi_forgets_a_large_gradient_slower_than_adam():
    steps = {}
    for name in ("adam", "yogi"):
        state = state_of(optimizer_of(f"{name}(0,0.9,0.001)"), np.zeros(7, np.float32))
        for size in (100.0, *[0.1] * 50):
            before = state.weights.copy()
            optimizer_of(f"{name}(0,0.9,0.001)").step(state, np.full(7, size, np.float32), 1.0, 0.1, 1.0)
        steps[name] = float((state.weights - before)[0])
    assert steps["yogi"] < steps["adam"] / 5


def test_adaptive_optimizers_are_those_with_their_own_default_lr():
    adaptive = {name for name in OPTIMIZERS if f"{name}_v" in optimizer_of(name).arrays}
    assert adaptive | {"fadas"} == set(ADAPTIVE)
