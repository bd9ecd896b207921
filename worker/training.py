"""One local training: weights in, delta out. A pure function of the base weights and the context."""

import math
import operator
import random
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from shared.errors import TaskError
from shared.layout import Layout, difference
from shared.messages import METRICS_MAX, NAME_CHARS_MAX, NUM_SAMPLES_MAX, NUM_STEPS_MAX
from shared.model_image import ModelImage
from shared.vector import NORM_MAX, Vector, squared_norm
from worker.task import Context, Model, Task, TrainResult, read, read_weights, write


@dataclass(frozen=True, slots=True)
class Training:
    """What is to be trained.

    Attributes:
        context: what the task is told.
        base: the weights to start from; not changed.
    """

    context: Context
    base: ModelImage


@dataclass(frozen=True, slots=True)
class Trained:
    """What came of it.

    Attributes:
        result: what the task reports, as plain numbers.
        delta: float32 [n], weights after minus before; finite.
        seconds: how long it took.
    """

    result: TrainResult
    delta: Vector
    seconds: float


class Trainer:
    """A task and the one model it trains in; the model is built when it is first needed."""

    def __init__(self, task: Task) -> None:
        self.task = task
        self._model: Model = None
        self._layout: Layout | None = None

    @property
    def layout(self) -> Layout:
        """The layout of the task's own model."""
        if self._layout is None:
            self._model = self.task.build()
            self._layout = read(self._model).layout
        return self._layout

    def initial(self) -> ModelImage:
        """Build the model anew and return its weights: version 0 of a job."""
        self._model = self.task.build()
        image = read(self._model)
        self._layout = image.layout
        return image

    def train(self, training: Training) -> Trained:
        """Train once.

        Raises:
            TaskError: the task raised, or gave nothing that can be sent; the message says why.
        """
        layout, base, name = self.layout, training.base, self.task.name
        started = time.perf_counter()
        write(self._model, base)
        # A half-precision model holds the base only as rounded: the delta is relative to what training started from.
        exact = all(spec.dtype == "float32" for spec in layout.averaged)
        start = base.weights if exact else read_weights(self._model)[1]
        seed_everything(training.context.seed)
        result = _checked(self.task.train(self._model, training.context), name)
        after, delta = read_weights(self._model)
        if after != base.layout:
            raise TaskError(f"train() of {name} changed the model's tensors: {difference(after, base.layout)}")
        delta -= start
        norm = math.sqrt(squared_norm(delta))
        if not norm <= NORM_MAX:  # nor NaN
            finite = math.isfinite(norm)
            what = f"a delta of norm {norm:.4g}, above {NORM_MAX:g}" if finite else "weights that are not finite"
            raise TaskError(f"train() of {name} gave {what}: the update is not sent")
        return Trained(result, delta, time.perf_counter() - started)

    def evaluate(self, image: ModelImage, version: int, settings: Mapping[str, str]) -> dict[str, float]:
        """Measure weights on held-out data, in the same model.

        Raises:
            TaskError: the task raised, or returned no numbers.
        """
        assert image.layout == self.layout, "the task's own"  # noqa: S101
        write(self._model, image)
        seed_everything(0)  # whatever was trained here before: the same weights, the same numbers
        return self.task.evaluate(self._model, Context("", version, 0, settings))


def seed_everything(seed: int) -> None:
    """Seed the generators a task may use without saying so (dropout): the same training, the same bits, anywhere."""
    random.seed(seed)
    np.random.seed(seed)
    if (torch := sys.modules.get("torch")) is not None:
        torch.default_generator.manual_seed(seed)  # torch.manual_seed costs a millisecond where there is no GPU
        if torch.cuda.is_initialized():
            torch.cuda.manual_seed_all(seed)


def _checked(result: TrainResult, task: str) -> TrainResult:
    """Return a task's result as plain numbers; numbers of numpy or torch are fine, metrics that are not finite go.

    Raises:
        TaskError: it cannot be sent; the message says why.
    """
    try:
        num_samples, num_steps = operator.index(result.num_samples), operator.index(result.num_steps)
        metrics = {name: float(value) for name, value in result.metrics.items()}
    except (TypeError, ValueError, AttributeError) as error:
        raise TaskError(
            f"train() of {task} must report whole numbers of samples and steps and a dict of numbers: {error}"
        ) from error
    if not (0 < num_samples <= NUM_SAMPLES_MAX and 0 < num_steps <= NUM_STEPS_MAX):
        raise TaskError(f"train() of {task} reports {num_samples} samples and {num_steps} steps: both must be positive")
    if len(metrics) > METRICS_MAX or not all(isinstance(name, str) and len(name) <= NAME_CHARS_MAX for name in metrics):
        raise TaskError(
            f"train() of {task}: at most {METRICS_MAX} metrics, their names up to {NAME_CHARS_MAX} characters"
        )
    return TrainResult(num_samples, num_steps, {name: value for name, value in metrics.items() if math.isfinite(value)})
