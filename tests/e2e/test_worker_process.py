"""Workers and an aggregator as processes, with a task of plain numpy: outages, crashes, mistakes in the task.

Every training adds 1 to every weight and all updates weigh the same, so version v must hold v everywhere; and the
ledger must hold every sequence number of a worker once.
"""

import json
import signal
import time
from collections import Counter

import numpy as np
import pytest

from ops.servers import free_port, private_rabbitmq, private_redis, stop_port_mapper
from shared.command import DONE, INTERRUPTED, USAGE
from shared.model_image import ModelImage
from shared.store.redis import RedisStore
from tests.contract.faults import frozen, wait_until
from tests.e2e.conftest import NUMPY_TASK

JOB = {
    "codec": "float32",
    "staleness": "constant",
    "buffer_size": 2,
    "commit_interval_s": 0.02,
    "commit_age_max_s": 0.3,
}
BACK_S_MAX = 60.0  # both ends back off for up to 15 s while a server is away


class Fleet:
    """One job: starts its programs and looks at what became of it."""

    def __init__(self, processes, task, broker_url, store_url, job):
        self.processes, self.task, self.job = processes, task, job
        self.urls = {"broker_url": broker_url, "store_url": store_url, "job": job}
        self.store = RedisStore(store_url, job)
        self.folder = task.parent

    def aggregator(self, **variables):
        """Start an aggregator that makes version 0 when there is none."""
        start = self.folder / "start.safetensors"
        image = ModelImage.of({"w": np.zeros((4, 3), np.float32), "steps": np.array([7], np.int64)})
        image.save(start)
        return self.processes.start("aggregator", **(self.urls | JOB | {"init_model": start} | variables))

    def worker(self, client="a", task_settings=None, **variables):
        """Start a worker."""
        return self.processes.start(
            "worker", client_id=client, task=self.task, state_dir=self.folder / "state", wait_s=BACK_S_MAX,
            task_settings=json.dumps(task_settings or {}), **(self.urls | variables),
        )  # fmt: skip

    def outbox(self, client="a"):
        """Return the folder of a worker's outbox."""
        return self.folder / "state" / self.job / client

    def waiting(self, client="a"):
        """Return how many updates wait in a worker's outbox."""
        return len(list(self.outbox(client).glob("*.update")))

    def numbering(self, client="a"):
        """Return incarnation and next sequence number of a worker."""
        known = json.loads((self.outbox(client) / "outbox.json").read_text())
        return known["incarnation"], known["next_sequence"]

    def outcomes(self):
        """Return id -> what became of it, duplicates aside; each once, or the test fails."""
        settled = Counter()
        outcomes = {}
        for entry in self.store.ledger():
            for update in entry["updates"]:
                if update["outcome"] != "duplicate":
                    settled[update["id"]] += 1
                    outcomes[update["id"]] = update["outcome"]
        assert set(settled.values()) <= {1}, f"settled more than once: {settled.most_common(3)}"
        return outcomes

    def applied(self):
        """Return how many updates were applied so far."""
        return self.store.totals().get("applied", 0)

    def version(self):
        """Return the newest version, -1 when there is none."""
        head = self.store.head()
        return -1 if head is None else head.version

    def assert_everything_applied_once(self, *clients):
        """Wait until every update these workers ever made is applied; check the ids, the model and the versions."""
        made = {f"{c}/{self.numbering(c)[0]}/{n}" for c in clients for n in range(self.numbering(c)[1])}
        wait_until(
            lambda: self.applied() >= len(made), BACK_S_MAX,
            lambda: f"made {len(made)}, but {self.store.totals()}; never came: {sorted(made - set(self.outcomes()))}",
        )  # fmt: skip
        assert self.outcomes() == dict.fromkeys(made, "applied")
        assert self.version() == len(made) // JOB["buffer_size"]
        image = self.store.model(self.version())
        assert (image.weights == self.version()).all()
        assert image.tensors()["steps"].tolist() == [7]


@pytest.fixture
def fleet(processes, task, servers, job):
    """Yield a job on the suite's servers."""
    return Fleet(processes, task, servers.rabbitmq.url, servers.redis.url, job)


@pytest.fixture(scope="module")
def own_rabbitmq(tmp_path_factory):
    """Yield a RabbitMQ that the tests of this file may stop."""
    server = private_rabbitmq(tmp_path_factory.mktemp("rabbitmq"))
    server.start()
    yield server
    server.stop()
    stop_port_mapper(server)


def test_workers_train_and_versions_advance_until_sigterm(fleet: Fleet):
    aggregator = fleet.aggregator()
    workers = [fleet.worker(client) for client in ("a", "b")]
    wait_until(lambda: fleet.applied() >= 30 and len(fleet.store.status()["clients"]) == 2, 30)
    started = time.monotonic()
    for worker in workers:
        worker.popen.send_signal(signal.SIGTERM)
    assert [worker.wait(10) for worker in workers] == [DONE, DONE]
    assert time.monotonic() - started < 8  # each is busy for some 20 ms; the rest is slack for a shared machine
    assert (fleet.waiting("a"), fleet.waiting("b")) == (0, 0)
    assert "still in the outbox" in workers[0].log()
    fleet.assert_everything_applied_once("a", "b")
    assert aggregator.terminate(10) == DONE
    assert f"stopped at version {fleet.version()}" in aggregator.log()
    for client in fleet.store.status()["clients"].values():
        assert client["metrics"] == {"loss": 0.5, "torch": 0.0}  # a task without torch never loads it
    for process in (aggregator, *workers):
        assert "Traceback" not in process.log()


def test_a_worker_that_comes_first_waits_for_the_aggregator_and_the_model(fleet: Fleet):
    worker = fleet.worker(updates_max=3)
    worker.wait_for_log("has not started yet: waiting for an aggregator and a model")
    aggregator = fleet.processes.start("aggregator", **(fleet.urls | JOB))
    aggregator.wait_for_log("has no model yet")
    init = fleet.processes.start("ops.cli", "models", "init", str(fleet.task), **fleet.urls)
    assert init.wait() == DONE
    assert worker.wait() == DONE  # after three updates
    assert "stopped after 3 updates, 0 still in the outbox" in worker.log()
    assert worker.log().count("has not started yet") == 1
    fleet.assert_everything_applied_once("a")


def test_updates_of_an_aggregator_that_is_away_wait_in_the_queue(fleet: Fleet):
    aggregator = fleet.aggregator()
    worker = fleet.worker()
    wait_until(lambda: fleet.applied() >= 4, 30)
    aggregator.kill()
    made = fleet.numbering()[1]
    wait_until(lambda: fleet.numbering()[1] >= made + 10, 20)
    assert worker.terminate() == DONE  # its outbox is empty: the broker has them all
    assert fleet.waiting() == 0
    fleet.aggregator()
    fleet.assert_everything_applied_once("a")


def test_while_the_broker_is_away_the_outbox_fills_and_is_emptied_later(processes, task, servers, job, own_rabbitmq):
    fleet = Fleet(processes, task, own_rabbitmq.url, servers.redis.url, job)
    fleet.aggregator()
    worker = fleet.worker(outbox_updates_max=5)
    wait_until(lambda: fleet.applied() >= 4, 30)
    own_rabbitmq.stop()
    worker.wait_for_log("the outbox is full (5 updates): training pauses")
    _, made = fleet.numbering()
    time.sleep(0.5)  # 20 trainings, if it did not pause
    assert (fleet.waiting(), fleet.numbering()[1]) == (5, made)
    own_rabbitmq.start()
    wait_until(lambda: fleet.numbering()[1] >= made + 5, BACK_S_MAX, worker.log)
    assert worker.terminate(30) == DONE
    assert fleet.waiting() == 0
    fleet.assert_everything_applied_once("a")


def test_a_killed_worker_goes_on_where_it_was(processes, task, servers, job, own_rabbitmq):
    fleet = Fleet(processes, task, own_rabbitmq.url, servers.redis.url, job)
    fleet.aggregator()
    worker = fleet.worker(outbox_updates_max=4)
    wait_until(lambda: fleet.applied() >= 2, 30)
    with frozen(own_rabbitmq):  # what it sends from now on is perhaps received, but not confirmed
        wait_until(lambda: fleet.waiting() == 4, 20, worker.log)
        worker.kill()
        incarnation, made = fleet.numbering()
    worker = fleet.worker(updates_max=3)
    worker.wait_for_log("4 updates waiting")
    assert worker.wait(BACK_S_MAX) == DONE
    assert fleet.numbering() == (incarnation, made + 3)
    fleet.assert_everything_applied_once("a")


def test_a_second_signal_ends_a_worker_at_once_though_the_broker_hangs(processes, task, servers, job, own_rabbitmq):
    fleet = Fleet(processes, task, own_rabbitmq.url, servers.redis.url, job)
    fleet.aggregator().wait_for_log("at version 0")
    worker = fleet.worker(task_settings={"trainings": "2", "sleep_s": "0.5"})
    worker.wait_for_log("worker a of job")
    with frozen(own_rabbitmq):
        wait_until(lambda: fleet.waiting() > 0, 20, worker.log)
        worker.popen.send_signal(signal.SIGINT)
        worker.wait_for_log("once more to leave at once")
        worker.popen.send_signal(signal.SIGINT)
        assert worker.wait(12) == INTERRUPTED  # not the 20 s and more it would take to wait for the broker
        assert fleet.waiting() > 0  # for the next start
    assert "Traceback" not in worker.log()


def test_while_the_store_is_away_workers_train_on_and_nothing_is_lost(processes, task, servers, job, tmp_path):
    redis = private_redis(tmp_path / "redis")
    redis.start()
    try:
        fleet = Fleet(processes, task, servers.rabbitmq.url, redis.url, job)
        port = free_port()
        aggregator = fleet.aggregator(metrics_port=port)
        worker = fleet.worker()
        wait_until(lambda: fleet.applied() >= 4, 30)
        redis.kill()  # as a crash would
        worker.wait_for_log("training on from version")
        _, made = fleet.numbering()
        wait_until(lambda: fleet.numbering()[1] >= made + 10, 20, worker.log)
        wait_until(lambda: "Connection refused" in aggregator.log(), 20, aggregator.log)
        redis.start()
        version = fleet.version()
        wait_until(lambda: fleet.version() >= version + 8, BACK_S_MAX, aggregator.log)
        assert worker.terminate() == DONE
        fleet.assert_everything_applied_once("a")
        assert aggregator.terminate() == DONE
        assert "Traceback" not in aggregator.log() + worker.log()
    finally:
        redis.stop()


def test_a_task_that_fails_now_and_then_is_reported_and_goes_on(fleet: Fleet):
    fleet.aggregator()
    worker = fleet.worker(task_settings={"raise_at": "2-6", "nan_at": "4"}, updates_max=6)
    assert worker.wait(30) == DONE
    log = worker.log()
    said = f"train() of {fleet.task} raised ValueError: the sensor is gone; going on"
    assert log.count(said) == 2
    assert log.count("Traceback (most recent call last)") == 2
    assert log.count('raise ValueError("the sensor is gone")') == 2  # the line of the user's own file
    assert log.count("gave weights that are not finite: the update is not sent") == 1
    fleet.assert_everything_applied_once("a")
    assert fleet.numbering()[1] == 6


def test_a_task_of_another_layout_ends_with_2_and_names_the_tensor(fleet: Fleet):
    fleet.aggregator().wait_for_log("at version 0")
    fleet.task.write_text(NUMPY_TASK.replace("(4, 3)", "(4, 5)"))
    worker = fleet.worker()
    assert worker.wait() == USAGE
    last = worker.log().splitlines()[-1]
    assert last == (
        f"fedmq: task {fleet.task} does not fit job {fleet.job!r}: "
        "tensor 'w' is (4, 5) float32 here, (4, 3) float32 in the job"
    )
    assert "Traceback" not in worker.log()


def test_two_workers_on_one_outbox_cannot_be(fleet: Fleet):
    first = fleet.worker()
    first.wait_for_log("worker a of job")
    second = fleet.worker()
    assert second.wait() == USAGE
    mend = "give each its own --client-id or --state-dir"
    assert second.log() == f"fedmq: the outbox {fleet.outbox()} is in use by another worker: {mend}\n"
    assert first.terminate() == DONE
    third = fleet.worker()  # the lock went with its owner
    third.wait_for_log("worker a of job")
