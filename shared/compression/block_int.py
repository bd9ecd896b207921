"""int8 and int4: blocks of 256 elements share one float16 scale.

    delta[i] ~ q[i] * s[block of i] * scale          q in [-L, L], L = 127 or 7

`scale` (a parameter, float32) is max|delta| / L over the whole vector; the float16 block scales are relative
to it, in [0, 1], so that neither tiny nor huge deltas leave float16's range. A block scale is rounded up, so
no element is clipped and stochastic rounding is unbiased: E[q] = delta / (s * scale).

Payload: float16 scales [ceil(n / 256)], then the integers. int4 puts two in a byte: within a block of 256 (the
last one padded), byte j holds element j in its low and element j + 128 in its high half, each plus 8.

Source: max-norm block quantisation, algorithms table "int-b block"; QSGD's stochastic rounding, arXiv:1610.02132.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from shared.compression.codec import Encoded, Params, check_size
from shared.errors import Reason, RejectedUpdate
from shared.vector import Vector

BLOCK = 256  # elements that share a scale
_SLAB = 512  # blocks handled at once: 128k elements, their float32 scratch stays in the L2 cache
_HALF = np.float32(0.5)

Integers = npt.NDArray[np.integer[Any]]  # int8, or uint8 for the packed halves


@dataclass(frozen=True, slots=True)
class BlockInts:
    """A decoded delta: integers and the factor of each block, both views into the message or small."""

    integers: Integers  # int8 [n], or uint8 [blocks * 128] for int4
    factors: Vector  # float32 [blocks]
    bits: int
    num_params: int

    def add_into(self, total: Vector, weight: float) -> None:
        """Add `weight * delta` to `total` in place, a slab at a time."""
        factors = (self.factors * np.float32(weight))[:, None]
        whole = self.num_params // BLOCK
        rows = total[: whole * BLOCK].reshape(-1, BLOCK)
        scratch = np.empty((min(_SLAB, len(factors)), BLOCK), np.float32)
        for start in range(0, whole, _SLAB):
            stop = min(start + _SLAB, whole)
            block = scratch[: stop - start]
            self._inflate(start, stop, factors, block)
            np.add(rows[start:stop], block, out=rows[start:stop])
        tail = self.num_params - whole * BLOCK
        if tail:
            self._inflate(whole, whole + 1, factors, scratch[:1])
            total[whole * BLOCK :] += scratch[0, :tail]

    def _inflate(self, start: int, stop: int, factors: Vector, out: Vector) -> None:
        """Write blocks `start` to `stop` as float32 into `out` [stop - start, 256]."""
        if self.bits == 8:
            integers = self.integers[start * BLOCK : stop * BLOCK]
            if integers.size < (stop - start) * BLOCK:  # the last block of a vector that 256 does not divide
                np.multiply(integers, factors[start], out=out[0, : integers.size])
            else:
                np.multiply(integers.reshape(-1, BLOCK), factors[start:stop], out=out)
            return
        pairs = self.integers[start * (BLOCK // 2) : stop * (BLOCK // 2)].reshape(-1, BLOCK // 2)
        np.subtract(pairs & 15, 8, out=out[:, : BLOCK // 2], dtype=np.int8, casting="unsafe")
        np.subtract(pairs >> 4, 8, out=out[:, BLOCK // 2 :], dtype=np.int8, casting="unsafe")
        np.multiply(out, factors[start:stop], out=out)


@dataclass(frozen=True, slots=True)
class BlockIntCodec:
    """Integers of 8 or 4 bits; rounding is `stochastic` (unbiased) or `nearest` (smaller error, biased)."""

    bits: int
    rounding: str

    @property
    def name(self) -> str:
        """The wire name; rounding is the encoder's affair but told, so that a ledger can be read."""
        return f"int{self.bits}" if self.rounding == "stochastic" else f"int{self.bits}({self.rounding})"

    @property
    def levels(self) -> int:
        """Largest integer: 127 or 7."""
        return int(2 ** (self.bits - 1) - 1)

    def payload_bytes(self, num_params: int) -> int:
        """Return the exact payload size."""
        blocks = -(-num_params // BLOCK)
        return 2 * blocks + (num_params if self.bits == 8 else blocks * BLOCK // 2)

    def encode(self, delta: Vector, rng: np.random.Generator) -> Encoded:
        """Quantise slab by slab."""
        blocks = -(-delta.size // BLOCK)
        scale = np.float32(np.abs(delta).max(initial=0.0) / self.levels)
        scales = np.zeros(blocks, np.float16)
        integers = np.zeros(blocks * BLOCK, np.int8)
        for start in range(0, blocks if scale > 0 else 0, _SLAB):
            stop = min(start + _SLAB, blocks)
            part = delta[start * BLOCK : stop * BLOCK]
            slab = np.zeros((stop - start, BLOCK), np.float32)
            slab.reshape(-1)[: part.size] = part
            scales[start:stop] = _round_up(np.abs(slab).max(axis=1) / (self.levels * scale))
            steps = scales[start:stop].astype(np.float32) * scale
            np.divide(slab, steps[:, None], out=slab, where=steps[:, None] > 0)
            slab += rng.random(slab.shape, np.float32) if self.rounding == "stochastic" else _HALF
            np.floor(slab, out=slab)
            np.clip(slab, -self.levels, self.levels, out=slab)
            integers[start * BLOCK : stop * BLOCK] = slab.reshape(-1)
        body = integers[: delta.size] if self.bits == 8 else _pack_halves(integers)
        return Encoded(scales.astype("<f2").tobytes() + body.tobytes(), {"scale": float(scale)})

    def decode(self, payload: bytes | memoryview, params: Params, num_params: int) -> BlockInts:
        """Check size, scale and block scales; the integers cannot be wrong."""
        check_size(self, payload, num_params)
        scale = params.get("scale")
        if not isinstance(scale, float | int) or isinstance(scale, bool):
            raise RejectedUpdate(Reason.CODEC, f"{self.name} needs the number `scale` beside its name, got {scale!r}")
        if not 0 <= scale <= SCALE_MAX:
            raise RejectedUpdate(Reason.NOT_FINITE, f"{self.name} scale {scale!r} is outside [0, {SCALE_MAX:g}]")
        blocks = -(-num_params // BLOCK)
        scales = np.frombuffer(payload, "<f2", blocks).astype(np.float32)
        if not (scales.min() >= 0 and scales.max() <= 1):  # NaN fails both
            raise RejectedUpdate(Reason.NOT_FINITE, f"{self.name} block scales outside [0, 1] or NaN")
        integers: Integers = np.frombuffer(payload, np.int8 if self.bits == 8 else np.uint8, offset=2 * blocks)
        return BlockInts(integers, scales * np.float32(scale), self.bits, num_params)


SCALE_MAX = 1e16  # beyond it, the squared norm of a delta could overflow float32: no training makes that


def _round_up(ratios: Vector) -> npt.NDArray[np.float16]:
    """Round to float16, upwards, so that |delta| / step never exceeds the largest integer; at most 1."""
    rounded = ratios.astype(np.float16)
    short = rounded.astype(np.float32) < ratios
    rounded[short] = np.nextafter(rounded[short], np.float16(np.inf))
    return np.minimum(rounded, np.float16(1))


def _pack_halves(integers: Integers) -> Integers:
    """Put elements j and j + 128 of each block of 256 into one byte."""
    shifted = (integers + 8).astype(np.uint8).reshape(-1, 2, BLOCK // 2)
    return (shifted[:, 0] | (shifted[:, 1] << 4)).reshape(-1)
