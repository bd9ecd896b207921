"""Fold: decode + validate + add into the buffer, beside the bare arithmetic over the same bytes."""

import statistics
import time
from collections.abc import Callable

import numpy as np

from aggregator.admission import Admission, admit, delta_of
from ops.bench.updates import JOB, encoded_update, model_of
from shared.compression.block_int import BLOCK
from shared.transport.ports import Delivery

_SLAB = 256  # blocks: the bare loop gets the same cache-sized pieces, its best case


def fold_rate(num_params: int, repeats: int, codec: str = "int8") -> float:
    """Return updates folded per second, one thread, median of `repeats`."""
    model = model_of(num_params)
    total = np.zeros(num_params, np.float32)
    update_id, body = encoded_update(model, 0, codec=codec)
    delivery = Delivery(body, "bench", None, update_id, (0, 0))
    admission = Admission(JOB, model.layout, 2**30, 2**30)

    def once() -> None:
        delta = delta_of(admit(delivery, admission, 0), admission)
        delta.add_into(total, 0.5)

    return 1.0 / _median_s(once, repeats, num_params)


def bare_int8_rate(num_params: int, repeats: int) -> float:
    """Return how often per second plain numpy does `acc += scale * q` on int8 blocks with no check at all."""
    blocks = -(-num_params // BLOCK)
    rng = np.random.default_rng(0)
    q = rng.integers(-127, 128, (blocks, BLOCK), np.int8)
    scale = rng.random((blocks, 1), np.float32)
    total = np.zeros((blocks, BLOCK), np.float32)
    scratch = np.empty((_SLAB, BLOCK), np.float32)

    def once() -> None:
        for start in range(0, blocks, _SLAB):
            rows = total[start : start + _SLAB]
            product = scratch[: len(rows)]
            np.multiply(q[start : start + _SLAB], scale[start : start + _SLAB], out=product)
            np.add(rows, product, out=rows)

    return 1.0 / _median_s(once, repeats, num_params)


def bare_float32_rate(num_params: int, repeats: int) -> float:
    """Return how often per second plain numpy adds `w * x` in float32, in cache-sized pieces."""
    x, total = np.ones(num_params, np.float32), np.zeros(num_params, np.float32)
    step = _SLAB * BLOCK
    scratch = np.empty(step, np.float32)

    def once() -> None:
        for start in range(0, num_params, step):
            block = total[start : start + step]
            product = scratch[: block.size]
            np.multiply(x[start : start + step], np.float32(0.5), out=product)
            np.add(block, product, out=block)

    return 1.0 / _median_s(once, repeats, num_params)


def _median_s(once: Callable[[], None], repeats: int, num_params: int) -> float:
    """Return the median over `repeats` of the mean over enough calls to last about a tenth of a second."""
    calls = max(3, 50_000_000 // num_params)
    once()
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        for _ in range(calls):
            once()
        times.append((time.perf_counter() - started) / calls)
    return statistics.median(times)
