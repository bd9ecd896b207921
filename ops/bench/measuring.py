"""Sizes, errors and times of one codec on one delta."""

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np

from ops.bench.recorded import Delta
from shared.compression import encode_with_feedback, parse
from shared.compression.floats import FLOAT16, BFloats, Floats
from shared.compression.measure import squared_bias
from shared.compression.pipeline import Dense, Pipeline, Sparse
from shared.compression.quantizer import Quantized
from shared.compression.rotate import RotatedValues
from shared.compression.tensors import SLAB, parts_of
from shared.vector import Vector

SEED = 7
DRAWS = 3  # of a stochastic codec, for its bias
GIGA = 1e9
ENOUGH_S, CALLS_MAX = 0.15, 41  # how long, and how often, at least `repeats` times, one thing is measured


@dataclass(frozen=True, slots=True)
class Row:
    """One codec on one delta.

    Attributes:
        codec: its name.
        bits: of payload per parameter.
        entropy: order-0 entropy of the symbols and of the positions of what is selected, per parameter; nan for
            float32, whose values hardly repeat.
        beside: bits of scales and of small tensors per parameter, which no entropy coder is to make smaller.
        nmse: ||x - decoded||^2 / ||x||^2 of one update without any residual.
        bias: ||E[decoded] - x|| / ||x||, estimated from a few draws; nan for a codec that is biased and says so.
        encode: GB of float32 per second of processor time, with error feedback where the codec has it.
        decode: the same for decode, check and add.
    """

    codec: str
    bits: float
    entropy: float
    beside: float
    nmse: float
    bias: float
    encode: float
    decode: float

    @property
    def excess(self) -> float:
        """Coded size over the entropy and what stands beside it, minus 1."""
        return self.bits / (self.entropy + self.beside) - 1

    @property
    def ratio(self) -> float:
        """How many times smaller than float32."""
        return 32 / self.bits


def row(name: str, delta: Delta, repeats: int) -> Row:
    """Measure one codec on one delta."""
    codec, x = parse(name), delta.values
    encoded = codec.encode(x, delta.layout, np.random.default_rng(SEED))
    nmse, bias = errors(codec, delta)
    encode_s, decode_s = times(codec, delta, repeats)
    bits = 8 * len(encoded.payload) / x.size
    return Row(name, bits, *entropy(codec, delta), nmse, bias, x.nbytes / GIGA / encode_s, x.nbytes / GIGA / decode_s)


def errors(codec: Pipeline, delta: Delta, draws: int = DRAWS) -> tuple[float, float]:
    """Return NMSE, and the bias of a codec that promises none: means over some draws; of the others one draw tells."""
    draws = draws if codec.unbiased and codec.quantizer.name != "float32" else 1
    decoded = np.empty_like(delta.values)
    square = dot(delta.values, delta.values)
    total, squares = np.zeros_like(delta.values), []
    for draw in range(draws):
        rng = np.random.default_rng(SEED + draw)
        encoded = codec.encode(delta.values, delta.layout, rng)
        decoded.fill(0)
        codec.decode(encoded.payload, encoded.params, delta.layout).add_into(decoded, 1.0)
        decoded -= delta.values
        total += decoded
        squares.append(dot(decoded, decoded))
    bias = math.sqrt(squared_bias(dot(total, total), squares) / square) if draws > 1 else math.nan
    return statistics.mean(squares) / square, bias


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
    """Return the median processor time of one call: of this process alone, whatever else runs on the machine.

    What takes long is called `repeats` times, what is over soon more often: a busy neighbour is felt for a while.
    """
    started = time.process_time()
    once()
    enough = int(ENOUGH_S / max(time.process_time() - started, 1e-6))
    seconds = []
    for _ in range(max(repeats, min(enough, CALLS_MAX))):
        started = time.process_time()
        once()
        seconds.append(time.process_time() - started)
    return max(statistics.median(seconds), 1e-9)


def copy_rate(delta: Delta, repeats: int) -> float:
    """Return GB per second of a bare copy into memory that is there already."""
    target = np.empty_like(delta.values)
    return delta.values.nbytes / GIGA / median_s(lambda: np.copyto(target, delta.values), max(repeats, 9))


def entropy(codec: Pipeline, delta: Delta) -> tuple[float, float]:
    """Return the order-0 entropy of what a codec writes, and what stands beside it, in bits per parameter."""
    plain = replace(codec, zstd=False)
    encoded = plain.encode(delta.values, delta.layout, np.random.default_rng(SEED))
    decoded = plain.decode(encoded.payload, encoded.params, delta.layout)
    parts = parts_of(delta.layout, codec.whole)
    beside = 8.0 * FLOAT16.bytes_max(parts.small.size, 1) if parts.small.size else 0.0
    bits = 0.0
    if parts.body.size:
        body = decoded.parts[-1]
        assert isinstance(body, Dense | Sparse)  # noqa: S101 - what a pipeline makes
        count = body.at.size if isinstance(body, Sparse) else body.runs.size
        bits = count * _bits_each(body.quantized, count)
        beside += _scale_bits(body.quantized)
        if codec.selection is not None and codec.selection.name.startswith("topk"):
            bits += positions_entropy(count, parts.body.size)
    return float(bits) / delta.values.size, beside / delta.values.size


def _scale_bits(quantized: Quantized) -> float:
    """Return the bits of the scales: float16 a block, or float32 a tensor or a rotated block."""
    inner = quantized.inner if isinstance(quantized, RotatedValues) else quantized
    if isinstance(inner, Floats | BFloats):
        return 0.0
    factors, scales = getattr(inner, "factors", None), getattr(inner, "scales", None)
    return 16.0 * factors.size if factors is not None else 32.0 * scales.size if scales is not None else 0.0


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
    values = np.empty(count, np.float32)
    for start in range(0, count, SLAB):
        stop = min(start + SLAB, count)
        quantized.inflate(start, stop, 1.0, values[start:stop])
    return shannon(np.unique(values, return_counts=True)[1])


def shannon(counts: Any) -> float:
    """Return -sum p log2 p of a histogram."""
    p = counts[counts > 0] / counts.sum()
    return float(-(p * np.log2(p)).sum())


def dot(a: Vector, b: Vector) -> float:
    """Return <a, b>, summed in float64 over slabs."""
    return sum(float(np.dot(a[s : s + SLAB], b[s : s + SLAB])) for s in range(0, a.size, SLAB))
