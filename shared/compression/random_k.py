"""randomk(p): one random element of each of k = ceil(p n) equal stretches, multiplied by the stretch's length.

Unbiased, with variance (1 / p - 1) ||x||^2 or less; positions cost nothing: the decoder draws them again from the
parameter `draw` (the raw 32-bit halves of PCG64 seeded with it, whose stream is fixed). Not for use inside error
feedback: it is no contraction.

Source: Konecny et al., arXiv:1610.05492 (random mask); Stich et al., arXiv:1809.07599 (variance).
"""

from dataclasses import dataclass

import numpy as np

from shared.compression.codec import Params
from shared.compression.quantizer import SEED_MAX, exactly, read_count
from shared.compression.selection import Selected, share_of
from shared.compression.tensors import Indices, Values


@dataclass(frozen=True, slots=True)
class RandomK:
    """A random share.

    Attributes:
        share: p in (0, 0.25].
    """

    share: float
    unbiased: bool = True
    contraction: bool = False

    @property
    def name(self) -> str:
        """Its stage in the codec's string."""
        return f"randomk({self.share:g})"

    def count_max(self, size: int) -> int:
        """Return k."""
        return share_of(self.share, size)

    def section_bytes_max(self, size: int) -> int:
        """Positions are not written."""
        return 0

    def select(self, body: Values, rng: np.random.Generator) -> Selected:
        """Draw one element of each stretch."""
        seed = int(rng.integers(0, SEED_MAX, endpoint=True))
        starts = self._starts(body.size)
        indices = self._draw(seed, body.size)
        values = body.vector[body.runs.locate(indices)] * np.diff(starts).astype(np.float32)
        return Selected(indices, values, b"", {"draw": seed})

    def locate(self, section: memoryview, params: Params, size: int) -> Indices:
        """Draw them again."""
        exactly(self.name, section, 0)
        return self._draw(read_count(self.name, params, "draw", SEED_MAX), size)

    def _starts(self, size: int) -> Indices:
        k = self.count_max(size)
        starts: Indices = np.arange(k + 1, dtype=np.int64) * size // k
        return starts

    def _draw(self, seed: int, size: int) -> Indices:
        starts = self._starts(size)
        k = len(starts) - 1
        words = np.random.PCG64(seed).random_raw(-(-k // 2)).astype("<u8").view("<u4")[:k].astype(np.uint64)
        offsets = (words * np.diff(starts).astype(np.uint64)) >> np.uint64(32)
        return starts[:-1] + offsets.astype(np.int64)
