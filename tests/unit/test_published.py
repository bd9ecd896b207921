"""The way through snapshots and deltas, and a delta's record."""

import itertools

import msgpack
import numpy as np
import pytest

from shared.errors import Reason, RejectedUpdate
from shared.published import Delta, DeltaEntry, Index, Plan, SnapshotEntry, carry_out, decoded, pack, plan, unpack
from tests.builders import model_of


def index_of(snapshots, deltas):
    return Index(
        tuple(SnapshotEntry(version, "float32", size) for version, size in snapshots),
        tuple(DeltaEntry(version, parent, size) for version, parent, size in deltas),
    )


CHAIN = [(3, 1, 10), (4, 3, 10), (8, 4, 10), (9, 8, 10)]  # commits skip versions


@pytest.mark.parametrize(
    ("snapshots", "held", "begins", "steps"),
    [
        ([(1, 100)], 4, None, [8, 9]),
        ([(1, 100)], -1, 1, [3, 4, 8, 9]),
        ([(1, 100), (8, 100)], -1, 8, [9]),
        ([(1, 100), (8, 5)], 3, 8, [9]),  # a snapshot and the rest cost less than the chain
        ([(1, 100), (8, 15)], 3, 8, [9]),
        ([(1, 100), (8, 25)], 3, None, [4, 8, 9]),
        ([(1, 100)], 5, 1, [3, 4, 8, 9]),  # a version that was never committed is no beginning
        ([(1, 100)], 9, None, []),
        ([(1, 100), (12, 1)], 3, None, [4, 8, 9]),  # newer than what is looked for
    ],
)
def test_the_smallest_transfer_is_chosen(snapshots, held, begins, steps):
    way = plan(index_of(snapshots, CHAIN), 9, held)
    assert (way.snapshot.version if way.snapshot else None) == begins
    assert [entry.version for entry in way.deltas] == steps
    assert way.size_bytes == 10 * len(steps) + dict(snapshots).get(begins, 0)


def test_the_plan_is_the_best_of_all_there_are():
    rng = np.random.default_rng(0)
    for _ in range(200):
        parents = {v: int(rng.integers(max(0, v - 3), v)) for v in range(1, 12) if rng.random() < 0.9}
        deltas = [(v, parent, int(rng.integers(1, 50))) for v, parent in parents.items()]
        snapshots = [(v, int(rng.integers(20, 120))) for v in range(12) if rng.random() < 0.3]
        held = int(rng.integers(-1, 12))
        costs, total, version = [], 0, 11
        while True:  # every version the chain passes is a beginning, if it is held or stored
            costs += [total] if version == held else []
            costs += [total + size for v, size in snapshots if v == version]
            if version not in parents:
                break
            total += next(size for v, _, size in deltas if v == version)
            version = parents[version]
        way = plan(index_of(snapshots, deltas), 11, held)
        assert (way.size_bytes if way else None) == (min(costs) if costs else None)


def test_without_a_way_there_is_no_plan():
    assert plan(Index(), 3, -1) is None
    assert plan(index_of([], CHAIN), 9, 2) is None
    assert plan(index_of([(1, 9)], [*CHAIN[:1], *CHAIN[2:]]), 9, 3) is None  # a link is missing


def test_a_damaged_index_does_not_lead_round_in_circles():
    assert plan(index_of([], [(3, 3, 1)]), 3, 1) is None
    assert plan(index_of([], [(3, 5, 1), (5, 3, 1)]), 3, 1) is None


DELTA = Delta(5, 3, True, {"name": "float32"}, np.ones(7, "<f4").tobytes())


def entry_of(record, version=5, parent=3):
    return DeltaEntry(version, parent, len(record))


def test_a_record_comes_back_as_it_was():
    record = pack(DELTA)
    assert unpack(record, entry_of(record)) == DELTA


def test_any_other_bytes_are_rejected_and_nothing_else():
    record = pack(DELTA)
    fields = msgpack.unpackb(record)
    spoiled = [b"", b"\xc1", record[:-1], record + b"x", msgpack.packb(7), msgpack.packb([]), b"\xdd\xff\xff\xff\xff"]
    spoiled += [msgpack.packb({k: v for k, v in fields.items() if k != name}) for name in fields]
    spoiled += [msgpack.packb(fields | change) for change in (
        {"format": 2}, {"codec": "float32"}, {"payload": "text"}, {"version": 6}, {"parent": 4}, {"payload": [[1]]},
    )]  # fmt: skip
    for bad in spoiled:
        with pytest.raises(RejectedUpdate) as caught:
            unpack(bad, entry_of(record))
        assert caught.value.reason is Reason.MALFORMED


@pytest.mark.parametrize(
    "codec", [{}, {"name": None}, {"name": "off"}, {"name": "no-such"}, {"name": "rotate | int8"}, {"name": 7}]
)
def test_a_delta_of_a_codec_no_downlink_uses_is_rejected(codec):
    with pytest.raises(RejectedUpdate) as caught:
        decoded(codec, bytes(28), model_of(np.zeros(7, np.float32)).layout)
    assert caught.value.reason is Reason.CODEC


class Kept:
    """A store of one delta."""

    def __init__(self, error=None):
        self.error = error

    def deltas(self, entries):
        if self.error:
            raise self.error
        return [DELTA] * len(entries)


def test_the_weights_at_hand_change_only_when_everything_was_read():
    image = model_of(np.full(7, 1 + 2**-10, np.float32))
    before = image.data.tobytes()
    way = Plan(None, (DeltaEntry(5, 3, 1),))
    with pytest.raises(RejectedUpdate):
        carry_out(way, Kept(RejectedUpdate(Reason.MALFORMED, "x")), image)
    assert image.data.tobytes() == before
    assert carry_out(way, Kept(), image) is image
    assert image.weights.tolist() == [2.0] * 7  # added, then rounded as the record says


def test_steps_are_added_in_order():
    """Float32 sums depend on it, and every replica must come to the same bits."""
    deltas = {v: Delta(v, v - 1, False, {"name": "float32"}, np.full(7, s, "<f4").tobytes())
              for v, s in ((1, 1e8), (2, 1.0), (3, -1e8))}  # fmt: skip

    class Store:
        def deltas(self, entries):
            return [deltas[entry.version] for entry in entries]

    sums = set()
    for order in itertools.permutations((1, 2, 3)):
        image = model_of(np.zeros(7, np.float32))
        carry_out(Plan(None, tuple(DeltaEntry(v, v - 1, 1) for v in order)), Store(), image)
        sums.add((order, float(image.weights[0])))
    assert ((1, 2, 3), float(np.float32(np.float32(1e8) + np.float32(1)) - np.float32(1e8))) in sums
    assert len({value for _, value in sums}) == 2
