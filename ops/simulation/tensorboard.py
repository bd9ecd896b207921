"""Runs as TensorBoard's event files."""

from pathlib import Path

from ops.simulation.run import Result
from ops.tensorboard import writer


def write(result: Result, folder: Path) -> None:
    """Write a run's evaluations, in place of what the folder held of them.

    The step is the number of trips; the wall time is the virtual one, so that TensorBoard's "relative" axis shows it.
    """
    for old in folder.glob("events.out.tfevents.*"):
        old.unlink()
    with writer(folder, "--tensorboard") as events:
        for row in result.history.rows:
            own = {"version": row.version, "staleness_mean": row.staleness_mean, "bytes_sent": row.bytes_sent}
            for name, value in (own | {"bytes_pulled": row.bytes_pulled} | dict(row.metrics)).items():
                events.add_scalar(name, value, row.trips, row.time_s)
