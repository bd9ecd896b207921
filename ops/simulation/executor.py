"""Where the trainings of a simulation run: in this process, or in others beside it.

A training is a pure function of the weights and the context, so where and when it runs changes nothing but the time it
takes. A cluster engine joins by another `Executor`.
"""

import logging
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import threading
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
from worker.training import Trained, Trainer, Training, seed_everything

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
        seed: of what a task draws when it is imported and built.
    """

    def __init__(self, task: str, processes: int, seed: int) -> None:
        self.window = 2 * processes + 1  # so that no process waits for this one
        memory = Path("/dev/shm")  # noqa: S108 - a folder of our own in it
        self._folder = tempfile.TemporaryDirectory(prefix="fedmq-", dir=memory if memory.is_dir() else None)
        self._bases: OrderedDict[int, tuple[ModelImage, Path, set[int]]] = OrderedDict()
        self._pool = ProcessPoolExecutor(
            processes,
            multiprocessing.get_context("spawn"),
            initializer=_begin,
            initargs=(task, seed, self._folder.name),
        )
        self._futures: dict[int, tuple[Future[Outcome], int]] = {}
        self._dropped: list[tuple[Future[Outcome], int, int]] = []
        self._files = 0

    def submit(self, number: int, training: Training) -> None:
        """Queue a training."""
        self._sweep()
        path, key = self._file_of(training.base), id(training.base)
        self._bases[key][2].add(number)
        context = training.context
        plain = (context.client, context.version, context.seed, dict(context.settings))
        try:
            self._futures[number] = (self._pool.submit(_train, str(path), plain), key)
        except BrokenProcessPool as error:
            raise _died(error) from error

    def _file_of(self, base: ModelImage) -> Path:
        """Return the file with these weights; the newest stays, as more trainings will start from it."""
        key = id(base)
        if key not in self._bases:
            self._files += 1
            path = Path(self._folder.name) / f"{self._files}.safetensors"
            base.data.tofile(path)
            self._bases[key] = (base, path, set())
            for other in list(self._bases)[:-1]:
                self._unused(-1, other)
        return self._bases[key][1]

    def take(self, number: int) -> Outcome:
        """Wait for a training."""
        future, key = self._futures.pop(number)
        try:
            return future.result()
        except BrokenProcessPool as error:
            raise _died(error) from error
        finally:
            self._unused(number, key)

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
        """Remove a file of weights once no training needs it and newer ones are there."""
        _, path, users = self._bases[key]
        users.discard(number)
        if not users and key != next(reversed(self._bases)):
            path.unlink()
            del self._bases[key]

    def close(self) -> None:
        """End the processes, also in the middle of a training."""
        for process in list((self._pool._processes or {}).values()):  # public from Python 3.14 on
            process.kill()
        self._pool.shutdown(cancel_futures=True)
        self._folder.cleanup()


def _died(error: BrokenProcessPool) -> FedMQError:
    return FedMQError(f"a training process died (killed, or out of memory): {error}")


_trainer: Trainer | None = None
_images: OrderedDict[str, ModelImage] = OrderedDict()


def _begin(task: str, seed: int, folder: str) -> None:
    """Load the task in a new process, which ends when the simulator's does, not when its terminal says so."""
    global _trainer  # noqa: PLW0603 - one a process
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, args=(folder,), daemon=True).start()
    seed_everything(seed)
    _trainer = Trainer(Task.load(task))
    seed_everything(seed)  # once more, torch may be there only now: what is built is the same in all processes
    _ = _trainer.layout
    one_thread()


def _end_with_parent(folder: str) -> None:
    """Wait for the simulator to end; if it was killed nobody else ends this process and clears the memory disk."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        shutil.rmtree(folder, ignore_errors=True)
        os._exit(1)


def one_thread() -> None:
    """Let torch, if the task uses it, use one thread: processes share the cores, and the sums must be the same."""
    if (torch := sys.modules.get("torch")) is not None:
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


def executor_of(task: str, trainer: Trainer, processes: int, seed: int) -> Executor:
    """Return where to train: this process for one, a pool for more."""
    return InThisProcess(trainer) if processes == 1 else InProcesses(task, processes, seed)
