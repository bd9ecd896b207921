"""Every rule and every server optimizer as its paper has it, in float64: what the aggregator is compared with.

Nothing is incremental here: means are taken over what is remembered, not kept up to date by differences. An oracle
knows nothing of commits, redeliveries or floats of 32 bits; it is told each message once for each time it is sent.
"""

import re
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from shared.compression import decode
from shared.messages import Update
from tests.builders import NUM_PARAMS, model_of

STALENESS = {
    "constant": lambda tau: 1.0,
    "polynomial(0.5)": lambda tau: 1.0 / np.sqrt(1.0 + tau),
    "polynomial(2)": lambda tau: 1.0 / (1.0 + tau) ** 2,
    "hinge(10,1)": lambda tau: 1.0 if tau <= 1 else 1.0 / (10.0 * (tau - 1) + 1.0),
}


class RejectedError(Exception):
    """The rule cannot use it."""


def call(text, *defaults):
    """Read `name(1, 2)`, all by position: the name and its numbers, defaults behind those given."""
    match = re.fullmatch(r"(\w+)(?:\((.*)\))?", text)
    numbers = [float(part) for part in match[2].split(",")] if match[2] else []
    return match[1], [*numbers, *defaults[len(numbers) :]]


class Optimizer:
    """x <- what `text` makes of x, g, eta and the mean staleness weight w; one coordinate like the next."""

    def __init__(self, text, num_params=NUM_PARAMS):
        self.name = call(text)[0]
        self.m, self.v = np.zeros(num_params), np.zeros(num_params)
        match self.name:
            case "momentum":
                _, (self.beta1,) = call(text, 0.9)
            case "adagrad":
                _, (self.epsilon,) = call(text, 1e-3)
                self.v += self.epsilon**2
            case "adam" | "yogi":
                _, (self.beta1, self.beta2, self.epsilon) = call(text, 0.9, 0.99, 1e-3)
                self.v += self.epsilon**2

    def step(self, x, g, eta, w):
        if self.name == "sgd":
            return x + eta * g
        if self.name == "momentum":
            w = min(w, 1.0)
            beta = self.beta1 + (1 - self.beta1) * (1 - w)  # FLSim
            undamped = g / w if w else np.zeros_like(g)
            self.m = beta * self.m + (1 - beta) * undamped
            return x + (eta * w) * self.m
        square = g * g
        if self.name == "adagrad":
            self.m, self.v = g, self.v + square
        else:
            self.m = self.beta1 * self.m + (1 - self.beta1) * g
            if self.name == "adam":
                self.v = self.beta2 * self.v + (1 - self.beta2) * square
            else:
                self.v = self.v - (1 - self.beta2) * square * np.sign(self.v - square)
        return x + eta * self.m / (np.sqrt(self.v) + self.epsilon)

    def arrays(self):
        """What is to be found in the store, by name."""
        names = {"sgd": "", "momentum": "m", "adagrad": "v", "adam": "mv", "yogi": "mv"}[self.name]
        return {f"{self.name}_{key}": getattr(self, key) for key in names}


class Oracle:
    """The model versions so far, and what every update came to."""

    def __init__(self, start, **settings):
        self.settings = {"staleness": "constant", "server_optimizer": "sgd", "server_lr": 1.0} | settings
        self.versions = [start.astype(np.float64)]
        self.layout = model_of(start).layout
        self.outcomes = set()
        self.buffer = []
        self.optimizer = Optimizer(self.settings["server_optimizer"], start.size)
        self.name, self.numbers = call(self.settings["rule"])
        for key in ("buffer_size", "server_lr", "clients", "weight_by_samples", "alpha", "robust"):
            setattr(self, key, self.settings.get(key, 0))

    def receive(self, update):
        """Take a message as it is sent."""
        tau = len(self.versions) - 1 - update.base_version
        if any((update.update_id, outcome) in self.outcomes for outcome in ("applied", "stale", "rejected")):
            return  # the first outcome is final
        outcome = "stale"
        if tau <= self.settings["staleness_max"]:
            delta = np.zeros(self.versions[0].size, np.float32)
            decode(update.codec, update.payload, self.layout).add_into(delta, 1.0)
            delta = delta.astype(np.float64)
            if str(self.robust).startswith("norm"):
                delta = delta * min(1.0, call(self.robust)[1][0] / np.linalg.norm(delta))
            try:
                self.apply(update, delta, tau)
                outcome = "applied"
            except RejectedError:
                outcome = "rejected"
        self.outcomes.add((update.update_id, outcome))

    def weigh(self, tau):
        return STALENESS[self.settings["staleness"]](tau)

    def step(self, gradient, w=1.0):
        """Make a version with the server optimizer."""
        self.versions.append(self.optimizer.step(self.versions[-1], gradient, self.server_lr, w))

    def arrays(self):
        """Model-size vectors that are to be found in the store."""
        return self.optimizer.arrays() | self.own_arrays()

    def own_arrays(self):
        return {}

    def kept(self):
        """Names of the records that are to be found in the store."""
        return set()


@dataclass
class Term:
    """An update in a buffer: how often it counts, its share in the divisor, s(tau), and all of it times its delta."""

    update: Update
    share: float
    mass: float
    s: float
    delta: np.ndarray


class FedBuff(Oracle):
    """x <- x + eta * sum_i s(tau_i) n_i Delta_i / sum_i n_i, every K updates; n_i = 1 unless by samples.

    With `one_slot` a client's second update in a buffer is rejected; with `throttle(q)` the c-th counts q^-c times, but
    neither in the divisor nor for K, unless that were below 1 / 1000.
    """

    def left_of(self, update):
        """What the guard leaves of an update."""
        repeats = sum(update.client == term.update.client for term in self.buffer)
        if not repeats or not str(self.robust).startswith(("one_slot", "throttle")):
            return 1.0
        left = float(call(self.robust)[1][0]) ** -repeats if self.robust.startswith("throttle") else 0.0
        if left < 1e-3:
            raise RejectedError
        return left

    def apply(self, update, delta, tau):
        factor = self.left_of(update)
        share = update.num_samples if self.weight_by_samples else 1
        mass = share if factor == 1 else 0
        self.buffer.append(Term(update, share, mass, self.weigh(tau), self.weigh(tau) * factor * share * delta))
        if sum(term.mass > 0 for term in self.buffer) == self.buffer_size:
            self.flush()
            self.buffer = []

    def mean(self, values):
        """Return the mean of one value a term, by the shares."""
        return sum(values) / sum(term.mass for term in self.buffer)

    def flush(self):
        g = self.mean(term.delta for term in self.buffer)
        self.step(g, self.mean(term.mass * term.s for term in self.buffer))

    def summed(self):
        """What the open buffer's sum is made of."""
        return [term.delta for term in self.buffer]

    def own_arrays(self):
        return {"delta_sum": sum(self.summed())} if self.buffer else {}


class FedAvg(FedBuff):
    """The same, each client once; `staleness_max` is 0."""

    def apply(self, update, delta, tau):
        if any(update.client == term.update.client for term in self.buffer):
            raise RejectedError
        super().apply(update, delta, tau)


class FedNova(FedBuff):
    """x <- x + eta tau_eff sum_i p_i s(tau_i) Delta_i / a_i, a_i the steps counted one by one."""

    def steps_of(self, term):
        _, momentum, proximal = (*self.numbers, 0, 0, 0)[:3]
        total, velocity = 0.0, 0.0
        for _ in range(term.update.num_steps):
            velocity = momentum * velocity + 1.0
            total = (1 - proximal) * total + velocity
        return total

    def flush(self):
        steps = (self.numbers or [0])[0] or self.mean(term.mass * self.steps_of(term) for term in self.buffer)
        w = self.mean(term.mass * term.s for term in self.buffer)
        self.step(steps * self.mean(self.summed()), w)

    def summed(self):
        return [term.delta / self.steps_of(term) for term in self.buffer]


class Rescaled(FedBuff):
    """FedBuff with w_i = T_i / mean_j T_j on top, T_i from the whole history of who was accepted when."""

    def __init__(self, start, **settings):
        super().__init__(start, **settings)
        self.smoothing, self.weight_max = (*self.numbers, 0.2, 10)[:2] if self.numbers else (0.2, 10)
        self.accepted, self.seen = 0, {}  # client -> when its updates were accepted, since it was last forgotten

    def interval(self, client):
        times = self.seen[client]
        gaps = [later - earlier for earlier, later in pairwise(times)]
        interval = gaps[0] if gaps else None
        for gap in gaps[1:]:
            interval += self.smoothing * (gap - interval)
        return interval

    def apply(self, update, delta, tau):
        self.left_of(update)
        self.accepted += 1
        self.seen[update.client] = [*self.seen.pop(update.client, []), self.accepted]
        known = [interval for interval in map(self.interval, self.seen) if interval]
        own = self.interval(update.client)
        w = min(max(own / np.mean(known), 1 / self.weight_max), self.weight_max) if own else 1.0
        while self.clients and len(self.seen) > self.clients:
            del self.seen[min(self.seen, key=lambda client: self.seen[client][-1])]
        super().apply(update, w * delta, tau)


class Fadas(FedBuff):
    """AMSGrad without bias correction on the plain mean; eta / tau_max when tau_max > delay."""

    def __init__(self, start, **settings):
        super().__init__(start, **settings)
        _, (self.delay, self.beta1, self.beta2, self.epsilon) = call(settings["rule"], 1, 0.9, 0.99, 1e-8)
        self.m, self.v, self.peak = np.zeros((3, start.size))

    def weigh(self, tau):
        return 1.0

    def flush(self):
        g = self.mean(term.delta for term in self.buffer)
        self.m = self.beta1 * self.m + (1 - self.beta1) * g
        self.v = self.beta2 * self.v + (1 - self.beta2) * g**2
        self.peak = np.maximum(self.peak, self.v)
        tau_max = max(len(self.versions) - 1 - term.update.base_version for term in self.buffer)
        eta = self.server_lr if tau_max <= self.delay else self.server_lr / tau_max
        self.versions.append(self.versions[-1] + eta * self.m / (np.sqrt(self.peak) + self.epsilon))

    def own_arrays(self):
        m = {"fadas_m": self.m} if self.beta1 else {}
        return m | {"fadas_v": self.v, "fadas_peak": self.peak} | super().own_arrays()


class FedAsync(Oracle):
    """x <- (1 - a) x + a (x_base + Delta), a = alpha s(tau)."""

    def apply(self, update, delta, tau):
        a = self.alpha * self.weigh(tau)
        self.versions.append((1 - a) * self.versions[-1] + a * (self.versions[update.base_version] + delta))


class Ca2fl(Oracle):
    """v = hbar + (1/K) sum_i (Delta_i - h_i), hbar the mean of all caches as of before the buffer."""

    def __init__(self, start, **settings):
        super().__init__(start, **settings)
        self.cache, self.before, self.buffer = {}, np.zeros(start.size), []

    def apply(self, update, delta, tau):
        zero = np.zeros_like(delta)
        if update.client not in self.cache and len(self.cache) == self.clients:
            self.before = self.before - self.cache.pop(next(iter(self.cache)))
        self.buffer.append(delta - self.cache.pop(update.client, zero))
        self.cache[update.client] = delta
        if len(self.buffer) == self.buffer_size:
            self.step(self.before / self.clients + np.mean(self.buffer, axis=0))
            self.before, self.buffer = sum(self.cache.values()), []

    def own_arrays(self):
        arrays = {"ca2fl_cached": self.before}
        return arrays | ({"delta_sum": sum(self.buffer)} if self.buffer else {})

    def kept(self):
        return {f"client:{client}" for client in self.cache}


class Ace(Oracle):
    """x <- x + eta (1/n) sum_i U_i, U_i what client i sent last; every update a version."""

    def __init__(self, start, **settings):
        super().__init__(start, **settings)
        self.latest = {}  # client -> (base version, delta), longest unheard first

    def apply(self, update, delta, tau):
        self.latest.pop(update.client, None)
        if len(self.latest) == self.clients:
            del self.latest[next(iter(self.latest))]
        self.latest[update.client] = (update.base_version, delta)
        self.step(sum(delta for _, delta in self.latest.values()) / self.clients)

    def own_arrays(self):
        total = sum((delta for _, delta in self.latest.values()), np.zeros(self.versions[0].size))
        return {"latest_sum": total}

    def kept(self):
        return {f"client:{client}" for client in self.latest}


class Aced(Ace):
    """The mean over the clients whose latest is at most `staleness` versions old."""

    def apply(self, update, delta, tau):
        limit = int((self.numbers or [0])[0]) or 2 * self.clients
        version = len(self.versions) - 1
        self.latest.pop(update.client, None)
        self.latest[update.client] = (update.base_version, delta)
        self.latest = {client: old for client, old in self.latest.items() if version - old[0] <= limit}
        if len(self.latest) > self.clients:
            del self.latest[next(iter(self.latest))]
        if self.latest:
            self.step(sum(delta for _, delta in self.latest.values()) / len(self.latest))
        else:
            self.versions.append(self.versions[-1])


class Area(Oracle):
    """x_v = x_0 + (1/n) * all that was received, in portions of K."""

    def __init__(self, start, **settings):
        super().__init__(start, **settings)
        self.received = []

    def apply(self, update, delta, tau):
        self.received.append(delta)
        if len(self.received) % self.buffer_size == 0:
            self.versions.append(self.versions[0] + sum(self.received) / self.clients)

    def own_arrays(self):
        count = len(self.received) % self.buffer_size
        return {"delta_sum": sum(self.received[-count:])} if count else {}


class Ringleader(Oracle):
    """Rounds: fill the table, then a version for each client's first update; extras go to the next table."""

    def __init__(self, start, **settings):
        super().__init__(start, **settings)
        self.table, self.following, self.stepped, self.rounds = {}, {}, set(), 0

    def apply(self, update, delta, tau):
        if update.num_steps > 1:
            raise RejectedError
        client = update.client
        if client not in self.table and len(self.table) == self.clients:
            gone = next(iter(self.table))
            del self.table[gone]
            self.following.pop(gone, None)
            self.stepped.discard(gone)
        self.table[client] = self.table.pop(client, [])
        if client in self.stepped:
            self.following.setdefault(client, []).append(delta)
            return
        self.table[client].append(delta)
        if not self.stepped and len(self.table) < self.clients:
            return
        self.stepped.add(client)
        self.step(sum(np.mean(deltas, axis=0) for deltas in self.table.values()) / self.clients)
        if len(self.stepped) == len(self.table):
            self.table, self.following, self.stepped = self.following, {}, set()
            self.rounds += 1

    def own_arrays(self):
        totals = [
            sum((np.mean(deltas, axis=0) for deltas in table.values()), np.zeros(self.versions[0].size))
            for table in (self.table, self.following)
        ]
        return {"ringleader_0": totals[self.rounds % 2], "ringleader_1": totals[1 - self.rounds % 2]}

    def kept(self):
        here = {f"round{self.rounds % 2}:{client}" for client in self.table}
        return here | {f"round{1 - self.rounds % 2}:{client}" for client in self.following}


ORACLES = {
    "fedbuff": FedBuff, "fedasync": FedAsync, "fedavg": FedAvg, "fednova": FedNova, "rescaled": Rescaled,
    "fadas": Fadas, "ca2fl": Ca2fl, "ace": Ace, "aced": Aced, "area": Area, "ringleader": Ringleader,
}  # fmt: skip


def oracle_of(start, **settings):
    """Return the oracle of a job with these settings."""
    settings = {"rule": "fedbuff", "staleness_max": 100} | settings
    return ORACLES[call(settings["rule"])[0]](start, **settings)
