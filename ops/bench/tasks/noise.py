"""No learning at all: what a simulation costs beside its training.

FEDMQ_NOISE_PARAMS is how many parameters there are, 100,000 by default; `build` is told nothing else.
"""

import os
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from shared.errors import SettingsError
from worker.task import Context, TrainResult

VARIABLE = "FEDMQ_NOISE_PARAMS"
PARAMS, PARAMS_MAX = 100_000, 100_000_000
SLICES = 4096  # different trips: each begins at another place of the table
SCALE = 0.01

Model = dict[str, npt.NDArray[np.float32]]  # a matrix: vectors, as biases are, travel as float16 whatever the codec


def build() -> Model:
    """Build a model of zeros."""
    text = os.environ.get(VARIABLE, str(PARAMS))
    if not text.isdecimal() or not 1 <= int(text) <= PARAMS_MAX:
        raise SettingsError(f"{VARIABLE} is {text}, must be a whole number in [1, {PARAMS_MAX}]")
    return {"w": np.zeros((1, int(text)), np.float32)}


def train(model: Model, context: Context) -> TrainResult:
    """Add a slice of a table of noise, chosen by the seed."""
    weights = model["w"][0]
    start = context.seed % SLICES
    weights += _table(len(weights))[start : start + len(weights)]
    return TrainResult(num_samples=1, num_steps=1)


def evaluate(model: Model, context: Context) -> dict[str, float]:
    """Return the mean square of the weights as the loss; there is nothing to be accurate about."""
    weights = model["w"][0]
    return {"accuracy": 0.0, "loss": float(weights @ weights) / len(weights)}


@lru_cache(maxsize=1)
def _table(params: int) -> npt.NDArray[np.float32]:
    table = np.random.default_rng(0).standard_normal(params + SLICES, np.float32)
    table *= SCALE
    return table
