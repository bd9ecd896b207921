"""The store port inside one process: same guarantees, bytes all the same, no server."""

import json
import math
import threading
from collections import deque
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import astuple
from itertools import islice
from typing import Any

import numpy as np

from shared.errors import Reason, RejectedUpdate, VersionConflict, VersionGone
from shared.layout import Layout
from shared.model_image import ModelImage
from shared.published import Delta, DeltaEntry, Index, Publication, SnapshotEntry, unpack
from shared.snapshot import read_snapshot, write_snapshot
from shared.store.ports import (
    CLIENTS_MAX,
    OUTCOMES_MAX,
    REFUSED_IDS_MAX,
    Commit,
    Head,
    Stored,
    StoredVersion,
    TagChange,
    unheard,
)
from shared.vector import Vector


class InProcessStore:
    """One job. Thread-safe; keeps copies, so that nobody changes a version in place.

    Args:
        kept: where the rule's records go, when memory is not the place.
    """

    def __init__(self, kept: MutableMapping[str, bytes] | None = None) -> None:
        self._lock = threading.Lock()
        self._head: Head | None = None
        self._token = ""
        self._models: dict[int, bytes] = {}
        self._created_at: dict[int, float] = {}
        self._tags: dict[str, int] = {}
        self._tag_changes: list[TagChange] = []
        self._layout: Layout | None = None
        self._arrays: dict[str, Vector] = {}
        self._state = b""
        self._applied: dict[str, int] = {}
        self._refused: dict[str, str] = {}
        self._job: dict[str, Any] = {}
        self._snapshots: dict[int, tuple[SnapshotEntry, bytes]] = {}
        self._deltas: dict[int, tuple[DeltaEntry, bytes]] = {}
        self._kept: MutableMapping[str, bytes] = {} if kept is None else kept
        self._outcomes: dict[str, deque[tuple[int, list[tuple[str, str]]]]] = {}
        self.ledger: list[dict[str, Any]] = []
        self._clients: dict[str, str] = {}
        self.meta: dict[int, dict[str, str]] = {}

    def head(self) -> Head | None:
        """Return where the job stands."""
        with self._lock:
            return self._head

    def layout(self) -> Layout:
        """Return the job's layout."""
        if self._layout is None:
            raise VersionGone("the job has no model yet")
        return self._layout

    def model(self, version: int) -> ModelImage:
        """Return the weights of a version."""
        with self._lock:
            data = self._models.get(version)
        if data is None:
            raise VersionGone(f"version {version} is not stored")
        return ModelImage.from_chunks(self.layout(), [data])

    def job(self) -> dict[str, Any]:
        """Return what was announced."""
        return dict(self._job)

    @property
    def clients(self) -> dict[str, dict[str, Any]]:
        """What is known of each client."""
        with self._lock:
            return {name: json.loads(text) for name, text in self._clients.items()}

    def outcomes(self, client: str, after: int, up_to: float = math.inf) -> tuple[list[tuple[str, str]], int]:
        """Return what became of a client's updates after a revision, and up to another."""
        with self._lock:
            entries = [entry for entry in self._outcomes.get(client, ()) if after < entry[0] <= up_to]
        return [pair for _, pairs in entries for pair in pairs], entries[-1][0] if entries else after

    def published(self, after: int) -> Index:
        """Return what is published."""
        with self._lock:
            snapshots = tuple(entry for entry, _ in self._snapshots.values())
            return Index(snapshots, tuple(entry for entry, _ in self._deltas.values() if entry.version > after))

    def snapshot(self, entry: SnapshotEntry) -> ModelImage:
        """Return the weights of a snapshot."""
        with self._lock:
            _, file = self._snapshots.get(entry.version, (None, None))
        if file is None:
            raise VersionGone(f"snapshot {entry.version} is not stored")
        try:
            return read_snapshot(self.layout(), entry.dtype, [file])
        except ValueError as error:
            raise RejectedUpdate(Reason.MALFORMED, f"snapshot {entry.version} is damaged: {error}") from error

    def deltas(self, entries: Sequence[DeltaEntry]) -> list[Delta]:
        """Return deltas."""
        with self._lock:
            records = [self._deltas.get(entry.version, (None, None))[1] for entry in entries]
        found = []
        for entry, record in zip(entries, records, strict=True):
            if record is None:
                raise VersionGone(f"delta {entry.version} is not stored")
            found.append(unpack(record, entry))
        return found

    def record_evaluation(self, version: int, metrics: Mapping[str, float]) -> None:
        """Add an evaluator's numbers."""
        with self._lock:
            self.meta.setdefault(version, {}).update({f"evaluation:{k}": repr(float(v)) for k, v in metrics.items()})

    def create(self, model: ModelImage, now: float) -> bool:
        """Store version 0."""
        with self._lock:
            if self._head is not None:
                return False
            self._layout = model.layout
            self._models[0], self._created_at[0] = model.data.tobytes(), now
            self._head = Head(0, 0, model.layout.hash, model.sha256, model.layout.num_params, 1, now)
            return True

    def announce(self, job: Mapping[str, Any]) -> None:
        """Write what `job` returns."""
        self._job = json.loads(json.dumps(dict(job)))

    def load(self) -> Stored | None:
        """Return the state of the newest revision."""
        with self._lock:
            head = self._head
            if head is None:
                return None
            arrays = {name: array.copy() for name, array in self._arrays.items()}
            state, applied, versions = self._state, dict(self._applied), sorted(self._models)
            data, refused, kept = self._models[head.version], dict(self._refused), frozenset(self._kept)
        model = ModelImage.from_chunks(self.layout(), [data])
        return Stored(head, model, arrays, state, applied, versions, refused, kept)

    def versions(self) -> list[StoredVersion]:
        """Return the stored versions."""
        with self._lock:
            return [
                StoredVersion(version, self._created_at.get(version, 0.0), tuple(sorted(self._tags_of(version))))
                for version in sorted(self._models)
            ]

    def tagged(self, name: str) -> int | None:
        """Return the version that a tag names."""
        with self._lock:
            return self._tags.get(name)

    def tag(self, name: str, version: int, now: float, source: str = "") -> int | None:
        """Give a version a name."""
        with self._lock:
            if source and self._tags.get(source) != version:
                raise VersionConflict(f"tag {source!r} names version {self._tags.get(source)} by now, not {version}")
            if version not in self._models:
                raise VersionGone(f"version {version} is not stored")
            previous = self._tags.get(name)
            if previous != version:
                self._tags[name] = version
                self._tag_changes.append(TagChange(now, name, version, previous))
            return previous

    def untag(self, name: str, now: float) -> int | None:
        """Remove a tag."""
        with self._lock:
            previous = self._tags.pop(name, None)
            if previous is not None:
                self._tag_changes.append(TagChange(now, name, None, previous))
            return previous

    def tag_changes(self) -> list[TagChange]:
        """Return the history of tags."""
        with self._lock:
            return list(self._tag_changes)

    def drop(self, versions: Sequence[int]) -> list[int]:
        """Drop the weights of versions that are neither the newest nor tagged."""
        with self._lock:
            for version in versions:
                if self._head is not None and version < self._head.version:
                    self._drop(version)
            return [version for version in versions if version not in self._models]

    def kept(self, name: str) -> bytes | None:
        """Return a record of the rule."""
        with self._lock:
            return self._kept.get(name)

    def commit(self, commit: Commit) -> None:
        """Move to the next revision."""
        with self._lock:
            head = self._head
            if head is not None and self._token == commit.token:
                return
            if head is None or head.revision != commit.expected_revision:
                raise VersionConflict(f"expected revision {commit.expected_revision}, the store is at {head}")
            sha256, created_at, published = head.sha256, head.created_at, head.published
            if commit.model is not None:
                self._models[commit.version] = commit.model.data.tobytes()
                self._created_at[commit.version] = commit.now
                sha256, created_at = commit.model.sha256, commit.now
                self.meta.setdefault(commit.version, {}).update(commit.meta)
                published = commit.publication.sha256
                self._publish(commit.publication)
            self._arrays = {name: self._arrays[name] for name in commit.arrays_unchanged} | {
                name: array.copy() for name, array in commit.arrays.items()
            }
            self._state = commit.state
            for name, record in commit.kept.items():
                if record is None:
                    self._kept.pop(name, None)
                else:
                    self._kept[name] = record
            self._applied.update(commit.applied)
            if self._applied and min(self._applied.values()) < commit.applied_floor:
                self._applied = {k: base for k, base in self._applied.items() if base >= commit.applied_floor}
            self._refused.update(commit.refused)
            for update_id in list(islice(self._refused, max(0, len(self._refused) - REFUSED_IDS_MAX))):
                del self._refused[update_id]
            updates = json.loads(commit.ledger)
            self.ledger.append({"revision": head.revision + 1, "version": commit.version, "updates": updates})
            self._clients.update(commit.clients)
            if len(self._clients) > CLIENTS_MAX:
                for client in unheard(self._clients):
                    del self._clients[client]
                    self._outcomes.pop(client, None)
            for client, pairs in commit.outcomes.items():
                self._outcomes.setdefault(client, deque(maxlen=OUTCOMES_MAX)).append((head.revision + 1, list(pairs)))
            for version in commit.dropped_versions:
                self._drop(version)
            self._token = commit.token
            self._head = Head(
                head.revision + 1, commit.version, head.layout, sha256, head.num_params, head.chunks, created_at,
                published,
            )  # fmt: skip

    def dump(self) -> dict[str, Any]:
        """Return everything but the rule's records, in msgpack's types: a checkpoint."""
        with self._lock:
            if self._head is None:
                raise VersionGone("the job has no model yet")
            return {
                "head": astuple(self._head), "token": self._token, "models": dict(self._models), "state": self._state,
                "arrays": {name: array.tobytes() for name, array in self._arrays.items()}, "applied": self._applied,
                "refused": self._refused, "job": self._job, "clients": self._clients, "meta": self.meta,
                "snapshots": [[astuple(entry), file] for entry, file in self._snapshots.values()],
                "deltas": [[astuple(entry), record] for entry, record in self._deltas.values()],
                "outcomes": {client: list(pairs) for client, pairs in self._outcomes.items()},
                "created_at": self._created_at, "tags": self._tags,
                "tag_changes": [astuple(change) for change in self._tag_changes],
            }  # fmt: skip

    def restore(self, layout: Layout, dump: Mapping[str, Any]) -> None:
        """Become what was dumped.

        Args:
            layout: the job's.
            dump: what `dump` returned.
        """
        with self._lock:
            self._head, self._token, self._layout = Head(*dump["head"]), dump["token"], layout
            self._models, self._state, self._job = dict(dump["models"]), dump["state"], dump["job"]
            self._arrays = {name: np.frombuffer(array, np.float32) for name, array in dump["arrays"].items()}
            self._applied, self._clients, self.meta = dump["applied"], dump["clients"], dump["meta"]
            self._refused = dump["refused"]
            self._created_at, self._tags = dict(dump.get("created_at", {})), dict(dump.get("tags", {}))
            self._tag_changes = [TagChange(*change) for change in dump.get("tag_changes", ())]
            self._snapshots = {entry[0]: (SnapshotEntry(*entry), file) for entry, file in dump["snapshots"]}
            self._deltas = {entry[0]: (DeltaEntry(*entry), record) for entry, record in dump["deltas"]}
            self._outcomes = {
                client: deque(((revision, [(i, o) for i, o in told]) for revision, told in pairs), maxlen=OUTCOMES_MAX)
                for client, pairs in dump["outcomes"].items()
            }

    def _tags_of(self, version: int) -> list[str]:
        return [name for name, named in self._tags.items() if named == version]

    def _drop(self, version: int) -> None:
        """Forget a version, unless it has a tag at this moment."""
        if self._tags_of(version):
            return
        for known in (self._models, self.meta, self._created_at):
            known.pop(version, None)

    def _publish(self, publication: Publication) -> None:
        """Move the index of what is published; keeps bytes, as Redis does."""
        for step in publication.dropped_deltas:
            self._deltas.pop(step.version, None)
        for taken in publication.dropped_snapshots:
            self._snapshots.pop(taken.version, None)
        if publication.delta is not None:
            self._deltas[publication.delta[0].version] = publication.delta
        if publication.snapshot is not None:
            entry, image = publication.snapshot
            self._snapshots[entry.version] = (entry, b"".join(write_snapshot(image, entry.dtype)))
