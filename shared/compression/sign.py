"""sign: one bit a value, and each tensor's mean magnitude.

    x ~ sgn(x) * mean|x|                the least-squares factor: a contraction with delta = ||x||_1^2 / (d ||x||^2)

Biased: without error feedback its errors add up and training stalls, so it is refused there. After `topk` it is
sparse ternary compression: the kept values as plus or minus their mean magnitude.

Payload: float32 magnitudes [tensors], then the signs, eight a byte, first element in the high bit.

Source: Karimireddy et al., arXiv:1901.09847 (EF-sign); Sattler et al., arXiv:1903.02891 (STC).
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from shared.compression.codec import Params
from shared.compression.quantizer import Quantized, Written, exactly, read_scales
from shared.compression.tensors import Indices, Values, tensor_pieces
from shared.vector import Vector


@dataclass(frozen=True, slots=True)
class Signs:
    """Decoded signs."""

    bits: npt.NDArray[np.uint8]
    scales: Vector
    ends: Indices

    def inflate(self, start: int, stop: int, weight: float, out: Vector) -> None:
        """Write plus or minus the tensor's magnitude."""
        np.multiply(np.unpackbits(self.bits[start // 8 : -(-stop // 8)], count=stop - start), np.float32(2), out=out)
        np.subtract(out, np.float32(1), out=out)
        for tensor, first, last in tensor_pieces(self.ends, start, stop):
            np.multiply(out[first:last], self.scales[tensor] * np.float32(weight), out=out[first:last])


@dataclass(frozen=True, slots=True)
class SignQuantizer:
    """Signs and mean magnitudes; deterministic. Called `ternary` where a selection leaves the zeros out."""

    name: str = "sign"
    unbiased: bool = False
    contraction: bool = True

    def bytes_max(self, count: int, tensors: int) -> int:
        """Return the exact size."""
        return 4 * tensors + -(-count // 8)

    def encode(self, values: Values, rng: np.random.Generator) -> Written:
        """Take signs; zero counts as negative."""
        sums = np.zeros(len(values.ends))
        for tensor, _, x in values.by_tensor():
            sums[tensor] += float(np.abs(x).sum(dtype=np.float64))
        bits = np.empty(-(-values.size // 8), np.uint8)
        for start, x in values.slabs():
            packed = np.packbits(x > 0)
            bits[start // 8 : start // 8 + packed.size] = packed
        counts = np.diff(values.ends, prepend=0)
        scales = (sums / np.maximum(counts, 1)).astype("<f4")
        return Written((scales.data, bits.data), {})

    def decode(self, payload: memoryview, params: Params, count: int, ends: Indices) -> Quantized:
        """Check size and magnitudes; the signs cannot be wrong."""
        exactly(self.name, payload, self.bytes_max(count, len(ends)))
        scales = read_scales(self.name, payload, len(ends))
        return Signs(np.frombuffer(payload, np.uint8, offset=4 * len(ends)), scales, ends)
