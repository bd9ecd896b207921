"""Servers, names and the invariants every contract test keeps."""

import logging
import threading
import uuid
from collections.abc import Iterator

import pytest

from ops.servers import PrivateServers
from tests.contract.faults import wait_until
from tests.contract.stores import InProcess, InRedis, Store
from tests.servers_fixture import servers

__all__ = ["servers"]

logging.getLogger("pika").setLevel(logging.CRITICAL)  # as in every program of ours


@pytest.fixture
def job() -> str:
    """Return the id of a job of this test alone."""
    return f"job-{uuid.uuid4().hex[:12]}"


@pytest.fixture(params=["inprocess", "redis"])
def store(request: pytest.FixtureRequest, job: str) -> Iterator[Store]:
    if request.param == "inprocess":
        yield InProcess()
    else:
        yield from in_redis_of(request.getfixturevalue("servers"), job)


@pytest.fixture
def in_redis(servers: PrivateServers, job: str) -> Iterator[InRedis]:
    yield from in_redis_of(servers, job)


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> int:
    """Cut what is stored into pieces of 64 bytes, as 64 MiB cut a large model; return their size."""
    monkeypatch.setattr("shared.model_image.CHUNK_BYTES", 64)
    return 64


def in_redis_of(servers: PrivateServers, job: str) -> Iterator[InRedis]:
    adapter = InRedis(servers.redis.url, job)
    yield adapter
    assert adapter.keys("stage:*") == [], "pieces of a commit were left behind"
    adapter.close()


@pytest.fixture(autouse=True)
def no_thread_left_behind() -> Iterator[None]:
    """Every connection a test closed ends its thread."""
    yield

    def left() -> list[str]:
        return [thread.name for thread in threading.enumerate() if thread.name.startswith("amqp ")]

    wait_until(lambda: not left(), 10, lambda: f"threads still running: {left()}")


@pytest.fixture(autouse=True)
def no_unforeseen_error(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Faults are foreseen: none may surface as an exception that only a catch-all stopped."""
    caplog.set_level(logging.WARNING, "fedmq")
    yield
    caught = [r for when in ("setup", "call") for r in caplog.get_records(when) if r.exc_info and r.name[:5] == "fedmq"]
    assert not caught, f"{caught[0].getMessage()}: {caught[0].exc_info[1]!r}"
