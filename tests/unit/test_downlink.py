"""The hidden state of the downlink: what the aggregator publishes, and what a worker makes of it."""

import logging

import numpy as np
import pytest

import aggregator.downlink
from aggregator.downlink import Downlink
from shared.config import AggregatorSettings, load
from shared.errors import SettingsError, StoreUnavailable, VersionConflict, VersionGone
from shared.metrics import AggregatorMetrics, WorkerMetrics
from shared.model_image import ModelImage
from shared.published import SnapshotEntry, decoded, pack, plan, unpack
from shared.snapshot import snapshot_bytes
from shared.store.inprocess import InProcessStore
from shared.store.ports import Commit
from tests.builders import JOB, FaultyStore, System, add_one, device_of
from worker.replica import Replica

SHAPE = (50, 100)  # a matrix: vectors and small tensors travel as float16 whatever the codec
SIZE = 5000


def grid(vector):
    """Return a model of one matrix."""
    return ModelImage.of({"w": np.asarray(vector, np.float32).reshape(SHAPE)})


LAYOUT = grid(np.zeros(SIZE)).layout


def system_of(**settings):
    return System(grid(np.zeros(SIZE)), **{"buffer_size": 1} | settings)


def publish(system, rng):
    system.publish(rng.standard_normal(SIZE, np.float32), layout=LAYOUT.hash)
    system.drain()


class Line:
    """A store, the aggregator's downlink and commits of a model that wanders."""

    def __init__(self, store=None, **settings):
        self.store, self.rng = store or InProcessStore(), np.random.default_rng(0)
        self.settings = AggregatorSettings(**{"downlink": "on"} | settings)
        self.metrics, self.model = AggregatorMetrics(), grid(np.zeros(SIZE))
        self.store.create(self.model.copy(), 0.0)
        self.version = 0
        self.restart()

    def restart(self, **settings):
        self.settings = AggregatorSettings(**self.settings.model_dump(exclude_unset=True) | settings)
        self.downlink = Downlink(self.settings, self.store)
        self.downlink.adopt(self.store.head())

    def wander(self, scale=0.01):
        self.model.weights[:] += np.float32(scale) * self.rng.standard_normal(SIZE, np.float32)

    def commit_of(self, version=None):
        self.version = version or self.version + 1
        publication = self.downlink.publish(self.version, self.model)
        return Commit(
            self.store.head().revision, f"token {self.version}", self.version, self.model, {}, b"", {}, 0, "[]", {},
            {}, [], 0.0, publication=publication,
        )  # fmt: skip

    def commit(self, version=None, scale=0.01):
        self.wander(scale)
        self.store.commit(self.commit_of(version))
        self.downlink.committed(self.metrics)
        return self.store.head()

    def replica(self):
        return Replica(self.store, WorkerMetrics())


def counted(replica, name="mismatches"):
    counter = getattr(replica._metrics, name)
    return counter._value.get()


def pulls(replica):
    return {how: int(replica._metrics.pulls.labels(how)._value.get()) for how in ("model", "snapshot", "deltas")}


# The arithmetic


@pytest.mark.parametrize("codec", ["on", "int8", "float16", "topk(0.05)"])
def test_the_published_weights_follow_the_closed_form(codec):
    """xhat_v = x_0 + the sum of the decoded deltas in float64, and what a delta lost is in the next difference."""
    line = Line(downlink=codec)
    replica = line.replica()
    published = replica.pull(line.store.head()).weights.astype(np.float64)
    assert np.array_equal(published, line.model.weights)  # the beginning is the model itself
    for _ in range(12):
        before = published.copy()
        head = line.commit()
        [entry] = line.store.published(head.version - 1).deltas
        assert entry.parent == head.version - 1
        [delta] = line.store.deltas([entry])
        q = np.zeros(SIZE, np.float32)
        decoded(delta.codec, delta.payload, line.model.layout).add_into(q, 1.0)
        published += q
        assert replica.pull(head).weights == pytest.approx(published, rel=1e-5, abs=1e-6)
        wanted = line.model.weights - before  # against xhat, not against the model before
        assert np.linalg.norm(wanted - q) < 0.999 * np.linalg.norm(wanted)


@pytest.mark.parametrize("codec", ["topk(0.05)", "on", "int4", "nf4"])
def test_no_error_adds_up(codec):
    line = Line(downlink=codec)
    for _ in range(30):
        line.commit()
    for _ in range(60):
        head = line.commit(scale=0.0)  # the model rests: what was left out comes after it
    distance = np.linalg.norm(line.replica().pull(head).weights - line.model.weights)
    assert distance < 1e-4 * np.linalg.norm(line.model.weights)


def test_the_same_model_gives_the_same_publication():
    lines = [Line(downlink="int8"), Line(downlink="int8")]
    heads = [[line.commit().published for _ in range(5)] for line in lines]
    assert heads[0] == heads[1]


@pytest.mark.parametrize("codec", ["on", "off"])
def test_bfloat16_snapshots_are_exact_for_whoever_comes_by_which_way(codec):
    line = Line(downlink=codec, snapshots="bfloat16")
    follower = line.replica()
    rounded = 0
    for _ in range(20):
        head = line.commit()
        image, newcomer = follower.pull(head), line.replica()
        assert newcomer.pull(head).data.tobytes() == image.data.tobytes()
        assert image.sha256 == head.published
        rounded += not np.any(image.weights.view(np.uint32) & 0xFFFF)
    assert rounded == 20 if codec == "off" else 0 < rounded < 20
    assert pulls(follower)["deltas"] == (0 if codec == "off" else 19)
    assert counted(follower) == 0


# What is stored


def test_a_snapshot_comes_when_deltas_have_become_half_of_one():
    line = Line(downlink="int8")
    size, since, total = snapshot_bytes(line.model.layout, "float32"), 0, 0
    for _ in range(30):
        head = line.commit()
        index = line.store.published(-1)
        deltas = [entry.size_bytes for entry in index.deltas if entry.version == head.version]
        if index.snapshots[-1].version == head.version:
            assert total == 0 or since + sum(deltas) > size / 2 - 100
            since, total = 0, total + 1
        else:
            since += sum(deltas)
            assert since <= size / 2
        assert len(index.snapshots) <= 2
        assert sum(entry.size_bytes for entry in index.deltas) <= size
        way = plan(index, head.version, -1)
        assert way.size_bytes <= 1.5 * size + 1000
    assert total > 5


def test_small_deltas_are_bounded_in_number(monkeypatch):
    monkeypatch.setattr(aggregator.downlink, "DELTAS_PER_SNAPSHOT_MAX", 4)
    monkeypatch.setattr(aggregator.downlink, "DELTAS_MAX", 8)
    line = Line(downlink="topk(0.001)")
    for _ in range(40):
        head = line.commit()
        index = line.store.published(-1)
        assert len(index.deltas) <= 8
        assert len(plan(index, head.version, -1).deltas) < 4
    assert len(index.deltas) == 8


def test_the_chain_goes_over_committed_versions():
    line = Line()
    heads = [line.commit(version) for version in (3, 4, 9, 20)]
    assert [(e.version, e.parent) for e in line.store.published(-1).deltas] == [(3, 0), (4, 3), (9, 4), (20, 9)]
    replica = line.replica()
    for head in heads[-1:]:
        assert replica.pull(head).sha256 == head.published


def test_without_a_downlink_nothing_is_published_and_no_copy_is_held():
    line = Line(downlink="off")
    head = line.commit()
    assert head.published == ""
    assert line.store.published(-1).snapshots == ()
    assert line.downlink._image is None
    replica = line.replica()
    assert np.array_equal(replica.pull(head).weights, line.model.weights)
    assert pulls(replica) == {"model": 1, "snapshot": 0, "deltas": 0}


def test_weights_no_delta_can_bridge_are_a_snapshot():
    line = Line()
    line.commit()
    line.model.weights[0] = 3e38  # the square of the difference overflows
    head = line.commit()
    replica = line.replica()
    assert replica.pull(head).weights[0] > 2e38
    assert line.store.published(-1).deltas == ()


# What a worker pulls


def test_a_chain_is_pulled_while_it_is_smaller_than_a_snapshot():
    line = Line(downlink="int8")
    replica, size = line.replica(), snapshot_bytes(line.model.layout, "float32")
    replica.pull(line.commit())
    assert counted(replica, "pulled_bytes") == size
    head = [line.commit() for _ in range(3)][-1]
    chain = sum(entry.size_bytes for entry in line.store.published(1).deltas)
    assert size / 2 < chain < size
    replica.pull(head)
    assert counted(replica, "pulled_bytes") == size + chain
    assert pulls(replica) == {"model": 0, "snapshot": 1, "deltas": 1}
    head = [line.commit() for _ in range(7)][-1]  # 7/4 of a snapshot
    way = plan(line.store.published(-1), head.version, -1)
    replica.pull(head)
    assert counted(replica, "pulled_bytes") == size + chain + way.size_bytes
    assert pulls(replica) == {"model": 0, "snapshot": 2, "deltas": 1}


def spoil(line, version, how):
    """Damage the stored delta of a version."""
    entry, record = line.store._deltas[version]
    delta = unpack(record, entry)
    payload = bytearray(delta.payload)
    if how == "payload":  # decodes, to other weights
        payload[len(payload) // 2] ^= 0x55
    elif how == "codec":
        delta.codec["name"] = "no-such"
    elif how == "short":
        payload = payload[:-5]
    elif how == "rounded":
        delta = type(delta)(delta.version, delta.parent, True, delta.codec, delta.payload)
    new = pack(type(delta)(delta.version, delta.parent, delta.rounded, delta.codec, bytes(payload)))
    line.store._deltas[version] = (entry, b"rubbish" if how == "rubbish" else new)


@pytest.mark.parametrize("how", ["payload", "codec", "short", "rubbish", "rounded"])
def test_a_tampered_delta_is_counted_and_made_good_with_a_snapshot(monkeypatch, caplog, how):
    monkeypatch.setattr(aggregator.downlink, "SNAPSHOT_SHARE", 0.0)  # every version is a snapshot as well
    line = Line(downlink="int8")
    replica = line.replica()
    replica.pull(line.commit())
    line.commit()
    head = line.commit()
    spoil(line, 3, how)
    assert replica.pull(head).sha256 == head.published
    assert counted(replica) == 1
    assert pulls(replica)["snapshot"] == 2
    assert "do not fit" in caplog.text
    assert replica.pull(line.commit()).sha256 == line.store.head().published  # and deltas lead on from there
    assert counted(replica) == 1


def test_weights_changed_on_the_device_are_found_and_made_good():
    line = Line(downlink="int8")
    replica = line.replica()
    replica.pull(line.commit()).weights[17] += 1  # a task that keeps a view and trains in it
    head = line.commit()
    assert replica.pull(head).sha256 == head.published
    assert (counted(replica), pulls(replica)) == (1, {"model": 0, "snapshot": 2, "deltas": 1})


def test_what_cannot_be_made_good_is_looked_up_again(caplog):
    line = Line(downlink="int8")
    replica = line.replica()
    replica.pull(line.commit())
    spoil(line, line.commit().version, "payload")
    with pytest.raises(VersionGone, match="damaged"):
        replica.pull(line.store.head())
    assert counted(replica) == 2
    assert (replica.image, replica.version) == (None, -1)  # nobody trains from half of a chain
    assert caplog.records[-1].levelno == logging.WARNING
    for _ in range(4):  # the next snapshot ends it
        head = line.commit()
    assert replica.pull(head).sha256 == head.published


@pytest.mark.parametrize("gone", ["delta", "store"])
def test_the_base_survives_a_pull_that_could_not_read_everything(monkeypatch, gone):
    line = Line()
    replica = line.replica()
    replica.pull(line.commit())
    before = replica.image.data.tobytes()
    head = [line.commit() for _ in range(3)][-1]
    stored = dict(line.store._deltas)
    if gone == "delta":
        index = line.store.published(-1)
        monkeypatch.setattr(line.store, "published", lambda after: index)
        del line.store._deltas[head.version]
    else:
        monkeypatch.setattr(line.store, "deltas", lambda entries: (_ for _ in ()).throw(StoreUnavailable("away")))
    with pytest.raises((VersionGone, StoreUnavailable)):
        replica.pull(head)
    assert replica.image.data.tobytes() == before
    assert replica.version == 1
    monkeypatch.undo()
    line.store._deltas.update(stored)
    assert replica.pull(head).sha256 == head.published
    assert pulls(replica) == {"model": 0, "snapshot": 1, "deltas": 1}


def test_a_head_older_than_the_index_is_served():
    line = Line()
    old = [line.commit() for _ in range(3)][-1]
    weights = line.downlink._image.data.tobytes()
    line.commit()
    assert line.replica().pull(old).data.tobytes() == weights


# On, off and on again


def test_the_model_workers_held_before_the_downlink_is_the_beginning_of_the_chain():
    line = Line(downlink="off")
    replica, older = line.replica(), line.replica()
    older.pull(line.commit())
    replica.pull(line.commit())
    line.restart(downlink="on")
    assert line.commit().published
    head = line.commit()
    assert replica.pull(head).sha256 == older.pull(head).sha256 == head.published
    assert (counted(replica), pulls(replica)) == (0, {"model": 1, "snapshot": 0, "deltas": 1})
    assert (counted(older), pulls(older)) == (0, {"model": 1, "snapshot": 1, "deltas": 0})


def test_a_model_of_a_job_that_began_anew_is_found_out_by_its_hash():
    old, new = Line(downlink="off"), Line()
    replica = old.replica()
    replica.pull(old.commit())
    replica._store = new.store
    head = [new.commit() for _ in range(2)][-1]
    assert replica.pull(head).sha256 == head.published
    assert (counted(replica), pulls(replica)["snapshot"]) == (1, 1)


def test_off_and_on_again():
    line = Line()
    stayed, missed = line.replica(), line.replica()
    for replica in (stayed, missed):
        replica.pull(line.commit())
    stayed.pull(line.commit())
    line.restart(downlink="off")
    assert line.store.head().published  # workers of this version hold what was published of it
    head = line.commit()
    assert head.published == ""
    assert (line.store._deltas, line.store._snapshots) == ({}, {})
    assert np.array_equal(stayed.pull(head).weights, line.model.weights)
    line.restart(downlink="int8")
    for _ in range(2):
        head = line.commit()
        for replica in (stayed, missed):
            assert replica.pull(head).sha256 == head.published
    assert counted(stayed) == counted(missed) == 0


# One commit, one truth


def test_a_restart_goes_on_with_the_same_weights():
    line = Line(downlink="int8", snapshots="bfloat16")
    for _ in range(7):
        head = line.commit()
        held = line.downlink._image.data.tobytes()
        line.restart()
        assert line.downlink._image.data.tobytes() == held
    assert head.version - len(line.store._snapshots) > 2  # and not because every version was a snapshot


@pytest.mark.parametrize("how", ["payload", "rubbish", "missing"])
def test_a_restart_that_cannot_rebuild_them_begins_anew_with_a_snapshot(caplog, how):
    line = Line(downlink="int8")
    replica = line.replica()
    for _ in range(2):
        replica.pull(line.commit())
    if how == "missing":
        del line.store._deltas[2]
    else:
        spoil(line, 2, how)
    line.restart()
    assert "are lost" in caplog.text
    head = line.commit()
    assert [entry.version for entry in line.store.published(-1).snapshots] == [1, 3]
    assert line.store.published(-1).deltas == ()
    assert replica.pull(head).sha256 == head.published
    head = line.commit()
    assert replica.pull(head).sha256 == head.published
    assert (counted(replica), pulls(replica)["deltas"]) == (0, 2)


def test_a_publication_asked_for_again_is_the_same():
    line = Line()
    line.commit()
    line.wander()
    first = line.commit_of(2)
    assert line.commit_of(2).publication is first.publication
    line.store.commit(first)
    line.downlink.committed(line.metrics)
    head = line.commit()
    assert line.replica().pull(head).sha256 == head.published


def test_after_a_conflict_it_is_computed_anew_from_what_is_stored():
    line = Line()
    line.commit()
    rival = Downlink(line.settings, line.store)
    rival.adopt(line.store.head())
    line.wander()
    lost = line.commit_of(2)
    line.downlink, own = rival, line.downlink
    line.commit(2)
    with pytest.raises(VersionConflict):
        line.store.commit(lost.__class__(**{n: getattr(lost, n) for n in lost.__slots__} | {"token": "lost"}))
    own.adopt(line.store.head())
    line.downlink = own
    head = line.commit()
    assert [(e.version, e.parent) for e in line.store.published(-1).deltas] == [(1, 0), (2, 1), (3, 2)]
    assert line.replica().pull(head).sha256 == head.published


@pytest.mark.parametrize("fault", ["before", "after"])
@pytest.mark.parametrize("codec", ["on", "int8"])
def test_a_commit_in_doubt_repeats_the_same_publication(fault, codec):
    system = system_of(store=FaultyStore(), downlink=codec)
    replica, rng = Replica(system.store, WorkerMetrics()), np.random.default_rng(0)
    for turn in range(6):
        system.store.faults = [fault, fault, fault] if turn % 2 else []
        publish(system, rng)
        while system.aggregator._in_doubt:
            system.step()
        head = system.store.head()
        assert head.version == turn + 1
        assert replica.pull(head).sha256 == head.published
        assert system.aggregator._downlink._image.sha256 == head.published
    assert (counted(replica), pulls(replica)["deltas"]) == (0, 5)


def test_an_aggregator_killed_between_two_commits_leaves_replicas_whole():
    system = system_of(downlink="on")
    replica, rng = Replica(system.store, WorkerMetrics()), np.random.default_rng(0)
    for _ in range(8):
        publish(system, rng)
        replica.pull(system.store.head())
        system.restart()
    assert (counted(replica), pulls(replica)) == (0, {"model": 0, "snapshot": 1, "deltas": 7})
    delta, snapshot = (system.metrics.published_bytes.labels(kind)._value.get() for kind in ("delta", "snapshot"))
    assert 0 < delta < snapshot


def test_a_standby_takes_over_the_published_weights():
    system = system_of(downlink="on")
    first, rng = system.aggregator, np.random.default_rng(0)
    publish(system, rng)
    second = system.restart()  # it has loaded version 1 ...
    system.source.close()
    system.restart()
    publish(system, rng)  # ... and misses version 2
    system.source.close()
    system.source = second._source = system.broker.source(system.settings.job)
    system.aggregator = second
    publish(system, rng)
    assert system.store.head().version == 3
    assert [(e.version, e.parent) for e in system.store.published(-1).deltas] == [(1, 0), (2, 1), (3, 2)]
    assert second._downlink._image.sha256 == system.store.head().published
    assert first.state.version == 1


# The worker and the settings


def test_a_worker_trains_from_the_published_weights_and_sends_its_delta_to_them(tmp_path):
    system = system_of(downlink="topk(0.1)")
    rng, seen = np.random.default_rng(0), []

    def train(model, context):
        seen.append((context.version, model["w"].copy()))
        return add_one(model, context)

    device = device_of(tmp_path, system, train, lambda: {"w": np.zeros(SHAPE, np.float32)}, client_id="b")
    for _ in range(3):
        publish(system, rng)
        assert device.worker.step()
        before = system.weights.copy()
        device.publisher.step()
        system.drain()
        assert system.weights == pytest.approx(before + 1, abs=1e-5)  # the delta is 1, whatever x_v - xhat_v is
    expected = Replica(system.store, WorkerMetrics()).pull(system.store.head())
    assert device.worker.step()
    assert np.array_equal(seen[-1][1].reshape(-1), expected.weights)
    assert not np.array_equal(seen[-1][1].reshape(-1), system.weights)
    assert seen[-1][0] == system.store.head().version


@pytest.mark.parametrize("change", [{"downlink": "on"}, {"downlink": "int8"}, {"snapshots": "bfloat16"}])
def test_fedasync_needs_the_very_weights_a_worker_started_from(change):
    with pytest.raises(SettingsError, match=r"fedasync.*the very weights each worker started from"):
        load(AggregatorSettings, {"rule": "fedasync"} | change)
    assert load(AggregatorSettings, {"rule": "fedbuff"} | change)


@pytest.mark.parametrize("codec", ["no-such", "rotate | int8", "int8 |"])
def test_a_codec_the_downlink_cannot_use_is_a_settings_error(codec):
    with pytest.raises(SettingsError, match="FEDMQ_DOWNLINK"):
        load(AggregatorSettings, {"downlink": codec})


def test_the_job_says_how_it_publishes():
    spec = System(downlink="int8", snapshots="bfloat16").store.job()
    assert (spec["downlink"], spec["snapshots"]) == ("int8", "bfloat16")


def test_snapshots_of_every_version_stay_as_long_as_models():
    line = Line(downlink="off", snapshots="bfloat16", versions_kept=4)
    for _ in range(9):
        line.commit()
    assert [entry.version for entry in line.store.published(-1).snapshots] == [6, 7, 8, 9]
    assert line.store.snapshot(SnapshotEntry(6, "bfloat16", snapshot_bytes(line.model.layout, "bfloat16")))


def test_a_job_that_began_anew_is_noticed_at_the_same_version():
    """Neither version nor layout tells; the hash does."""
    old, new = Line(downlink="off"), Line(downlink="off")
    replica = old.replica()
    held = old.commit()
    replica.pull(held)
    head = new.commit(scale=0.5)
    assert (head.version, head.layout) == (held.version, held.layout)
    assert replica.differs(head)
    assert not replica.differs(held)
    replica._store = new.store
    assert np.array_equal(replica.pull(head).weights, new.model.weights)
    assert not replica.differs(head)


def test_fedasync_is_refused_while_workers_hold_what_a_downlink_published():
    system = system_of(downlink="on")
    publish(system, np.random.default_rng(0))
    assert system.store.head().published
    system.settings = AggregatorSettings(job=JOB, rule="fedasync")
    with pytest.raises(SettingsError, match=r"fedasync needs the very weights .* FEDMQ_DOWNLINK=off"):
        system.restart()
    system.settings = AggregatorSettings(job=JOB, buffer_size=1, commit_interval_s=0.0)
    system.restart()
    publish(system, np.random.default_rng(1))
    assert not system.store.head().published
    system.settings = AggregatorSettings(job=JOB, rule="fedasync")
    system.restart()
