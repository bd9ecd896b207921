"""A limit on bytes per second, for a device whose network is not its own."""

import math
import threading

from shared.clock import Clock

PIECE_S = 1.0  # a download is read in pieces worth so many seconds ...
PIECE_BYTES = (2**10, 2**20)  # ... within these bounds
PART_S = 2.0  # an update travels in parts worth so many seconds ...
PART_BYTES_MIN = 2**12  # ... but none so small that it is all envelope


class Pace:
    """A token bucket that is one piece deep: nothing is saved up while nothing is sent.

        s_i = max(a_i, s_{i-1} + n_{i-1} / rate)

    A piece of n_i bytes that is asked for at a_i may begin at s_i. So at most rate T bytes and one piece begin in any T
    seconds. Used by one thread.

    Args:
        rate: bytes per second; 0: no limit.
        clock: time.

    Attributes:
        stop: ends every waiting.
    """

    def __init__(self, rate: int, clock: Clock, stop: threading.Event | None = None) -> None:
        self.rate, self.stop = rate, stop or threading.Event()
        self._clock = clock
        self._free_at = -math.inf  # monotonic: when all that was taken is paid for

    @property
    def piece_bytes(self) -> int:
        """How much of a download to ask for at once."""
        least, most = PIECE_BYTES
        return min(most, max(least, int(self.rate * PIECE_S))) if self.rate else most

    def part_bytes(self, whole: int) -> int:
        """Return how much payload a message should carry, given the job's `part_bytes`."""
        return min(whole, max(PART_BYTES_MIN, int(self.rate * PART_S))) if self.rate else whole

    def take(self, size_bytes: int, timeout_s: float = math.inf) -> bool:
        """Wait until so many bytes may be transferred; False when the time is over, or `stop` set, before.

        Args:
            size_bytes: of the next piece.
            timeout_s: wait no longer.
        """
        if not self.rate:
            return True
        wait_s = self._free_at - self._clock.monotonic()
        if wait_s > 0:
            self._clock.wait(self.stop, max(0.0, min(wait_s, timeout_s)))
        if wait_s > timeout_s or self.stop.is_set():
            return False
        self._free_at = max(self._free_at, self._clock.monotonic()) + size_bytes / self.rate
        return True
