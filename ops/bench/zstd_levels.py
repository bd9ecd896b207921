"""What zstd makes of packed symbols: our two settings (`shared/compression/entropy.py`) beside its own levels."""

from dataclasses import dataclass, replace

import numpy as np
import zstandard

from ops.bench.measuring import SEED, median_s
from ops.bench.recorded import Delta
from shared.compression import parse
from shared.compression.entropy import compress

CODECS = ("int4", "nf4", "uniform(step=1) | pack", "uniform(step=2) | pack", "uniform(step=4) | pack", "ternary")
LEVELS = (1, 3, 9)


@dataclass(frozen=True, slots=True)
class LevelRow:
    """One payload.

    Attributes:
        codec: whose.
        sizes: bits per parameter: plain, ours, then by level.
        rates: MB of payload per second, ours, then by level.
    """

    codec: str
    sizes: tuple[float, ...]
    rates: tuple[float, ...]


def rows(delta: Delta, repeats: int) -> list[LevelRow]:
    """Compress the payloads of some codecs."""
    found = []
    for name in CODECS:
        codec = replace(parse(name), zstd=False)
        plain = codec.encode(delta.values, delta.layout, np.random.default_rng(SEED)).payload
        ours = len(parse(f"{name} | zstd").encode(delta.values, delta.layout, np.random.default_rng(SEED)).payload)
        compressors = [zstandard.ZstdCompressor(level=level) for level in LEVELS]
        sizes = [len(plain), ours, *(len(c.compress(plain)) for c in compressors)]
        seconds = [median_s(lambda p=plain: compress([p]), repeats)]  # type: ignore[misc]
        seconds += [median_s(lambda c=c, p=plain: c.compress(p), repeats) for c in compressors]  # type: ignore[misc]
        found.append(LevelRow(
            name, tuple(8 * size / delta.values.size for size in sizes), tuple(len(plain) / 1e6 / s for s in seconds),
        ))  # fmt: skip
    return found
