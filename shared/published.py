"""The weights workers train from, as they are published: snapshots, deltas between versions, and the way through them.

The model x_v is the server's. What is published of it, xhat_v, differs when the job compresses its downlink:

    q_v = Q(x_v - xhat_p),   xhat_v = xhat_p + q_v        p: the version committed before v, its parent

Everybody adds the same decoded q_v with the same float32 arithmetic, so all hold the same bits; the hash of xhat_v
stands in the head. What Q lost is part of the next difference: no error adds up. With bfloat16 snapshots xhat_v is
rounded where a snapshot is written, and its delta says so.

Source: QAFeL's hidden state, Ortega and Jafarkhani, arXiv:2308.00263, algorithm 1.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import msgpack

from shared.compression import Decoded, downlink_codec
from shared.errors import Reason, RejectedUpdate, SettingsError
from shared.layout import Layout
from shared.model_image import ModelImage
from shared.vector import round_to_bfloat16

FORMAT = 1
ENTRIES_MAX = 64  # of a codec's parameters


@dataclass(frozen=True, slots=True)
class DeltaEntry:
    """A stored delta, as the index has it.

    Attributes:
        version: what it leads to.
        parent: what it starts from, < version.
        size_bytes: of its record.
    """

    version: int
    parent: int
    size_bytes: int


@dataclass(frozen=True, slots=True)
class SnapshotEntry:
    """A stored snapshot, as the index has it.

    Attributes:
        version: whose weights it holds.
        dtype: `float32` or `bfloat16`.
        size_bytes: of its file.
    """

    version: int
    dtype: str
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Index:
    """What is published, both ascending by version."""

    snapshots: tuple[SnapshotEntry, ...] = ()
    deltas: tuple[DeltaEntry, ...] = ()


@dataclass(frozen=True, slots=True)
class Delta:
    """One step from the published weights of a version to those of another.

    Attributes:
        version: what it leads to.
        parent: what it starts from.
        rounded: the weights are rounded to bfloat16 after it is added.
        codec: `{"name": ...}` and what the decoder needs.
        payload: the encoded q.
    """

    version: int
    parent: int
    rounded: bool
    codec: dict[str, Any]
    payload: bytes


@dataclass(frozen=True, slots=True)
class Publication:
    """What a commit publishes beside the model.

    Attributes:
        sha256: of the published weights' `ModelImage` file, hex; "" when workers train from the model itself.
        delta: the index entry and the record (`pack`), None when nothing leads here from the version before.
        snapshot: the index entry and the weights, None when none is due.
        dropped_deltas: deltas nobody needs any more.
        dropped_snapshots: snapshots nobody needs any more.
    """

    sha256: str = ""
    delta: tuple[DeltaEntry, bytes] | None = None
    snapshot: tuple[SnapshotEntry, ModelImage] | None = None
    dropped_deltas: Sequence[DeltaEntry] = ()
    dropped_snapshots: Sequence[SnapshotEntry] = ()


NOTHING = Publication()


@dataclass(frozen=True, slots=True)
class Plan:
    """How to come to a version.

    Attributes:
        snapshot: what to begin with; None: the weights at hand.
        deltas: what to add, in order.
    """

    snapshot: SnapshotEntry | None
    deltas: tuple[DeltaEntry, ...]

    @property
    def size_bytes(self) -> int:
        """What has to be transferred."""
        return sum(entry.size_bytes for entry in self.deltas) + (self.snapshot.size_bytes if self.snapshot else 0)


class PublishedStore(Protocol):
    """Where a plan is carried out; part of `WorkerStore`."""

    def snapshot(self, entry: SnapshotEntry) -> ModelImage:
        """Return the weights of a snapshot."""

    def deltas(self, entries: Sequence[DeltaEntry]) -> list[Delta]:
        """Return these deltas."""


def pack(delta: Delta) -> bytes:
    """Write a delta's record."""
    record = {
        "format": FORMAT, "version": delta.version, "parent": delta.parent, "rounded": delta.rounded,
        "codec": dict(delta.codec), "payload": delta.payload,
    }  # fmt: skip
    packed: bytes = msgpack.packb(record, use_bin_type=True)
    return packed


def unpack(record: bytes, entry: DeltaEntry) -> Delta:
    """Read a delta's record and compare it with its entry in the index.

    Raises:
        RejectedUpdate: it is not what `pack` wrote for this entry.
    """
    try:
        fields = msgpack.unpackb(
            record, raw=False, max_map_len=ENTRIES_MAX, max_array_len=0, max_ext_len=0, max_bin_len=len(record)
        )
        delta = Delta(fields["version"], fields["parent"], fields["rounded"], fields["codec"], fields["payload"])
        sound = fields["format"] == FORMAT and isinstance(delta.codec, dict) and isinstance(delta.payload, bytes)
    except Exception as error:  # as in messages.decode: msgpack raises many types
        raise RejectedUpdate(Reason.MALFORMED, f"delta {entry.version} is damaged: {error!r}") from error
    if not sound or (delta.version, delta.parent) != (entry.version, entry.parent):
        raise RejectedUpdate(Reason.MALFORMED, f"delta {entry.version} is not the one the index announces")
    return delta


def decoded(codec: Mapping[str, Any], payload: bytes, layout: Layout) -> Decoded:
    """Return q, ready to be added; the codec is one of a downlink, which may be biased but must be exact.

    Raises:
        RejectedUpdate: an unknown codec, or a payload it refuses.
    """
    try:
        decoder = downlink_codec(str(codec.get("name")))
    except SettingsError as error:
        raise RejectedUpdate(Reason.CODEC, str(error)) from error
    if decoder is None:
        raise RejectedUpdate(Reason.CODEC, "the delta names no codec")
    return decoder.decode(payload, codec, layout)


def plan(index: Index, target: int, held: int) -> Plan | None:
    """Find the smallest transfer that leads to a version.

    Args:
        index: what is published; a chain that begins at `held` needs only what is beyond it.
        target: the version to come to.
        held: the version at hand, -1: none.

    Returns:
        The way, None when there is none.
    """
    snapshots = {entry.version: entry for entry in index.snapshots}
    deltas = {entry.version: entry for entry in index.deltas}
    plans: list[Plan] = []
    chain: list[DeltaEntry] = []
    version = target
    while True:
        if version == held:
            plans.append(Plan(None, tuple(reversed(chain))))
        if version in snapshots:
            plans.append(Plan(snapshots[version], tuple(reversed(chain))))
        step = deltas.get(version)
        if step is None or step.parent >= version:  # versions ascend: a damaged index must not lead round in circles
            return min(plans, key=lambda each: each.size_bytes, default=None)
        chain.append(step)
        version = step.parent


def carry_out(way: Plan, store: PublishedStore, image: ModelImage | None) -> ModelImage:
    """Transfer what a plan names and return the weights it leads to; nothing is checked against a hash yet.

    Args:
        way: the plan.
        store: where it is read from.
        image: the weights at hand, changed in place when the plan begins with them - only after everything was read,
            but what then proves damaged leaves them half done.

    Raises:
        VersionGone: something was dropped meanwhile; `image` is as it was.
        RejectedUpdate: something is damaged; `image` is worthless.
        StoreUnavailable: `image` is as it was.
    """
    deltas = store.deltas(way.deltas)
    if way.snapshot is not None:
        image = store.snapshot(way.snapshot)
    if image is None:
        raise ValueError("a plan that begins with weights at hand needs some")
    for delta in deltas:
        decoded(delta.codec, delta.payload, image.layout).add_into(image.weights, 1.0)
        if delta.rounded:
            round_to_bfloat16(image.weights)
    return image
