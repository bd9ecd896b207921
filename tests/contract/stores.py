"""The two adapters of the store port behind one face, for the suite that runs over both."""

import copy
import json
from typing import Any, Protocol

import msgpack
import numpy as np
import redis

from shared.layout import Layout
from shared.model_image import ModelImage
from shared.store.inprocess import InProcessStore
from shared.store.ports import Commit, StateStore, VersionStore
from shared.store.redis import RedisStore
from shared.store.redis_versions import RedisVersions

NUM_PARAMS = 6 * 7 + 7 + 3


def image(value: float) -> ModelImage:
    """Return a model whose every weight is `value`, with a kept tensor of each width."""
    return ModelImage.of(
        {
            "layer.weight": np.full((6, 7), value, np.float32),
            "num_batches_tracked": np.array(12, np.int64),
            "layer.bias": np.full(7, value, np.float32),
            "mask": np.array([True, False, True]),
            "half": np.full(3, value, np.float16),
        }
    )


def array(value: float) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Return a vector of model size."""
    return np.full(NUM_PARAMS, value, np.float32)


def commit_of(revision: int, version: int, model: ModelImage | None = None, **changes: Any) -> Commit:
    """Return a commit from `revision` to the next one, with a token of its own."""
    arrays = changes.pop("arrays", {})
    values: dict[str, Any] = {
        "expected_revision": revision, "token": f"token-{revision}-{version}", "version": version, "model": model,
        "arrays": arrays, "state": state_of(*arrays), "applied": {}, "applied_floor": 0, "ledger": "[]", "clients": {},
        "meta": {}, "dropped_versions": [], "now": 1000.0 + revision,
    }  # fmt: skip
    return Commit(**values | changes)


def state_of(*arrays: str, **rest: Any) -> bytes:
    """Return the small part of a state as the aggregator writes it: it names the arrays that go with it."""
    packed: bytes = msgpack.packb({"arrays": list(arrays), **rest})
    return packed


class Store(Protocol):
    """What the suite needs of an adapter."""

    def open(self) -> StateStore:
        """Return a client of the job's store."""

    def operator(self) -> VersionStore:
        """Return an operator's client of it."""

    def snapshot(self) -> Any:
        """Return all that is stored, to be compared."""

    def ledger(self) -> list[dict[str, Any]]:
        """Return the ledger's entries."""

    def clients(self) -> dict[str, Any]:
        """Return what is known of the clients."""

    def meta(self, version: int) -> dict[str, str]:
        """Return what is known of a version."""

    def forgets(self, version: int) -> bool:
        """Tell whether nothing is known of a version, or nothing will be before long."""

    def close(self) -> None:
        """Close every client."""


class InProcess:
    """The in-process adapter."""

    def __init__(self) -> None:
        self._store = InProcessStore()

    def open(self) -> StateStore:
        """Return the one store."""
        return self._store

    def operator(self) -> VersionStore:
        """Return the one store."""
        return self._store

    def snapshot(self) -> Any:
        """Return its attributes; arrays as bytes, which compare."""
        held = {name: value for name, value in vars(self._store).items() if name != "_lock"}
        held["_arrays"] = {name: value.tobytes() for name, value in self._store._arrays.items()}
        return copy.deepcopy(held)

    def ledger(self) -> list[dict[str, Any]]:
        """Return the entries."""
        return list(self._store.ledger)

    def clients(self) -> dict[str, Any]:
        """Return the clients."""
        return self._store.clients

    def meta(self, version: int) -> dict[str, str]:
        """Return the facts; empty when there are none."""
        return self._store.meta.get(version, {})

    def forgets(self, version: int) -> bool:
        """Nothing is known."""
        return self.meta(version) in ({}, {"evaluation:accuracy": "0.5"})  # one job, one process: it may stay

    def close(self) -> None:
        """Nothing is open."""


class InRedis:
    """The Redis adapter, and a plain client to look at what it did."""

    def __init__(self, url: str, job: str) -> None:
        self.url, self.job, self.prefix = url, job, f"fedmq:{{{job}}}:"
        self.plain: Any = redis.Redis.from_url(url, protocol=2)
        self._opened: list[RedisStore] = []

    def open(self) -> RedisStore:
        """Return a client with connections of its own."""
        self._opened.append(RedisStore(self.url, self.job))
        return self._opened[-1]

    def operator(self) -> RedisVersions:
        """Return an operator's client with connections of its own."""
        client = RedisVersions(self.url, self.job)
        self._opened.append(client)
        return client

    def key(self, name: str) -> str:
        """Return the full name of a key of the job."""
        return self.prefix + name

    def keys(self, pattern: str = "*") -> list[str]:
        """Return the job's keys, without their prefix."""
        found = self.plain.scan_iter(match=f"fedmq:{{{self.job}}}:{pattern}", count=1000)
        return sorted(key.decode().removeprefix(self.prefix) for key in found)

    def snapshot(self) -> Any:
        """Return every key as Redis itself serializes it, and whether it expires."""
        return {name: (self.plain.dump(self.key(name)), self.plain.ttl(self.key(name)) >= 0) for name in self.keys()}

    def ledger(self) -> list[dict[str, Any]]:
        """Return the stream's entries."""
        return [
            {
                "revision": int(entry[b"revision"]),
                "version": int(entry[b"version"]),
                "updates": json.loads(entry[b"updates"]),
            }
            for _, entry in self.plain.xrange(self.key("ledger"))
        ]

    def clients(self) -> dict[str, Any]:
        """Return the clients hash."""
        return {name.decode(): json.loads(text) for name, text in self.plain.hgetall(self.key("clients")).items()}

    def meta(self, version: int) -> dict[str, str]:
        """Return the meta hash."""
        return {k.decode(): v.decode() for k, v in self.plain.hgetall(self.key(f"meta:{version}")).items()}

    def forgets(self, version: int) -> bool:
        """The meta hash is gone, or expires."""
        return self.plain.ttl(self.key(f"meta:{version}")) != -1

    def close(self) -> None:
        """Close every client."""
        for opened in self._opened:
            opened.close()
        self.plain.close()


LAYOUT: Layout = image(0).layout
