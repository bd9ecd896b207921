"""In-place arithmetic on model-size vectors, block by block.

A temporary of model size costs more than the arithmetic (page faults: measured 10-30x), so every
routine here works through one scratch block that stays in the processor's cache.
"""

import numpy as np
import numpy.typing as npt

Vector = npt.NDArray[np.float32]

# The norm of a delta, and of a residual: no training makes a larger one, and every codec can write and read back what
# is below it (its scales stay under SCALE_MAX of compression/quantizer.py).
NORM_MAX = 1e11

BLOCK_ELEMENTS = 1 << 16  # 256 KiB of float32: measured fastest of 8k to 128k; block and scratch fit an L2 cache


def add_scaled(total: Vector, x: npt.NDArray[np.floating], scale: float) -> None:
    """Add `scale * x` to `total` in place.

    Args:
        total: float32 [n], changed in place.
        x: float16 or float32 [n].
        scale: finite factor.
    """
    scratch = np.empty(min(BLOCK_ELEMENTS, total.size), np.float32)
    factor = np.float32(scale)
    for start in range(0, total.size, BLOCK_ELEMENTS):
        block = total[start : start + BLOCK_ELEMENTS]
        product = scratch[: block.size]
        np.multiply(x[start : start + BLOCK_ELEMENTS], factor, out=product, dtype=np.float32)
        np.add(block, product, out=block)


def mix(total: Vector, x: Vector, alpha: float) -> None:
    """Move `total` towards `x` in place: total <- (1 - alpha) total + alpha x.

    Args:
        total: float32 [n], changed in place.
        x: float32 [n].
        alpha: share of `x`, in [0, 1].
    """
    scratch = np.empty(min(BLOCK_ELEMENTS, total.size), np.float32)
    keep, take = np.float32(1.0 - alpha), np.float32(alpha)
    for start in range(0, total.size, BLOCK_ELEMENTS):
        block = total[start : start + BLOCK_ELEMENTS]
        product = scratch[: block.size]
        np.multiply(x[start : start + BLOCK_ELEMENTS], take, out=product)
        np.multiply(block, keep, out=block)
        np.add(block, product, out=block)


def squared_norm(x: npt.NDArray[np.floating]) -> float:
    """Return ||x||^2 of a float16 or float32 vector.

    Not finite exactly if x holds NaN or infinity, or values beyond about 1e19 whose square overflows.
    """
    total = 0.0
    with np.errstate(over="ignore", invalid="ignore"):
        for start in range(0, x.size, BLOCK_ELEMENTS):
            block = x[start : start + BLOCK_ELEMENTS].astype(np.float32, copy=False)
            total += float(np.dot(block, block))
    return total


def round_to_bfloat16(weights: Vector) -> None:
    """Round to the nearest bfloat16, ties to even, in place and block by block.

        b <- (b + 0x7fff + ((b >> 16) & 1)) & 0xffff0000,    b the bits of a weight

    Args:
        weights: float32 [n]; changed. A NaN stays one; beyond 3.39e38 lies infinity.
    """
    scratch = np.empty(min(BLOCK_ELEMENTS, weights.size), np.uint32)
    for start in range(0, weights.size, BLOCK_ELEMENTS):
        block = weights[start : start + BLOCK_ELEMENTS]
        bits, up = block.view(np.uint32), scratch[: block.size]
        lost = np.isnan(block)
        np.right_shift(bits, 16, out=up)
        np.bitwise_and(up, 1, out=up)
        np.add(up, np.uint32(0x7FFF), out=up)
        np.add(bits, up, out=bits)
        np.bitwise_and(bits, np.uint32(0xFFFF0000), out=bits)
        block[lost] = np.nan
