"""Which versions stay: the newest, the young, the tagged, what the rule needs, the first of every so many."""

import msgpack
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aggregator.retention import droppable
from ops.models.prune import needed_by
from shared.published import carry_out, plan
from shared.store.inprocess import InProcessStore
from shared.store.ports import Head, StoredVersion
from tests.builders import FaultyStore, System, weights


def stored(*versions, tags=None, age_s=10.0, now=1000.0):
    """Return versions made `age_s` apart, the newest just now."""
    ages = [age_s * (len(versions) - 1 - place) for place in range(len(versions))]
    return [
        StoredVersion(v, now - age, (tags or {}).get(v, ())) for v, age in zip(versions, ages, strict=True)
    ]  # fmt: skip


def dropped(entries, kept=2, age_max_s=0.0, every=0, needed=()):
    return droppable(entries, kept, age_max_s, every, set(needed).__contains__, 1000.0)


def test_by_count_alone_the_oldest_go():
    assert dropped(stored(0, 3, 4, 7, 9)) == [0, 3, 4]
    assert dropped(stored(0, 3), kept=0) == [0, 3]
    assert dropped(stored(0, 3), kept=5) == dropped([]) == []


def test_one_beyond_the_count_goes_only_when_it_is_old_as_well():
    entries = stored(0, 3, 4, 7, 9)  # 40, 30, 20, 10 and 0 s old
    assert dropped(entries, kept=2, age_max_s=25) == [0, 3]
    assert dropped(entries, kept=2, age_max_s=30) == [0], "not at that age, beyond it"
    assert dropped(entries, kept=4, age_max_s=5) == [0], "the count protects the old too"


def test_the_tagged_and_the_needed_stay():
    assert dropped(stored(0, 3, 4, 7, 9, tags={3: ("production",)}), needed=[0]) == [4]


def test_of_every_so_many_the_first_that_was_committed_stays():
    assert dropped(stored(0, 3, 9, 11, 14, 20, 25, 31, 32), every=10) == [3, 9, 14, 25]
    assert dropped(stored(2, 3, 9, 11), every=10, kept=0) == [3, 9], "version 0 may be gone"


@given(
    st.lists(st.integers(0, 60), unique=True, max_size=20).map(sorted), st.integers(0, 5), st.integers(0, 12),
    st.sets(st.integers(0, 60)), st.floats(0, 300),
)  # fmt: skip
def test_what_goes_may_go_and_nothing_else_stays(versions, kept, every, tagged, age_max_s):
    entries = stored(*versions, tags=dict.fromkeys(tagged, ("t",)))
    gone = dropped(entries, kept, age_max_s, every)
    newest = set(versions[max(0, len(versions) - kept) :])
    firsts = {min(v for v in versions if v // every == w // every) for w in versions} if every else set()
    for entry in entries:
        stays = entry.version in newest | tagged | firsts or 0 < age_max_s >= 1000.0 - entry.created_at
        assert (entry.version in gone) == (not stays), entry


# --- the aggregator


def made(system, count):
    for seed in range(count):
        system.publish(weights(seed))
        system.drain()


def versions_of(system):
    return [entry.version for entry in system.store.versions()]


def test_the_aggregator_leaves_tagged_versions_until_they_are_not():
    system = System(buffer_size=1, versions_kept=3)
    made(system, 4)
    assert versions_of(system) == [2, 3, 4]
    system.store.tag("production", 3, 0.0)
    made(system, 4)
    assert versions_of(system) == [3, 6, 7, 8]
    system.restart()
    system.store.untag("production", 0.0)
    made(system, 1)
    assert versions_of(system) == [7, 8, 9]


def test_a_tag_set_between_decision_and_commit_is_kept_and_its_version_goes_later():
    store = FaultyStore()
    system = System(store=store, buffer_size=1, versions_kept=2)
    made(system, 3)
    inner, commit = store.inner, store.inner.commit

    def late(one):
        inner.commit = commit
        inner.tag("canary", one.dropped_versions[0], 0.0)
        commit(one)

    inner.commit = late
    made(system, 1)
    assert versions_of(system) == [2, 3, 4]
    inner.untag("canary", 0.0)
    made(system, 1)
    assert versions_of(system) == [4, 5]


def test_the_aggregator_keeps_what_is_young():
    system = System(buffer_size=1, versions_kept=2, versions_age_max_s=25.0)
    for seed in range(8):
        system.clock.time_s += 10
        system.publish(weights(seed))
        system.drain()
    assert versions_of(system) == [6, 7, 8], "6 is beyond the newest two and 20 s old, 5 is 30 s old"


def test_the_aggregator_keeps_a_curve():
    system = System(buffer_size=1, versions_kept=2, versions_every=4)
    made(system, 10)
    assert versions_of(system) == [0, 4, 8, 9, 10]


@pytest.mark.parametrize("fault", ["before", "after"])
def test_a_store_that_does_not_answer_costs_no_version(fault):
    store = FaultyStore()
    system = System(store=store, buffer_size=1, versions_kept=2)
    made(system, 3)
    store.failing = ("versions",)
    system.publish(weights(9))
    system.step()
    assert (system.store.head().version, system.unacked) == (3, 1), "nothing is committed, and nothing acked"
    store.failing, store.faults = (), [fault]
    system.drain()
    system.clock.time_s += 60
    system.drain()
    assert (system.store.head().version, versions_of(system), system.unacked) == (4, [3, 4], 0)


def test_fedasync_goes_on_while_an_operator_prunes():
    system = System(rule="fedasync", versions_kept=50, staleness_max=3)
    bases = []
    for seed in range(30):
        head = system.store.head()
        needed = needed_by(system.settings.job, system.store.job(), head)
        chosen = droppable([e for e in system.store.versions() if e.version < head.version], 0, 0.0, 0, needed, 0.0)
        assert system.store.drop(chosen) == chosen
        bases.append(max(0, head.version - seed % 4))
        system.publish(weights(seed), base_version=bases[-1])
        system.drain()
    assert {outcome for _, outcome in system.outcomes()} == {"applied"}
    assert len(versions_of(system)) == 5, "the newest, and the three before it; one was made since"


def test_what_workers_pull_does_not_hang_on_versions():
    """With a compressed downlink they pull snapshots and deltas, which an operator does not prune."""
    system = System(weights(9, 500), codec="float32", downlink="int8", buffer_size=1, versions_kept=50)
    for seed in range(1, 8):
        system.publish(weights(seed, 500))
        system.drain()
        head = system.store.head()
        held = carry_out(plan(system.store.published(-1), head.version, -1), system.store, None)
        assert held.sha256 == head.published
        assert system.store.drop(range(head.version + 1)) == list(range(head.version))
        system.publish(weights(100 + seed, 500))
        system.drain()
        head = system.store.head()
        assert (
            carry_out(plan(system.store.published(-1), head.version, -1), system.store, None).sha256 == head.published
        )
        way = plan(system.store.published(-1), head.version, head.version - 1)
        assert way.snapshot is not None or carry_out(way, system.store, held).sha256 == head.published
    system.restart()
    made(system, 0)
    assert system.store.head().version == 14


@pytest.mark.parametrize(
    ("announced", "expected"),
    [
        ({}, []),
        ({"rule": "fedbuff", "staleness_max": 100, "buffer_size": 3}, []),
        ({"rule": "fedasync", "staleness_max": 2, "alpha": 0.6}, [8, 9]),
        ({"rule": "area", "staleness_max": 2, "buffer_size": 2, "clients": 4}, [0]),
    ],
    ids=["never run", "fedbuff", "fedasync", "area"],
)
def test_what_a_rule_needs_is_not_pruned(announced, expected):
    head = Head(12, 10, "", "", 3, 1, 0.0)
    needed = needed_by("job", announced, head)
    assert [version for version in range(10) if needed(version)] == expected


def test_weights_of_a_dropped_version_are_gone_and_others_as_they_were():
    system = System(np.zeros(5, np.float32), buffer_size=1, versions_kept=50)
    for value in range(1, 4):
        system.publish(np.full(5, 1.0, np.float32))
        system.drain()
        assert np.all(system.weights == value)
    assert system.store.drop([0, 2, 3]) == [0, 2]
    assert np.all(system.store.model(1).weights == 1) and np.all(system.weights == 3)


def test_a_checkpoint_of_the_store_has_times_and_tags():
    system = System(buffer_size=1, versions_kept=50)
    made(system, 3)
    system.store.tag("production", 2, 7.0)
    other = InProcessStore()
    other.restore(system.store.layout(), msgpack.unpackb(msgpack.packb(system.store.dump()), strict_map_key=False))
    assert other.versions() == system.store.versions()
    assert other.tag_changes() == system.store.tag_changes()
    assert other.drop([1, 2]) == [1]
