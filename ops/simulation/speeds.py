"""How many seconds a client's trip takes: its training, from the model it pulled to the update it publishes.

`persistent`: a client has a mean of its own, drawn once, and its trips vary around it. `per_trip`: every trip is drawn
anew, so no client is slow for long; FedBuff and QAFeL are published so, and it hides what a slow client's rare data
suffer.

Source: half-normal and i.i.d., Nguyen et al., arXiv:2106.06639; log-normal and persistent, AREA, arXiv:2405.10123;
three classes of speed, FADAS, Wang et al., arXiv:2407.18365, section 6.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ops.simulation.draws import normal_quantile, stream, uniform
from shared.choices import Choice, Number, Table, parse, usage

_SECONDS = Number(1.0, above=True)
SPEEDS: Table = {
    "constant": {"seconds": _SECONDS},
    "half_normal": {"scale": _SECONDS},
    "exponential": {"mean": _SECONDS},
    "lognormal": {"mean": _SECONDS, "sigma": Number(0.6, 0, 5)},
    "uniform": {"low": Number(None, above=True), "high": Number(None, above=True)},
    "classes": {"slow_low": Number(5.0, above=True), "slow_high": Number(8.0, above=True)},
}
TRACE = "trace:"
FAST, MIDDLE = (1.0, 2.0), (3.0, 5.0)  # seconds, of FADAS' first two classes; the third is a parameter
CLASS_SHARES = (3.0, 2.0, 1.0)  # of the Dirichlet distribution their shares are drawn from
TRIP_MIN = 0.1  # shortest trip, of its client's mean
MEAN_MIN = 0.01  # smallest mean of a client, of the distribution's: one client must not make all the trips

Quantile = Callable[[float], float]


@dataclass(frozen=True, slots=True)
class _Duration:
    """A distribution: its inverse cumulative distribution function on (0, 1), and its mean, both in seconds."""

    quantile: Quantile
    mean: float


class Speeds:
    """Seconds per trip, pure functions of the seed, the client and the trip.

    Args:
        spec: a distribution of `SPEEDS`, or `trace:FILE` with lines `seconds` or `client,seconds`, perhaps under a
            heading. With a column of clients, client i draws its trips from the lines of the file's i-th one (counted
            round and round), and is as persistent as that one was whatever `persistent` says.
        persistent: whether a client has a mean of its own. Of `classes` its class is its own either way, and
            otherwise a trip is drawn from within the class, as in FADAS.
        clients: how many, >= 1.
        seed: of all draws. A client's draws do not depend on how many others there are (except by `slowest_first`).
        spread: standard deviation of a trip around its client's mean, relative, >= 0; only of `persistent`. A trip
            takes at least a tenth of the mean, so a spread above 0.4 makes the average longer than the mean.
        slowest_first: the clients that get the slowest draws, the slowest first; those not named share the rest.

    Raises:
        ValueError: no such distribution, a wrong number or file, or nothing persistent that could be put in order.
    """

    def __init__(
        self,
        spec: str,
        persistent: bool,
        clients: int,
        seed: int,
        spread: float = 0.1,
        slowest_first: Sequence[int] | None = None,
    ) -> None:
        if clients < 1 or not 0 <= spread <= 10:
            raise ValueError(f"{clients} clients with a spread of {spread}: at least one is needed, spread in [0, 10]")
        sources, source_of, owned = _sources(spec.strip(), clients, seed)
        self._trips = [stream(seed, "trip", client) for client in range(clients)]
        self._durations = [sources[source] for source in source_of]
        self._spread = spread if persistent and not owned else None
        means = [duration.mean for duration in self._durations]
        if self._spread is not None:
            means = [
                max(duration.quantile(uniform(stream(seed, "mean", client), 0)), MEAN_MIN * duration.mean)
                for client, duration in enumerate(self._durations)
            ]
        if slowest_first is not None and len(slowest_first):
            if self._spread is None and len(sources) == 1:
                raise ValueError(f"{spec}: clients can be ordered by speed only where speeds are persistent")
            order = _slowest_first(means, slowest_first)
            means = [means[donor] for donor in order]
            self._durations = [self._durations[donor] for donor in order]
        self._means = means

    def seconds(self, client: int, trip: int) -> float:
        """Return how long a trip takes, > 0.

        Args:
            client: in [0, clients).
            trip: which of its trips, >= 0.
        """
        draw = uniform(self._trips[client], trip)
        if self._spread is None:
            return self._durations[client].quantile(draw)
        return self._means[client] * max(TRIP_MIN, 1.0 + self._spread * normal_quantile(draw))

    def means(self) -> npt.NDArray[np.float64]:
        """Return the expected seconds of every client's trips, [clients]; the floor of a trip left out."""
        return np.array(self._means)


def _sources(spec: str, clients: int, seed: int) -> tuple[list[_Duration], list[int], bool]:
    """Return the distributions, which of them is each client's, and whether it is that of one client's own trips."""
    if spec.startswith(TRACE):
        durations, owned = _trace(Path(spec.removeprefix(TRACE).strip()).expanduser())
        return durations, [client % len(durations) for client in range(clients)], owned
    try:
        choice = parse(spec, SPEEDS)
    except ValueError as error:
        raise ValueError(f"{spec}: {error}, or {TRACE}FILE") from error
    if choice.name == "classes":
        durations = [_uniform(*FAST), _uniform(*MIDDLE), _uniform(choice["slow_low"], choice["slow_high"])]
        up_to = np.cumsum(np.random.default_rng(seed).dirichlet(CLASS_SHARES))[:2]
        draws = [uniform(stream(seed, "class", client), 0) for client in range(clients)]
        return durations, [int(np.searchsorted(up_to, draw, side="right")) for draw in draws], False
    return [_duration(choice)], [0] * clients, False


def _duration(choice: Choice) -> _Duration:
    match choice.name:
        case "constant":
            return _uniform(choice["seconds"], choice["seconds"])
        case "half_normal":
            scale = choice["scale"]
            return _Duration(lambda p: scale * normal_quantile(0.5 + p / 2), scale * math.sqrt(2 / math.pi))
        case "exponential":
            mean = choice["mean"]
            return _Duration(lambda p: -mean * math.log1p(-p), mean)
        case "lognormal":
            mean, sigma = choice["mean"], choice["sigma"]
            median = mean * math.exp(-sigma * sigma / 2)
            return _Duration(lambda p: median * math.exp(sigma * normal_quantile(p)), mean)
        case "uniform":
            return _uniform(choice["low"], choice["high"])
    raise ValueError(f"{choice.name} is not one of {', '.join(usage(name, SPEEDS) for name in SPEEDS)}")


def _uniform(low: float, high: float) -> _Duration:
    if low > high:
        raise ValueError(f"{low:g} to {high:g} seconds: the first must not be the larger")
    return _Duration(lambda p: low + p * (high - low), (low + high) / 2)


def _trace(path: Path) -> tuple[list[_Duration], bool]:
    """Read a trace; return a distribution for each of its clients, and whether it has a column of them."""
    try:
        lines = [line.strip() for line in path.read_text().splitlines() if line.strip()]
    except OSError as error:
        raise ValueError(f"cannot read the trace {path}: {error.strerror}") from error
    rows: dict[str, list[float]] = {}
    owned = bool(lines) and "," in lines[0]
    for number, line in enumerate(lines):
        client, comma, seconds = line.rpartition(",")
        value = _seconds(seconds)
        if value is None and number == 0:
            continue  # the heading
        if value is None or bool(comma) != owned or not 0 < value < math.inf:
            raise ValueError(f"{path}, line {number + 1}: {line!r} is not {'client,' if owned else ''}seconds above 0")
        rows.setdefault(client.strip(), []).append(value)
    if not rows:
        raise ValueError(f"the trace {path} has no line with seconds")
    return [_Duration(partial(_pick, values), sum(values) / len(values)) for values in rows.values()], owned


def _seconds(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _pick(values: list[float], p: float) -> float:
    return values[int(p * len(values))]


def _slowest_first(means: list[float], named: Sequence[int]) -> list[int]:
    """Return whose draw each client gets: `named` the slowest in that order, the others the rest as it was drawn."""
    clients = len(means)
    if len(set(named)) != len(named) or not all(0 <= client < clients for client in named):
        raise ValueError(f"the slowest first: {len(named)} clients must be different ones of 0 to {clients - 1}")
    by_slowness = sorted(range(clients), key=lambda client: -means[client])
    slow = by_slowness[: len(named)]
    left = iter(sorted(by_slowness[len(named) :]))
    taken = dict(zip(named, slow, strict=True))
    return [taken[client] if client in taken else next(left) for client in range(clients)]
