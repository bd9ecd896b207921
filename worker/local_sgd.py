"""Local SGD on a device's data, plain or proximal."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from worker.task import TrainResult

if TYPE_CHECKING:
    import torch


def local_sgd(
    model: "torch.nn.Module",
    inputs: "torch.Tensor",
    targets: "torch.Tensor",
    *,
    lr: float,
    seed: int,
    epochs: int = 1,
    batch_size: int = 32,
    momentum: float = 0.0,
    proximal: float = 0.0,
    loss: Callable[["torch.Tensor", "torch.Tensor"], "torch.Tensor"] | None = None,
    stopping: Callable[[], bool] = lambda: False,
) -> TrainResult:
    """Take SGD steps on shuffled mini-batches, in place.

        w <- w - lr * (grad loss(w) + proximal * (w - w_start))

    The proximal term keeps a worker with unusual data near the weights it was given.

    Args:
        model: changed in place.
        inputs: [samples, ...], what the model takes.
        targets: [samples, ...], what the loss takes.
        lr: gamma > 0.
        seed: of the shuffling.
        epochs: passes over the data, >= 1.
        batch_size: examples a step, >= 1.
        momentum: of SGD, in [0, 1).
        proximal: mu or rho >= 0; 0 is plain local SGD.
        loss: (outputs, targets) -> scalar; cross-entropy when None.
        stopping: checked at every step; the training ends early when it returns True.

    Returns:
        samples, steps and the mean loss.

    Source: FedProx, Li et al., arXiv:1812.06127, eq. 2; FedAsync, Xie et al., arXiv:1903.03934, eq. 2.
    """
    import torch

    criterion: Any = loss or torch.nn.functional.cross_entropy
    start = [parameter.detach().clone() for parameter in model.parameters()] if proximal else []
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=momentum)
    generator = torch.Generator().manual_seed(seed)
    model.train()
    steps, loss_sum = 0, 0.0
    for _ in range(epochs):
        order = torch.randperm(len(inputs), generator=generator)
        for first in range(0, len(inputs), batch_size):
            if stopping() and steps:
                break
            batch = order[first : first + batch_size]
            optimizer.zero_grad()
            value = criterion(model(inputs[batch]), targets[batch])
            value.backward()
            for parameter, origin in zip(model.parameters(), start, strict=False):
                if parameter.grad is not None:
                    parameter.grad.add_(parameter.detach() - origin, alpha=proximal)
            optimizer.step()
            steps, loss_sum = steps + 1, loss_sum + float(value.detach())
    return TrainResult(num_samples=len(inputs), num_steps=max(1, steps), metrics={"loss": loss_sum / max(1, steps)})
