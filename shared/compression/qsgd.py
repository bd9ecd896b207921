"""qsgd(s): s levels of each tensor's norm, stochastically rounded.

    q = sgn(x) * floor(s |x| / ||x|| + u),  u uniform in (0, 1);    x ~ q * ||x|| / s

Unbiased, with variance at most min(d / s^2, sqrt(d) / s) ||x||^2: for tensors of a few hundred elements, and the codec
of the QAFeL experiment. Larger ones are better served by blocks (`int4`) or steps relative to the RMS (`uniform`).

Source: Alistarh et al., arXiv:1610.02132, section 3.1 and lemma 3.1.
"""

from dataclasses import dataclass, replace

import numpy as np

from shared.compression.codec import Params
from shared.compression.quantizer import Quantized, Written, dither
from shared.compression.symbols import decode_symbols, encode_symbols, symbols_bytes_max
from shared.compression.tensors import Indices, Values


@dataclass(frozen=True, slots=True)
class QsgdQuantizer:
    """Levels of the norm.

    Attributes:
        levels: s, 1 to 127.
        packed: whether `pack` follows.
    """

    levels: int
    packed: bool = False
    unbiased: bool = True
    contraction: bool = False

    @property
    def name(self) -> str:
        """Its stages in the codec's string."""
        return f"qsgd({self.levels})" + (" | pack" if self.packed else "")

    def pack(self) -> "QsgdQuantizer":
        """Return the same with `pack`."""
        return replace(self, packed=True)

    def bytes_max(self, count: int, tensors: int) -> int:
        """Return the bound."""
        return symbols_bytes_max(count, tensors, 0)

    def encode(self, values: Values, rng: np.random.Generator) -> Written:
        """Measure each tensor's norm, then round."""
        squares = np.zeros(len(values.ends))
        for tensor, _, x in values.by_tensor():
            squares[tensor] += float(np.dot(x, x))
        steps = (np.sqrt(squares) / self.levels).astype(np.float32)
        symbols = np.zeros(values.size, np.int16)
        for tensor, start, x in values.by_tensor():
            if steps[tensor] > 0:
                q = np.floor(np.abs(x) / steps[tensor] + dither(x.size, rng))
                symbols[start : start + x.size] = np.sign(x) * np.minimum(q, self.levels)
        return Written(encode_symbols(symbols, steps, self.packed), {})

    def decode(self, payload: memoryview, params: Params, count: int, ends: Indices) -> Quantized:
        """Check the symbols."""
        return decode_symbols(self.name, payload, count, ends)
