"""`auto`: choose a codec by measuring this worker's own first updates.

The first updates travel as `safe` while every preset of CHOICES is tried on them. A candidate serves if, at the median
of these updates, it
- makes at most SIZE_SHARE_MAX of the bytes of `safe`: less is not worth a residual on the device's disk (on a model of
  small tensors alone, all presets send the same float16);
- leaves at most NMSE_MAX of an update to error feedback: what is left takes about 1 / (1 - NMSE) updates to arrive, and
  a worker that sends little of each update trains on a residual that grows stale;
- costs at most TIME_SHARE_MAX of the time the training took, beyond TIME_FREE_S: no worker notices less, for its
  confirmed publish takes longer.
The smallest that serves wins, else `safe` stays. The message names the codec, so workers of one job may choose
differently.
"""

import logging
import statistics
from collections.abc import Iterable, Mapping, Sequence

from shared.compression import Codec, parse
from shared.compression.measure import Measurement, measure
from shared.errors import RejectedUpdate
from shared.layout import Layout
from shared.vector import Vector

log = logging.getLogger("fedmq.worker")

UPDATES = 3  # measured before the choice
FIRST = "safe"  # what they travel as, and what stays when nothing smaller serves
CANDIDATES = ("balanced", "tiny")
CHOICES = (FIRST, *CANDIDATES)
SIZE_SHARE_MAX = 0.7
NMSE_MAX = 0.75
TIME_SHARE_MAX = 0.1
TIME_FREE_S = 0.005


class AutoCodec:
    """One worker's choice; measured anew after a restart."""

    def __init__(self) -> None:
        self._seen: dict[str, list[Measurement]] = {name: [] for name in CHOICES}
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
        for name, measured in self._seen.items():
            try:
                measured.append(measure(parse(name), delta, layout, seed, draws=1))
            except RejectedUpdate as error:  # nobody could decode it: a codec that fails once does not serve
                log.warning("codec auto: %s does not serve this worker: %s", name, error)
        self._train_s.append(train_seconds)
        if len(self._train_s) == UPDATES:
            name = choose(self._seen, self._train_s)
            self._chosen = parse(name)
            log.info("codec auto: %s (%s), after %d updates", name, self._chosen.name, UPDATES)
        return parse(FIRST)


def choose(seen: Mapping[str, Sequence[Measurement]], train_s: Sequence[float]) -> str:
    """Return the preset of the smallest updates among those that serve, else `safe`.

    Medians, so that one odd update or one pause of the machine decides nothing.

    Args:
        seen: preset -> what was measured, one for each update; fewer where it could not be decoded.
        train_s: seconds of each training.
    """
    sizes = {
        name: statistics.median(m.payload_bytes for m in measured)
        for name, measured in seen.items()
        if len(measured) == len(train_s)
    }
    if FIRST not in sizes:
        return FIRST

    def serves(name: str) -> bool:
        return (
            sizes[name] <= SIZE_SHARE_MAX * sizes[FIRST]
            and statistics.median(m.nmse for m in seen[name]) <= NMSE_MAX
            and time_share(seen[name], train_s) <= TIME_SHARE_MAX
        )

    return min((name for name in sizes if serves(name)), key=lambda name: sizes[name], default=FIRST)


def time_share(measured: Iterable[Measurement], train_s: Iterable[float]) -> float:
    """Return the median share of its training's time that a codec costs a worker beyond TIME_FREE_S.

    Decoding counts: error feedback decodes what it sends. Negative when all is free.

    Args:
        measured: one for each update.
        train_s: seconds of each training.
    """
    pairs = zip(measured, train_s, strict=True)
    return statistics.median((m.encode_s + m.decode_s - TIME_FREE_S) / max(seconds, 1e-9) for m, seconds in pairs)
