"""A task as a user writes one, for the simulator's tests: small, in numpy, every client with an optimum of its own.

Settings: `share` and `shares` come from the simulator; `lr` (0.3); `steps` (2); `raises=1+5` names shares whose
training raises, `all` means everybody's; `invalid` names those that report no samples; `sleep` takes so many seconds.
"""

import random
import time
from typing import Any

import numpy as np

from worker.task import Context, TrainResult

SIZE = 40
DRAWN = np.random.random(3)  # when imported: must be the same in every process


def build() -> dict[str, Any]:
    """Build weights at random, and a tensor that nobody averages."""
    return {"w": np.random.standard_normal(SIZE).astype(np.float32), "rounds": np.zeros(1, np.int64)}


def optimum(share: int) -> Any:
    """Return where a share's training leads."""
    return np.random.default_rng(share).standard_normal(SIZE).astype(np.float32)


def train(model: dict[str, Any], context: Context) -> TrainResult:
    """Go part of the way, with noise from every generator a task may use."""
    settings = context.settings
    share, steps = settings["share"], int(settings.get("steps", "2"))
    raising = settings.get("raises", "").split("+")
    if share in raising or "all" in raising:
        raise ValueError(f"share {share} has no data")
    time.sleep(float(settings.get("sleep", "0")))
    goal = optimum(int(share))
    for _ in range(steps):
        model["w"] += np.float32(settings.get("lr", "0.3")) * (goal - model["w"])
        model["w"] += 0.01 * np.random.standard_normal(SIZE).astype(np.float32)
        model["w"] += np.float32(0.01 * (random.random() - 0.5) * DRAWN[0])
    samples = 0 if share in settings.get("invalid", "").split("+") else 5 + int(share)
    return TrainResult(num_samples=samples, num_steps=steps, metrics={"loss": float(np.abs(goal - model["w"]).mean())})


def evaluate(model: dict[str, Any], context: Context) -> dict[str, float]:
    """Measure the distance from the mean of the first optima, with noise."""
    goal = np.mean([optimum(share) for share in range(12)], axis=0)
    loss = float(np.square(model["w"] - goal).mean()) + 1e-6 * random.random()
    return {"loss": loss, "accuracy": 1 / (1 + loss)}
