"""The mass checker: whatever fails when, a worker's deltas are all accounted for, each once.

For every worker, in float64, coordinate by coordinate:

    sum of the deltas of its finished updates
        = sum of what its updates' bytes decode to, but for those whose mass it has taken back
        + the residual on disk + what of it decayed + what codecs without feedback rounded off

An update whose mass was taken back is one that the ledger calls refused, that carried a residual, and whose file is
gone. All others count as they are: applied, under way (on disk or in the queue), refused but not settled yet, or
refused for good because their codec keeps no account. Nothing here uses the worker's own reading or arithmetic of a
residual: the deltas come from the training, the decoded bytes from the codecs, the outcomes from the ledger, and what
decayed from ages that are reckoned here from the versions of the trainings.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

Exact = npt.NDArray[np.float64]

REFUSED = ("stale", "rejected")
ROUNDING = 1e-6  # float32 rounds each of an update's few additions to 6e-8 of what is added


@dataclass(frozen=True, slots=True)
class Made:
    """A finished update: what training changed, what its bytes decode to, what its codec rounded off for good."""

    delta: Exact
    decoded: Exact
    noise: Exact
    carries: bool  # a residual: its mass is to come back when it is refused
    base_version: int
    birth: float  # mean version at which what it carries was trained


@dataclass(slots=True)
class Account:
    """All of one worker's mass."""

    num_params: int
    made: dict[str, Made] = field(default_factory=dict)
    decayed: Exact = field(init=False)
    birth: float = 0.0  # mean version at which what the residual holds was trained

    def __post_init__(self) -> None:
        self.decayed = np.zeros(self.num_params)

    def mix(self, residual: Exact, returned: list[str], delta: Exact, version: int, horizon: int) -> None:
        """Book what decays when an update is made, and how old on average is what it is made of.

        Args:
            residual: before.
            returned: ids of the refused updates that come back, in order.
            delta: of the training.
            version: the model version it started from.
            horizon: age from which mass decays.
        """
        horizon = max(1, horizon)
        parts = [(residual, version - self.birth)]
        for update_id in returned:
            made = self.made[update_id]
            flight = min(version - made.base_version, horizon)
            parts.append((made.decoded, made.base_version - made.birth + flight))
        total, age = np.zeros(self.num_params), 0.0
        for mass, its_age in [*parts, (delta, 0.0)]:
            gone = decayed_share(its_age, horizon)
            self.decayed += gone * mass
            norms = np.linalg.norm(total), np.linalg.norm((1 - gone) * mass)
            age = np.average([age, min(its_age, horizon)], weights=norms) if any(norms) else 0.0
            total += (1 - gone) * mass
        self.birth = version - age

    def imbalance(self, outcomes: Mapping[str, str], on_disk: set[int], residual: Exact) -> float:
        """Return the largest missing or surplus mass of a coordinate, relative to what rounding explains.

        Args:
            outcomes: update_id -> first outcome in the ledger.
            on_disk: numbers of the updates in the worker's folder.
            residual: what is in its residual file.
        """
        total, size = -residual - self.decayed, np.abs(residual) + np.abs(self.decayed) + 1e-3
        for update_id, made in self.made.items():
            refused = outcomes.get(update_id) in REFUSED
            back = refused and made.carries and int(update_id.rsplit("/", 1)[1]) not in on_disk
            total += made.delta - made.noise - (0 if back else made.decoded)
            size += np.abs(made.delta) + np.abs(made.decoded)
        return float(np.max(np.abs(total) / size)) / ROUNDING


def first_outcomes(ledger: list[dict]) -> dict[str, str]:
    """Return update_id -> first outcome, having made sure that nothing was applied twice."""
    first: dict[str, str] = {}
    applied: set[str] = set()
    for commit in ledger:
        for entry in commit["updates"]:
            first.setdefault(entry["id"], entry["outcome"])
            if entry["outcome"] == "applied":
                assert entry["id"] not in applied, f"{entry['id']} was applied twice"
                applied.add(entry["id"])
    return first


def residual_on_disk(folder: Path, num_params: int) -> tuple[float, Exact]:
    """Return the mean version of what a residual holds and its array, by the file format's description."""
    path = folder / "residual"
    if not path.exists():
        return 0, np.zeros(num_params)
    _, header, array = path.read_bytes().split(b"\n", 2)
    values = np.frombuffer(array, "<f4").astype(np.float64)
    return json.loads(header)["version"], values if len(values) else np.zeros(num_params)


def numbers_on_disk(folder: Path) -> set[int]:
    """Return the numbers of the updates in a worker's folder that are finished."""
    return {int(p.name.split(".")[0]) for end in ("*.update", "*.sent") for p in folder.glob(end)}


def decayed_share(age: float, horizon: int) -> float:
    """Return what share of mass of this age is gone, written down once more."""
    return 1 - 2.0 ** -max(0.0, age / horizon - 1)
