"""A client that knows only the page of the contract: raw pika and msgpack in, plain redis and safetensors out."""

import json
import re
from pathlib import Path

import numpy as np
import pika
import pytest
import redis
import safetensors.numpy

from tests.contract.faults import wait_until as until
from tests.e2e.clients import RAW_CLIENT, aggregator_of, run_raw_client

PARAMS = {"layer.weight": (7, 5), "layer.bias": (7,)}


def test_ten_updates_of_a_foreign_client_make_exactly_the_new_model(servers, job, processes, tmp_path):
    rng = np.random.default_rng(1)
    start = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in PARAMS.items()}
    initial = tmp_path / "v0.safetensors"
    safetensors.numpy.save_file(start, initial)
    aggregator_of(processes, servers, job, init_model=str(initial), buffer_size=10, server_lr=0.7)
    store = redis.Redis.from_url(servers.redis.url)
    until(lambda: store.exists(f"fedmq:{{{job}}}:job"))

    deltas = run_raw_client(servers.rabbitmq.url, servers.redis.url, job)

    until(lambda: int(store.hget(f"fedmq:{{{job}}}:head", "version") or 0) >= 1)
    blob = store.get(f"fedmq:{{{job}}}:model:1:0")
    after = safetensors.numpy.load(blob)
    order = [t["name"] for t in json.loads(store.get(f"fedmq:{{{job}}}:layout"))["tensors"]]
    flat = np.concatenate([start[name].reshape(-1) for name in order]).astype(np.float64)
    expected = flat + 0.7 * np.mean(np.asarray(deltas, np.float64), axis=0)
    got = np.concatenate([after[name].reshape(-1) for name in order])
    np.testing.assert_allclose(got, expected, rtol=2e-6, atol=2e-7)


def test_the_client_in_the_guide_is_the_one_that_was_tested():
    guide = (Path(__file__).parents[2] / "ops" / "guides" / "contract.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", guide, re.S)
    assert RAW_CLIENT.strip() in [block.strip() for block in blocks], "the guide differs from RAW_CLIENT"


@pytest.mark.parametrize("body", [b"", b"garbage", b"\x81\xa6format\x01", b"\xc1" * 1000])
def test_foreign_messages_go_to_the_dead_letters_with_a_reason_and_never_stop_the_loop(
    servers, job, processes, tmp_path, body
):
    initial = tmp_path / "v0.safetensors"
    safetensors.numpy.save_file({"w": np.zeros(4, np.float32)}, initial)
    aggregator_of(processes, servers, job, init_model=str(initial), buffer_size=10, commit_age_max_s=0.6)
    store = redis.Redis.from_url(servers.redis.url)
    until(lambda: store.exists(f"fedmq:{{{job}}}:job"))
    connection = pika.BlockingConnection(pika.URLParameters(servers.rabbitmq.url))
    channel = connection.channel()
    channel.basic_publish("fedmq.updates", f"update.{job}.stranger", body)
    run_raw_client(servers.rabbitmq.url, servers.redis.url, job)
    until(lambda: int(store.hget(f"fedmq:{{{job}}}:head", "version") or 0) >= 1)
    method, properties, dead = None, None, None
    while method is None:
        method, properties, dead = channel.basic_get(f"fedmq.dead.{job}", auto_ack=True)
    connection.close()
    assert dead == body
    assert properties.headers["fedmq-reason"] in ("malformed", "format")
    assert properties.headers["fedmq-detail"]
