"""A worker on a device that has little: little network, little disk, few hours - on real servers, as a process."""

import json
import logging
import os
import sys
import textwrap
import threading
import time
import tracemalloc
from datetime import datetime, timedelta
from pathlib import Path

import numpy as np
import pytest

from shared.clock import SystemClock, VirtualClock
from shared.command import DONE
from shared.errors import VersionGone
from shared.messages import encode
from shared.metrics import WorkerMetrics
from shared.store.redis import RedisStore
from shared.transport.rabbitmq import RabbitSink, RabbitSource
from tests.builders import model_of, update_of, weights
from tests.contract.faults import wait_until
from tests.e2e.conftest import Process
from tests.e2e.test_worker_process import Fleet
from worker.outbox import Outbox
from worker.pace import Pace
from worker.publisher import Publisher

TOLERANCE = 0.15


@pytest.fixture
def fleet(processes, task, servers, job):
    return Fleet(processes, task, servers.rabbitmq.url, servers.redis.url, job)


# --- bandwidth


def test_a_model_is_pulled_at_the_rate_it_may(servers, job):
    rate, image = 400_000, model_of(weights(1, 400_000))  # 1.6 MB, 4 s
    RedisStore(servers.redis.url, job).create(image, 0.0)
    store = RedisStore(servers.redis.url, job, pace=Pace(rate, SystemClock()))
    store.head()
    before = time.monotonic()
    assert store.model(0).sha256 == image.sha256
    seconds = time.monotonic() - before
    paid = image.data.size // rate * rate  # the last piece is not waited for
    assert rate * (1 - TOLERANCE) <= paid / seconds <= rate * (1 + TOLERANCE), f"{paid / seconds:,.0f} bytes/s"


def test_an_update_is_published_at_the_rate_it_may_and_heartbeats_go_on(servers, job, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    rate, params = 300_000, 300_000  # 1.2 MB, 4 s
    source = RabbitSource(servers.rabbitmq.url, job, 64)
    source.link.wait_ready(10)
    outbox = Outbox(tmp_path / "a", "a", 10, 2**30)
    outbox.put(encode(update_of(weights(1, params), update_id=outbox.next_id(), job=job)))
    sink = RabbitSink(servers.rabbitmq.url + "?heartbeat=1", "a")  # three of them miss in the time it takes
    sink.link.wait_ready(10)
    arrived, done = [], threading.Event()

    def receive():
        while not done.is_set():
            arrived.extend((time.monotonic(), len(d.body)) for d in source.receive(64, 0.1))

    receiver = threading.Thread(target=receive)
    receiver.start()
    metrics = WorkerMetrics()
    publisher = Publisher(job, "a", outbox, sink, SystemClock(), metrics, 20.0, Pace(rate, SystemClock()))
    assert publisher.step()
    done.set()
    receiver.join()
    sink.close()
    source.close()
    (first_at, first), *rest = arrived
    measured = sum(size for _, size in arrived[:-1]) / (rest[-1][0] - first_at)
    assert rate * (1 - TOLERANCE) <= measured <= rate * (1 + TOLERANCE), f"{measured:,.0f} bytes/s"
    assert first <= 2 * rate + 2**16  # never more than some seconds' worth at once
    assert metrics.sent_bytes._value.get() == sum(size for _, size in arrived)
    assert "lost the broker" not in caplog.text


class Vanishing(Pace):
    """Removes keys once so many pieces were read."""

    def __init__(self, redis, keys, after):
        super().__init__(2048, VirtualClock())
        self._redis, self._keys, self._after = redis, keys, after

    def take(self, size_bytes, timeout_s=float("inf")):
        self._after -= 1
        if self._after < 0:
            self._redis.delete(*self._keys)
        return super().take(size_bytes, timeout_s)


@pytest.mark.parametrize("after", [0, 1, 7])
def test_a_version_that_goes_while_it_is_pulled_is_gone_not_damaged(servers, job, after):
    plain = RedisStore(servers.redis.url, job)
    plain.create(model_of(weights(1, 5000)), 0.0)
    keys = plain._redis.keys(f"fedmq:{{{job}}}:model:*")
    assert len(keys) == 1
    store = RedisStore(servers.redis.url, job, pace=Vanishing(plain._redis, keys, after))
    with pytest.raises(VersionGone, match=r"model:0:0 (went at|is not stored)"):
        store.model(0)
    with pytest.raises(VersionGone, match="is not stored"):
        store.model(0)


def test_snapshots_and_deltas_are_paced_too(servers, job, processes, task):
    fleet = Fleet(processes, task, servers.rabbitmq.url, servers.redis.url, job)
    fleet.aggregator(downlink="on", snapshots="bfloat16", versions_kept=50)
    assert fleet.worker(updates_max=12, downlink_bytes_per_s=100_000).wait(60) == DONE
    wait_until(lambda: fleet.version() == 6, 30.0, fleet.version)
    plain, clock = RedisStore(servers.redis.url, job), VirtualClock()
    paced = RedisStore(servers.redis.url, job, pace=Pace(1024, clock))
    index = plain.published(-1)
    assert index.deltas
    assert index.snapshots
    for entry in index.snapshots:
        assert paced.snapshot(entry).sha256 == plain.snapshot(entry).sha256
    before = clock.time_s
    assert paced.deltas(index.deltas) == plain.deltas(index.deltas)
    assert clock.time_s - before >= sum(entry.size_bytes for entry in index.deltas[:-1]) / 1024


def test_a_stop_ends_a_slow_pull_at_once(servers, job):
    RedisStore(servers.redis.url, job).create(model_of(weights(1, 400_000)), 0.0)
    stop = threading.Event()
    store = RedisStore(servers.redis.url, job, pace=Pace(10_000, SystemClock(), stop))
    threading.Timer(0.5, stop.set).start()
    before = time.monotonic()
    with pytest.raises(VersionGone, match="asked to end"):
        store.model(0)
    assert time.monotonic() - before < 5


def test_a_paced_pull_holds_the_model_and_one_piece(servers, job):
    image = model_of(weights(1, 4_000_000))  # 16 MB
    RedisStore(servers.redis.url, job).create(image, 0.0)
    store = RedisStore(servers.redis.url, job, pace=Pace(10**9, SystemClock()))
    store.head()
    store.layout()
    tracemalloc.start()
    store.model(0)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < image.data.size + 8 * 2**20, f"{peak:,} bytes"  # a piece has 1 MiB, as it is read, parsed and copied


# --- hours and the owner's command


def closed_now():
    """Return allowed hours that are not now, nor soon."""
    opens = datetime.now() + timedelta(hours=6)
    return f"{opens:%H:%M}-{opens + timedelta(hours=1):%H:%M}"


def test_outside_its_hours_a_worker_publishes_and_does_not_train(fleet: Fleet):
    fleet.aggregator(buffer_size=1).wait_for_log("at version 0")
    head = fleet.store.head()
    outbox = Outbox(fleet.outbox(), "a", 100, 2**28)
    outbox.put(
        encode(update_of(np.ones(12, np.float32), update_id=outbox.next_id(), job=fleet.job, layout=head.layout))
    )
    outbox.close()
    worker = fleet.worker(hours=closed_now())
    wait_until(lambda: fleet.applied() == 1, 30.0, worker.log)
    assert worker.log().count("outside FEDMQ_HOURS=") == 1
    before = time.monotonic()
    assert worker.terminate() == DONE  # in the middle of a minute's wait
    assert time.monotonic() - before < 10
    assert "stopped after 0 updates, 0 still in the outbox" in worker.log()


def test_a_command_decides_and_a_stop_ends_it(fleet: Fleet):
    gate = fleet.folder / "go"
    hook = fleet.folder / "hook.sh"
    hook.write_text(f"#!/bin/sh\ntest -e {gate} && exec sleep 1000\necho no sun\nexit 1\n")
    hook.chmod(0o755)
    fleet.aggregator()
    worker = fleet.worker(ready_command=hook)
    worker.wait_for_log("FEDMQ_READY_COMMAND says no, training pauses: no sun")
    assert worker.terminate() == DONE
    gate.touch()
    worker = fleet.worker(ready_command=hook)
    worker.wait_for_log("0 updates waiting")
    before = time.monotonic()
    assert worker.terminate() == DONE  # in the middle of the command
    assert time.monotonic() - before < 10
    assert fleet.numbering()[1] == 0


def test_with_a_yes_it_trains(fleet: Fleet):
    fleet.aggregator()
    worker = fleet.worker(ready_command="true", hours="0-24", updates_max=4)
    assert worker.wait(60) == DONE
    fleet.assert_everything_applied_once("a")


# --- a disk that is full


def small_disk(fleet: Fleet, size, before="true", **variables) -> tuple[Process, Path]:
    """Start a worker in a mount namespace of its own, its state on a disk of so many KiB; both end together.

    What the command `before` writes is on that disk, in the file `ballast`.
    """
    state = fleet.folder / "state"
    state.mkdir(exist_ok=True)
    program = fleet.folder / "on_small_disk.py"
    program.write_text(
        textwrap.dedent(f"""
        import os, sys
        os.execvp("unshare", ["unshare", "--map-root-user", "--mount", "sh", "-c",
            'mount -t tmpfs -o size={size}k none {state} && {{ {before} > {state}/ballast; exec "$@"; }}',
            "sh", {sys.executable!r}, "-m", "worker"])
        """)
    )
    worker = fleet.processes.start(
        "on_small_disk", client_id="a", task=fleet.task, state_dir=state, wait_s=60, **(fleet.urls | variables)
    )
    return worker, Path(f"/proc/{worker.popen.pid}/root") / state.relative_to("/")


def test_a_worker_on_a_full_disk_waits_says_so_and_loses_nothing(fleet: Fleet):
    fleet.aggregator()
    slow = json.dumps({"sleep_s": "0.3"})
    worker, state = small_disk(fleet, 512, disk_free_min_bytes=0, updates_max=6, task_settings=slow)
    worker.wait_for_log("worker a of job")
    wait_until(lambda: fleet.applied() >= 1, 30.0, worker.log)
    fill(state / "ballast")
    worker.wait_for_log("No space left on device: a finished update waits for room")
    made = fleet.applied()
    assert worker.popen.poll() is None
    (state / "ballast").unlink()
    assert worker.wait(60) == DONE
    wait_until(lambda: fleet.applied() == 6, 30.0, lambda: str(fleet.store.totals()))
    assert sorted(int(name.rpartition("/")[2]) for name in fleet.outcomes()) == list(range(6))
    assert made < 6
    assert "Traceback" not in worker.log()


def test_a_worker_that_starts_on_a_full_disk_waits_for_room(fleet: Fleet):
    fleet.aggregator()
    worker, state = small_disk(fleet, 64, before="head -c 65536 /dev/zero", disk_free_min_bytes=0, updates_max=2)
    worker.wait_for_log("is full: No space left on device; waiting for room")
    time.sleep(0.5)
    assert worker.log().count("waiting for room") == 1
    (state / "ballast").unlink()
    assert worker.wait(60) == DONE
    assert "stopped after 2 updates" in worker.log()


def test_room_that_is_to_stay_free_stays_free(fleet: Fleet):
    fleet.aggregator()
    slow = json.dumps({"sleep_s": "1.0"})
    worker, state = small_disk(fleet, 4096, disk_free_min_bytes=2**20, updates_max=3, task_settings=slow)
    worker.wait_for_log("worker a of job")
    fill(state / "ballast", 3500 * 1024)
    worker.wait_for_log("training pauses until there is room")
    (state / "ballast").unlink()
    worker.wait_for_log("training goes on")
    assert worker.wait(60) == DONE
    assert worker.log().count("training pauses until there is room") == 1


def fill(path, size=None):
    """Write until the disk is full, or so many bytes."""
    try:
        with path.open("wb", buffering=0) as file:
            while size is None or file.tell() < size:
                file.write(bytes(512))
    except OSError:
        if size is not None:
            raise


# --- the base install, and logs for machines


BLOCKED = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "sklearn", "matplotlib", "cryptography", "psutil", "scipy"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
"""


@pytest.fixture
def base_install(tmp_path, monkeypatch):
    """Make every process find only what the base install has."""
    folder = tmp_path / "site"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(BLOCKED)
    monkeypatch.setenv("PYTHONPATH", f"{folder}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")


@pytest.mark.usefixtures("base_install")
def test_a_numpy_worker_needs_the_base_install_alone(fleet: Fleet):
    probe = fleet.folder / "needs_torch.py"
    probe.write_text("import torch\n")
    assert fleet.processes.start("needs_torch").wait() == 1  # it is really not there
    fleet.aggregator()
    worker = fleet.worker(updates_max=4, metrics_file=fleet.folder / "fedmq.prom")
    assert worker.wait(60) == DONE, worker.log()
    fleet.assert_everything_applied_once("a")
    check = fleet.processes.start(
        "worker", "--check", client_id="a", task=fleet.task, state_dir=fleet.folder / "state", **fleet.urls
    )
    assert check.wait() == DONE, check.log()
    assert "wrong" not in check.log()


def test_every_line_of_every_program_is_an_object(fleet: Fleet):
    aggregator = fleet.aggregator(log_format="json")
    failing = {"raise_at": "2"}
    worker = fleet.worker(log_format="json", updates_max=2, task_settings=failing)
    assert worker.wait(60) == DONE
    wrong = fleet.worker("b", log_format="json", broker_url="http://x")
    wrong.wait()
    wait_until(lambda: fleet.applied() == 2, 30.0, aggregator.log)
    assert aggregator.terminate() == DONE
    for process, known in ((aggregator, {"job"}), (worker, {"job", "client"}), (wrong, set())):
        events = [json.loads(line) for line in process.log().splitlines()]
        assert events
        assert all(known <= event.keys() for event in events)
    assert any(
        "the sensor is gone" in event.get("exc_info", "") for event in map(json.loads, worker.log().splitlines())
    )
    assert "FEDMQ_BROKER_URL" in json.loads(wrong.log().splitlines()[-1])["message"]
