"""The task `mnist` with the perceptron of Ringleader's experiments: the cheapest to train.

Source: Maranjyan and Richtarik, arXiv:2509.22860.
"""

import torch

from worker.tasks.mnist import evaluate, example_input, train

__all__ = ["build", "evaluate", "example_input", "train"]


def build() -> torch.nn.Module:
    """Build a perceptron 784-128-10 with 101,770 parameters."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(784, 128), torch.nn.ReLU(), torch.nn.Linear(128, 10))
