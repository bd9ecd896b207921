"""The processes beside the workers: aggregators and the evaluator. All they have is lost when they die."""

from functools import lru_cache
from typing import cast

from aggregator.aggregator import Aggregator
from ops.evaluator import Evaluator
from ops.torture.fate import Fate, Killed, MachineClock
from ops.torture.jobs import JOB
from ops.torture.meters import UNREAD, Meters
from ops.torture.network import TortureSource
from ops.torture.store import TortureStore
from ops.torture.system import System
from ops.torture.task import task_of
from shared.config import EvaluatorSettings
from shared.errors import Unavailable
from shared.metrics import AggregatorMetrics, EvaluatorMetrics


class AggregatorProcess:
    """One aggregator; all it has is lost when it dies."""

    def __init__(self, system: System, number: int) -> None:
        self.name = f"aggregator{number}"
        self._system = system
        self.fate, self.clock = Fate(system.world, self.name), MachineClock(system.world)
        self._store = TortureStore(system.store, system.world, self.fate, system.history)
        self._metrics = cast(AggregatorMetrics, Meters(system.history.counted))
        self._aggregator: Aggregator | None = None
        self.source: TortureSource | None = None
        self.busy = False

    def step(self, times: int) -> bool:
        """Step up to so many times; tell whether there was work."""
        worked, self.busy = False, True
        try:
            if self._aggregator is None:
                self._start()
            assert self._aggregator is not None, "started"  # noqa: S101
            for _ in range(times):
                if not self._aggregator.step():
                    break
                worked = True
        except Unavailable as error:
            if self._system.world.trace is not None:
                self._system.world.note(self.name, f"-> {error}")
        except Killed:
            self._die()
        finally:
            self.busy = False
        return worked

    def stop(self) -> None:
        """End as after SIGTERM: commit what can be committed."""
        try:
            if self._aggregator is not None:
                self._aggregator.finish()
        except Killed:
            pass
        self._die()

    def _start(self) -> None:
        system = self._system
        if self.source is None:
            prefetch = system.settings.prefetch
            self.source = TortureSource(system.broker, JOB, prefetch, system.network, system.world, self.fate)
        self._aggregator = Aggregator(
            system.settings, self.source, self._store, self.clock, self._metrics, poll_s=0.0
        )  # fmt: skip
        self._store.announce(self._aggregator.describe())

    def _die(self) -> None:
        self._aggregator = None
        if self.source is not None:
            self.source.close()
            self.source = None


class EvaluatorProcess:
    """The evaluator; what it finds under a version is noted."""

    def __init__(self, system: System) -> None:
        self.fate = Fate(system.world, "evaluator")
        self._system = system
        self._store = TortureStore(system.store, system.world, self.fate, system.history)
        self._evaluator: Evaluator | None = None

    def step(self) -> None:
        """Evaluate the newest version."""
        try:
            if self._evaluator is None:
                clock, metrics = MachineClock(self._system.world), cast(EvaluatorMetrics, UNREAD)
                task = task_of(self._system.layout.averaged[0].shape)
                self._evaluator = Evaluator(_settings(), task, self._store, clock, metrics)
            self._evaluator.step()
        except Unavailable:
            pass
        except Killed:
            self._evaluator = None


@lru_cache
def _settings() -> EvaluatorSettings:
    return EvaluatorSettings(job=JOB)
