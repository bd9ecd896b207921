"""What stands beside a message - routing key, message_id, headers - is as hostile as the message itself.

One that cannot be read must not end the connection: it would be delivered again, for ever, and no update behind it.
"""

import struct
from collections.abc import Iterator
from typing import Any

import pika
import pika.data
import pytest

from aggregator.aggregator import Aggregator
from ops.servers import PrivateServers
from shared.clock import SystemClock
from shared.config import AggregatorSettings
from shared.messages import encode
from shared.metrics import AggregatorMetrics
from shared.store.inprocess import InProcessStore
from shared.transport.names import EXCHANGE, routing_key
from shared.transport.rabbitmq import queue_depths
from tests.builders import model_of, update_of, weights
from tests.contract.brokers import Rabbit, plain_channel
from tests.contract.faults import wait_until


class Raw(dict[str, Any]):
    """A table of headers that is encoded already: pika would not write it."""

    def __init__(self, encoded: bytes) -> None:
        super().__init__()
        self.encoded = encoded


def entry(value: bytes, key: bytes = b"x") -> Raw:
    return Raw(bytes([len(key)]) + key + value)


def nested(levels: int, array: bool) -> Raw:
    """Return a table of tables, or an array of arrays, so deep."""
    inner = b"t\x01" if array else b"\x01xt\x01"
    for _ in range(levels):
        size = struct.pack(">I", len(inner))
        inner = b"A" + size + inner if array else b"\x01xF" + size + inner
    return Raw(b"\x01x" + inner) if array else Raw(inner)


HOSTILE: dict[str, dict[str, Any]] = {
    "a message_id that is no text": {"message_id": b"\xff\xfe"},
    "a type that is no text": {"type": b"\xff\xfe"},
    "a timestamp beyond all time": {"headers": entry(b"T" + struct.pack(">Q", 2**63))},
    "a timestamp in the year 33658": {"headers": entry(b"T" + struct.pack(">Q", 10**12))},
    "tables in tables": {"headers": nested(2000, array=False)},
    "arrays in arrays": {"headers": nested(2000, array=True)},
    "a header's name that is no text": {"headers": entry(b"t\x01", key=b"\xff\xff")},
    "a header's value that is no text": {"headers": entry(b"S\x00\x00\x00\x02\xff\xfe", key=b"fedmq-replayed")},
    "a routing key that is no text": {},
}


@pytest.fixture
def raw_headers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have pika send `Raw` headers as they are; it reads as ever."""
    written = pika.data.encode_table

    def encode_table(pieces: list[bytes], table: Any) -> int:
        if not isinstance(table, Raw):
            return int(written(pieces, table))
        pieces += [struct.pack(">I", len(table.encoded)), table.encoded]
        return 4 + len(table.encoded)

    monkeypatch.setattr(pika.data, "encode_table", encode_table)


@pytest.fixture
def rabbit(servers: PrivateServers) -> Iterator[Rabbit]:
    adapter = Rabbit(servers.rabbitmq.url)
    yield adapter
    adapter.close()


def aggregator_of(rabbit: Rabbit, job: str) -> tuple[Aggregator, InProcessStore]:
    store = InProcessStore()
    store.create(model_of(weights(0)), 0.0)
    settings = AggregatorSettings(job=job, codec="float32", buffer_size=1, commit_interval_s=0.0, commit_age_max_s=0.1)
    source = rabbit.source(job)
    return Aggregator(settings, source, store, SystemClock(), AggregatorMetrics(), poll_s=0.05), store


def publish(rabbit: Rabbit, job: str, body: bytes, key: Any = None, **properties: Any) -> None:
    with plain_channel(rabbit.url) as channel:
        channel.confirm_delivery()
        named = pika.BasicProperties(delivery_mode=2, **properties)
        channel.basic_publish(EXCHANGE, key or routing_key(job, "a"), body, named, mandatory=True)


def settle(aggregator: Aggregator, store: InProcessStore, count: int) -> list[dict[str, Any]]:
    """Step until so many messages are settled and durable; return their ledger entries."""

    def entries() -> list[dict[str, Any]]:
        return [update for commit in store.ledger for update in commit["updates"]]

    def enough() -> bool:
        aggregator.step()
        return len(entries()) >= count

    wait_until(enough, 20.0, lambda: f"only {entries()} are settled; the connection: {aggregator._source.link.problem}")
    return entries()


@pytest.mark.usefixtures("raw_headers")
@pytest.mark.parametrize("broken_body", [False, True], ids=["sound", "broken"])
@pytest.mark.parametrize("name", HOSTILE)
def test_whatever_stands_beside_a_message_it_is_settled_and_so_is_the_next(
    rabbit: Rabbit, job: str, name: str, broken_body: bool
) -> None:
    aggregator, store = aggregator_of(rabbit, job)
    body = b"\xc1" if broken_body else encode(update_of(weights(1), update_id="a/i/0", job=job))
    key = f"update.{job}.".encode() + b"\xff\xfe" if "routing" in name else None
    publish(rabbit, job, body, key, **HOSTILE[name])
    publish(rabbit, job, encode(update_of(weights(2), update_id="a/i/1", job=job)), message_id="a/i/1")
    first, second = settle(aggregator, store, 2)
    another = "routing" in name or "message_id" in name  # it then says another client, another id, than the body
    assert first["outcome"] == ("rejected" if broken_body or another else "applied")
    assert (second["id"], second["outcome"]) == ("a/i/1", "applied")
    wait_until(lambda: queue_depths(rabbit.url, job, 10)["dead"] == (first["outcome"] == "rejected"))
    aggregator._source.close()
    wait_until(lambda: queue_depths(rabbit.url, job, 10)["updates"] == 0)
