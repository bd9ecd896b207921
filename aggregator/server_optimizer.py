"""How the server steps along a pseudo-gradient g, the mean of deltas. The server adds: a delta is after - before.

One file for all, because all are one loop: block by block through a few scratch blocks that stay in the processor's
cache, never a temporary of model size. What an optimizer remembers are vectors of `State.arrays`, committed with every
version; each optimizer has its own names for them, so that a job that changes to another one starts it afresh.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from aggregator.state import State
from shared.choices import Choice, parse
from shared.rules import SERVER_OPTIMIZERS
from shared.vector import BLOCK_ELEMENTS, Vector, add_scaled


class ServerOptimizer(Protocol):
    """Moves the weights along a pseudo-gradient."""

    @property
    def name(self) -> str:
        """Its name in the registry."""

    @property
    def arrays(self) -> Mapping[str, float]:
        """Model-size vectors of `State.arrays` it remembers, and what they are filled with at first."""

    def step(self, state: State, gradient: Vector, scale: float, lr: float, mean_weight: float) -> None:
        """Move the weights along g = scale * gradient, in place.

        Args:
            state: its weights and this optimizer's own arrays are changed.
            gradient: float32 [n]; not changed.
            scale: e.g. 1 / K where `gradient` is a sum.
            lr: eta_g > 0.
            mean_weight: mean of the staleness weights s(tau), which are in g already.
        """


@dataclass(frozen=True, slots=True)
class Sgd:
    """x <- x + eta g.

    Use it: by default; with eta = 1 a version is the mean of the workers' models. Memory: none.
    Source: Nguyen et al., arXiv:2106.06639, algorithm 1.
    """

    name: str = "sgd"

    @property
    def arrays(self) -> Mapping[str, float]:
        """It remembers nothing."""
        return {}

    def step(self, state: State, gradient: Vector, scale: float, lr: float, mean_weight: float) -> None:
        """Add the scaled gradient."""
        add_scaled(state.weights, gradient, lr * scale)


@dataclass(frozen=True, slots=True)
class Momentum:
    """FedAvgM as an average, with the correction that stale updates need.

        m <- (1 - (1 - beta) w) m + (1 - beta) g,    x <- x + eta w m

    w in [0, 1] is the mean of the staleness weights in the buffer, g = (1/K) sum_i w_i Delta_i holds them already.
    With w = 1 this is plain FedAvgM. Why not plain FedAvgM always: a buffer of stale updates would push the momentum
    of fresh ones out at the same rate, and coast at full step while it brings little that is new.

    Derived from FLSim's rule for a single update of weight w, which replaces beta by beta' = beta + (1 - beta)(1 - w),
    the gradient by w Delta and the lr by w eta. As 1 - beta' = (1 - beta) w,

        m <- beta' m + (1 - beta) w Delta = beta' m + (1 - beta') Delta :

    m stays an average of undamped deltas, into which a stale one enters w times slower. A buffer is taken as a single
    update: w Delta is its g, w the mean of its weights. FLSim's m is a sum, 1 / (1 - beta) times ours: its lr is
    (1 - beta) times the `server_lr` that does the same here. What guards take off an update is no part of w: it
    would come back through m.

    Use it: with beta of 0.3 rather than 0.9 where many updates are in flight; asynchrony already acts as momentum.
    Memory: one vector of model size.
    Source: Hsu et al., arXiv:1909.06335 (FedAvgM); FLSim, `async_aggregators.py`; algorithms.md, 1.10.
    """

    beta: float
    name: str = "momentum"

    @property
    def arrays(self) -> Mapping[str, float]:
        """The running average m."""
        return {"momentum_m": 0.0}

    def step(self, state: State, gradient: Vector, scale: float, lr: float, mean_weight: float) -> None:
        """Average, then step along the average."""
        w = min(1.0, max(0.0, mean_weight))
        keep, take, eta = np.float32(1 - (1 - self.beta) * w), np.float32((1 - self.beta) * scale), np.float32(lr * w)
        scratch = _scratch(gradient.size)
        for part in _blocks(gradient.size):
            m, x, product = state.arrays["momentum_m"][part], state.weights[part], scratch[: gradient[part].size]
            np.multiply(m, keep, out=m)
            np.add(m, np.multiply(gradient[part], take, out=product), out=m)
            np.add(x, np.multiply(m, eta, out=product), out=x)


GRADIENT_MAX = 1e15  # of one weight: a million such squares still fit float32, and no training makes a larger one

Accumulate = Callable[[Vector, Vector, Vector], None]  # v (changed in place), g^2 (may be overwritten), scratch


@dataclass(frozen=True, slots=True)
class Adaptive:
    """FedOpt: each weight's step is divided by the size its own gradients have had.

        m <- beta1 m + (1 - beta1) g                      (m = g where beta1 is 0)
        v <- v + g^2                                      FedAdagrad
        v <- beta2 v + (1 - beta2) g^2                    FedAdam
        v <- v - (1 - beta2) g^2 sign(v - g^2)            FedYogi
        x <- x + eta m / (sqrt(v) + epsilon)

    v begins at epsilon^2, and there is no bias correction: as in the paper, unlike torch.optim.Adam. Yogi's v moves by
    at most (1 - beta2) g^2, so that after a few large gradients it does not forget how fast it may go; v stays >= 0.
    With `peak` the step is divided by the largest v so far instead: AMSGrad, which FADAS uses, with v from 0.

    A step is about eta for every weight, however small the delta: begin with eta = 0.01.

    Use it: adam or yogi for transformers, embeddings and other models whose gradients differ in size by tensor;
    adagrad for sparse features. Memory: two vectors of model size, adagrad one, AMSGrad three.
    Source: Reddi et al., "Adaptive Federated Optimization", arXiv:2003.00295, algorithm 2; Reddi et al.,
    arXiv:1904.09237 (AMSGrad).

    Attributes:
        name: in the registry, and the beginning of its arrays' names.
        beta1: in [0, 1).
        epsilon: > 0, the paper's tau; 1e-3 is where it recommends to begin.
        accumulate: how v takes g^2 in.
        first: v before the first step.
        peak: divide by the largest v so far.
    """

    name: str
    beta1: float
    epsilon: float
    accumulate: Accumulate
    first: float
    peak: bool = False

    @property
    def arrays(self) -> Mapping[str, float]:
        """The averages of g and g^2 it takes."""
        named = {"m": 0.0} if self.beta1 else {}
        named |= {"v": self.first} | ({"peak": 0.0} if self.peak else {})
        return {f"{self.name}_{key}": value for key, value in named.items()}

    def step(self, state: State, gradient: Vector, scale: float, lr: float, mean_weight: float) -> None:
        """Average, then step along the average over its size."""
        size = gradient.size
        scratch = [_scratch(size) for _ in range(3)]
        factor, epsilon, eta = np.float32(scale), np.float32(self.epsilon), np.float32(lr)
        for part in _blocks(size):
            x = state.weights[part]
            g, t, spare = (block[: x.size] for block in scratch)
            np.clip(np.multiply(gradient[part], factor, out=g), -GRADIENT_MAX, GRADIENT_MAX, out=g)
            v = self._size_of(state, part, g, t, spare)
            m = self._average_of(state, part, g, spare)
            np.add(np.sqrt(v, out=t), epsilon, out=t)
            np.multiply(np.divide(m, t, out=t), eta, out=t)
            np.add(x, t, out=x)

    def _average_of(self, state: State, part: slice, g: Vector, scratch: Vector) -> Vector:
        """Return m after g, in place."""
        if not self.beta1:
            return g
        m = state.arrays[f"{self.name}_m"][part]
        np.multiply(m, np.float32(self.beta1), out=m)
        np.add(m, np.multiply(g, np.float32(1 - self.beta1), out=scratch), out=m)
        return m

    def _size_of(self, state: State, part: slice, g: Vector, square: Vector, scratch: Vector) -> Vector:
        """Return v, or its peak, after g, in place."""
        v = state.arrays[f"{self.name}_v"][part]
        self.accumulate(v, np.multiply(g, g, out=square), scratch)
        if not self.peak:
            return v
        peak = state.arrays[f"{self.name}_peak"][part]
        np.maximum(peak, v, out=peak)
        return peak


def _sum(v: Vector, square: Vector, scratch: Vector) -> None:
    np.add(v, square, out=v)


def _average(beta2: float) -> Accumulate:
    keep, take = np.float32(beta2), np.float32(1 - beta2)

    def accumulate(v: Vector, square: Vector, scratch: Vector) -> None:
        np.multiply(v, keep, out=v)
        np.add(v, np.multiply(square, take, out=square), out=v)

    return accumulate


def _towards(beta2: float) -> Accumulate:
    take = np.float32(1 - beta2)

    def accumulate(v: Vector, square: Vector, scratch: Vector) -> None:
        np.sign(np.subtract(v, square, out=scratch), out=scratch)
        np.multiply(square, take, out=square)
        np.subtract(v, np.multiply(scratch, square, out=scratch), out=v)

    return accumulate


def amsgrad(name: str, beta1: float, beta2: float, epsilon: float) -> Adaptive:
    """Return AMSGrad, for the rule that brings its own optimizer.

    Args:
        name: of the rule: its arrays begin with it.
        beta1: in [0, 1).
        beta2: in [0, 1).
        epsilon: > 0.
    """
    return Adaptive(name, beta1, epsilon, _average(beta2), first=0.0, peak=True)


OPTIMIZERS: dict[str, Callable[[Choice], ServerOptimizer]] = {
    "sgd": lambda _: Sgd(),
    "momentum": lambda c: Momentum(c["beta"]),
    "adagrad": lambda c: Adaptive("adagrad", 0.0, c["epsilon"], _sum, c["epsilon"] ** 2),
    "adam": lambda c: Adaptive("adam", c["beta1"], c["epsilon"], _average(c["beta2"]), c["epsilon"] ** 2),
    "yogi": lambda c: Adaptive("yogi", c["beta1"], c["epsilon"], _towards(c["beta2"]), c["epsilon"] ** 2),
}


def optimizer_of(text: str) -> ServerOptimizer:
    """Build the optimizer a setting names, e.g. `adam(0.9, 0.99, 0.001)`.

    Raises:
        ValueError: it names none; the settings have been checked, so they do.
    """
    choice = parse(text, SERVER_OPTIMIZERS)
    return OPTIMIZERS[choice.name](choice)


def _blocks(size: int) -> Iterator[slice]:
    return (slice(start, start + BLOCK_ELEMENTS) for start in range(0, size, BLOCK_ELEMENTS))


def _scratch(size: int) -> Vector:
    return np.empty(min(BLOCK_ELEMENTS, size), np.float32)
