"""Whole numbers m to a byte, with an escape for outliers: round trips, bounds and closeness to the entropy."""

import struct

import numpy as np
import pytest

from shared.compression import parse
from shared.compression.quantizer import dither
from shared.compression.symbols import PER_BYTE, decode_symbols, encode_symbols, symbols_bytes_max
from shared.errors import Reason, RejectedUpdate
from tests.codecs import encode, layout_of, through

SLAB = 1 << 16
SIZES = (1, 2, 3, 4, 5, 6, 7, 14, 15, 16, 1000, 61_440, 61_441, 65_535, 65_536, 65_537, 122_883, 131_073)


def ends_of(size):
    """Return ends of three tensors of which one is empty; the first two share a byte."""
    return np.array([size // 3, size // 3, size])


def write(symbols, packed=True, largest=None, scales=(1.0, 1.0, 1.0)):
    return b"".join(encode_symbols(symbols.astype(np.int16), np.array(scales, np.float32), packed, largest))


def read(payload, size, weight=1.0):
    """Inflate slab by slab."""
    decoded = decode_symbols("test", memoryview(payload), size, ends_of(size))
    out = np.empty(size, np.float32)
    for start in range(0, size, SLAB):
        stop = min(size, start + SLAB)
        decoded.inflate(start, stop, weight, out[start:stop])
    return out


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("largest", [1, 2, 7, 127, None])
def test_numbers_round_trip_with_outliers_anywhere(size, largest):
    rng = np.random.default_rng(size)
    symbols = rng.integers(-(largest or 2), (largest or 2) + 1, size)
    for outliers in (0, 1, size // 50, size // 3):
        symbols[rng.integers(0, size, outliers)] = rng.choice([-32767, -300, -128, -8, -2, 2, 8, 128, 32767], outliers)
        if size in (16, 131_073):
            symbols[[0, size - 1]] = 200, -200
        assert (read(write(symbols, True, largest), size) == symbols).all()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("packed", [False, True])
def test_the_bound_holds_however_many_outliers_there_are(size, packed):
    rng = np.random.default_rng(size)
    for outliers in (0, 1, size // 10, size // 2, size):
        symbols = rng.integers(-1, 2, size)
        symbols[rng.choice(size, outliers, replace=False)] = 128
        assert len(write(symbols, packed)) <= symbols_bytes_max(size, 3, outliers)


def test_each_tensor_has_its_scale_also_when_two_share_a_byte():
    size = 100
    symbols = np.ones(size)
    out = read(write(symbols, True, 1, scales=(2.0, 99.0, 0.5)), size, weight=3.0)
    assert (out[:33] == 6.0).all()
    assert (out[33:] == 1.5).all()


@pytest.mark.parametrize(("largest", "per_byte"), PER_BYTE.items())
def test_as_many_to_a_byte_as_fit(largest, per_byte):
    assert (2 * largest + 1) ** per_byte <= 255 < (2 * largest + 1) ** (per_byte + 1)
    payload = write(np.full(10_000, largest), True, largest)
    assert len(payload) == 3 * 4 + 5 + -(-10_000 // per_byte)
    assert len(np.unique(np.frombuffer(payload, np.uint8, 10_000 // per_byte, 17))) == 1


def test_one_outlier_costs_its_group_only():
    symbols = np.zeros(10_000)
    before = len(write(symbols, True, 1))
    symbols[1234] = -30_000
    assert len(write(symbols, True, 1)) == before + 2 * 5


@pytest.mark.parametrize(("step", "allowed"), [(1, 1.03), (2, 1.035)])
@pytest.mark.parametrize("kind", ["gauss", "laplace"])
def test_packed_and_compressed_is_near_the_entropy(kind, step, allowed):
    rng, size, layout = np.random.default_rng(0), 10**6, layout_of((1000, 1000))
    delta = (rng.standard_normal(size) if kind == "gauss" else rng.laplace(size=size)).astype(np.float32)
    q = np.rint(delta / (step * np.sqrt(np.mean(delta.astype(np.float64) ** 2))))
    shares = np.unique(q, return_counts=True)[1] / size
    entropy_bits = -float((shares * np.log2(shares)).sum()) * size
    assert 8 * len(encode(f"uniform(step={step}) | pack | zstd", delta, layout).payload) <= allowed * entropy_bits


def test_a_huge_outlier_is_clipped_towards_zero_and_keeps_the_bound():
    layout = layout_of((2200, 2000))
    delta = np.zeros(layout.num_params, np.float32)
    delta[77] = 5.0  # 2,097 RMS: 41,900 steps of 0.05
    back = through("uniform(step=0.05)", delta, layout)
    assert abs(back[77] - 5.0) < 1e-4  # the least-squares factor makes up for the clipping
    assert np.count_nonzero(back) == 1


@pytest.mark.parametrize("step", [2, 3.9, 4, 32])
def test_equal_values_are_sent_however_large_the_step(step):
    """Half a step of 2 RMS is the RMS: rounded to nearest, such a tensor would never be sent, feedback or not."""
    layout = layout_of((50, 50), (40, 40))
    delta = np.full(layout.num_params, 0.1, np.float32)
    delta[1::2] *= -1
    delta[2500:] *= 100
    np.testing.assert_allclose(through(f"uniform(step={step})", delta, layout), delta, rtol=1e-6)


@pytest.mark.parametrize("step", [1, 2, 4])
def test_nearest_rounding_has_the_least_squares_factor(step):
    layout, size = layout_of((300, 300)), 90_000
    delta = np.random.default_rng(0).laplace(size=size).astype(np.float32)
    back = through(f"uniform(step={step})", delta, layout)
    residual = delta - back
    assert abs(residual @ back) <= 1e-5 * (back @ back)  # a projection: what is left is orthogonal
    assert set(np.unique(np.rint(back / np.abs(back[back != 0]).min())) % 1) == {0}


def refused(payload, size=40):
    with pytest.raises(RejectedUpdate) as caught:
        decode_symbols("test", memoryview(payload), size, np.array([size]))
    return caught.value.reason


def test_what_lies_is_refused():
    scale = struct.pack("<f", 1.0)

    def head(largest, full):
        return scale + struct.pack("<BI", largest, full)

    assert decode_symbols("test", memoryview(head(1, 0) + bytes(8)), 40, np.array([40]))
    refused(b"")
    refused(scale + b"\x01\x00")
    refused(head(3, 0) + bytes(40))  # an alphabet nobody has
    refused(head(0, 0) + bytes(40))
    refused(head(1, 0) + bytes(9))
    refused(head(1, 0) + bytes(7))
    refused(head(1, 0) + bytes(7) + b"\xff")  # a full group that is not announced
    refused(head(1, 1) + bytes(8) + bytes(10))  # and the contrary
    refused(head(1, 9) + bytes(8) + bytes(90))  # more than there are groups
    refused(head(1, 2**32 - 1) + bytes(8))
    for largest, codes in ((1, range(243, 255)), (2, range(125, 255)), (7, range(225, 255))):
        groups = -(-40 // PER_BYTE[largest])
        for code in codes:
            refused(head(largest, 0) + bytes(groups - 1) + bytes([code]))
    for value in (np.nan, np.inf, -1, 2e16):
        assert refused(struct.pack("<f", value) + head(1, 0)[4:] + bytes(8)) == Reason.NOT_FINITE


def test_a_lie_far_from_the_start_is_found():
    size = 5 * 70_000
    payload = bytearray(write(np.zeros(size), True, 1))
    for code in (250, 255):
        payload[-1] = code
        with pytest.raises(RejectedUpdate):
            decode_symbols("test", memoryview(bytes(payload)), size, ends_of(size))


def test_dither_is_uniform_and_symmetric():
    u = dither(10**6 + 3, np.random.default_rng(0)).astype(np.float64)
    assert u.size == 10**6 + 3
    assert 0 < u.min() < 1e-4
    assert 1 - 1e-4 < u.max() < 1
    assert abs(u.mean() - 0.5) < 5 * np.sqrt(1 / 12 / 1e6)
    for p in (0.1, 0.5, 0.9):
        assert abs((u < p).mean() - p) < 5 * np.sqrt(p * (1 - p) / 1e6)
    assert abs(np.corrcoef(u[:-1], u[1:])[0, 1]) < 5e-3


@pytest.mark.parametrize("name", ["uniform(step=1)", "uniform(step=1, stochastic) | pack | zstd"])
def test_values_whose_squares_vanish_are_zero_and_do_not_all_become_outliers(name):
    """Their RMS would be measured far too small, every value stand in full, and the update be refused as too large."""
    layout = layout_of((70_001, 1))
    delta = np.full(70_001, 2.6e-23, np.float32)
    delta[5] = 3e-23
    assert len(encode(name, delta, layout).payload) <= parse(name).payload_bytes_max(layout)
    assert not through(name, delta, layout).any()
