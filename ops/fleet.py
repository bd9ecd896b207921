"""The processes of a demo on servers: one aggregator, one evaluator, the workers."""

import json
import os
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path
from types import TracebackType

from prometheus_client.parser import text_string_to_metric_families

from ops.plan import Plan, job_settings, mean_trips_s
from ops.servers import free_port
from shared.errors import FedMQError

PROCESS_S_MAX = 120.0  # for a process to come up, or to end after SIGTERM


class Fleet:
    """The processes of one demo on servers."""

    def __init__(self, job: Plan, name: str, broker_url: str, store_url: str, folder: Path) -> None:
        self._job, self._name, self._folder = job, name, folder
        self._urls = {
            "FEDMQ_BROKER_URL": broker_url,
            "FEDMQ_STORE_URL": store_url,
            "FEDMQ_JOB": name,
            "FEDMQ_WAIT_S": "30",
        }
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._stopped: set[str] = set()
        self._ports: dict[str, int] = {}
        self._pulled: dict[str, tuple[int, int]] = {}

    def __enter__(self) -> "Fleet":
        """Nothing runs yet."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Kill what still runs."""
        for process in self._processes.values():
            if process.poll() is None:
                process.kill()
                process.wait()

    def start(self, initial: Path) -> None:
        """Start the aggregator, the evaluator and the workers; the slower ones rest longer between trainings."""
        job = self._job
        given = {f"FEDMQ_{key.upper()}": str(value) for key, value in job_settings(job).items() if key != "job"}
        self._start("aggregator", ["-m", "aggregator"], given | {
            "FEDMQ_INIT_MODEL": str(initial), "FEDMQ_COMMIT_INTERVAL_S": "0.05", "FEDMQ_COMMIT_AGE_MAX_S": "1",
        })  # fmt: skip
        self._start("evaluator", ["-m", "ops.cli", "evaluator"], {"FEDMQ_TASK": job.task, "FEDMQ_POLL_S": "0.2"})
        for index, trip_s in enumerate(mean_trips_s(job.workers, job.seed)):
            settings = json.dumps({"share": str(index), "shares": str(job.workers)})
            port = self._ports[f"worker-{index}"] = free_port()
            self._start(f"worker-{index}", ["-m", "worker"], {
                "FEDMQ_CLIENT_ID": f"worker-{index}", "FEDMQ_TASK": job.task, "FEDMQ_TASK_SETTINGS": settings,
                "FEDMQ_STATE_DIR": str(self._folder / "state"), "FEDMQ_SEED": str(job.seed),
                "FEDMQ_PAUSE_S": f"{0.04 * trip_s:.3f}", "OMP_NUM_THREADS": "1",
                "FEDMQ_METRICS_PORT": str(port),
            })  # fmt: skip

    def check(self) -> None:
        """Raise if a process ended that should run."""
        for name, process in self._processes.items():
            if name not in self._stopped and process.poll() is not None:
                raise FedMQError(f"{name} ended with exit code {process.returncode}; its log ends:\n{self.log(name)}")

    def stop_workers(self) -> None:
        """Have every worker finish and publish what it has."""
        self._stop([name for name in self._processes if name.startswith("worker-")])

    def stop_all(self) -> None:
        """End the rest in good order."""
        self._stop(["aggregator", "evaluator"])

    def published(self) -> int:
        """Count the updates the workers made and got confirmed, from their outboxes."""
        made = 0
        for path in (self._folder / "state" / self._name).glob("*/outbox.json"):
            left = len(list(path.parent.glob("*.update")))
            made += int(json.loads(path.read_text())["next_sequence"]) - left
        return made

    def pulled(self) -> tuple[int, int]:
        """Return what the workers have pulled: bytes, and how often; of each as it was last heard."""
        for name, port in self._ports.items():
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=2) as answer:
                    families = list(text_string_to_metric_families(answer.read().decode()))
            except OSError:  # not up yet, or ended
                continue
            values = {"fedmq_worker_pulled_bytes": 0.0, "fedmq_worker_pulls": 0.0}
            for family in families:
                if family.name in values:
                    values[family.name] = sum(s.value for s in family.samples if s.name.endswith("_total"))
            self._pulled[name] = (int(values["fedmq_worker_pulled_bytes"]), int(values["fedmq_worker_pulls"]))
        return sum(size for size, _ in self._pulled.values()), sum(count for _, count in self._pulled.values())

    def log(self, name: str, chars: int = 1500) -> str:
        """Return the end of a process's log."""
        return (self._folder / f"{name}.log").read_text(errors="replace")[-chars:]

    def _start(self, name: str, arguments: list[str], environment: dict[str, str]) -> None:
        inherited = {
            key: value for key, value in os.environ.items() if not key.startswith("FEDMQ_") or key == "FEDMQ_DATA"
        }
        with (self._folder / f"{name}.log").open("wb") as log:
            self._processes[name] = subprocess.Popen(
                [sys.executable, *arguments], env=inherited | self._urls | environment, stdin=subprocess.DEVNULL,
                stdout=log, stderr=log,
            )  # fmt: skip

    def _stop(self, names: list[str]) -> None:
        self._stopped.update(names)
        for name in names:
            self._processes[name].send_signal(signal.SIGTERM)
        for name in names:
            code = self._processes[name].wait(PROCESS_S_MAX)
            if code != 0:
                raise FedMQError(f"{name} ended with exit code {code}; its log ends:\n{self.log(name)}")
