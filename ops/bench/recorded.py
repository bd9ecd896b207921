"""The deltas on which codecs are measured: Gaussian, Laplace, and a recorded local update of a real network.

The network is a small convolutional one with wide dense layers, about 1M or 10M parameters. It takes some steps on
everybody's examples, as the model of a job in progress has, then `STEPS` on one device's two classes; the difference
is the delta. Seeded, and kept in the temporary folder: the second run reads it.
"""

import hashlib
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from shared.layout import Layout
from shared.vector import Vector

if TYPE_CHECKING:
    import torch

WARM_STEPS, STEPS, BATCH, LEARNING_RATE = 100, 50, 20, 0.05
SEED = 20
SPREAD = 10.0  # how far the scales of the synthetic tensors lie apart, as in real networks
CONVOLUTIONS = (32, 64)  # channels


@dataclass(frozen=True, slots=True)
class Delta:
    """A vector to compress.

    Attributes:
        name: what it is.
        values: float32 [layout.num_params].
        layout: of the real network, for the synthetic ones as well.
    """

    name: str
    values: Vector
    layout: Layout


def deltas(num_params: int) -> list[Delta]:
    """Return the real delta of about so many parameters, and two synthetic ones of its layout."""
    real = recorded(num_params)
    return [real, synthetic("Gaussian", real.layout), synthetic("Laplace", real.layout)]


def synthetic(name: str, layout: Layout) -> Delta:
    """Draw Gaussian or Laplace values; each tensor has a standard deviation between 3e-4 and 3e-3."""
    rng = np.random.default_rng(SEED)
    values = np.empty(layout.num_params, np.float32)
    scales = 3e-4 * SPREAD ** rng.random(len(layout.averaged))
    for spec, scale in zip(layout.averaged, scales.tolist(), strict=True):
        draw = rng.standard_normal(spec.size) if name == "Gaussian" else rng.laplace(0, np.sqrt(0.5), spec.size)
        values[spec.offset : spec.offset + spec.size] = draw * scale
    return Delta(name, values, layout)


def recorded(num_params: int) -> Delta:
    """Train and return the delta, or read it if that was done before."""
    source = "MNIST" if os.environ.get("FEDMQ_DATA") else "sklearn digits (FEDMQ_DATA is not set)"
    key = f"{source} {num_params} {WARM_STEPS} {STEPS} {BATCH} {LEARNING_RATE} {SEED} {CONVOLUTIONS}"
    path = Path(tempfile.gettempdir()) / f"fedmq-bench-{hashlib.sha256(key.encode()).hexdigest()[:16]}.npz"
    if not path.exists():
        tensors = _train(num_params)
        partial = path.with_suffix(f".{os.getpid()}.npz")
        np.savez(partial, **tensors)
        partial.replace(path)
    with np.load(path) as saved:
        tensors = {name: saved[name] for name in saved.files}
    layout = Layout.of([(name, tensor.shape, "float32") for name, tensor in tensors.items()])
    return Delta(f"real update, {source}", layout.flatten(tensors), layout)


def _train(num_params: int) -> dict[str, Any]:
    """Return name -> weights after minus weights before the device's steps."""
    import torch

    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    images, labels = _examples()
    model = _network(num_params, images.shape[-1])
    _steps(model, images, labels, WARM_STEPS)
    before = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    mine = torch.nonzero(labels < 2).flatten()
    _steps(model, images[mine], labels[mine], STEPS)
    return {name: (tensor - before[name]).numpy() for name, tensor in model.state_dict().items()}


def _steps(model: "torch.nn.Module", images: "torch.Tensor", labels: "torch.Tensor", steps: int) -> None:
    """Take seeded SGD steps in place."""
    from worker.local_sgd import local_sgd

    count = steps * BATCH
    chosen = np.random.default_rng(SEED).choice(len(labels), count, replace=count > len(labels))
    local_sgd(model, images[chosen], labels[chosen], lr=LEARNING_RATE, seed=SEED, batch_size=BATCH)


def _network(num_params: int, side: int) -> "torch.nn.Module":
    """Build convolutions and two dense layers of w hidden units: flat * w + w * w / 4 + ... parameters in all."""
    from torch import nn

    first, second = CONVOLUTIONS
    flat = second * (side // 4) ** 2
    # num_params = a w^2 + b w + c, with a second dense layer of w / 4 units
    a, b, c = 0.25, flat + 1 + 0.25 + 2.5, 26.0 * first + 25.0 * first * second + second + 10
    wide = int((-b + np.sqrt(b * b + 4 * a * (num_params - c))) / (2 * a))
    return nn.Sequential(
        nn.Conv2d(1, first, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(first, second, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(flat, wide), nn.ReLU(), nn.Linear(wide, wide // 4), nn.ReLU(), nn.Linear(wide // 4, 10),
    )  # fmt: skip


def _examples() -> tuple["torch.Tensor", "torch.Tensor"]:
    """Return images [n, 1, side, side], mean 0 and deviation about 1, and labels [n]."""
    import torch

    if os.environ.get("FEDMQ_DATA"):
        from worker.tasks.mnist import read_part

        return read_part("train")
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1)
    return (images - images.mean()) / images.std(), torch.tensor(digits.target)
