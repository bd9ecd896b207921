"""What the exporter reads of a whole installation, on a real Redis."""

import json
import re

import numpy as np
import pytest
import redis

from aggregator.aggregator import Aggregator
from ops.servers import PrivateServers
from shared.clock import SystemClock
from shared.config import AggregatorSettings
from shared.errors import StoreUnavailable
from shared.messages import encode
from shared.metrics import AggregatorMetrics
from shared.store.redis import RedisStore
from shared.store.redis_acl import acl_line, exporter_rules
from shared.store.redis_watch import AUDIT, DEVICES, RedisWatch
from shared.transport.inprocess import InProcessBroker
from shared.transport.ports import Outgoing
from tests.builders import model_of, update_of

EXPORTER_URL = "redis://fedmq-exporter:pw@127.0.0.1:{port}/0"


@pytest.fixture
def watch(servers: PrivateServers) -> RedisWatch:
    """Return the exporter's eyes, with its real permissions."""
    client = redis.Redis.from_url(servers.redis.url)
    line = acl_line("fedmq-exporter", "pw", exporter_rules())
    client.execute_command("ACL", "SETUSER", "fedmq-exporter", "reset", *line.split()[2:])
    return RedisWatch(EXPORTER_URL.format(port=servers.redis.port))


def run_a_job(url: str, job: str) -> None:
    """Apply three updates of two clients, two to a version, and evaluate it."""
    store, broker = RedisStore(url, job), InProcessBroker()
    store.create(model_of(np.zeros(7, np.float32)), 0.0)
    settings = AggregatorSettings(job=job, codec="float32", buffer_size=2, commit_interval_s=0)
    aggregator = Aggregator(settings, broker.source(job), store, SystemClock(), AggregatorMetrics(), poll_s=0.0)
    for update_id in ("a/i/0", "a/i/1", "b/i/0"):
        update = update_of(np.ones(7, np.float32), job=job, update_id=update_id)
        broker.sink().publish(Outgoing(job, update.client, update_id, encode(update)), 1.0)
    while aggregator.step():
        pass
    aggregator.finish()
    for version, accuracy in ((0, 0.1), (1, 0.8)):
        store.record_evaluation(version, {"accuracy": accuracy})
    store.close()


def test_a_job_is_found_with_where_it_stands_and_who_contributed(servers, job, watch):
    run_a_job(servers.redis.url, job)
    assert job in watch.jobs()
    facts = watch.facts(job)
    assert facts is not None
    assert (facts.head["version"], facts.buffered, facts.totals["applied"]) == ("1", 1, 3)
    assert (facts.evaluated, facts.evaluation) == (1, {"accuracy": 0.8})
    assert facts.contributions == {"a": 2, "b": 1}
    assert watch.evaluations(job, 10) == [(0, {"accuracy": 0.1}), (1, {"accuracy": 0.8})]
    assert {name: record["outcome"] for name, record in watch.clients(job)} == {"a": "applied", "b": "applied"}
    assert watch.durable()


def test_a_job_that_is_gone_or_has_no_commit_yet_is_no_error(servers, job, watch):
    assert watch.facts("never-begun") is None
    RedisStore(servers.redis.url, job).create(model_of(np.zeros(7, np.float32)), 0.0)
    facts = watch.facts(job)
    assert facts is not None
    assert (facts.totals, facts.buffered, facts.evaluated, facts.contributions) == ({}, 0, -1, {})


def test_thousands_of_clients_come_page_by_page(servers, job, watch):
    client = redis.Redis.from_url(servers.redis.url)
    records = {f"device-{n}": json.dumps({"seen": n}) for n in range(3000)}
    client.hset(f"fedmq:{{{job}}}:clients", mapping=records)
    assert {name: record["seen"] for name, record in watch.clients(job)} == {f"device-{n}": n for n in range(3000)}


def test_only_new_audit_events_are_counted_each_as_often_as_it_happened(servers, watch):
    client = redis.Redis.from_url(servers.redis.url)
    client.xadd(AUDIT, {"kind": "enrolled"})
    assert watch.audit_counts() == {}, "what was there before this exporter is not new"
    client.xadd(AUDIT, {"kind": "login_failed", "count": 4})
    client.xadd(AUDIT, {"kind": "login_failed"})
    client.xadd(AUDIT, {"kind": "revoked"})
    assert watch.audit_counts() == {"login_failed": 5, "revoked": 1}
    assert watch.audit_counts() == {}


def test_the_exporter_cannot_write_a_job_or_the_registry(servers, job, watch):
    run_a_job(servers.redis.url, job)
    own = redis.Redis.from_url(EXPORTER_URL.format(port=servers.redis.port), protocol=2)
    for command in (
        ("HSET", f"fedmq:{{{job}}}:head", "version", "99"), ("DEL", f"fedmq:{{{job}}}:head"),
        ("HSET", DEVICES, "x.y", "{}"), ("CONFIG", "SET", "appendonly", "no"), ("FLUSHALL",),
    ):  # fmt: skip
        with pytest.raises(redis.exceptions.NoPermissionError):
            own.execute_command(*command)


def test_an_unreachable_store_is_said_as_such():
    with pytest.raises(StoreUnavailable, match=re.escape("redis://127.0.0.1:1/0")):
        RedisWatch("redis://127.0.0.1:1/0").jobs()
