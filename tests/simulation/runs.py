"""Small simulations for the tests: made, interrupted, gone on with, compared."""

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ops.simulation.database import Database
from ops.simulation.executor import Executor, InThisProcess
from ops.simulation.plan import Plan, path_of_task, plan_of
from ops.simulation.simulator import Simulator
from worker.task import Task
from worker.training import Trainer, seed_everything

TASK = str(Path(__file__).with_name("pulling.py"))
SMALL = {"task": TASK, "clients": 12, "concurrency": 6, "updates": 60, "buffer_size": 4, "evaluations": 6, "seed": 5}


class Killed(BaseException):
    """The process is gone."""


class After(threading.Event):
    """An event that is set when it was looked at so many times: after so many events of a simulation."""

    def __init__(self, looks: int, then: Callable[[], bool] = lambda: True) -> None:
        super().__init__()
        self.left, self._then = looks, then

    def is_set(self) -> bool:
        """Tell whether it is time."""
        self.left -= 1
        return self.left < 0 and self._then()


def kill() -> bool:
    """Die."""
    raise Killed


def small(given: Mapping[str, Any] | None = None, **more: Any) -> Plan:
    """Return a plan of a few dozen trips; options that mean nothing to its rule are left out."""
    options = SMALL | dict(given or {}) | more
    if options.get("rule", "fedbuff").partition("(")[0] in ("fedasync", "ace", "aced", "ringleader"):
        options.pop("buffer_size")
    return plan_of(options)


@dataclass
class Outcome:
    """What a run came to: everything that must not depend on how it was run."""

    sha256: str
    history: dict[str, Any]
    counts: dict[str, Any]
    failures: dict[str, int]
    time_s: float
    simulator: Simulator = field(compare=False, repr=False)


def begin(
    plan: Plan, database: Database | None = None, stop: threading.Event | None = None,
    executor: Callable[[Trainer], Executor] = InThisProcess,
) -> Simulator:  # fmt: skip
    """Return a simulator that has not run yet."""
    seed_everything(plan.fleet.seed)
    trainer = Trainer(Task.load(path_of_task(plan.fleet.task)))
    np.random.seed(None)  # what was drawn here before must not matter
    return Simulator(plan, trainer, executor(trainer), database or Database(None), stop)


def finish(simulator: Simulator) -> Outcome:
    """Run to the end."""
    for _ in simulator.run():
        pass
    return Outcome(
        simulator.model().sha256, comparable(simulator.history.dump()),
        {name: getattr(simulator.counts, name) for name in ("published", "lost", "aborted", "number", "order")},
        dict(simulator.failures), simulator.clock.time_s, simulator,
    )  # fmt: skip


def whole(plan: Plan) -> Outcome:
    """Run without interruption."""
    return finish(begin(plan))


def interrupted(plan: Plan, path: Path, every: int) -> tuple[Outcome, int]:
    """Run in pieces of so many events, each in a simulator of its own; return also how many pieces it took."""
    for piece in range(1, 2000):
        database = Database(path)
        try:
            return finish(begin(plan, database, After(every))), piece
        except KeyboardInterrupt:
            pass
        finally:
            database.close()
    raise AssertionError("it does not get any further")


def comparable(dump: dict[str, Any]) -> dict[str, Any]:
    """Return a history so that nan equals nan."""
    return dump | {"rows": [repr(row) for row in dump["rows"]]}
