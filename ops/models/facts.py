"""What is known of a version: what was written with it, and who made it, from the ledger."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from aggregator.account import APPLIED
from ops.rollback import META as ROLLED_BACK
from ops.rollback import OUTCOME as ROLLBACK
from shared.store.ports import StoredVersion
from shared.store.redis import EVALUATION
from shared.store.redis_versions import RedisVersions


@dataclass(frozen=True, slots=True)
class Contribution:
    """One update that went into a version.

    Attributes:
        client: who made it.
        update_id: its id.
        staleness: tau when it was applied, in versions.
        weight: factor of its delta.
        num_samples: as its client reported.
    """

    client: str
    update_id: str
    staleness: int
    weight: float
    num_samples: int


@dataclass(frozen=True, slots=True)
class Facts:
    """A stored version.

    Attributes:
        version: its number.
        created_at: unix seconds.
        revision: that wrote it, -1: unknown.
        sha256: of its file, hex.
        tags: its names.
        evaluation: metric -> number.
        parent: the version written before it, None: version 0, or the ledger does not reach back to it.
        contributions: what went into it since its parent; None where the ledger does not reach back.
        rolled_back_to: the version it has the weights of, None: it is no rollback.
        meta: everything written with it.
    """

    version: int
    created_at: float
    revision: int
    sha256: str
    tags: tuple[str, ...]
    evaluation: dict[str, float]
    parent: int | None
    contributions: tuple[Contribution, ...] | None
    rolled_back_to: int | None
    meta: dict[str, str]

    @property
    def updates(self) -> int:
        """How many updates went into it; where the ledger is gone, how many its commit applied."""
        return int(self.meta.get("updates", 0)) if self.contributions is None else len(self.contributions)

    @property
    def clients(self) -> int | None:
        """How many clients made them, None where that is not known."""
        return None if self.contributions is None else len({each.client for each in self.contributions})

    @property
    def staleness(self) -> tuple[float, int] | None:
        """Mean and maximum of the updates' staleness, None where there is none."""
        if self.contributions is None:
            told = self.meta.get("staleness_mean"), self.meta.get("staleness_max")
            return (float(told[0]), int(told[1])) if told[0] and told[1] else None
        taus = [each.staleness for each in self.contributions]
        return (sum(taus) / len(taus), max(taus)) if taus else None

    def record(self) -> dict[str, Any]:
        """Return it in JSON's types, without the single contributions."""
        mean, most = self.staleness or (None, None)
        return {
            "version": self.version, "created_at": self.created_at, "updates": self.updates,
            "contributors": self.clients, "staleness_mean": mean, "staleness_max": most,
            "evaluation": self.evaluation, "tags": list(self.tags), "sha256": self.sha256,
        }  # fmt: skip


def facts_of(store: RedisVersions, entry: StoredVersion) -> Facts:
    """Read what is known of a version."""
    meta = store.meta(entry.version)
    revision = int(meta.get("revision", -1))
    parent, contributions = made_of(store.ledger_before(revision), entry.version) if revision >= 0 else (None, None)
    rolled_back = meta.get(ROLLED_BACK)
    return Facts(
        entry.version, entry.created_at, revision, meta.get("sha256", ""), entry.tags, evaluation_of(meta), parent,
        contributions, None if rolled_back is None else int(rolled_back), meta,
    )  # fmt: skip


def evaluation_of(meta: Mapping[str, str]) -> dict[str, float]:
    """Return metric -> number of an evaluated version; those of one class (`accuracy_class_3`) behind the others."""
    found = {name.removeprefix(EVALUATION): float(text) for name, text in meta.items() if name.startswith(EVALUATION)}
    parts = {name for name in found if any(name.startswith(f"{other}_") for other in found)}
    return {name: found[name] for name in sorted(found, key=lambda name: (name in parts, name))}


def made_of(commits: Iterable[Mapping[str, Any]], version: int) -> tuple[int | None, tuple[Contribution, ...] | None]:
    """Find the version written before one, and the updates that went into it since.

    An update's entry says which version it met. Those that met the parent or a version between - several may be made
    between two commits - are in it; they may stand in the commit that wrote the parent, behind what made that one, or
    in commits of a partly filled buffer.

    Args:
        commits: the ledger from the version's own revision backwards.
        version: which.

    Returns:
        (parent, contributions in order); (None, ()) of version 0, (None, None) where the ledger does not reach back.
    """
    if version == 0:
        return None, ()
    parent: int | None = None
    found: list[list[Contribution]] = []
    revision, rolled_back = 0, False
    for commit in commits:
        revision = commit["revision"]
        if commit["version"] < version and parent is None:
            parent = int(commit["version"])
        if parent is not None and commit["version"] < parent:
            break
        rolled_back |= parent is None and any(entry["outcome"] == ROLLBACK for entry in commit["updates"])
        found.append([_contribution(entry) for entry in commit["updates"] if _is_in(entry, parent, version)])
    else:
        if revision != 1:  # the job's first: what came before has been trimmed
            return parent, None
        parent = parent or 0
    if rolled_back:  # what had been buffered before it was discarded
        return parent, ()
    return parent, tuple(each for entries in reversed(found) for each in entries)


def _is_in(entry: Mapping[str, Any], parent: int | None, version: int) -> bool:
    return bool(entry["outcome"] == APPLIED and (parent or 0) <= entry["version"] < version)


def _contribution(entry: Mapping[str, Any]) -> Contribution:
    client = str(entry["id"]).partition("/")[0]
    return Contribution(client, entry["id"], entry["staleness"], entry["weight"], entry["num_samples"])
