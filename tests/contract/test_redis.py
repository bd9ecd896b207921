"""What only Redis has: durability, crashes, lost answers, logins."""

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import redis

from ops.servers import PrivateServer, PrivateServers, private_redis
from shared.errors import FedMQError, SettingsError, StoreUnavailable, VersionConflict
from shared.published import Delta, DeltaEntry, Index, Publication, SnapshotEntry, pack
from shared.store.redis import RedisStore
from shared.urls import hide_password
from tests.contract.faults import Proxy, frozen, silent_host, unreachable_host, wait_until
from tests.contract.stores import InRedis, array, commit_of, image

PASSWORD = "s3cret"
Start = Callable[..., PrivateServer]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Start Redis servers of a test's own, with options of `redis.conf`."""
    started: list[PrivateServer] = []

    def start_one(**options: str) -> PrivateServer:
        folder = tmp_path / f"redis{len(started)}"
        server = private_redis(folder, {name.replace("_", "-"): value for name, value in options.items()})
        started.append(server)
        server.start()
        return server

    yield start_one
    for server in started:
        server.stop(signal.SIGKILL)


@pytest.fixture
def own(start: Start) -> PrivateServer:
    """Return a Redis that a test may stop, kill or freeze."""
    return start()


@pytest.fixture
def proxied(own: PrivateServer, job: str) -> Iterator[tuple[RedisStore, Proxy, InRedis]]:
    """Yield a store behind a proxy, the proxy, and a look at the same job past it."""
    proxy, beyond = Proxy(own.port), InRedis(own.url, job)
    store = RedisStore(f"redis://127.0.0.1:{proxy.port}/0", job)
    store.create(image(0), 1.0)
    yield store, proxy, beyond
    store.close()
    proxy.close()
    beyond.close()


def answering(store: RedisStore) -> None:
    """Wait until the store can be used again."""

    def answers() -> bool:
        with contextlib.suppress(StoreUnavailable):
            store.head()
            return True
        return False

    wait_until(answers)


def settled_keys(beyond: InRedis) -> set[str]:
    """Return the job's keys but for pieces on their way."""
    return {name for name in beyond.keys("*") if not name.startswith("stage:")}


# Durability


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({"appendfsync": "everysec"}, "everysec"),
        ({"appendfsync": "no"}, "no"),
        ({"appendonly": "no"}, "off"),
        ({"appendonly": "no", "save": "60 1"}, "off"),
    ],
)
def test_a_redis_that_may_forget_commits_is_refused(start: Start, job: str, options: dict[str, str], kept: str) -> None:
    server = start(**options)
    version = redis_version(server)
    store = RedisStore(server.url, job)
    assert store.durability() == kept
    if kept in ("everysec", "no") and version >= (7, 2):
        assert store.check()  # WAITAOF makes each commit durable
    else:
        with pytest.raises(SettingsError, match=kept) as caught:
            store.check()
        assert "--appendonly yes --appendfsync always" in str(caught.value)
        assert "FEDMQ_DURABLE=false" in str(caught.value)
        assert f"127.0.0.1:{server.port}" in str(caught.value)
    store.close()
    careless = RedisStore(server.url, job, durable=False)
    assert careless.check().startswith(f"{version[0]}.{version[1]}")
    assert careless.create(image(0), 1.0)
    careless.commit(commit_of(0, 1, image(1)))
    careless.close()


def test_a_redis_that_writes_through_is_accepted(servers: PrivateServers, job: str) -> None:
    store = RedisStore(servers.redis.url, job)
    assert store.durability() == "always"
    assert store.check().split(".")[0].isdigit()
    store.close()


def test_a_login_that_may_not_ask_for_the_configuration_is_told(own: PrivateServer, job: str) -> None:
    url = login(own, "+@all", "-config")
    store = RedisStore(url, job)
    with pytest.raises(SettingsError, match="unknown"):
        store.check()
    store.close()
    store = RedisStore(url, job, durable=False)
    assert store.check()
    store.close()


# Crashes


def test_a_commit_that_returned_survives_kill_9(own: PrivateServer, job: str) -> None:
    store = RedisStore(own.url, job)
    assert store.create(image(0), 1.0)
    for version in range(1, 4):
        commit = commit_of(
            version - 1, version, image(version), arrays={"sum": array(version)}, applied={f"a/i/{version}": 0}
        )
        store.commit(commit)
        own.kill()
        with pytest.raises(StoreUnavailable, match=f"127.0.0.1:{own.port}"):
            store.head()
        own.start()
        answering(store)
        stored = store.load()
        assert stored is not None
        assert (stored.head.revision, stored.head.version) == (version, version)
        assert np.all(stored.model.weights == version)
        assert np.all(stored.arrays["sum"] == version)
        assert set(stored.applied) == {f"a/i/{n}" for n in range(1, version + 1)}
    store.close()


def test_whatever_returned_before_a_kill_in_mid_stream_is_there_afterwards(own: PrivateServer, job: str) -> None:
    store = RedisStore(own.url, job)
    store.create(image(0), 1.0)
    returned, many = [0], threading.Event()

    def commit_until_it_fails() -> None:
        with contextlib.suppress(StoreUnavailable):
            while True:
                revision = returned[-1]
                commit = commit_of(revision, revision + 1, image(revision + 1), arrays={"sum": array(revision + 1)})
                store.commit(commit)
                returned.append(revision + 1)
                if revision > 50:
                    many.set()

    committer = threading.Thread(target=commit_until_it_fails)
    committer.start()
    assert many.wait(30)
    own.kill()
    committer.join()
    own.start()
    answering(store)
    stored = store.load()
    assert stored is not None
    assert stored.head.revision in (returned[-1], returned[-1] + 1)  # one may have lost only its answer
    assert np.all(stored.model.weights == stored.head.version)
    assert np.all(stored.arrays["sum"] == stored.head.revision)
    store.close()


@pytest.mark.parametrize("moment", [b"SET", b"EVAL"], ids=["while staging", "before the script"])
def test_a_redis_that_stops_in_the_middle_of_a_commit_takes_it_later(
    own: PrivateServer, proxied: tuple[RedisStore, Proxy, InRedis], moment: bytes
) -> None:
    store, proxy, beyond = proxied
    commit = commit_of(0, 1, image(1), arrays={"sum": array(1)}, applied={"a/i/1": 0}, ledger='[{"id": "a/i/1"}]')
    proxy.cut_request, proxy.cuts_left = b"$%d\r\n%s\r\n" % (len(moment), moment), 100
    before = settled_keys(beyond)
    with pytest.raises(StoreUnavailable):
        store.commit(commit)
    own.stop()
    with pytest.raises(StoreUnavailable):
        store.commit(commit)
    own.start()
    assert settled_keys(beyond) == before
    proxy.cuts_left = 0
    answering(store)
    store.commit(commit)
    stored = store.load()
    assert stored is not None
    assert stored.head.revision == 1
    assert np.all(stored.model.weights == 1)
    assert len(beyond.ledger()) == 1
    assert beyond.keys("stage:*") == []


@pytest.mark.parametrize("cuts", [1, 2, 100])
def test_a_commit_whose_answer_is_lost_applies_once(proxied: tuple[RedisStore, Proxy, InRedis], cuts: int) -> None:
    store, proxy, beyond = proxied
    commit = commit_of(0, 1, image(1), arrays={"sum": array(1)}, applied={"a/i/1": 0}, ledger='[{"id": "a/i/1"}]')
    proxy.cut_answer, proxy.cuts_left = b"$4\r\nEVAL\r\n", cuts
    if cuts == 100:
        with pytest.raises(StoreUnavailable):
            store.commit(commit)
        head = beyond.open().head()
        assert head is not None
        assert head.revision == 1  # it happened; only nobody said so
        proxy.cuts_left = 0
    store.commit(commit)
    stored = store.load()
    assert stored is not None
    assert (stored.head.revision, stored.head.version, stored.applied) == (1, 1, {"a/i/1": 0})
    assert len(beyond.ledger()) == 1
    assert beyond.keys("stage:*") == []
    with pytest.raises(VersionConflict):
        store.commit(commit_of(0, 1, image(2), token="another"))
    assert beyond.keys("stage:*") == []


def test_a_frozen_redis_is_unavailable_and_then_goes_on(
    own: PrivateServer, job: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shared.store.redis.ANSWER_S_MAX", 0.5)
    store = RedisStore(own.url, job)
    store.create(image(0), 1.0)
    assert store.head() is not None
    with frozen(own):
        for ask in (store.head, lambda: store.commit(commit_of(0, 1, image(1)))):
            with pytest.raises(StoreUnavailable, match=f"127.0.0.1:{own.port}"):
                ask()
    answering(store)
    store.commit(commit_of(0, 1, image(1)))
    head = store.head()
    assert head is not None
    assert head.revision == 1
    store.close()


def test_a_full_redis_refuses_a_commit_as_a_whole(own: PrivateServer, job: str) -> None:
    beyond = InRedis(own.url, job)
    store = beyond.open()
    store.create(image(0), 1.0)
    before = beyond.snapshot()
    beyond.plain.config_set("maxmemory", "1mb")
    with pytest.raises(StoreUnavailable, match="maxmemory"):
        store.commit(commit_of(0, 1, image(1), arrays={"sum": array(1)}))
    beyond.plain.config_set("maxmemory", "0")
    assert {name: kept for name, kept in beyond.snapshot().items() if not name.startswith("stage:")} == before
    store.commit(commit_of(0, 1, image(1), arrays={"sum": array(1)}))
    assert np.all(store.model(1).weights == 1)
    beyond.close()


# URLs and logins


def problem_of(url: str, job: str, *, durable: bool = True) -> FedMQError:
    """Return what every reading and checking method says of a URL, each within 10 s and without the password."""
    store, problems = RedisStore(url, job, durable), []
    for ask in (store.check, store.head, store.durability):
        started = time.monotonic()
        with pytest.raises((SettingsError, StoreUnavailable)) as caught:
            ask()
        assert time.monotonic() - started < 10.0
        assert PASSWORD not in str(caught.value)
        assert hide_password(url) in str(caught.value)
        problems.append(caught.value)
    store.close()
    assert len({type(problem) for problem in problems}) == 1
    return problems[0]


@pytest.mark.parametrize(
    "url",
    [
        "",
        "nonsense",
        "127.0.0.1:6379",
        f"http://:{PASSWORD}@127.0.0.1:6379/0",
        f"redis://:{PASSWORD}@127.0.0.1:port/0",
        f"redis://:{PASSWORD}@127.0.0.1:123456/0",
        f"redis://:{PASSWORD}@[::1/0",
        f"redis://:{PASSWORD}/with/slashes@127.0.0.1:6379/0",
        f"redis://login:{PASSWORD}#with-a-hash@127.0.0.1:6379/0",
        f"redis://login:{PASSWORD}?with-a-mark@127.0.0.1:6379/0",
        f"redis://127.0.0.1:6379/0?password={PASSWORD}&socket_timeout=soon",
    ],
)
def test_a_bad_url_is_a_settings_error_without_the_password(job: str, url: str) -> None:
    with pytest.raises(SettingsError, match="FEDMQ_STORE_URL") as caught:
        RedisStore(url, job)
    assert PASSWORD not in str(caught.value)


def test_a_missing_or_wrong_password_is_a_settings_error(start: Start, job: str) -> None:
    server = start()
    plain = redis.Redis.from_url(server.url)
    plain.config_set("requirepass", "right")
    plain.close()
    for secret in ("", f":{PASSWORD}@", f"default:{PASSWORD}@", f"nobody:{PASSWORD}@"):
        problem = problem_of(f"redis://{secret}127.0.0.1:{server.port}/0", job)
        assert isinstance(problem, SettingsError)
        assert "FEDMQ_STORE_URL" in str(problem)
    store = RedisStore(f"redis://:right@127.0.0.1:{server.port}/0", job)
    assert store.head() is None
    store.close()


@pytest.mark.parametrize("host", ["127.0.0.1:1", "no-such-host.invalid:6379"])
def test_a_host_without_redis_is_unavailable(job: str, host: str) -> None:
    assert isinstance(problem_of(f"redis://:{PASSWORD}@{host}/0", job), StoreUnavailable)


def test_a_host_that_drops_packets_is_unavailable(job: str) -> None:
    with unreachable_host() as port:
        store = RedisStore(f"redis://:{PASSWORD}@127.0.0.1:{port}/0", job)
        started = time.monotonic()
        with pytest.raises(StoreUnavailable, match="imeout") as caught:
            store.check()
        assert time.monotonic() - started < 10.0
        assert PASSWORD not in str(caught.value)
        store.close()


def test_a_host_that_says_nothing_is_unavailable(job: str) -> None:
    """TLS to a port without it is the same: a plain Redis waits for the rest of a line."""
    problems: list[FedMQError] = []

    def ask(scheme: str, question: str) -> None:
        store = RedisStore(f"{scheme}://:{PASSWORD}@127.0.0.1:{port}/0", job)
        try:
            getattr(store, question)()
        except FedMQError as error:
            problems.append(error)
        store.close()

    questions = [("redis", "check"), ("redis", "head"), ("rediss", "check")]
    with silent_host() as port:
        asking = [threading.Thread(target=ask, args=question, daemon=True) for question in questions]
        deadline = time.monotonic() + 10.0
        for thread in asking:
            thread.start()
        for thread in asking:
            thread.join(max(0.0, deadline - time.monotonic()))
    assert [type(problem) for problem in problems] == 3 * [StoreUnavailable], "no answer within 10 s"
    assert not any(PASSWORD in str(problem) for problem in problems)


def test_a_server_that_is_no_redis_is_unavailable(servers: PrivateServers, job: str) -> None:
    assert isinstance(problem_of(f"redis://127.0.0.1:{servers.rabbitmq.port}/0", job), StoreUnavailable)


def test_what_became_of_a_clients_updates_expires(own: PrivateServer, job: str) -> None:
    """Every id that ever published would keep a stream else; a client that goes on renews its own."""
    store = RedisStore(own.url, job)
    store.create(image(0), 1.0)
    store.commit(commit_of(0, 1, image(1), outcomes={"a": [("a/i/1", "applied")]}))
    assert 29 * 86_400 < store._redis.ttl(f"fedmq:{{{job}}}:outcomes:a") <= 30 * 86_400


@pytest.mark.parametrize("rights", [("+@read",), ("+@read", "+@connection")], ids=["read", "read and connection"])
def test_a_login_that_can_only_read_serves_a_worker(own: PrivateServer, job: str, rights: tuple[str, ...]) -> None:
    aggregator = RedisStore(own.url, job)
    aggregator.create(image(0), 1.0)
    step, taken = DeltaEntry(1, 0, len(record := pack(Delta(1, 0, False, {"name": "int8"}, b"q")))), image(1)
    snapshot = SnapshotEntry(1, "float32", taken.data.size)
    published = Publication("aa", (step, record), (snapshot, taken))
    aggregator.commit(
        commit_of(0, 1, taken, outcomes={"a": [("a/i/1", "applied")]}, publication=published)
    )  # fmt: skip
    aggregator.announce({"codec": "float32"})
    worker = RedisStore(login(own, "resetchannels", "~fedmq:*", *rights), job)
    for _ in range(2):
        head = worker.head()
        assert head is not None
        assert (head.revision, head.version) == (1, 1)
        assert worker.layout() == image(1).layout
        assert np.all(worker.model(1).weights == 1)
        assert worker.job() == {"codec": "float32"}
        assert worker.published(-1) == Index((snapshot,), (step,))
        assert worker.deltas([step])[0].payload == b"q"
        assert np.all(worker.snapshot(snapshot).weights == 1)
        assert worker.outcomes("a", 0) == ([("a/i/1", "applied")], 1)
        for connection in worker._redis.connection_pool._available_connections:
            connection.next_health_check = time.monotonic()  # as after a training of 15 s
    for forbidden in (
        lambda: worker.commit(commit_of(1, 2, image(2))),
        lambda: worker.announce({"codec": "none"}),
        lambda: worker.create(image(3), 1.0),
    ):
        with pytest.raises(SettingsError, match="refuses"):
            forbidden()
    head = aggregator.head()
    assert head is not None
    assert head.revision == 1
    worker.close()
    aggregator.close()


def test_a_login_of_one_job_reads_no_other(own: PrivateServer, job: str) -> None:
    RedisStore(own.url, "other").create(image(0), 1.0)
    worker = RedisStore(login(own, f"~fedmq:{{{job}}}:*", "+@read", "+@connection"), "other")
    with pytest.raises(SettingsError, match="refuses"):
        worker.head()
    worker.close()


def login(server: PrivateServer, *rules: str) -> str:
    """Add a login with these ACL rules; return a URL for it."""
    rules = rules if any(rule.startswith("~") for rule in rules) else ("~*", *rules)
    plain = redis.Redis.from_url(server.url)
    plain.execute_command("ACL", "SETUSER", "worker", "on", f">{PASSWORD}", *rules)
    plain.close()
    return server.url.replace("redis://", f"redis://worker:{PASSWORD}@")


def redis_version(server: PrivateServer) -> tuple[int, int]:
    plain = redis.Redis.from_url(server.url)
    major, minor = plain.info("server")["redis_version"].split(".")[:2]
    plain.close()
    return int(major), int(minor)


# Replicas


def test_a_commit_counts_when_the_replicas_have_it(
    servers: PrivateServers, job: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shared.store.redis.WAIT_MS", 400)
    replica = private_redis(tmp_path / "replica", {"replicaof": f"127.0.0.1 {servers.redis.port}"})
    replica.start()
    store = RedisStore(servers.redis.url, job, replicas=1)
    copy = RedisStore(replica.url, job)
    try:
        store.check()
        store._redis.config_set("repl-diskless-sync-delay", 0)
        wait_until(lambda: store._redis.info("replication").get("slave0", {}).get("state") == "online")
        assert store.create(image(0), 1.0)
        store.commit(commit_of(0, 1, image(1)))
        head = copy.head()
        assert head is not None
        assert head.version == 1  # it is there already
        replica.stop()
        second = commit_of(1, 2, image(2))
        with pytest.raises(StoreUnavailable, match=r"0 of 1 replicas .* FEDMQ_STORE_REPLICAS"):
            store.commit(second)
        replica.start()
        wait_until(lambda: store._redis.info("replication").get("slave0", {}).get("state") == "online")
        store.commit(second)  # the same once more: it is found done, and waited for
        third, another = commit_of(2, 3, image(3)), RedisStore(servers.redis.url, job, replicas=1)
        with frozen(replica):  # connected, but it answers nothing
            for client in (store, another):  # also over a connection that has written nothing before
                with pytest.raises(StoreUnavailable, match="0 of 1 replicas"):
                    client.commit(third)
        another.close()
        head = store.head()
        assert head is not None
        assert (head.revision, head.version) == (3, 3)
    finally:
        store.close()
        copy.close()
        replica.stop()


@pytest.mark.parametrize("denied", ["xadd", "zadd", "hset", "rename", "zremrangebyscore"])
def test_a_login_that_may_not_do_all_of_a_commit_does_nothing_of_it(servers, job, denied):
    admin = redis.Redis.from_url(servers.redis.url)
    admin.execute_command("ACL", "SETUSER", "half", "on", ">half", "~*", "+@all", f"-{denied}")
    RedisStore(servers.redis.url, job).create(image(0), 0.0)
    before = {key: admin.dump(key) for key in admin.keys(f"fedmq:{{{job}}}:*")}
    url = servers.redis.url.replace("redis://", "redis://half:half@")
    store = RedisStore(url, job)
    store.check()
    try:
        with pytest.raises(
            SettingsError, match=rf"does not let this login do {denied.upper()} .* nothing was committed"
        ):
            store.commit(commit_of(0, 1, image(1), applied={"a/i/0": 0}, arrays={"sum": array(1)}))
        left = {key: admin.dump(key) for key in admin.keys(f"fedmq:{{{job}}}:*") if b":stage:" not in key}
        assert left == before
    finally:
        admin.execute_command("ACL", "DELUSER", "half")
