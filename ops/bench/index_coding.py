"""Positions of a sparse update: Rice codes (ours) beside block-wise packing of gaps, and raw uint32."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt

from ops.bench.measuring import median_s, positions_entropy
from shared.compression.indices import decode_indices, encode_indices
from shared.compression.tensors import Indices

SHARES = (0.1, 0.01, 0.001)
BLOCK = 128  # gaps that share a width: the best of 32 to 512 here


@dataclass(frozen=True, slots=True)
class IndexRow:
    """One way to write positions.

    Attributes:
        share: p, positions per element.
        name: of the code.
        bits: per position.
        entropy: H(p) / p, bits per position chosen at random.
        encode_ns: per position.
        decode_ns: per position.
    """

    share: float
    name: str
    bits: float
    entropy: float
    encode_ns: float
    decode_ns: float


def pack_gaps(indices: Indices) -> bytes:
    """Write gaps in blocks of 128, each with the width of its largest: u8 widths, then each block's bits."""
    gaps = np.diff(indices, prepend=-1) - 1
    padded = np.zeros(-(-gaps.size // BLOCK) * BLOCK, np.uint32)
    padded[: gaps.size] = gaps
    blocks = padded.reshape(-1, BLOCK)
    widths = np.ceil(np.log2(blocks.max(axis=1).astype(np.float64) + 1)).astype(np.uint8)
    pieces = [widths.tobytes()]
    for width in np.unique(widths[widths > 0]).tolist():
        rows = blocks[widths == width]
        bits = (rows[:, None, :] >> np.arange(width, dtype=np.uint32)[None, :, None]).astype(np.uint8) & 1
        pieces.append(np.packbits(bits).tobytes())
    return b"".join(pieces)


def unpack_gaps(packed: bytes, count: int) -> Indices:
    """Read what `pack_gaps` wrote; a reference, it checks nothing."""
    size = -(-count // BLOCK)
    widths = np.frombuffer(packed, np.uint8, size)
    blocks = np.zeros((size, BLOCK), np.uint32)
    position = size
    for width in np.unique(widths[widths > 0]).tolist():
        at = np.flatnonzero(widths == width)
        length = at.size * width * BLOCK // 8
        bits = np.unpackbits(np.frombuffer(packed, np.uint8, length, position)).reshape(at.size, width, BLOCK)
        position += length
        for bit in range(width):
            blocks[at] |= bits[:, bit].astype(np.uint32) << np.uint32(bit)
    indices: Indices = np.cumsum(blocks.reshape(-1)[:count].astype(np.int64) + 1) - 1
    return indices


def rows(size: int, repeats: int) -> list[IndexRow]:
    """Measure the codes at each share of a vector of `size` elements."""
    found = []
    for share in SHARES:
        count = int(size * share)
        indices = np.sort(np.random.default_rng(3).choice(size, count, replace=False)).astype(np.int64)
        codes: list[tuple[str, Callable[[], bytes], Callable[[bytes], npt.NDArray[np.int64]]]] = [
            ("Rice (ours)", lambda i=indices: encode_indices(i, size),  # type: ignore[misc]
             lambda b, k=count: decode_indices(memoryview(b), k, size)),  # type: ignore[misc]
            (f"gaps, packed by {BLOCK}", lambda i=indices: pack_gaps(i),  # type: ignore[misc]
             lambda b, k=count: unpack_gaps(b, k)),  # type: ignore[misc]
            ("raw uint32", lambda i=indices: i.astype("<u4").tobytes(),  # type: ignore[misc]
             lambda b: np.frombuffer(b, "<u4").astype(np.int64)),
        ]  # fmt: skip
        for name, encode, decode in codes:
            written = encode()
            if not np.array_equal(decode(written), indices):
                raise AssertionError(f"{name} does not give the positions back")
            found.append(IndexRow(
                share, name, 8 * len(written) / count, positions_entropy(count, size) / count,
                median_s(encode, repeats) / count * 1e9, median_s(partial(decode, written), repeats) / count * 1e9,
            ))  # fmt: skip
    return found
