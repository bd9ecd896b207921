"""A schedule: everything that happens in one run, drawn from a seed or read from a file.

Nothing else in a run is random. A fault is an event like any other: dropping events makes the schedule shorter.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from ops.torture import faults, jobs
from ops.torture.faults import NAMES, STRIKES, Faults
from ops.torture.jobs import Job

EVENTS = 20  # actions of a run of the suite's size
ACTIONS = ("pull", "train", "publish", "aggregate", "evaluate")
SHARES = np.array(
    [[2, 5, 7, 6, 2], [2, 9, 8, 3, 1], [1, 4, 7, 9, 1]]
)  # of the actions: balanced, backlogs, idle consumers
PACES_S = (0.1, 0.8, 0.8, 2.0)  # between two actions, on average
AGGREGATORS = 2
CALLS = 14  # a process that is to die or to stand still does so at one of its next calls
AGGREGATOR_CALLS = (
    "receive", "head", "load", "load", "kept", "kept", "commit", "ack", "reject", "recover", "recover", "model",
    "published", "snapshot", "deltas", "announce", "versions",
)  # fmt: skip
WORKER_CALLS = (
    "head", "job", "model", "outcomes", "published", "snapshot", "deltas", "publish", "publish", "write", "rename",
    "remove",
)  # fmt: skip
EVALUATOR_CALLS = ("head", "model", "record_evaluation")
_FITS = np.array(
    [[name in STRIKES[action] for name in NAMES] for action in ACTIONS]
)  # which fault strikes which action


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happens.

    Attributes:
        at_s: when, virtual seconds.
        name: of an action or a fault.
        given: its parameters: plain numbers and text.
    """

    at_s: float
    name: str
    given: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Schedule:
    """One run.

    Attributes:
        seed: it was drawn from; the trainings' results depend on it too.
        job: what is tortured.
        events: in the order of time.
    """

    seed: int
    job: Job
    events: tuple[Event, ...]

    def json(self, **more: Any) -> str:
        """Write it, and what else is to be said of it, as a file of `tests/simulation/regressions/`."""
        events = [[event.at_s, event.name, event.given] for event in self.events]
        return json.dumps(more | {"seed": self.seed, "job": asdict(self.job), "events": events}, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "Schedule":
        """Read what `json` wrote."""
        record = json.loads(text)
        job = Job(**{**record["job"], "shape": tuple(record["job"]["shape"])})
        return cls(record["seed"], job, tuple(Event(*event) for event in record["events"]))


def draw(seed: int, actions: int = EVENTS, chances: Faults | None = None, job: Job | None = None) -> Schedule:
    """Draw a run.

    Args:
        seed: of everything.
        actions: how many there are; each fault comes on top.
        chances: of the faults; None: drawn too.
        job: what is tortured; None: drawn too.
    """
    rng = np.random.default_rng(seed)
    drawn_job = jobs.drawn(rng)
    job = drawn_job if job is None else job
    chances = faults.drawn(rng) if chances is None else chances
    shares, pace_s = SHARES[rng.integers(len(SHARES))], PACES_S[rng.integers(len(PACES_S))]
    names = np.searchsorted(np.cumsum(shares), rng.integers(shares.sum(), size=actions), side="right").tolist()
    gaps = rng.exponential(pace_s, actions).tolist()
    for number, u in enumerate(rng.random(actions).tolist()):
        gaps[number] += 20.0 * (u < 0.05)  # long enough that whatever waits is committed
    details = rng.random((actions, 4)).tolist()
    fits = _FITS[names]
    hits = np.nonzero((rng.random(fits.shape) < _chances(chances)) & fits)
    parameters = rng.random((len(hits[0]), 2)).tolist()
    ready: dict[int, list[tuple[str, list[float]]]] = {}
    for number, fault, u in zip(hits[0].tolist(), hits[1].tolist(), parameters, strict=True):
        ready.setdefault(number, []).append((NAMES[fault], u))
    events: list[Event] = []
    now = 0.0
    for number, action in enumerate(names):
        now = round(now + gaps[number], 3)
        name = ACTIONS[action]
        given = _action(name, details[number], job)
        events += [Event(now, fault, _parameters(fault, given, u)) for fault, u in ready.get(number, ())]
        events.append(Event(now, name, given))
    return Schedule(seed, job, tuple(events))


def _chances(chances: Faults) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    return np.array([getattr(chances, name) for name in NAMES])


def _action(name: str, u: Sequence[float], job: Job) -> dict[str, Any]:
    if name in ("pull", "train", "publish"):
        return {"worker": int(u[0] * job.workers)} | ({"times": 1 + int(3 * u[1])} if name == "publish" else {})
    if name == "aggregate":
        return {"aggregator": int(u[0] < 0.3), "steps": 1 + int(6 * u[1])}
    return {}


def _parameters(fault: str, action: dict[str, Any], u: Sequence[float]) -> dict[str, Any]:
    """Draw the parameters of a fault that is to strike an action."""
    who: dict[str, Any] = {key: action[key] for key in ("worker", "aggregator") if key in action}
    own = _DRAWS[fault](*u) if fault in _DRAWS else {}
    if fault == "clock_jump":
        return own | {"machine": "".join(f"{key}{value}" for key, value in who.items())}
    return own if fault in ("broker_restart", "store_unreachable", "letter_replayed") else who | own


def _seconds(u: float) -> float:
    return round(0.2 + 6.0 * u**2, 3)


def _share(u: float) -> float:
    """Return u with four digits, below 1."""
    return int(1e4 * u) / 1e4


def _moment(calls: tuple[str, ...], u: float) -> dict[str, Any]:
    """Draw at which call of a port: half of the time at the n-th from now, else at the next one of some name."""
    if u < 0.5:
        return {"call": "", "calls": 1 + int(2 * u * CALLS)}
    return {"call": calls[int((2 * u - 1) * len(calls))], "calls": 1}


_DRAWS: dict[str, Callable[[float, float], dict[str, Any]]] = {  # of two uniform numbers
    "duplicate": lambda u, v: {"after_s": 0.0 if u < 0.5 else round(60.0 * v, 3)},
    "delay": lambda u, v: {"seconds": round(40.0 * u**2, 3)},
    "corrupt_copy": lambda u, v: {"place": _share(u), "first": v < 0.5},
    "corrupt": lambda u, v: {"place": _share(u)},
    "truncated": lambda u, v: {"place": _share(u)},
    "broker_restart": lambda u, v: {"seconds": _seconds(u), "order": int(v < 0.5)},
    "ack_lost": lambda u, v: {"sent": _share(u)},
    "store_unreachable": lambda u, v: {"seconds": _seconds(u)},
    "store_slow": lambda u, v: {"seconds": _seconds(u)},
    "commit_late": lambda u, v: {"seconds": _seconds(u)},
    "killed_in_commit": lambda u, v: {"happens": ("never", "now", "late")[int(3 * u)], "seconds": round(5 * v, 3)},
    "aggregator_killed": lambda u, v: _moment(AGGREGATOR_CALLS, u) | {"after": v < 0.5},
    "aggregator_paused": lambda u, v: (
        _moment(AGGREGATOR_CALLS, u) | {"seconds": round(20.0 * v, 3), "steps": 1 + int(40 * v) % 4}
    ),
    "worker_killed": lambda u, v: _moment(WORKER_CALLS, u) | {"after": v < 0.5},
    "power_cut": lambda u, v: _moment(WORKER_CALLS, u) | {"after": v < 0.5, "kept": _share(40 * v % 1)},
    "evaluator_killed": lambda u, v: _moment(EVALUATOR_CALLS, u) | {"after": v < 0.5},
    "letter_replayed": lambda u, v: {"letter": _share(u)},
    "clock_jump": lambda u, v: {"seconds": round((u - 0.5) * 2e5, 1)},
}  # fmt: skip
