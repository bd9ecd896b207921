"""The contract client of ops/guides/contract.md, run by the tests as it stands there."""

import os
import subprocess
import sys

import numpy as np
import redis

RAW_CLIENT = """
import json, os, time, uuid, zlib
import msgpack, numpy, pika, redis

job, client, me = os.environ["FEDMQ_JOB"], "stranger", uuid.uuid4().hex[:8]
store = redis.Redis.from_url(os.environ["FEDMQ_STORE_URL"])
head = {k.decode(): v.decode() for k, v in store.hgetall(f"fedmq:{{{job}}}:head").items()}
channel = pika.BlockingConnection(pika.URLParameters(os.environ["FEDMQ_BROKER_URL"])).channel()
channel.confirm_delivery()
for sequence in range(10):
    delta = numpy.random.default_rng(sequence).standard_normal(int(head["num_params"])).astype("<f4")
    body = msgpack.packb({
        "format": 1, "job": job, "client": client, "update_id": f"{client}/{me}/{sequence}",
        "base_version": int(head["version"]), "num_samples": 100, "num_steps": 5, "layout": head["layout"],
        "codec": {"name": "float32"}, "payload": delta.tobytes(), "checksum": zlib.crc32(delta.tobytes()),
        "metrics": {}, "train_seconds": 1.0, "created_at": time.time(),
    })
    properties = pika.BasicProperties(delivery_mode=2, message_id=f"{client}/{me}/{sequence}", type="update",
                                      content_type="application/vnd.fedmq.update+msgpack")
    channel.basic_publish("fedmq.updates", f"update.{job}.{client}", body, properties, mandatory=True)
"""


def run_raw_client(broker_url, store_url, job):
    """Run it in a process of its own; return the ten deltas it sends."""
    environment = os.environ | {"FEDMQ_JOB": job, "FEDMQ_BROKER_URL": broker_url, "FEDMQ_STORE_URL": store_url}
    subprocess.run([sys.executable, "-c", RAW_CLIENT], env=environment, check=True, timeout=30, cwd="/")
    num_params = int(redis.Redis.from_url(store_url).hget(f"fedmq:{{{job}}}:head", "num_params"))
    return [np.random.default_rng(s).standard_normal(num_params).astype("<f4") for s in range(10)]


def aggregator_of(processes, servers, job, **settings):
    """Start an aggregator process of this job."""
    return processes.start(
        "aggregator", broker_url=servers.rabbitmq.url, store_url=servers.redis.url, job=job, **settings
    )  # fmt: skip
