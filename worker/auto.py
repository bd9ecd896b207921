"""`auto`: choose a codec by measuring this worker's own first updates.

The first updates travel as `safe` while each preset is tried on them. Then the smallest wins that
- leaves at most NMSE_MAX of an update to error feedback: what is left takes about 1 / (1 - NMSE) updates to arrive, and
  a worker that sends little of each update trains on a residual that grows stale;
- costs at most TIME_SHARE_MAX of the time the training took.
The message names the codec, so workers of one job may choose differently.
"""

import logging
import statistics
from collections import defaultdict

from shared.compression import PRESETS, Codec, parse
from shared.compression.measure import Measurement, measure
from shared.layout import Layout
from shared.vector import Vector

log = logging.getLogger("fedmq.worker")

UPDATES = 3  # measured before the choice
FIRST = "safe"  # what they travel as, and what is taken when nothing smaller serves
CANDIDATES = ("balanced", "tiny")
NMSE_MAX = 0.75
TIME_SHARE_MAX = 0.1


class AutoCodec:
    """One worker's choice; measured anew after a restart."""

    def __init__(self) -> None:
        self._seen: defaultdict[str, list[Measurement]] = defaultdict(list)
        self._train_s: list[float] = []
        self._chosen: Codec | None = None

    def codec(self, delta: Vector, layout: Layout, train_seconds: float, seed: int) -> Codec:
        """Return the codec for this update.

        Args:
            delta: float32 [n], what was just trained.
            layout: of it.
            train_seconds: how long that took.
            seed: of the measurement's randomness.
        """
        if self._chosen is not None:
            return self._chosen
        for name in CANDIDATES:
            self._seen[name].append(measure(parse(PRESETS[name].pipeline), delta, layout, seed, draws=1))
        self._train_s.append(train_seconds)
        if len(self._train_s) == UPDATES:
            name = choose(self._seen, statistics.median(self._train_s))
            self._chosen = parse(name)
            log.info("codec auto: %s (%s), after %d updates", name, self._chosen.name, UPDATES)
        return parse(FIRST)


def choose(seen: dict[str, list[Measurement]], train_s: float) -> str:
    """Return the preset of the smallest updates among those that serve, else `safe`.

    Args:
        seen: preset -> what was measured.
        train_s: seconds of a training.
    """

    def serves(measured: list[Measurement]) -> bool:
        seconds = statistics.median(m.encode_s for m in measured)
        return statistics.mean(m.nmse for m in measured) <= NMSE_MAX and seconds <= TIME_SHARE_MAX * train_s

    fitting = {name: statistics.mean(m.payload_bytes for m in seen[name]) for name in seen if serves(seen[name])}
    return min(fitting, key=lambda name: fitting[name], default=FIRST)
