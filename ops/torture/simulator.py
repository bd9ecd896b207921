"""Runs a schedule: production step()s in virtual time, then calm, then the three checkers.

A run depends on its schedule alone: the same schedule gives the same trace, line by line.
"""

import logging
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from ops.torture import ledger, mass, oracle
from ops.torture.device import WorkerProcess
from ops.torture.fate import World
from ops.torture.history import History, Violation
from ops.torture.jobs import JOB, aggregator_settings
from ops.torture.ledger import Account, Ledger
from ops.torture.network import Network
from ops.torture.processes import AggregatorProcess, EvaluatorProcess
from ops.torture.schedule import AGGREGATORS, Event, Schedule
from ops.torture.system import System
from shared.model_image import ModelImage
from shared.store.inprocess import InProcessStore
from shared.transport.inprocess import InProcessBroker

Given = dict[str, Any]  # the parameters of an event

CALM_ROUNDS_MAX = 25
CALM_STEPS_MAX = 150
LAST_TRAININGS = 1  # in the calm: with error feedback a worker learns at its next training what became of the last


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a run came to.

    Attributes:
        account: of its updates.
        struck: how often each fault struck.
        deaths: how often which kind of process died before, in or after which call.
        events: how many happened.
        trace: line by line, when it was asked for.
        violation: None when every promise was kept.
    """

    account: Account
    struck: Counter[str]
    deaths: Counter[str]
    events: int
    trace: list[str]
    violation: Violation | None


def run(schedule: Schedule, verbose: bool = False) -> Outcome:
    """Run a schedule and judge it.

    Args:
        schedule: what happens.
        verbose: also return the trace.
    """
    simulation = Simulation(schedule, verbose)
    violation = None
    with silence():
        try:
            simulation.play()
            simulation.settle()
            simulation.check()
        except Violation as error:
            violation = error
        except Exception as error:
            violation = Violation("crash", f"{type(error).__name__}: {error}")
            violation.__cause__ = error
    history = simulation.system.history
    account = ledger.account(history, Ledger.of(simulation.system.store))
    world = simulation.system.world
    return Outcome(account, world.struck, world.deaths, len(schedule.events), world.trace or [], violation)


class Simulation:
    """One run.

    Args:
        schedule: what happens.
        verbose: keep a trace.
    """

    def __init__(self, schedule: Schedule, verbose: bool = False) -> None:
        self._schedule = schedule
        job, world, broker, history = schedule.job, World(verbose), InProcessBroker(), History()
        start = np.random.default_rng(schedule.seed).standard_normal(job.shape, np.float32)
        self._image = ModelImage.of({"w": start})
        self.system = System(
            world, InProcessStore(), broker, Network(world, broker, history), history, aggregator_settings(job),
            self._image.layout, schedule.seed,
        )  # fmt: skip
        self.system.store.create(self._image, 0.0)
        broker.source(JOB).close()  # declares the queue
        history.saw_model(0, self._image)
        self.workers = [WorkerProcess(self.system, number) for number in range(job.workers)]
        self.aggregators = [AggregatorProcess(self.system, number) for number in range(AGGREGATORS)]
        for number, aggregator in enumerate(self.aggregators):
            aggregator.step(0)  # the first to start is the one that is served
            aggregator.fate.pause = partial(self._stand_still, number)
        self.evaluator = EvaluatorProcess(self.system)
        self._actions: dict[str, Callable[[Given], object]] = {
            "pull": lambda given: self.workers[given["worker"]].pull(),
            "train": lambda given: self.workers[given["worker"]].train(),
            "publish": lambda given: self.workers[given["worker"]].publish(given["times"]),
            "aggregate": lambda given: self.aggregators[given["aggregator"]].step(given["steps"]),
            "evaluate": lambda given: self.evaluator.step(),
            "broker_restart": self._restart_broker,
            "channel_closed": self._close_channel,
            "store_unreachable": self._lose_store,
            "disk_lost": self._lose_disk,
            "aggregator_stopped": self._stop,
            "letter_replayed": self._replay,
            "clock_jump": self._jump,
        }

    def play(self) -> None:
        """Let everything happen."""
        world = self.system.world
        for event in self._schedule.events:
            world.move_to(event.at_s)
            if world.trace is not None:
                world.trace.append(f"{world.time_s:9.3f} {event.name} {event.given}")
            self._happen(event)

    def settle(self) -> None:
        """Calm: no more faults, everybody is alive, and everything comes to rest.

        Raises:
            Violation: something does not.
        """
        world = self.system.world
        if world.trace is not None:
            world.trace.append(f"{world.time_s:9.3f} calm")
        for fate in [worker.fate for worker in self.workers] + [one.fate for one in self.aggregators]:
            fate.clear()
        self.evaluator.fate.clear()
        world.store_away_s = world.broker_away_s = 0.0
        self._come_to_rest()
        for _ in range(LAST_TRAININGS if "ef" in self.system.settings.codec.split() else 0):
            for worker in self.workers:
                worker.train()
            self._come_to_rest()

    def check(self) -> None:
        """Ask the three checkers.

        Raises:
            Violation: by one of them.
        """
        system = self.system
        found = Ledger.of(system.store)
        for version in sorted(system.history.models):
            if version in system.store._models:
                system.history.saw_model(version, system.store.model(version))
        ledger.check(system.history, found, system.settings, system.broker.dead)
        truth = oracle.Oracle(self._image.weights.astype(np.float64), system.settings)
        header_bytes = self._image.data.size - 4 * system.layout.num_params
        oracle.check(truth, system.history, found, header_bytes)
        stored = system.store.load()
        assert stored is not None, "created"  # noqa: S101
        if system.settings.rule in ("fedbuff", "fedavg", "ca2fl"):
            mass.check_open_sum(truth.open_sum(), stored.arrays)
        for worker in self.workers:
            worker.check_mass()

    def _happen(self, event: Event) -> None:
        """Do an action, have a fault strike, or make one ready for the next call it fits."""
        if event.name in self._actions:
            self._actions[event.name](event.given)
            return
        who = self.evaluator.fate
        if "worker" in event.given:
            who = self.workers[event.given["worker"]].fate
        elif "aggregator" in event.given:
            who = self.aggregators[event.given["aggregator"]].fate
        who.prepare(event.name, event.given)

    def _restart_broker(self, given: Given) -> None:
        """Have the broker away, and every consumer reconnect, in one order or the other."""
        world = self.system.world
        world.broker_away_s = world.time_s + given["seconds"]
        for aggregator in self.aggregators[:: 1 if given["order"] else -1]:
            if aggregator.source is not None:
                aggregator.source.reconnect()
        world.strikes("broker_restart")

    def _close_channel(self, given: Given) -> None:
        source = self.aggregators[given["aggregator"]].source
        if source is not None:
            source.reconnect()
            self.system.world.strikes("channel_closed")

    def _lose_store(self, given: Given) -> None:
        world = self.system.world
        world.store_away_s = world.time_s + given["seconds"]
        world.strikes("store_unreachable")

    def _lose_disk(self, given: Given) -> None:
        self.workers[given["worker"]].new_disk()
        self.system.world.strikes("disk_lost")

    def _stop(self, given: Given) -> None:
        self.aggregators[given["aggregator"]].stop()
        self.system.world.strikes("aggregator_stopped")

    def _replay(self, given: Given) -> None:
        dead = self.system.broker.dead
        if dead:
            self.system.network.replay(dead[int(given["letter"] * len(dead))])
            self.system.world.strikes("letter_replayed")

    def _jump(self, given: Given) -> None:
        machines = {f"worker{number}": worker.clock for number, worker in enumerate(self.workers)}
        machines |= {aggregator.name: aggregator.clock for aggregator in self.aggregators}
        machines[given["machine"]].offset_s += given["seconds"]
        self.system.world.strikes("clock_jump")

    def _stand_still(self, number: int, given: Given) -> bool:
        """Have one aggregator stand still in the middle of a step, while the broker gives its turn to the other."""
        paused, other = self.aggregators[number], self.aggregators[1 - number]
        if other.busy or paused.source is None:
            return False
        paused.source.reconnect()
        world = self.system.world
        world.move_to(world.time_s + given["seconds"])
        other.step(given["steps"])
        return True

    def _come_to_rest(self) -> None:
        """Let everything settle.

        Raises:
            Violation: it does not.
        """
        world = self.system.world
        for _ in range(CALM_ROUNDS_MAX):
            world.hurry()
            self.system.network.settle()
            worked = False
            for worker in self.workers:
                worker.start()
                worked |= worker.publish(CALM_STEPS_MAX)
            for aggregator in self.aggregators:
                worked |= aggregator.step(CALM_STEPS_MAX)
            if not worked and not self._left():
                return
            world.move_to(world.time_s + self.system.settings.commit_age_max_s + 0.1)
        raise Violation("liveness", f"after {CALM_ROUNDS_MAX} calm rounds there are still {', '.join(self._left())}")

    def _left(self) -> list[str]:
        """Say what has not come to rest."""
        left = [f"{worker.waiting} updates in the outbox of {worker.name}" for worker in self.workers if worker.waiting]
        if depth := self.system.broker.depth(JOB):
            left.append(f"{depth} messages in the queue")
        for aggregator in self.aggregators:
            if aggregator.source is not None and aggregator.source.unacked:
                left.append(f"{aggregator.source.unacked} deliveries that {aggregator.name} has not acked")
        if not self.system.world.quiet or not self.system.network.quiet:
            left.append("messages on their way")
        return left


@contextmanager
def silence() -> Iterator[None]:
    """Keep the production loops' warnings to themselves: here every second event is one."""
    log = logging.getLogger("fedmq")
    level = log.level
    log.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        log.setLevel(level)
