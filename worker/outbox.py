"""The outbox: finished updates on disk until the broker has confirmed them.

One file an update, `<sequence>.update`, written under another name, synced and renamed: it is there whole or not
at all, also after a power cut. `outbox.json` holds the incarnation - new whenever there is no outbox - and the next
sequence number, which never repeats within it. A lock file keeps a second worker out.
"""

import fcntl
import json
import os
import threading
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from shared.errors import SettingsError


@dataclass(frozen=True, slots=True)
class Waiting:
    """An unconfirmed update."""

    update_id: str
    path: Path

    def body(self) -> bytes:
        """Read the encoded update."""
        return self.path.read_bytes()


class Outbox:
    """The unconfirmed updates of one worker, oldest first. Used by one writing and one publishing thread.

    Args:
        folder: where it lives; made when missing.
        client: the worker's id.
        updates_max: it is full with so many.
        bytes_max: or with so many bytes.
        sync: make every file survive a power cut; a simulation has no need.
    """

    def __init__(self, folder: Path, client: str, updates_max: int, bytes_max: int, sync: bool = True) -> None:
        self._folder, self._client = folder, client
        self._updates_max, self._bytes_max, self._sync = updates_max, bytes_max, sync
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._lock = self._take_lock()
            for leftover in folder.glob("*.new"):
                leftover.unlink()
            self._state = folder / "outbox.json"
            known = json.loads(self._state.read_text()) if self._state.exists() else {}
            self.incarnation: str = known.get("incarnation") or uuid.uuid4().hex[:12]
            self.next_sequence = max([int(known.get("next_sequence", 0)), *(s + 1 for s in self._sequences())])
            self._write(self._state, self._state_text())
        except (OSError, ValueError, TypeError, AttributeError) as error:  # also an outbox.json of another shape
            raise SettingsError(f"the outbox {folder} cannot be used: {error}") from error
        self._sizes = {s: self._path(s).stat().st_size for s in self._sequences()}
        self._guard = threading.Lock()  # of _sizes: the publishing thread removes, the training thread puts

    def next_id(self) -> str:
        """Return the id of the update that `put` will store next."""
        return f"{self._client}/{self.incarnation}/{self.next_sequence}"

    def put(self, body: bytes) -> None:
        """Store an encoded update made under `next_id`."""
        sequence = self.next_sequence
        self.next_sequence += 1
        self._write(self._state, self._state_text())  # first: a number is never used twice
        self._write(self._path(sequence), body)
        with self._guard:
            self._sizes[sequence] = len(body)

    def oldest(self) -> Waiting | None:
        """Return the update to publish next, None when all are confirmed."""
        with self._guard:
            sequence = min(self._sizes, default=None)
        if sequence is None:
            return None
        return Waiting(f"{self._client}/{self.incarnation}/{sequence}", self._path(sequence))

    def remove(self, waiting: Waiting) -> None:
        """Forget a confirmed update."""
        waiting.path.unlink(missing_ok=True)
        with self._guard:
            self._sizes.pop(int(waiting.path.stem), None)

    def is_full(self) -> bool:
        """Tell whether training should pause."""
        with self._guard:
            return len(self._sizes) >= self._updates_max or sum(self._sizes.values()) >= self._bytes_max

    def __len__(self) -> int:
        return len(self._sizes)

    def close(self) -> None:
        """Let another worker have it."""
        self._lock.close()

    def _take_lock(self) -> IO[str]:
        lock = (self._folder / "lock").open("a")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            lock.close()
            raise SettingsError(
                f"the outbox {self._folder} is in use by another worker: give each its own --client-id or --state-dir"
            ) from error
        return lock

    def _sequences(self) -> list[int]:
        return sorted(int(path.stem) for path in self._folder.glob("*.update"))

    def _path(self, sequence: int) -> Path:
        return self._folder / f"{sequence:012d}.update"

    def _state_text(self) -> bytes:
        return json.dumps({"incarnation": self.incarnation, "next_sequence": self.next_sequence}).encode()

    def _write(self, path: Path, data: bytes) -> None:
        temporary = path.with_suffix(".new")
        with temporary.open("wb") as file:
            file.write(data)
            if self._sync:
                file.flush()
                os.fsync(file.fileno())
        temporary.replace(path)
        if self._sync:
            folder = os.open(self._folder, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
