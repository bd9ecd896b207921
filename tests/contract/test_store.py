"""What every adapter of `ModelStore` and `StateStore` guarantees."""

import hashlib
import json
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import safetensors.numpy

from ops.servers import PrivateServers
from shared.errors import FedMQError, SettingsError, StoreUnavailable, VersionConflict, VersionGone
from shared.store.ports import OUTCOMES_MAX, Stored
from tests.contract.faults import wait_until
from tests.contract.stores import LAYOUT, NUM_PARAMS, InRedis, Store, array, commit_of, image, state_of


def loaded(store: Store) -> Stored:
    """Return what a fresh client loads."""
    stored = store.open().load()
    assert stored is not None
    return stored


# A job begins


def test_a_job_that_does_not_exist_has_nothing(store: Store) -> None:
    client = store.open()
    assert client.head() is None
    assert client.load() is None
    assert client.job() == {}
    with pytest.raises(VersionGone):
        client.layout()
    with pytest.raises(VersionGone):
        client.model(0)
    with pytest.raises(VersionConflict):
        client.commit(commit_of(0, 1, image(1)))
    assert client.head() is None


def test_create_stores_version_0_once(store: Store) -> None:
    client = store.open()
    assert client.create(image(0.5), 123.25) is True
    before = store.snapshot()
    assert client.create(image(0.75), 200.0) is False
    assert store.open().create(image(0.5), 200.0) is False
    assert store.snapshot() == before
    head = store.open().head()
    assert head is not None
    assert (head.revision, head.version, head.layout) == (0, 0, LAYOUT.hash)
    assert (head.num_params, head.sha256, head.created_at) == (NUM_PARAMS, image(0.5).sha256, 123.25)
    stored = loaded(store)
    assert (stored.arrays, stored.state, stored.applied, stored.versions) == ({}, b"", {}, [0])
    assert stored.head == head


@pytest.mark.parametrize("attempt", range(5))
def test_of_many_that_create_at_once_one_wins(store: Store, attempt: int) -> None:
    clients, barrier = [store.open() for _ in range(4)], threading.Barrier(4)

    def create(index: int) -> bool:
        barrier.wait()
        return clients[index].create(image(index + attempt), float(index))

    with ThreadPoolExecutor(4) as pool:
        wins = list(pool.map(create, range(4)))
    assert sum(wins) == 1
    winner = wins.index(True)
    assert np.all(store.open().model(0).weights == winner + attempt)
    head = store.open().head()
    assert head is not None
    assert (head.created_at, head.sha256) == (float(winner), image(winner + attempt).sha256)


def test_layout_and_model_come_back_as_they_were(store: Store) -> None:
    model = image(0)
    model.weights[:] = np.random.default_rng(0).standard_normal(NUM_PARAMS, np.float32)
    store.open().create(model, 1.0)
    client = store.open()
    assert client.layout() == model.layout
    read = client.model(0)
    assert read.data.tobytes() == model.data.tobytes()
    assert read.sha256 == model.sha256
    assert read.tensors()["num_batches_tracked"] == 12
    assert read.tensors()["mask"].tolist() == [True, False, True]
    assert np.array_equal(read.weights, model.weights)


def test_models_of_many_chunks_come_back_as_they_were(store: Store, small_chunks: int) -> None:
    model = image(0)
    model.weights[:] = np.random.default_rng(1).standard_normal(NUM_PARAMS, np.float32)
    running = np.random.default_rng(2).standard_normal(NUM_PARAMS).astype(np.float32)
    assert model.data.size > 10 * small_chunks
    store.open().create(image(0), 1.0)
    store.open().commit(commit_of(0, 1, model, arrays={"sum": running}))
    assert store.open().model(1).data.tobytes() == model.data.tobytes()
    assert np.array_equal(loaded(store).arrays["sum"], running)


def test_what_a_worker_needs_comes_back_as_it_was_announced(store: Store) -> None:
    announced = {"codec": "int8 | zstd", "update_bytes_max": 16 * 2**20, "lr": 0.5, "tags": ["a", "ü"], "none": None}
    store.open().announce(announced)
    assert store.open().job() == announced
    store.open().announce(announced | {"codec": "float32"})
    assert store.open().job()["codec"] == "float32"


# Commits


def test_a_commit_moves_the_revision_by_one(store: Store) -> None:
    client = store.open()
    client.create(image(0), 1.0)
    client.commit(commit_of(0, 1, image(1), now=7.5))
    head = store.open().head()
    assert head is not None
    assert (head.revision, head.version, head.sha256, head.created_at) == (1, 1, image(1).sha256, 7.5)
    assert (head.layout, head.num_params) == (LAYOUT.hash, NUM_PARAMS)
    client.commit(commit_of(1, 5, image(5)))
    head = store.open().head()
    assert head is not None
    assert (head.revision, head.version) == (2, 5)
    assert loaded(store).versions == [0, 1, 5]
    for version in (0, 1, 5):
        assert np.all(store.open().model(version).weights == version)


def test_a_commit_without_a_model_leaves_the_version_as_it_is(store: Store) -> None:
    client = store.open()
    client.create(image(0), 1.0)
    client.commit(commit_of(0, 1, image(1)))
    before, model = client.head(), client.model(1).data.tobytes()
    client.commit(commit_of(1, 1, None, arrays={"sum": array(3)}, applied={"a/i/1": 1}))
    after = client.head()
    assert before is not None
    assert after is not None
    assert (before.revision, after.revision) == (1, 2)
    for name in ("version", "sha256", "created_at", "chunks", "layout", "num_params"):
        assert getattr(after, name) == getattr(before, name)
    assert client.model(1).data.tobytes() == model
    assert np.all(loaded(store).arrays["sum"] == 3)


def test_all_parts_of_the_state_come_back_as_they_were(store: Store) -> None:
    rng = np.random.default_rng(0)
    client = store.open()
    client.create(image(0), 1.0)
    arrays = {name: rng.standard_normal(NUM_PARAMS, np.float32) for name in ("sum", "first_moment")}
    state = state_of("sum", "first_moment", noise=bytes(range(256)), text="ü", number=-1.5e300)
    applied = {"a/i/1": 0, "b/0_-Z/999999999999999999": 2**53 - 1}
    client.commit(commit_of(0, 0, None, arrays=arrays, state=state, applied=applied))
    stored = loaded(store)
    assert stored.state == state
    assert stored.applied == applied
    assert set(stored.arrays) == set(arrays)
    for name, values in arrays.items():
        assert stored.arrays[name].dtype == np.float32
        assert np.array_equal(stored.arrays[name], values)


def test_arrays_are_those_of_the_last_commit_alone(store: Store) -> None:
    client = store.open()
    client.create(image(0), 1.0)
    client.commit(commit_of(0, 0, None, arrays={"sum": array(1), "moment": array(2)}))
    client.commit(commit_of(1, 0, None, arrays={"moment": array(3)}))
    stored = loaded(store)
    assert list(stored.arrays) == ["moment"]
    assert np.all(stored.arrays["moment"] == 3)
    client.commit(commit_of(2, 1, image(1)))
    assert loaded(store).arrays == {}


def test_arrays_may_stay_as_they_are_stored(store: Store) -> None:
    client = store.open()
    client.create(image(0), 1.0)
    client.commit(commit_of(0, 0, None, arrays={"sum": array(1), "moment": array(2)}))
    same = {"state": state_of("moment", "sum"), "arrays_unchanged": ["moment"]}
    client.commit(commit_of(1, 0, None, arrays={"sum": array(3)}, **same))
    stored = loaded(store)
    assert sorted(stored.arrays) == ["moment", "sum"]
    assert np.all(stored.arrays["sum"] == 3)
    assert np.all(stored.arrays["moment"] == 2)
    client.commit(commit_of(2, 0, None, state=state_of("moment"), arrays_unchanged=["moment"]))
    stored = loaded(store)
    assert list(stored.arrays) == ["moment"]
    assert np.all(stored.arrays["moment"] == 2)


def test_refused_ids_are_remembered_with_the_first_word_and_the_newest_stay(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("inprocess", "redis_commit"):
        monkeypatch.setattr(f"shared.store.{module}.REFUSED_IDS_MAX", 50)
    client = store.open()
    client.create(image(0), 1.0)
    client.commit(commit_of(0, 0, None, refused={"a/i/1": "stale", "b/0_-Z/2": "too_large"}))
    client.commit(commit_of(1, 0, None, refused={"a/i/3": "surplus"}))
    assert loaded(store).refused == {"a/i/1": "stale", "b/0_-Z/2": "too_large", "a/i/3": "surplus"}
    for revision in range(2, 12):
        client.commit(commit_of(revision, 0, None, refused={f"c/i/{revision}-{n}": "stale" for n in range(7)}))
    kept = loaded(store).refused
    assert len(kept) == 50
    assert {f"c/i/{revision}-{n}" for revision in range(5, 12) for n in range(7)} <= set(kept)


def test_beyond_so_many_clients_those_unheard_of_are_forgotten(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("ports", "redis", "inprocess"):
        monkeypatch.setattr(f"shared.store.{module}.CLIENTS_MAX", 40)
    client = store.open()
    client.create(image(0), 1.0)
    for revision in range(10):
        seen = {f"c{revision}-{n}": json.dumps({"seen": 100 * revision + n}) for n in range(9)}
        told = {name: [(f"{name}/i/0", "applied")] for name in seen}
        faithful = {"faithful": json.dumps({"seen": 100 * revision})}
        client.commit(commit_of(revision, 0, None, clients=seen | faithful, outcomes=told))
    known = store.clients()
    assert 36 <= len(known) <= 40
    assert client.outcomes("c9-0", 0)[0] == [("c9-0/i/0", "applied")]
    assert client.outcomes("c0-0", 0)[0] == []
    assert "faithful" in known
    assert {f"c9-{n}" for n in range(9)} <= set(known)
    assert not any(name.startswith("c0") for name in known)


def test_thousands_of_ids_fit_a_commit(store: Store) -> None:
    client = store.open()
    client.create(image(0), 1.0)
    applied = {f"client-{index}/incarnation/{index}": index % 7 for index in range(20_000)}
    clients = {f"client-{index}": json.dumps({"seen": index}) for index in range(5_000)}
    client.commit(commit_of(0, 0, None, applied=applied, clients=clients))
    assert loaded(store).applied == applied
    assert store.clients() == {name: json.loads(text) for name, text in clients.items()}


def test_ids_below_the_floor_are_forgotten(store: Store) -> None:
    client = store.open()
    client.create(image(0), 1.0)
    client.commit(commit_of(0, 0, None, applied={"a/i/0": 0, "a/i/1": 1, "a/i/2": 2}))
    client.commit(commit_of(1, 0, None, applied={"a/i/3": 1, "a/i/4": 5}, applied_floor=2))
    assert loaded(store).applied == {"a/i/2": 2, "a/i/4": 5}
    client.commit(commit_of(2, 0, None, applied_floor=6))
    assert loaded(store).applied == {}


def test_ledger_clients_and_facts_are_kept(store: Store) -> None:
    client = store.open()
    client.create(image(0), 1.0)
    entries = [{"id": "a/i/1", "outcome": "applied", "staleness": 0, "weight": 0.5}, {"id": "ü"}]
    client.commit(
        commit_of(0, 1, image(1), ledger=json.dumps(entries), clients={"a": '{"seen": 1}'}, meta={"updates": "2"})
    )
    client.commit(commit_of(1, 1, None, ledger="[]", clients={"a": '{"seen": 2}', "b": '{"seen": 3}'}))
    assert store.ledger() == [
        {"revision": 1, "version": 1, "updates": entries},
        {"revision": 2, "version": 1, "updates": []},
    ]
    assert store.clients() == {"a": {"seen": 2}, "b": {"seen": 3}}
    assert store.meta(1)["updates"] == "2"


# Outcomes


def test_a_client_reads_its_own_outcomes_in_order_and_each_once(store: Store) -> None:
    client = store.open()
    client.create(image(0), 1.0)
    assert store.open().outcomes("a", 0) == ([], 0)
    client.commit(commit_of(0, 1, image(1), outcomes={"a": [("a/i/1", "applied"), ("a/i/0", "stale")]}))
    client.commit(commit_of(1, 1, None, outcomes={"b": [("b/i/7", "rejected")]}))
    client.commit(commit_of(2, 2, image(2), outcomes={"a": [("a/i/1", "duplicate")], "b": [("b/i/8", "applied")]}))
    told, cursor = store.open().outcomes("a", 0)
    assert told == [("a/i/1", "applied"), ("a/i/0", "stale"), ("a/i/1", "duplicate")]
    assert store.open().outcomes("a", cursor) == ([], cursor)
    assert store.open().outcomes("a", 1)[0] == [("a/i/1", "duplicate")]
    assert store.open().outcomes("b", 0)[0] == [("b/i/7", "rejected"), ("b/i/8", "applied")]
    assert store.open().outcomes("nobody", 5) == ([], 5)
    client.commit(commit_of(3, 2, None, outcomes={"a": [("a/i/2", "applied")]}))
    assert store.open().outcomes("a", cursor)[0] == [("a/i/2", "applied")]


def test_outcomes_are_of_commits_that_happened_and_stand_there_once(store: Store) -> None:
    client = store.open()
    client.create(image(0), 1.0)
    commit = commit_of(0, 1, image(1), outcomes={"a": [("a/i/1", "applied")]})
    client.commit(commit)
    client.commit(commit)  # its answer was lost
    with pytest.raises(VersionConflict):
        store.open().commit(commit_of(0, 1, image(1), token="rival", outcomes={"a": [("a/i/2", "applied")]}))
    assert client.outcomes("a", 0) == ([("a/i/1", "applied")], 1)


def test_the_outcomes_of_a_client_are_bounded_and_the_newest_stay(store: Store) -> None:
    client = store.open()
    client.create(image(0), 1.0)
    for revision in range(3 * OUTCOMES_MAX):
        client.commit(commit_of(revision, 0, None, outcomes={"a": [(f"a/i/{revision}", "applied")]}))
    told, cursor = client.outcomes("a", 0)
    assert OUTCOMES_MAX <= len(told) < 2 * OUTCOMES_MAX
    assert told[-1] == (f"a/i/{3 * OUTCOMES_MAX - 1}", "applied")
    assert cursor == 3 * OUTCOMES_MAX


# Compare and set


@pytest.mark.parametrize(("revision", "token"), [(0, "late"), (2, "early"), (0, "token-0-1")])
def test_a_commit_from_another_revision_changes_nothing(store: Store, revision: int, token: str) -> None:
    client = store.open()
    client.create(image(0), 1.0)
    client.commit(commit_of(0, 1, image(1), arrays={"sum": array(1)}, applied={"a/i/1": 0}, token="token-0-1"))
    if token == "token-0-1":  # repeated after somebody else went on from it
        client.commit(commit_of(1, 2, image(2), arrays={"sum": array(2)}, token="token-1-2"))
    before = store.snapshot()
    late = commit_of(
        revision, 9, image(9), token=token, arrays={"sum": array(9), "moment": array(9)},
        applied={"b/i/1": 9}, applied_floor=5, ledger='[{"id": "b/i/1"}]', clients={"b": "{}"}, meta={"updates": "9"},
        dropped_versions=[0, 1], now=99.0,
    )  # fmt: skip
    for _ in range(2):
        with pytest.raises(VersionConflict, match=f"expected revision {revision}"):
            store.open().commit(late)
        assert store.snapshot() == before


def test_of_many_that_commit_at_once_one_wins(store: Store) -> None:
    store.open().create(image(0), 1.0)
    clients, barrier = [store.open() for _ in range(4)], threading.Barrier(4)

    def commit(revision: int, index: int) -> bool:
        value = 10 * (revision + 1) + index
        barrier.wait()
        try:
            commit = commit_of(
                revision, revision + 1, image(value), token=f"{revision} {index}", arrays={"sum": array(value)},
                applied={f"c{index}/i/{revision}": 0}, ledger=json.dumps([{"id": index}]),
            )  # fmt: skip
            clients[index].commit(commit)
        except VersionConflict:
            return False
        return True

    winners: list[int] = []
    with ThreadPoolExecutor(4) as pool:
        for revision in range(8):
            wins = list(pool.map(commit, [revision] * 4, range(4)))
            assert sum(wins) == 1
            winners.append(wins.index(True))
            stored, value = loaded(store), 10 * (revision + 1) + winners[-1]
            assert (stored.head.revision, stored.head.version) == (revision + 1, revision + 1)
            assert np.all(stored.model.weights == value)
            assert np.all(stored.arrays["sum"] == value)
    assert set(loaded(store).applied) == {f"c{index}/i/{revision}" for revision, index in enumerate(winners)}
    assert [entry["updates"][0]["id"] for entry in store.ledger()] == winners


def test_a_repeated_commit_succeeds_and_applies_once(store: Store) -> None:
    client = store.open()
    client.create(image(0), 1.0)
    commit = commit_of(
        0, 1, image(1), arrays={"sum": array(1)}, applied={"a/i/1": 0}, ledger='[{"id": "a/i/1"}]', clients={"a": "{}"}
    )
    client.commit(commit)
    before = store.snapshot()
    client.commit(commit)
    store.open().commit(commit)
    assert store.snapshot() == before
    assert len(store.ledger()) == 1
    head = client.head()
    assert head is not None
    assert head.revision == 1
    client.commit(commit_of(1, 2, image(2)))
    assert np.all(loaded(store).model.weights == 2)


# Versions


def test_a_dropped_version_disappears_and_the_others_stay(store: Store, small_chunks: int) -> None:
    client = store.open()
    client.create(image(0), 1.0)
    for version in range(1, 5):
        dropped = [version - 2] if version >= 3 else []
        client.commit(
            commit_of(version - 1, version, image(version), dropped_versions=dropped, meta={"updates": str(version)})
        )
    assert loaded(store).versions == [0, 3, 4]
    for version in (1, 2):
        with pytest.raises(VersionGone):
            store.open().model(version)
    for version in (0, 3, 4):
        assert np.all(store.open().model(version).weights == version)
    assert [store.forgets(version) for version in range(1, 5)] == [True, True, False, False]
    assert store.meta(3)["updates"] == "3"
    if isinstance(store, InRedis):
        assert store.keys("model:1:*") == store.keys("model:2:*") == []


def test_a_version_that_never_was_is_gone(store: Store) -> None:
    store.open().create(image(0), 1.0)
    for version in (1, -1, 2**60):
        with pytest.raises(VersionGone):
            store.open().model(version)


def test_a_version_never_changes(store: Store) -> None:
    client, model, running = store.open(), image(1), array(1)
    client.create(image(0), 1.0)
    client.commit(commit_of(0, 1, model, arrays={"sum": running}))
    read = client.model(1)
    stored = loaded(store)
    before = read.data.tobytes()
    for weights in (model.weights, running, read.weights, stored.model.weights, stored.arrays["sum"]):
        weights[:] = 9  # the aggregator goes on in place, and so may whoever pulled it
    assert client.model(1).data.tobytes() == before
    assert np.all(loaded(store).arrays["sum"] == 1)
    client.commit(commit_of(1, 2, image(2), arrays={"sum": array(2)}))
    client.commit(commit_of(2, 2, None))
    assert client.model(1).data.tobytes() == before


def test_an_evaluation_is_added_to_what_is_known_of_a_version(store: Store) -> None:
    client = store.open()
    client.create(image(0), 1.0)
    client.commit(commit_of(0, 1, image(1), meta={"updates": "3", "staleness_mean": "0.5"}))
    before = client.head()
    store.open().record_evaluation(1, {"accuracy": 0.1 + 0.2, "loss": 1e-30})
    store.open().record_evaluation(1, {"loss": 2})
    meta = store.meta(1)
    assert float(meta["evaluation:accuracy"]) == 0.1 + 0.2
    assert float(meta["evaluation:loss"]) == 2.0
    assert (meta["updates"], meta["staleness_mean"]) == ("3", "0.5")
    assert client.head() == before
    assert np.all(client.model(1).weights == 1)


def test_an_evaluation_that_comes_too_late_brings_nothing_back(store: Store) -> None:
    client = store.open()
    client.create(image(0), 1.0)
    client.commit(commit_of(0, 1, image(1)))
    client.commit(commit_of(1, 2, image(2), dropped_versions=[1]))
    client.record_evaluation(1, {"accuracy": 0.5})
    client.record_evaluation(7, {"accuracy": 0.5})
    for version in (1, 7):
        assert store.forgets(version)
        with pytest.raises(VersionGone):
            client.model(version)
    assert loaded(store).versions == [0, 2]


def test_readers_never_see_a_mix(store: Store, small_chunks: int) -> None:
    """Of 200 versions, each with weights of its number; every third is followed by a commit without one."""
    store.open().create(image(0), 1.0)
    writing, failures = threading.Event(), []
    reads = {"model": 0, "load": 0}

    def write() -> None:
        client, revision = store.open(), 0
        for version in range(1, 201):
            for model in (image(version), None) if version % 3 == 0 else (image(version),):
                client.commit(
                    commit_of(
                        revision, version, model, arrays={"sum": array(revision + 1)},
                        state=state_of("sum", revision=revision + 1), token=f"{revision}",
                        applied={f"a/i/{revision + 1}": revision + 1}, applied_floor=revision + 1,
                        dropped_versions=[version - 2] if model and version >= 2 else [],
                    )
                )  # fmt: skip
                revision += 1
            if version % 20 == 0:  # however fast commits are, everybody gets to read
                seen = dict(reads)
                wait_until(lambda: failures or all(reads[kind] > seen[kind] for kind in reads))  # noqa: B023

    def read_models() -> None:
        client = store.open()
        while not writing.is_set():
            head = client.head()
            assert head is not None
            try:
                model = client.model(head.version)
            except VersionGone:
                continue
            assert np.all(model.weights == head.version), f"version {head.version}: {np.unique(model.weights)}"
            assert model.sha256 == head.sha256
            reads["model"] += 1

    def read_states() -> None:
        client, latest = store.open(), 0
        while not writing.is_set():
            stored = client.load()
            assert stored is not None
            revision = stored.head.revision
            assert revision >= latest
            latest = revision
            assert np.all(stored.model.weights == stored.head.version)
            assert stored.versions[-1] == stored.head.version
            if revision > 0:
                assert np.all(stored.arrays["sum"] == revision), f"{revision}: {np.unique(stored.arrays['sum'])}"
                assert stored.state == state_of("sum", revision=revision)
                assert stored.applied == {f"a/i/{revision}": revision}
            reads["load"] += 1

    def guarded(work: object) -> None:
        try:
            work()  # type: ignore[operator]
        except BaseException as error:
            failures.append(error)

    readers = [threading.Thread(target=guarded, args=(work,)) for work in (read_models, read_models, read_states)]
    for reader in readers:
        reader.start()
    guarded(write)
    writing.set()
    for reader in readers:
        reader.join()
    assert not failures, failures
    assert loaded(store).head.version == 200
    assert loaded(store).head.revision == 266


# Records of the rule


def test_records_are_kept_as_they_were_written(store: Store) -> None:
    client = store.open()
    client.create(image(0), 1.0)
    assert client.kept("a") is None
    records = {"a": bytes(range(256)), "a:1": b"\0", "client/ü": b"x" * 100_000, "empty": b""}
    client.commit(commit_of(0, 0, None, kept=records))
    assert {name: store.open().kept(name) for name in records} == records
    assert store.open().kept("b") is None


def test_a_record_is_replaced_or_dropped_and_the_others_stay(store: Store) -> None:
    client = store.open()
    client.create(image(0), 1.0)
    client.commit(commit_of(0, 0, None, kept={"a": b"old", "b": b"stays", "c": b"goes"}))
    client.commit(commit_of(1, 1, image(1), kept={"a": b"new", "c": None, "never was": None}))
    client.commit(commit_of(2, 1, None))
    assert [store.open().kept(name) for name in ("a", "b", "c", "never was")] == [b"new", b"stays", None, None]
    client.commit(commit_of(3, 1, None, kept={"c": b"back"}))
    assert store.open().kept("c") == b"back"


def test_a_record_may_exceed_a_chunk_and_nothing_is_left_of_a_longer_one(store: Store, small_chunks: int) -> None:
    client, rng = store.open(), np.random.default_rng(0)
    client.create(image(0), 1.0)
    before = len(in_redis_kept(store))
    for revision, size in enumerate(
        [10 * small_chunks + 1, 3 * small_chunks, 3 * small_chunks - 1, 1, 0, small_chunks]
    ):
        record = rng.bytes(size)
        client.commit(commit_of(revision, 0, None, kept={"a": record}))
        assert store.open().kept("a") == record
        assert len(in_redis_kept(store)) == before + (isinstance(store, InRedis) and 1 + -(-size // small_chunks))
    client.commit(commit_of(6, 0, None, kept={"a": None}))
    assert store.open().kept("a") is None
    assert len(in_redis_kept(store)) == before


def in_redis_kept(store: Store) -> list[str]:
    """Return the keys that hold records; none in process."""
    return store.keys("kept*") if isinstance(store, InRedis) else []


def test_records_of_some_megabytes_and_many_small_ones_fit_a_commit(store: Store) -> None:
    client, rng = store.open(), np.random.default_rng(0)
    client.create(image(0), 1.0)
    records = {f"client-{index}": rng.bytes(index) for index in range(3000)} | {"large": rng.bytes(5 * 2**20)}
    client.commit(commit_of(0, 0, None, kept=records, arrays={"sum": array(1)}))
    other = store.open()
    assert {name: other.kept(name) for name in records} == records
    client.commit(commit_of(1, 0, None, kept=dict.fromkeys(records)))
    assert [name for name in records if other.kept(name) is not None] == in_redis_kept(store) == []


@pytest.mark.parametrize("rival", [{"a": b"rival's", "b": b"too"}, {"a": None}, {}])
def test_a_conflicting_commit_leaves_the_records_as_they_are(store: Store, rival: dict[str, bytes | None]) -> None:
    client = store.open()
    client.create(image(0), 1.0)
    client.commit(commit_of(0, 0, None, kept={"a": b"first"}))
    client.commit(commit_of(1, 0, None, token="winner", kept=rival))
    before = store.snapshot()
    for changes in ({"a": b"late", "c": b"late"}, {"a": None, "b": None}):
        with pytest.raises(VersionConflict):
            store.open().commit(commit_of(1, 0, None, token="loser", kept=changes))
        assert store.snapshot() == before
    assert store.open().kept("a") == rival.get("a", b"first")


def test_a_repeated_commit_leaves_its_records_as_they_are(store: Store, small_chunks: int) -> None:
    client = store.open()
    client.create(image(0), 1.0)
    client.commit(commit_of(0, 0, None, kept={"a": b"x" * 10 * small_chunks, "b": b"goes"}))
    commit = commit_of(1, 0, None, kept={"a": b"y" * 3 * small_chunks, "b": None, "c": b"comes"})
    client.commit(commit)
    before = store.snapshot()
    client.commit(commit)  # its answer was lost
    store.open().commit(commit)
    assert store.snapshot() == before
    assert [client.kept(name) for name in "abc"] == [b"y" * 3 * small_chunks, None, b"comes"]


def test_a_record_is_read_whole_while_others_are_written(store: Store, small_chunks: int) -> None:
    store.open().create(image(0), 1.0)
    store.open().commit(commit_of(0, 0, None, kept={"a": b"\0"}))
    written, failures = threading.Event(), []

    def read() -> None:
        client, reads = store.open(), 0
        while not written.is_set() or not reads:
            record = client.kept("a")
            if record is None or len(set(record)) != 1 or len(record) != 1 + (record[0] * small_chunks) % 1000:
                failures.append(record)
            reads += 1

    readers = [threading.Thread(target=read) for _ in range(2)]
    for reader in readers:
        reader.start()
    client = store.open()
    for revision in range(1, 250):
        client.commit(
            commit_of(revision, 0, None, kept={"a": bytes([revision]) * (1 + revision * small_chunks % 1000)})
        )
    written.set()
    for reader in readers:
        reader.join()
    assert not failures, failures[:1]


# What Redis holds


def test_a_record_with_a_lost_piece_is_not_taken_for_a_shorter_one(in_redis: InRedis, small_chunks: int) -> None:
    client = in_redis.open()
    client.create(image(0), 1.0)
    client.commit(commit_of(0, 0, None, kept={"a": b"x" * 10 * small_chunks}))
    in_redis.plain.delete(in_redis.key("kept:a:1:9"))
    with pytest.raises(SettingsError, match="record 'a' of revision 1 is incomplete"):
        client.kept("a")


def test_the_keys_of_records_are_those_of_the_contract(in_redis: InRedis, small_chunks: int) -> None:
    client = in_redis.open()
    client.create(image(0), 1.0)
    client.commit(commit_of(0, 0, None, kept={"a": b"first", "b": b"stays"}))
    client.commit(commit_of(1, 0, None, kept={"a": b"x" * (small_chunks + 1)}))
    plain, key = in_redis.plain, in_redis.key
    assert in_redis.keys("kept*") == ["kept", "kept:a:2:0", "kept:a:2:1", "kept:b:1:0"]
    assert plain.hgetall(key("kept")) == {b"a": b"2 2", b"b": b"1 1"}
    assert (plain.get(key("kept:a:2:1")), plain.get(key("kept:b:1:0"))) == (b"x", b"stays")
    assert all(plain.ttl(key(name)) == -1 for name in in_redis.keys("kept*"))
    assert in_redis.open().status()["state"]["arrays"] == []


def test_the_keys_are_those_of_the_contract(in_redis: InRedis, small_chunks: int) -> None:
    store = in_redis.open()
    store.create(image(0), 123.25)
    store.announce({"codec": "float32", "update_bytes_max": 1024})
    store.commit(
        commit_of(
            0, 1, image(1), arrays={"sum": array(1)}, applied={"a/i/1": 0, "a/i/2": 3}, ledger='[{"id": "a/i/1"}]',
            clients={"a": '{"seen": 1}'}, meta={"updates": "2", "staleness_mean": "0.5"}, now=124.5,
        )
    )  # fmt: skip
    plain, key = in_redis.plain, in_redis.key
    chunks = -(-image(0).data.size // small_chunks)
    assert in_redis.keys() == sorted(
        ["applied", "clients", "head", "job", "layout", "ledger", "meta:0", "meta:1", "state", "versions"]
        + [f"model:{version}:{index}" for version in (0, 1) for index in range(chunks)]
        + [f"state:sum:{index}" for index in range(-(-4 * NUM_PARAMS // small_chunks))]
    )
    assert all(plain.ttl(key(name)) == -1 for name in in_redis.keys("*"))
    head = plain.hgetall(key("head"))
    assert head.pop(b"token")
    expected = {
        "revision": 1, "version": 1, "layout": LAYOUT.hash, "sha256": image(1).sha256, "num_params": NUM_PARAMS,
        "chunks": chunks, "created_at": 124.5, "published": "",
    }  # fmt: skip
    assert {name.decode(): value.decode() for name, value in head.items()} == {k: str(v) for k, v in expected.items()}
    layout = plain.get(key("layout"))
    assert hashlib.sha256(layout).hexdigest() == LAYOUT.hash
    assert {"name", "shape", "dtype", "offset"} <= set(json.loads(layout)["tensors"][0])
    assert plain.zrange(key("versions"), 0, -1, withscores=True) == [(b"0", 0.0), (b"1", 1.0)]
    assert plain.zrange(key("applied"), 0, -1, withscores=True) == [(b"a/i/1", 0.0), (b"a/i/2", 3.0)]
    assert plain.hgetall(key("job")) == {b"codec": b'"float32"', b"update_bytes_max": b"1024"}
    assert plain.hgetall(key("clients")) == {b"a": b'{"seen": 1}'}
    meta = in_redis.meta(1)
    assert (meta["revision"], meta["sha256"], meta["chunks"]) == ("1", image(1).sha256, str(chunks))
    assert (meta["created_at"], meta["updates"], meta["staleness_mean"]) == ("124.5", "2", "0.5")
    [(_, entry)] = plain.xrange(key("ledger"))
    assert entry == {b"revision": b"1", b"version": b"1", b"updates": b'[{"id": "a/i/1"}]'}


@pytest.mark.parametrize("chunk_bytes", [64, 2**26])
def test_a_model_in_redis_is_a_plain_safetensors_file(
    in_redis: InRedis, monkeypatch: pytest.MonkeyPatch, chunk_bytes: int
) -> None:
    monkeypatch.setattr("shared.model_image.CHUNK_BYTES", chunk_bytes)
    in_redis.open().create(image(0), 1.0)
    in_redis.open().commit(commit_of(0, 1, image(1.5)))
    plain, key = in_redis.plain, in_redis.key
    version, chunks = (int(value) for value in plain.hmget(key("head"), "version", "chunks"))
    data = b"".join(plain.get(key(f"model:{version}:{index}")) for index in range(chunks))
    assert hashlib.sha256(data).hexdigest() == plain.hget(key("head"), "sha256").decode()
    tensors = safetensors.numpy.load(data)
    expected = image(1.5).tensors()
    assert set(tensors) == set(expected)
    for name, values in expected.items():
        assert tensors[name].shape == values.shape
        assert np.array_equal(tensors[name], values)


@pytest.mark.parametrize("damage", ["changed", "shorter", "longer", "empty", "missing", "header", "hash", "swapped"])
def test_damaged_model_bytes_are_gone_not_garbage(in_redis: InRedis, small_chunks: int, damage: str) -> None:
    store = in_redis.open()
    store.create(image(0), 1.0)
    model = image(0)
    model.weights[:] = np.random.default_rng(0).standard_normal(NUM_PARAMS, np.float32)
    store.commit(commit_of(0, 1, model))
    plain, key = in_redis.plain, in_redis.key
    middle = key(f"model:1:{(model.data.size - 100) // small_chunks}")  # among the weights
    chunk = plain.get(middle)
    match damage:
        case "changed":
            plain.set(middle, bytes([chunk[0] ^ 1]) + chunk[1:])
        case "shorter":
            plain.set(middle, chunk[:-4])
        case "longer":
            plain.set(middle, chunk + b"\0\0\0\0")
        case "empty":
            plain.set(middle, b"")
        case "missing":
            plain.delete(middle)
        case "header":
            plain.set(key("model:1:0"), bytes(small_chunks))
        case "hash":
            plain.hset(key("meta:1"), "sha256", image(3).sha256)
        case "swapped":
            plain.rename(middle, key("other"))
            plain.set(middle, plain.get(key("model:1:0")))
            plain.delete(key("other"))
    with pytest.raises(VersionGone):
        in_redis.open().model(1)
    with pytest.raises(SettingsError, match="damaged"):
        in_redis.open().load()
    assert np.all(store.model(0).weights == 0)


@pytest.mark.parametrize("damage", [b"", b"\0\0\0\0", b"123", bytes(4 * NUM_PARAMS + 4)])
def test_damaged_arrays_are_no_reason_for_garbage_either(in_redis: InRedis, damage: bytes) -> None:
    store = in_redis.open()
    store.create(image(0), 1.0)
    store.commit(commit_of(0, 0, None, arrays={"sum": array(1)}))
    in_redis.plain.set(in_redis.key("state:sum:0"), damage)
    with pytest.raises(FedMQError, match="damaged"):
        in_redis.open().load()


@pytest.mark.parametrize("damage", [b"\xc1", b"\x01", b"\x81"])
def test_a_damaged_small_part_is_reported(in_redis: InRedis, damage: bytes) -> None:
    store = in_redis.open()
    store.create(image(0), 1.0)
    store.commit(commit_of(0, 0, None))
    in_redis.plain.set(in_redis.key("state"), damage)
    with pytest.raises(FedMQError, match="damaged"):
        in_redis.open().load()


def test_a_commit_whose_pieces_were_evicted_changes_nothing_and_can_be_repeated(
    in_redis: InRedis, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = in_redis.open()
    store.create(image(0), 1.0)
    commit = commit_of(0, 1, image(1), arrays={"sum": array(1)})
    before, stage = in_redis.snapshot(), store._stage

    def stage_and_evict(token: str, pieces: object) -> object:
        staged = stage(token, pieces)  # type: ignore[arg-type]
        in_redis.plain.delete(staged[0][0])
        return staged

    monkeypatch.setattr(store, "_stage", stage_and_evict)
    with pytest.raises(StoreUnavailable, match="evict"):
        store.commit(commit)
    assert in_redis.snapshot() == before
    monkeypatch.undo()
    store.commit(commit)
    assert np.all(store.model(1).weights == 1)


def test_staged_pieces_expire_when_the_commit_never_happens(in_redis: InRedis) -> None:
    store = in_redis.open()
    store.create(image(0), 1.0)
    keys, _ = store._stage("crashed", {"model:1": image(1).chunks()})
    assert keys
    assert all(0 < in_redis.plain.ttl(name) <= 3600 for name in keys)
    assert in_redis.keys("stage:*") == sorted(name.removeprefix(in_redis.prefix) for name in keys)
    in_redis.plain.delete(*keys)


def test_jobs_of_one_redis_do_not_see_each_other(in_redis: InRedis, servers: PrivateServers) -> None:
    other = InRedis(servers.redis.url, f"{in_redis.job}-2")
    in_redis.open().create(image(1), 1.0)
    assert other.open().head() is None
    other.open().create(image(2), 2.0)
    other.open().commit(commit_of(0, 1, image(3)))
    assert np.all(loaded(in_redis).model.weights == 1)
    assert loaded(in_redis).head.revision == 0
    other.close()


def test_the_ledger_can_be_read_page_by_page(in_redis: InRedis, monkeypatch: pytest.MonkeyPatch) -> None:
    store = in_redis.open()
    store.create(image(0), 1.0)
    for revision in range(7):
        store.commit(commit_of(revision, 0, None, ledger=json.dumps([{"id": revision}])))
    assert list(store.ledger()) == in_redis.ledger()
    assert [entry["revision"] for entry in store.ledger()] == list(range(1, 8))
