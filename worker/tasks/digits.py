"""Handwritten digits, 8 x 8 pixels, from scikit-learn: 1,797 images, the last tenth of a fixed shuffle held out.

Settings: `share` (which worker's data), `shares` (how many workers, default 10), `shards` (label shards each,
default 3), `epochs` (default 2), `lr` (default 0.1).
"""

from functools import lru_cache

import numpy as np
import torch

from worker.local_sgd import local_sgd
from worker.task import Context, TrainResult
from worker.tasks.partition import label_shards, share_of


def build() -> torch.nn.Module:
    """Build a two-layer perceptron with 9,610 parameters."""
    torch.set_num_threads(1)  # for layers this small a second thread costs more than it gives
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.ReLU(), torch.nn.Linear(128, 10))


def train(model: torch.nn.Module, context: Context) -> TrainResult:
    """Train on this worker's share."""
    shares = int(context.settings.get("shares", "10"))
    images, labels, _, _ = _data()
    mine = _shares(shares, int(context.settings.get("shards", "3")))[share_of(context.client, context.settings, shares)]
    return local_sgd(
        model, images[mine], labels[mine], lr=float(context.settings.get("lr", "0.1")), seed=context.seed,
        epochs=int(context.settings.get("epochs", "2")), batch_size=16, stopping=context.stopping,
    )  # fmt: skip


def evaluate(model: torch.nn.Module, context: Context) -> dict[str, float]:
    """Measure on the held-out tenth."""
    _, _, images, labels = _data()
    model.eval()
    with torch.no_grad():
        outputs = model(images)
        loss = torch.nn.functional.cross_entropy(outputs, labels)
        return {"accuracy": float((outputs.argmax(1) == labels).float().mean()), "loss": float(loss)}


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
def _shares(shares: int, shards_each: int) -> list[torch.Tensor]:
    return [torch.from_numpy(part) for part in label_shards(_data()[1].numpy(), shares, shards_each, seed=1)]
