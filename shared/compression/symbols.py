"""Whole numbers times one scale per tensor: what `uniform`, `ternary` and `qsgd` write, plain or packed.

Numbers in [-L, L] are put m to a byte, m the most for which (2L + 1)^m <= 255: 5 for L = 1, 3 for 2, 2 for 7, 1 for
127. The code 255 says: this group holds a larger number; its m numbers q stand in full at the end, each as the 16 bits
of 2q, or -2q - 1 below zero. So one rare outlier does not cost everybody a wider alphabet, and an entropy coder behind
sees full bytes (on one low-entropy symbol per byte zstd wastes 30 to 60 %: algorithms notes, 2.3).

    float32 scales [tensors] | u8 L | u32 number of full groups | codes [ceil(n / m)]
    | low bytes of the full groups [number * m] | their high bytes, nearly all zero [number * m]
"""

import struct
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from shared.compression.entropy import literal_bytes
from shared.compression.quantizer import Piece, read_scales
from shared.compression.tensors import SLAB, Indices, tensor_pieces
from shared.errors import Reason, RejectedUpdate
from shared.vector import Vector

PER_BYTE = {1: 5, 2: 3, 7: 2, 127: 1}  # L -> m
FULL = 255  # the code of a group that stands in full
LARGEST = 32767  # numbers beyond are clipped: towards zero, so a contraction stays one
_HEAD = struct.Struct("<BI")
_SAMPLE = 30_720  # numbers on which the choice of L is tried out
_FULL_SHARE_MAX = 0.3  # an L that more of the numbers exceed is not tried
_STEP = 61_440  # numbers packed at once: a multiple of every m

Symbols = npt.NDArray[np.int16]
Codes = npt.NDArray[np.uint8]


def _table(largest: int) -> Vector:
    """Return code -> its m numbers, float32 [256, m]; codes of full groups are zero."""
    m, base = PER_BYTE[largest], 2 * largest + 1
    codes = np.arange(256)
    table = np.stack([codes // base**k % base - largest for k in range(m)], axis=1).astype(np.float32)
    table[base**m :] = 0
    return table


_TABLES = {largest: _table(largest) for largest in PER_BYTE}
_POWERS = {largest: np.array([(2 * largest + 1) ** k for k in range(m)], np.float32) for largest, m in PER_BYTE.items()}


@dataclass(frozen=True, slots=True)
class ScaledSymbols:
    """Decoded numbers: views into the message."""

    codes: Codes
    largest: int
    full_at: Indices  # which codes are FULL
    full: Symbols  # [full groups, m]
    scales: Vector  # float32 [tensors]
    ends: Indices

    def inflate(self, start: int, stop: int, weight: float, out: Vector) -> None:
        """Look groups up, put the full ones in their place, scale tensor by tensor."""
        m = PER_BYTE[self.largest]
        first, last = start // m, -(-stop // m)
        groups = np.empty((last - first, m), np.float32)
        if m == 1:
            np.subtract(self.codes[first:last, None], 127, out=groups, dtype=np.float32)
        else:
            np.take(_TABLES[self.largest], self.codes[first:last], axis=0, out=groups, mode="clip")
        low, high = np.searchsorted(self.full_at, (first, last))
        groups[self.full_at[low:high] - first] = self.full[low:high]
        numbers = groups.reshape(-1)[start - first * m : stop - first * m]
        for tensor, begin, end in tensor_pieces(self.ends, start, stop):
            np.multiply(numbers[begin:end], self.scales[tensor] * np.float32(weight), out=out[begin:end])


def symbols_bytes_max(count: int, tensors: int, outliers: int) -> int:
    """Return the most bytes `count` numbers take of which at most `outliers` exceed 127."""
    return 4 * tensors + _HEAD.size + count + 2 * outliers


def encode_symbols(symbols: Symbols, scales: Vector, packed: bool, largest: int | None = None) -> tuple[Piece, ...]:
    """Write numbers in [-32767, 32767].

    Args:
        symbols: int16 [n].
        scales: float32 [tensors].
        packed: choose the L that compresses best; else one byte a number.
        largest: the L to use, when it is known.
    """
    plain = 127
    if largest is None:
        largest = _best(symbols) if packed else plain
    written = _write(symbols, largest)
    if _size(written) > len(symbols) + _HEAD.size:  # so many outliers that packing would exceed the bound
        written = _write(symbols, plain)
    return scales.astype("<f4").data, *written


def decode_symbols(name: str, payload: memoryview, count: int, ends: Indices) -> ScaledSymbols:
    """Check the bytes of `count` numbers; raises `RejectedUpdate` and nothing else."""
    scales = read_scales(name, payload, len(ends))
    payload = payload[4 * len(ends) :]
    if len(payload) < _HEAD.size:
        raise RejectedUpdate(Reason.CODEC, f"{name}: the payload ends in its head")
    largest, full = _HEAD.unpack_from(payload)
    m = PER_BYTE.get(largest, 0)
    if not m:
        raise RejectedUpdate(Reason.CODEC, f"{name}: symbols up to {largest}; known are {list(PER_BYTE)}")
    groups = -(-count // m)
    if full > groups or len(payload) != _HEAD.size + groups + 2 * m * full:
        raise RejectedUpdate(
            Reason.CODEC, f"{name}: {len(payload)} bytes for {count} symbols up to {largest} and {full} full groups"
        )
    codes = np.frombuffer(payload, np.uint8, groups, _HEAD.size)
    full_at = _find_full(codes)
    if full_at.size != full or (full < groups and m > 1 and _lies(codes, largest)):
        raise RejectedUpdate(Reason.CODEC, f"{name}: {full_at.size} full groups where {full} are announced, or a code "
                             f"that stands for nothing")  # fmt: skip
    low, high = np.frombuffer(payload, np.uint8, 2 * m * full, _HEAD.size + groups).reshape(2, full, m)
    return ScaledSymbols(codes, largest, full_at, _from_planes(low, high), scales, ends)


def _find_full(codes: Codes) -> Indices:
    """Return which codes are FULL."""
    found = [np.flatnonzero(codes[start : start + SLAB] == FULL) + start for start in range(0, codes.size, SLAB)]
    full_at: Indices = np.concatenate([np.zeros(0, np.int64), *found])
    return full_at


def _lies(codes: Codes, largest: int) -> bool:
    """Tell whether a code is neither a group of numbers nor FULL."""
    limit = (2 * largest + 1) ** PER_BYTE[largest]
    parts = (codes[start : start + SLAB] for start in range(0, codes.size, SLAB))
    return any(bool(np.any((part >= limit) & (part != FULL))) for part in parts)


def _best(symbols: Symbols) -> int:
    """Return the L under which zstd makes least of a sample."""
    pieces = max(1, min(16, symbols.size // 3840))
    if symbols.size > _SAMPLE:
        length = _SAMPLE // pieces
        starts = np.linspace(0, symbols.size - length, pieces).astype(np.int64)
        symbols = np.concatenate([symbols[start : start + length] for start in starts.tolist()])
    exceed = {largest: np.count_nonzero(np.abs(symbols) > largest) for largest in PER_BYTE}
    tried = [largest for largest in PER_BYTE if exceed[largest] <= _FULL_SHARE_MAX * symbols.size] or [127]
    return min(tried, key=lambda largest: literal_bytes(_write(symbols, largest)))


def _write(symbols: Symbols, largest: int) -> tuple[Piece, ...]:
    """Pack with one L."""
    m = PER_BYTE[largest]
    groups = -(-symbols.size // m)
    codes = np.empty(groups, np.uint8)
    full: list[Symbols] = []
    for start in range(0, symbols.size, _STEP):
        part = symbols[start : start + _STEP]
        if part.size % m:
            part = np.concatenate([part, np.zeros(-part.size % m, np.int16)])
        rows = part.reshape(-1, m)
        shifted = part.astype(np.float32)
        shifted += np.float32(largest)
        packed = shifted if m == 1 else shifted.reshape(-1, m) @ _POWERS[largest]
        target = codes[start // m : start // m + len(rows)]
        outside = np.flatnonzero((part > largest) | (part < -largest))
        if outside.size:
            at = outside // m
            at = at[np.flatnonzero(np.diff(at, prepend=-1))]
            packed[at] = FULL
            full.append(rows[at])
        target[:] = packed
    low, high = _to_planes(np.concatenate([np.zeros((0, m), np.int16), *full]))
    return _HEAD.pack(largest, len(low)), codes.data, low.data, high.data


def _size(pieces: tuple[Piece, ...]) -> int:
    return sum(memoryview(piece).nbytes for piece in pieces)


def _to_planes(numbers: Symbols) -> tuple[Codes, Codes]:
    """Return low and high bytes of 2q, or of -2q - 1 below zero."""
    folded = ((numbers << 1) ^ (numbers >> 15)).view(np.uint16)
    return (folded & 0xFF).astype(np.uint8), (folded >> 8).astype(np.uint8)


def _from_planes(low: Codes, high: Codes) -> Symbols:
    """Put the numbers together again; any bytes give some."""
    folded = low | (high.astype(np.uint16) << 8)
    numbers: Symbols = (folded >> 1).astype(np.int16) ^ -(folded & 1).astype(np.int16)
    return numbers
