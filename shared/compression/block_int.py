"""int8, int4, int2: blocks of 256 values share one float16 scale.

    x[i] ~ q[i] * s[block of i] * scale          q in [-L, L], L = 127, 7 or 1

`scale` (a parameter) is the largest block step, the float16 block scales are relative to it, in [0, 1], so that
neither tiny nor huge deltas leave float16's range. They are rounded up: with step = max|x| / L of the block no
value is clipped and stochastic rounding is unbiased, E[q] = x / step.

`int2(nearest)` would waste its two levels on the block's maximum: its step is 1.224 RMS of the block, Lloyd's for three
levels and a Gaussian; beyond it values are clipped. A nearest level is never farther than zero, so it contracts.

Payload: float16 scales [ceil(n / 256)], then the integers. Narrow ones share a byte: of a block of 256 (the last one
padded) byte j holds elements j, j + 256 / per byte, ... from the low bits up, each plus L + 1.

Source: max-norm block quantisation, algorithms table "int-b block"; QSGD's stochastic rounding, arXiv:1610.02132.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from shared.compression.codec import Params
from shared.compression.quantizer import Quantized, Written, dither, exactly, read_scale
from shared.compression.tensors import SLAB, Indices, Values
from shared.errors import Reason, RejectedUpdate
from shared.vector import Vector

BLOCK = 256  # elements that share a scale
TINY = 1e-30  # a vector with no larger step is zero: its reciprocal would overflow
THREE_LEVELS = 1.224  # Lloyd-Max step of a three-level quantizer, in standard deviations of a Gaussian

Integers = npt.NDArray[np.integer[Any]]  # int8, or uint8 for narrow ones


@dataclass(frozen=True, slots=True)
class BlockInts:
    """Decoded blocks: integers and the factor of each block, both views into the message or small."""

    integers: Integers  # int8 [n], or uint8 [blocks * 256 * bits / 8]
    factors: Vector  # float32 [blocks]
    bits: int

    def inflate(self, start: int, stop: int, weight: float, out: Vector) -> None:
        """Multiply each block by its factor."""
        whole = (stop - start) // BLOCK
        first = start // BLOCK
        factors = self.factors[first : first + whole + 1] * np.float32(weight)
        if whole:
            self._blocks(start, whole, factors[:whole, None], out[: whole * BLOCK].reshape(-1, BLOCK))
        if tail := stop - start - whole * BLOCK:
            last = np.empty((1, BLOCK), np.float32)
            self._blocks(start + whole * BLOCK, 1, factors[whole:, None], last, tail)
            out[whole * BLOCK :] = last[0, :tail]

    def _blocks(self, start: int, count: int, factors: Vector, out: Vector, tail: int = BLOCK) -> None:
        if self.bits == 8:
            integers = self.integers[start : start + (count - 1) * BLOCK + tail]
            if tail == BLOCK:
                np.multiply(integers.reshape(-1, BLOCK), factors, out=out)
            else:
                np.multiply(integers, factors[0], out=out[0, :tail])
            return
        per, offset = 8 // self.bits, 2 ** (self.bits - 1)
        width = BLOCK // per
        packed = self.integers[start // per : start // per + count * width].reshape(-1, width)
        for part in range(per):
            codes = (packed >> (self.bits * part)) & (2**self.bits - 1)
            np.subtract(codes, offset, out=out[:, part * width : (part + 1) * width], dtype=np.int8, casting="unsafe")
        np.multiply(out, factors, out=out)


@dataclass(frozen=True, slots=True)
class BlockIntQuantizer:
    """Integers of 8, 4 or 2 bits; rounding is `stochastic` (unbiased) or `nearest` (smaller error, biased)."""

    bits: int
    rounding: str

    @property
    def name(self) -> str:
        """The rounding is the encoder's affair but told, so that a ledger can be read."""
        return f"int{self.bits}" if self.rounding == "stochastic" else f"int{self.bits}({self.rounding})"

    @property
    def unbiased(self) -> bool:
        """Stochastic rounding is."""
        return self.rounding == "stochastic"

    @property
    def contraction(self) -> bool:
        """All but stochastic int2: its variance is up to 7 times the squared norm (4 bits: 0.75, 8 bits: 0.004)."""
        return self.bits > 2 or self.rounding == "nearest"

    @property
    def levels(self) -> int:
        """Largest integer: 127, 7 or 1."""
        return int(2 ** (self.bits - 1) - 1)

    def bytes_max(self, count: int, tensors: int) -> int:
        """Return the exact size."""
        blocks = -(-count // BLOCK)
        return 2 * blocks + (count if self.bits == 8 else blocks * BLOCK * self.bits // 8)

    def encode(self, values: Values, rng: np.random.Generator) -> Written:
        """Find the steps, then quantize slab by slab."""
        blocks = -(-values.size // BLOCK)
        steps = np.zeros(blocks, np.float32)
        for start, x in values.slabs():
            rows = rows_of(x)
            steps[start // BLOCK : start // BLOCK + len(rows)] = self._steps(rows)
        scale, scales = relative_scales(steps)
        integers = np.zeros(blocks * BLOCK, np.int8)
        inverse = inverse_of(scale, scales)
        scratch = np.empty((-(-min(values.size, SLAB) // BLOCK), BLOCK), np.float32)
        for start, x in values.slabs():
            rows = rows_of(x)
            first = start // BLOCK
            slab = np.multiply(rows, inverse[first : first + len(rows), None], out=scratch[: len(rows)])
            if self.rounding == "stochastic":
                slab += dither(slab.size, rng).reshape(slab.shape)
                np.floor(slab, out=slab)
            else:
                np.rint(slab, out=slab)
            np.clip(slab, -self.levels, self.levels, out=slab)
            integers[first * BLOCK : first * BLOCK + slab.size] = slab.reshape(-1)
        body = integers[: values.size] if self.bits == 8 else _pack(integers, self.bits)
        return Written((scales.astype("<f2").data, body.data), {"scale": float(scale)})

    def decode(self, payload: memoryview, params: Params, count: int, ends: Indices) -> Quantized:
        """Check size, scale and block scales; the integers cannot be wrong."""
        exactly(self.name, payload, self.bytes_max(count, 0))
        blocks = -(-count // BLOCK)
        factors = read_relative_scales(self.name, payload, blocks, read_scale(self.name, params))
        integers: Integers = np.frombuffer(payload, np.int8 if self.bits == 8 else np.uint8, offset=2 * blocks)
        return BlockInts(integers, factors, self.bits)

    def _steps(self, rows: Vector) -> Vector:
        if self.bits == 2 and self.rounding == "nearest":
            steps: Vector = np.sqrt(np.einsum("ij,ij->i", rows, rows) / BLOCK) * np.float32(THREE_LEVELS)
            return steps
        return largest_of(rows) / np.float32(self.levels)


def largest_of(rows: Vector) -> Vector:
    """Return each row's largest magnitude; twice as fast as max(axis=1)."""
    largest: Vector = np.maximum.reduceat(np.abs(rows).reshape(-1), np.arange(0, rows.size, rows.shape[1]))
    return largest


def inverse_of(scale: np.float32, scales: npt.NDArray[np.float16]) -> Vector:
    """Return 1 / step of each block, 0 where the step is 0."""
    with np.errstate(divide="ignore"):
        inverse: Vector = np.where(scales > 0, 1 / (scales.astype(np.float32) * scale), np.float32(0))
    return inverse


def relative_scales(steps: Vector) -> tuple[np.float32, npt.NDArray[np.float16]]:
    """Return the largest step, and each step relative to it, rounded up to float16."""
    scale = np.float32(steps.max(initial=0.0))
    if not scale > TINY:
        return np.float32(0), np.zeros(steps.size, np.float16)
    ratios = steps / scale
    rounded = ratios.astype(np.float16)
    short = rounded.astype(np.float32) < ratios
    rounded[short] = np.nextafter(rounded[short], np.float16(np.inf))
    return scale, np.minimum(rounded, np.float16(1))


def read_relative_scales(name: str, payload: memoryview, blocks: int, scale: float) -> Vector:
    """Read float16 block scales from the start of a payload and return each block's factor."""
    scales = np.frombuffer(payload, "<f2", blocks).astype(np.float32)
    if blocks and not (scales.min() >= 0 and scales.max() <= 1):  # NaN fails both
        raise RejectedUpdate(Reason.NOT_FINITE, f"{name}: block scales outside [0, 1] or NaN")
    scales *= np.float32(scale)
    return scales


def rows_of(x: Vector, block: int = BLOCK) -> Vector:
    """Return x as rows of a block, the last one padded with zeros."""
    if x.size % block:
        x = np.concatenate([x, np.zeros(-x.size % block, np.float32)])
    return x.reshape(-1, block)


def _pack(integers: Integers, bits: int) -> Integers:
    """Put the elements of each block of 256 into bytes."""
    per = 8 // bits
    shifted = (integers + 2 ** (bits - 1)).astype(np.uint8).reshape(-1, per, BLOCK // per)
    packed = shifted[:, 0].copy()
    for part in range(1, per):
        packed |= shifted[:, part] << (bits * part)
    flat: Integers = packed.reshape(-1)
    return flat
