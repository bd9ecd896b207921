"""A worker's folder: a file in it is there whole or not at all, also after a power cut; one process holds it."""

import contextlib
import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Protocol

from shared.errors import DiskFull, SettingsError
from shared.sync import sync_folder

TEMPORARY = ".new"
SMALL_BYTES = 4096  # a file up to this size may take of the room that is to stay free
NO_ROOM = (errno.ENOSPC, errno.EDQUOT)


class Files(Protocol):
    """What a worker needs of its folder; the simulator keeps those of thousands of workers otherwise."""

    def names(self) -> list[str]:
        """Return the names of all files."""

    def size(self, name: str) -> int:
        """Return the size of a file in bytes; raises `OSError` when it is not there."""

    def read(self, name: str) -> bytes:
        """Return a file; raises `OSError` when it is not there."""

    def write(self, name: str, *parts: bytes | memoryview) -> None:
        """Replace a file as a whole, made of the parts; durable on return. Raises `DiskFull`: it is as it was."""

    def rename(self, old: str, new: str) -> None:
        """Rename a file; one that is not there stays away. A power cut may undo it until the next `write`."""

    def remove(self, *names: str, durable: bool = False) -> None:
        """Remove files; those that are not there are no matter. `durable`: a power cut must not bring them back."""

    def close(self) -> None:
        """Let another process have it."""


class Folder:
    """The files of one worker on disk. Thread-safe: no two threads write a file of the same name.

    Args:
        path: where it lives; made when missing.
        sync: make every change survive a power cut; a simulation has no need.
        free_min_bytes: of the disk, that its files leave free.

    Raises:
        SettingsError: another process holds it.
        DiskFull: there is no room for the least that it needs.
        OSError: it cannot be used.
    """

    def __init__(self, path: Path, sync: bool, free_min_bytes: int = 0) -> None:
        self.path, self._sync, self._free_min_bytes = path, sync, free_min_bytes
        with self._room_or_full():
            path.mkdir(parents=True, exist_ok=True)
            self._lock = self._take_lock()
        for leftover in path.glob(f"*{TEMPORARY}"):
            leftover.unlink()
        self._largest = max((file.stat().st_size for file in path.iterdir()), default=0)

    def names(self) -> list[str]:
        """Return the names of all files."""
        return os.listdir(self.path)  # noqa: PTH208 - only the names

    def size(self, name: str) -> int:
        """Return the size of a file."""
        return (self.path / name).stat().st_size

    def read(self, name: str) -> bytes:
        """Return a file."""
        return (self.path / name).read_bytes()

    def write(self, name: str, *parts: bytes | memoryview) -> None:
        """Write a file under another name, then put it in the place of the one that was there; durable on return.

        Raises:
            DiskFull: there is no room; the file that was there still is.
        """
        path, size = self.path / name, sum(len(part) for part in parts)
        temporary = path.with_suffix(TEMPORARY)
        self._largest = max(self._largest, size)
        if size > SMALL_BYTES and (problem := self.no_room_for(size)):
            raise DiskFull(problem)
        with self._room_or_full(temporary):
            with temporary.open("wb") as file:
                for part in parts:
                    file.write(part)
                if self._sync:
                    file.flush()
                    os.fsync(file.fileno())
            temporary.replace(path)
            self._sync_names()

    def no_room_for(self, size_bytes: int | None = None) -> str:
        """Say that the disk has no room for so many bytes, None for those of one more training; "" when it has."""
        size = 2 * self._largest if size_bytes is None else size_bytes  # an update, and the residual's new file
        free = shutil.disk_usage(self.path).free
        if free - size >= self._free_min_bytes:
            return ""
        return (
            f"the disk of {self.path} has {free:,} bytes free; {size:,} more would leave less than "
            f"FEDMQ_DISK_FREE_MIN_BYTES={self._free_min_bytes}"
        )

    def rename(self, old: str, new: str) -> None:
        """Rename a file; one that is not there stays away. A power cut may undo it until the next `write`."""
        with contextlib.suppress(FileNotFoundError):
            (self.path / old).replace(self.path / new)

    def remove(self, *names: str, durable: bool = False) -> None:
        """Remove files; those that are not there are no matter.

        Args:
            names: which.
            durable: a power cut must not bring them back; else it may, until the next `write`.
        """
        for name in names:
            (self.path / name).unlink(missing_ok=True)
        if names and durable:
            self._sync_names()

    def close(self) -> None:
        """Let another process have it."""
        self._lock.close()

    def _sync_names(self) -> None:
        """Make renames and removals so far survive a power cut."""
        if self._sync:
            sync_folder(self.path)

    @contextlib.contextmanager
    def _room_or_full(self, temporary: Path | None = None) -> Iterator[None]:
        """Translate a full disk once, and leave nothing half written on it."""
        try:
            yield
        except OSError as error:
            if temporary is not None:
                temporary.unlink(missing_ok=True)
            if error.errno not in NO_ROOM:
                raise
            raise DiskFull(f"the disk of {self.path} is full: {error.strerror}") from error

    def _take_lock(self) -> IO[str]:
        lock = (self.path / "lock").open("a")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            lock.close()
            raise SettingsError(
                f"the outbox {self.path} is in use by another worker: give each its own --client-id or --state-dir"
            ) from error
        return lock
