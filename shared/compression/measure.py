"""What a codec does to one delta: its bytes, its error, its time. For people (`fedmq codecs try`) and for `auto`."""

import math
import statistics
import time
from dataclasses import dataclass

import numpy as np

from shared.compression.codec import Codec
from shared.layout import Layout
from shared.vector import Vector


@dataclass(frozen=True, slots=True)
class Measurement:
    """One codec on one delta.

    Attributes:
        payload_bytes: size of the encoded delta.
        ratio: how many times smaller than float32.
        nmse: ||x - decoded||^2 / ||x||^2 of one update; error feedback sends the rest with the next ones.
        bias: ||E[decoded] - x|| / ||x||, estimated from the draws; 0 when unbiased, sqrt(nmse) when deterministic.
        encode_s: seconds, median.
        decode_s: seconds to decode, check and add, median.
    """

    payload_bytes: int
    ratio: float
    nmse: float
    bias: float
    encode_s: float
    decode_s: float


def measure(codec: Codec, delta: Vector, layout: Layout, seed: int, draws: int = 5) -> Measurement:
    """Encode and decode a delta a few times.

    Args:
        codec: what to measure.
        delta: float32 [n].
        layout: of the delta.
        seed: of its randomness.
        draws: how often, >= 1; sizes and errors are means, times medians.
    """
    square = float(np.dot(delta, delta)) or 1.0
    one, total = np.empty_like(delta), np.zeros_like(delta)
    sizes: list[int] = []
    errors: list[float] = []
    squares: list[float] = []
    encode_s: list[float] = []
    decode_s: list[float] = []
    for draw in range(draws):
        started = time.perf_counter()
        encoded = codec.encode(delta, layout, np.random.default_rng((seed, draw)))
        encode_s.append(time.perf_counter() - started)
        one.fill(0.0)
        started = time.perf_counter()
        codec.decode(encoded.payload, encoded.params, layout).add_into(one, 1.0)
        decode_s.append(time.perf_counter() - started)
        sizes.append(len(encoded.payload))
        one -= delta
        total += one
        squares.append(float(np.dot(one, one)))
        errors.append(squares[-1] / square)
    size = statistics.mean(sizes)
    return Measurement(
        round(size), delta.nbytes / max(1.0, size), statistics.mean(errors),
        math.sqrt(squared_bias(float(np.dot(total, total)), squares) / square),
        statistics.median(encode_s), statistics.median(decode_s),
    )  # fmt: skip


def squared_bias(squared_sum: float, squares: list[float]) -> float:
    """Return ||mean error||^2 less what the spread of so few draws explains of it.

    Args:
        squared_sum: ||sum of the errors||^2.
        squares: ||error||^2 of each draw.
    """
    draws = len(squares)
    mean = squared_sum / draws**2
    if draws == 1:
        return mean
    variance = max(0.0, (sum(squares) - draws * mean) / (draws - 1))
    return max(0.0, mean - variance / draws)
