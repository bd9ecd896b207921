"""A device from its enrolment to its end, on servers as an installation has them: it trains, is refused, is thrown out.

What the servers refuse a login act by act is in tests/contract/test_identity*.py.
"""

import json
import os
import re
import shutil
import socket
import ssl
import subprocess
import sys
import threading
import time
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest

from ops import authority
from ops.broker_admin import BrokerAdmin
from ops.devices import Devices
from ops.private_file import toml
from ops.secured_servers import SecuredServers
from shared.command import DONE, FAILED, UNREACHABLE, USAGE
from shared.errors import BrokerUnavailable, SettingsError, Unavailable
from shared.model_image import ModelImage
from shared.store.redis import RedisStore
from shared.store.redis_registry import AuditLog, DeviceRegistry
from tests.contract.faults import wait_until
from tests.e2e.conftest import clean_environment
from tests.secured_fixture import JOB, OTHER, enrolled, operator_settings, secured, urls_of

__all__ = ["secured"]

SETTINGS = {"codec": "float32", "staleness": "constant", "buffer_size": 1, "commit_interval_s": 0.02}
CLOSED_S_MAX = 5.0  # "at once": a revoked device's connections


class Site:
    """An installation and one job of it: its operator's commands, its aggregator, its devices."""

    def __init__(self, servers, processes, task, folder):
        self.servers, self.processes, self.task, self.folder = servers, processes, task, folder
        self.operator = servers.secrets / "operator" / "fedmq.toml"
        self.store = RedisStore(servers.url("operator", "store_url"), JOB)
        self.admin = BrokerAdmin(servers.url("operator", "broker_admin_url"))

    def fedmq(self, *arguments, code=DONE, answer=""):
        """Run a command with the operator's settings; return what it printed."""
        done = subprocess.run(
            [sys.executable, "-m", "ops.cli", *arguments, "--config", str(self.operator)], cwd=self.folder, text=True,
            capture_output=True, env=clean_environment({"PYTHONPATH": str(Path.cwd())}), input=answer, timeout=60,
            check=False,
        )  # fmt: skip
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout + done.stderr

    def aggregator(self, home="aggregator"):
        """Start an aggregator with the settings that `fedmq secrets make` wrote; it makes version 0."""
        start = self.folder / "start.safetensors"
        ModelImage.of({"w": np.zeros((4, 3), np.float32), "steps": np.array([7], np.int64)}).save(start)
        file = self.servers.secrets / home / "fedmq.toml"
        return self.processes.start("aggregator", f"--config={file}", init_model=start, **SETTINGS)

    def worker(self, file, **more):
        """Start a worker with nothing but a device's file and a task."""
        state = self.folder / f"state-{file.stem}"
        return self.processes.start("worker", f"--config={file}", task=self.task, state_dir=state, wait_s=20, **more)

    def applied(self, client):
        """Return how many updates of a client count."""
        entries = [update for entry in self.store.ledger() for update in entry["updates"]]
        return sum(update["outcome"] == "applied" and update["id"].startswith(f"{client}/") for update in entries)

    def log(self, login):
        """Return the kinds of the audit log's events about a login."""
        audit = AuditLog(self.servers.url("operator", "store_url"))
        kinds = [event.kind for event in audit.read() if event.login == login]
        audit.close()
        return kinds


@pytest.fixture
def site(secured, processes, task, tmp_path):
    site = Site(secured, processes, task, tmp_path)
    yield site
    site.store.close()


def test_a_device_joins_with_one_file_trains_and_is_thrown_out(site):
    site.aggregator()
    said = site.fedmq("devices", "enroll", "cam-1", "--job", JOB)
    assert "cam-1.toml is all it needs" in said
    file = site.folder / "cam-1.toml"
    assert file.stat().st_mode & 0o777 == 0o600
    worker = site.worker(file)
    wait_until(lambda: site.applied("cam-1") >= 3, 30, worker.log)
    assert "job-a.cam-1" in site.fedmq("devices", "show", "cam-1", "--job", JOB)

    started = time.monotonic()
    site.fedmq("devices", "revoke", "cam-1", "--job", JOB, "--yes")
    assert site.admin.connections("job-a.cam-1") == []
    print(worker.log(), worker.popen.poll())
    wait_until(lambda: "refuses" in worker.log(), CLOSED_S_MAX, worker.log)
    assert time.monotonic() - started < CLOSED_S_MAX
    time.sleep(20)
    print(worker.log(), worker.popen.poll())
    assert 0
