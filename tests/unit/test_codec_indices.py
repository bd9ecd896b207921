"""Bit planes and Rice-coded positions."""

import numpy as np
import pytest

from shared.compression.bits import from_planes, plane_bytes, to_planes
from shared.compression.indices import decode_indices, encode_indices, indices_bytes_max
from shared.errors import Reason, RejectedUpdate


@pytest.mark.parametrize("bits", [0, 1, 2, 3, 4, 7, 8, 12, 16])
@pytest.mark.parametrize("count", [1, 7, 8, 9, 1000])
def test_planes_round_trip_in_exactly_their_bits(bits, count):
    codes = np.random.default_rng(count).integers(0, 2**bits, count).astype(np.uint16)
    planes = to_planes(codes, bits)
    assert len(planes) == bits * plane_bytes(count) == bits * -(-count // 8)
    view = np.frombuffer(planes, np.uint8)
    assert (from_planes(view, bits, count, 0, count, np.uint16) == codes).all()
    for start in range(0, count, 8):
        stop = min(count, start + 11)
        assert (from_planes(view, bits, count, start, stop, np.uint16) == codes[start:stop]).all()


def positions(size, count, seed=0):
    return np.sort(np.random.default_rng(seed).choice(size, count, replace=False)).astype(np.int64)


CASES = {
    "first": ([0], 10**6),
    "last": ([10**6 - 1], 10**6),
    "first and last": ([0, 10**6 - 1], 10**6),
    "only one there is": ([0], 1),
    "all": (range(1000), 1000),
    "all but the first": (range(1, 1000), 1000),
    "every other": (range(0, 1000, 2), 1000),
    "a cluster at the end": (range(10**6 - 500, 10**6), 10**6),
    "beyond 2^32": ([5, 2**32 + 3, 2**33 - 1], 2**33),
    "sparse": (positions(10**6, 100), 10**6),
    "dense": (positions(10_000, 7000), 10_000),
    "a tenth": (positions(123_457, 12_346), 123_457),
}


@pytest.mark.parametrize("case", CASES)
def test_positions_round_trip_within_the_bound(case):
    indices, size = np.array(CASES[case][0], np.int64), CASES[case][1]
    payload = encode_indices(indices, size)
    assert len(payload) <= indices_bytes_max(indices.size, size)
    back = decode_indices(memoryview(payload), indices.size, size)
    assert back.dtype == np.int64
    assert (back == indices).all()


def test_no_positions_take_no_bytes():
    assert encode_indices(np.zeros(0, np.int64), 10) == b""
    assert decode_indices(memoryview(b""), 0, 10).size == 0
    assert indices_bytes_max(0, 10) == 0


@pytest.mark.parametrize("share", [0.001, 0.003, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5])
def test_the_code_is_near_the_entropy_of_its_gaps(share):
    size = 10**6
    entropy_bits = -(share * np.log2(share) + (1 - share) * np.log2(1 - share)) * size
    coded_bits = 8 * len(encode_indices(positions(size, int(share * size)), size))
    assert coded_bits <= entropy_bits * (1.015 if share <= 0.1 else 1.025)  # that of a power of two for a modulus


@pytest.mark.parametrize("size", [1, 2, 10, 1000, 65537, 10**6])
def test_fewer_positions_than_announced_also_fit(size):
    """The bound is asked for k; a sparse delta sends fewer. It grows with k, and holds for the worst gaps."""
    bounds = [indices_bytes_max(k, size) for k in range(0, min(size, 3000) + 1)]
    assert bounds == sorted(bounds)
    for k in (1, size // 100, size // 3, size):
        if k:
            worst = np.arange(size - k, size)  # one great gap, the others none
            assert len(encode_indices(worst, size)) <= indices_bytes_max(k, size)


def refused(payload, count, size):
    with pytest.raises(RejectedUpdate) as caught:
        decode_indices(memoryview(bytes(payload)), count, size)
    return caught.value.reason


def test_what_lies_is_refused():
    size, indices = 1000, positions(1000, 40)
    payload = encode_indices(indices, size)
    assert refused(b"", 40, size) == Reason.CODEC
    assert refused(payload, 0, size) == Reason.CODEC
    assert refused(payload, 39, size) in (Reason.CODEC, Reason.TOO_LARGE)  # one position too many
    assert refused(payload, 41, size) == Reason.CODEC
    assert refused(payload, 40, int(indices[-1])) in (Reason.CODEC, Reason.TOO_LARGE)  # beyond the end
    assert decode_indices(memoryview(payload), 40, int(indices[-1]) + 1)[-1] == indices[-1]
    assert refused(payload[:-1], 40, size) == Reason.CODEC
    assert refused(payload + bytes(1000), 40, size) == Reason.TOO_LARGE


@pytest.mark.parametrize("case", ["sparse", "dense", "a tenth"])
def test_whatever_is_read_is_ascending_distinct_and_inside(case):
    indices, size = np.array(CASES[case][0]), CASES[case][1]
    payload, rng, read = encode_indices(indices, size), np.random.default_rng(0), 0
    for _ in range(300):
        spoiled = bytearray(payload)
        spoiled[rng.integers(0, len(spoiled))] ^= 1 << rng.integers(0, 8)
        try:
            back = decode_indices(memoryview(bytes(spoiled)), indices.size, size)
        except RejectedUpdate:
            continue
        read += 1
        assert back.size == indices.size
        assert back[0] >= 0
        assert back[-1] < size
        assert (np.diff(back) > 0).all()
    assert read or case == "dense"  # there, without low parts, any flip changes their number
