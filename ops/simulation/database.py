"""A simulation's memory on disk: one SQLite file, changed in one transaction from checkpoint to checkpoint.

Whatever kills the process, the file is as the last checkpoint left it. What clients keep between two trips (outbox,
residual) is held in memory as far as a budget allows and goes to the file beyond that: ten thousand residuals do not
fit anywhere else.
"""

import sqlite3
from collections import OrderedDict
from collections.abc import Iterator, MutableMapping
from pathlib import Path

HELD_BYTES_MAX = 192 * 2**20  # of the clients' files, in memory
PAGE_CACHE_KIB = 32 * 1024

_PRAGMAS = (
    "locking_mode=EXCLUSIVE",  # before the journal: two runs must not share a file, nor one slip in between commits
    "journal_mode=WAL",
    "synchronous=NORMAL",
    f"cache_size=-{PAGE_CACHE_KIB}",
)
_TABLES = """
CREATE TABLE IF NOT EXISTS state (name TEXT PRIMARY KEY, value BLOB NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS files (name TEXT PRIMARY KEY, value BLOB NOT NULL);
CREATE TABLE IF NOT EXISTS kept (name TEXT PRIMARY KEY, value BLOB NOT NULL);
"""


class Database:
    """The file.

    Args:
        path: where it lies; made when missing. None: in memory, for a run nobody resumes.

    Raises:
        sqlite3.Error: another process holds the file, or it is no database.
    """

    def __init__(self, path: Path | None) -> None:
        self.connection = sqlite3.connect(path or ":memory:", isolation_level=None, check_same_thread=False, timeout=0)
        try:
            for pragma in _PRAGMAS:
                self.connection.execute(f"PRAGMA {pragma}")
            self.connection.executescript(_TABLES)
            self.connection.execute("BEGIN IMMEDIATE")
        except sqlite3.Error:
            self.connection.close()
            raise

    def commit(self) -> None:
        """Make everything since the last commit durable, all or nothing."""
        self.connection.execute("COMMIT")
        self.connection.execute("BEGIN IMMEDIATE")

    def close(self) -> None:
        """Forget what was not committed."""
        self.connection.close()


class Records(MutableMapping[str, bytes]):
    """One table as a mapping."""

    def __init__(self, database: Database, table: str) -> None:
        self._run, self._table = database.connection.execute, table

    def __getitem__(self, name: str) -> bytes:
        row = self._run(f"SELECT value FROM {self._table} WHERE name = ?", (name,)).fetchone()  # noqa: S608
        if row is None:
            raise KeyError(name)
        return bytes(row[0])

    def __setitem__(self, name: str, value: bytes) -> None:
        self._run(f"INSERT OR REPLACE INTO {self._table} VALUES (?, ?)", (name, value))  # noqa: S608

    def __delitem__(self, name: str) -> None:
        if not self._run(f"DELETE FROM {self._table} WHERE name = ?", (name,)).rowcount:  # noqa: S608
            raise KeyError(name)

    def __iter__(self) -> Iterator[str]:
        return (row[0] for row in self._run(f"SELECT name FROM {self._table}").fetchall())  # noqa: S608

    def __len__(self) -> int:
        return int(self._run(f"SELECT COUNT(*) FROM {self._table}").fetchone()[0])  # noqa: S608


class Folders:
    """The folders of all clients: files in memory, the longest untouched ones in the database.

    Args:
        database: where they go.
        held_bytes_max: budget in memory.
    """

    def __init__(self, database: Database, held_bytes_max: int = HELD_BYTES_MAX) -> None:
        self._stored = Records(database, "files")
        self._held: OrderedDict[tuple[int, str], bytes] = OrderedDict()
        self._dirty: set[tuple[int, str]] = set()
        self._held_bytes, self._held_bytes_max = 0, held_bytes_max
        self._sizes: dict[int, dict[str, int]] = {}
        self._in_database: set[tuple[int, str]] = set()
        for path, size in database.connection.execute("SELECT name, LENGTH(value) FROM files").fetchall():
            client, _, name = path.partition("/")
            self._sizes.setdefault(int(client), {})[name] = size
            self._in_database.add((int(client), name))

    def folder(self, client: int) -> "ClientFolder":
        """Return one client's folder."""
        return ClientFolder(self, client)

    def sizes(self, client: int) -> dict[str, int]:
        """Return name -> bytes of a client's files."""
        return self._sizes.setdefault(client, {})

    def get(self, client: int, name: str) -> bytes:
        """Return a file; raises `FileNotFoundError`."""
        if (client, name) in self._held:
            self._held.move_to_end((client, name))
            return self._held[client, name]
        if name not in self.sizes(client):
            raise FileNotFoundError(f"{client}/{name}")
        return self._stored[f"{client}/{name}"]

    def put(self, client: int, name: str, data: bytes) -> None:
        """Write a file."""
        self._held_bytes -= len(self._held.pop((client, name), b""))
        self._held[client, name] = data
        self._dirty.add((client, name))
        self._held_bytes += len(data)
        self.sizes(client)[name] = len(data)
        while self._held_bytes > self._held_bytes_max:
            self._release(*next(iter(self._held)))

    def pop(self, client: int, name: str) -> None:
        """Forget a file."""
        key = (client, name)
        self._held_bytes -= len(self._held.pop(key, b""))
        self.sizes(client).pop(name, None)
        self._dirty.discard(key)
        if key in self._in_database:
            del self._stored[f"{client}/{name}"]
            self._in_database.discard(key)

    def save(self) -> None:
        """Write everything to the database that it does not have."""
        for key in sorted(self._dirty):  # a copy: it shrinks
            self._store(key, self._held[key])

    def _release(self, client: int, name: str) -> None:
        data = self._held.pop((client, name))
        self._held_bytes -= len(data)
        if (client, name) in self._dirty:
            self._store((client, name), data)

    def _store(self, key: tuple[int, str], data: bytes) -> None:
        self._stored[f"{key[0]}/{key[1]}"] = data
        self._in_database.add(key)
        self._dirty.discard(key)


class ClientFolder:
    """One client's folder, as `worker.folder.Files` wants it."""

    def __init__(self, folders: Folders, client: int) -> None:
        self._folders, self._client = folders, client

    def names(self) -> list[str]:
        """Return the names of all files."""
        return list(self._folders.sizes(self._client))

    def size(self, name: str) -> int:
        """Return the size of a file."""
        try:
            return self._folders.sizes(self._client)[name]
        except KeyError as error:
            raise FileNotFoundError(name) from error

    def read(self, name: str) -> bytes:
        """Return a file."""
        return self._folders.get(self._client, name)

    def write(self, name: str, *parts: bytes | memoryview) -> None:
        """Replace a file."""
        self._folders.put(self._client, name, bytes(parts[0]) if len(parts) == 1 else b"".join(parts))

    def rename(self, old: str, new: str) -> None:
        """Rename a file."""
        if old != new and old in self._folders.sizes(self._client):
            self._folders.put(self._client, new, self.read(old))
            self._folders.pop(self._client, old)

    def remove(self, *names: str, durable: bool = False) -> None:
        """Remove files."""
        for name in names:
            self._folders.pop(self._client, name)

    def close(self) -> None:
        """Nothing to close."""
