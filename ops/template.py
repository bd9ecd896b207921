"""`fedmq init my_task.py`: a commented task that runs as it is."""

from pathlib import Path

from shared.errors import SettingsError

TEMPLATE = '''"""A FedMQ task: what one device trains. Run it with

    fedmq models init {name} --job my-job        once, where the model's first version is made
    fedmq aggregator --job my-job                on the server
    fedmq worker --task {name} --job my-job      on every device
    fedmq evaluator --task {name} --job my-job   where held-out data is

Try it at once, without servers:  fedmq demo --task {name}
"""

import torch

from worker.local_sgd import local_sgd
from worker.task import Context, TrainResult


def build() -> torch.nn.Module:
    """Your model. Every device and the server must build the same tensors.

    Tensors of one dimension or fewer than 1,000 elements travel as float16 whatever the codec.
    """
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(20, 64), torch.nn.ReLU(), torch.nn.Linear(64, 2))


def train(model: torch.nn.Module, context: Context) -> TrainResult:
    """Train `model` in place on this device's data; it already holds the newest weights.

    context.client    this device's id            context.seed      new for every training, reproducible
    context.version   the version it starts from  context.settings  yours: FEDMQ_TASK_SETTINGS="a=1,b=2"
    context.stopping() is True once the worker was asked to end: a long training may return early.

    Write your own loop if you like: change the weights in place and return
    TrainResult(num_samples, num_steps, metrics).
    """
    inputs, targets = local_data(context)
    return local_sgd(
        model,
        inputs,
        targets,
        lr=0.1,
        epochs=1,
        batch_size=16,
        proximal=0.0,  # above 0 (0.01, say) keeps devices with unusual data together: FedProx
        seed=context.seed,
    )


def evaluate(model: torch.nn.Module, context: Context) -> dict[str, float]:
    """Optional: measure on data no device trains on. `accuracy` and `loss` are drawn in reports."""
    inputs, targets = made_up_data(seed=12345, samples=500)
    model.eval()
    with torch.no_grad():
        outputs = model(inputs)
    loss = torch.nn.functional.cross_entropy(outputs, targets)
    return {{"accuracy": float((outputs.argmax(1) == targets).float().mean()), "loss": float(loss)}}


def example_input() -> torch.Tensor:
    """Optional: what the model takes, for `fedmq models export model.onnx --task {name}`. Two rows: any number."""
    return torch.zeros(2, 20)


def local_data(context: Context) -> tuple[torch.Tensor, torch.Tensor]:
    """Replace this: read the data that lies on this device.

    To try devices that differ on one data set, deal it; `settings` may name a partition and the number of shares:
        from worker.tasks.partition import deal, share_of
        parts = deal(labels, shares=10, how="dirichlet(alpha=0.3)", seed=1)
        mine = parts[share_of(context.client, context.settings, shares=10)]
    """
    return made_up_data(seed=sum(context.client.encode()), samples=200)


def made_up_data(seed: int, samples: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Points of two classes, told apart by the sign of a sum."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(samples, 20, generator=generator)
    return inputs, (inputs[:, :10].sum(1) > 0).long()
'''


def write(path: Path) -> None:
    """Write the template.

    Raises:
        SettingsError: the file exists, or cannot be written.
    """
    if path.exists():
        raise SettingsError(f"{path} exists already: choose another name")
    try:
        path.write_text(TEMPLATE.format(name=path))
    except OSError as error:
        raise SettingsError(f"cannot write {path}: {error.strerror}") from error
    print(f"wrote {path}; try it with: fedmq demo --task {path}")
