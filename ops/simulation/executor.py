"""Where the trainings of a simulation run: in this process, or in others beside it.

A training is a pure function of the weights and the context, so where and when it runs changes nothing but the time it
takes. A cluster engine joins by another `Executor`.
"""

import logging
import multiprocessing
import tempfile
import traceback
from collections import OrderedDict
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from shared.errors import FedMQError, TaskError
from shared.model_image import ModelImage
from worker.task import Context, Task
from worker.training import Trained, Trainer, Training

log = logging.getLogger("fedmq.simulation")

BASES_HELD = 4  # versions a process keeps at hand, of those it was given last


@dataclass(frozen=True, slots=True)
class Failure:
    """A training that gave nothing.

    Attributes:
        message: what is wrong.
        trace: the user's own code where it raised; may be empty.
    """

    message: str
    trace: str


Outcome = Trained | Failure


class Executor(Protocol):
    """Runs trainings; each is submitted once and taken once."""

    @property
    def window(self) -> int:
        """How many submitted trainings are enough to keep it busy."""

    def submit(self, number: int, training: Training) -> None:
        """Begin a training, now or later.

        Args:
            number: to take it by; not used before.
            training: what to train.
        """

    def take(self, number: int) -> Outcome:
        """Return what came of a training; waits for it."""

    def drop(self, number: int) -> None:
        """Let go of a submitted training that nobody will take."""

    def close(self) -> None:
        """End all processes."""


def attempt(trainer: Trainer, training: Training) -> Outcome:
    """Train once; the task's own errors become a `Failure`."""
    try:
        return trainer.train(training)
    except TaskError as error:
        cause = error.__cause__
        return Failure(str(error), "".join(traceback.format_exception(cause)) if cause is not None else "")


class InThisProcess:
    """One training after the other, here."""

    window = 1

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self._done: dict[int, Outcome] = {}

    def submit(self, number: int, training: Training) -> None:
        """Train at once."""
        self._done[number] = attempt(self._trainer, training)

    def take(self, number: int) -> Outcome:
        """Return what came of it."""
        return self._done.pop(number)

    def drop(self, number: int) -> None:
        """Forget what came of it."""
        self._done.pop(number, None)

    def close(self) -> None:
        """Nothing to end."""


class InProcesses:
    """Several processes beside this one, each with a task and a model of its own.

    Weights go to them through one file a version on a memory disk, deltas come back through a pipe.

    Args:
        task: name or file.
        processes: how many, >= 1.
    """

    def __init__(self, task: str, processes: int) -> None:
        self.window = 2 * processes + 1  # so that no process waits for this one
        memory = Path("/dev/shm")  # noqa: S108 - a folder of our own in it
        self._folder = tempfile.TemporaryDirectory(prefix="fedmq-", dir=memory if memory.is_dir() else None)
        self._bases: OrderedDict[int, tuple[ModelImage, Path, set[int]]] = OrderedDict()
        self._pool = ProcessPoolExecutor(
            processes, multiprocessing.get_context("spawn"), initializer=_begin, initargs=(task,)
        )
        self._futures: dict[int, tuple[Future[Outcome], int]] = {}
        self._dropped: list[tuple[Future[Outcome], int, int]] = []
        self._files = 0

    def submit(self, number: int, training: Training) -> None:
        """Queue a training."""
        self._sweep()
        key = id(training.base)
        if key not in self._bases:
            self._files += 1
            path = Path(self._folder.name) / f"{self._files}.safetensors"
            training.base.data.tofile(path)
            self._bases[key] = (training.base, path, set())
        _, path, users = self._bases[key]
        users.add(number)
        context = training.context
        plain = (context.client, context.version, context.seed, dict(context.settings))
        self._futures[number] = (self._pool.submit(_train, str(path), plain), key)

    def take(self, number: int) -> Outcome:
        """Wait for a training."""
        future, key = self._futures.pop(number)
        try:
            outcome = future.result()
        except BrokenProcessPool as error:
            raise FedMQError(f"a training process died (killed, or out of memory): {error}") from error
        self._unused(number, key)
        return outcome

    def drop(self, number: int) -> None:
        """Cancel a training, or forget what comes of it; its weights' file stays until no process reads it."""
        future, key = self._futures.pop(number)
        if future.cancel():
            self._unused(number, key)
        else:
            self._dropped.append((future, number, key))

    def _sweep(self) -> None:
        for entry in [entry for entry in self._dropped if entry[0].done()]:
            self._dropped.remove(entry)
            self._unused(entry[1], entry[2])

    def _unused(self, number: int, key: int) -> None:
        """Remove a file of weights once no training needs it."""
        _, path, users = self._bases[key]
        users.discard(number)
        if not users:
            path.unlink()
            del self._bases[key]

    def close(self) -> None:
        """End the processes."""
        self._pool.shutdown(cancel_futures=True)
        self._folder.cleanup()


_trainer: Trainer | None = None
_images: OrderedDict[str, ModelImage] = OrderedDict()


def _begin(task: str) -> None:
    """Load the task in a new process."""
    global _trainer  # noqa: PLW0603 - one a process
    _trainer = Trainer(Task.load(task))
    one_thread()


def one_thread() -> None:
    """Let torch, if it is there, use one thread: the processes share the cores, and results must not depend on them."""
    try:
        import torch
    except ModuleNotFoundError:
        return
    torch.set_num_threads(1)


def _train(path: str, plain: tuple[str, int, int, dict[str, str]]) -> Outcome:
    """Train in a process of the pool."""
    assert _trainer is not None, "begun"  # noqa: S101
    if path not in _images:
        image = ModelImage(_trainer.layout)
        image.data[:] = np.fromfile(path, np.uint8)
        _images[path] = image
        while len(_images) > BASES_HELD:
            _images.popitem(last=False)
    _images.move_to_end(path)
    return attempt(_trainer, Training(Context(*plain), _images[path]))


def executor_of(task: str, trainer: Trainer, processes: int) -> Executor:
    """Return where to train: this process for one, a pool for more."""
    return InThisProcess(trainer) if processes == 1 else InProcesses(task, processes)
