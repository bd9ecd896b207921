"""`fedmq models rollback`, `backup` and `restore` as an operator types them, on real servers and under load."""

import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import redis

from ops import backup_file
from shared.command import DONE, UNREACHABLE, USAGE
from shared.model_image import ModelImage
from shared.store.redis import RedisStore
from shared.store.redis_backup import REVISIONS_BEYOND
from shared.transport.rabbitmq import queue_depths
from tests.contract.faults import wait_until as until
from tests.e2e.clients import aggregator_of
from tests.e2e.conftest import clean_environment
from tests.e2e.test_exactly_once import COUNTING, CountingClient, applied_ids

FEDMQ = Path(sys.executable).with_name("fedmq")
ONE_BY_ONE = COUNTING | {"buffer_size": "1", "server_lr": "1"}  # every weight: how often its update was applied
UPDATES = 900


@pytest.fixture
def fedmq(servers, job, tmp_path):
    """Return a function that runs a command of this test's job to its end."""

    def run(*arguments, code=DONE, **variables):
        given = {"FEDMQ_STORE_URL": servers.redis.url, "FEDMQ_BROKER_URL": servers.rabbitmq.url, "FEDMQ_JOB": job}
        done = subprocess.run(
            [FEDMQ, *map(str, arguments)], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False,
            env=clean_environment(given | {f"FEDMQ_{name.upper()}": value for name, value in variables.items()}),
        )  # fmt: skip
        text = " ".join((done.stdout + done.stderr).split())
        assert done.returncode == code and "Traceback" not in text, done
        return text

    return run


@pytest.fixture
def counting(servers, job, processes, tmp_path):
    """Return an aggregator under load, its client, and how to start another."""
    model = ModelImage.of({"w": np.zeros(UPDATES, np.float32)})
    model.save(tmp_path / "v0.safetensors")

    def start():
        return aggregator_of(processes, servers, job, init_model=str(tmp_path / "v0.safetensors"), **ONE_BY_ONE)

    aggregator, store = start(), RedisStore(servers.redis.url, job)
    until(lambda: bool(store.job()))
    return aggregator, CountingClient(servers.rabbitmq.url, job, model, UPDATES, pause_s=0.006), store, start


def applied(store):
    return store.totals().get("applied", 0)


def wipe(servers, job):
    plain = redis.Redis.from_url(servers.redis.url)
    for key in list(plain.scan_iter(match=f"fedmq:{{{job}}}:*", count=1000)):
        plain.delete(key)
    plain.close()


def settled(servers, job, store):
    """Wait until nothing is under way; return the ids that count."""
    until(lambda: queue_depths(servers.rabbitmq.url, job, 5)["updates"] == 0, 60)
    last = [-1]

    def rests():
        before, last[0] = last[0], store.head().revision
        time.sleep(1.0)
        return before == store.head().revision

    until(rests, 60)
    ids = applied_ids(store)
    assert len(ids) == len(set(ids)), "applied twice"
    head = store.head()
    counted = np.zeros(UPDATES, np.float32)
    counted[[int(name.split("/")[2]) for name in ids]] = 1
    np.testing.assert_array_equal(store.model(head.version).weights, counted)
    return set(ids)


def names(numbers):
    return {f"counter/0/{number}" for number in numbers}


def test_a_backup_taken_under_load_brings_a_lost_store_back_with_an_exact_account(
    servers, job, fedmq, counting, tmp_path
):
    aggregator, client, store, start = counting
    file = tmp_path / "job.fedmq"
    until(lambda: applied(store) > 150, 60)
    fedmq("backup", file)
    until(lambda: applied(store) > 220, 60)
    said = fedmq("backup", file, "--force")
    header = backup_file.verify(file)
    assert f"at version {header.version}, revision {header.revision}" in said
    until(lambda: applied(store) > 420, 60)
    aggregator.kill()
    of_the_lost_store = set(applied_ids(store))
    wipe(servers, job)
    assert store.head() is None

    said = fedmq("restore", file)
    assert f"version {header.version}, revision {header.revision}, which counts as" in said
    restored = store.load()
    at_backup = set(applied_ids(store))
    assert (restored.head.version, restored.head.sha256) == (header.version, restored.model.sha256)
    assert restored.head.revision == header.revision + REVISIONS_BEYOND
    assert 220 < len(at_backup) == restored.model.weights.sum() == header.version < len(of_the_lost_store)
    assert at_backup <= of_the_lost_store

    start()
    client.thread.join(120)
    assert client.confirmed == UPDATES
    counted = settled(servers, job, store)
    missing = names(range(UPDATES)) - counted
    assert at_backup <= counted
    assert missing and missing <= of_the_lost_store - at_backup, "only what was applied after the backup and acked"


def test_a_running_aggregator_takes_over_what_was_restored_in_the_place_of_its_job(
    servers, job, fedmq, counting, tmp_path
):
    aggregator, client, store, _ = counting
    file = tmp_path / "job.fedmq"
    until(lambda: applied(store) > 150, 60)
    fedmq("backup", file)
    said = fedmq("restore", file, code=USAGE)
    assert re.search(r"exists, at version \d+, revision \d+; the backup is of version \d+, revision \d+: say", said)
    until(lambda: applied(store) > 350, 60)
    known = set(applied_ids(store))
    said = fedmq("restore", file, "--replace")
    published = client.confirmed
    assert re.search(r"replaced: version \d+, revision \d+\. What was applied after revision \d+ is not in", said)
    client.thread.join(120)
    counted = settled(servers, job, store)
    assert aggregator.popen.poll() is None and client.confirmed == UPDATES
    assert "reloading" in aggregator.log() or "taking over" in aggregator.log()
    missing = names(range(UPDATES)) - counted
    assert missing and missing <= names(range(published)) and len(counted & known) < len(known)
    assert store.totals() == {"applied": len(counted)}
    beyond = min(entry["revision"] for entry in store.ledger() if entry["updates"][0]["outcome"] == "restore")
    assert store.head().revision > beyond > REVISIONS_BEYOND


def test_an_aggregator_that_slept_through_a_restore_neither_commits_nor_acks(servers, job, fedmq, counting, tmp_path):
    sleeper, client, store, _ = counting
    file = tmp_path / "job.fedmq"
    until(lambda: applied(store) > 150, 60)
    fedmq("backup", file)
    until(lambda: applied(store) > 300, 60)
    sleeper.popen.send_signal(signal.SIGSTOP)
    held = set(applied_ids(store))
    wipe(servers, job)
    fedmq("restore", file)
    sleeper.popen.send_signal(signal.SIGCONT)
    client.thread.join(120)
    counted = settled(servers, job, store)
    missing = names(range(UPDATES)) - counted
    assert missing <= held and sleeper.popen.poll() is None


def test_rollback_under_load_goes_on_from_the_old_weights(servers, job, fedmq, processes, task):
    aggregator_of(processes, servers, job, codec="none", buffer_size=2, staleness="constant", commit_interval_s=0.05,
                  versions_kept=200)  # fmt: skip
    fedmq("models", "init", task)
    workers = [
        processes.start("worker", broker_url=servers.rabbitmq.url, store_url=servers.redis.url, job=job, task=task,
                        client_id=name, state_dir=processes.folder / name)
        for name in "abc"
    ]  # fmt: skip
    store = RedisStore(servers.redis.url, job)
    until(lambda: store.head() is not None and store.head().version >= 12, 60)
    before = store.head().version
    target = store.status()["versions"][2]
    said = fedmq("models", "rollback", target)
    made = int(re.search(r"version (\d+) of job", said)[1])
    assert made > before and f"has the weights of {target}." in said and "refused as stale" in said
    assert store.model(made).sha256 == store.model(target).sha256
    start = float(store.model(made).weights[0])
    until(lambda: store.head().version >= made + 8, 60)
    for worker in workers:
        worker.terminate()
    until(lambda: queue_depths(servers.rabbitmq.url, job, 5)["updates"] == 0, 30)
    head = store.head()
    np.testing.assert_allclose(store.model(head.version).weights, start + head.version - made, atol=1e-4)
    after = [u for e in store.ledger() if e["version"] >= made for u in e["updates"] if u["outcome"] != "rollback"]
    assert all(u["base_version"] >= made for u in after if u["outcome"] == "applied")
    assert {u["outcome"] for u in after if u["base_version"] < made} <= {"stale", "duplicate"}


@pytest.fixture
def still_job(servers, job, tmp_path):
    """Make a job of versions 0 to 3 that no aggregator serves."""
    from tests.contract.stores import commit_of, image

    store = RedisStore(servers.redis.url, job)
    store.create(image(0), 0.0)
    for revision in range(3):
        store.commit(commit_of(revision, revision + 1, image(revision + 1), state=b""))
    plain = redis.Redis.from_url(servers.redis.url)
    plain.set(f"fedmq:{{{job}}}:tag:best", 1)
    plain.close()
    return store


def test_rolling_back_once_more_does_nothing_until_something_came_after(fedmq, still_job):
    assert "version 4 of job" in fedmq("models", "rollback", "best")
    head = still_job.head()
    assert "version 4 of job" in (said := fedmq("models", "rollback", "1")) and "nothing came after it" in said
    assert still_job.head() == head
    assert still_job.meta(4)["rolled_back_to"] == "1"
    assert "has the weights of 3." in fedmq("models", "rollback", "3")
    assert still_job.head().version == 5


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["models", "rollback"], "Missing argument"),
        (["models", "rollback", "3"], "version 3 is the newest of job"),
        (["models", "rollback", "77"], "version 77 is not stored; stored are [0, 1, 2, 3]"),
        (["models", "rollback", "worst"], "'worst' is no version and no tag of job"),
        (["models", "rollback", "-1"], "o such option"),
        (["models", "rollback", "1", "--job", "nobody"], "job 'nobody' has no model in this store"),
        (["backup", "x", "--job", "nobody"], "job 'nobody' has no model in this store: there is nothing to back up"),
        (["backup", "none/x"], "none/x cannot be written: there is no folder none"),
        (["restore", "nothing"], "nothing cannot be read: No such file or directory"),
    ],
)
def test_a_mistake_is_one_message(fedmq, still_job, arguments, part):
    head = still_job.head()
    assert part in fedmq(*arguments, code=USAGE)
    assert still_job.head() == head


@pytest.mark.parametrize("arguments", [["models", "rollback", "1"], ["backup", "x"], ["restore", "f", "--replace"]])
def test_a_store_that_is_away_is_said(fedmq, still_job, arguments):
    fedmq("backup", "f")
    said = fedmq(*arguments, "--store-url", "redis://127.0.0.1:1/0", code=UNREACHABLE)
    assert "fedmq: cannot reach Redis at redis://127.0.0.1:1/0" in said


def test_area_is_refused_with_the_way_out(fedmq, still_job):
    still_job.announce({"rule": "area"})
    said = fedmq("models", "rollback", "1", code=USAGE)
    assert "runs rule area" in said and "models export FILE --version 1" in said
