"""rotate: a seeded random rotation that makes any values look Gaussian, block by block.

    y = H D2 H D1 x / B            D1, D2 random signs, H the Hadamard matrix of order B

Once spreads a block over its elements; a second time makes the result Gaussian also where a few values rule the block
(once turns a single one into B equal magnitudes), which makes EDEN unbiased and its error the
same for every input.

Blocks of 4,096; what is left over goes in blocks of 256, the last one padded: never the next power of two of the whole
vector. H of order a^2 is two products with the matrix of order a, which BLAS does at a gigabyte a second. The inverse
is x = D1 H D2 H y / B. The seed travels as the parameter `seed`; the signs are the raw bits of PCG64, whose stream is
fixed. Sums depend on the machine's BLAS in the last bit, so a rotated codec is not `exact`.

Source: Suresh et al., arXiv:1611.00429; Vargaftik et al., DRIVE, arXiv:2105.08339; two in a row: Yu et al., orthogonal
random features, arXiv:1610.09072, section 4.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from shared.compression.quantizer import Quantized
from shared.compression.tensors import Values
from shared.vector import Vector

BLOCK, TAIL_BLOCK = 4096, 256  # squares of powers of two


def rotated_size(count: int) -> int:
    """Return how many rotated values stand for `count`."""
    return count + -(count % BLOCK) % TAIL_BLOCK


def rotate(values: Values, seed: int) -> Vector:
    """Return the rotated values, float32 [rotated_size(n)]."""
    size = rotated_size(values.size)
    rotated = np.zeros(size, np.float32)
    signs = _signs(seed, size)
    for start, x in values.slabs():
        stop = min(size, start + -(-x.size // TAIL_BLOCK) * TAIL_BLOCK)
        target = rotated[start:stop]
        target[: x.size] = x
        for once in signs:
            target *= _as_floats(once, start, stop)
            hadamard(target)
    return rotated


def hadamard(x: Vector) -> None:
    """Multiply by H / sqrt(B) in place: whole blocks of 4,096, then of 256; its own inverse."""
    whole = x.size // BLOCK * BLOCK
    for first, last, order in ((0, whole, 64), (whole, x.size, 16)):
        if last > first:
            blocks = x[first:last].reshape(-1, order, order)
            matrix = _matrix(order)
            np.matmul(matrix, np.matmul(blocks, matrix), out=blocks)


@dataclass(frozen=True, slots=True)
class RotatedValues:
    """Decoded values that are still rotated; turned back slab by slab."""

    inner: Quantized
    signs: npt.NDArray[np.uint8]  # [2, bytes]
    size: int  # rotated values in all

    def inflate(self, start: int, stop: int, weight: float, out: Vector) -> None:
        """Inflate a slab of whole blocks, rotate it back, drop the padding."""
        end = min(self.size, start + -(-(stop - start) // TAIL_BLOCK) * TAIL_BLOCK)
        slab = out if end == stop else np.empty(end - start, np.float32)
        self.inner.inflate(start, end, weight, slab)
        for once in self.signs[::-1]:
            hadamard(slab)
            slab *= _as_floats(once, start, end)
        if slab is not out:
            out[:] = slab[: stop - start]


def rotate_back(inner: Quantized, seed: int, count: int) -> RotatedValues:
    """Return what stands for `count` values before the rotation."""
    size = rotated_size(count)
    return RotatedValues(inner, _signs(seed, size), size)


def _signs(seed: int, size: int) -> npt.NDArray[np.uint8]:
    """Return the random bits of both sign matrices, eight to a byte: uint8 [2, bytes]."""
    words = np.random.PCG64(seed).random_raw(2 * -(-size // 64)).astype("<u8", copy=False)
    return words.view(np.uint8).reshape(2, -1)


def _as_floats(signs: npt.NDArray[np.uint8], start: int, stop: int) -> Vector:
    bits = np.unpackbits(signs[start // 8 : -(-stop // 8)], count=stop - start)
    floats: Vector = np.multiply(bits, np.float32(-2))
    floats += np.float32(1)
    return floats


@lru_cache(maxsize=4)
def _matrix(order: int) -> Vector:
    """Return the Hadamard matrix divided by the square root of its order; symmetric and its own inverse."""
    matrix = np.ones((1, 1))
    while len(matrix) < order:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    normal: Vector = (matrix / np.sqrt(order)).astype(np.float32)
    return normal
