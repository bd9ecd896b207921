"""The oracle: what the model must be, from the ledger and the updates as they were made, in float64.

Nothing is incremental that need not be, nothing is shared with the aggregator: a rule is written down here as its paper
has it. The oracle knows nothing of commits, redeliveries or floats of 32 bits.
"""

import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np

from ops.torture.history import Exact, History, Made, Violation
from ops.torture.ledger import Ledger

TOLERANCE = 1e-4  # float32 against float64 over some dozen versions; adam divides by small numbers

STALENESS: dict[str, Callable[[int], float]] = {
    "constant": lambda tau: 1.0,
    "polynomial(0.5)": lambda tau: 1.0 / math.sqrt(1.0 + tau),
    "hinge(10,1)": lambda tau: 1.0 if tau <= 1 else 1.0 / (10.0 * (tau - 1) + 1.0),
}


class Optimizer:
    """x <- what an optimizer makes of x, g, eta and the mean staleness weight w."""

    def __init__(self, text: str, num_params: int) -> None:
        self.name, _, rest = text.partition("(")
        self.numbers = [float(number) for number in re.findall(r"[0-9.]+", rest)]
        self.m, self.v = np.zeros(num_params), np.zeros(num_params)
        if self.name == "adam":
            self.v += self.numbers[2] ** 2

    def step(self, x: Exact, g: Exact, eta: float, w: float) -> Exact:
        """Return the next x."""
        if self.name == "momentum":
            w = min(w, 1.0)
            beta = self.numbers[0] + (1 - self.numbers[0]) * (1 - w)  # FLSim: a stale buffer moves m less
            self.m = beta * self.m + (1 - beta) * (g / w if w else np.zeros_like(g))
            return x + eta * w * self.m
        if self.name == "adam":
            beta1, beta2, epsilon = self.numbers
            self.m = beta1 * self.m + (1 - beta1) * g
            self.v = beta2 * self.v + (1 - beta2) * g * g
            return x + eta * self.m / (np.sqrt(self.v) + epsilon)
        return x + eta * g


class Oracle:
    """The versions of a job, one by one.

    Args:
        start: the weights of version 0.
        settings: of the aggregator.
    """

    def __init__(self, start: Exact, settings: Any) -> None:
        self.versions = [start]
        self.settings = settings
        self._buffer: list[tuple[float, float, Exact]] = []  # mass, s(tau), delta
        self._latest: dict[str, Exact] = {}  # client -> its last delta, the longest unheard first
        self._before = np.zeros(start.size)  # ca2fl: sum of all caches as of before the buffer
        self._optimizer = Optimizer(settings.server_optimizer, start.size)
        self._weigh = STALENESS[settings.staleness if settings.rule in ("fedbuff", "fedasync") else "constant"]
        rules = {
            "fedbuff": self._mean,
            "fedavg": self._mean,
            "fedasync": self._mix,
            "ace": self._ace,
            "ca2fl": self._ca2fl,
        }
        self._apply = rules[settings.rule]

    def apply(self, made: Made) -> None:
        """Take one update in."""
        delta = made.decoded
        if self.settings.robust.startswith("norm("):
            limit = float(self.settings.robust[5:-1])
            delta = delta * min(1.0, limit / max(1e-300, float(np.linalg.norm(delta))))
        self._apply(made, delta, len(self.versions) - 1 - made.base_version)

    def open_sum(self) -> Exact:
        """Return what waits in the buffer."""
        return sum((mass * s * delta for mass, s, delta in self._buffer), np.zeros_like(self.versions[0]))

    def _mean(self, made: Made, delta: Exact, tau: int) -> None:
        """Mean: x <- x + eta * sum_i s(tau_i) n_i Delta_i / sum_i n_i, every K updates; n_i = 1 unless by samples."""
        self._buffer.append((made.num_samples if self.settings.weight_by_samples else 1, self._weigh(tau), delta))
        if len(self._buffer) == self.settings.buffer_size:
            divisor = sum(mass for mass, _, _ in self._buffer)
            w = sum(mass * s for mass, s, _ in self._buffer) / divisor
            self._step(self.open_sum() / divisor, w)

    def _mix(self, made: Made, delta: Exact, tau: int) -> None:
        """Mix: x <- (1 - a) x + a (x_base + Delta), a = alpha s(tau)."""
        a = self.settings.alpha * self._weigh(tau)
        self.versions.append((1 - a) * self.versions[-1] + a * (self.versions[made.base_version] + delta))

    def _ace(self, made: Made, delta: Exact, tau: int) -> None:
        """Mean of all: x <- x + eta (1/n) sum_i U_i, U_i what client i sent last; every update a version."""
        self._remember(made, delta)
        self._step(sum(self._latest.values(), np.zeros_like(delta)) / self.settings.clients, 1.0)

    def _ca2fl(self, made: Made, delta: Exact, tau: int) -> None:
        """Calibrated mean: v = hbar + (1/K) sum_i (Delta_i - h_i), hbar the mean of all caches before the buffer."""
        known = self._latest.get(made.client, np.zeros_like(delta))
        self._remember(made, delta)
        self._buffer.append((1.0, 1.0, delta - known))
        if len(self._buffer) == self.settings.buffer_size:
            mean = self.open_sum() / len(self._buffer)
            self._step(self._before / self.settings.clients + mean, 1.0)
            self._before = sum(self._latest.values(), np.zeros_like(delta))

    def _remember(self, made: Made, delta: Exact) -> None:
        self._latest[made.client] = delta  # there are never more clients than `clients`

    def _step(self, g: Exact, w: float) -> None:
        self.versions.append(self._optimizer.step(self.versions[-1], g, self.settings.server_lr, w))
        self._buffer.clear()


def check(oracle: Oracle, history: History, ledger: Ledger, header_bytes: int) -> None:
    """Replay the ledger and compare every version anybody saw.

    Args:
        oracle: at version 0.
        history: what was seen.
        ledger: what the store says became of every update.
        header_bytes: of a model's file, before the weights.

    Raises:
        Violation: a version is not what its updates come to, or came at another time.
    """
    for commit in ledger.commits:
        for entry in commit["updates"]:
            if entry["outcome"] == "applied":
                if entry["version"] != len(oracle.versions) - 1:
                    raise Violation(
                        "oracle", f"{entry['id']} met version {entry['version']}, by the ledger's order it is "
                        f"{len(oracle.versions) - 1}",
                    )  # fmt: skip
                oracle.apply(history.made[entry["id"]])
        if commit["version"] != len(oracle.versions) - 1:
            raise Violation(
                "oracle", f"revision {commit['revision']} is version {commit['version']}, its updates make "
                f"{len(oracle.versions) - 1}",
            )  # fmt: skip
    num_params = oracle.versions[0].size
    for version, data in history.models.items():
        found = np.frombuffer(data, "<f4", num_params, header_bytes).astype(np.float64)
        off = np.abs(found - oracle.versions[version])
        limit = TOLERANCE * (1.0 + np.abs(oracle.versions[version]))
        if not (off <= limit).all():
            raise Violation("oracle", f"version {version} is off by {off.max():.4g} from what the ledger comes to")
