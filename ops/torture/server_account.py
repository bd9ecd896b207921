"""The account of a torture, and its checker; it reads records and knows nothing of faults or programs.

It is told what was made (the kernel's record of the outboxes, the visitor's own), what was trained (the tasks' own
records), and reads the ledger and a model. An update is all right when it has one outcome, the first for ever, and
when the model holds it as often as that says: each has a place of its own in the model, where its share is

    lr / K * (1 + tau)^(-a),   tau = floor(i / K) - base_version

for the i-th applied update, with the base_version that its worker wrote down: float64, no code of the aggregator.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from shared.errors import FedMQError

APPLIED, STALE, REJECTED, DUPLICATE = "applied", "stale", "rejected", "duplicate"
TOLERANCE = 1e-5  # of float32 beside float64
SHOWN = 5  # ids in a message


@dataclass(frozen=True, slots=True)
class Account:
    """What became of everything, in updates.

    Attributes:
        attempted: set out to be published.
        confirmed: of these, the broker confirmed, as far as their worker knows.
        applied: changed the model.
        refused: too stale.
        rejected: dead-lettered.
        lost: no outcome, or applied and not in the model.
        duplicated: applied more than once, or more than once in the model.
        unexpected: in the ledger or the model, and nobody made it so.
        recovered: unconfirmed while a fault went on, and settled all the same.
        repeated: deliveries that came once more and were dropped.
        version: of the model that was checked.
    """

    attempted: int
    confirmed: int
    applied: int
    refused: int
    rejected: int
    lost: int
    duplicated: int
    unexpected: int
    recovered: int
    repeated: int
    version: int

    def record(self) -> dict[str, int]:
        """Return it as plain numbers."""
        return asdict(self)


class Violation(FedMQError):  # noqa: N818 - what a checker found
    """The account is not exact, or the model is not the oracle's."""


@dataclass(slots=True)
class Claims:
    """What was made, by the records of those who made it.

    Attributes:
        made: ids of everything that set out to be published.
        confirmed: ids that the broker confirmed, as far as their worker knows.
        spoiled: ids that must be rejected, or refused as too stale before that is seen; nothing else may be rejected.
        under_way: ids that were unconfirmed while a fault went on.
        places: place -> base_version of every training.
    """

    made: set[str] = field(default_factory=set)
    confirmed: set[str] = field(default_factory=set)
    spoiled: set[str] = field(default_factory=set)
    under_way: set[str] = field(default_factory=set)
    places: dict[int, int] = field(default_factory=dict)


class Checker:
    """Follows a job's ledger and judges.

    Args:
        buffer_size: K, updates per version.
        server_lr: the server's step.
        exponent: a of the polynomial staleness weight.
        num_params: of the model.
    """

    def __init__(self, buffer_size: int, server_lr: float, exponent: float, num_params: int) -> None:
        self._k, self._lr, self._a = buffer_size, server_lr, exponent
        self._oracle = np.zeros(num_params)
        self._folded = 0  # applied updates in the oracle
        self._applied: list[tuple[str, int]] = []  # id and place, in order
        self.revision = 0
        self.first: dict[str, str] = {}  # id -> its first outcome
        self.repeated = 0
        self._lost: dict[str, str] = {}  # id -> what is wrong with it; the next two too
        self._duplicated: dict[str, str] = {}
        self._unexpected: dict[str, str] = {}

    def follow(self, entries: Iterable[Mapping[str, Any]]) -> None:
        """Take in ledger entries after those taken in before.

        Raises:
            Violation: a revision is missing.
        """
        for entry in entries:
            if entry["revision"] != self.revision + 1:
                raise Violation(f"the ledger goes from revision {self.revision} to {entry['revision']}")
            self.revision = entry["revision"]
            for update in entry["updates"]:
                self._take(update["id"], update["outcome"], int(update.get("num_samples", 0)) - 1)

    def unsettled(self, made: Iterable[str]) -> set[str]:
        """Return which of these have no outcome yet."""
        return {update_id for update_id in made if update_id not in self.first}

    def judge(self, claims: Claims, version: int, weights: npt.NDArray[np.float32]) -> Account:
        """Return the account; `lost`, `duplicated` and `unexpected` are of everything until now.

        Args:
            claims: what was made; all of it must have its outcome by now.
            version: a version of which the ledger was followed.
            weights: its model.
        """
        outcomes = {update_id: self.first[update_id] for update_id in claims.made if update_id in self.first}
        self._lost |= dict.fromkeys(self.unsettled(claims.made), "no outcome")
        self._unexpected |= {update_id: "nobody made it" for update_id in self.first if update_id not in claims.made}
        for update_id, outcome in outcomes.items():
            spoiled = update_id in claims.spoiled
            if outcome == (APPLIED if spoiled else REJECTED):
                self._unexpected[update_id] = f"it was {'spoiled' if spoiled else 'good'} and is {outcome}"
        self._compare(claims, version, weights)
        count = list(outcomes.values()).count
        return Account(
            attempted=len(claims.made), confirmed=len(claims.confirmed & claims.made), applied=count(APPLIED),
            refused=count(STALE), rejected=count(REJECTED), lost=len(self._lost), duplicated=len(self._duplicated),
            unexpected=len(self._unexpected), recovered=len(claims.under_way & outcomes.keys()),
            repeated=self.repeated, version=version,
        )  # fmt: skip

    def confirm(self, account: Account) -> None:
        """Make sure that nothing was lost, nothing counted twice.

        Raises:
            Violation: naming some of the updates.
        """
        named = (("lost", self._lost), ("duplicated", self._duplicated), ("unexpected", self._unexpected))
        problems = [
            f"{len(ids)} {what} ({', '.join(f'{update_id}: {why}' for update_id, why in sorted(ids.items())[:SHOWN])})"
            for what, ids in named if ids
        ]  # fmt: skip
        settled = account.applied + account.refused + account.rejected
        if account.attempted != settled:
            problems.append(f"{account.attempted} published, {settled} applied, refused or rejected")
        if problems:
            raise Violation(f"at revision {self.revision}, version {account.version}: {'; '.join(problems)}")

    def _take(self, update_id: str, outcome: str, place: int) -> None:
        """Note one line of the ledger. The first outcome of an update is final."""
        before = self.first.get(update_id)
        if outcome == APPLIED:
            if before is not None:
                self._duplicated[update_id] = f"applied, and it was {before} before"
            self._applied.append((update_id, place))
        if before is not None:
            self.repeated += 1
        elif outcome == DUPLICATE:
            self._unexpected[update_id] = "a duplicate of nothing"
        else:
            self.first[update_id] = outcome

    def _compare(self, claims: Claims, version: int, weights: npt.NDArray[np.float32]) -> None:
        """Compare a model with the oracle, place by place."""
        due = version * self._k
        if due > len(self._applied):
            raise Violation(f"version {version} takes {due} applied updates, the ledger holds {len(self._applied)}")
        for index in range(self._folded, due):
            update_id, place = self._applied[index]
            base_version = claims.places.get(place)
            if base_version is None:
                self._unexpected[update_id] = "nobody trained it"
                continue
            staleness = index // self._k - base_version
            self._oracle[place] += self._lr / self._k * (1.0 + staleness) ** -self._a
        self._folded = max(self._folded, due)
        off = np.flatnonzero(~np.isclose(weights, self._oracle, rtol=TOLERANCE, atol=TOLERANCE))
        names = {place: update_id for update_id, place in self._applied} if off.size else {}
        for place in off.tolist():
            ratio = weights[place] / self._oracle[place] if self._oracle[place] else np.inf
            kind = self._lost if ratio < TOLERANCE else self._duplicated if ratio > 1.5 else self._unexpected
            name = names.get(place, f"place {place} of the model")
            kind[name] = f"{weights[place]:.6g} in the model, {self._oracle[place]:.6g} expected"


def read_trainings(records: Sequence[Path]) -> dict[int, int]:
    """Return place -> base_version of everything the tasks trained."""
    texts = [record.read_text() for record in records if record.exists()]
    lines = [line for text in texts for line in text[: text.rfind("\n") + 1].splitlines()]  # the last is being written
    return {int(known["place"]): int(known["base_version"]) for known in map(json.loads, lines)}
