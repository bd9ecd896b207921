"""What a Redis with logins still knows after its death: it loads its own file as the user `default`, who is off."""

import shutil
from collections.abc import Iterator

import numpy as np
import pytest

from ops.secured_servers import SecuredServers
from shared.clock import SystemClock
from shared.model_image import ModelImage
from shared.store.redis import RedisStore
from shared.store.redis_link import connect

JOB = "job-a"
HEAD = f"fedmq:{{{JOB}}}:head"


@pytest.fixture
def servers() -> Iterator[SecuredServers]:
    """Yield servers of which only Redis runs."""
    prepared = SecuredServers((JOB,))
    try:
        prepared.redis.start()
        yield prepared
    finally:
        prepared.redis.stop()
        shutil.rmtree(prepared.folder, ignore_errors=True)


def test_what_was_committed_in_a_transaction_outlives_a_kill(servers: SecuredServers) -> None:
    url = servers.url("aggregator", "store_url")
    RedisStore(url, JOB).create(ModelImage.of({"w": np.zeros((4, 3), np.float32)}), SystemClock().now())
    with connect(url, 10.0).pipeline(transaction=True) as commit:
        commit.hset(HEAD, "note", "of a transaction")
        commit.execute()
    before = RedisStore(url, JOB).head()
    servers.redis.kill()
    servers.redis.start()
    assert before is not None
    assert RedisStore(url, JOB).head() == before
    assert connect(url, 10.0).hget(HEAD, "note") == b"of a transaction"
