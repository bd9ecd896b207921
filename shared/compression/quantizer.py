"""What every quantizer does: numbers -> bytes, and back a slab at a time."""

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from shared.compression.codec import Params, Stage
from shared.compression.tensors import Indices, Values
from shared.errors import Reason, RejectedUpdate
from shared.vector import Vector

SCALE_MAX = 1e12  # times 32,767, the largest number a scale multiplies: a slab's squared norm still fits float32
SEED_MAX = 2**32 - 1  # of the parameters a decoder draws from

Piece = bytes | memoryview


@dataclass(frozen=True, slots=True)
class Written:
    """What a quantizer made.

    Attributes:
        pieces: the bytes in order, to be joined once: each copy of model size costs more than the arithmetic.
        params: what the decoder needs besides.
    """

    pieces: tuple[Piece, ...]
    params: Params


class Quantized(Protocol):
    """Checked values, still small."""

    def inflate(self, start: int, stop: int, weight: float, out: Vector) -> None:
        """Write `weight * values[start:stop]` into `out` (float32 [stop - start]); `start` is a multiple of SLAB."""


class Quantizer(Stage, Protocol):
    """One way to write numbers with few bits."""

    def bytes_max(self, count: int, tensors: int) -> int:
        """Return the most bytes `count` values of `tensors` tensors take."""

    def encode(self, values: Values, rng: np.random.Generator) -> Written:
        """Quantize."""

    def decode(self, payload: memoryview, params: Params, count: int, ends: Indices) -> Quantized:
        """Check the bytes of `count` values; raises `RejectedUpdate` and nothing else."""


@dataclass(frozen=True, slots=True)
class Nothing:
    """No values at all."""

    def inflate(self, start: int, stop: int, weight: float, out: Vector) -> None:
        """There is nothing to write."""


def exactly(name: str, payload: memoryview, expected: int) -> None:
    """Raise `RejectedUpdate` unless there are exactly so many bytes."""
    if len(payload) != expected:
        raise RejectedUpdate(
            Reason.TOO_LARGE if len(payload) > expected else Reason.CODEC,
            f"{name}: {len(payload)} bytes where {expected} are expected",
        )


def read_scales(name: str, payload: memoryview, count: int) -> Vector:
    """Read `count` float32 scales from the start of a payload; each must be in [0, SCALE_MAX]."""
    if len(payload) < 4 * count:
        raise RejectedUpdate(Reason.CODEC, f"{name}: {len(payload)} bytes do not hold {count} scales")
    scales = np.frombuffer(payload, "<f4", count)
    if count and not (scales.min() >= 0 and scales.max() <= SCALE_MAX):  # NaN fails both
        raise RejectedUpdate(Reason.NOT_FINITE, f"{name}: a scale is NaN or outside [0, {SCALE_MAX:g}]")
    return scales


def read_scale(name: str, params: Params) -> float:
    """Read the parameter `scale`, in [0, SCALE_MAX]."""
    scale = params.get("scale")
    if not isinstance(scale, float | int) or isinstance(scale, bool):
        raise RejectedUpdate(Reason.CODEC, f"{name} needs the number `scale` beside its name, got {str(scale)[:40]!r}")
    if not 0 <= scale <= SCALE_MAX:
        raise RejectedUpdate(Reason.NOT_FINITE, f"{name}: scale {scale!r} is outside [0, {SCALE_MAX:g}]")
    return float(scale)


def read_count(name: str, params: Params, key: str, most: int) -> int:
    """Read a whole number from 0 to `most`."""
    count = params.get(key)
    if not isinstance(count, int) or isinstance(count, bool) or not 0 <= count <= most:
        raise RejectedUpdate(
            Reason.CODEC, f"{name} needs {key} from 0 to {most} beside its name, got {str(count)[:40]}"
        )
    return count


def dither(count: int, rng: np.random.Generator) -> Vector:
    """Return float32 [count], uniform on a grid of 65,536 points in (0, 1), symmetric about 1/2.

    Four 16-bit numbers of each 64-bit draw: a third of the time of drawing floats. The grid's bias is at most
    2^-17 of a quantization step.
    """
    words = rng.integers(0, 2**64, -(-count // 4), dtype=np.uint64).view(np.uint16)[:count]
    uniform: Vector = np.multiply(words, np.float32(2.0**-16))
    uniform += np.float32(2.0**-17)
    return uniform
