"""float32, bfloat16, float16: every element by itself, little-endian.

`float32` is the delta as it is: any language can write it. `bfloat16` keeps 8 bits of precision and float32's range
(rounded to nearest even, in integer arithmetic). `float16` keeps 11 bits; a power of two in front brings the largest
element into its range, so that neither tiny nor huge deltas are lost: payload = float32 power of two, then halfs.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from shared.compression.codec import Params
from shared.compression.quantizer import Quantized, Written, exactly, read_scales
from shared.compression.tensors import SLAB, Indices, Values
from shared.errors import Reason, RejectedUpdate
from shared.vector import Vector, round_to_bfloat16, squared_norm

WIDTH = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True, slots=True)
class Floats:
    """Decoded floats: views into the message. `scale` is 1 but for float16."""

    values: npt.NDArray[np.floating[Any]]
    scale: float = 1.0

    def inflate(self, start: int, stop: int, weight: float, out: Vector) -> None:
        """Cast and scale."""
        np.multiply(self.values[start:stop], np.float32(weight * self.scale), out=out, dtype=np.float32)


@dataclass(frozen=True, slots=True)
class BFloats:
    """Decoded bfloat16: the upper halves of float32."""

    halves: npt.NDArray[np.uint16]

    def inflate(self, start: int, stop: int, weight: float, out: Vector) -> None:
        """Shift into place and scale."""
        np.left_shift(self.halves[start:stop], 16, out=out.view(np.uint32), dtype=np.uint32)
        np.multiply(out, np.float32(weight), out=out)


@dataclass(frozen=True, slots=True)
class FloatQuantizer:
    """Elements of one float type; deterministic."""

    name: str
    contraction: bool = True

    @property
    def unbiased(self) -> bool:
        """Only what is not rounded is."""
        return self.name == "float32"

    def bytes_max(self, count: int, tensors: int) -> int:
        """Return the exact size."""
        return WIDTH[self.name] * count + (4 if self.name == "float16" else 0)

    def encode(self, values: Values, rng: np.random.Generator) -> Written:
        """Cast."""
        out = np.empty(values.size, {"float32": "<f4", "bfloat16": "<u2", "float16": "<f2"}[self.name])
        head, factor = b"", np.float32(1)
        if self.name == "float16":
            scale = _power_of_two(max((float(np.abs(x).max(initial=0)) for _, x in values.slabs()), default=0.0))
            head, factor = np.float32(scale).tobytes(), np.float32(1 / scale)
        for start, x in values.slabs():
            target = out[start : start + x.size]
            if self.name == "bfloat16":
                rounded = x.copy()
                round_to_bfloat16(rounded)
                target[:] = rounded.view(np.uint32) >> 16
            else:
                np.multiply(x, factor, out=target, casting="same_kind")
        return Written((head, out.data), {})

    def decode(self, payload: memoryview, params: Params, count: int, ends: Indices) -> Quantized:
        """Check size and finiteness."""
        exactly(self.name, payload, self.bytes_max(count, 0))
        if self.name == "bfloat16":
            halves = np.frombuffer(payload, "<u2")
            parts = (halves[start : start + SLAB] & 0x7FFF for start in range(0, count, SLAB))
            if any(int(part.max()) >= _BFLOAT16_ABSURD for part in parts):
                raise RejectedUpdate(Reason.NOT_FINITE, "bfloat16 payload holds NaN, infinity or absurd values")
            return BFloats(halves)
        values: npt.NDArray[np.floating[Any]]
        if self.name == "float16":
            scale, values = float(read_scales(self.name, payload, 1)[0]), np.frombuffer(payload, "<f2", offset=4)
        else:
            scale, values = 1.0, np.frombuffer(payload, "<f4")
        if not _finite(values):
            raise RejectedUpdate(Reason.NOT_FINITE, f"{self.name} payload holds NaN, infinity or absurd values")
        return Floats(values, scale)


_BFLOAT16_ABSURD = int(np.float32(1e19).view(np.uint32)) >> 16  # as float32: its square would not be finite


def _finite(values: npt.NDArray[np.floating[Any]]) -> bool:
    """Tell whether a sum of squares is finite; halfs by their exponents, ten times as fast as converting them."""
    if values.dtype == np.float16:
        parts = (values[start : start + SLAB].view(np.uint16) for start in range(0, values.size, SLAB))
        return all(int((part & 0x7FFF).max()) < 0x7C00 for part in parts)
    return bool(np.isfinite(squared_norm(values)))


def _power_of_two(largest: float) -> float:
    """Return the power of two that brings `largest` to [1024, 2048); within float32's range."""
    return float(2.0 ** np.clip(np.floor(np.log2(largest)) - 10, -120, 120)) if largest > 0 else 1.0


FLOAT16 = FloatQuantizer("float16")
