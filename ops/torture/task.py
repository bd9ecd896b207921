"""What the workers train and the evaluator measures: one matrix, moved at random."""

from functools import lru_cache
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from shared.vector import Vector
from worker.task import Context, Task, TrainResult
from worker.training import Trainer

DELTAS = 256  # different directions a training may take


@lru_cache
def _deltas(num_params: int) -> npt.NDArray[np.float32]:
    return np.random.default_rng(0).standard_normal((DELTAS, num_params), np.float32)


@lru_cache
def task_of(shape: tuple[int, int]) -> Task:
    """Return a task of one matrix, which a training moves by a random amount of a random size."""
    table = _deltas(shape[0] * shape[1]).reshape(DELTAS, *shape)

    def train(model: dict[str, Vector], context: Context) -> TrainResult:
        seed = context.seed
        model["w"] += np.float32(10.0 ** (seed // DELTAS % 5 / 2 - 1)) * table[seed % DELTAS]
        return TrainResult(1 + seed % 3, 1)

    def evaluate(model: dict[str, Vector], context: Context) -> dict[str, float]:
        return {"norm": float(np.abs(model["w"]).sum())}

    functions = SimpleNamespace(build=lambda: {"w": np.zeros(shape, np.float32)}, train=train, evaluate=evaluate)
    return Task("torture", cast(Any, functions))


@lru_cache
def trainer_of(shape: tuple[int, int]) -> Trainer:
    """Return the trainer that all workers of such a model share."""
    return Trainer(task_of(shape))
