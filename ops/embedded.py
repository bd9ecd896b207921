"""The whole system in one process: the production loops over in-process adapters, in virtual time.

Training is real and so are the encoded bytes; only the clock is not: a worker's pull happens at the start of its
trip and its publish at the end, so that updates are as stale as its speed makes them. One thread runs everything
in the order of events, so a seed fixes the result bit for bit.
"""

import heapq
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from aggregator.aggregator import Aggregator
from ops.history import History
from shared.clock import VirtualClock
from shared.config import AggregatorSettings, WorkerSettings
from shared.errors import TaskError
from shared.metrics import AggregatorMetrics, WorkerMetrics
from shared.model_image import ModelImage
from shared.store.inprocess import InProcessStore
from shared.transport.inprocess import InProcessBroker
from worker.outbox import Outbox
from worker.publisher import Publisher
from worker.task import Context, Task, read, write
from worker.training import Trainer
from worker.worker import Worker

TRIP_SPREAD = 0.3  # standard deviation of a trip's duration around the worker's own, relative


@dataclass
class _Device:
    worker: Worker
    publisher: Publisher
    metrics: WorkerMetrics
    mean_trip_s: float


class Embedded:
    """A fleet, a broker, a store, an aggregator and an evaluator in one process.

    Args:
        task: what to train.
        settings: the aggregator's; `job` and the rule's parameters count, servers do not.
        workers: one per device.
        mean_trips_s: each device's mean seconds from pull to publish; its length is the number of devices.
        seed: of durations and of everything the workers do.
        mean_rest_s: mean seconds a device rests between two trips, exponential; 0: it never does.
    """

    def __init__(
        self,
        task: Task,
        settings: AggregatorSettings,
        workers: list[WorkerSettings],
        mean_trips_s: list[float],
        seed: int,
        mean_rest_s: float = 0.0,
    ) -> None:
        self.clock = VirtualClock()
        self.broker, self.store = InProcessBroker(), InProcessStore()
        self._task, self._model = task, task.build()
        self.store.create(read(self._model), self.clock.now())
        self.aggregator = Aggregator(
            settings, self.broker.source(settings.job), self.store, self.clock, AggregatorMetrics(), poll_s=0.0
        )
        self.store.announce(self.aggregator.describe())
        self.history = History(self.aggregator.state.model.layout.num_params)
        self._folder = tempfile.TemporaryDirectory(prefix="fedmq-outbox-")
        self._devices = [self._device(w, trip) for w, trip in zip(workers, mean_trips_s, strict=True)]
        self._rng = np.random.default_rng(seed)
        self._entries_seen = 0
        self._mean_rest_s = mean_rest_s

    def run(self, updates: int, evaluate_every: int) -> Iterator[History]:
        """Run until `updates` were published, yielding after each evaluation.

        Args:
            updates: how many.
            evaluate_every: versions between two evaluations, >= 1.

        Raises:
            TaskError: the task raised.
        """
        self._evaluate()
        yield self.history
        events = [(self._rest_s(), index, "train") for index in range(len(self._devices))]
        heapq.heapify(events)
        published, evaluated = 0, 0
        while published < updates:
            time_s, index, action = heapq.heappop(events)
            self.clock.time_s = time_s
            device = self._devices[index]
            if action == "train":
                if not device.worker.step():
                    raise TaskError(f"worker {index} had no model to train")
                spread = 1.0 + TRIP_SPREAD * float(self._rng.standard_normal())
                heapq.heappush(events, (time_s + device.mean_trip_s * max(0.1, spread), index, "publish"))
                continue
            device.publisher.step()
            published += 1
            while self.aggregator.step():
                pass
            heapq.heappush(events, (time_s + self._rest_s(), index, "train"))
            if self.aggregator.state.committed_version >= evaluated + evaluate_every:
                evaluated = self.aggregator.state.committed_version
                self._evaluate()
                yield self.history
        self.aggregator.finish()
        self._evaluate()
        yield self.history

    def _rest_s(self) -> float:
        return float(self._rng.exponential(self._mean_rest_s)) if self._mean_rest_s else 0.0

    def model(self) -> ModelImage:
        """Return the newest version."""
        return self.store.model(self.aggregator.state.committed_version)

    def close(self) -> None:
        """Remove the outboxes."""
        self._folder.cleanup()

    def _evaluate(self) -> None:
        version = self.aggregator.state.committed_version
        write(self._model, self.store.model(version))
        metrics = self._task.evaluate(self._model, Context("", version, 0))
        self.store.record_evaluation(version, metrics)
        for commit in self.store.ledger[self._entries_seen :]:
            self.history.add_entries(commit["updates"])
        self._entries_seen = len(self.store.ledger)
        self.history.pulled(*(sum(column) for column in zip(*(d.metrics.pulled() for d in self._devices), strict=True)))
        self.history.evaluated(self.clock.now(), version, metrics)

    def _device(self, settings: WorkerSettings, mean_trip_s: float) -> _Device:
        folder = Path(self._folder.name) / settings.client_id
        outbox = Outbox(folder, settings.client_id, settings.outbox_updates_max, settings.outbox_bytes_max, sync=False)
        metrics = WorkerMetrics()
        publisher = Publisher(
            settings.job, settings.client_id, outbox, self.broker.sink(), self.clock, metrics,
            settings.confirm_timeout_s,
        )  # fmt: skip
        worker = Worker(settings, Trainer(self._task), self.store, outbox, publisher, self.clock, metrics)
        return _Device(worker, publisher, metrics, mean_trip_s)
