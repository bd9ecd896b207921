"""Local SGD on a device's data, plain or proximal."""

from collections.abc import Callable, Iterator
from itertools import islice
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
    steps: int = 0,
    batch_size: int = 32,
    momentum: float = 0.0,
    proximal: float = 0.0,
    clip: float = 0.0,
    weights: "torch.Tensor | None" = None,
    loss: Callable[["torch.Tensor", "torch.Tensor"], "torch.Tensor"] | None = None,
    stopping: Callable[[], bool] = lambda: False,
) -> TrainResult:
    """Take SGD steps on shuffled mini-batches, in place.

        g = grad loss(w),   g <- g min(1, clip / |g|)
        w <- w - lr (g + proximal (w - w_start))

    The proximal term keeps a worker with unusual data near the weights it was given; it is not clipped, or a loss
    that explodes would silence it.

    Args:
        model: changed in place.
        inputs: [samples, ...], what the model takes.
        targets: [samples, ...], what the loss takes.
        lr: gamma > 0.
        seed: of the shuffling.
        epochs: passes over the data, >= 1.
        steps: take exactly so many steps instead, over as many freshly shuffled epochs as that needs; 0: by epochs.
        batch_size: examples a step, >= 1.
        momentum: of SGD, in [0, 1).
        proximal: mu or rho >= 0; 0 is plain local SGD.
        clip: largest L2 norm of the gradient of all parameters together, >= 0; 0 is no clipping.
        weights: [samples], >= 0 with a sum above 0 in every mini-batch; a step's loss is then
            sum_i w_i l_i / sum_i w_i over its examples.
        loss: (outputs, targets) -> scalar, or one value per example, [batch, ...], where there are weights;
            cross-entropy when None.
        stopping: checked at every step; the training ends early when it returns True.

    Returns:
        samples, steps and the mean loss.

    Source: FedProx, Li et al., arXiv:1812.06127, eq. 2; FedAsync, Xie et al., arXiv:1903.03934, eq. 2.
    """
    import torch

    parameters = list(model.parameters())
    start = [parameter.detach().clone() for parameter in parameters] if proximal else []
    optimizer = torch.optim.SGD(parameters, lr=lr, momentum=momentum)
    model.train()
    taken, loss_sum = 0, 0.0
    for batch in _batches(len(inputs), batch_size, epochs, steps, seed):
        if stopping() and taken:
            break
        optimizer.zero_grad()
        value = _loss(model(inputs[batch]), targets[batch], loss, None if weights is None else weights[batch])
        value.backward()  # type: ignore[no-untyped-call]
        if clip:
            torch.nn.utils.clip_grad_norm_(parameters, clip)
        for parameter, origin in zip(parameters, start, strict=False):
            if parameter.grad is not None:
                parameter.grad.add_(parameter.detach() - origin, alpha=proximal)
        optimizer.step()
        taken, loss_sum = taken + 1, loss_sum + float(value.detach())
    return TrainResult(num_samples=len(inputs), num_steps=max(1, taken), metrics={"loss": loss_sum / max(1, taken)})


def _batches(samples: int, batch_size: int, epochs: int, steps: int, seed: int) -> Iterator["torch.Tensor"]:
    """Yield the indices of so many mini-batches, every epoch in an order of its own."""
    import torch

    generator = torch.Generator().manual_seed(seed)

    def endless() -> Iterator[torch.Tensor]:
        while True:
            yield from torch.split(torch.randperm(samples, generator=generator), batch_size)

    return islice(endless(), steps or epochs * -(-samples // batch_size))


def _loss(
    outputs: "torch.Tensor", targets: "torch.Tensor", criterion: Any, weights: "torch.Tensor | None"
) -> "torch.Tensor":
    """Return the loss of a mini-batch: its examples' mean, or their mean by weight."""
    import torch

    if weights is None:
        value: torch.Tensor = (criterion or torch.nn.functional.cross_entropy)(outputs, targets)
        return value
    each = criterion(outputs, targets) if criterion else _cross_entropies(outputs, targets)
    each = each.reshape(len(weights), -1).mean(1)  # of a sequence, the mean over its places
    return (weights * each).sum() / weights.sum()


def _cross_entropies(outputs: "torch.Tensor", targets: "torch.Tensor") -> "torch.Tensor":
    import torch

    return torch.nn.functional.cross_entropy(outputs, targets, reduction="none")
