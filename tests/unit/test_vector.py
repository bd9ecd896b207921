"""In-place arithmetic on vectors longer and shorter than a block, against float64."""

import numpy as np
import pytest

from shared.vector import BLOCK_ELEMENTS, add_scaled, mix, squared_norm

SIZES = [0, 1, 5, BLOCK_ELEMENTS - 1, BLOCK_ELEMENTS, BLOCK_ELEMENTS + 1, 2 * BLOCK_ELEMENTS + 3]


def pair(size):
    rng = np.random.default_rng(size)
    return rng.standard_normal(size, np.float32), rng.standard_normal(size, np.float32)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("size", SIZES)
def test_add_scaled(size, dtype):
    total, x = pair(size)
    x = x.astype(dtype)
    expected = total.astype(np.float64) - 2.5 * x.astype(np.float64)
    before = x.copy()
    assert add_scaled(total, x, -2.5) is None
    np.testing.assert_allclose(total, expected, atol=1e-6)
    np.testing.assert_array_equal(x, before)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("size", SIZES)
def test_mix(size, alpha):
    total, x = pair(size)
    expected = (1 - alpha) * total.astype(np.float64) + alpha * x.astype(np.float64)
    mix(total, x, alpha)
    np.testing.assert_allclose(total, expected, atol=1e-6)


@pytest.mark.parametrize("size", SIZES)
def test_squared_norm(size):
    _, x = pair(size)
    assert squared_norm(x) == pytest.approx(float((x.astype(np.float64) ** 2).sum()), rel=1e-4)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e20])
@pytest.mark.parametrize("position", [0, BLOCK_ELEMENTS, -1])
def test_squared_norm_is_not_finite_if_any_element_is_not(value, position):
    x = np.zeros(BLOCK_ELEMENTS + 5, np.float32)
    x[position] = value
    assert not np.isfinite(squared_norm(x))
