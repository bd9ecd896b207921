"""What every adapter of the store guarantees of published weights, and the whole downlink over each of them."""

import contextlib
import json
from collections.abc import Iterator
from typing import Any

import msgpack
import numpy as np
import pytest
import safetensors

from aggregator.downlink import Downlink
from shared.config import AggregatorSettings
from shared.errors import RejectedUpdate, VersionConflict, VersionGone
from shared.metrics import AggregatorMetrics, WorkerMetrics
from shared.model_image import ModelImage
from shared.published import Delta, DeltaEntry, Index, Publication, SnapshotEntry, pack
from shared.snapshot import snapshot_bytes
from shared.store.ports import Head, StateStore
from shared.vector import round_to_bfloat16
from tests.contract.stores import LAYOUT, InRedis, Store, commit_of, image
from worker.replica import Replica


def snapshot_of(version: int, model: ModelImage, dtype: str = "float32") -> tuple[SnapshotEntry, ModelImage]:
    return SnapshotEntry(version, dtype, snapshot_bytes(model.layout, dtype)), model


def delta_of(version: int, parent: int, payload: bytes = b"payload") -> tuple[DeltaEntry, bytes]:
    record = pack(Delta(version, parent, False, {"name": "float32", "step": 0.5}, payload))
    return DeltaEntry(version, parent, len(record)), record


def head_of(client: StateStore) -> Head:
    head = client.head()
    assert head is not None
    return head


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_published_comes_back_as_it_was(store: Store, small_chunks: int, dtype: str) -> None:
    client, model = store.open(), image(0)
    model.weights[:] = np.random.default_rng(0).standard_normal(model.weights.size, np.float32)
    round_to_bfloat16(model.weights)
    client.create(image(0), 1.0)
    assert (head_of(client).published, client.published(-1)) == ("", Index())
    first, second = delta_of(3, 0, bytes(range(256))), delta_of(7, 3, b"")
    client.commit(commit_of(0, 3, image(3), publication=Publication("aa", first, snapshot_of(3, model, dtype))))
    client.commit(commit_of(1, 7, image(7), publication=Publication("bb", second)))
    index = store.open().published(-1)
    assert index == Index((snapshot_of(3, model, dtype)[0],), (first[0], second[0]))
    assert store.open().published(3).deltas == (second[0],)
    assert store.open().published(7).deltas == ()
    read = store.open().snapshot(index.snapshots[0])
    assert read.data.tobytes() == model.data.tobytes()
    read.weights[:] = 9  # the reader's own
    assert store.open().snapshot(index.snapshots[0]).data.tobytes() == model.data.tobytes()
    codec = {"name": "float32", "step": 0.5}
    assert store.open().deltas(index.deltas[::-1]) == [
        Delta(7, 3, False, codec, b""), Delta(3, 0, False, codec, bytes(range(256))),
    ]  # fmt: skip
    assert store.open().deltas([]) == []
    assert head_of(client).published == "bb"


def test_the_hash_stays_with_the_version_and_goes_with_the_next(store: Store) -> None:
    client = store.open()
    client.create(image(0), 1.0)
    client.commit(commit_of(0, 1, image(1), publication=Publication("aa", None, snapshot_of(1, image(1)))))
    client.commit(commit_of(1, 1, None))
    assert head_of(client).published == "aa"
    client.commit(commit_of(2, 2, image(2)))
    assert head_of(client).published == ""


def test_what_is_dropped_disappears_and_the_rest_stays(store: Store, small_chunks: int) -> None:
    client = store.open()
    client.create(image(0), 1.0)
    taken, deltas = [snapshot_of(v, image(v), "bfloat16") for v in (1, 2)], [delta_of(v, v - 1) for v in (2, 3)]
    client.commit(commit_of(0, 1, image(1), publication=Publication("a", None, taken[0])))
    client.commit(commit_of(1, 2, image(2), publication=Publication("b", deltas[0], taken[1])))
    dropped = Publication("c", deltas[1], None, dropped_deltas=[deltas[0][0]], dropped_snapshots=[taken[0][0]])
    client.commit(commit_of(2, 3, image(3), publication=dropped))
    assert client.published(-1) == Index((taken[1][0],), (deltas[1][0],))
    with pytest.raises(VersionGone):
        client.snapshot(taken[0][0])
    with pytest.raises(VersionGone):
        client.deltas([deltas[1][0], deltas[0][0]])
    assert np.all(client.snapshot(taken[1][0]).weights == 2)
    assert client.deltas([deltas[1][0]])[0].parent == 2
    if isinstance(store, InRedis):
        assert store.keys("snapshot:1:*") == store.keys("delta:2:*") == []


def test_a_publication_is_part_of_its_commit(store: Store) -> None:
    client = store.open()
    client.create(image(0), 1.0)
    commit = commit_of(0, 1, image(1), publication=Publication("a", delta_of(1, 0), snapshot_of(1, image(1))))
    client.commit(commit)
    before = store.snapshot()
    client.commit(commit)  # its answer was lost
    assert store.snapshot() == before
    rival = Publication("b", delta_of(2, 1), snapshot_of(2, image(2)), client.published(-1).deltas)
    with pytest.raises(VersionConflict):
        store.open().commit(commit_of(0, 2, image(2), token="rival", publication=rival))
    assert store.snapshot() == before


# What Redis holds


def test_published_keys_are_those_of_the_contract(in_redis: InRedis, small_chunks: int) -> None:
    client, model = in_redis.open(), image(0)
    model.weights[:] = np.random.default_rng(0).standard_normal(model.weights.size, np.float32)
    round_to_bfloat16(model.weights)
    client.create(image(0), 1.0)
    taken, delta = snapshot_of(4, model, "bfloat16"), delta_of(4, 0, bytes(100))
    client.commit(commit_of(0, 4, image(4), publication=Publication("aa", delta, taken)))
    plain, key = in_redis.plain, in_redis.key
    size, record = snapshot_bytes(LAYOUT, "bfloat16"), delta[1]
    assert in_redis.keys("snapshot:*") == sorted(f"snapshot:4:{n}" for n in range(-(-size // small_chunks)))
    assert in_redis.keys("delta:*") == sorted(f"delta:4:{n}" for n in range(-(-len(record) // small_chunks)))
    assert plain.zrange(key("deltas"), 0, -1, withscores=True) == [(b"4 0 %d" % len(record), 4.0)]
    assert {k: json.loads(v) for k, v in plain.hgetall(key("snapshots")).items()} == {
        b"4": {"dtype": "bfloat16", "bytes": size}
    }
    fields = msgpack.unpackb(b"".join(plain.get(key(f"delta:4:{n}")) for n in range(len(in_redis.keys("delta:4:*")))))
    assert fields.keys() == {"format", "version", "parent", "rounded", "codec", "payload"}
    assert plain.hget(key("head"), "published") == b"aa"
    meta = in_redis.meta(4)
    assert (meta["published"], meta["parent"], meta["delta_bytes"]) == ("aa", "0", str(len(record)))
    assert all(plain.ttl(key(name)) == -1 for name in in_redis.keys("*"))
    data = b"".join(plain.get(key(f"snapshot:4:{n}")) for n in range(-(-size // small_chunks)))
    opened = dict(safetensors.deserialize(data))  # any safetensors reader opens it
    assert opened["layer.bias"]["dtype"] == "BF16"
    expected = model.tensors()["layer.bias"].view(np.uint32) >> 16
    assert np.array_equal(np.frombuffer(opened["layer.bias"]["data"], "<u2"), expected)
    assert np.frombuffer(opened["num_batches_tracked"]["data"], "<i8").tolist() == [12]
    assert list(opened["mask"]["data"]) == [1, 0, 1]


@pytest.mark.parametrize("damage", ["changed", "shorter", "empty", "missing", "swapped"])
def test_damaged_published_bytes_are_an_error_not_garbage(in_redis: InRedis, small_chunks: int, damage: str) -> None:
    client = in_redis.open()
    client.create(image(0), 1.0)
    deltas = [delta_of(v, v - 1, bytes(100)) for v in (1, 2)]
    for version in (1, 2):
        taken = snapshot_of(version, image(version), "bfloat16")
        publication = Publication("a", deltas[version - 1], taken)
        client.commit(commit_of(version - 1, version, image(version), publication=publication))
    plain, key = in_redis.plain, in_redis.key
    for name, other in (("delta:1:0", "delta:2:0"), ("snapshot:1:0", "delta:1:1")):
        value = plain.get(key(name))
        spoiled = {
            "changed": b"\xff" * len(value), "shorter": value[:-1], "empty": b"", "swapped": plain.get(key(other)),
        }  # fmt: skip
        plain.delete(key(name))
        if damage != "missing":
            plain.set(key(name), spoiled[damage])
    expected = VersionGone if damage == "missing" else RejectedUpdate
    with pytest.raises(expected):
        client.deltas([deltas[0][0]])
    with pytest.raises(expected):
        client.snapshot(client.published(-1).snapshots[0])


# The aggregator's side and the worker's, over each adapter


@pytest.fixture
def client(store: Store) -> Iterator[StateStore]:
    opened = store.open()
    opened.create(big(np.zeros(SIZE)), 1.0)
    yield opened


SIZE = 5000


def big(weights: Any) -> ModelImage:
    return ModelImage.of({"count": np.array(7), "w": np.asarray(weights, np.float32).reshape(50, 100)})


def commit_next(client: StateStore, downlink: Downlink, model: ModelImage, version: int) -> Head:
    publication = downlink.publish(version, model)
    client.commit(commit_of(head_of(client).revision, version, model, publication=publication))
    downlink.committed(AggregatorMetrics())
    return head_of(client)


@pytest.mark.parametrize(
    ("codec", "dtype"),
    [("on", "float32"), ("on", "bfloat16"), ("int8", "float32"), ("topk(0.01) | int8 | zstd", "float32"),
     ("sign | zstd", "bfloat16"), ("off", "bfloat16")],
)  # fmt: skip
def test_server_and_replicas_hold_the_same_bits_whatever_they_skip(
    store: Store, client: StateStore, codec: str, dtype: str
) -> None:
    settings = AggregatorSettings(downlink=codec, snapshots=dtype)
    rng, model = np.random.default_rng(1), big(np.zeros(SIZE))
    downlink = Downlink(settings, client)
    downlink.adopt(head_of(client))
    replicas = [Replica(store.open(), WorkerMetrics()) for _ in range(3)]
    version, seen = 0, set()
    for step in range(40):
        version += int(rng.integers(1, 4))
        model.weights[:] += 0.01 * rng.standard_normal(SIZE, np.float32)
        head = commit_next(client, downlink, model, version)
        for index, replica in enumerate(replicas):
            if step % (3**index) == 0:
                with contextlib.suppress(VersionGone):
                    pulled = replica.pull(head)
                    assert pulled.sha256 == head.published == downlink._image.sha256  # type: ignore[union-attr]
                    assert (replica.version, int(pulled.tensors()["count"])) == (version, 7)
                    seen.add(index)
        if step == 20:  # another aggregator goes on from what is stored
            downlink = Downlink(settings, store.open())
            downlink.adopt(head)
    assert seen == {0, 1, 2}
    for replica in replicas:
        assert replica._metrics.mismatches._value.get() == 0
    pulls = {how: replicas[0]._metrics.pulls.labels(how)._value.get() for how in ("model", "snapshot", "deltas")}
    assert pulls["model"] == 0
    assert pulls["deltas"] >= (30 if codec != "off" else 0)
