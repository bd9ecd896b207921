"""What a user writes, and how the worker calls it.

A task is a Python file (or one of the built-in modules) with these functions:

    def build() -> torch.nn.Module | dict[str, numpy.ndarray]       the model, with any weights
    def train(model, context) -> TrainResult                        trains it in place on local data
    def evaluate(model, context) -> dict[str, float]                optional: measures it on held-out data
    def example_input() -> torch.Tensor | tuple[torch.Tensor, ...]  optional: what the module takes, for ONNX

The worker loads the pulled weights into the model before `train`, and takes the difference afterwards: a
task never sees deltas, versions or codecs. A model of plain numpy arrays needs no torch.
"""

import importlib.util
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt

from shared.errors import SettingsError, TaskError
from shared.layout import Layout
from shared.model_image import ModelImage
from shared.vector import Vector

BUILT_IN = {
    name: f"worker.tasks.{name}" for name in ("digits", "mnist", "mnist_wide", "mnist_mlp", "shakespeare", "mushrooms")
}

Model = Any  # torch.nn.Module, or a dict of numpy arrays


@dataclass(frozen=True, slots=True)
class Context:
    """What a task is told.

    Attributes:
        client: this worker's id; "" for an evaluator.
        version: the model version it starts from.
        seed: differs for every training, the same when it is repeated.
        settings: the user's own, from FEDMQ_TASK_SETTINGS.
        stopping: tells whether the worker was asked to end; a long training may return early.
    """

    client: str
    version: int
    seed: int
    settings: Mapping[str, str] = field(default_factory=dict)
    stopping: Callable[[], bool] = lambda: False


@dataclass(frozen=True, slots=True)
class TrainResult:
    """What `train` returns.

    Attributes:
        num_samples: examples in the local data, >= 1.
        num_steps: optimizer steps taken, >= 1.
        metrics: finite numbers worth knowing, e.g. {"loss": 0.3}.
    """

    num_samples: int
    num_steps: int
    metrics: Mapping[str, float] = field(default_factory=dict)


class Task:
    """A loaded task: its functions, called with errors turned into `TaskError`."""

    def __init__(self, name: str, module: ModuleType) -> None:
        self.name = name
        self._module = module

    @classmethod
    def load(cls, name: str, needs: tuple[str, ...] = ("build", "train")) -> "Task":
        """Load a file or a built-in.

        Raises:
            SettingsError: no such file, it raises on import, or lacks a function; the message says which.
        """
        if not name:
            raise SettingsError(f"no task: give --task my_task.py, or a built-in ({', '.join(BUILT_IN)})")
        path = Path(name)
        try:
            if name in BUILT_IN:
                module = importlib.import_module(BUILT_IN[name])
            elif path.is_file():
                module = _import_file(path)
            else:
                raise SettingsError(f"no task {name!r}: neither a file nor a built-in ({', '.join(BUILT_IN)})")
        except SettingsError:
            raise
        except (Exception, SystemExit) as error:
            line = _line_of(error, path)
            mend = ": pip install torch" if getattr(error, "name", "") == "torch" else ""
            raise SettingsError(f"task {name} raises on import{line}: {type(error).__name__}: {error}{mend}") from error
        missing = [function for function in needs if not callable(getattr(module, function, None))]
        if missing:
            raise SettingsError(f"task {name} lacks {', '.join(f'{m}()' for m in missing)}; `fedmq init` shows all")
        return cls(name, module)

    @property
    def can_evaluate(self) -> bool:
        """Whether the task has an `evaluate`."""
        return callable(getattr(self._module, "evaluate", None))

    def build(self) -> Model:
        """Build the model."""
        model = self._call("build")
        if not isinstance(model, dict) and not (hasattr(model, "state_dict") and hasattr(model, "load_state_dict")):
            raise TaskError(f"build() of {self.name} returned {type(model).__name__}, not a model or a dict of arrays")
        return model

    def train(self, model: Model, context: Context) -> TrainResult:
        """Train in place."""
        result = self._call("train", model, context)
        if not isinstance(result, TrainResult):
            raise TaskError(f"train() of {self.name} returned {type(result).__name__}, not a TrainResult")
        return result

    def evaluate(self, model: Model, context: Context) -> dict[str, float]:
        """Measure on held-out data."""
        metrics = self._call("evaluate", model, context)
        try:
            return {str(name): float(value) for name, value in metrics.items()}
        except (AttributeError, TypeError, ValueError) as error:
            raise TaskError(f"evaluate() of {self.name} must return a dict of numbers, got {metrics!r:.80}") from error

    def example_input(self) -> Any:
        """Return what the module takes: a tensor, or a tuple of tensors; of two rows or more if their number varies."""
        return self._call("example_input")

    def _call(self, function: str, *arguments: Any) -> Any:
        try:
            return getattr(self._module, function)(*arguments)
        except SettingsError:  # a worked task that misses its data says what to do
            raise
        except (Exception, SystemExit) as error:
            raise TaskError(f"{function}() of {self.name} raised {type(error).__name__}: {error}") from error


def read(model: Model) -> ModelImage:
    """Copy a model's tensors into an image."""
    return ModelImage.of(*_arrays(model))


def read_weights(model: Model) -> tuple[Layout, Vector]:
    """Copy a model's averaged tensors into a flat vector; return also which tensors the model has."""
    arrays, dtypes = _arrays(model)
    layout = Layout.of((name, array.shape, dtypes[name]) for name, array in arrays.items())
    return layout, layout.flatten(arrays)


def _arrays(model: Model) -> tuple[dict[str, npt.NDArray[Any]], dict[str, str]]:
    """Return a model's tensors, not copied where they are numpy's already, and their declared types."""
    arrays: dict[str, npt.NDArray[Any]] = {}
    dtypes: dict[str, str] = {}
    for name, tensor in _tensors(model).items():
        arrays[name], dtypes[name] = _to_numpy(tensor)
    return arrays, dtypes


def write(model: Model, image: ModelImage) -> None:
    """Copy an image's tensors into a model, in place."""
    tensors = _tensors(model)
    if isinstance(model, dict):
        for name, array in image.tensors().items():
            tensors[name][...] = array
        return
    import torch

    with torch.no_grad():
        for name, array in image.tensors().items():
            tensors[name].copy_(torch.from_numpy(array))


def _tensors(model: Model) -> Mapping[str, Any]:
    return model if isinstance(model, dict) else dict(model.state_dict())


def _to_numpy(tensor: Any) -> tuple[npt.NDArray[Any], str]:
    """Return a tensor as an array, and its declared type: numpy has no bfloat16, so that one becomes float32."""
    if isinstance(tensor, np.ndarray):
        return tensor, _name_of(tensor.dtype)
    dtype = str(tensor.dtype).removeprefix("torch.")
    tensor = tensor.detach().cpu()
    return (tensor.float() if dtype == "bfloat16" else tensor).numpy(), dtype


@lru_cache
def _name_of(dtype: np.dtype[Any]) -> str:
    """Return a type's name; numpy takes five microseconds for it."""
    return str(dtype)


def _import_file(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"fedmq_task_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise SettingsError(f"task {path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    sys.path.insert(0, str(path.resolve().parent))  # so that a task may be split over files
    spec.loader.exec_module(module)
    return module


def _line_of(error: BaseException, path: Path) -> str:
    """Say in which line of the task's own file it happened."""
    line, trace = getattr(error, "lineno", None) if isinstance(error, SyntaxError) else None, error.__traceback__
    while trace is not None:
        if Path(trace.tb_frame.f_code.co_filename).resolve() == path.resolve():
            line = trace.tb_lineno
        trace = trace.tb_next
    return f" (line {line})" if line else ""
