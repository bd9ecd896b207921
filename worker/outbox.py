"""The outbox: finished updates on disk until the broker has confirmed them.

Those that carry a residual stay until the store says what became of them. One file an update:

    <sequence>.update        waits for the broker's confirm, then it goes
    <sequence>.staged        made with a residual that is not on disk yet: see residual.py
    <sequence>.kept.update   the same once the residual is; waits for the broker's confirm
    <sequence>.sent          confirmed; its mass comes back into the residual should the server refuse it

`outbox.json` holds the incarnation - new whenever there is no outbox - and the next sequence number, which never
repeats within it.
"""

import json
import threading
import uuid
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from shared.errors import DiskFull, SettingsError
from worker.folder import Files, Folder

STATE = "outbox.json"
UPDATE, STAGED, KEPT, SENT = ".update", ".staged", ".kept.update", ".sent"


@dataclass(frozen=True, slots=True)
class Waiting:
    """An unconfirmed update."""

    update_id: str
    name: str
    folder: Files

    def body(self) -> bytes:
        """Read the encoded update."""
        return self.folder.read(self.name)


class Outbox:
    """The unconfirmed and the unsettled updates of one worker. Used by one training and one publishing thread.

    Args:
        folder: where it lives; made when it is a path and missing.
        client: the worker's id.
        updates_max: it is full with so many that wait; beyond so many sent ones the oldest is not kept any longer.
        bytes_max: the same in bytes.
        sync: make every file survive a power cut; a simulation has no need.
        free_min_bytes: of the disk, that stay free.

    Raises:
        SettingsError: the folder cannot be used, or another worker does.
        DiskFull: there is no room for the least that it needs.
    """

    def __init__(
        self, folder: Path | Files, client: str, updates_max: int, bytes_max: int, sync: bool = True,
        free_min_bytes: int = 0,
    ) -> None:  # fmt: skip
        self.client = client
        self._updates_max, self._bytes_max = updates_max, bytes_max
        try:
            self.folder: Files = Folder(folder, sync, free_min_bytes) if isinstance(folder, Path) else folder
            names = self.folder.names()
            known = json.loads(self.folder.read(STATE)) if STATE in names else {}
            self.incarnation: str = known.get("incarnation") or uuid.uuid4().hex[:12]
            numbered = [name for name in names if name[0].isdigit()]
            self.next_sequence = max([int(known.get("next_sequence", 0)), *(_sequence(name) + 1 for name in numbered)])
            if known != self._state():
                self._write_state()
            sizes = {name: self.folder.size(name) for name in numbered if name.endswith((UPDATE, SENT))}
            self._waiting = {_sequence(name): (name, size) for name, size in sizes.items() if name.endswith(UPDATE)}
            self._sent = {_sequence(name): size for name, size in sizes.items() if name.endswith(SENT)}
        except (OSError, ValueError, TypeError, AttributeError) as error:  # also an outbox.json of another shape
            raise SettingsError(f"the outbox {folder} cannot be used: {error}") from error
        self._guard = threading.Lock()  # of both: the publishing thread confirms, the training thread does the rest

    def next_id(self) -> str:
        """Return the id of the update that `put` or `stage` will store next."""
        return self._id(self.next_sequence)

    def put(self, body: bytes) -> None:
        """Store an encoded update made under `next_id`, to be published.

        Raises:
            DiskFull: it is not stored; the same may be put again.
        """
        self._wait(self._store(UPDATE, body), UPDATE, len(body))

    def stage(self, body: bytes) -> int:
        """Store an encoded update made under `next_id`, not to be published yet; return its sequence number.

        Raises:
            DiskFull: it is not stored; the same may be staged again.
        """
        return self._store(STAGED, body)

    def unstage(self, sequence: int) -> None:
        """Give the number of a staged update back: the same update, or another, is staged under it."""
        self.next_sequence = sequence

    def release(self, sequence: int) -> None:
        """Let a staged update be published, and keep it until its outcome is known."""
        self.folder.rename(_name(sequence, STAGED), _name(sequence, KEPT))
        self._wait(sequence, KEPT, self.folder.size(_name(sequence, KEPT)))

    def recover(self, made: int | None, returned: Collection[int]) -> None:
        """Bring the files in line with the residual on disk, after a crash between the two.

        Args:
            made: the last update the residual accounts for, -1 for none: a staged one up to here is released, a later
                one never happened. None when the residual is lost: then what a staged one holds is better sent.
            returned: sent updates whose mass the residual holds again.
        """
        for name in sorted(name for name in self.folder.names() if name.endswith(STAGED)):
            if made is None or _sequence(name) <= made:
                self.release(_sequence(name))
            else:
                self.folder.remove(name)
        self.forget(returned, durable=True)
        self.next_sequence = max(self.next_sequence, (-1 if made is None else made) + 1)

    def oldest(self) -> Waiting | None:
        """Return the update to publish next, None when all are confirmed."""
        with self._guard:
            sequence = min(self._waiting, default=None)
            if sequence is None:
                return None
            return Waiting(self._id(sequence), self._waiting[sequence][0], self.folder)

    def confirm(self, waiting: Waiting) -> None:
        """Note that the broker has an update: it goes, or is kept until its outcome is known."""
        if not waiting.name.endswith(KEPT):
            self.remove(waiting)
            return
        sequence = _sequence(waiting.name)
        self.folder.rename(waiting.name, _name(sequence, SENT))
        with self._guard:
            self._sent[sequence] = self._waiting.pop(sequence, ("", 0))[1]

    def remove(self, waiting: Waiting) -> None:
        """Forget an update that waits. A power cut may bring it back: then the server drops it as a duplicate."""
        self.folder.remove(waiting.name)
        with self._guard:
            self._waiting.pop(_sequence(waiting.name), None)

    def unsettled(self) -> dict[str, int]:
        """Return update_id -> sequence of the updates whose outcome matters, confirmed or not."""
        with self._guard:
            kept = [sequence for sequence, (name, _) in self._waiting.items() if name.endswith(KEPT)]
            return {self._id(sequence): sequence for sequence in sorted([*kept, *self._sent])}

    def sent(self) -> list[int]:
        """Return the numbers of the updates that are confirmed and not settled, oldest first."""
        with self._guard:
            return sorted(self._sent)

    def sent_body(self, sequence: int) -> bytes:
        """Read a sent update."""
        return self.folder.read(_name(sequence, SENT))

    def surplus(self, settled: Collection[int]) -> list[int]:
        """Return the oldest sent updates beyond the limits, not counting the `settled` ones."""
        with self._guard:
            sizes = {sequence: self._sent[sequence] for sequence in sorted(self._sent) if sequence not in settled}
        surplus: list[int] = []
        while len(sizes) > self._updates_max or sum(sizes.values()) > self._bytes_max:
            surplus.append(min(sizes))
            del sizes[surplus[-1]]
        return surplus

    def forget(self, sequences: Collection[int], durable: bool = False) -> None:
        """Forget sent updates.

        Args:
            sequences: their numbers.
            durable: a power cut must not bring them back.
        """
        self.folder.remove(*(_name(sequence, SENT) for sequence in sequences), durable=durable)
        with self._guard:
            for sequence in sequences:
                self._sent.pop(sequence, None)

    def is_full(self) -> bool:
        """Tell whether training should pause."""
        with self._guard:
            size = sum(size for _, size in self._waiting.values())
            return len(self._waiting) >= self._updates_max or size >= self._bytes_max

    def no_room(self) -> str:
        """Say why the disk has no room for one more training; "" when it has. A simulation's has no end."""
        return self.folder.no_room_for() if isinstance(self.folder, Folder) else ""

    def __len__(self) -> int:
        return len(self._waiting)

    def close(self) -> None:
        """Let another worker have it."""
        self.folder.close()

    def _store(self, suffix: str, body: bytes) -> int:
        sequence = self.next_sequence
        self.next_sequence += 1
        try:
            self._write_state()  # first: a number is never used twice
            self.folder.write(_name(sequence, suffix), body)
        except DiskFull:
            self.next_sequence = sequence  # nothing was published under it
            raise
        return sequence

    def _wait(self, sequence: int, suffix: str, size: int) -> None:
        with self._guard:
            self._waiting[sequence] = (_name(sequence, suffix), size)

    def _id(self, sequence: int) -> str:
        return f"{self.client}/{self.incarnation}/{sequence}"

    def _state(self) -> dict[str, str | int]:
        return {"incarnation": self.incarnation, "next_sequence": self.next_sequence}

    def _write_state(self) -> None:
        self.folder.write(STATE, json.dumps(self._state()).encode())


def _name(sequence: int, suffix: str) -> str:
    return f"{sequence:012d}{suffix}"


def _sequence(name: str) -> int:
    return int(name.split(".", maxsplit=1)[0])
