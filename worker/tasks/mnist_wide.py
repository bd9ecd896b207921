"""The task `mnist` with a model so large that its small tensors are no share of the bytes."""

import torch

from worker.tasks.mnist import evaluate, example_input, train

__all__ = ["build", "evaluate", "example_input", "train"]


def build() -> torch.nn.Module:
    """Build a convolutional network with 206,954 parameters."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Conv2d(1, 8, 5, stride=2, padding=2), torch.nn.ReLU(),
        torch.nn.Conv2d(8, 16, 5, stride=2, padding=2), torch.nn.ReLU(),
        torch.nn.Flatten(), torch.nn.Linear(16 * 7 * 7, 256), torch.nn.ReLU(), torch.nn.Linear(256, 10),
    )  # fmt: skip
