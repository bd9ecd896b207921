"""When a client is there, and which of its trips are lost.

    always                        the default
    diurnal(hours=8, spread=24)   so many hours of every day, from a time of day that is the client's own
    churn(on=0.8, period_min=30)  time is cut into slots; the client is there in a share `on` of them, at random
    diurnal(8) & churn(0.5)       when all of them say so

All are pure functions of the seed, the client and the time. A day and a slot begin at whole seconds: their borders are
then exact floats, and the time `next_available` returns is one at which the client is there.
"""

import math
from collections.abc import Sequence
from typing import Protocol

from ops.simulation.draws import stream, uniform
from shared.choices import Choice, Number, Table, parse

AVAILABILITY: Table = {
    "always": {},
    "diurnal": {"hours": Number(8, 0, 24, above=True), "spread": Number(24, 0, 24)},
    "churn": {"on": Number(0.8, 0.001, 1), "period_min": Number(30, 1 / 60, 1e6)},
}
HOUR_S, DAY_S = 3600.0, 86400.0


class _Pattern(Protocol):
    """One term of the grammar."""

    def next(self, client: int, time_s: float) -> float:
        """Return the first time at or after `time_s` the client is there: `time_s` itself if it is."""
        ...


class Availability:
    """Whether clients are there.

    Args:
        spec: as above.
        dropout: probability that a trip is lost in mid-training, in [0, 1).
        clients: how many, >= 1.
        seed: of everything random.

    Raises:
        ValueError: no such pattern, one given twice, or a number out of range.
    """

    def __init__(self, spec: str, dropout: float, clients: int, seed: int) -> None:
        if clients < 1 or not 0 <= dropout < 1:
            raise ValueError(f"{clients} clients with a dropout of {dropout}: one is needed, dropout in [0, 1)")
        self._patterns = [
            _pattern(choice, clients, seed) for choice in parse_availability(spec) if choice.name != "always"
        ]
        self._dropout = dropout
        self._drops = [stream(seed, "dropout", client) for client in range(clients)]

    def available(self, client: int, time_s: float) -> bool:
        """Whether a client is there.

        Args:
            client: in [0, clients).
            time_s: seconds since the start, >= 0.
        """
        return all(pattern.next(client, time_s) == time_s for pattern in self._patterns)

    def next_available(self, client: int, time_s: float) -> float:
        """Return the first time >= `time_s` a client is there, seconds; `time_s` itself if it is."""
        while True:  # each pattern moves to its own first time, so the last to be reached is the first of all
            later = time_s
            for pattern in self._patterns:
                later = pattern.next(client, later)
            if later == time_s:
                return time_s
            time_s = later

    def drops(self, client: int, trip: int) -> float | None:
        """Return after which part of a trip, in (0, 1), it is lost; None: it is not."""
        draw = uniform(self._drops[client], trip)
        return draw / self._dropout if draw < self._dropout else None


def parse_availability(spec: str) -> tuple[Choice, ...]:
    """Read patterns joined by `&`.

    Raises:
        ValueError: no such pattern, one given twice, or a number out of range.
    """
    choices = tuple(parse(part, AVAILABILITY) for part in spec.split("&"))
    names = [choice.name for choice in choices]
    if len(set(names)) < len(names):
        raise ValueError(f"{spec}: each pattern may be given once")
    return choices


def _pattern(choice: Choice, clients: int, seed: int) -> _Pattern:
    if choice.name == "diurnal":
        wide_s = choice["spread"] * HOUR_S
        starts = [_whole(wide_s * uniform(stream(seed, "diurnal", client), 0)) for client in range(clients)]
        return _Diurnal(choice["hours"] * HOUR_S, starts)
    keys = [stream(seed, "churn", client) for client in range(clients)]
    return _Churn(choice["on"], max(1.0, _whole(choice["period_min"] * 60)), keys)


class _Diurnal:
    """There from `starts[client]` for `on_s` seconds of every day."""

    def __init__(self, on_s: float, starts: Sequence[float]) -> None:
        self._on_s, self._starts = on_s, starts

    def next(self, client: int, time_s: float) -> float:
        """Return the first time at or after `time_s` the client is there."""
        start = self._starts[client]
        day, second = divmod(time_s - start, DAY_S)
        return time_s if second < self._on_s else start + (day + 1) * DAY_S


class _Churn:
    """There in the slots whose draw is below `on`; a client's slots begin at a second of its own."""

    def __init__(self, on: float, slot_s: float, keys: Sequence[int]) -> None:
        self._on, self._slot_s, self._keys = on, slot_s, keys
        self._starts = [_whole(slot_s * uniform(key, -2)) for key in keys]  # -1 is the slot in which time begins

    def next(self, client: int, time_s: float) -> float:
        """Return the first time at or after `time_s` the client is there."""
        key, start = self._keys[client], self._starts[client]
        slot = now = int((time_s - start) // self._slot_s)
        while uniform(key, slot) >= self._on:  # 1 / on slots on average
            slot += 1
        return time_s if slot == now else start + slot * self._slot_s


def _whole(seconds: float) -> float:
    return float(math.floor(seconds))
