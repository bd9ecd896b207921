"""What the workers made, as the kernel saw it: each file that appeared in an outbox, and each that left it.

The record is nobody's who can be killed: a worker may die between any two steps, the kernel (inotify) keeps every
event in order until we read it.
"""

import ctypes
import json
import os
import select
import struct
import threading
from dataclasses import dataclass
from pathlib import Path

from shared.errors import SettingsError

MOVED_TO, DELETED, OVERFLOW = 0x80, 0x200, 0x4000
_HEADER = struct.Struct("iIII")
SUFFIX = ".update"
POLL_S = 0.2


@dataclass(frozen=True, slots=True)
class Seen:
    """What appeared and what left so far, ids of updates.

    Attributes:
        made: were put into an outbox: from then on they must not be lost.
        confirmed: were taken out of it, which a worker does when the broker confirms.
    """

    made: frozenset[str]
    confirmed: frozenset[str]


class OutboxWatch:
    """Watches the outboxes of a number of workers.

    Args:
        folders: client id -> the folder of its outbox; made when missing.

    Raises:
        SettingsError: this system has no inotify.
    """

    def __init__(self, folders: dict[str, Path]) -> None:
        self._folders = folders
        self._made: set[tuple[str, int]] = set()
        self._gone: set[tuple[str, int]] = set()
        self._lock = threading.Lock()
        self._incarnations: dict[str, str] = {}
        self.overflowed = False
        libc = ctypes.CDLL(None, use_errno=True)
        if not hasattr(libc, "inotify_init1"):
            raise SettingsError("this system has no inotify: run the torture of servers on Linux")
        self._file = libc.inotify_init1(os.O_CLOEXEC)
        self._clients: dict[int, str] = {}
        for client, folder in folders.items():
            folder.mkdir(parents=True, exist_ok=True)
            number = libc.inotify_add_watch(self._file, str(folder).encode(), MOVED_TO | DELETED)
            if number < 0:
                raise SettingsError(f"cannot watch {folder}: {os.strerror(ctypes.get_errno())}")
            self._clients[number] = client
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._read, name="outbox watch", daemon=True)
        self._thread.start()

    def seen(self) -> Seen:
        """Return what was made and what was confirmed until now.

        Raises:
            SettingsError: events were lost, so nothing can be said any more.
        """
        if self.overflowed:
            raise SettingsError("the kernel dropped inotify events: raise fs.inotify.max_queued_events and begin anew")
        with self._lock:
            made, gone = set(self._made), set(self._gone)
        return Seen(frozenset(map(self._id, made)), frozenset(map(self._id, gone)))

    def waiting(self) -> int:
        """Return how many updates wait in all outboxes."""
        return sum(1 for folder in self._folders.values() for _ in folder.glob(f"*{SUFFIX}"))

    def close(self) -> None:
        """Watch no longer."""
        self._closing.set()
        self._thread.join()
        os.close(self._file)

    def _id(self, update: tuple[str, int]) -> str:
        client, sequence = update
        if client not in self._incarnations:
            known = json.loads((self._folders[client] / "outbox.json").read_text())
            self._incarnations[client] = known["incarnation"]
        return f"{client}/{self._incarnations[client]}/{sequence}"

    def _read(self) -> None:
        while not self._closing.is_set():
            if not select.select([self._file], [], [], POLL_S)[0]:
                continue
            events, at = os.read(self._file, 2**16), 0
            while at < len(events):
                number, mask, _, length = _HEADER.unpack_from(events, at)
                name = events[at + _HEADER.size : at + _HEADER.size + length].rstrip(b"\0").decode()
                at += _HEADER.size + length
                self._note(number, mask, name)

    def _note(self, number: int, mask: int, name: str) -> None:
        if mask & OVERFLOW:
            self.overflowed = True
        elif name.endswith(SUFFIX):
            update = (self._clients[number], int(name.split(".", maxsplit=1)[0]))
            with self._lock:
                (self._made if mask & MOVED_TO else self._gone).add(update)
