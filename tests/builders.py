"""Small models, updates and a whole job in one process, for the tests of every folder."""

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgpack
import numpy as np

from aggregator.aggregator import Aggregator
from shared.clock import VirtualClock
from shared.compression import parse
from shared.config import AggregatorSettings, WorkerSettings
from shared.errors import RejectedUpdate, StoreUnavailable, Unavailable
from shared.messages import Update, decode, encode
from shared.metrics import AggregatorMetrics, WorkerMetrics
from shared.model_image import ModelImage
from shared.store.inprocess import InProcessStore
from shared.store.ports import Commit
from shared.transport.inprocess import InProcessBroker, InProcessSource
from shared.transport.ports import Delivery, Outgoing
from shared.vector import Vector
from worker.outbox import Outbox
from worker.publisher import Publisher
from worker.task import Task, TrainResult
from worker.training import Trainer
from worker.worker import Worker

JOB = "job"
NUM_PARAMS = 7
STEPS_MAX = 2000  # many more than any test has deliveries


def weights(seed: int, num_params: int = NUM_PARAMS) -> Vector:
    """Return a reproducible random vector."""
    return np.random.default_rng(seed).standard_normal(num_params, np.float32)


def model_of(vector: Vector) -> ModelImage:
    """Return a model of one tensor `w`."""
    return ModelImage.of({"w": vector})


def update_of(delta: Vector, codec: str = "float32", seed: int = 0, **changes: Any) -> Update:
    """Return a valid update of a one-tensor model; its client is the first part of its id."""
    encoded = parse(codec).encode(delta, model_of(delta).layout, np.random.default_rng(seed))
    update = Update(
        job=JOB, client="a", update_id="a/i/0", base_version=0, num_samples=1, num_steps=1,
        layout=model_of(delta).layout.hash, codec={"name": codec, **encoded.params}, payload=encoded.payload,
        metrics={"loss": 0.5}, train_seconds=1.0, created_at=0.0,
    )  # fmt: skip
    update = replace(update, **changes)
    return update if "client" in changes else replace(update, client=update.update_id.split("/")[0])


def record_of(update: Update) -> dict[str, Any]:
    """Return an update as the contract's map, to be spoiled by a test."""
    record = {"format": 1} | {
        field.name: getattr(update, field.name) for field in fields(Update) if field.name != "part"
    }
    return record | {"checksum": zlib.crc32(update.payload)}


def packed(record: dict[str, Any]) -> bytes:
    """Write a map as a foreign client would."""
    return msgpack.packb(record, use_bin_type=True)


def delivery_of(body: bytes, client: str = "a", user_id: str | None = None) -> Delivery:
    """Return what a source would deliver."""
    return Delivery(body, client, user_id, "", (0, 1))


def work(step: Callable[[], bool]) -> None:
    """Call a step until it has nothing to do; a loop that never rests is a failure, not a hanging test."""
    for _ in range(STEPS_MAX):
        if not step():
            return
    raise AssertionError(f"still at work after {STEPS_MAX} steps")


class System:
    """One job in one process: broker, store and a real aggregator under a clock that stands still.

    Versions are committed as soon as they are made, unless `commit_interval_s` says otherwise.
    """

    def __init__(self, start: Vector | ModelImage | None = None, store: Any = None, **settings: Any) -> None:
        self.broker, self.clock, self.metrics = InProcessBroker(), VirtualClock(), AggregatorMetrics()
        self.store = store or InProcessStore()
        self.settings = AggregatorSettings(**{"job": JOB, "codec": "float32", "commit_interval_s": 0.0} | settings)
        start = np.zeros(NUM_PARAMS, np.float32) if start is None else start
        self.store.create(start if isinstance(start, ModelImage) else model_of(start), 0.0)
        self.sequence = self.sent = 0
        self.source: Any = None
        self.start()

    def start(self, wrap: Callable[[InProcessSource], Any] = lambda source: source, **settings: Any) -> Aggregator:
        """Start an aggregator from what is stored."""
        if settings:
            self.settings = AggregatorSettings(**self.settings.model_dump(exclude_unset=True) | settings)
        self.source = wrap(self.broker.source(self.settings.job))
        self.aggregator = Aggregator(self.settings, self.source, self.store, self.clock, self.metrics, poll_s=0.0)
        self.store.announce(self.aggregator.describe())
        return self.aggregator

    def restart(self, **settings: Any) -> Aggregator:
        """Kill the aggregator, which commits and acks nothing more, and start another."""
        self.source.close()
        return self.start(**settings)

    def publish(self, delta: Vector, **changes: Any) -> Update:
        """Publish an update under a fresh id, trained from the newest visible version unless told otherwise."""
        defaults = {"update_id": f"a/i/{self.sequence}", "base_version": self.store.head().version}
        self.sequence += 1
        update = update_of(delta, **defaults | changes)
        self.send(update)
        return update

    def send(self, update: Update) -> None:
        """Publish these bytes (again)."""
        self.send_bytes(encode(update), update.client, update.update_id)

    def send_bytes(self, body: bytes, client: str = "a", update_id: str | None = None) -> None:
        """Publish any bytes, under the id they carry, if they do, and one of their own else."""
        self.sent += 1
        if update_id is None:
            try:
                update_id = decode(body, 10**9).update_id
            except RejectedUpdate:
                update_id = f"{client}/sent/{self.sent}"
        self.broker.sink().publish(Outgoing(self.settings.job, client, update_id, body), 1.0)

    def step(self) -> bool:
        """Step as `run` does: a store that does not answer is tried again later."""
        try:
            return self.aggregator.step()
        except Unavailable:
            self.clock.time_s += 0.05
            return False

    def drain(self) -> None:
        """Step until there is nothing to do."""
        work(self.step)

    @property
    def weights(self) -> Vector:
        """The newest version anybody can pull."""
        return self.store.model(self.store.head().version).weights

    @property
    def unacked(self) -> int:
        """Number of deliveries the broker would deliver again."""
        return len(self.source._unacked)

    def outcomes(self) -> list[tuple[str, str]]:
        """Return (update_id, outcome) of every durable ledger entry, in order."""
        return [(entry["id"], entry["outcome"]) for commit in self.store.ledger for entry in commit["updates"]]


class FaultyStore:
    """A store whose next commits fail as told: `before` nothing happened, `after` only the answer was lost."""

    def __init__(self) -> None:
        self.inner = InProcessStore()
        self.faults: list[str | None] = []
        self.failing: tuple[str, ...] = ()  # reads that find no server

    def __getattr__(self, name: str) -> Any:
        if name in self.failing:
            raise StoreUnavailable("the store is away")
        return getattr(self.inner, name)

    def commit(self, commit: Commit) -> None:
        """Commit, or fail before or after it."""
        fault = self.faults.pop(0) if self.faults else None
        if fault != "before":
            self.inner.commit(commit)
        if fault:
            raise StoreUnavailable(f"no answer ({fault})")


class WindowedSource:
    """A source that, as RabbitMQ does, hands out no more than `prefetch` deliveries that are not acked."""

    def __init__(self, inner: InProcessSource, prefetch: int) -> None:
        self.inner, self._prefetch = inner, prefetch

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def receive(self, limit: int, wait_s: float) -> Sequence[Delivery]:
        """Receive what still fits the window."""
        return self.inner.receive(min(limit, self._prefetch - len(self.inner._unacked)), wait_s)


@dataclass
class Device:
    """A worker and what belongs to it."""

    worker: Worker
    publisher: Publisher
    outbox: Outbox
    metrics: WorkerMetrics


def device_of(
    folder: Path, system: System, train: Callable[[Any, Any], Any], build: Callable[[], Any], store: Any = None,
    sink: Any = None, **settings: Any,
) -> Device:  # fmt: skip
    """Return a worker of a system's job with a task of two functions."""
    settings = WorkerSettings(**{"job": system.settings.job, "client_id": "a"} | settings)
    metrics = WorkerMetrics()
    outbox = Outbox(folder / settings.client_id, settings.client_id, 100, 2**28, sync=False)
    publisher = Publisher(
        settings.job, settings.client_id, outbox, sink or system.broker.sink(), system.clock, metrics, 1.0
    )  # fmt: skip
    task = Task("test", SimpleNamespace(build=build, train=train))
    worker = Worker(settings, Trainer(task), store or system.store, outbox, publisher, system.clock, metrics)
    return Device(worker, publisher, outbox, metrics)


def add_one(model: dict[str, Any], context: Any) -> TrainResult:
    """Train by adding 1 to every weight."""
    for array in model.values():
        if array.dtype.kind == "f":
            array += 1
    return TrainResult(num_samples=3, num_steps=2, metrics={"loss": 0.25})
