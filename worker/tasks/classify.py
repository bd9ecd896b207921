"""What the tasks that put images into classes have in common."""

import torch

from worker.local_sgd import local_sgd
from worker.task import Context, TrainResult
from worker.tasks.options import Training

AT_ONCE = 250  # images measured together: what a small convolution makes of them stays in the processor's cache


def train_on(
    model: torch.nn.Module, inputs: torch.Tensor, labels: torch.Tensor, options: Training, context: Context
) -> TrainResult:
    """Train on a client's examples as its options say.

    Args:
        model: changed in place.
        inputs: [examples, ...].
        labels: int64 [examples].
        options: of the training.
        context: the seed, and when to stop.
    """
    return local_sgd(
        model, inputs, labels, lr=options.lr, seed=context.seed, epochs=options.epochs, steps=options.steps,
        batch_size=options.batch, momentum=options.momentum, proximal=options.proximal, clip=options.clip,
        weights=class_weights(labels) if options.weight == "class" else None, stopping=context.stopping,
    )  # fmt: skip


def class_weights(labels: torch.Tensor) -> torch.Tensor:
    """Weigh each example by one over how many of its class there are, float32 [examples], with mean 1.

        w_i = examples / (classes present * examples of i's class)

    Args:
        labels: int64 [examples], at least one.
    """
    counts = torch.bincount(labels)
    return len(labels) / (torch.count_nonzero(counts) * counts[labels]).float()


def measure(model: torch.nn.Module, inputs: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
    """Measure on held-out examples.

    Args:
        model: put into evaluation mode.
        inputs: [examples, ...].
        labels: int64 [examples].

    Returns:
        accuracy, loss, and accuracy_class_<c> of every class there is.
    """
    model.eval()
    with torch.no_grad():
        outputs = torch.cat([model(part) for part in torch.split(inputs, AT_ONCE)])
        loss = float(torch.nn.functional.cross_entropy(outputs, labels))
    right = (outputs.argmax(1) == labels).double()
    examples = torch.bincount(labels)
    shares = (torch.bincount(labels, weights=right) / examples).tolist()
    by_class = {f"accuracy_class_{c}": share for c, share in enumerate(shares) if examples[c]}
    return {"accuracy": float(right.mean()), "loss": loss} | by_class
