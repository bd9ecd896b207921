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
from shared.store.redis_watch import AUDIT, DEVICES, REFUSALS, RedisWatch
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
    client.xadd(REFUSALS, {"kind": "login_failed", "count": 4})
    client.xadd(REFUSALS, {"kind": "login_failed"})
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


@pytest.mark.parametrize(
    ("key", "spoil"),
    [
        ("head", lambda client, key: client.hdel(key, "version")),
        ("head", lambda client, key: client.hset(key, "version", "1.5")),
        ("head", lambda client, key: client.hset(key, "created_at", "inf")),
        ("state", lambda client, key: client.set(key, b"\xc1")),
        ("state", lambda client, key: client.set(key, b"\x81\xa6totals\xc0")),
        ("ledger", lambda client, key: client.xadd(key, {"updates": "[{}]"})),
        ("ledger", lambda client, key: (client.delete(key), client.set(key, "no stream"))),
        ("evaluations", lambda client, key: client.xadd(key, {"version": "2", "metrics": "{"})),
    ],
)
def test_a_job_that_makes_no_sense_is_left_out_and_named_once(servers, job, watch, caplog, key, spoil):
    run_a_job(servers.redis.url, job)
    spoil(redis.Redis.from_url(servers.redis.url), f"fedmq:{{{job}}}:{key}")
    assert watch.facts(job) is None
    assert watch.facts(job) is None
    assert [f"job {job} makes no sense and is left out" in text for text in caplog.messages] == [True]


@pytest.mark.parametrize("odd", ['{"accuracy": 0.5, "acc": "x", "none": null, "more": {}}', "7", "null", "[]"])
def test_of_an_evaluation_only_the_numbers_are_taken(servers, job, watch, caplog, odd):
    run_a_job(servers.redis.url, job)
    redis.Redis.from_url(servers.redis.url).xadd(f"fedmq:{{{job}}}:evaluations", {"version": "2", "metrics": odd})
    for _ in range(2):
        facts = watch.facts(job)
        assert facts is not None
        assert (facts.evaluated, facts.evaluation) == (2, {"accuracy": 0.5} if "acc" in odd else {})
    assert len(caplog.messages) <= 1


def test_odd_records_of_clients_and_devices_are_left_out_and_said_once(servers, job, watch, caplog):
    client = redis.Redis.from_url(servers.redis.url)
    odd = {"b": "{", "c": "7", "d": '{"seen": "x"}', "e": '{"base_version": null}', b"\xff": "{}"}
    client.hset(f"fedmq:{{{job}}}:clients", mapping={"a": '{"seen": 1}', **odd})
    client.hset(
        DEVICES, mapping={f"{job}.a": '{"enrolled_at": 1}', f"{job}.b": "[]", f"{job}.c": '{"enrolled_at": {}}'}
    )
    for _ in range(2):
        assert {name: record["seen"] for name, record in watch.clients(job)} == {"a": 1.0, "\ufffd": 0.0}
        assert [login for login, _ in watch.devices() if login.startswith(job)] == [f"{job}.a"]
    assert len([text for text in caplog.messages if "clients" in text]) == 2, "what is no JSON, what is none of ours"
    client.delete(DEVICES)
    client.delete(f"fedmq:{{{job}}}:clients")
    client.set(f"fedmq:{{{job}}}:clients", "no hash")
    assert list(watch.clients(job)) == []
