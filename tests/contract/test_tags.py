"""What every adapter guarantees of tags: a version that has one is there, whoever drops versions at that moment."""

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from shared.errors import VersionConflict, VersionGone
from shared.store.ports import StoredVersion, TagChange
from tests.contract.stores import InRedis, Store, commit_of, image


def filled(store: Store, versions: int = 4) -> None:
    """Make a job with versions 0, 1, 2, ..."""
    client = store.open()
    client.create(image(0), 500.0)
    for version in range(1, versions + 1):
        client.commit(commit_of(version - 1, version, image(version)))


def numbers(store: Store) -> list[int]:
    """Return which versions are stored."""
    return [entry.version for entry in store.operator().versions()]


def test_versions_are_listed_with_their_time_and_tags(store: Store) -> None:
    filled(store, 2)
    operator = store.operator()
    for name, version in (("production", 1), ("canary", 2), ("best", 1)):
        assert operator.tag(name, version, 7.0) is None
    assert operator.versions() == store.open().versions() == [
        StoredVersion(0, 500.0), StoredVersion(1, 1000.0, ("best", "production")),
        StoredVersion(2, 1001.0, ("canary",)),
    ]  # fmt: skip


def test_a_job_that_does_not_exist_has_no_versions_and_takes_no_tags(store: Store) -> None:
    operator = store.operator()
    assert (operator.versions(), operator.tagged("production"), operator.tag_changes()) == ([], None, [])
    with pytest.raises(VersionGone, match="version 0 is not stored"):
        operator.tag("production", 0, 7.0)
    assert (operator.tagged("production"), operator.untag("production", 7.0)) == (None, None)


def test_a_tag_is_moved_and_its_history_kept(store: Store) -> None:
    filled(store)
    operator = store.operator()
    assert operator.tag("production", 1, 10.0) is None
    assert operator.tag("production", 3, 11.5) == 1
    assert operator.tag("production", 3, 12.0) == 3, "a command repeated"
    assert operator.untag("production", 13.0) == 3
    assert operator.untag("production", 14.0) is None
    assert operator.tagged("production") is None
    assert operator.tag("production", 2, 15.0) is None
    assert store.operator().tagged("production") == 2
    assert operator.tag_changes() == [
        TagChange(10.0, "production", 1, None), TagChange(11.5, "production", 3, 1),
        TagChange(13.0, "production", None, 3), TagChange(15.0, "production", 2, None),
    ]  # fmt: skip


def test_a_tag_moves_only_while_the_other_one_still_names_the_version(store: Store) -> None:
    filled(store)
    operator = store.operator()
    operator.tag("canary", 3, 1.0)
    assert operator.tag("production", 3, 2.0, source="canary") is None
    operator.tag("canary", 4, 3.0)
    before = store.snapshot()
    with pytest.raises(VersionConflict, match="'canary' names version 4 by now, not 3"):
        operator.tag("production", 3, 4.0, source="canary")
    with pytest.raises(VersionConflict, match=r"names version [Nn]one by now"):
        operator.tag("production", 3, 4.0, source="nobody")
    assert store.snapshot() == before


def test_a_commit_does_not_drop_what_has_a_tag_at_that_moment(store: Store, small_chunks: int) -> None:
    filled(store)
    operator = store.operator()
    commit = commit_of(4, 5, image(5), dropped_versions=[0, 1, 2])  # decided before the tag was set
    operator.tag("production", 1, 7.0)
    store.open().commit(commit)
    assert numbers(store) == [1, 3, 4, 5]
    assert np.all(store.open().model(1).weights == 1)
    assert not store.forgets(1) or not isinstance(store, InRedis)
    with pytest.raises(VersionGone):
        operator.tag("canary", 2, 8.0)
    assert operator.tagged("canary") is None
    operator.tag("canary", 1, 9.0)
    operator.untag("production", 10.0)
    store.open().commit(commit_of(5, 6, image(6), dropped_versions=[1, 3]))
    assert numbers(store) == [1, 4, 5, 6], "it still has the other tag"
    operator.untag("canary", 11.0)
    store.open().commit(commit_of(6, 7, image(7), dropped_versions=[1]))
    assert numbers(store) == [4, 5, 6, 7]
    with pytest.raises(VersionGone):
        store.open().model(1)


def test_a_commit_repeated_after_a_tag_leaves_it(store: Store) -> None:
    filled(store)
    commit = commit_of(4, 5, image(5), dropped_versions=[0])
    store.open().commit(commit)
    store.operator().tag("production", 1, 7.0)
    before = store.snapshot()
    store.open().commit(commit)
    assert store.snapshot() == before


def test_an_operator_drops_neither_the_newest_nor_what_has_a_tag(store: Store, small_chunks: int) -> None:
    filled(store)
    operator = store.operator()
    operator.tag("production", 2, 7.0)
    assert operator.drop([]) == []
    assert operator.drop([0, 1, 2, 4, 9]) == [0, 1, 9]
    assert numbers(store) == [2, 3, 4]
    assert store.forgets(1)
    assert operator.drop([0, 1]) == [0, 1], "a command repeated says the same"
    assert np.all(store.open().model(2).weights == 2) and np.all(store.open().model(4).weights == 4)
    stored = store.open().load()
    assert stored is not None and stored.head.version == 4
    if isinstance(store, InRedis):
        assert store.keys("model:0:*") == store.keys("model:1:*") == []


@pytest.mark.parametrize("by", ["commit", "operator"])
def test_of_a_tag_and_a_drop_that_meet_one_comes_first(store: Store, by: str) -> None:
    filled(store, 40)
    barrier, tagged = threading.Barrier(2), set[int]()

    def tag() -> None:
        operator = store.operator()
        for version in range(39):
            barrier.wait()
            try:
                operator.tag(f"t{version}", version, 7.0)
                tagged.add(version)
            except VersionGone:
                assert operator.tagged(f"t{version}") is None

    def drop() -> None:
        client, operator = store.open(), store.operator()
        for version in range(39):
            barrier.wait()
            if by == "commit":
                client.commit(commit_of(40 + version, 40, None, dropped_versions=[version], token=f"t{version}"))
            else:
                operator.drop([version])

    with ThreadPoolExecutor(2) as pool:
        for done in (pool.submit(tag), pool.submit(drop)):
            done.result(60)
    assert set(numbers(store)) == tagged | {39, 40}
    for version in tagged:
        assert np.all(store.open().model(version).weights == version)


def test_the_keys_of_tags_are_those_of_the_contract(in_redis: InRedis) -> None:
    filled(in_redis)
    operator, plain, key = in_redis.operator(), in_redis.plain, in_redis.key
    operator.tag("production", 1, 10.5)
    operator.tag("production", 3, 11.0)
    assert in_redis.keys("tag*") == ["tag:production", "tagged", "tags"]
    assert plain.get(key("tag:production")) == b"3"
    assert plain.zrange(key("tagged"), 0, -1, withscores=True) == [(b"production", 3.0)]
    assert [entry for _, entry in plain.xrange(key("tags"))] == [
        {b"time": b"10.5", b"tag": b"production", b"version": b"1", b"previous": b""},
        {b"time": b"11.0", b"tag": b"production", b"version": b"3", b"previous": b"1"},
    ]
    operator.untag("production", 12.0)
    assert in_redis.keys("tag*") == ["tags"]


def test_the_ledger_is_read_backwards_from_a_revision(in_redis: InRedis, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shared.store.redis_versions.PAGE", 3)
    filled(in_redis, 10)
    assert [entry["revision"] for entry in in_redis.operator().ledger_before(8)] == [8, 7, 6, 5, 4, 3, 2, 1]
