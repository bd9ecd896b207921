"""A job compressed both ways, as processes on real servers: killed workers, stale updates, a codec changed on the way.

Every training adds the same vector D. With buffers of one and equal weights the server's model is the sum of what it
applied; what is missing from `made * D` must lie in the workers' residuals, or in refused updates not yet taken back.
Nothing may grow so old that it decays (tests/simulation does that): what waits is a few trainings old, a few versions
each, and some 20 more whenever a worker is late or starts again: 60 at most were seen. The horizon is 120.
"""

import json
import random
import time

import numpy as np
import pytest

from shared.compression import decode
from shared.messages import decode as decode_message
from shared.model_image import ModelImage
from shared.store.redis import RedisStore
from tests.contract.faults import wait_until
from worker import residual_file

TASK = """
import time

import numpy as np

from shared.store.redis import RedisStore
from worker.task import TrainResult

D = (np.random.default_rng(5).standard_normal((40, 50)) * 0.1).astype(np.float32)


def build():
    return {"w": np.zeros((40, 50), np.float32), "b": np.zeros(3, np.float32)}


def train(model, context):
    time.sleep(0.03)
    if "late" in context.settings and context.seed % 4 == 0:  # by more than staleness_max, on any machine
        store = RedisStore(context.settings["store_url"], context.settings["job"])
        while store.head().version < context.version + 16 and not context.stopping():
            time.sleep(0.02)
    model["w"] += D
    return TrainResult(1, 1, {})
"""
JOB = {
    "rule": "fedbuff", "buffer_size": 1, "staleness": "constant", "staleness_max": 12, "downlink": "on",
    "commit_interval_s": 0.02, "commit_age_max_s": 0.2,
}  # fmt: skip
WORKERS = {"steady": {}, "odd": {"late": "yes"}}  # one in four of the odd one's updates comes too late
WAIT_S_MAX = 30.0


@pytest.fixture
def urls(servers, job):
    return {"broker_url": servers.rabbitmq.url, "store_url": servers.redis.url, "job": job}


def made_and_refused(store):
    outcomes = {}
    for entry in store.ledger():
        for update in entry["updates"]:
            outcomes.setdefault(update["id"], update["outcome"])
    assert set(outcomes.values()) <= {"applied", "stale"}
    return len(outcomes), {identifier for identifier, outcome in outcomes.items() if outcome == "stale"}


def left_at(folder, layout, refused):
    """Return what a stopped worker holds: its residual and the refused updates it has not taken back yet."""
    header, vector = residual_file.parse((folder / residual_file.NAME).read_bytes())
    left = np.zeros(layout.num_params, np.float32) if vector is None else vector.copy()
    assert not list(folder.glob("*.update")), "all were published"
    for path in folder.glob("*.sent"):
        update = decode_message(path.read_bytes(), 2**24)
        if update.update_id in refused and int(path.name.split(".")[0]) not in header.returned:
            decode(update.codec, update.payload, layout).add_into(left, 1.0)
    return left


def test_no_mass_is_lost_by_kills_stale_updates_and_a_change_of_codec(processes, tmp_path, urls):
    task = tmp_path / "task.py"
    task.write_text(TASK)
    start = tmp_path / "start.safetensors"
    image = ModelImage.of({"w": np.zeros((40, 50), np.float32), "b": np.zeros(3, np.float32)})
    image.save(start)
    store = RedisStore(urls["store_url"], urls["job"])

    def aggregator(codec):
        return processes.start("aggregator", **(urls | JOB), init_model=start, codec=codec)

    def worker(client):
        settings = json.dumps(WORKERS[client] | {"store_url": urls["store_url"], "job": urls["job"]})
        return processes.start(
            "worker",
            client_id=client,
            task=task,
            task_settings=settings,
            state_dir=tmp_path / "state",
            wait_s=30,
            **urls,
        )

    def number(client):
        path = tmp_path / "state" / urls["job"] / client / "outbox.json"
        return json.loads(path.read_text())["next_sequence"] if path.exists() else 0

    first = aggregator("ef | topk(0.2) | ternary | zstd")
    workers = {client: worker(client) for client in WORKERS}
    chance = random.Random(3)
    for kill in range(6):
        before = made_and_refused(store)[0]
        wait_until(lambda before=before: made_and_refused(store)[0] >= before + 12, WAIT_S_MAX)
        time.sleep(chance.uniform(0, 0.1))
        if kill == 3:  # the codec changes under the workers' feet
            assert first.terminate() == 0
            aggregator("ef | nf4")
        client = chance.choice(list(WORKERS))
        workers[client].kill()
        reached = number(client)
        workers[client] = worker(client)
        wait_until(lambda client=client, reached=reached: number(client) > reached + 1, WAIT_S_MAX)
    for process in workers.values():
        assert process.terminate() == 0

    folders = [tmp_path / "state" / urls["job"] / client for client in WORKERS]
    sent = {decode_message(path.read_bytes(), 2**24).update_id for f in folders for path in f.glob("*.sent")}
    ids = lambda: {u["id"] for entry in store.ledger() for u in entry["updates"]}  # noqa: E731
    wait_until(lambda: sent <= ids(), WAIT_S_MAX, lambda: f"never settled: {sorted(sent - ids())}")
    made, refused = made_and_refused(store)
    assert refused, "the odd worker was meant to be late"
    logs = "".join(path.read_text() for path in tmp_path.glob("*-worker.log"))
    assert "versions old" not in logs, "nothing was to grow old enough to decay"
    model = store.model(store.head().version)
    left = sum(left_at(folder, model.layout, refused).astype(np.float64) for folder in folders)
    d = np.zeros(model.layout.num_params)
    d[: 40 * 50] = (np.random.default_rng(5).standard_normal((40, 50)) * 0.1).astype(np.float32).reshape(-1)
    np.testing.assert_allclose(model.weights + left, made * d, atol=2e-4 * made)
    assert np.abs(left).max() > 0.05, "there was something to lose"
    codecs = {decode_message(p.read_bytes(), 2**24).codec["name"] for f in folders for p in f.glob("*.sent")}
    assert codecs <= {"ef | nf4", "ef | topk(0.2) | ternary | zstd"}
    assert store.head().published, "workers trained from published weights"
