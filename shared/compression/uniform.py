"""uniform(step=s): whole multiples of s times each tensor's RMS.

    q = round(x / (s * RMS of the tensor)),   x ~ q * c

Rounded to nearest, c is the least-squares factor sum(x q) / sum(q^2): a projection, so the error is at most ||x||, and
less unless every q is 0. With s >= 2 that happens (all values alike): then the step is max|x|, or such a tensor would
never be sent. With `stochastic` rounding c is the step and E[q c] = x; its variance is up to s^2 / 4 of
||x||^2. Behind it an entropy coder: on heavy-tailed real updates this beats every code of fixed width between 0.3 and 3
bits.

`uniform(step=2) | pack | zstd` fills bytes before it compresses; without `pack`, one byte a number.

Source: Mitchell et al., "Optimizing the communication-accuracy trade-off in federated learning with rate-distortion
theory", arXiv:2201.02664; ranking measured in algorithms notes, 2.3.
"""

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from shared.compression.codec import Params
from shared.compression.quantizer import Quantized, Written, dither
from shared.compression.symbols import LARGEST, Symbols, decode_symbols, encode_symbols, symbols_bytes_max
from shared.compression.tensors import Indices, Values
from shared.vector import Vector

TINY = 1e-22  # a tensor with a smaller step is zero: squares of its elements vanish in float32
STEP = (0.05, 32.0)  # smallest and largest step, in RMS
STEP_STOCHASTIC_MIN = 0.5  # so that no value of a tensor below 2.6e8 elements is clipped, which would bias it


@dataclass(frozen=True, slots=True)
class UniformQuantizer:
    """Multiples of a step.

    Attributes:
        step: s, in RMS of the tensor.
        rounding: `nearest` or `stochastic`.
        packed: whether `pack` follows.
    """

    step: float
    rounding: str = "nearest"
    packed: bool = False

    @property
    def name(self) -> str:
        """Its stages in the codec's string."""
        rounding = "" if self.rounding == "nearest" else f", {self.rounding}"
        return f"uniform(step={self.step:g}{rounding})" + (" | pack" if self.packed else "")

    @property
    def unbiased(self) -> bool:
        """Stochastic rounding is."""
        return self.rounding == "stochastic"

    @property
    def contraction(self) -> bool:
        """Nearest is; stochastic while s^2 / 4 < 1."""
        return self.rounding == "nearest" or self.step < 2

    def pack(self) -> "UniformQuantizer":
        """Return the same with `pack`."""
        return replace(self, packed=True)

    def bytes_max(self, count: int, tensors: int) -> int:
        """Return the bound: by Chebyshev at most n / (127 s)^2 values exceed 127 steps."""
        return symbols_bytes_max(count, tensors, int(count / (127 * self.step) ** 2) + 16)

    def encode(self, values: Values, rng: np.random.Generator) -> Written:
        """Measure each tensor's RMS, then quantize slab by slab."""
        squares = np.zeros(len(values.ends))
        for tensor, _, x in values.by_tensor():
            squares[tensor] += float(np.dot(x, x))
        steps = (self.step * np.sqrt(squares / np.maximum(np.diff(values.ends, prepend=0), 1))).astype(np.float32)
        steps[steps < TINY] = 0
        symbols = np.empty(values.size, np.int16)
        products, norms = np.zeros(len(steps)), np.zeros(len(steps))
        for tensor, start, x in values.by_tensor():
            q = self._round(x, steps[tensor], rng)
            symbols[start : start + x.size] = q
            products[tensor] += float(np.dot(x, q))
            norms[tensor] += float(np.dot(q, q))
        unheard = (norms == 0) & (steps > 0)
        if unheard.any() and not self.unbiased:
            self._take_largest(values, unheard, symbols, products, norms)
        scales = steps if self.unbiased else np.divide(products, norms, out=np.zeros(len(steps)), where=norms > 0)
        return Written(encode_symbols(symbols, scales.astype(np.float32), self.packed), {})

    def decode(self, payload: memoryview, params: Params, count: int, ends: Indices) -> Quantized:
        """Check the symbols."""
        return decode_symbols(self.name, payload, count, ends)

    @staticmethod
    def _take_largest(
        values: Values, unheard: npt.NDArray[np.bool_], symbols: Symbols,
        products: npt.NDArray[np.float64], norms: npt.NDArray[np.float64],
    ) -> None:  # fmt: skip
        """Quantize the tensors whose elements are all below half a step with a step of their largest, in place."""
        largest = np.zeros(len(unheard), np.float32)
        for tensor, _, x in values.by_tensor():
            if unheard[tensor]:
                largest[tensor] = max(largest[tensor], np.abs(x).max(initial=0))
        for tensor, start, x in values.by_tensor():
            if unheard[tensor]:
                q = np.rint(x / largest[tensor])
                symbols[start : start + x.size] = q
                products[tensor] += float(np.dot(x, q))
                norms[tensor] += float(np.dot(q, q))

    def _round(self, x: Vector, step: np.float32, rng: np.random.Generator) -> Vector:
        """Return x in steps, whole; float32."""
        if not step > 0:
            return np.zeros(x.size, np.float32)
        q: Vector = x / step
        if self.unbiased:
            q += dither(q.size, rng)
            np.floor(q, out=q)
        else:
            np.rint(q, out=q)
        return np.clip(q, -LARGEST, LARGEST, out=q)
