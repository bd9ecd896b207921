"""A whole installation that is watched: secured servers, exporters, every FedMQ program and a real Prometheus.

Prometheus reads the real prometheus.yml and alerts.yml; only addresses, folders and time windows are rewritten, so that
what takes an hour in earnest takes seconds here.
"""

import json
import os
import re
import shutil
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ops.secured_servers import SecuredServers
from ops.servers import find_program, free_port
from shared.transport.names import REDIS_EXPORTER
from tests.e2e.conftest import Process, Processes

ROOT = Path(__file__).parents[2]
RULES = ROOT / "ops/prometheus/alerts.yml"
CONFIG = ROOT / "ops/prometheus/prometheus.yml"
FAST = {"10m": "8s", "30m": "10s", "1h": "15s", "6h": "60s"}  # windows of the rules
FAST_FOR = "1s"
PROGRAMS = ("a0", "a1", "w0", "w1", "evaluator", "exporter")


def fast_rules(text: str) -> str:
    """Return alert rules with seconds where there were minutes: ranges, offsets and how long an alert pends."""
    text = re.sub(r"\[(\w+)\]", lambda match: f"[{FAST[match[1]]}]", text)
    text = text.replace("store_failures_total[8s])) > 5", "store_failures_total[8s])) > 0")  # it retries each 6 s
    text = re.sub(r"offset (\w+)", lambda match: f"offset {FAST[match[1]]}", text)
    return re.sub(r"\bfor: \w+", f"for: {FAST_FOR}", text)


class Lab:
    """The installation. Programs are named a0, a1 (aggregators), w0, w1 (workers), evaluator, exporter."""

    def __init__(self, folder: Path, processes: Processes, job: str) -> None:
        self.folder, self.processes, self.job = folder, processes, job
        self.servers = SecuredServers((job,))
        self.ports = {name: free_port() for name in (*PROGRAMS, "redis", "prometheus")}
        self.programs: dict[str, Process] = {}
        self._redis_exporter: subprocess.Popen[bytes] | None = None
        self._prometheus: subprocess.Popen[bytes] | None = None

    def start_servers(self) -> None:
        """Start broker, store and the store's exporter."""
        conf = self.servers.rabbitmq.folder / "rabbitmq.conf"
        conf.write_text(conf.read_text() + "\ncollect_statistics_interval = 1000\n")
        self.servers.__enter__()
        secrets, port = self.servers.secrets, self.servers.redis.port
        password = next(iter(json.loads((secrets / "redis-exporter/password.json").read_text()).values()))
        with (self.folder / "redis-exporter.log").open("wb") as log:
            self._redis_exporter = subprocess.Popen(
                [
                    find_program("prometheus-redis-exporter"), "-redis.addr", f"rediss://localhost:{port}",
                    "-redis.user", REDIS_EXPORTER, "-redis.password", password,
                    "-tls-ca-cert-file", f"{secrets}/redis-exporter/ca.pem",
                    "-tls-client-cert-file", f"{secrets}/redis-exporter/client.pem",
                    "-tls-client-key-file", f"{secrets}/redis-exporter/client.key",
                    "-tls-server-cert-file", f"{secrets}/exporter/metrics.pem",
                    "-tls-server-key-file", f"{secrets}/exporter/metrics.key",
                    "-web.listen-address", f"127.0.0.1:{self.ports['redis']}",
                ],
                stdout=log, stderr=log,
            )  # fmt: skip

    def program(self, name: str, command: str, *arguments: str, home: str | None = None, **settings: Any) -> Process:
        """Start a FedMQ program with the settings that `fedmq secrets make` wrote for its role.

        Args:
            name: of this one; its metrics are on the port of that name.
            command: of `fedmq`.
            arguments: more of the command line.
            home: folder of its settings, the command's own unless given.
            settings: FEDMQ_*.
        """
        given: dict[str, Any] = {"config": self.servers.secrets / (home or command) / "fedmq.toml", "wait_s": 60}
        if name in self.ports:
            metrics = self.servers.secrets / command
            given |= {
                "metrics_port": self.ports[name], "metrics_cert": metrics / "metrics.pem",
                "metrics_key": metrics / "metrics.key",
            }  # fmt: skip
        given |= {"job": self.job, "log_level": "warning"} | settings
        self.programs[name] = self.processes.start("ops.cli", command, *arguments, **given)
        return self.programs[name]

    def start_prometheus(self, scrape: str = "1s", rules: str | None = None) -> None:
        """Start Prometheus on the rewritten configuration."""
        folder = self.folder / "prometheus"
        folder.mkdir()
        (folder / "prometheus.yml").write_text(self._config(CONFIG.read_text(), scrape, folder))
        (folder / "alerts.yml").write_text(rules or fast_rules(RULES.read_text()))
        with (folder / "log.txt").open("wb") as log:
            self._prometheus = subprocess.Popen(
                [
                    find_program("prometheus"), f"--config.file={folder}/prometheus.yml",
                    f"--storage.tsdb.path={folder}/data", f"--web.listen-address=127.0.0.1:{self.ports['prometheus']}",
                    "--log.level=warn",
                ],
                stdout=log, stderr=log,
            )  # fmt: skip
        self.until(lambda: bool(self.get("/-/ready")), 20.0, "Prometheus is not ready")

    def _config(self, text: str, scrape: str, folder: Path) -> str:
        """Rewrite addresses, folders and intervals; everything else stays as an installation has it."""
        text = re.sub(r"scrape_interval: \w+", f"scrape_interval: {scrape}", text)
        text = re.sub(r"scrape_timeout: \w+", f"scrape_timeout: {scrape}", text)
        text = re.sub(r"evaluation_interval: \w+", "evaluation_interval: 1s", text)
        text = text.replace("/etc/prometheus/alerts.yml", str(folder / "alerts.yml"))
        text = text.replace("/run/fedmq", str(self.servers.secrets / "prometheus"))
        rabbit = self.servers.prometheus_port
        targets = {
            "aggregator": [self.ports["a0"], self.ports["a1"]], "worker": [self.ports["w0"], self.ports["w1"]],
            "evaluator": [self.ports["evaluator"]], "exporter": [self.ports["exporter"]], "rabbitmq": [rabbit],
            "rabbitmq-queues": [rabbit], "redis": [self.ports["redis"]], "prometheus": [self.ports["prometheus"]],
        }  # fmt: skip
        for name, ports in targets.items():
            found = ", ".join(f'"localhost:{port}"' for port in ports)
            pattern = rf"(- job_name: {name}\n(?:(?!  - job_name)[^\n]*\n)*?) +(?:static|dns_sd)_configs:[^\n]*\n"
            text, count = re.subn(pattern, rf"\1    static_configs: [{{targets: [{found}]}}]\n", text)
            assert count == 1, f"prometheus.yml has no targets for {name}"
        # This one listens without TLS: the test itself asks it a lot.
        return re.sub(r"(- job_name: prometheus\n) +scheme: https\n +tls_config:[^\n]*\n", r"\1", text)

    @property
    def prometheus_url(self) -> str:
        """Where Prometheus answers."""
        return f"http://127.0.0.1:{self.ports['prometheus']}"

    def query(self, expression: str) -> list[dict[str, Any]]:
        """Return the result of an instant query."""
        found = self.get("/api/v1/query", query=expression)
        return list(found["data"]["result"])

    def firing(self) -> set[str]:
        """Return the names of the alerts that fire now."""
        alerts = self.get("/api/v1/alerts")["data"]["alerts"]
        return {alert["labels"]["alertname"] for alert in alerts if alert["state"] == "firing"}

    def until_firing(self, *names: str, timeout_s: float = 120.0) -> None:
        """Wait until each of these alerts has fired since this call."""
        missing = set(names)

        def all_seen() -> bool:
            missing.difference_update(self.firing())
            return not missing

        self.until(all_seen, timeout_s, lambda: f"did not fire: {', '.join(sorted(missing))}")

    def until_clear(self, *names: str, timeout_s: float = 120.0) -> None:
        """Wait until none of these alerts fires."""
        still: set[str] = set(names)

        def clear() -> bool:
            still.clear()
            still.update(self.firing() & set(names))
            return not still

        self.until(clear, timeout_s, lambda: f"still firing: {', '.join(sorted(still))}")

    def until(self, condition: Callable[[], bool], timeout_s: float, what: str | Callable[[], str]) -> None:
        """Wait for a condition; fail with what it was, and with what the programs said last."""
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                if condition():
                    return
            except OSError:
                pass  # not up yet
            if time.monotonic() > deadline:
                logs = "\n".join(f"--- {name}\n{p.log()[-1500:]}" for name, p in self.programs.items())
                raise AssertionError(f"after {timeout_s:g} s: {what if isinstance(what, str) else what()}\n{logs}")
            time.sleep(0.2)

    def get(self, path: str, **parameters: str) -> Any:
        """Return an answer of Prometheus, parsed where it is JSON."""
        url = f"{self.prometheus_url}{path}?{urllib.parse.urlencode(parameters)}"
        try:
            with urllib.request.urlopen(url, timeout=10) as answer:
                body = answer.read()
        except urllib.error.HTTPError as error:
            if error.code >= 500:  # not ready yet
                raise
            raise AssertionError(f"{parameters}: {error.read().decode()}") from error
        return json.loads(body) if body.startswith(b"{") else body

    def rabbitmqctl(self, *arguments: str) -> None:
        """Run RabbitMQ's own command on the private node."""
        environment = os.environ | self.servers.rabbitmq.environment
        command = [find_program("rabbitmqctl"), "-n", environment["RABBITMQ_NODENAME"], *arguments]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done.stdout + done.stderr

    def stop(self) -> None:
        """End everything that is not of `processes`."""
        for process in (self._prometheus, self._redis_exporter):
            if process is not None:
                process.kill()
                process.wait()
        self.servers.__exit__(None, None, None)
        shutil.rmtree(self.folder / "prometheus", ignore_errors=True)
