"""Handwritten digits, 8 x 8 pixels, from scikit-learn: 1,797 images, the last tenth of a fixed shuffle held out.

Settings: those of every worked task (`Training` in `worker/tasks/options.py`), with `epochs` 2, `batch` 16 and `lr`
0.1 by default.
"""

from functools import lru_cache

import numpy as np
import torch

from worker.task import Context, TrainResult
from worker.tasks.classify import measure, train_on
from worker.tasks.options import Training, dealt, read, share_for

DEFAULTS = Training(epochs=2, batch=16, lr=0.1)


def build() -> torch.nn.Module:
    """Build a two-layer perceptron with 9,610 parameters."""
    torch.set_num_threads(1)  # for layers this small a second thread costs more than it gives
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.ReLU(), torch.nn.Linear(128, 10))


def train(model: torch.nn.Module, context: Context) -> TrainResult:
    """Train on this worker's share."""
    options = read(context.settings, DEFAULTS)
    images, labels, _, _ = _data()
    mine = _shares(options.shares, options.partition)[share_for(context.client, options)]
    return train_on(model, images[mine], labels[mine], options, context)


def evaluate(model: torch.nn.Module, context: Context) -> dict[str, float]:
    """Measure on the held-out tenth."""
    _, _, images, labels = _data()
    return measure(model, images, labels)


def example_input() -> torch.Tensor:
    """Return what the model takes: any number of images of 64 pixels."""
    return torch.zeros(2, 64)


@lru_cache
def _data() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return training images [n, 64] and labels [n], then the held-out ones."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(images))
    x = torch.tensor(images[order] / 16.0, dtype=torch.float32)
    y = torch.tensor(labels[order], dtype=torch.int64)
    held_out = len(x) // 10
    return x[:-held_out], y[:-held_out], x[-held_out:], y[-held_out:]


@lru_cache
def _shares(shares: int, partition: str) -> list[torch.Tensor]:
    return [torch.from_numpy(part) for part in dealt(_data()[1].numpy(), shares, partition)]
