"""topk is exactly the k largest; randomk is one fair element of each stretch."""

import numpy as np
import pytest

from shared.compression import parse
from shared.compression.random_k import RandomK
from shared.compression.tensors import Values, parts_of
from shared.compression.top_k import LARGE, TopK
from tests.codecs import encode, layout_of, through

BIG = 3 * LARGE + 17
KINDS = {
    "normal": lambda rng, n: rng.standard_normal(n),
    "heavy": lambda rng, n: rng.standard_cauchy(n).clip(-1e9, 1e9),
    "sorted": lambda rng, n: np.sort(rng.standard_normal(n)),  # a sample of stretches sees little of it
    "constant": lambda rng, n: np.full(n, -0.5),
    "zeros": lambda rng, n: np.zeros(n),
    "99 % zeros": lambda rng, n: rng.standard_normal(n) * (rng.random(n) < 0.01),
    "0.1 % zeros": lambda rng, n: rng.standard_normal(n) * (rng.random(n) > 0.001),
    "ties": lambda rng, n: rng.integers(-3, 4, n),
    "all in one place": lambda rng, n: np.where(np.arange(n) < n // 50, 1 + rng.random(n), 0),
    "a few giants": lambda rng, n: np.where(np.arange(n) % 10_007 == 3, 1e9, rng.standard_normal(n)),
    "denormal": lambda rng, n: rng.standard_normal(n) * 1e-41,
    "halves": lambda rng, n: np.where(np.arange(n) % 2, 1.0, 1e-3),
}


def select(share, delta, seed=0):
    return TopK(share).select(Values.plain(delta, np.array([delta.size])), np.random.default_rng(seed))


@pytest.mark.parametrize("size", [1, 2, 1000, 70_001, LARGE, LARGE + 1, BIG])
@pytest.mark.parametrize("kind", KINDS)
def test_exactly_the_k_largest(kind, size):
    delta = KINDS[kind](np.random.default_rng(1), size).astype(np.float32)
    magnitude = np.abs(delta)
    for share in (0.001, 0.01, 0.3, 1.0):
        for seed in (0, 1):
            chosen = select(share, delta, seed)
            k = min(int(np.ceil(share * size)), np.count_nonzero(delta))
            assert chosen.indices.size == chosen.params["kept"] == k
            assert (np.diff(chosen.indices) > 0).all()
            assert (chosen.values == delta[chosen.indices]).all()
            assert (np.sort(magnitude[chosen.indices]) == np.sort(magnitude)[size - k :]).all()


def test_exactly_the_k_largest_also_where_the_sample_misleads():
    """Somewhat fewer than k large ones in one place: a sample with too many of them gives thresholds too high."""
    size = BIG
    delta = np.random.default_rng(0).uniform(1e-4, 1e-3, size).astype(np.float32)
    delta[1000 : 1000 + int(0.0095 * size)] += 1
    k = int(np.ceil(0.01 * size))
    expected = np.sort(np.argsort(delta)[size - k :])
    for seed in range(20):
        assert (select(0.01, delta, seed).indices == expected).all()


def test_the_body_is_selected_across_its_tensors_and_beside_biases():
    layout = layout_of((10,), (50, 40), (40,), (60, 50), (3,))
    delta = np.full(layout.num_params, 0.001, np.float32)
    delta[:10] = delta[2010:2050] = delta[-3:] = 100.0  # small ones: larger than all, but not in the contest
    largest = [10, 500, 2009, 2050, 5049]
    delta[largest] = [1, -2, 3, -4, 5]
    back = through("topk(0.001)", delta, layout)
    body = np.concatenate([np.arange(10, 2010), np.arange(2050, 5050)])
    assert body[np.flatnonzero(back[body])].tolist() == largest
    assert back[largest].tolist() == [1, -2, 3, -4, 5]
    assert (back[:10] == 100).all()


@pytest.mark.parametrize("share", [1e-6, 0.01, 0.1, 0.34, 1.0])
@pytest.mark.parametrize("size", [1, 7, 1000, 65_537])
def test_randomk_takes_one_of_each_stretch(share, size):
    rule, delta = RandomK(share), np.arange(1, size + 1, dtype=np.float32)
    chosen = rule.select(Values.plain(delta, np.array([size])), np.random.default_rng(0))
    k = min(size, int(np.ceil(share * size)))
    assert chosen.indices.size == k
    edges = [stretch * size // k for stretch in range(k + 1)]
    assert all(
        low <= index < high for low, high, index in zip(edges[:-1], edges[1:], chosen.indices.tolist(), strict=True)
    )
    assert (chosen.values == delta[chosen.indices] * np.diff(edges).astype(np.float32)).all()
    assert (rule.locate(memoryview(b""), chosen.params, size) == chosen.indices).all()


def test_randomk_draws_fairly():
    rule, counts = RandomK(0.1), np.zeros(100)
    for seed in range(4000):
        counts[rule.locate(memoryview(b""), {"draw": seed}, 100)] += 1
    assert counts.sum() == 40_000
    assert np.abs(counts - 400).max() < 5 * np.sqrt(400 * 0.9)


def test_a_selection_and_a_rotation_have_their_own_seeds():
    """With one seed for both, the values would be added at other positions than they were read from."""
    layout, name = layout_of((100, 100)), "randomk(0.25) | rotate | eden(4)"
    delta = np.zeros(10_000, np.float32)
    delta[5000:] = np.random.default_rng(0).standard_normal(5000)
    encoded = encode(name, delta, layout)
    assert len(encoded.params) == 2
    back = through(name, delta, layout)
    exact = delta[5000:].astype(np.float64)
    assert (back[:5000] ** 2).sum() < 0.1 * (back**2).sum()
    sent = back[5000:] != 0
    assert np.corrcoef(back[5000:][sent], exact[sent])[0, 1] > 0.95


@pytest.mark.parametrize(
    "name", ["topk(0.1)", "topk(0.1) | int8", "topk(0.1) | ternary", "topk(0.1) | uniform(step=1)"]
)
def test_each_tensors_kept_values_have_its_own_scale(name):
    """Also where a tensor keeps none: nothing of it is among the largest."""
    layout = layout_of((50, 50), (50, 50), (50, 50))
    delta = np.zeros(layout.num_params, np.float32)
    delta[:250], delta[5000:5250] = 1.0, 8.0
    back = through(name, delta, layout)
    assert np.count_nonzero(back) == 500
    np.testing.assert_allclose(back[:250], 1.0, rtol=0.07)
    np.testing.assert_allclose(back[5000:5250], 8.0, rtol=0.01)
    assert not back[2500:5000].any()


def test_the_cut_of_a_layout():
    layout = layout_of((3,), (1000,), (999, 1), (1000, 1), (10, 10, 10), ())
    parts = parts_of(layout, whole=False)
    assert (parts.body.flat, parts.body.joined, parts.body.size) == ((2002,), (0,), 2000)
    assert parts.ends.tolist() == [1000, 2000]
    assert (parts.small.flat, parts.small.size) == ((0, 4002), 2003)
    whole = parts_of(layout, whole=True)
    assert (whole.body.size, whole.small.size) == (4003, 0)
    assert parse("all | int8").whole
    assert parse("float16").whole
