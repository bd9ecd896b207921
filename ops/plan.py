"""What a demo runs: the options, filled in and checked, and the settings of its programs."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ops.simulation import plan as simulated
from ops.simulation.speeds import Speeds
from shared.compression import AUTO, canonical, downlink_codec
from shared.errors import SettingsError

MEAN_TRIP_S, TRIP_SIGMA = 1, 0.6  # of a worker's mean: log-normal


@dataclass(frozen=True, slots=True)
class Plan:
    """What is run.

    Attributes:
        task: built-in name or file.
        updates: local trainings in all.
        workers: number of devices.
        codec: how updates are encoded.
        downlink: how versions are sent to workers.
        buffer_size: FedBuff's K.
        seed: of everything random.
        out: folder for what it leaves behind.
    """

    task: str
    updates: int
    workers: int
    codec: str
    downlink: str
    buffer_size: int
    seed: int
    out: Path


BUFFER_SIZE = 10  # of FedBuff, where there are as many workers
DEFAULT_UPDATES = {"digits": 3000, "mnist": 1200}


def plan(
    task: str, updates: int | None, workers: int, codec: str, downlink: str | None, buffer_size: int | None, seed: int,
    out: Path | None,
) -> Plan:  # fmt: skip
    """Fill in what depends on the task; the downlink is on unless nothing is compressed at all.

    Raises:
        SettingsError: fewer workers or updates than make sense, or settings that do not fit.
    """
    updates = DEFAULT_UPDATES.get(Path(task).stem, 1000) if updates is None else updates
    buffer_size = min(BUFFER_SIZE, max(1, workers)) if buffer_size is None else buffer_size
    if workers < 1 or buffer_size < 1 or updates < buffer_size:
        raise SettingsError(
            f"--workers {workers}, --buffer-size {buffer_size}, --updates {updates}: at least 1, 1, one buffer"
        )
    name = "demo" if task == "digits" else f"demo-{Path(task).stem}"
    out = out or Path("runs") / name
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SettingsError(f"--out {out} cannot be used: {error.strerror}") from error
    try:
        import matplotlib  # noqa: F401
        import torch  # noqa: F401
    except ModuleNotFoundError as error:
        raise SettingsError(f"the demo needs {error.name}: pip install 'fedmq[demo]'") from error
    codec = canonical(codec)
    downlink = downlink or ("off" if codec == "float32" else "on")
    try:
        downlink_codec(downlink)
    except SettingsError as error:
        raise SettingsError(f"--downlink: {error}") from error
    job = Plan(task, updates, workers, codec, downlink, buffer_size, seed, out)
    if codec != AUTO:  # which only real servers run: it goes by measured times
        simulation(job)
    return job


def simulation(job: Plan) -> simulated.Plan:
    """Return the demo as a simulation: what it runs without servers.

    Raises:
        SettingsError: settings that do not fit.
    """
    own = {key: value for key, value in job_settings(job).items() if key != "job"}
    given = {
        "task": job.task, "clients": job.workers, "concurrency": job.workers, "updates": job.updates,
        "seed": job.seed, "speed": f"lognormal({MEAN_TRIP_S}, {TRIP_SIGMA})",
    }  # fmt: skip
    return simulated.plan_of(own | given, "the demo")


def mean_trips_s(workers: int, seed: int) -> list[float]:
    """Draw each worker's mean seconds per trip: log-normal, the slowest several times the fastest."""
    return [float(x) for x in Speeds(f"lognormal({MEAN_TRIP_S}, {TRIP_SIGMA})", True, workers, seed).means()]


def job_settings(job: Plan) -> dict[str, Any]:
    """Return the settings of the aggregator that are the job's own."""
    return {
        "job": "demo",
        "codec": job.codec,
        "downlink": job.downlink,
        "buffer_size": job.buffer_size,
        "rule": "fedbuff",
        "server_lr": 1.0,
    }
