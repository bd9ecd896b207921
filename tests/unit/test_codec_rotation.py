"""The Hadamard rotation and EDEN's centroids."""

import numpy as np
import pytest

from shared.compression.eden import CENTROIDS
from shared.compression.rotate import BLOCK, TAIL_BLOCK, hadamard, rotate, rotate_back, rotated_size
from shared.compression.tensors import Values
from tests.codecs import bumpy, encode, error, layout_of, through

SIZES = (1, 2, 255, 256, 257, 4095, 4096, 4097, 4352, 65_535, 65_536, 65_537, 70_001, 135_000)


class Identity:
    """Values as they are, in place of a quantizer's."""

    def __init__(self, values):
        self.values = values

    def inflate(self, start, stop, weight, out):
        np.multiply(self.values[start:stop], np.float32(weight), out=out)


def rotated(x, seed):
    return rotate(Values.plain(x, np.array([x.size])), seed)


@pytest.mark.parametrize("size", SIZES)
def test_a_rotation_is_undone_and_keeps_the_norm(size):
    x = bumpy(size)
    y = rotated(x, 7)
    assert y.size == rotated_size(size)
    assert abs(np.linalg.norm(y.astype(np.float64)) / np.linalg.norm(x.astype(np.float64)) - 1) < 1e-6
    back, whole = np.empty(size, np.float32), rotate_back(Identity(y), 7, size)
    for start in range(0, size, 1 << 16):
        stop = min(size, start + (1 << 16))
        whole.inflate(start, stop, 2.0, back[start:stop])
    assert np.abs(back - 2 * x).max() <= 1e-5 * np.abs(x).max()


@pytest.mark.parametrize("size", SIZES)
def test_padding_is_at_most_255(size):
    assert 0 <= rotated_size(size) - size <= 255
    assert rotated_size(size) % TAIL_BLOCK == 0
    assert rotated_size(5 * BLOCK) == 5 * BLOCK


@pytest.mark.parametrize("order", [256, 4096])
def test_the_matrix_is_orthonormal_symmetric_and_its_own_inverse(order):
    matrix = np.empty((order, order), np.float32)
    for column in range(order):
        unit = np.zeros(order, np.float32)
        unit[column] = 1
        hadamard(unit)
        matrix[column] = unit
    assert (np.abs(matrix) == np.float32(1 / np.sqrt(order))).all()
    assert (matrix == matrix.T).all()
    product = matrix[:64] @ matrix  # of signs: exact
    assert np.abs(product - np.eye(order)[:64]).max() < 1e-6


def test_blocks_do_not_mix():
    x = np.zeros(2 * BLOCK + 2 * TAIL_BLOCK, np.float32)
    for start, length in ((0, BLOCK), (BLOCK, BLOCK), (2 * BLOCK, TAIL_BLOCK), (2 * BLOCK + TAIL_BLOCK, TAIL_BLOCK)):
        x[:] = 0
        x[start + 3] = 1
        y = rotated(x, 1)
        assert np.count_nonzero(y) == np.count_nonzero(y[start : start + length]) > 0.8 * length


def test_another_seed_is_another_rotation_and_signs_are_fair():
    x = np.ones(1 << 16, np.float32)
    assert not np.array_equal(rotated(x, 1), rotated(x, 2))
    y = rotated(x, 3)
    assert abs(y.mean()) < 5 / 256
    assert abs((y[:-1] * y[1:]).mean()) < 5 / 256
    assert abs((rotated(x, 3) * rotated(x, 4)).mean()) < 5 / 256


def test_what_is_rotated_looks_gaussian_even_if_one_value_rules_its_block():
    """One rotation turns a single value into 4,096 equal magnitudes; the second mixes those."""
    x = np.zeros(64 * BLOCK, np.float32)
    x[::BLOCK] = 64
    y = rotated(x, 5).astype(np.float64)
    assert abs(y.var() - 1) < 1e-3
    assert abs((y**4).mean() - 3) < 0.1
    assert abs((np.abs(y) < 0.6745).mean() - 0.5) < 0.01


@pytest.mark.parametrize("name", ["rotate | int4(nearest)", "rotate | eden(4)"])
def test_a_rotation_spreads_what_a_block_quantizer_would_lose(name):
    """One huge element per block: without rotation the rest of its block is lost."""
    layout = layout_of((128, 128))
    delta = np.random.default_rng(0).standard_normal(1 << 14).astype(np.float32)
    delta[::256] = 40
    assert error(name, delta, layout) < 0.02


# --- EDEN -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", CENTROIDS)
def test_centroids_are_lloyds_for_a_gaussian(bits):
    """Each is the mean of the Gaussian between the midpoints around it."""
    centroids = CENTROIDS[bits].astype(np.float64)
    assert centroids.size == 2**bits
    assert (centroids == -centroids[::-1]).all()
    edges = np.concatenate([[-12], (centroids[1:] + centroids[:-1]) / 2, [12]])
    grid = np.linspace(-12, 12, 480_001)
    density = np.exp(-(grid**2) / 2)
    for index, centroid in enumerate(centroids):
        inside = (grid >= edges[index]) & (grid <= edges[index + 1])
        assert abs((grid * density)[inside].sum() / density[inside].sum() - centroid) < 1e-3


@pytest.mark.parametrize("kind", ["gauss", "heavy", "sparse"])
@pytest.mark.parametrize(("bits", "expected"), [(1, 0.571), (2, 0.133), (3, 0.036), (4, 0.0096)])
def test_edens_error_is_that_of_the_paper(bits, expected, kind):
    size, rng = 10**6, np.random.default_rng(0)
    delta = rng.standard_normal(size)
    if kind == "heavy":
        delta *= np.exp(0.7 * rng.standard_normal(size))  # kurtosis 21
    if kind == "sparse":
        delta *= rng.random(size) < 0.3
    # 0.571, 0.133, 0.036 and 0.0096 are pi/2 - 1, ... rounded: 1 % or the last digit
    measured = error(f"rotate | eden({bits})", delta.astype(np.float32), layout_of((1000, 1000)), seed=bits)
    assert abs(measured / expected - 1) < 0.011


@pytest.mark.parametrize("bits", CENTROIDS)
def test_edens_projection_on_the_delta_is_exact(bits):
    """<x, C(x)> = ||x||^2 with S = ||x||^2 / <c, R>, whatever x is: the closed form behind unbiasedness."""
    layout = layout_of((70_001, 1))
    for delta in (bumpy(70_001), np.ones(70_001, np.float32)):
        exact = delta.astype(np.float64)
        assert abs((through(f"rotate | eden({bits})", delta, layout) @ exact) / (exact @ exact) - 1) < 1e-5


@pytest.mark.parametrize("bits", CENTROIDS)
def test_edens_size_is_its_bits_and_a_scale_per_block(bits):
    layout = layout_of((70_001, 1))
    rotated_count = 70_001 + -(70_001 % 4096) % 256
    blocks = 70_001 // 4096 + -(-(70_001 % 4096) // 256)
    payload = encode(f"rotate | eden({bits})", bumpy(70_001), layout).payload
    assert len(payload) == 4 * blocks + bits * rotated_count // 8
    assert rotated_count < 70_001 + 256
