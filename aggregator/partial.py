"""Updates that come in parts: each part is a record of the state until the last one is here.

A part is made durable by the commit that any delivery waits for, and acked after it; so neither memory nor the
prefetch window has to hold a whole update, and a standby goes on with what is there.
"""

import hashlib
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from shared.errors import Reason, RejectedUpdate
from shared.messages import Part, Update

if TYPE_CHECKING:
    from aggregator.state import State

PREFIX = "part:"  # of the records' names
PARTIALS_MAX = 10_000  # unfinished updates: each stands in the state, which every commit writes
PART_BYTES_LEAST = 256  # what a part counts as when it is shorter: its name and its place in the store


@dataclass(slots=True)
class Partial:
    """An update of which some parts are here. A client has one at most: it sends one update after the other.

    Attributes:
        update_id: its id.
        sort: hash of all that its parts must have in common.
        count: of its parts.
        payload_bytes: of its whole payload.
        sizes: part -> bytes of payload, of those that are here.
        message_bytes: of the messages they came in.
        have_bytes: sum of the sizes.
        room_bytes: what it counts as against the limit; kept, for all are added up when one begins.
        touched_s: monotonic time when the last one came, or when the state was loaded.
    """

    update_id: str
    sort: str
    count: int
    payload_bytes: int
    sizes: dict[int, int] = field(default_factory=dict)
    message_bytes: int = 0
    have_bytes: int = 0
    room_bytes: int = field(init=False)
    touched_s: float = -1.0  # not known yet: see `touch`

    def __post_init__(self) -> None:
        self.room_bytes = _room(self.payload_bytes, self.count)

    def record(self) -> list[Any]:
        """Return it in msgpack's types."""
        sizes = [[index, size] for index, size in self.sizes.items()]
        return [self.update_id, self.sort, self.count, self.payload_bytes, sizes, self.message_bytes]

    @classmethod
    def read(cls, record: list[Any]) -> "Partial":
        """Read what `record` returned."""
        update_id, sort, count, payload_bytes, sizes, message_bytes = record
        have_bytes = sum(size for _, size in sizes)
        return cls(update_id, sort, count, payload_bytes, dict(sizes), message_bytes, have_bytes)

    def name(self, index: int) -> str:
        """Return the name of a part's record."""
        return f"{PREFIX}{self.update_id}:{index}"


def take(state: "State", update: Update, size: int, bytes_max: int, now_s: float) -> tuple[Update, int] | None:
    """Take in a part; return the whole update and the bytes of its messages once it is complete.

    A part that is here already changes nothing. One that does not go with the others - its sender cut the update
    anew - takes their place. Call `drop` when the whole update is settled, or rejected.

    Args:
        state: the aggregation state; `kept` and `partial` change.
        update: the part, checked but for its payload.
        size: of its message, in bytes.
        bytes_max: of payload, for all partial updates together.
        now_s: monotonic time.

    Raises:
        RejectedUpdate: there is no room, or the parts make more or less than they said.
        StoreUnavailable: call again.
    """
    part = cast(Part, update.part)
    sort = _sort(update, part)
    partial = state.partial.get(update.client)
    if partial is None or partial.sort != sort:
        if partial is not None:
            drop(state, update.client, partial.update_id)
        _make_room(state, part, bytes_max)
        partial = state.partial[update.client] = Partial(update.update_id, sort, part.count, part.payload_bytes)
    partial.touched_s = now_s
    if part.index not in partial.sizes:
        state.kept.put(partial.name(part.index), update.payload)
        partial.sizes[part.index] = len(update.payload)
        partial.message_bytes += size
        partial.have_bytes += len(update.payload)
    have = partial.have_bytes
    missing = partial.count - len(partial.sizes)
    if have > part.payload_bytes or (not missing and have != part.payload_bytes):
        raise RejectedUpdate(
            Reason.INCOMPLETE,
            f"{len(partial.sizes)} of {partial.count} parts have {have} bytes, they announce {part.payload_bytes}",
        )
    if missing:
        return None
    return replace(update, payload=_join(state, partial), part=None), partial.message_bytes


def drop(state: "State", client: str, update_id: str) -> None:
    """Forget a client's partial update, if it is this one."""
    partial = state.partial.get(client)
    if partial is not None and partial.update_id == update_id:
        del state.partial[client]
        for index in partial.sizes:
            state.kept.drop(partial.name(index))


def abandoned(state: "State", age_max_s: float, now_s: float) -> dict[str, Partial]:
    """Return client -> partial update of those whose last part came too long ago.

    Time is that of this process: a backlog, a restart or a wrong clock makes nothing look abandoned.

    Args:
        state: the aggregation state.
        age_max_s: how long that may be, seconds.
        now_s: monotonic time.
    """
    for partial in state.partial.values():
        if partial.touched_s < 0:
            partial.touched_s = now_s
    return {client: partial for client, partial in state.partial.items() if now_s - partial.touched_s > age_max_s}


def _make_room(state: "State", part: Part, bytes_max: int) -> None:
    if len(state.partial) >= PARTIALS_MAX:
        raise RejectedUpdate(Reason.INCOMPLETE, f"no room for parts of one more update: {PARTIALS_MAX} are unfinished")
    held = sum(partial.room_bytes for partial in state.partial.values())
    if held + _room(part.payload_bytes, part.count) > bytes_max:
        raise RejectedUpdate(
            Reason.INCOMPLETE,
            f"no room for an update of {part.payload_bytes} bytes in parts: {len(state.partial)} others hold {held}, "
            f"parts_bytes_max is {bytes_max}",
        )


def _room(payload_bytes: int, count: int) -> int:
    """Return what an update in parts takes of the store, so that tiny parts are not held for nothing."""
    return max(payload_bytes, count * PART_BYTES_LEAST)


def _join(state: "State", partial: Partial) -> bytes:
    """Return the whole payload; only one part at a time is held beside it."""
    payload = np.empty(partial.payload_bytes, np.uint8)
    start = 0
    for index in range(partial.count):
        record = state.kept.get(partial.name(index))
        if record is None or len(record) != partial.sizes[index]:
            raise RejectedUpdate(Reason.INCOMPLETE, f"part {index} of {partial.update_id} is not stored any more")
        payload[start : start + len(record)] = np.frombuffer(record, np.uint8)
        start += len(record)
    return cast(bytes, payload.data)  # every codec reads any buffer; bytes would be one more copy


def _sort(update: Update, part: Part) -> str:
    envelope = replace(update, payload=b"", part=replace(part, index=0))
    return hashlib.sha256(repr(envelope).encode()).hexdigest()[:16]
