"""The simulator equals the production loops, stepped by hand: real folders, a replica and a model for each worker."""

import heapq
from pathlib import Path

import pytest

from aggregator.aggregator import Aggregator
from ops.simulation.plan import share_settings
from shared.clock import VirtualClock
from shared.config import WorkerSettings
from shared.metrics import AggregatorMetrics, WorkerMetrics
from shared.store.inprocess import InProcessStore
from shared.transport.inprocess import InProcessBroker
from tests.simulation.runs import TASK, small, whole
from worker.outbox import Outbox
from worker.publisher import Publisher
from worker.task import Task
from worker.training import Trainer, seed_everything
from worker.worker import Worker

SECONDS = (10.0, 13.1371, 29.2717, 31.5193)  # no two of them ever end together
PLANS = {
    "none": {"codec": "none"},
    "default": {},
    "feedback": {"codec": "tiny"},
    "stale": {"codec": "ef | topk(0.2)", "staleness_max": 1, "buffer_size": 1},
    "downlink": {"downlink": "on"},
    "bfloat16": {"snapshots": "bfloat16", "codec": "ef | sign"},
    "fedasync": {"rule": "fedasync"},
    "area": {"rule": "area"},
    "ca2fl": {"rule": "ca2fl"},
    "ace": {"rule": "ace"},
    "momentum": {"server_optimizer": "momentum(0.9)"},
    "rounds": {"rule": "fedavg", "buffer_size": 4},
}  # fmt: skip


class ByHand:
    """Four workers and an aggregator; nothing of the simulator."""

    def __init__(self, plan, folder):
        self.plan, self.clock, self.broker, self.store = plan, VirtualClock(), InProcessBroker(), InProcessStore()
        seed_everything(plan.fleet.seed)
        trainer = Trainer(Task.load(TASK))
        seed_everything(plan.fleet.seed)
        self.store.create(trainer.initial(), 0.0)
        job = plan.aggregator.job
        self.aggregator = Aggregator(
            plan.aggregator, self.broker.source(job), self.store, self.clock, AggregatorMetrics(), poll_s=0.0
        )
        self.store.announce(self.aggregator.describe())
        self.trips, self.published = [], 0
        self.devices = [self.device(folder, number, job, trainer.task) for number in range(len(SECONDS))]

    def device(self, folder, number, job, task):
        """Return a worker and its publisher."""
        name, metrics, seed = f"client-{number}", WorkerMetrics(), self.plan.fleet.seed
        settings = WorkerSettings(
            job=job, client_id=name, seed=seed, task_settings=share_settings(self.plan.fleet, number)
        )  # fmt: skip
        outbox = Outbox(folder / name, name, 100, 2**28, sync=False)
        publisher = Publisher(job, name, outbox, self.broker.sink(), self.clock, metrics, 1.0)
        trainer = Trainer(task)
        return Worker(settings, trainer, self.store, outbox, publisher, self.clock, metrics), publisher

    def begin(self, number):
        """Let a worker train; it is done when its seconds are over."""
        if self.devices[number][0].step():
            heapq.heappush(self.trips, (self.clock.time_s + SECONDS[number], number))
            return True
        return False

    def run(self):
        """Run until enough updates are published."""
        waiting = set(range(len(SECONDS)))
        while self.published < self.plan.fleet.updates:
            waiting -= {number for number in sorted(waiting) if self.begin(number)}
            self.clock.time_s, number = heapq.heappop(self.trips)
            assert self.devices[number][1].step()
            self.published += 1
            while self.aggregator.step():
                pass
            waiting.add(number)
        self.aggregator.finish()


@pytest.mark.parametrize("name", PLANS)
def test_the_simulator_is_the_production_loops(name, tmp_path):
    trace = tmp_path / "trace.csv"
    trace.write_text("".join(f"device{number},{seconds}\n" for number, seconds in enumerate(SECONDS)))
    options = {"buffer_size": 3, "updates": 80} | PLANS[name]
    plan = small(options, clients=4, concurrency=4, speed=f"trace:{Path(trace)}")
    hand = ByHand(plan, tmp_path)
    hand.run()
    run = whole(plan).simulator
    assert run.clock.time_s == hand.clock.time_s
    entries = [entry for commit in hand.store.ledger for entry in commit["updates"]]
    assert run.history.staleness == [entry["staleness"] for entry in entries if entry["outcome"] == "applied"]
    assert len(entries) == run.history.outcomes.total() == 80
    assert run.aggregator.state.version == hand.aggregator.state.version > 10
    assert run.model().data.tobytes() == hand.store.model(hand.aggregator.state.version).data.tobytes()
    if name == "stale":
        assert run.history.outcomes["stale"] > 5
