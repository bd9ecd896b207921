"""nf4: four bits on the quantiles of a normal distribution, blocks of 64 scaled by their largest value.

    x[i] ~ code[q[i]] * s[block of i] * scale

Zero is one of the sixteen levels, and a nearest level is never farther than zero: it contracts. Scales as in
`block_int`. Payload: float16 scales [ceil(n / 64)], then two codes a byte, the even element in the low half.

Source: Dettmers et al., QLoRA, arXiv:2305.14314, appendix E (the sixteen numbers).
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from shared.compression.block_int import inverse_of, largest_of, read_relative_scales, relative_scales, rows_of
from shared.compression.codec import Params
from shared.compression.quantizer import Quantized, Written, exactly, read_scale
from shared.compression.tensors import Indices, Values
from shared.vector import Vector

BLOCK = 64
CODE = np.array(
    [
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
        -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
        0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ],
    np.float32,
)  # fmt: skip
_EDGES = (CODE[1:] + CODE[:-1]) / 2
_PAIRS = np.stack([np.tile(CODE, 16), np.repeat(CODE, 16)], axis=1)  # byte -> (even, odd) element


@dataclass(frozen=True, slots=True)
class Nf4Values:
    """Decoded blocks."""

    pairs: npt.NDArray[np.uint8]  # [blocks * 32]
    factors: Vector  # float32 [blocks]

    def inflate(self, start: int, stop: int, weight: float, out: Vector) -> None:
        """Look two values up at once and multiply each block by its factor."""
        size = stop - start
        blocks = -(-size // BLOCK)
        target = out if size == blocks * BLOCK else np.empty(blocks * BLOCK, np.float32)
        pairs = self.pairs[start // 2 : start // 2 + blocks * BLOCK // 2]
        np.take(_PAIRS, pairs, axis=0, out=target.reshape(-1, 2), mode="clip")
        factors = self.factors[start // BLOCK : start // BLOCK + blocks] * np.float32(weight)
        rows = target.reshape(-1, BLOCK)
        np.multiply(rows, factors[:, None], out=rows)
        if target is not out:
            out[:] = target[:size]


@dataclass(frozen=True, slots=True)
class Nf4Quantizer:
    """NormalFloat of four bits; nearest."""

    name: str = "nf4"
    unbiased: bool = False
    contraction: bool = True

    def bytes_max(self, count: int, tensors: int) -> int:
        """Return the exact size."""
        blocks = -(-count // BLOCK)
        return 2 * blocks + blocks * BLOCK // 2

    def encode(self, values: Values, rng: np.random.Generator) -> Written:
        """Scale each block to [-1, 1] and take the nearest level; deterministic."""
        blocks = -(-values.size // BLOCK)
        steps = np.zeros(blocks, np.float32)
        for start, x in values.slabs():
            rows = rows_of(x, BLOCK)
            steps[start // BLOCK : start // BLOCK + len(rows)] = largest_of(rows)
        scale, scales = relative_scales(steps)
        inverse = inverse_of(scale, scales)
        packed = np.empty(blocks * BLOCK // 2, np.uint8)
        for start, x in values.slabs():
            rows = rows_of(x, BLOCK)
            first = start // BLOCK
            scaled = (rows * inverse[first : first + len(rows), None]).reshape(-1)
            codes = np.zeros(scaled.size, np.uint8)
            for edge in _EDGES:
                codes += scaled > edge
            packed[start // 2 : start // 2 + codes.size // 2] = codes[0::2] | (codes[1::2] << 4)
        return Written((scales.astype("<f2").data, packed.data), {"scale": float(scale)})

    def decode(self, payload: memoryview, params: Params, count: int, ends: Indices) -> Quantized:
        """Check size, scale and block scales; the codes cannot be wrong."""
        exactly(self.name, payload, self.bytes_max(count, 0))
        blocks = -(-count // BLOCK)
        factors = read_relative_scales(self.name, payload, blocks, read_scale(self.name, params))
        return Nf4Values(np.frombuffer(payload, np.uint8, offset=2 * blocks), factors)
