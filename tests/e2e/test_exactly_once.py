"""Real processes, real servers, kill -9: each published update is applied exactly once.

The deltas count: update i is one-hot at position i, the rule sums without weighting, so the final weights are the
number of times each update was applied.
"""

import random
import signal
import threading
import time

import numpy as np
import pytest

from aggregator.aggregator import Aggregator
from aggregator.staleness import hinge, polynomial
from shared.clock import SystemClock
from shared.compression import parse
from shared.config import AggregatorSettings
from shared.errors import PublishRefused, Unavailable
from shared.messages import Update, encode
from shared.metrics import AggregatorMetrics
from shared.model_image import ModelImage
from shared.store.redis import RedisStore
from shared.transport.ports import Outgoing
from shared.transport.rabbitmq import RabbitSink, RabbitSource
from tests.contract.faults import wait_until as until
from tests.e2e.clients import aggregator_of

COUNTING = {
    "buffer_size": "10",
    "server_lr": "10",  # times 1/K: a plain sum
    "staleness": "constant",
    "staleness_max": "100000",
    "commit_interval_s": "0.02",
    "commit_age_max_s": "0.3",
    "prefetch": "64",
}


class CountingClient:
    """Publishes one-hot updates at a steady rate, each again and again until it is confirmed, as the outbox does."""

    def __init__(self, url, job, model, updates, pause_s):
        self.job, self.layout, self.updates, self.pause_s = job, model.layout, updates, pause_s
        self.confirmed = 0
        self.sink = RabbitSink(url, "counter")
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self):
        codec = parse("float32")
        for i in range(self.updates):
            delta = np.zeros(self.layout.num_params, np.float32)
            delta[i] = 1.0
            update_id = f"counter/0/{i}"
            encoded = codec.encode(delta, self.layout, np.random.default_rng(0))
            update = Update(
                self.job, "counter", update_id, 0, 1, 1, self.layout.hash, {"name": "float32"}, encoded.payload,
                {}, 0.0, time.time(),
            )  # fmt: skip
            message = Outgoing(self.job, "counter", update_id, encode(update))
            while True:
                try:
                    self.sink.publish(message, 10)
                    break
                except (Unavailable, PublishRefused):
                    time.sleep(0.05)
            self.confirmed += 1
            time.sleep(self.pause_s)


def applied_ids(store):
    return [u["id"] for entry in store.ledger() for u in entry["updates"] if u["outcome"] == "applied"]


def test_kill_9_ten_times_under_load_applies_each_update_exactly_once(servers, job, processes, tmp_path):
    updates = 2500
    model = ModelImage.of({"w": np.zeros(updates, np.float32)})
    initial = tmp_path / "v0.safetensors"
    model.save(initial)
    store = RedisStore(servers.redis.url, job)
    aggregator = aggregator_of(processes, servers, job, init_model=str(initial), **COUNTING)
    until(lambda: bool(store.job()))
    client = CountingClient(servers.rabbitmq.url, job, model, updates, pause_s=0.008)
    rng = random.Random(20261120)
    for _ in range(10):
        time.sleep(rng.uniform(0.9, 1.9))
        aggregator.kill()
        aggregator = aggregator_of(processes, servers, job, init_model=str(initial), **COUNTING)
    client.thread.join(120)
    assert client.confirmed == updates
    until(lambda: store.totals().get("applied") == updates, 60)

    ids = applied_ids(store)
    assert len(ids) == len(set(ids)) == updates
    head = store.head()
    assert head.version == updates // 10
    np.testing.assert_array_equal(store.model(head.version).weights, np.ones(updates, np.float32))


def test_a_standby_takes_over_and_the_account_stays_exact(servers, job, processes, tmp_path):
    updates = 600
    model = ModelImage.of({"w": np.zeros(updates, np.float32)})
    initial = tmp_path / "v0.safetensors"
    model.save(initial)
    store = RedisStore(servers.redis.url, job)
    active = aggregator_of(processes, servers, job, init_model=str(initial), **COUNTING)
    until(lambda: bool(store.job()))
    standby = aggregator_of(processes, servers, job, init_model=str(initial), **COUNTING)
    client = CountingClient(servers.rabbitmq.url, job, model, updates, pause_s=0.008)
    until(lambda: store.totals().get("applied", 0) > 100, 60)
    active.popen.send_signal(signal.SIGSTOP)  # hangs: the broker still takes it for alive ...
    time.sleep(0.3)
    active.popen.send_signal(signal.SIGKILL)  # ... until it is gone
    killed, before = time.monotonic(), store.totals()["applied"]
    until(lambda: store.totals()["applied"] > before, 10)
    took_s = time.monotonic() - killed
    client.thread.join(60)
    until(lambda: store.totals().get("applied") == updates, 60)
    assert standby.popen.poll() is None
    assert took_s < 10, f"the standby needed {took_s:.1f} s"
    np.testing.assert_array_equal(store.model(store.head().version).weights, np.ones(updates, np.float32))


@pytest.mark.parametrize(
    ("settings", "weight"),
    [
        (
            {"rule": "fedbuff", "buffer_size": 4, "server_lr": 0.8, "staleness": "polynomial(0.5)"},
            lambda t: polynomial(t, 0.5),
        ),
        (
            {"rule": "fedbuff", "buffer_size": 3, "weight_by_samples": True, "staleness": "hinge(2,1)"},
            lambda t: hinge(t, 2, 1),
        ),
        ({"rule": "fedasync", "alpha": 0.6, "staleness": "polynomial(0.5)"}, lambda t: polynomial(t, 0.5)),
        ({"rule": "fedasync", "alpha": 0.9, "staleness": "hinge(10,4)"}, lambda t: hinge(t, 10, 4)),
    ],
)
@pytest.mark.parametrize("seed", [1, 2])
def test_rules_equal_their_closed_form_through_broker_and_store(servers, job, settings, weight, seed):
    """Encode -> RabbitMQ -> fold -> commit to Redis, against float64 written here from the papers' formulas."""
    rng = np.random.default_rng(seed)
    model = ModelImage.of(
        {"a": rng.standard_normal((30, 11)).astype(np.float32), "b": rng.standard_normal(7).astype(np.float32)}
    )
    store = RedisStore(servers.redis.url, job)
    store.create(model, time.time())
    config = AggregatorSettings(job=job, commit_interval_s=0.0, staleness_max=30, **settings)
    source = RabbitSource(servers.rabbitmq.url, job, 64)
    sink = RabbitSink(servers.rabbitmq.url, "w")
    source.link.wait_ready(10)
    sink.link.wait_ready(10)
    aggregator = Aggregator(config, source, store, SystemClock(), AggregatorMetrics(), poll_s=5.0)

    history = [model.weights.astype(np.float64)]  # float64 weights of every version
    total, mass, buffered = np.zeros_like(history[0]), 0.0, 0
    for i in range(40):
        version = len(history) - 1
        base = int(rng.integers(max(0, version - 8), version + 1))
        samples = int(rng.integers(1, 500))
        delta = (0.1 * rng.standard_normal(model.layout.num_params)).astype(np.float32)
        update = Update(
            job,
            "w",
            f"w/0/{i}",
            base,
            samples,
            3,
            model.layout.hash,
            {"name": "float32"},
            delta.tobytes(),
            {},
            0.1,
            0.0,
        )
        sink.publish(Outgoing(job, "w", update.update_id, encode(update)), 10)
        while not aggregator.step():
            pass
        scale = weight(version - base)
        if settings["rule"] == "fedbuff":
            n = samples if settings.get("weight_by_samples") else 1
            total, mass, buffered = total + scale * n * delta.astype(np.float64), mass + n, buffered + 1
            if buffered == settings["buffer_size"]:
                history.append(history[-1] + settings.get("server_lr", 1.0) * total / mass)
                total, mass, buffered = np.zeros_like(total), 0.0, 0
        else:
            alpha = settings["alpha"] * scale
            history.append((1 - alpha) * history[-1] + alpha * (history[base] + delta))
    aggregator.finish()
    head = store.head()
    assert head.version == len(history) - 1
    np.testing.assert_allclose(store.model(head.version).weights, history[-1], rtol=0, atol=5e-6)
    sink.close()
    source.close()
