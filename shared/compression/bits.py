"""Small whole numbers as bit planes: plane j holds bit j of every number, eight to a byte.

Reading and writing a plane is numpy's packbits; any width from 1 to 16 bits costs exactly its bits.
"""

import numpy as np
import numpy.typing as npt

Codes = npt.NDArray[np.unsignedinteger]


def plane_bytes(count: int) -> int:
    """Return the size of one plane."""
    return -(-count // 8)


def to_planes(codes: Codes, bits: int) -> bytes:
    """Write numbers below 2^bits; the lowest plane comes first."""
    return b"".join(np.packbits(((codes >> bit) & 1).astype(np.uint8)).tobytes() for bit in range(bits))


def from_planes(
    planes: npt.NDArray[np.uint8], bits: int, count: int, start: int, stop: int, dtype: type[np.unsignedinteger]
) -> Codes:
    """Read numbers `start` to `stop` of `count`; `start` is a multiple of 8.

    Args:
        planes: uint8 [bits * plane_bytes(count)].
        bits: planes.
        count: numbers in all.
        start: first to read.
        stop: one past the last.
        dtype: wide enough for `bits`.
    """
    size = plane_bytes(count)
    codes = np.zeros(stop - start, dtype)
    for bit in range(bits):
        plane = planes[bit * size + start // 8 : bit * size + -(-stop // 8)]
        codes |= np.unpackbits(plane, count=stop - start).astype(dtype) << dtype(bit)
    return codes
