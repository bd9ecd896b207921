"""Real processes with settings of their own, on the suite's own servers."""

import contextlib
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.servers_fixture import servers

__all__ = ["servers"]

# Every training adds 1 to every weight: with equal weights, version v holds v everywhere, however many workers.
NUMPY_TASK = """
import sys
import time

import numpy as np

from worker.task import TrainResult

calls = 0


def build():
    return {"w": np.zeros((4, 3), np.float32), "steps": np.array([7], np.int64)}


def train(model, context):
    global calls
    calls += 1
    settings = context.settings
    if str(calls) in settings.get("raise_at", "").split("-"):
        raise ValueError("the sensor is gone")
    time.sleep(float(settings.get("sleep_s", "0.02")))
    while calls > int(settings.get("trainings", "1000000")) and not context.stopping():
        time.sleep(0.02)
    model["w"] += np.nan if str(calls) in settings.get("nan_at", "").split("-") else 1
    return TrainResult(5, 2, {"loss": 0.5, "torch": float("torch" in sys.modules)})


def evaluate(model, context):
    return {"accuracy": 0.75, "loss": float(model["w"].sum())}
"""


@pytest.fixture
def job() -> str:
    """Return the id of a job of this test alone."""
    return f"job-{uuid.uuid4().hex[:12]}"


@dataclass(frozen=True)
class Process:
    """A running `python -m ...` and its log."""

    popen: "subprocess.Popen[bytes]"
    log_file: Path

    def log(self) -> str:
        """Return what it wrote so far."""
        return self.log_file.read_text(errors="replace")

    def wait_for_log(self, text: str, timeout_s: float = 20.0, count: int = 1) -> None:
        """Wait until its log holds `text` so often; fail with the log when it ends or takes too long."""
        deadline = time.monotonic() + timeout_s
        while self.log().count(text) < count:
            ended = self.popen.poll() is not None and self.log().count(text) < count
            assert not ended and time.monotonic() < deadline, f"no {text!r} in the log:\n{self.log()[-4000:]}"
            time.sleep(0.02)

    def wait(self, timeout_s: float = 20.0) -> int:
        """Wait for its end; return the exit code."""
        try:
            return self.popen.wait(timeout_s)
        except subprocess.TimeoutExpired:
            pytest.fail(f"still running after {timeout_s:g} s; its log ends:\n{self.log()[-4000:]}")

    def terminate(self, timeout_s: float = 20.0) -> int:
        """Send SIGTERM, wait for its end; return the exit code."""
        self.popen.send_signal(signal.SIGTERM)
        return self.wait(timeout_s)

    def kill(self) -> None:
        """End it at once, as a crash would."""
        self.popen.kill()
        self.popen.wait()


class Processes:
    """Starts processes in a clean environment and ends them with the test."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._running: list[Process] = []

    def start(self, module: str, *arguments: str, **variables: Any) -> Process:
        """Start `python -m module arguments` with the `FEDMQ_*` variables given (`job=` is `FEDMQ_JOB`), no others."""
        log_file = self.folder / f"{len(self._running):02d}-{module}.log"
        given = {f"FEDMQ_{name.upper()}": str(value) for name, value in variables.items()}
        with log_file.open("wb") as log:
            popen = subprocess.Popen(
                [sys.executable, "-m", module, *arguments], cwd=self.folder, env=clean_environment(given),
                stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
            )  # fmt: skip
        self._running.append(Process(popen, log_file))
        return self._running[-1]

    def end(self) -> None:
        """Kill what still runs."""
        for process in self._running:
            with contextlib.suppress(ProcessLookupError):
                process.popen.kill()
        for process in self._running:
            process.popen.wait()


def clean_environment(given: Mapping[str, str]) -> dict[str, str]:
    """Return this environment without its FEDMQ_ variables, and with those given."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("FEDMQ_")}
    return inherited | {"OMP_NUM_THREADS": "1", "COLUMNS": "200"} | dict(given)


@pytest.fixture
def processes(tmp_path: Path) -> Iterator[Processes]:
    """Yield a starter of processes; their logs lie in tmp_path."""
    starter = Processes(tmp_path)
    yield starter
    starter.end()


@pytest.fixture
def task(tmp_path: Path) -> Path:
    """Write a task of plain numpy; return its file."""
    path = tmp_path / "numpy_task.py"
    path.write_text(NUMPY_TASK)
    return path
