"""MNIST with a convolutional network of 206,954 parameters: large enough that small tensors are no share of the bytes.

Settings: `share`, `shares` (default 100), `shards` (label shards each, default 2), `samples` (images a worker has,
default 600), `lr` (default 0.05), `batch` (default 20). One epoch.

Source: the pathological split of McMahan et al., arXiv:1602.05629, section 3.
"""

import torch

from worker.local_sgd import local_sgd
from worker.task import Context, TrainResult
from worker.tasks.mnist import evaluate, read_part, shares_of

__all__ = ["build", "evaluate", "train"]


def build() -> torch.nn.Module:
    """Build the model."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Conv2d(1, 8, 5, stride=2, padding=2), torch.nn.ReLU(),
        torch.nn.Conv2d(8, 16, 5, stride=2, padding=2), torch.nn.ReLU(),
        torch.nn.Flatten(), torch.nn.Linear(16 * 7 * 7, 256), torch.nn.ReLU(), torch.nn.Linear(256, 10),
    )  # fmt: skip


def train(model: torch.nn.Module, context: Context) -> TrainResult:
    """Train on this worker's share."""
    settings = context.settings
    shares, samples = int(settings.get("shares", "100")), int(settings.get("samples", "600"))
    images, labels = read_part("train")
    mine = shares_of(shares, int(settings.get("shards", "2")), samples)[int(settings["share"])]
    return local_sgd(
        model, images[mine], labels[mine], lr=float(settings.get("lr", "0.05")), seed=context.seed,
        epochs=1, batch_size=int(settings.get("batch", "20")), stopping=context.stopping,
    )  # fmt: skip
