"""MNIST from the standard IDX files in the folder `mnist` under FEDMQ_DATA.

Settings: `share`, `shares` (default 10), `shards` (label shards each, default 3), `samples` (images a worker has,
default 1000), `epochs` (default 1), `lr` (default 0.05), `batch` (default 20).
"""

import gzip
import os
from functools import lru_cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from shared.errors import SettingsError
from worker.local_sgd import local_sgd
from worker.task import Context, TrainResult
from worker.tasks.partition import label_shards, share_of


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
    settings = context.settings
    shares, samples = int(settings.get("shares", "10")), int(settings.get("samples", "1000"))
    images, labels = read_part("train")
    dealt = shares_of(shares, int(settings.get("shards", "3")), samples)
    mine = dealt[share_of(context.client, settings, shares)]
    return local_sgd(
        model, images[mine], labels[mine], lr=float(settings.get("lr", "0.05")), seed=context.seed,
        epochs=int(settings.get("epochs", "1")), batch_size=int(settings.get("batch", "20")), stopping=context.stopping,
    )  # fmt: skip


def evaluate(model: torch.nn.Module, context: Context) -> dict[str, float]:
    """Measure on the test images."""
    images, labels = read_part("t10k")
    model.eval()
    with torch.no_grad():
        outputs = model(images)
        loss = torch.nn.functional.cross_entropy(outputs, labels)
        return {"accuracy": float((outputs.argmax(1) == labels).float().mean()), "loss": float(loss)}


def _idx(name: str) -> npt.NDArray[np.uint8]:
    """Read one IDX file of unsigned bytes."""
    data = os.environ.get("FEDMQ_DATA")
    if not data:
        raise SettingsError(
            "the mnist task reads its files from $FEDMQ_DATA/mnist: set FEDMQ_DATA to that folder's parent"
        )
    path = Path(data) / "mnist" / f"{name}.gz"
    try:
        raw = gzip.decompress(path.read_bytes())
    except OSError as error:
        raise SettingsError(f"cannot read {path}: {error}") from error
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
def shares_of(shares: int, shards_each: int, samples: int) -> list[torch.Tensor]:
    """Deal the first `shares * samples` training images; return each share's indices."""
    labels = read_part("train")[1].numpy()[: shares * samples]
    return [torch.from_numpy(part) for part in label_shards(labels, shares, shards_each, seed=1)]
