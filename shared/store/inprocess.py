"""The store port inside one process: same guarantees, bytes all the same, no server."""

import json
import threading
from collections.abc import Mapping
from typing import Any

from shared.errors import VersionConflict, VersionGone
from shared.layout import Layout
from shared.model_image import ModelImage
from shared.store.ports import Commit, Head, Stored
from shared.vector import Vector


class InProcessStore:
    """One job. Thread-safe; keeps copies, so that nobody changes a version in place."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._head: Head | None = None
        self._token = ""
        self._models: dict[int, bytes] = {}
        self._layout: Layout | None = None
        self._arrays: dict[str, Vector] = {}
        self._state = b""
        self._applied: dict[str, int] = {}
        self._job = "{}"
        self.ledger: list[dict[str, Any]] = []
        self.clients: dict[str, dict[str, Any]] = {}
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
        announced: dict[str, Any] = json.loads(self._job)
        return announced

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
            self._models[0] = model.data.tobytes()
            self._head = Head(0, 0, model.layout.hash, model.sha256, model.layout.num_params, 1, now)
            return True

    def announce(self, job: Mapping[str, Any]) -> None:
        """Write what `job` returns."""
        self._job = json.dumps(dict(job))

    def load(self) -> Stored | None:
        """Return the state of the newest revision."""
        with self._lock:
            head = self._head
            if head is None:
                return None
            arrays = {name: array.copy() for name, array in self._arrays.items()}
            state, applied, versions = self._state, dict(self._applied), sorted(self._models)
            data = self._models[head.version]
        return Stored(head, ModelImage.from_chunks(self.layout(), [data]), arrays, state, applied, versions)

    def commit(self, commit: Commit) -> None:
        """Move to the next revision."""
        with self._lock:
            head = self._head
            if head is not None and self._token == commit.token:
                return
            if head is None or head.revision != commit.expected_revision:
                raise VersionConflict(f"expected revision {commit.expected_revision}, the store is at {head}")
            sha256, created_at = head.sha256, head.created_at
            if commit.model is not None:
                self._models[commit.version] = commit.model.data.tobytes()
                sha256, created_at = commit.model.sha256, commit.now
                self.meta.setdefault(commit.version, {}).update(commit.meta)
            self._arrays = {name: array.copy() for name, array in commit.arrays.items()}
            self._state = commit.state
            self._applied.update(commit.applied)
            self._applied = {k: base for k, base in self._applied.items() if base >= commit.applied_floor}
            updates = json.loads(commit.ledger)
            self.ledger.append({"revision": head.revision + 1, "version": commit.version, "updates": updates})
            self.clients.update({name: json.loads(text) for name, text in commit.clients.items()})
            for version in commit.dropped_versions:
                self._models.pop(version, None)
                self.meta.pop(version, None)
            self._token = commit.token
            self._head = Head(
                head.revision + 1, commit.version, head.layout, sha256, head.num_params, head.chunks, created_at
            )
