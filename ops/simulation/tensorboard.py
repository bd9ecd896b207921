"""Runs as TensorBoard's event files; its package is an extra."""

from pathlib import Path

from ops.simulation.run import Result
from shared.errors import SettingsError


def check() -> None:
    """See to it that the package is there.

    Raises:
        SettingsError: it is not.
    """
    try:
        import torch.utils.tensorboard  # noqa: F401
    except ImportError as error:
        raise SettingsError(f"--tensorboard: {error}; pip install 'fedmq[tensorboard]'") from error


def write(result: Result, folder: Path) -> None:
    """Write a run's evaluations, in place of what the folder held of them.

    The step is the number of trips; the wall time is the virtual one, so that TensorBoard's "relative" axis shows it.
    """
    from torch.utils.tensorboard import SummaryWriter

    for old in folder.glob("events.out.tfevents.*"):
        old.unlink()
    with SummaryWriter(str(folder)) as writer:
        for row in result.history.rows:
            own = {"version": row.version, "staleness_mean": row.staleness_mean, "bytes_sent": row.bytes_sent}
            for name, value in (own | {"bytes_pulled": row.bytes_pulled} | dict(row.metrics)).items():
                writer.add_scalar(name, value, row.trips, row.time_s)
