"""QAFeL's logistic regression: are mushrooms poisonous? Convex, with a known optimum, and without torch.

    f(w) = (1/N) sum_i log(1 + e^(-y_i x_i w)) + |w|^2 / (2 N),   N = 8124,   f* = 0.014484174

A trip is `steps` gradient steps on the whole of a client's data. The file is `mushrooms/mushroom.libsvm` under
FEDMQ_DATA. Settings: `share`, `shares` (default 100), `partition` (default `consecutive`), `steps` (default 10) and
`lr` (default 2); the server's goes with them: 0.1.

Source: Ortega and Jafarkhani, arXiv:2308.00263, section 6.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from shared.errors import SettingsError
from worker.task import Context, TrainResult
from worker.tasks.files import read_bytes
from worker.tasks.options import Data, dealt, read, share_for

FEATURES, SAMPLES = 112, 8124
OPTIMUM = 0.014484174216922262  # f*
MARGIN_MAX = 500.0  # e^500 is a finite float64, and 1 / (1 + e^500) is 0 to all digits

Array = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class _Options(Data):
    shares: int = 100
    partition: str = "consecutive"
    steps: int = 10
    lr: float = 2.0


DEFAULTS = _Options()


def build() -> dict[str, npt.NDArray[np.float32]]:
    """Build a linear model with 112 parameters, all zero."""
    return {"w": np.zeros(FEATURES, np.float32)}


def train(model: dict[str, npt.NDArray[np.float32]], context: Context) -> TrainResult:
    """Take full gradient steps on this worker's share."""
    options = read(context.settings, DEFAULTS)
    signed = _clients(options.shares, options.partition)[share_for(context.client, options)]
    steps = max(1, options.steps)
    w, loss = descend(model["w"].astype(np.float64), signed, steps, options.lr)
    model["w"][...] = w
    return TrainResult(num_samples=len(signed), num_steps=steps, metrics={"loss": loss})


def evaluate(model: dict[str, npt.NDArray[np.float32]], context: Context) -> dict[str, float]:
    """Return the loss over all the data, how far it is above the optimum (`excess`), and the accuracy."""
    inputs, labels = mushrooms()
    w = model["w"].astype(np.float64)
    margins = labels * (inputs @ w)
    loss = float(np.logaddexp(0, -margins).mean() + w @ w / (2 * SAMPLES))
    return {"accuracy": float((margins > 0).mean()), "loss": loss, "excess": loss - OPTIMUM}


def descend(w: Array, signed: Array, steps: int, lr: float) -> tuple[Array, float]:
    """Take gradient steps on a client's loss, regularised as the whole is.

    Args:
        w: [features], changed in place.
        signed: y_i x_i, [examples, features].
        steps: how many, >= 1.
        lr: step size.

    Returns:
        w, and the loss before the last step, without its regularisation.
    """
    margins = signed @ w
    for step in range(steps):
        margins = signed @ w if step else margins
        slope = 1 / (1 + np.exp(np.minimum(margins, MARGIN_MAX)))
        w -= lr * (w / SAMPLES - slope @ signed / len(signed))
    return w, float(np.logaddexp(0, -margins).mean())


@lru_cache
def mushrooms() -> tuple[Array, Array]:
    """Read the data: inputs [8124, 112] of 0 and 1, labels [8124] of -1 and 1.

    Raises:
        SettingsError: there is no such file, or it is another.
    """
    lines = read_bytes("mushrooms", "mushrooms/mushroom.libsvm").decode().splitlines()
    inputs, labels = np.zeros((SAMPLES, FEATURES)), np.zeros(SAMPLES)
    try:
        for row, line in enumerate(lines):
            label, *pairs = line.split()
            labels[row] = 1.0 if label == "2" else -1.0
            for column, _, value in (pair.partition(":") for pair in pairs):
                inputs[row, int(column) - 1] = float(value)
    except (ValueError, IndexError) as error:
        raise SettingsError(f"mushroom.libsvm, line {row + 1}: {error}") from error
    if len(lines) != SAMPLES:
        raise SettingsError(f"mushroom.libsvm has {len(lines):,} lines, the optimum is known for {SAMPLES:,}")
    return inputs, labels


@lru_cache
def _clients(shares: int, partition: str) -> list[Array]:
    """Return each client's examples times their labels, [examples, 112]."""
    inputs, labels = mushrooms()
    parts = dealt((labels > 0).astype(np.int64), shares, partition)
    return [inputs[part] * labels[part, None] for part in parts]
