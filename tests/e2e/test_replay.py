"""`fedmq replay` on a job that real servers ran and kill -9 interrupted: every version again, byte for byte."""

import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import redis
import safetensors.numpy

from aggregator.recorder import MARK, SUFFIX
from shared.command import DONE, FAILED, UNREACHABLE, USAGE
from shared.model_image import ModelImage
from shared.store.redis import RedisStore
from tests.contract.faults import wait_until as until
from tests.e2e.clients import aggregator_of
from tests.e2e.conftest import clean_environment
from tests.e2e.test_exactly_once import CountingClient

FEDMQ = Path(sys.executable).with_name("fedmq")
UPDATES = 600
SETTINGS = {
    "buffer_size": "5", "server_optimizer": "adam", "robust": "norm_median(3,20)", "staleness": "polynomial(0.5)",
    "staleness_max": "100000", "commit_interval_s": "0.1", "commit_age_max_s": "0.3", "prefetch": "64",
    "downlink": "on", "versions_kept": "4",
}  # fmt: skip


class Told:
    """What a run left behind."""

    def __init__(self, servers, job, folder):
        self.servers, self.job, self.folder = servers, job, folder
        self.store = RedisStore(servers.redis.url, job)
        self.client = redis.Redis.from_url(servers.redis.url)

    def replay(self, *arguments, code=DONE, **variables):
        given = {"FEDMQ_STORE_URL": self.servers.redis.url, "FEDMQ_JOB": self.job} | variables
        done = subprocess.run(
            [FEDMQ, "replay", "--records", "records", *map(str, arguments)], cwd=self.folder, capture_output=True,
            text=True, timeout=120, check=False, env=clean_environment(given), stdin=subprocess.DEVNULL,
        )  # fmt: skip
        assert "Traceback" not in done.stdout + done.stderr, done
        assert done.returncode == code, done
        return " ".join((done.stdout + done.stderr).replace("│", " ").split())

    def key(self, name):
        return f"fedmq:{{{self.job}}}:{name}"


@pytest.fixture
def told(servers, job, processes, tmp_path):
    """Run a job whose aggregator is killed three times under load, and stop it."""
    model = ModelImage.of({"w": np.linspace(-1, 1, UPDATES, dtype=np.float32)})
    model.save(tmp_path / "v0.safetensors")

    def start():
        return aggregator_of(
            processes, servers, job, init_model="v0.safetensors", record_dir="records", **SETTINGS
        )  # fmt: skip

    run = Told(servers, job, tmp_path)
    aggregator = start()
    until(lambda: bool(run.store.job()), 30)
    client = CountingClient(servers.rabbitmq.url, job, model, UPDATES, pause_s=0.004)
    for share in (0.2, 0.45, 0.7):
        until(lambda share=share: run.store.totals().get("applied", 0) >= share * UPDATES, 60)
        aggregator.kill()
        aggregator = start()
    client.thread.join(120)
    until(lambda: run.store.totals().get("applied") == UPDATES, 60)
    assert aggregator.terminate() == DONE
    assert run.store.head().version == UPDATES // 5
    yield run
    run.store.close()


def test_every_version_of_a_killed_job_comes_about_again_and_what_was_changed_is_named(told, tmp_path):
    newest, records = UPDATES // 5, tmp_path / "records" / told.job
    assert len(list(records.glob(f"*{SUFFIX}"))) == 4, "one segment for each aggregator"

    said = told.replay(code=USAGE)
    assert "version 0 is not stored any more: give the file of version 0" in said
    assert "vector adam_m, vector adam_v, defence norm_median remember" in said

    head = told.store.head()
    said = told.replay("--all", "--from", "v0.safetensors", "--out", "again.safetensors", FEDMQ_SERVER_LR="0.7")
    assert f"{newest} {head.sha256} {head.sha256} equal" in said
    assert f"from version 0: {UPDATES} updates applied again" in said
    assert said.count(" equal") >= 5, "the four stored ones, and the last line"
    again = safetensors.numpy.load_file(tmp_path / "again.safetensors")
    np.testing.assert_array_equal(again["w"], told.store.model(newest).weights)
    middle = sorted({commit["version"] for commit in told.store.ledger()})[10]
    assert f"{middle} " in told.replay("--version", middle, "--from", "v0.safetensors")

    _nothing_to_compare(told, middle)
    _a_changed_weight(told)
    _a_damaged_version(told, newest)
    _a_flipped_byte(told, records)

    assert "no records of job" in told.replay(
        "--job", told.job, "--records", "none", "--from", "v0.safetensors", code=USAGE
    )
    assert "no model in this store" in told.replay("--job", "nobody", code=USAGE)
    assert "Redis" in told.replay("--store-url", "redis://127.0.0.1:1/0", code=UNREACHABLE)


def _nothing_to_compare(told, middle):
    """The hashes of versions that are long gone have expired."""
    stored = told.store.status()["versions"]
    for version in {commit["version"] for commit in told.store.ledger()}:
        if version <= middle and version not in stored:
            told.client.delete(told.key(f"meta:{version}"))
    said = told.replay("--version", middle, "--from", "v0.safetensors", "--out", "middle.safetensors", code=FAILED)
    assert f"{middle} " in said and "no hash is left to compare with" in said
    assert re.search(r"records not read: \d+ applied after the end", said)
    assert f"wrote the recomputed version {middle} to middle.safetensors" in said
    assert "updates applied again, but no version on the way has a hash left" in said


def _a_changed_weight(told):
    """Change the weight of one update in the ledger, as somebody would who wants another to have counted more."""
    key, target = told.key("ledger"), "counter/0/333"
    entries = told.client.xrange(key)
    changed = {}
    for identifier, fields in entries:
        text = fields[b"updates"].decode()
        if f'"{target}"' in text and '"applied"' in text:
            start = text.index('"weight":', text.index(f'"id": "{target}", "outcome": "applied"')) + len('"weight": ')
            end = text.index(",", start)
            changed[identifier] = fields | {b"updates": (text[:start] + "0.125" + text[end:]).encode()}
    assert len(changed) == 1
    _rewrite(told.client, key, entries, changed)
    said = told.replay("--from", "v0.safetensors", code=FAILED)
    assert f"update {target}, towards version" in said
    assert "weight 0.125 became" in said
    _rewrite(told.client, key, entries, {})
    assert "all equal" in told.replay("--from", "v0.safetensors")


def _rewrite(client, key, entries, changed):
    client.delete(key)
    for identifier, fields in entries:
        client.xadd(key, changed.get(identifier, fields), id=identifier)


def _a_damaged_version(told, newest):
    versions = [version for version in told.store.status()["versions"] if version < newest]
    key, version = told.key(f"model:{versions[-1]}:0"), versions[-1]
    whole = told.client.get(key)
    told.client.setrange(key, len(whole) - 3, b"\x55")
    said = told.replay("--version", version, "--from", "v0.safetensors", "--out", "mended.safetensors", code=FAILED)
    assert f"version {version} is recomputed as it was written, but its stored bytes are damaged" in said
    assert (told.folder / "mended.safetensors").read_bytes() == whole
    told.client.set(key, whole)


def _a_flipped_byte(told, records):
    target = b"counter/0/77"
    for path in records.glob(f"*{SUFFIX}"):
        head, *rest = path.read_bytes().split(MARK)
        spoiled = [
            record[:-9] + bytes([record[-9] ^ 1]) + record[-8:] if target in record[:60] else record for record in rest
        ]
        path.write_bytes(MARK.join([head, *spoiled]))
    said = told.replay("--from", "v0.safetensors", code=FAILED)
    assert "1 updates of versions" in said
    assert "counter/0/77: its record at" in said
    assert "damaged" in said
    assert "--from-version" in said


def test_a_recording_aggregator_keeps_its_records_within_their_limit(servers, job, processes, tmp_path):
    model = ModelImage.of({"w": np.zeros(5000, np.float32)})
    model.save(tmp_path / "v0.safetensors")
    aggregator_of(
        processes, servers, job, init_model="v0.safetensors", record_dir="records", record_bytes_max=2**20,
        buffer_size=10, staleness_max=100_000, commit_interval_s=0.05, commit_age_max_s=0.2,
    )  # fmt: skip
    store = RedisStore(servers.redis.url, job)
    until(lambda: bool(store.job()), 30)
    CountingClient(servers.rabbitmq.url, job, model, 200, pause_s=0.0)  # 4 MB
    until(lambda: store.totals().get("applied") == 200, 60)
    kept = [path.stat().st_size for path in (tmp_path / "records" / job).glob(f"*{SUFFIX}")]
    assert 2**19 < sum(kept) <= 2**20
    told = Told(servers, job, tmp_path)
    time.sleep(0.3)
    said = told.replay("--from", "v0.safetensors", code=FAILED)
    assert "are not at hand: counter/0/0, counter/0/1" in said
    assert "it was not recorded" in said
    store.close()
