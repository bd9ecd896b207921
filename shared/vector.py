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
