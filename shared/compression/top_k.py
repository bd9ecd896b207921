"""topk(p): the share p of elements with the largest magnitude, their positions Rice-coded.

A contraction with delta >= p. Exact: of a large body only a sample is looked at for a threshold that somewhat more than
k elements exceed; the k largest are among those, and are found by partition of these few (about a tenth of the time of
partitioning everything). Zeros are never chosen, so a sparse delta sends fewer than k.

Source: Aji and Heafield, arXiv:1704.05021; sampled threshold: Lin et al., DGC, arXiv:1712.01887, section 3.1.
"""

from dataclasses import dataclass

import numpy as np

from shared.compression.codec import Params
from shared.compression.indices import decode_indices, encode_indices, indices_bytes_max
from shared.compression.quantizer import read_count
from shared.compression.selection import Selected, share_of
from shared.compression.tensors import SLAB, Indices, Values
from shared.vector import Vector

LARGE = 1 << 17  # bodies with more elements are sampled
SAMPLES = (256, 128)  # stretches, and elements in each
EXTRA = 1.3  # how many times k elements the threshold is to let through
MISSES_MAX = 3  # thresholds tried before everything is partitioned


@dataclass(frozen=True, slots=True)
class TopK:
    """The largest elements.

    Attributes:
        share: p in (0, 0.25]; k = ceil(p * n).
    """

    share: float
    unbiased: bool = False
    contraction: bool = True

    @property
    def name(self) -> str:
        """Its stage in the codec's string."""
        return f"topk({self.share:g})"

    def count_max(self, size: int) -> int:
        """Return k."""
        return share_of(self.share, size)

    def section_bytes_max(self, size: int) -> int:
        """Return the bound of the positions' code."""
        return indices_bytes_max(self.count_max(size), size)

    def select(self, body: Values, rng: np.random.Generator) -> Selected:
        """Choose the k largest."""
        k = self.count_max(body.size)
        threshold = _sampled_threshold(body, self.share, rng) if body.size > LARGE else np.float32(0)
        for _ in range(MISSES_MAX):
            indices, values = _beyond(body, threshold)
            if indices.size >= k or threshold == 0:
                break
            threshold *= np.float32(0.7)
        else:
            indices, values = _beyond(body, np.float32(0))
        if indices.size > k:
            chosen = np.sort(np.argpartition(np.abs(values), indices.size - k)[indices.size - k :])
            indices, values = indices[chosen], values[chosen]
        return Selected(indices, values, encode_indices(indices, body.size), {"kept": int(indices.size)})

    def locate(self, section: memoryview, params: Params, size: int) -> Indices:
        """Read `kept` positions."""
        return decode_indices(section, read_count(self.name, params, "kept", self.count_max(size)), size)


def _sampled_threshold(body: Values, share: float, rng: np.random.Generator) -> np.float32:
    """Return a magnitude that about EXTRA * share of the elements exceed; 0 when the sample cannot tell."""
    stretches, length = SAMPLES
    starts = np.sort(rng.integers(0, body.size - length, stretches)).tolist()
    out = np.empty(length, np.float32)
    sample = np.concatenate([np.abs(body.runs.read(body.vector, s, s + length, out)) for s in starts])
    rank = int(EXTRA * share * sample.size) + 4
    if rank >= sample.size:
        return np.float32(0)
    return np.float32(np.partition(sample, sample.size - rank)[sample.size - rank])


def _beyond(body: Values, threshold: np.float32) -> tuple[Indices, Vector]:
    """Return positions and values of the elements with a larger magnitude."""
    indices: list[Indices] = []
    values: list[Vector] = []
    scratch = np.empty(min(SLAB, body.size), np.float32)
    for start, x in body.slabs():
        at = np.flatnonzero(np.abs(x, out=scratch[: x.size]) > threshold)
        values.append(x[at])
        indices.append(at + start)
    return np.concatenate(indices), np.concatenate(values)
