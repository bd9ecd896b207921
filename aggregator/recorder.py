"""Keeps every update as it was received, so that a version can be recomputed: `fedmq replay`.

A recorder stands between the aggregator and its source. Records are on disk before anything is acked; an ack is the
promise that an update will not come again, so by then it must be kept.

A segment file, written once from its beginning to its end:

    msgpack ["fedmq records", 1, job]
    then for each delivery:
    | "RECD" | u32 length | u32 crc32 |  msgpack [update_id, client, user_id, body]      (little-endian)

A crash leaves a torn record at the end of a segment: its update was not acked and comes again. A reader goes on behind
a damaged record at the next mark.
"""

import logging
import mmap
import os
import struct
import zlib
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import msgpack

from shared.errors import Reason, SettingsError, Unavailable
from shared.sync import sync_folder
from shared.transport.ports import Delivery, UpdateSource

log = logging.getLogger("fedmq.recorder")

SUFFIX = ".records"
FORMAT = ("fedmq records", 1)
MARK = b"RECD"
FRAME = struct.Struct("<4sII")
SEGMENT_BYTES = 256 * 2**20
SEGMENTS_MIN = 4  # so many make up `bytes_max` at least: one goes at a time


@dataclass(frozen=True, slots=True)
class Record:
    """One delivery as it was kept.

    Attributes:
        update_id: AMQP message_id; the message itself may say another.
        client: last word of the routing key.
        user_id: login the broker vouched for.
        body: the message; empty where the record is damaged.
        place: segment and offset, for messages.
        damage: what is wrong with the record, "" if nothing.
    """

    update_id: str
    client: str
    user_id: str | None
    body: bytes
    place: str
    damage: str = ""


class Recorder:
    """An `UpdateSource` that keeps what it hands out.

    Args:
        inner: where deliveries come from.
        folder: of the records; those of a job are in a folder of its name.
        job: the job's id.
        bytes_max: beyond that the oldest segments go.
        segment_bytes: a segment is ended at this size.

    Raises:
        SettingsError: the folder cannot be made.
    """

    def __init__(
        self, inner: UpdateSource, folder: Path, job: str, bytes_max: int, segment_bytes: int = SEGMENT_BYTES
    ) -> None:
        self._inner, self._folder, self._job = inner, folder / job, job
        self._bytes_max, self._segment_bytes = bytes_max, min(segment_bytes, bytes_max // SEGMENTS_MIN)
        self._file: BinaryIO | None = None  # the segment that is being written
        self._size = 0  # of it, as far as it is sound
        self._unsynced: list[BinaryIO] = []  # segments with records that are not yet on disk
        self._unwritten: list[Delivery] = []
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise SettingsError(f"FEDMQ_RECORD_DIR: cannot make {self._folder}: {error.strerror}") from error

    def receive(self, limit: int, wait_s: float) -> list[Delivery]:
        """Return the next deliveries, each written down.

        Raises:
            Unavailable: they cannot be written; they are returned once they can.
        """
        if not self._unwritten:
            self._unwritten = list(self._inner.receive(limit, wait_s))
        for delivery in self._unwritten:
            self._write(delivery)
        written, self._unwritten = self._unwritten, []
        return written

    def ack(self, deliveries: Sequence[Delivery]) -> None:
        """Ack what is safely on disk; where that fails, have everything delivered and written again instead.

        What an aggregator acks is in its commit already, so it takes the second delivery for the duplicate it is.
        """
        try:
            self._sync()
        except OSError as error:
            log.error("records in %s may not be on disk (%s): asking for the updates again", self._folder, error)
            self._end_segment()
            self._unsynced.clear()
            self.recover()
            return
        self._inner.ack(deliveries)

    def reject(self, delivery: Delivery, reason: Reason, detail: str) -> None:
        """Hand it to the dead letters."""
        self._inner.reject(delivery, reason, detail)

    def recover(self) -> None:
        """Have everything that is not acked delivered again; it is written again too."""
        self._unwritten = []
        self._inner.recover()

    def close(self) -> None:
        """Close the source and the segment."""
        self._inner.close()
        with suppress(OSError):
            self._sync()
        self._end_segment()

    def _write(self, delivery: Delivery) -> None:
        """Append one record; what is left of one that cannot be written is taken back."""
        frame, packed = _framed(delivery)
        size = len(frame) + len(packed)
        try:
            file = self._segment(size)
            for piece in (memoryview(frame), memoryview(packed)):  # two writes cost less than joining them
                done = 0
                while done < len(piece):
                    done += file.write(piece[done:])
        except OSError as error:
            self._take_back()
            raise Unavailable(
                f"cannot keep updates in {self._folder} (FEDMQ_RECORD_DIR): {error.strerror}; make room there, or "
                "lower FEDMQ_RECORD_BYTES_MAX and restart"
            ) from error
        self._size += size
        if file not in self._unsynced:
            self._unsynced.append(file)

    def _segment(self, more: int) -> BinaryIO:
        """Return the open segment, or begin the next."""
        if self._file is not None and self._size + more > self._segment_bytes:
            self._end_segment()
        if self._file is None:
            file = self._new_file(self._make_room(more) + 1)
            try:
                self._size = file.write(msgpack.packb([*FORMAT, self._job]))
                sync_folder(self._folder)
            except OSError:  # each try would leave a file behind
                file.close()
                Path(file.name).unlink(missing_ok=True)
                raise
            self._file = file
        return self._file

    def _make_room(self, more: int) -> int:
        """Remove the oldest segments, so that another one stays within the limit; return the newest's number."""
        segments = sorted(self._folder.glob(f"*{SUFFIX}"))
        sizes = [path.stat().st_size for path in segments]
        newest = int(segments[-1].name.split("-")[0]) if segments else 0
        while segments and sum(sizes) > self._bytes_max - max(self._segment_bytes, more):
            log.info("records: %s goes, FEDMQ_RECORD_BYTES_MAX is %d", segments[0].name, self._bytes_max)
            segments.pop(0).unlink(missing_ok=True)
            sizes.pop(0)
        return newest

    def _new_file(self, number: int) -> BinaryIO:
        """Open a file that nobody else writes, whichever aggregators share the folder."""
        while True:
            try:
                return (self._folder / f"{number:010d}-{os.getpid()}{SUFFIX}").open("xb", buffering=0)
            except FileExistsError:
                number += 1

    def _sync(self) -> None:
        while self._unsynced:
            file = self._unsynced[0]
            os.fsync(file.fileno())
            self._unsynced.pop(0)
            if file is not self._file:
                file.close()

    def _take_back(self) -> None:
        """Cut off a torn record, or leave it at the end of a segment that is not continued."""
        if self._file is None:
            return
        try:
            self._file.truncate(self._size)
            self._file.seek(self._size)
        except OSError:
            self._end_segment()

    def _end_segment(self) -> None:
        """Have the next record begin another segment."""
        file, self._file = self._file, None
        if file is not None and file not in self._unsynced:
            file.close()


def read(folder: Path, job: str) -> Iterator[Record]:
    """Yield what was kept of a job, in the order it was received; damaged records say so.

    Args:
        folder: FEDMQ_RECORD_DIR.
        job: the job's id.

    Raises:
        SettingsError: there are no records.
    """
    found = sorted((folder / job).glob(f"*{SUFFIX}"))
    if not found:
        raise SettingsError(
            f"no records of job {job!r} in {folder}: it is the folder FEDMQ_RECORD_DIR names, with {job}/"
        )
    for path in found:
        yield from _read_segment(path)


def read_again(folder: Path, job: str, place: str) -> bytes:
    """Return the body of the record at a place that `read` named.

    Raises:
        SettingsError: it is gone, or no longer what it was.
    """
    name, _, offset = place.partition("@")
    try:
        with (folder / job / name).open("rb") as file:
            file.seek(int(offset))
            mark, length, crc = FRAME.unpack(file.read(FRAME.size))
            packed = file.read(length)
    except (OSError, struct.error, ValueError) as error:
        raise SettingsError(f"the record at {place} cannot be read any more: {error}") from error
    if mark != MARK or zlib.crc32(packed) != crc:
        raise SettingsError(f"the record at {place} has changed since it was looked for")
    body: bytes = msgpack.unpackb(packed)[3]
    return body


def _framed(delivery: Delivery) -> tuple[bytes, bytes]:
    """Return what stands before a record, and the record."""
    packed: bytes = msgpack.packb([delivery.update_id, delivery.client, delivery.user_id, delivery.body])
    return FRAME.pack(MARK, len(packed), zlib.crc32(packed)), packed


def _read_segment(path: Path) -> Iterator[Record]:
    """Yield the records of one segment, and in the place of a damaged one what is known of it."""
    with path.open("rb") as file:
        if os.fstat(file.fileno()).st_size == 0:
            return
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            start = data.find(MARK)
            while 0 <= start < len(data):
                record, end = _record_at(data, start, path.name)
                if record is not None:
                    yield record
                    start = end
                    continue
                following = data.find(MARK, start + 1)
                if following >= 0 or data[start : start + len(MARK)] != MARK:  # otherwise it is torn: see above
                    yield Record("", "", None, b"", f"{path.name}@{start}", "it cannot be read")
                start = following


def _record_at(data: mmap.mmap, start: int, name: str) -> tuple[Record | None, int]:
    """Return the record at an offset and where it ends; None where none begins that ends where another begins."""
    if start + FRAME.size > len(data):
        return None, start
    mark, length, crc = FRAME.unpack_from(data, start)
    end = start + FRAME.size + length
    if mark != MARK or end > len(data):
        return None, start
    packed, place = data[start + FRAME.size : end], f"{name}@{start}"
    sound = zlib.crc32(packed) == crc
    if not sound and end < len(data) and data[end : end + len(MARK)] != MARK:
        return None, start
    try:
        update_id, client, user_id, body = msgpack.unpackb(packed)
    except Exception:  # msgpack raises whatever it likes of damaged bytes
        return Record("", "", None, b"", place, "it cannot be read"), end
    if not sound:
        return Record(str(update_id), str(client), None, b"", place, "its bytes are not those that were written"), end
    return Record(update_id, client, user_id, body, place), end


__all__ = ["Record", "Recorder", "read", "read_again"]
