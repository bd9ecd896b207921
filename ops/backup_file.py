r"""The file of a backup: independent of Redis's version, written and read with bounded memory.

    "FEDMQ BACKUP\n"
    msgpack map: the header
    msgpack ["key", name, type, ttl_ms, size, last], then ["piece", value] as often as its value takes; for every key
    msgpack ["end", number of keys]
    "FEDMQ END\n" and the sha256 of everything before that line

A value: bytes of a string; [field, value, ...] of a hash; [member, score, ...] of a sorted set; [[id, [field, value,
...]], ...] of a stream.
"""

import hashlib
import os
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import asdict, astuple, dataclass, fields
from pathlib import Path
from typing import IO, Any

import msgpack

from shared.errors import SettingsError
from shared.store.redis_backup import Entry, Piece
from shared.sync import sync_folder

FORMAT = 1
BEGIN, END = b"FEDMQ BACKUP\n", b"FEDMQ END\n"
TRAILER_BYTES = len(END) + 32
READ_BYTES = 2**20
RECORD_BYTES_MAX = 2**30  # a page of the ledger of an aggregator with a large prefetch


@dataclass(frozen=True, slots=True)
class Header:
    """What a backup says of itself.

    Attributes:
        job: it was taken of.
        revision, version: where that stood.
        layout: hash of its model's layout, hex.
        num_params: length of its flat vector.
        created_at: unix seconds when the backup was taken.
        fedmq: version of the program that took it.
    """

    job: str
    revision: int
    version: int
    layout: str
    num_params: int
    created_at: float
    fedmq: str


Records = Iterable[tuple[Entry, Iterable[Piece]]]


def write(path: Path, header: Header, records: Records, force: bool) -> int:
    """Write a backup; it appears under its name whole or not at all. Return its size in bytes.

    Args:
        path: the file.
        header: what it says of itself.
        records: every key and its value.
        force: a file that is there is replaced.

    Raises:
        SettingsError: it exists, or cannot be written; nothing is left of it then.
    """
    check_free(path, force)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        with temporary.open("xb") as file:
            _write(file, header, records)
            file.flush()
            os.fsync(file.fileno())
            size_bytes = file.tell()
        check_free(path, force)
        temporary.replace(path)
        sync_folder(path.parent)
    except OSError as error:
        raise SettingsError(f"the backup cannot be written to {path}: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)
    return size_bytes


def check_free(path: Path, force: bool) -> None:
    """Refuse to write over a file unless told to.

    Raises:
        SettingsError: it exists.
    """
    if path.exists() and not force:
        raise SettingsError(f"{path} exists: choose another name, or say --force to replace it")
    if not path.parent.is_dir():
        raise SettingsError(f"{path} cannot be written: there is no folder {path.parent}")


def verify(path: Path) -> Header:
    """Read a whole file and compare it with its sha256; return its header.

    Raises:
        SettingsError: it is missing, none of FedMQ's, of another format, incomplete or damaged; the message says which.
    """
    try:
        with path.open("rb") as file:
            end = file.seek(0, os.SEEK_END) - TRAILER_BYTES
            file.seek(0)
            header = _read_header(path, file, end)
            file.seek(max(0, end))
            trailer = file.read(TRAILER_BYTES)
            if end < 0 or not trailer.startswith(END):
                raise SettingsError(
                    f"{path} is incomplete: it ends after {end + TRAILER_BYTES:,} bytes without its end"
                )
            file.seek(0)
            if _sha256(file, end) != trailer[len(END) :]:
                raise SettingsError(f"{path} is damaged: its {end:,} bytes do not have the sha256 that it ends with")
    except OSError as error:
        raise SettingsError(f"{path} cannot be read: {error.strerror or error}") from error
    return header


def records(path: Path) -> Iterator[tuple[Entry, Iterator[Piece]]]:
    """Yield every key of a verified file and its value in pieces, to be read in this order."""
    with path.open("rb") as file:
        end = file.seek(0, os.SEEK_END) - TRAILER_BYTES
        file.seek(len(BEGIN))
        unpacker = msgpack.Unpacker(
            _Until(file, end), read_size=READ_BYTES, max_buffer_size=RECORD_BYTES_MAX, raw=False
        )  # fmt: skip
        unpacker.skip()  # the header
        record = unpacker.unpack()
        while record[0] == "key":
            entry, last = Entry(*record[1:]), _Last()
            yield entry, _pieces(unpacker, last)
            record = last.record
        if record[0] != "end":
            raise SettingsError(f"{path} is damaged: {record[0]!r} stands where a key should")


class _Last:
    """The record after a key's pieces."""

    record: list[Any]


def _pieces(unpacker: Any, last: _Last) -> Iterator[Piece]:
    for record in unpacker:
        last.record = record
        if record[0] != "piece":
            return
        yield record[1]


class _Until:
    """A file that ends before its trailer."""

    def __init__(self, file: IO[bytes], end: int) -> None:
        self._file, self._end = file, end

    def read(self, size: int) -> bytes:
        """Return up to `size` bytes."""
        return self._file.read(max(0, min(size, self._end - self._file.tell())))


def _write(file: IO[bytes], header: Header, records: Records) -> None:
    digest, packer, keys = hashlib.sha256(), msgpack.Packer(use_bin_type=True), 0

    def put(data: bytes) -> None:
        digest.update(data)
        file.write(data)

    put(BEGIN + packer.pack({"format": FORMAT, **asdict(header)}))
    for entry, pieces in records:
        put(packer.pack(["key", *astuple(entry)]))
        for piece in pieces:
            put(packer.pack(["piece", piece]))
        keys += 1
    put(packer.pack(["end", keys]))
    file.write(END + digest.digest())


def _read_header(path: Path, file: IO[bytes], end: int) -> Header:
    if file.read(len(BEGIN)) != BEGIN:
        raise SettingsError(f"{path} is no backup of FedMQ: it does not begin as one")
    try:
        found: dict[str, Any] = msgpack.Unpacker(_Until(file, end), raw=False).unpack()
        number = found["format"]
        header = Header(**{field.name: found[field.name] for field in fields(Header)}) if number == FORMAT else None
    except Exception as error:  # msgpack raises many types
        raise SettingsError(f"{path} is incomplete or damaged: its header cannot be read ({error!r})") from error
    if header is None:
        raise SettingsError(
            f"{path} is a backup of format {number}, made by FedMQ {found.get('fedmq', '?')}; this program reads "
            f"format {FORMAT}: restore it with that version"
        )
    return header


def _sha256(file: IO[bytes], size: int) -> bytes:
    digest = hashlib.sha256()
    while size > 0 and (data := file.read(min(READ_BYTES, size))):
        digest.update(data)
        size -= len(data)
    return digest.digest()
