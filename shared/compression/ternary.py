"""ternary: minus, zero or plus one magnitude per tensor, five values a byte.

`ternary` keeps what exceeds 0.7 mean|x|, at the mean magnitude of what it keeps (the least-squares factor, so it
contracts). `ternary(stochastic)` is TernGrad without its clipping: magnitude max|x|, P(+-1) = |x| / max|x|, unbiased
and of a variance that grows with max|x| / RMS.

After `topk` the zeros are left out already: there `ternary` is one sign bit a value (see `sign`).

Source: Li and Liu, ternary weight networks, arXiv:1605.04711, eq. 5-6; Wen et al., TernGrad, arXiv:1705.07878, eq. 3-5.
"""

from dataclasses import dataclass

import numpy as np

from shared.compression.codec import Params
from shared.compression.quantizer import Quantized, Written, dither
from shared.compression.symbols import decode_symbols, encode_symbols, symbols_bytes_max
from shared.compression.tensors import Indices, Values
from shared.vector import Vector

THRESHOLD = 0.7  # of mean|x|: nearly optimal for uniform and Gaussian values


@dataclass(frozen=True, slots=True)
class TernaryQuantizer:
    """Three levels; rounding is `nearest` or `stochastic`."""

    rounding: str = "nearest"

    @property
    def name(self) -> str:
        """Its stage in the codec's string."""
        return "ternary" if self.rounding == "nearest" else "ternary(stochastic)"

    @property
    def unbiased(self) -> bool:
        """Stochastic rounding is."""
        return self.rounding == "stochastic"

    @property
    def contraction(self) -> bool:
        """The nearest one is."""
        return self.rounding == "nearest"

    def bytes_max(self, count: int, tensors: int) -> int:
        """Return the bound of `symbols`; five values a byte are a fifth of it."""
        return symbols_bytes_max(-(-count // 5), tensors, 0)

    def encode(self, values: Values, rng: np.random.Generator) -> Written:
        """Measure each tensor, then take the sign of what is large enough."""
        sums, largest = np.zeros(len(values.ends)), np.zeros(len(values.ends), np.float32)
        for tensor, _, x in values.by_tensor():
            magnitude = np.abs(x)
            sums[tensor] += float(magnitude.sum(dtype=np.float64))
            largest[tensor] = max(largest[tensor], magnitude.max(initial=0.0))
        thresholds = (THRESHOLD * sums / np.maximum(np.diff(values.ends, prepend=0), 1)).astype(np.float32)
        symbols = np.empty(values.size, np.int16)
        products, counts = np.zeros(len(sums)), np.zeros(len(sums))
        for tensor, start, x in values.by_tensor():
            q = _stochastic(x, largest[tensor], rng) if self.unbiased else np.sign(x) * (np.abs(x) > thresholds[tensor])
            symbols[start : start + x.size] = q
            products[tensor] += float(np.dot(x, q))
            counts[tensor] += float(np.dot(q, q))
        means = np.divide(products, counts, out=np.zeros(len(sums)), where=counts > 0)
        scales = largest if self.unbiased else means
        return Written(encode_symbols(symbols, scales.astype(np.float32), True, largest=1), {})

    def decode(self, payload: memoryview, params: Params, count: int, ends: Indices) -> Quantized:
        """Check the symbols."""
        return decode_symbols(self.name, payload, count, ends)


def _stochastic(x: Vector, largest: np.float32, rng: np.random.Generator) -> Vector:
    if not largest > 0:
        return np.zeros(x.size, np.float32)
    q: Vector = np.sign(x) * np.floor(np.abs(x) / largest + dither(x.size, rng))
    return q
