"""Updates in parts through real servers, with kill -9 of the aggregator between any two parts: once or not at all."""

import random
import threading
import time

import numpy as np

from shared.clock import SystemClock
from shared.compression import parse
from shared.messages import Update, encode
from shared.metrics import WorkerMetrics
from shared.model_image import ModelImage
from shared.store.redis import RedisStore
from shared.transport.rabbitmq import RabbitSink, queue_depths
from tests.contract.faults import wait_until as until
from tests.e2e.clients import aggregator_of
from worker.outbox import Outbox
from worker.publisher import Publisher

PARAMS, PART_BYTES, UPDATES = 150_000, 64 * 2**10, 25  # 600 kB of float32: ten parts an update
SETTINGS = {
    "codec": "float32", "buffer_size": "1", "staleness": "constant", "staleness_max": "100000", "prefetch": "16",
    "part_bytes": str(PART_BYTES), "commit_interval_s": "0.02", "commit_age_max_s": "0.2",
}  # fmt: skip


def device(url, job, layout, client, folder, stop):
    """Publish updates of ones, in order, from an outbox, as a worker does."""
    sink = RabbitSink(url, client)
    outbox = Outbox(folder / client, client, 100, 2**30)
    publisher = Publisher(job, client, outbox, sink, SystemClock(), WorkerMetrics(), 20.0)
    publisher.part_bytes = PART_BYTES
    thread = threading.Thread(target=publisher.run, args=(stop,), daemon=True)
    thread.start()
    ones, codec = np.ones(PARAMS, np.float32), parse("float32")
    for _ in range(UPDATES):
        payload = codec.encode(ones, layout, np.random.default_rng(0)).payload
        update = Update(
            job, client, outbox.next_id(), 0, 1, 1, layout.hash, {"name": "float32"}, payload, {}, 0.0, time.time()
        )  # fmt: skip
        outbox.put(encode(update))
        publisher.wake.set()
    return outbox, sink, thread


def test_parts_are_put_together_once_whatever_is_killed(servers, job, processes, tmp_path):
    model = ModelImage.of({"w": np.zeros((1, PARAMS), np.float32)})
    initial = tmp_path / "v0.safetensors"
    model.save(initial)
    store = RedisStore(servers.redis.url, job)
    aggregator = aggregator_of(processes, servers, job, init_model=str(initial), **SETTINGS)
    until(lambda: bool(store.job()))
    stop, total = threading.Event(), 3 * UPDATES
    devices = [device(servers.rabbitmq.url, job, model.layout, client, tmp_path / "outboxes", stop) for client in "abc"]
    rng = random.Random(7)
    for _ in range(5):
        before = store.totals().get("applied", 0)
        until(lambda before=before: store.totals().get("applied", 0) > before or not any(d[0] for d in devices), 30)
        time.sleep(rng.uniform(0.05, 0.4))
        aggregator.kill()
        aggregator = aggregator_of(processes, servers, job, init_model=str(initial), **SETTINGS)
    until(lambda: store.totals().get("applied") == total, 60, lambda: f"{store.totals()}")
    stop.set()
    for outbox, sink, thread in devices:
        thread.join(10)
        assert not len(outbox)
        sink.close()
        outbox.close()
    ids = [u["id"] for entry in store.ledger() for u in entry["updates"] if u["outcome"] == "applied"]
    assert len(ids) == len(set(ids)) == total
    np.testing.assert_array_equal(store.model(store.head().version).weights, np.full(PARAMS, total, np.float32))
    assert not store._redis.keys(f"fedmq:{{{job}}}:kept:*"), "the parts are gone"
    aggregator.popen.terminate()
    until(lambda: aggregator.popen.poll() is not None)
    assert queue_depths(servers.rabbitmq.url, job, 5.0)["updates"] == 0
