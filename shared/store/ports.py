"""What the loops need of a store.

Every adapter passes `tests/contract/test_store.py`. Three ports: `ModelStore` is all an evaluator needs, `WorkerStore`
adds what a worker reads, and a login that can only read serves it; `StateStore` is the aggregator's.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from shared.layout import Layout
from shared.model_image import ModelImage
from shared.published import NOTHING, Delta, DeltaEntry, Index, Publication, SnapshotEntry
from shared.vector import Vector

OUTCOMES_MAX = 128  # approximately: commits of which a client's outcomes are kept
REFUSED_IDS_MAX = 2**16  # a broker delivers no more again than a consumer may hold
CLIENTS_MAX = 100_000  # of which something is known; the longest unheard goes


def unheard(clients: Mapping[str, str | bytes]) -> list[str]:
    """Return which clients to forget when there are too many: those unheard of for longest, down to nine tenths."""
    by_age = sorted(clients, key=lambda client: float(json.loads(clients[client]).get("seen", 0.0)))
    return by_age[: max(0, len(clients) - CLIENTS_MAX * 9 // 10)]


@dataclass(frozen=True, slots=True)
class Head:
    """Where a job stands.

    Attributes:
        revision: number of commits so far, >= 0.
        version: newest model version, >= 0.
        layout: the layout hash, hex.
        sha256: hash of the newest version's safetensors file, hex.
        num_params: length of the flat vector.
        chunks: number of stored pieces of a version.
        created_at: unix seconds when the newest version was committed.
        published: hash of the weights workers train from; "" when those are the newest version's own.
    """

    revision: int
    version: int
    layout: str
    sha256: str
    num_params: int
    chunks: int
    created_at: float
    published: str = ""


@dataclass(frozen=True, slots=True)
class Commit:
    """One move of the whole aggregation state from revision r to r + 1.

    Attributes:
        expected_revision: r, what the state was loaded at.
        token: unique to this commit; repeating a commit whose answer was lost succeeds.
        version: the model version after it.
        model: its weights, or None when the version did not change.
        arrays: name -> float32 [n] of model size, of the open buffer and the optimizer, that changed.
        arrays_unchanged: names of those that stay as they are stored; any other goes.
        state: the small rest of the state, bytes.
        applied: update_id -> base_version of the updates it applies.
        applied_floor: ids with a base_version below it may be forgotten.
        refused: update_id -> `stale` or the reason of the updates it refuses for good; the newest `REFUSED_IDS_MAX` are
            remembered.
        ledger: JSON list of what became of which update: id, outcome, staleness, weight.
        clients: client id -> JSON text of what is known of it, with `seen` in unix seconds; beyond `CLIENTS_MAX` those
            unheard of for longest are forgotten.
        meta: facts about the new version, e.g. number of updates and their mean staleness.
        dropped_versions: versions whose weights may go; one that has a tag when this is committed stays.
        now: unix seconds.
        outcomes: client id -> (update_id, outcome) of its updates that this commit settles, in order.
        publication: what it publishes for workers; counts only with a model.
        kept: name -> record of the rule that changes, None where it goes; others stay.
    """

    expected_revision: int
    token: str
    version: int
    model: ModelImage | None
    arrays: Mapping[str, Vector]
    state: bytes
    applied: Mapping[str, int]
    applied_floor: int
    ledger: str
    clients: Mapping[str, str]
    meta: Mapping[str, str]
    dropped_versions: Sequence[int]
    now: float
    outcomes: Mapping[str, Sequence[tuple[str, str]]] = field(default_factory=dict)
    publication: Publication = NOTHING
    kept: Mapping[str, bytes | None] = field(default_factory=dict)
    arrays_unchanged: Sequence[str] = ()
    refused: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Stored:
    """Everything `load` returns: the head and the state of one revision, of `kept` records only the names."""

    head: Head
    model: ModelImage
    arrays: dict[str, npt.NDArray[np.float32]]
    state: bytes
    applied: dict[str, int]
    versions: list[int] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)
    kept: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class StoredVersion:
    """A version whose weights are stored.

    Attributes:
        version: its number.
        created_at: unix seconds when it was committed.
        tags: names that operators gave it, sorted; while it has one it is not dropped.
    """

    version: int
    created_at: float
    tags: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class TagChange:
    """One line of the history of tags.

    Attributes:
        at: unix seconds.
        name: of the tag.
        version: that it names from then on, None: it was removed.
        previous: that it named before, None: it was new.
    """

    at: float
    name: str
    version: int | None
    previous: int | None


class ModelStore(Protocol):
    """What a worker and an evaluator read. Every method may raise `StoreUnavailable`."""

    def head(self) -> Head | None:
        """Return where the job stands, None while it has no version; one small read."""

    def layout(self) -> Layout:
        """Return the job's layout; raises `VersionGone` while there is none."""

    def model(self, version: int) -> ModelImage:
        """Return the weights of a version, checked against its hash.

        Raises:
            VersionGone: it is not, or no longer, stored.
        """

    def job(self) -> dict[str, Any]:
        """Return what a worker needs to start: codec, limits, rule; empty while no aggregator has run."""

    def record_evaluation(self, version: int, metrics: Mapping[str, float]) -> None:
        """Add an evaluator's numbers to what is known of a version; the version may be gone by now."""


class WorkerStore(ModelStore, Protocol):
    """What only a worker reads; a login that can only read serves it too."""

    def outcomes(self, client: str, after: int) -> tuple[list[tuple[str, str]], int]:
        """Return what became of a client's updates in the commits after a revision, oldest first.

        An update can stand there again as a `duplicate` or as `stale`, when the broker delivered it once more: its
        first outcome is what happened. About the newest `OUTCOMES_MAX` commits of each client are kept.

        Args:
            client: its id.
            after: the cursor of the call before; 0 at first, and when the head's revision is lower (a job begun anew).

        Returns:
            (update_id, outcome) pairs with outcome `applied`, `stale`, `rejected` or `duplicate`, and the next cursor.
        """

    def published(self, after: int) -> Index:
        """Return what is published: all snapshots, and the deltas of versions after one; one small read."""

    def snapshot(self, entry: SnapshotEntry) -> ModelImage:
        """Return the weights of a snapshot, not checked against a hash.

        Raises:
            VersionGone: it is not, or no longer, stored.
            RejectedUpdate: it is damaged.
        """

    def deltas(self, entries: Sequence[DeltaEntry]) -> list[Delta]:
        """Return deltas in the order given, with one read; their payloads are not decoded yet.

        Raises:
            VersionGone: one is not, or no longer, stored.
            RejectedUpdate: one is damaged.
        """


class StateStore(WorkerStore, Protocol):
    """What the aggregator reads and writes."""

    def create(self, model: ModelImage, now: float) -> bool:
        """Store version 0 and revision 0; False when the job has a version already."""

    def announce(self, job: Mapping[str, Any]) -> None:
        """Write what `job` returns."""

    def load(self) -> Stored | None:
        """Return the state of the newest revision, None while the job has no version."""

    def versions(self) -> list[StoredVersion]:
        """Return the versions whose weights are stored, ascending; small reads."""

    def kept(self, name: str) -> bytes | None:
        """Return a record of the rule as the newest commit left it, None when there is none of that name."""

    def commit(self, commit: Commit) -> None:
        """Move to the next revision, all or nothing, and return when that is durable.

        Raises:
            VersionConflict: the store is not at `expected_revision`.
            StoreUnavailable: it may or may not have happened; repeat the same commit.
        """


class VersionStore(Protocol):
    """What an operator does with versions, beside whoever commits."""

    def versions(self) -> list[StoredVersion]:
        """Return the versions whose weights are stored, ascending."""

    def tagged(self, name: str) -> int | None:
        """Return the version that a tag names, None when there is no such tag."""

    def tag(self, name: str, version: int, now: float, source: str = "") -> int | None:
        """Give a version a name, or move the name to it; from then on it is not dropped. Return what it named before.

        Args:
            name: of the tag.
            version: that it is to name; the same again changes nothing.
            now: unix seconds, for the history.
            source: another tag that must still name this version, "": none.

        Raises:
            VersionGone: the version is not, or no longer, stored.
            VersionConflict: `source` names another version by now.
        """

    def untag(self, name: str, now: float) -> int | None:
        """Remove a tag; return what it named, None when there was no such tag."""

    def tag_changes(self) -> list[TagChange]:
        """Return the history of tags, oldest first."""

    def drop(self, versions: Sequence[int]) -> list[int]:
        """Drop the weights of versions, but neither the newest nor one that has a tag at this moment.

        Returns:
            Those of them that are not stored any more.
        """
