"""Norms of applied deltas for the metrics: of all where that is cheap, else of as many as cost nothing to speak of."""

import math
import time

from shared.compression import Decoded

SHARE_MAX = 0.01  # of the time that passes
CREDIT_S_MAX = 0.05  # so much can be saved up in quiet times


class NormSample:
    """Measures a delta whenever the time spent so far allows it; which ones are measured changes no result."""

    def __init__(self) -> None:
        self._credit_s, self._looked_s = CREDIT_S_MAX, time.perf_counter()

    def of(self, delta: Decoded) -> list[float]:
        """Return the L2 norm of a delta that was just applied, or nothing."""
        now_s = time.perf_counter()
        self._credit_s = min(CREDIT_S_MAX, self._credit_s + SHARE_MAX * (now_s - self._looked_s))
        self._looked_s = now_s
        if self._credit_s < 0:
            return []
        squared = delta.squared_norm()
        self._credit_s -= time.perf_counter() - now_s
        return [math.sqrt(squared)]
