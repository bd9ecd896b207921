"""How long bytes travel between a client and the servers."""

import math

from ops.simulation.draws import normal_quantile, stream, uniform

BITS_PER_MEGABIT = 1e6


class Network:
    """A line for each client, of a rate that stays its own.

        seconds = latency + 8 bytes / (rate e^(spread z_i)),   z_i ~ N(0, 1), the same up and down

    Args:
        down_mbps: median megabits a second from the servers, >= 0; 0: bytes take no time.
        up_mbps: the same towards them.
        latency_ms: of every transfer, milliseconds, >= 0.
        spread: sigma >= 0 of the rates' logarithm over the clients; 0.5 puts two thirds within 0.6 to 1.6 times the
            median.
        clients: how many, >= 1.
        seed: of the rates.

    Raises:
        ValueError: a number out of range.
    """

    def __init__(
        self, down_mbps: float, up_mbps: float, latency_ms: float, spread: float, clients: int, seed: int
    ) -> None:
        for name, value in (("down_mbps", down_mbps), ("up_mbps", up_mbps), ("latency_ms", latency_ms)):
            if not 0 <= value < math.inf:
                raise ValueError(f"{name} is {value}, must be a number >= 0")
        if clients < 1 or not 0 <= spread <= 5:
            raise ValueError(f"{clients} clients with a spread of {spread}: at least one is needed, spread in [0, 5]")
        factors = [
            math.exp(spread * normal_quantile(uniform(stream(seed, "network", client), 0))) for client in range(clients)
        ]
        self._latency_s = latency_ms / 1000
        self._down = [_seconds_per_byte(down_mbps * factor) for factor in factors]
        self._up = [_seconds_per_byte(up_mbps * factor) for factor in factors]

    def down_seconds(self, client: int, size_bytes: int) -> float:
        """Return how long a client takes to fetch so many bytes."""
        return self._latency_s + size_bytes * self._down[client]

    def up_seconds(self, client: int, size_bytes: int) -> float:
        """Return how long a client takes to send so many bytes."""
        return self._latency_s + size_bytes * self._up[client]


def _seconds_per_byte(mbps: float) -> float:
    return 8 / (mbps * BITS_PER_MEGABIT) if mbps else 0.0
