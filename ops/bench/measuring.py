"""Sizes, errors and times of one codec on one delta."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np

from ops.bench.recorded import Delta
from shared.compression import encode_with_feedback, parse
from shared.compression.block_int import BlockInts
from shared.compression.floats import BFloats, Floats
from shared.compression.pipeline import Dense, Pipeline, Sparse
from shared.compression.quantizer import Quantized
from shared.compression.rotate import RotatedValues
from shared.compression.tensors import SLAB
from shared.vector import Vector

SEED = 7
DRAWS = 3  # of a stochastic codec, for its bias
GIGA = 1e9


@dataclass(frozen=True, slots=True)
class Row:
    """One codec on one delta.

    Attributes:
        codec: its name.
        bits: of payload per parameter.
        entropy: order-0 entropy of what is written per parameter: of the symbols, and of the positions if any are
            left out; nan for float32, whose values hardly repeat.
        nmse: ||x - decoded||^2 / ||x||^2 of one update without any residual.
        bias: <decoded, x> / ||x||^2 - 1, mean over a few draws; nan for a codec that is biased and says so.
        encode: GB of float32 per second of processor time, with error feedback where the codec has it.
        decode: the same for decode, check and add.
    """

    codec: str
    bits: float
    entropy: float
    nmse: float
    bias: float
    encode: float
    decode: float

    @property
    def excess(self) -> float:
        """Coded size over entropy, minus 1."""
        return self.bits / self.entropy - 1


def row(name: str, delta: Delta, repeats: int) -> Row:
    """Measure one codec on one delta."""
    codec, x = parse(name), delta.values
    encoded = codec.encode(x, delta.layout, np.random.default_rng(SEED))
    nmse, bias = errors(codec, delta)
    encode_s, decode_s = times(codec, delta, repeats)
    bits = 8 * len(encoded.payload) / x.size
    return Row(name, bits, entropy(codec, delta), nmse, bias, x.nbytes / GIGA / encode_s, x.nbytes / GIGA / decode_s)


def errors(codec: Pipeline, delta: Delta) -> tuple[float, float]:
    """Return NMSE of one draw, and the bias of a few if the codec promises none."""
    draws = DRAWS if codec.unbiased and codec.quantizer.name != "float32" else 1
    decoded = np.empty_like(delta.values)
    square = dot(delta.values, delta.values)
    nmse, projections = 0.0, []
    for draw in range(draws):
        rng = np.random.default_rng(SEED + draw)
        encoded = codec.encode(delta.values, delta.layout, rng)
        decoded.fill(0)
        codec.decode(encoded.payload, encoded.params, delta.layout).add_into(decoded, 1.0)
        projections.append(dot(decoded, delta.values) / square - 1)
        decoded -= delta.values
        nmse += dot(decoded, decoded) / square / draws
    return nmse, statistics.mean(projections) if draws > 1 else float("nan")


def times(codec: Pipeline, delta: Delta, repeats: int) -> tuple[float, float]:
    """Return the median seconds to encode, and to decode and add, with the buffers a running process reuses."""
    x, rng = delta.values, np.random.default_rng(SEED)
    residual, total = np.zeros_like(x), np.zeros_like(x)

    def encode() -> None:
        if codec.feedback:
            encode_with_feedback(codec, x, residual, delta.layout, rng)
        else:
            codec.encode(x, delta.layout, rng)

    encoded = codec.encode(x, delta.layout, rng)

    def decode() -> None:
        codec.decode(encoded.payload, encoded.params, delta.layout).add_into(total, 0.5)

    return median_s(encode, repeats), median_s(decode, repeats)


def median_s(once: Callable[[], Any], repeats: int) -> float:
    """Return the median processor time of one call: of this process alone, whatever else runs on the machine."""
    once()
    seconds = []
    for _ in range(repeats):
        started = time.process_time()
        once()
        seconds.append(time.process_time() - started)
    return max(statistics.median(seconds), 1e-9)


def copy_rate(delta: Delta, repeats: int) -> float:
    """Return GB per second of a bare copy into memory that is there already."""
    target = np.empty_like(delta.values)
    return delta.values.nbytes / GIGA / median_s(lambda: np.copyto(target, delta.values), max(repeats, 9))


def entropy(codec: Pipeline, delta: Delta) -> float:
    """Return the order-0 entropy of what a codec writes, in bits per parameter; scales and heads are not counted."""
    plain = replace(codec, zstd=False)
    encoded = plain.encode(delta.values, delta.layout, np.random.default_rng(SEED))
    decoded = plain.decode(encoded.payload, encoded.params, delta.layout)
    bits = 0.0
    for part in decoded.parts:
        quantized = getattr(part, "quantized", None)
        count = part.at.size if isinstance(part, Sparse) else part.runs.size if isinstance(part, Dense) else 0
        if quantized is None or not count:
            continue
        bits += count * _bits_each(quantized, count)
        if isinstance(part, Sparse) and codec.selection is not None and codec.selection.name.startswith("topk"):
            size = sum(other.runs.size for other in decoded.parts if isinstance(other, Dense))
            bits += positions_entropy(count, delta.values.size - size)
    return bits / delta.values.size


def positions_entropy(count: int, size: int) -> float:
    """Return size * H(count / size): the bits it takes to tell which of `size` elements are chosen at random."""
    p = count / size
    return -size * (p * np.log2(p) + (1 - p) * np.log2(1 - p)) if 0 < p < 1 else 0.0


def _bits_each(quantized: Quantized, count: int) -> float:
    """Return the entropy of the symbols, which are the decoded values with every scale set to one."""
    if isinstance(quantized, RotatedValues):
        return _bits_each(quantized.inner, quantized.size)
    if isinstance(quantized, Floats) and quantized.values.dtype.itemsize == 4:
        return float("nan")
    scales: dict[str, Any] = {
        f.name: np.ones_like(getattr(quantized, f.name))
        for f in fields(quantized)  # type: ignore[arg-type]
        if f.name in ("scales", "factors")
    }
    return entropy_of(replace(quantized, **scales), count)  # type: ignore[type-var]


def entropy_of(quantized: Quantized, count: int) -> float:
    """Return the order-0 entropy of `count` values, in bits each."""
    if not isinstance(quantized, Floats | BFloats | BlockInts):
        values = np.empty(count, np.float32)
        for start in range(0, count, SLAB):
            stop = min(start + SLAB, count)
            quantized.inflate(start, stop, 1.0, values[start:stop])
        return shannon(np.unique(values, return_counts=True)[1])
    out = np.empty(min(SLAB, count), np.float32)
    found = np.zeros(0, np.int64)
    for start in range(0, count, SLAB):
        part = out[: min(SLAB, count - start)]
        quantized.inflate(start, start + part.size, 1.0, part)
        codes = part.astype(np.float16 if isinstance(quantized, Floats) else np.float32)
        bits = codes.view(np.uint16).astype(np.int64) if codes.itemsize == 2 else codes.view(np.uint32) >> 16
        counts = np.bincount(bits.astype(np.int64), minlength=1 << 16)
        found = counts if not found.size else found + counts
    return shannon(found)


def shannon(counts: Any) -> float:
    """Return -sum p log2 p of a histogram."""
    p = counts[counts > 0] / counts.sum()
    return float(-(p * np.log2(p)).sum())


def dot(a: Vector, b: Vector) -> float:
    """Return <a, b>, summed in float64 over slabs."""
    return sum(float(np.dot(a[s : s + SLAB], b[s : s + SLAB])) for s in range(0, a.size, SLAB))
