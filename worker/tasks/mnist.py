"""MNIST from the standard IDX files in the folder `mnist` under FEDMQ_DATA.

Settings: those of every worked task (`Training` in `worker/tasks/options.py`), and `samples`, the images a worker has
on average (default 1000; fewer where the 60,000 do not go round). `mnist_wide` and `mnist_mlp` are the same task with
other models: the model belongs to the task's name, because all who build it must build the same.
"""

import gzip
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import torch

from shared.errors import SettingsError
from worker.task import Context, TrainResult
from worker.tasks.classify import measure, train_on
from worker.tasks.files import read_bytes
from worker.tasks.options import Training, dealt, read, share_for


@dataclass(frozen=True, slots=True)
class _Options(Training):
    samples: int = 1000


DEFAULTS = _Options()


def build() -> torch.nn.Module:
    """Build a small convolutional network with 28,874 parameters."""
    torch.set_num_threads(1)  # layers this small gain little from a second, and crawl when another process is busy
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Conv2d(1, 8, 5, padding=2), torch.nn.ReLU(), torch.nn.MaxPool2d(2),
        torch.nn.Conv2d(8, 16, 5, padding=2), torch.nn.ReLU(), torch.nn.MaxPool2d(2),
        torch.nn.Flatten(), torch.nn.Linear(16 * 7 * 7, 32), torch.nn.ReLU(), torch.nn.Linear(32, 10),
    )  # fmt: skip


def train(model: torch.nn.Module, context: Context) -> TrainResult:
    """Train on this worker's share."""
    options = read(context.settings, DEFAULTS)
    images, labels = read_part("train")
    dealt_out = shares_of(options.shares, options.partition, options.samples)
    mine = dealt_out[share_for(context.client, options)]
    return train_on(model, images[mine], labels[mine], options, context)


def evaluate(model: torch.nn.Module, context: Context) -> dict[str, float]:
    """Measure on the test images."""
    images, labels = read_part("t10k")
    return measure(model, images, labels)


def example_input() -> torch.Tensor:
    """Return what the model takes: any number of images."""
    return torch.zeros(2, 1, 28, 28)


def _idx(name: str) -> npt.NDArray[np.uint8]:
    """Read one IDX file of unsigned bytes."""
    try:
        raw = gzip.decompress(read_bytes("mnist", f"mnist/{name}.gz"))
    except (OSError, EOFError) as error:
        raise SettingsError(f"$FEDMQ_DATA/mnist/{name}.gz is no gzip file: {error}") from error
    dimensions = raw[3]
    shape = np.frombuffer(raw, ">i4", dimensions, 4)
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * dimensions).reshape(shape)


@lru_cache
def read_part(part: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return images [n, 1, 28, 28], mean 0 and deviation 1, and labels [n]."""
    images = torch.from_numpy(_idx(f"{part}-images-idx3-ubyte").astype(np.float32) / 255.0)
    labels = torch.from_numpy(_idx(f"{part}-labels-idx1-ubyte").astype(np.int64))
    return ((images - 0.1307) / 0.3081).unsqueeze(1), labels


@lru_cache
def shares_of(shares: int, partition: str, samples: int) -> list[torch.Tensor]:
    """Deal the first `shares * samples` training images; return each share's indices."""
    labels = read_part("train")[1].numpy()[: shares * samples]
    return [torch.from_numpy(part) for part in dealt(labels, shares, partition)]
