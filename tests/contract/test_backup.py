"""A job in Redis, in a file and back: exact, of one revision, all or nothing, whatever the file is worth."""

import itertools
import os
import random
import resource
import time
import uuid
from urllib.parse import urlsplit

import msgpack
import numpy as np
import pytest
import redis

import ops.backup
import shared.store.redis_backup
from ops import backup_file
from ops.backup import backup, restore
from ops.servers import private_redis
from shared.clock import VirtualClock
from shared.config import Settings
from shared.errors import SettingsError, StoreUnavailable, VersionConflict
from shared.model_image import ModelImage
from shared.store.redis import RedisStore
from shared.store.redis_backup import REVISIONS_BEYOND, RedisArchive
from tests.builders import System, add_one, device_of, weights
from tests.contract.faults import Proxy
from tests.contract.stores import InRedis, array, commit_of, image, state_of

PARAMS = 3000
LIFE = {"rule": "ca2fl", "clients": 4, "buffer_size": 4, "server_optimizer": "adam", "staleness_max": 50}


@pytest.fixture
def file(tmp_path):
    return tmp_path / "job.fedmq"


@pytest.fixture
def small_pieces(monkeypatch):
    """Read and write in pieces so small that every loop turns several times."""
    monkeypatch.setattr(shared.store.redis_backup, "PIECE_BYTES", 700)
    monkeypatch.setattr(shared.store.redis_backup, "PAGE_MAX", 3)
    monkeypatch.setattr(shared.store.redis_backup, "STAGE_BYTES", 900)
    monkeypatch.setattr(shared.store.redis_backup, "LARGE_BYTES", 1)


def settings_of(in_redis, **changes):
    return Settings(store_url=in_redis.url, job=in_redis.job, **changes)


def flags_of(in_redis, job=None):
    return {"store_url": in_redis.url, "job": job}


def fill(in_redis, revisions=6):
    """Make a job with one of everything a store can hold; return its last revision."""
    store = in_redis.open()
    store.create(image(0), 1000.0)
    for revision in range(revisions):
        version = revision + 1
        arrays = {"delta_sum": array(revision), "adam_m": array(-revision)}
        store.commit(
            commit_of(
                revision, version, image(version), arrays=arrays, state=state_of(*arrays, totals={"applied": revision}),
                applied={f"a/i/{revision}": revision, "b/i/-1": 0}, clients={f"client-{revision}": "{}"},
                ledger=f'[{{"id": "a/i/{revision}", "outcome": "applied"}}]', meta={"updates": "1"},
                outcomes={"a": [(f"a/i/{revision}", "applied")]},
                kept={"client:a": os.urandom(300 + revision), "client:b": None if revision % 2 else b"b" * 900},
                dropped_versions=[revision - 2] if revision > 2 else [], refused={f"z/i/{revision}": "stale"},
            )
        )  # fmt: skip
        store.record_evaluation(version, {"accuracy": revision / 10})
    store.announce({"rule": "fedbuff", "codec": "int8 | zstd"})
    in_redis.operator().tag("best", 6, 2000.0)
    in_redis.operator().tag("best", 0, 2001.0)
    in_redis.plain.xdel(in_redis.key("evaluations"), in_redis.plain.xadd(in_redis.key("evaluations"), {"version": 9}))
    return revisions


def contents(in_redis):
    """Return every key's value and whether it expires, without Redis's own serialization."""
    read = {
        b"string": in_redis.plain.get, b"hash": in_redis.plain.hgetall, b"stream": in_redis.plain.xrange,
        b"zset": lambda key: in_redis.plain.zrange(key, 0, -1, withscores=True),
    }  # fmt: skip
    found = {}
    for name in in_redis.keys("*"):
        key = in_redis.key(name)
        kind = in_redis.plain.type(key)
        last = in_redis.plain.xinfo_stream(key)["last-generated-id"] if kind == b"stream" else None
        found[name] = (kind, read[kind](key), last, in_redis.plain.pttl(key) >= 0)
    return found


def but_for_the_restore(found, revision):
    """Return contents as they would be without the revision that a restore adds."""
    head = {k: v for k, v in found["head"][1].items() if k not in (b"revision", b"token", b"created_at")}
    ledger = [entry for entry in found["ledger"][1] if int(entry[0].split(b"-")[0]) <= revision]
    return found | {"head": head, "ledger": ledger}


def another(in_redis):
    return InRedis(in_redis.url, f"job-{uuid.uuid4().hex[:12]}")


@pytest.mark.usefixtures("small_pieces", "small_chunks")
def test_a_job_comes_back_as_it_was_under_its_own_name_and_another(in_redis, file, capsys):
    revision = fill(in_redis)
    before = contents(in_redis)
    assert {kind for kind, *_ in before.values()} == {b"string", b"hash", b"zset", b"stream"}
    assert any(expires for *_, expires in before.values())
    backup(settings_of(in_redis), file, force=False)
    assert contents(in_redis) == before, "a backup changes nothing"
    assert f"version 6, revision 6 to {file}: {len(before)} keys" in capsys.readouterr().out

    for key in in_redis.keys("*"):
        in_redis.plain.delete(in_redis.key(key))
    restore(flags_of(in_redis), file, replace=False)
    other = another(in_redis)
    restore(flags_of(in_redis, other.job), file, replace=False)
    for place in (in_redis, other):
        after = contents(place)
        assert but_for_the_restore(after, revision) == but_for_the_restore(before, revision)
        assert int(after["head"][1][b"revision"]) == revision + REVISIONS_BEYOND
        [(identifier, entry)] = after["ledger"][1][len(before["ledger"][1]) :]
        assert identifier == f"{revision + REVISIONS_BEYOND}-0".encode()
        assert msgpack.unpackb(msgpack.packb(entry))[b"version"] == b"6"
        assert b'"outcome":"restore"' in entry[b"updates"] and place.keys("stage:*") == []
    loaded = other.open().load()
    assert loaded.model.sha256 == image(6).sha256 and loaded.refused["z/i/3"] == "stale"
    other.close()


def test_times_to_live_are_kept(in_redis, file):
    fill(in_redis)
    name = in_redis.key("outcomes:a")
    in_redis.plain.pexpire(name, 5_000_000)
    backup(settings_of(in_redis), file, force=False)
    restore(flags_of(in_redis), file, replace=True)
    assert 4_900_000 < in_redis.plain.pttl(name) <= 5_000_000
    assert in_redis.plain.pttl(in_redis.key("meta:6")) == -1


@pytest.mark.usefixtures("small_pieces", "small_chunks")
@pytest.mark.parametrize(
    ("where", "method"), [(RedisArchive, "_check_room"), (redis.Redis, "eval")], ids=["list", "copies"]
)
def test_what_vanishes_and_changes_before_all_is_copied_is_of_the_later_revision(
    in_redis, file, monkeypatch, where, method
):
    fill(in_redis)
    committer, inner, revisions = in_redis.open(), getattr(where, method), iter([6])

    def late(self, *given):  # between the list of names and the copies, or between those of large keys and the rest
        for revision in revisions:
            committer.commit(
                commit_of(
                    revision, revision + 1, image(7), arrays={"delta_sum": array(7), "adam_m": array(7)},
                    kept={"client:a": b"new"}, dropped_versions=[4],
                )
            )  # fmt: skip
        return inner(self, *given)

    with monkeypatch.context() as patched:
        patched.setattr(where, method, late)
        backup(settings_of(in_redis), file, force=False)
    other, now = another(in_redis), contents(in_redis)
    restore(flags_of(in_redis, other.job), file, replace=False)
    assert but_for_the_restore(contents(other), 7) == but_for_the_restore(now, 7)
    assert other.open().load().model.sha256 == image(7).sha256 and in_redis.keys("stage:*") == []
    other.close()


@pytest.mark.usefixtures("small_pieces", "small_chunks")
def test_it_is_of_one_revision_although_commits_go_on_between_its_reads(in_redis, file, monkeypatch):
    fill(in_redis)
    before, committer = contents(in_redis), in_redis.open()
    revisions = itertools.count(6)
    inner = shared.store.redis_backup.FrozenJob._pieces

    def contested(self, entry):
        revision = next(revisions)  # another version at every key: each drops and overwrites what is being read
        committer.commit(
            commit_of(
                revision, revision + 1, image(revision + 1), arrays={"delta_sum": array(1e9), "adam_m": array(1e9)},
                kept={"client:a": b"new", "client:b": None}, dropped_versions=[revision - 2], clients={"x": "{}"},
            )
        )  # fmt: skip
        return inner(self, entry)

    monkeypatch.setattr(shared.store.redis_backup.FrozenJob, "_pieces", contested)
    backup(settings_of(in_redis), file, force=False)
    assert committer.head().revision > 30
    assert in_redis.keys("model:5:*") == []
    other = another(in_redis)
    restore(flags_of(in_redis, other.job), file, replace=False)
    assert but_for_the_restore(contents(other), 6) == but_for_the_restore(before, 6)
    other.close()


def test_an_existing_job_is_refused_with_its_revision_until_told_to_replace_it(in_redis, file, capsys):
    fill(in_redis)
    backup(settings_of(in_redis), file, force=False)
    store = in_redis.open()
    store.commit(commit_of(6, 7, image(7), clients={"later": "{}"}))
    store.announce({"rule": "fedbuff", "codec": "none"})
    before = contents(in_redis)
    with pytest.raises(SettingsError) as caught:
        restore(flags_of(in_redis), file, replace=False)
    assert "exists, at version 7, revision 7; the backup is of version 6, revision 6: say --replace" in str(
        caught.value
    )
    assert contents(in_redis) == before
    restore(flags_of(in_redis), file, replace=True)
    assert "replaced: version 7, revision 7" in capsys.readouterr().out
    head = store.head()
    assert (head.version, head.revision) == (6, 7 + REVISIONS_BEYOND)
    assert store.job()["codec"] == "none", "what runs here says how"
    assert in_redis.keys("model:7:*") == [] and b"later" not in in_redis.plain.hgetall(in_redis.key("clients"))


def test_remains_of_a_job_are_not_mixed_with_the_restored_one(in_redis, file):
    fill(in_redis)
    backup(settings_of(in_redis), file, force=False)
    in_redis.plain.delete(in_redis.key("head"))
    in_redis.plain.set(in_redis.key("kept:odd:1:0"), "x")
    with pytest.raises(SettingsError, match=r"has no head, but \d+ keys are there.*--replace"):
        restore(flags_of(in_redis), file, replace=False)
    restore(flags_of(in_redis), file, replace=True)
    assert in_redis.keys("kept:odd*") == [] and in_redis.open().load().head.version == 6


def test_a_job_that_appears_while_the_restore_writes_is_not_overwritten(in_redis, file, monkeypatch):
    fill(in_redis)
    backup(settings_of(in_redis), file, force=False)
    other = another(in_redis)
    inner = backup_file.records

    def late(path):
        yield from inner(path)
        other.open().create(image(9), 1.0)

    monkeypatch.setattr(ops.backup.backup_file, "records", late)
    with pytest.raises(SettingsError, match="appeared meanwhile, at revision 0: say --replace"):
        restore(flags_of(in_redis, other.job), file, replace=False)
    assert other.open().model(0).sha256 == image(9).sha256 and other.keys("stage:*") == []
    other.close()


def test_another_model_is_not_put_in_the_place_of_a_job(in_redis, file):
    fill(in_redis)
    backup(settings_of(in_redis), file, force=False)
    other = another(in_redis)
    other.open().create(ModelImage.of({"w": np.zeros(5, np.float32)}), 0.0)
    with pytest.raises(SettingsError, match=r"of another model than the backup .*with 5 parameters.*--job OTHER"):
        restore(flags_of(in_redis, other.job), file, replace=True)
    other.close()


def test_whoever_holds_a_revision_of_the_lost_store_can_never_commit_over_the_restored_one(in_redis, file):
    fill(in_redis)
    backup(settings_of(in_redis), file, force=False)
    paused = in_redis.open()
    for revision in range(6, 12):
        paused.commit(commit_of(revision, revision + 1, image(revision + 1)))
    stale_commit = commit_of(12, 13, image(99))
    in_redis.plain.flushdb()
    restore(flags_of(in_redis), file, replace=False)
    store = in_redis.open()
    for step in range(10):  # the restored job passes the numbers of the lost one
        head = store.head()
        store.commit(commit_of(head.revision, head.version + 1, image(head.version + 1), token=f"new-{step}"))
        with pytest.raises(VersionConflict):
            paused.commit(stale_commit)
    assert store.load().model.sha256 == image(16).sha256


@pytest.mark.usefixtures("small_pieces")
def test_a_crash_in_the_middle_leaves_the_job_as_it_was_and_nothing_that_stays(in_redis, file, monkeypatch):
    fill(in_redis)
    backup(settings_of(in_redis), file, force=False)
    in_redis.open().commit(commit_of(6, 7, image(7)))
    before, inner = contents(in_redis), backup_file.records

    def breaks(path):
        for number, record in enumerate(inner(path)):
            if number == 20:
                staged = {name: in_redis.plain.ttl(in_redis.key(name)) for name in in_redis.keys("stage:*")}
                assert staged and all(ttl > 0 for ttl in staged.values())  # what a kill -9 would leave
                raise KeyboardInterrupt
            yield record

    monkeypatch.setattr(ops.backup.backup_file, "records", breaks)
    with pytest.raises(KeyboardInterrupt):
        restore(flags_of(in_redis), file, replace=True)
    assert contents(in_redis) == before


def test_a_restore_whose_answer_was_lost_is_done_once(in_redis, file, monkeypatch):
    fill(in_redis)
    backup(settings_of(in_redis), file, force=False)
    inner, answers = RedisArchive._evaluate, []

    def twice(self, script, argv):  # as redis-py does after a connection broke
        answers.extend(inner(self, script, argv) for _ in range(2))
        return answers[-1]

    monkeypatch.setattr(RedisArchive, "_evaluate", twice)
    restore(flags_of(in_redis), file, replace=True)
    assert answers[0].split()[:2] == answers[1].split()[:2] == ["done", str(6 + REVISIONS_BEYOND)]
    assert in_redis.open().head().revision == 6 + REVISIONS_BEYOND


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("word", [b"SETRANGE", b"HSET", b"ZADD", b"'XADD'", b"XSETID", b"restore "])
def test_a_round_trip_of_which_the_answer_is_lost_comes_to_the_same_when_repeated(in_redis, file, word):
    """redis-py sends it again: no byte shifts, no entry comes twice, and the job is installed once."""
    fill(in_redis)
    in_redis.open().commit(commit_of(6, 7, image(7), kept={"client:large": os.urandom(3000)}))
    before = contents(in_redis)
    backup(settings_of(in_redis), file, force=False)
    other, proxy = another(in_redis), Proxy(urlsplit(in_redis.url).port)
    proxy.cut_answer, proxy.cuts_left = word, 2
    restore({"store_url": f"redis://127.0.0.1:{proxy.port}/0", "job": other.job}, file, replace=False)
    proxy.close()
    assert proxy.cuts_left == 0, "the fault struck"
    after = contents(other)
    assert but_for_the_restore(after, 7) == but_for_the_restore(before, 7)
    assert int(after["head"][1][b"revision"]) == 7 + REVISIONS_BEYOND
    assert len(after["ledger"][1]) == len(before["ledger"][1]) + 1, "one entry of one restore"
    other.close()


def changes(in_redis):
    """Return how many writes this Redis has seen since it last saved."""
    return in_redis.plain.info("persistence")["rdb_changes_since_last_save"]


def test_a_script_repeated_after_a_lost_answer_writes_something_for_waitaof_to_wait_for(in_redis, file, monkeypatch):
    """WAIT and WAITAOF wait for the last write of their own connection, and that of the first time is gone."""
    fill(in_redis)
    backup(settings_of(in_redis), file, force=False)
    inner, written = RedisArchive._evaluate, []

    def twice(self, script, argv):
        inner(self, script, argv)
        before = changes(in_redis)
        answer = inner(self, script, argv)
        written.append(changes(in_redis) - before)
        return answer

    with monkeypatch.context() as patched:
        patched.setattr(RedisStore, "_evaluate", twice)
        restore(flags_of(in_redis), file, replace=True)
        revision = in_redis.open().head().revision
        in_redis.open().commit(commit_of(revision, 7, image(7)))
    assert len(written) == 2 and min(written) > 0, "the restore, and the commit after it"
    assert in_redis.open().head().revision == revision + 1


@pytest.mark.parametrize(("name", "damage"), [
    ("model:6:0", lambda plain, key: plain.set(key, b"short", keepttl=True)),
    ("state:adam_m:0", lambda plain, key: plain.append(key, b"long")),
    ("ledger", lambda plain, key: plain.xtrim(key, maxlen=2, approximate=False)),
    ("kept", lambda plain, key: plain.hdel(key, "client:a")),
    ("applied", lambda plain, key: plain.zremrangebyrank(key, 0, 0)),
    ("clients", lambda plain, key: plain.delete(key)),
])  # fmt: skip
def test_what_is_staged_must_be_whole_when_it_is_installed(in_redis, file, monkeypatch, name, damage):
    fill(in_redis)
    backup(settings_of(in_redis), file, force=False)
    in_redis.open().commit(commit_of(6, 7, image(7)))
    before, inner = contents(in_redis), RedisArchive._stage_all

    def and_lose(self, prefix, records):
        staged = inner(self, prefix, records)
        damage(in_redis.plain, prefix + name)
        return staged

    monkeypatch.setattr(RedisArchive, "_stage_all", and_lose)
    with pytest.raises(StoreUnavailable, match=f"was lost before it was used .*{name}.*evicting"):
        restore(flags_of(in_redis), file, replace=True)
    assert contents(in_redis) == before


def damaged(data, rng):
    """Return every kind of damage: cut anywhere, a bit flipped anywhere, bytes added."""
    for cut in {0, 5, len(backup_file.BEGIN), 40, len(data) - 1, len(data) - 32, len(data) // 2}:
        yield data[:cut]
    for _ in range(120):
        place = rng.randrange(len(data))
        yield data[:place] + bytes([data[place] ^ (1 << rng.randrange(8))]) + data[place + 1 :]
    for place in range(60):  # the header
        yield data[:place] + bytes([data[place] ^ 0x41]) + data[place + 1 :]
    yield data + b"\0"


def test_no_damage_to_the_file_reaches_the_store(in_redis, file):
    fill(in_redis)
    backup(settings_of(in_redis), file, force=False)
    data, before = file.read_bytes(), contents(in_redis)
    said = set()
    for bad in damaged(data, random.Random(5)):
        file.write_bytes(bad)
        with pytest.raises(SettingsError) as caught:
            restore(flags_of(in_redis), file, replace=True)
        assert str(file) in str(caught.value)
        said |= {word for word in ("incomplete", "damaged", "no backup", "format") if word in str(caught.value)}
    assert said == {"incomplete", "damaged", "no backup", "format"}
    assert contents(in_redis) == before
    file.write_bytes(data)
    restore(flags_of(in_redis), file, replace=True)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda file: file.unlink(), "cannot be read: No such file or directory"),
        (lambda file: (file.unlink(), file.mkdir()), "cannot be read: Is a directory"),
        (lambda file: file.write_bytes(b"hello" * 100), "is no backup of FedMQ"),
        (lambda file: file.write_bytes(file.read_bytes()[:-100]), "is incomplete: it ends after"),
        (
            lambda file: file.write_bytes(file.read_bytes().replace(b"\xa6format\x01", b"\xa6format\x07", 1)),
            "is a backup of format 7, made by FedMQ 0.1.0; this program reads format 1",
        ),
    ],
)
def test_what_is_said_of_a_file_that_cannot_be_used(in_redis, file, change, said):
    fill(in_redis)
    backup(settings_of(in_redis), file, force=False)
    change(file)
    with pytest.raises(SettingsError) as caught:
        restore(flags_of(in_redis), file, replace=True)
    assert said in str(caught.value)


def test_a_file_that_exists_is_not_written_over_unless_told_to(in_redis, file):
    fill(in_redis)
    file.write_text("mine")
    with pytest.raises(SettingsError, match=r"exists: choose another name, or say --force"):
        backup(settings_of(in_redis), file, force=False)
    assert file.read_text() == "mine"
    backup(settings_of(in_redis), file, force=True)
    assert backup_file.verify(file).revision == 6
    with pytest.raises(SettingsError, match="there is no folder"):
        backup(settings_of(in_redis), file.parent / "none" / "x", force=False)


def test_no_job_no_backup(in_redis, file):
    with pytest.raises(SettingsError, match=f"job '{in_redis.job}' has no model in this store"):
        backup(settings_of(in_redis), file, force=False)
    assert not file.exists()


def test_a_full_disk_leaves_no_file_and_no_copies(in_redis, file):
    in_redis.open().create(ModelImage.of({"w": np.zeros(500_000, np.float32)}), 0.0)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, limits[1]))  # of this process; Python ignores its signal
    try:
        with pytest.raises(SettingsError, match=f"the backup cannot be written to {file}: File too large"):
            backup(settings_of(in_redis), file, force=False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(file.parent.iterdir()) == []
    assert in_redis.keys("stage:*") == []


def test_a_key_of_a_kind_that_fedmq_does_not_write_is_named(in_redis, file):
    fill(in_redis)
    in_redis.plain.sadd(in_redis.key("mine"), "x")
    with pytest.raises(SettingsError, match="key 'mine' of the job is a set, which FedMQ writes none of"):
        backup(settings_of(in_redis), file, force=False)
    assert not file.exists() and in_redis.keys("stage:*") == []


def test_copies_live_as_long_as_they_are_read_and_a_lost_one_is_noticed(in_redis, file):
    fill(in_redis)
    clock = VirtualClock()
    archive = RedisArchive(in_redis.url, in_redis.job)
    with archive.frozen(clock) as frozen, pytest.raises(StoreUnavailable, match="vanished while it was read"):
        for number, (_, pieces) in enumerate(frozen.records()):
            copies = in_redis.keys("stage:*")
            if number <= 5:
                assert len(copies) == len(frozen.entries) - number, "a copy goes when it is read"
            assert all(0 < in_redis.plain.ttl(in_redis.key(name)) <= 600 for name in copies)
            if number == 3:
                for name in copies:
                    in_redis.plain.expire(in_redis.key(name), 5)
                clock.time_s += 61
            list(pieces)
            if number == 3:  # renewed
                assert all(in_redis.plain.ttl(in_redis.key(name)) > 500 for name in in_redis.keys("stage:*"))
            if number == 5:
                for name in in_redis.keys("stage:*"):
                    in_redis.plain.delete(in_redis.key(name))
    archive.close()


def test_a_redis_without_room_for_the_copy_says_so_before_it_is_made(tmp_path, file):
    server = private_redis(tmp_path / "redis", {"appendonly": "no"})
    server.start()
    try:
        store = RedisStore(server.url, "big", durable=False)
        store.create(ModelImage.of({"w": np.zeros(2_000_000, np.float32)}), 0.0)
        plain = redis.Redis.from_url(server.url)
        used = plain.info("memory")["used_memory"]
        plain.config_set("maxmemory", used + 4 * 2**20)
        with pytest.raises(SettingsError, match=r"8 MiB, and \d of \d+ MiB are free; raise maxmemory"):
            backup(Settings(store_url=server.url, job="big"), file, force=False)
        assert not [key for key in plain.keys("*") if b"stage" in key] and not file.exists()
        plain.config_set("maxmemory", 0)
        backup(Settings(store_url=server.url, job="big"), file, force=False)
        with pytest.raises(SettingsError, match="may forget commits it has acknowledged"):
            restore({"store_url": server.url, "job": "other"}, file, replace=False)  # not durable, as for an aggregator
    finally:
        server.stop()


class Job(System):
    """A real aggregator on Redis with an in-process broker."""

    def __init__(self, in_redis, **settings):
        start = ModelImage.of({"w": weights(0, PARAMS)})
        super().__init__(start, in_redis.open(), job=in_redis.job, versions_kept=9, **settings)

    def publish_number(self, number):
        client = "abc"[number % 3]
        self.publish(
            weights(100 + number, PARAMS), update_id=f"{client}/i/{number}", client=client, job=self.settings.job
        )

    def run(self, first, count):
        for number in range(first, first + count):
            self.publish_number(number)
            self.drain()
        self.settle()

    def settle(self):
        for _ in range(2):
            self.clock.time_s += 60
            self.drain()

    def applied(self):
        return [u["id"] for e in self.store.ledger() for u in e["updates"] if u["outcome"] == "applied"]


@pytest.mark.parametrize("settings", [LIFE, LIFE | {"downlink": "on"}], ids=["plain", "downlink"])
def test_a_restored_job_goes_on_to_the_same_bytes_with_an_open_buffer_records_and_adam(in_redis, file, settings):
    job = Job(in_redis, **settings)
    job.run(0, 10)
    stored = job.store.load()
    assert len(msgpack.unpackb(stored.state)["buffer"]) == 2 and "adam_m" in stored.arrays and in_redis.keys("kept:*")
    backup(settings_of(in_redis), file, force=False)
    at_backup_s = job.clock.time_s
    job.run(10, 9)
    straight = job.store.load()

    job.source.close()
    job.clock.time_s = at_backup_s
    in_redis.plain.flushdb()
    restore(flags_of(in_redis), file, replace=False)
    job.start()
    assert len(job.aggregator.state.buffer) == 2
    job.run(10, 9)  # the same, published anew
    after = job.store.load()
    assert (after.head.sha256, after.head.published) == (straight.head.sha256, straight.head.published)
    assert {name: a.tobytes() for name, a in after.arrays.items()} == {
        name: a.tobytes() for name, a in straight.arrays.items()
    }
    assert after.state == straight.state and after.applied == straight.applied
    assert sorted(job.applied()) == sorted({f"{'abc'[n % 3]}/i/{n}" for n in range(19)})


@pytest.mark.parametrize("when", ["idle", "folded", "delivered", "in doubt"])
def test_a_running_aggregator_takes_over_a_store_that_went_back_and_acks_nothing_wrongly(
    in_redis, file, when, monkeypatch
):
    job = Job(in_redis, rule="fedbuff", buffer_size=2, server_optimizer="adam")
    job.run(0, 5)
    backup(settings_of(in_redis), file, force=False)
    at_backup = set(job.applied())
    job.run(5, 5)
    assert len(set(job.applied()) - at_backup) == 5
    if when != "idle":
        job.publish_number(20)
    if when in ("folded", "in doubt"):
        job.aggregator.step()
        assert len(job.source._unacked) == 1 and len(job.aggregator.state.buffer) == 1
    if when == "in doubt":  # it happened, but nobody said so
        inner = job.store.commit

        def silent(commit):
            inner(commit)
            raise StoreUnavailable("no answer")

        monkeypatch.setattr(job.store, "commit", silent)
        job.clock.time_s += 60
        job.step()
        monkeypatch.undo()
        assert "c/i/20" in job.applied()
    restore(flags_of(in_redis), file, replace=True)
    assert set(job.applied()) == at_backup
    job.settle()
    job.run(30, 3)
    job.settle()
    expected = at_backup | {f"{'abc'[n % 3]}/i/{n}" for n in (30, 31, 32)}
    refused = 0 if when == "idle" else 1  # trained from a version that the store does not know any more
    told = [(u["id"], u["outcome"]) for e in job.store.ledger() for u in e["updates"] if u["outcome"] != "restore"]
    assert {name for name, outcome in told if outcome == "applied"} == expected
    assert [outcome for name, outcome in told if name == "c/i/20"] == ["rejected"] * refused
    assert len(told) == len(set(told)) == len(expected) + refused
    assert not job.source._unacked
    job.source.close()
    reference = Job(another(in_redis), rule="fedbuff", buffer_size=2, server_optimizer="adam")
    reference.run(0, 5)
    reference.run(30, 3)
    assert reference.store.head().sha256 == job.store.head().sha256


@pytest.mark.parametrize("where", ["lost with the store", "in the backup"])
def test_a_synchronous_round_that_was_open_is_finished_after_a_restore(in_redis, file, tmp_path, where):
    """A worker that took part in it must not wait for ever for a version that its lost update was to make."""
    job = Job(in_redis, rule="fedavg", buffer_size=2)
    a, b = (
        device_of(tmp_path, job, add_one, lambda: {"w": np.zeros(PARAMS, np.float32)}, client_id=name) for name in "ab"
    )

    def turn(device):
        worked = device.worker.step()
        device.publisher.step()
        job.settle()
        return worked

    assert turn(a) and turn(b) and job.store.head().version == 1
    if where == "in the backup":
        assert turn(a)
    backup(settings_of(in_redis), file, force=False)
    if where != "in the backup":
        assert turn(a)
    assert not turn(a), "it waits for the others"
    restore(flags_of(in_redis), file, replace=True)
    for _ in range(3):
        turn(a)
        turn(b)
    assert job.store.head().version >= 2
    np.testing.assert_array_equal(
        job.store.model(2).weights, job.store.model(0).weights + np.float32(1) + np.float32(1)
    )
    job.source.close()


@pytest.mark.usefixtures("small_chunks")
def test_restore_waits_as_a_commit_does_and_survives_a_kill(tmp_path, in_redis, file):
    fill(in_redis)
    backup(settings_of(in_redis), file, force=False)
    server = private_redis(tmp_path / "redis")
    server.start()
    try:
        restore({"store_url": server.url, "job": None}, file, replace=False)
        server.kill()
        server.start()
        loaded = RedisStore(server.url, in_redis.job).load()
        assert loaded.model.sha256 == image(6).sha256 and loaded.head.revision == 6 + REVISIONS_BEYOND
    finally:
        server.stop()


def test_memory_is_bounded_by_a_piece_not_by_the_job(in_redis, file):
    import tracemalloc

    params = 40_000_000 // 4
    store = in_redis.open()
    store.create(ModelImage.of({"w": np.zeros(params, np.float32)}), 0.0)
    for revision in range(3):
        store.commit(commit_of(revision, revision + 1, ModelImage.of({"w": np.full(params, revision, np.float32)})))
    tracemalloc.start()
    try:
        backup(settings_of(in_redis), file, force=False)
        restore(flags_of(in_redis), file, replace=True)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert file.stat().st_size > 160_000_000
    assert peak < 60 * 2**20, f"{peak / 2**20:.0f} MiB"
    in_redis.plain.flushdb()


def test_many_small_keys_go_quickly(in_redis, file):
    """A fleet has an outcomes stream a worker; one durable write for each would take minutes."""
    fill(in_redis)
    with in_redis.plain.pipeline(transaction=False) as pipe:
        for client in range(5000):
            pipe.xadd(in_redis.key(f"outcomes:w{client}"), {"updates": "[]"}, id="1-0")
        pipe.execute()
    begun = time.monotonic()
    backup(settings_of(in_redis), file, force=False)
    restore(flags_of(in_redis), file, replace=True)
    assert time.monotonic() - begun < 60
    assert len(in_redis.keys("outcomes:*")) == 5001


def test_the_file_is_read_back_as_written(tmp_path):
    """The format by itself, without a store."""
    entry = shared.store.redis_backup.Entry
    header = backup_file.Header("j", 5, 3, "ab", 7, 1.5, "0.1.0")
    given = [
        (entry("a", "string", -1, 3), [b"abc", b""]), (entry("h", "hash", 17, 1), [[b"f", b"v"]]),
        (entry("s", "stream", -1, 0, "4-0"), []), (entry("z", "zset", -1, 1), [[b"m", 0.1 + 0.2]]),
    ]  # fmt: skip
    path = tmp_path / "x"
    assert backup_file.write(path, header, given, False) == path.stat().st_size
    assert backup_file.verify(path) == header
    assert [(key, list(pieces)) for key, pieces in backup_file.records(path)] == given


def test_a_file_that_appears_meanwhile_is_not_written_over(tmp_path):
    path, header = tmp_path / "x", backup_file.Header("j", 5, 3, "ab", 7, 1.5, "0.1.0")

    def late():
        path.write_text("mine")
        yield from ()

    with pytest.raises(SettingsError, match="exists: choose another name"):
        backup_file.write(path, header, late(), False)
    assert path.read_text() == "mine" and list(tmp_path.iterdir()) == [path]
