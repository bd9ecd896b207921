"""The aggregation state: records kept beside the vectors, what survives a change of rule, when a commit is due."""

import msgpack
import numpy as np
import pytest

from aggregator import aggregator as loop
from aggregator.state import Contribution, Kept, State, from_stored, open_buffer_kind, small_part
from shared.store.inprocess import InProcessStore
from shared.store.ports import Commit, Head, Stored
from tests.builders import NUM_PARAMS, FaultyStore, System, model_of, weights


class Reads(dict):
    """A store of records that counts what is read."""

    def __init__(self, **records):
        super().__init__(records)
        self.asked = []

    def __call__(self, name):
        self.asked.append(name)
        return self.get(name)


# --- Kept -------------------------------------------------------------------------------------------------------


def test_records_are_read_from_the_store_until_they_change():
    reads = Reads(a=b"stored", b=b"stored too")
    kept = Kept(reads, {"a", "b"})
    assert (kept.get("a"), kept.get("b"), reads.asked) == (b"stored", b"stored too", ["a", "b"])
    kept.put("a", b"new")
    kept.drop("b")
    assert (kept.get("a"), kept.get("b"), reads.asked) == (b"new", None, ["a", "b"])
    assert kept.changes == {"a": b"new", "b": None}
    assert kept.names == {"a"}


def test_a_record_that_the_state_does_not_list_does_not_exist():
    """The store may hold what a rival has committed since."""
    kept = Kept(Reads(rival=b"record"))
    assert kept.get("rival") is None
    kept.drop("rival")
    assert (kept.changes, kept.names) == ({}, set())


def test_what_is_durable_is_read_from_the_store_again():
    reads = Reads()
    kept = Kept(reads)
    kept.put("a", b"record")
    kept.committed()
    assert (kept.changes, kept.changed_bytes, kept.names) == ({}, 0, {"a"})
    reads["a"] = b"record"
    assert kept.get("a") == b"record"
    assert reads.asked == ["a"]
    kept.put("a", b"")
    assert kept.get("a") == b""


def test_a_record_that_was_put_and_dropped_is_dropped_in_the_store():
    """It may stand there from an earlier commit."""
    kept = Kept(Reads(a=b"old"), {"a"})
    kept.put("a", b"new")
    kept.drop("a")
    assert (kept.changes, kept.get("a")) == ({"a": None}, None)
    kept.put("a", b"back")
    assert (kept.changes, kept.get("a")) == ({"a": b"back"}, b"back")


def test_changed_bytes_are_those_a_commit_will_write():
    kept = Kept(Reads(), {"stored"})
    for change, expected in (
        (lambda: kept.put("a", b"12345"), 5), (lambda: kept.put("b", b"123"), 8), (lambda: kept.put("a", b"1"), 4),
        (lambda: kept.drop("b"), 1), (lambda: kept.drop("b"), 1), (lambda: kept.drop("stored"), 1),
        (lambda: kept.put("b", b"12"), 3), (lambda: kept.put("a", b""), 2),
    ):  # fmt: skip
        change()
        assert kept.changed_bytes == expected == sum(len(record or b"") for record in kept.changes.values())


# --- from_stored ------------------------------------------------------------------------------------------------


def stored_of(rule, arrays=(), version=3, **changes):
    """Return what a store holds after an aggregator of `rule` has committed."""
    state = State(7, version, version, model_of(weights(0)), facts={"heard": {"a": 1}}, floor=2, totals={"applied": 9})
    state.kept = Kept(lambda name: b"record", {"client:a", "trusted"})
    state.buffer, state.buffer_since = changes.get("buffer", []), 5.0
    small = small_part(state, f"{rule} kind", rule, tuple(arrays))
    head = Head(7, version, state.model.layout.hash, "", NUM_PARAMS, 1, 0.0)
    held = {name: np.full(NUM_PARAMS, 4.0, np.float32) for name in arrays}
    return Stored(head, state.model, held, small, {"a/i/0": 2}, [version], {}, frozenset(state.kept.names))


def read(name):
    return b"record"


def test_the_same_rule_goes_on_with_all_it_kept():
    contribution = Contribution("a/i/0", 1, 0.5, 2.0)
    stored = stored_of("fedbuff", ["delta_sum", "moment"], buffer=[contribution])
    state = from_stored(stored, "fedbuff", ("delta_sum",), {"moment": 1.0, "newer": 2.0}, read)
    assert (state.revision, state.version, state.committed_version, state.floor) == (7, 3, 3, 2)
    assert (state.facts, state.totals, state.applied) == ({"heard": {"a": 1}}, {"applied": 9}, {"a/i/0": 2})
    assert (state.buffer, state.buffer_since) == ([contribution], 5.0)
    assert {name: set(array.tolist()) for name, array in state.arrays.items()} == {
        "delta_sum": {4.0}, "moment": {4.0}, "newer": {2.0},
    }  # fmt: skip
    assert state.kept.names == {"client:a", "trusted"}
    assert state.kept.get("client:a") == b"record"
    assert state.kept.changes == {}


def test_another_rule_drops_what_the_former_kept_and_fills_its_arrays_anew():
    state = from_stored(stored_of("fedbuff", ["moment"]), "fadas", ("delta_sum",), {"moment": 1.0}, read)
    assert (state.facts, state.kept.names) == ({}, set())
    assert state.kept.get("client:a") is None
    assert state.kept.changes == {"client:a": None, "trusted": None}
    assert {name: set(array.tolist()) for name, array in state.arrays.items()} == {"delta_sum": {0.0}, "moment": {1.0}}
    assert (state.totals, state.applied, state.floor) == ({"applied": 9}, {"a/i/0": 2}, 2)  # the job's, not the rule's


def test_the_open_buffer_is_kept_also_for_another_rule_of_the_same_kind():
    contribution = Contribution("a/i/0", 1, 0.5, 2.0)
    stored = stored_of("fedbuff", ["delta_sum"], buffer=[contribution])
    assert open_buffer_kind(stored) == "fedbuff kind"
    state = from_stored(stored, "other", ("delta_sum",), {}, read)
    assert state.buffer == [contribution]
    assert state.arrays["delta_sum"].tolist() == [4.0] * NUM_PARAMS


def test_a_job_that_has_just_begun_has_nothing():
    head = Head(0, 0, "", "", NUM_PARAMS, 1, 0.0)
    stored = Stored(head, model_of(weights(0)), {}, b"", {}, [0])
    state = from_stored(stored, "fedbuff", ("delta_sum",), {"moment": 3.0}, read)
    assert (state.facts, state.buffer, state.kept.names, state.kept.changes) == ({}, [], set(), {})
    assert state.arrays["moment"].tolist() == [3.0] * NUM_PARAMS
    assert open_buffer_kind(stored) is None


def test_vectors_that_are_not_stored_are_not_shared():
    state = from_stored(stored_of("fedbuff"), "fedbuff", ("a", "b"), {"c": 0.0}, read)
    arrays = [*state.arrays.values(), state.weights]
    assert not any(np.shares_memory(x, y) for i, x in enumerate(arrays) for y in arrays[:i])


def test_the_small_part_is_of_plain_types_only():
    stored = stored_of("fedbuff", ["moment"])
    small = msgpack.unpackb(stored.state)
    assert (small["facts_of"], small["arrays"]) == ("fedbuff", ["moment"])


# --- in the loop ------------------------------------------------------------------------------------------------


class Commits(InProcessStore):
    """A store that notes how many bytes of records each commit writes."""

    def __init__(self):
        super().__init__()
        self.record_bytes = []

    def commit(self, commit: Commit):
        super().commit(commit)
        self.record_bytes.append(sum(len(record or b"") for record in commit.kept.values()))


def trusting(store=None, **changes):
    """Return a system whose only records are the trusted client's updates."""
    changes = {"robust": "aflguard(1)", "trusted_client": "server", "buffer_size": 5} | changes
    return System(store=store, **changes)


def test_a_commit_is_due_when_much_is_kept(monkeypatch):
    record_bytes = 4 * NUM_PARAMS
    monkeypatch.setattr(loop, "KEPT_BYTES_MAX", 3 * record_bytes)
    system = System(store=Commits(), robust="median", buffer_size=100, prefetch=1000)
    for number in range(9):
        system.publish(weights(number), update_id=f"c{number}/i/0")
        system.step()
        assert system.aggregator.state.kept.changed_bytes < loop.KEPT_BYTES_MAX
    commits = len(system.store.ledger)
    assert 3 <= commits <= 9
    assert all(size < 3 * record_bytes + 200 for size in system.store.record_bytes)
    monkeypatch.setattr(loop, "KEPT_BYTES_MAX", 10**9)
    for number in range(9, 30):
        system.publish(weights(number), update_id=f"c{number}/i/0")
        system.step()
    assert len(system.store.ledger) == commits


def test_a_record_that_is_replaced_counts_once(monkeypatch):
    monkeypatch.setattr(loop, "KEPT_BYTES_MAX", 1000)
    system = trusting(prefetch=1000)
    for number in range(30):
        system.publish(weights(number), update_id=f"server/i/{number}")
        system.step()
    assert 0 < system.aggregator.state.kept.changed_bytes < 1000
    assert system.store.ledger == []


def test_records_are_committed_once_and_come_back():
    system = trusting(store=Commits())
    system.publish(weights(1), update_id="server/i/0")
    system.drain()
    system.aggregator.finish()
    assert [size > 0 for size in system.store.record_bytes] == [True]
    system.publish(weights(1), update_id="a/i/0")
    system.drain()
    system.aggregator.finish()
    assert [size > 0 for size in system.store.record_bytes] == [True, False]
    assert system.restart().state.kept.names == {"trusted"}
    assert system.aggregator.state.kept.get("trusted") == system.store.kept("trusted") != b""


@pytest.mark.parametrize("faults", [["before"], ["after"], ["before", "after", "before"]])
def test_records_of_a_commit_without_an_answer_are_written_again(faults):
    store = FaultyStore()
    system = trusting(store=store, commit_age_max_s=1)
    store.faults = list(faults)
    system.publish(weights(1), update_id="server/i/0")
    system.drain()
    for _ in range(6):
        system.clock.time_s += 2
        system.drain()
    assert not store.faults
    assert system.aggregator.state.kept.changes == {}
    assert len(store.inner.ledger) == 1
    assert store.inner.kept("trusted") is not None


def test_records_of_a_commit_that_lost_go_with_it():
    system = trusting()
    rival = loop.Aggregator(
        system.settings, system.broker.source("other"), system.store, system.clock, system.metrics, poll_s=0.0
    )
    system.publish(weights(1), update_id="server/i/0")
    system.drain()
    small = small_part(rival.state, "fedbuff", "fedbuff", ())
    system.store.commit(Commit(0, "rival", 0, None, {}, small, {}, 0, "[]", {}, {}, [], 0.0))
    system.aggregator.finish()
    assert system.store.kept("trusted") is None
    assert (system.aggregator.state.kept.names, system.aggregator.state.facts) == (set(), {})
    system.drain()
    assert system.aggregator.state.kept.names == {"trusted"}


def test_another_rule_removes_the_records_from_the_store():
    system = trusting()
    system.publish(weights(1), update_id="server/i/0")
    system.drain()
    system.aggregator.finish()
    system.restart(rule="fadas")
    system.publish(weights(1), update_id="a/i/0")
    system.drain()
    assert len(system.broker.dead) == 1  # nothing to compare with any more
    system.aggregator.finish()
    assert system.store.kept("trusted") is None
