"""Ascending positions as Rice-coded gaps, within about 1 % of their entropy.

A gap g >= 0 (positions skipped since the last one) is cut at b bits: the low part is written as it is, the high part
g >> b in unary. Low parts lie in bit planes, unary codes one after the other: both are read and written by whole-array
operations. b follows from k and the length of the vector: the best for geometric gaps.

    planes of the low parts [b * ceil(k / 8)] | unary codes: g >> b zeros and a one each, padded to a byte

Repeated or descending positions cannot be written; positions beyond the end are refused.
Measured against block-wise bit packing of gaps: `ops/bench/README.md`.

Source: Rice and Plaunt 1971; for sparse updates Sattler et al., arXiv:1903.02891, algorithm 3.
"""

from typing import Any

import numpy as np

from shared.compression.bits import from_planes, plane_bytes, to_planes
from shared.compression.tensors import Indices
from shared.errors import Reason, RejectedUpdate

LOW_BITS_MAX = 32  # a gap of a vector of NUM_PARAMS_MAX


def indices_bytes_max(count: int, size: int) -> int:
    """Return the most bytes up to `count` positions below `size` take.

    With b rounded, a position takes at most log2(ln 2 * size / count) + 0.5 low bits and 1 + sqrt(2) / ln 2 unary ones
    on average; their sum grows with count.
    """
    if not count:
        return 0
    bits = count * (max(0.0, float(np.log2(np.log(2) * size / count))) + 0.5 + 1 + 2.05)
    return int(bits / 8) + LOW_BITS_MAX + 2  # and each plane and the unary code padded to a byte


def encode_indices(indices: Indices, size: int) -> bytes:
    """Write ascending distinct positions below `size`."""
    if not indices.size:
        return b""
    low = low_bits(indices.size, size)
    gaps = np.diff(indices, prepend=-1) - 1
    ends = np.cumsum((gaps >> low) + 1)
    unary = np.zeros(int(ends[-1]), np.uint8)
    unary[ends - 1] = 1
    gaps &= (1 << low) - 1
    return to_planes(gaps.astype(_narrow(low)), low) + np.packbits(unary).tobytes()


def decode_indices(payload: memoryview, count: int, size: int) -> Indices:
    """Read `count` positions below `size`; raises `RejectedUpdate` and nothing else.

    Takes about 30 bytes of memory a position while it works.
    """
    if not count:
        if len(payload):
            raise RejectedUpdate(Reason.CODEC, f"{len(payload)} bytes of positions where none are expected")
        return np.zeros(0, np.int64)
    low = low_bits(count, size)
    planes = low * plane_bytes(count)
    if len(payload) <= planes:
        raise RejectedUpdate(Reason.CODEC, f"{len(payload)} bytes do not hold {count} positions of {low} low bits")
    if len(payload) - planes > -(-(count + (size >> low)) // 8):
        raise RejectedUpdate(Reason.TOO_LARGE, f"{len(payload)} bytes for {count} positions below {size}")
    unary = np.unpackbits(np.frombuffer(payload, np.uint8, offset=planes)).view(np.bool_)  # ten times as fast to search
    ones = np.flatnonzero(unary)
    if ones.size != count:
        raise RejectedUpdate(Reason.CODEC, f"{ones.size} positions where {count} are announced")
    indices: Indices = np.diff(ones, prepend=-1)  # gap >> low, plus one
    del ones
    indices -= 1
    indices <<= low
    indices += from_planes(np.frombuffer(payload, np.uint8, planes), low, count, 0, count, _narrow(low))
    indices += 1
    np.cumsum(indices, out=indices)
    indices -= 1
    if indices[-1] >= size:
        raise RejectedUpdate(Reason.CODEC, f"position {indices[-1]} of a vector of {size}")
    return indices


def low_bits(count: int, size: int) -> int:
    """Return b = round(log2(ln 2 * size / count)), the best Rice parameter for geometric gaps.

    In whole numbers, so that sender and receiver agree on every machine: the least b with 2^(2b + 1) >= (ln 2 * gap)^2.
    """
    low = 0
    while (1 << (2 * low + 1)) * count**2 * 10**12 < _LN2_SQUARED * size**2:
        low += 1
    return low


def _narrow(bits: int) -> type[np.unsignedinteger[Any]]:
    """Return the smallest type that holds so many bits: the planes are put together in it."""
    return np.uint8 if bits <= 8 else np.uint16 if bits <= 16 else np.uint32


_LN2_SQUARED = 480_453_013_918  # (ln 2)^2, times 10^12
