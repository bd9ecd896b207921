"""The files a version can be written as. Each writer takes an open file; a full disk is its caller's matter."""

import contextlib
import importlib
import io
import logging
import warnings
from collections.abc import Callable
from typing import IO, Any

import numpy as np

from shared.errors import SettingsError, TaskError
from shared.layout import difference
from shared.model_image import ModelImage
from worker.task import Task, read, write

SAFETENSORS, ONNX = ".safetensors", ".onnx"
ONNX_BYTES_MAX = 2**31 - 2**20  # a protobuf message; a larger model would need a second file beside
BATCH = "batch"  # the name of the first axis, where the example has more than one row

Writer = Callable[[IO[bytes], ModelImage, Task | None], None]


def safetensors_writer(file: IO[bytes], image: ModelImage, _task: Task | None) -> None:
    """Write the bytes that the store holds: their sha256 is the version's."""
    file.write(image.data.data)


def torch_writer(file: IO[bytes], image: ModelImage, _task: Task | None) -> None:
    """Write a state_dict of plain tensors, which torch reads back with `weights_only=True`.

    Floats are float32, as the server has them; `load_state_dict` casts them to the module's own type.
    """
    torch = _import("torch", "torch")
    state = {name: torch.from_numpy(np.array(array)) for name, array in image.tensors().items()}
    try:
        torch.save(state, file)
    except RuntimeError as error:  # on a full disk its own writer fails after Python's has
        raise error.__context__ if isinstance(error.__context__, OSError) else OSError(str(error)) from error


def numpy_writer(file: IO[bytes], image: ModelImage, _task: Task | None) -> None:
    """Write named arrays, not compressed: `numpy.load(FILE)` reads it."""
    np.savez(file, **image.tensors())  # type: ignore[arg-type]


def onnx_writer(file: IO[bytes], image: ModelImage, task: Task | None) -> None:
    """Write the task's module with these weights as an ONNX graph.

    The task's `example_input()` gives what `forward` takes: a tensor, or a tuple of them. The first axis of each may
    vary where the example has more than one row.

    Raises:
        SettingsError: onnx is not installed, or the task does not fit the job.
        TaskError: the module cannot be traced.
    """
    torch = _import("torch", "torch")
    for library in ("onnx", "onnxscript"):
        _import(library, "onnx")
    if task is None:
        raise SettingsError("an ONNX graph needs the module: give --task")
    if image.data.size > ONNX_BYTES_MAX:
        raise SettingsError(f"{image.data.size:,} bytes are more than an ONNX file holds: export .safetensors")
    module, example = task.build(), task.example_input()
    if isinstance(module, dict):
        raise SettingsError(f"task {task.name} builds arrays, not a torch module: there is no graph to export")
    if (mine := read(module).layout).hash != image.layout.hash:
        raise SettingsError(f"task {task.name} does not fit this job: {difference(mine, image.layout)}")
    write(module, image)
    inputs = example if isinstance(example, tuple) else (example,)
    if not inputs or not all(isinstance(each, torch.Tensor) for each in inputs):
        raise TaskError(f"example_input() of {task.name} must return a tensor or a tuple of them, got {example!r:.80}")
    graph = io.BytesIO()
    _trace(torch, module.eval(), inputs, graph, task.name)
    file.write(graph.getbuffer())


def _trace(torch: Any, module: Any, inputs: tuple[Any, ...], graph: IO[bytes], name: str) -> None:
    """Export, without the exporter's own report on stdout.

    Raises:
        TaskError: it cannot.
    """
    batch = torch.export.Dim(BATCH)
    axes = tuple({0: batch} if each.ndim and each.shape[0] > 1 else None for each in inputs)
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                module, inputs, dynamo=True, external_data=False, verbose=False,
                dynamic_shapes=axes if any(axes) else None,
            )  # fmt: skip
            program.save(graph, external_data=False)
    except Exception as error:  # torch raises whatever it likes
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise TaskError(f"the module of {name} cannot be exported as ONNX: {reason[0]}") from error


def _import(library: str, extra: str) -> Any:
    """Import a library of an extra.

    Raises:
        SettingsError: it is not installed; the message says how to.
    """
    try:
        return importlib.import_module(library)
    except ModuleNotFoundError as error:
        raise SettingsError(f"this format needs {error.name}: pip install 'fedmq[{extra}]'") from error


FORMATS: dict[str, Writer] = {
    SAFETENSORS: safetensors_writer, ".pt": torch_writer, ".pth": torch_writer, ONNX: onnx_writer, ".npz": numpy_writer,
}  # fmt: skip
