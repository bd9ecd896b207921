"""What each login may do at the store, asked of a real Redis as an installation has it; test_identity.py: RabbitMQ."""

import json
import socket
import ssl
from urllib.parse import urlsplit

import pytest
import redis

from ops.audit import Collector
from shared.store import redis_acl
from shared.store.redis_acl import RedisDenials
from shared.store.redis_registry import AuditLog
from shared.store.redis_watch import AUDIT, REFUSALS
from shared.transport import names
from tests.secured_fixture import DEVICE, JOB, NEIGHBOUR, OTHER, installation, secured, store

__all__ = ["installation", "secured"]

OURS, THEIRS = f"fedmq:{{{JOB}}}:", f"fedmq:{{{OTHER}}}:"
KEYS = {
    "string": (f"{OURS}state", f"{OURS}state:sum:0", f"{OURS}tag:production"),
    "hash": (f"{OURS}clients", f"{OURS}kept", "fedmq:installation:devices"),
    "stream": (
        f"{OURS}ledger", f"{OURS}evaluations", f"{OURS}outcomes:{NEIGHBOUR}",
        f"{OURS}outcomes:{DEVICE}x", "fedmq:installation:audit", "fedmq:installation:refused",
    ),
    "zset": (f"{OURS}applied", f"{OURS}refused", f"{OURS}versions"),
}  # fmt: skip
OTHERS = {
    "string": (f"{THEIRS}layout", f"{THEIRS}model:1:0", f"{THEIRS}snapshot:1:0", f"{THEIRS}delta:1:0"),
    "hash": (f"{THEIRS}head", f"{THEIRS}job", f"{THEIRS}meta:1", f"{THEIRS}snapshots"),
    "stream": (f"{THEIRS}outcomes:{DEVICE}",),
    "zset": (f"{THEIRS}deltas",),
}  # fmt: skip
READ = {"string": ("GET",), "hash": ("HGETALL",), "stream": ("XRANGE", "-", "+"), "zset": ("ZRANGEBYSCORE", "0", "1")}
OWN = {
    "head": "HGETALL", "layout": "GET", "job": "HGETALL", "snapshots": "HGETALL", "meta:1": "HGETALL",
    "model:1:0": "GET", "snapshot:1:0": "GET", "delta:1:0": "GET",
}  # fmt: skip


def refused_by_redis(client, *command):
    """Tell whether Redis answers NOPERM, without a look at what else may be wrong with the command."""
    try:
        client.execute_command(*command)
    except redis.exceptions.NoPermissionError:
        return True
    except redis.ResponseError as error:
        return "NOPERM" in str(error) or "DEBUG command not allowed" in str(error)
    return False


@pytest.fixture(scope="module")
def as_device(installation):
    client = store(installation.servers, installation.store_url(DEVICE))
    yield client
    client.close()


@pytest.mark.parametrize(
    ("kind", "key"), [(kind, key) for table in (KEYS, OTHERS) for kind, keys in table.items() for key in keys]
)  # fmt: skip
def test_redis_shows_a_device_nothing_but_what_it_trains_from(as_device, kind, key):
    command, *more = READ[kind]
    assert refused_by_redis(as_device, command, key, *more)
    assert refused_by_redis(as_device, "EXISTS", key)


@pytest.mark.parametrize("name", OWN)
def test_redis_shows_a_device_what_it_trains_from(as_device, name):
    assert not refused_by_redis(as_device, OWN[name], f"{OURS}{name}")


def test_redis_shows_a_device_its_own_outcomes_deltas_and_time(as_device):
    assert not refused_by_redis(as_device, "XRANGE", f"{OURS}outcomes:{DEVICE}", "-", "+")
    assert not refused_by_redis(as_device, "ZRANGEBYSCORE", f"{OURS}deltas", "(1", "+inf")
    assert not refused_by_redis(as_device, "MGET", f"{OURS}delta:1:0", f"{OURS}delta:1:1")
    assert not refused_by_redis(as_device, "TIME")


HEAD, MINE = f"{OURS}head", f"{OURS}outcomes:{DEVICE}"
REDIS_ACTS = [
    ("SET", HEAD, "x"), ("SETEX", HEAD, 1, "x"), ("SETNX", "x", "x"), ("APPEND", HEAD, "x"), ("GETSET", HEAD, "x"),
    ("GETDEL", HEAD), ("GETEX", HEAD, "PERSIST"), ("MSET", "x", "y"), ("DEL", HEAD), ("UNLINK", HEAD),
    ("HSET", HEAD, "version", 9), ("HDEL", HEAD, "version"), ("HINCRBY", HEAD, "version", 1), ("RENAME", HEAD, "x"),
    ("COPY", HEAD, "x"), ("MOVE", HEAD, 1), ("EXPIRE", HEAD, 1), ("PERSIST", HEAD), ("TOUCH", HEAD), ("DUMP", HEAD),
    ("RESTORE", "x", 0, "y"), ("MIGRATE", "h", 1, "", 0, 1), ("XADD", MINE, "*", "a", "b"),
    ("XTRIM", MINE, "MAXLEN", 0), ("XDEL", MINE, "0-1"), ("XGROUP", "CREATE", MINE, "g", "$"),
    ("XREAD", "STREAMS", MINE, "0"), ("LPUSH", "x", "y"), ("SADD", "x", "y"), ("ZADD", "x", 1, "y"), ("SORT", HEAD),
    ("OBJECT", "FREQ", HEAD), ("TYPE", HEAD), ("EVAL", "return 1", 0),
    ("EVAL", f"return redis.call('HSET', '{HEAD}', 'version', 9)", 0), ("EVAL_RO", "return 1", 0),
    ("EVALSHA", "x", 0), ("FCALL", "x", 0), ("FUNCTION", "LOAD", "#!lua name=x"), ("FUNCTION", "FLUSH"),
    ("SCRIPT", "LOAD", "return 1"), ("SCRIPT", "FLUSH"), ("MULTI",), ("WATCH", HEAD), ("BLPOP", "x", 1),
    ("FLUSHALL",), ("FLUSHDB",), ("SWAPDB", 0, 1), ("SELECT", 1), ("KEYS", "*"), ("SCAN", 0), ("RANDOMKEY",),
    ("DBSIZE",), ("CONFIG", "GET", "*"), ("CONFIG", "SET", "appendonly", "no"), ("CONFIG", "REWRITE"), ("INFO",),
    ("SAVE",), ("BGSAVE",), ("BGREWRITEAOF",), ("SHUTDOWN",), ("REPLICAOF", "h", 1), ("PSYNC", "?", -1),
    ("MODULE", "LIST"), ("DEBUG", "SLEEP", 0), ("MONITOR",), ("SLOWLOG", "GET"), ("LATENCY", "LATEST"),
    ("MEMORY", "USAGE", HEAD), ("COMMAND",), ("WAIT", 0, 1), ("ACL", "WHOAMI"), ("ACL", "LIST"), ("ACL", "USERS"),
    ("ACL", "LOG"), ("ACL", "SETUSER", "x"), ("ACL", "DELUSER", "x"), ("ACL", "GENPASS"), ("ACL", "SAVE"),
    ("CLIENT", "KILL", "USER", "x"), ("CLIENT", "LIST"), ("CLIENT", "PAUSE", 1), ("CLIENT", "NO-EVICT", "on"),
    ("CLIENT", "TRACKING", "on"), ("PUBLISH", "x", "y"), ("SUBSCRIBE", "x"), ("PSUBSCRIBE", "*"),
    ("SPUBLISH", "x", "y"), ("PUBSUB", "CHANNELS"),
]  # fmt: skip


@pytest.mark.parametrize("command", REDIS_ACTS, ids=lambda command: " ".join(map(str, command))[:40])
def test_redis_refuses_a_device(installation, command):
    client = store(installation.servers, installation.store_url(DEVICE))
    try:
        assert refused_by_redis(client, *command)
    finally:
        client.close()


def commands_of(operator):
    """Yield every command of this Redis, subcommands too, as name|subcommand, with as many arguments as it asks for."""
    for name, told in operator.execute_command("COMMAND").items():
        subcommands = told.get("subcommands") or ()
        if not subcommands:
            yield name, abs(told["arity"]) - 1
        for sub, arity, *_ in subcommands:
            yield sub.decode(), abs(arity) - 2


LOOKING = {"info", "config|get"}
NAMED = {
    "device": {
        "exists", "get", "mget", "getrange", "strlen", "hget", "hgetall", "xrange", "zrangebyscore", "time",
    },
    "aggregator": {*redis_acl.READING, *redis_acl.WRITING, *LOOKING},
    "evaluator": {*redis_acl.READING, "eval", "hset", "xadd", "info", "multi", "exec", "discard"},
    "exporter": {*redis_acl.READING, *LOOKING, "xadd", "set", "scan", "acl|log", "memory|usage"},
    "redis-exporter": {
        *LOOKING, "client|list", "slowlog|get", "slowlog|len", "latency|latest", "latency|history",
        "latency|histogram", "memory|stats", "dbsize",
    },
}  # fmt: skip
FREE = {"auth", "hello", "quit", "reset"}  # anybody may, logged in or not


@pytest.mark.parametrize("who", NAMED)
def test_redis_lets_nobody_use_another_command_than_those_named(installation, who):
    """Every command there is, not only those one thinks of: ACL DRYRUN says what would be refused."""
    operator = store(installation.servers, installation.store_url("operator"))
    own, risky = (
        {str(name) for kind in kinds for name in operator.execute_command("ACL CAT", kind)}
        for kinds in (("connection",), ("dangerous", "admin"))
    )  # of one's own connection: no harm comes of it
    allowed = NAMED[who] | FREE | (set() if who == "device" else own - risky)
    login = urlsplit(service_url(installation, DEVICE if who == "device" else who)).username
    refused, let = set(), set()
    for name, arguments in commands_of(operator):
        answer = operator.execute_command("ACL DRYRUN", login, *name.split("|"), *["1"] * arguments)
        (refused if b"has no permissions to run" in answer else let).add(name)
    assert let - allowed == set()
    assert NAMED[who] - let == set()
    assert len(refused) > 200
    operator.close()


def test_a_devices_keys_could_not_be_written_even_if_a_command_could(installation):
    operator = store(installation.servers, installation.store_url("operator"))
    login = urlsplit(installation.store_url(DEVICE)).username
    told = operator.acl_getuser(login)
    assert len(told["keys"]) == len(OWN) + 2
    assert all(pattern.startswith(f"%R~{OURS}") for pattern in told["keys"])
    assert not told["channels"]
    assert not told["selectors"]
    operator.close()


@pytest.mark.parametrize("who", ["aggregator", "evaluator", "exporter", "redis-exporter"])
@pytest.mark.parametrize(
    "command",
    [
        ("FLUSHALL",), ("FLUSHDB",), ("SWAPDB", 0, 1), ("KEYS", "*"), ("RANDOMKEY",),
        ("CONFIG", "SET", "appendonly", "no"), ("CONFIG", "REWRITE"), ("SHUTDOWN",), ("REPLICAOF", "h", 1),
        ("DEBUG", "SLEEP", 0), ("MONITOR",), ("ACL", "LIST"), ("ACL", "SETUSER", "x"), ("ACL", "DELUSER", "x"),
        ("CLIENT", "KILL", "USER", "x"), ("CLIENT", "PAUSE", 1), ("FUNCTION", "FLUSH"), ("SCRIPT", "FLUSH"),
        ("MODULE", "LIST"), ("PUBLISH", "x", "y"), ("SUBSCRIBE", "x"), ("SAVE",), ("MIGRATE", "h", 1, "", 0, 1),
        ("HSET", f"{THEIRS}head", "version", 9), ("HSET", "fedmq:installation:devices", "x", "y"),
        ("DEL", "fedmq:installation:audit"), ("SET", "x", "y"), ("XADD", "fedmq:installation:audit", "*", "a", "b"),
        ("DEL", "fedmq:installation:refused"),
    ],
    ids=lambda command: " ".join(map(str, command))[:40],
)  # fmt: skip
def test_redis_refuses_a_service_what_is_the_operators(installation, who, command):
    client = store(installation.servers, service_url(installation, who))
    try:
        assert refused_by_redis(client, *command)
    finally:
        client.close()


def service_url(installation, who):
    if who != "redis-exporter":
        return installation.store_url(who)
    password = next(iter(json.loads((installation.servers.secrets / who / "password.json").read_text()).values()))
    return f"rediss://{names.REDIS_EXPORTER}:{password}@localhost"


@pytest.mark.parametrize("who", ["aggregator", "evaluator"])
@pytest.mark.parametrize(
    ("kind", "key"),
    [(kind, key) for kind, keys in OTHERS.items() for key in keys] + [("hash", "fedmq:installation:devices")],
)
def test_a_service_of_one_job_sees_nothing_of_another(installation, who, kind, key):
    client = store(installation.servers, installation.store_url(who))
    command, *more = READ[kind]
    assert refused_by_redis(client, command, key, *more)
    script = f"return redis.call('EXISTS', '{key}')"
    with pytest.raises(redis.ResponseError, match=r"can't access|ACL failure"):
        client.execute_command("EVAL", script, 0)  # a key it does not name
    client.close()


@pytest.mark.parametrize("key", [f"{OURS}head", f"{OURS}clients", f"{OURS}job"])
@pytest.mark.parametrize("who", ["evaluator", "exporter"])
def test_who_only_looks_changes_nothing(installation, who, key):
    client = store(installation.servers, installation.store_url(who))
    assert not refused_by_redis(client, "HGETALL", key)
    assert refused_by_redis(client, "HSET", key, "version", 9)
    assert refused_by_redis(client, "XADD", f"{OURS}ledger", "*", "a", "b")  # which both may, elsewhere
    assert refused_by_redis(client, "EVAL", f"return redis.call('HSET', '{key}', 'version', 9)", 1, key)
    client.close()


def test_the_exporter_of_redis_sees_no_key(installation):
    client = store(installation.servers, service_url(installation, "redis-exporter"))
    assert "redis_version" in client.info("server")
    assert client.execute_command("CLIENT LIST")
    for command in (("GET", HEAD), ("SCAN", 0), ("EXISTS", HEAD), ("TYPE", HEAD), ("MEMORY", "USAGE", HEAD)):
        assert refused_by_redis(client, *command), command
    client.close()


def test_who_does_not_log_in_is_nobody(installation):
    client = redis.Redis(
        "localhost", installation.servers.redis.port, ssl=True, protocol=2, driver_info=None,
        ssl_ca_certs=str(installation.servers.secrets / "ca" / "ca.pem"),
    )  # fmt: skip
    for command in (("PING",), ("GET", HEAD), ("INFO",)):
        with pytest.raises(redis.AuthenticationError, match="Authentication required"):
            client.execute_command(*command)
    with pytest.raises(redis.AuthenticationError, match="user is disabled"):
        client.execute_command("AUTH", "default", "")
    client.close()


# The audit log


class NoQueue:
    """RabbitMQ's log with nothing in it."""

    def take(self, _limit):
        return []

    def ack(self, lines):
        pass

    def close(self):
        pass


def collector_of(url):
    return Collector(NoQueue(), RedisDenials(url), AuditLog(url))


def test_a_thousand_strangers_push_nothing_of_the_operators_out(installation):
    """More entries than any audit log was once read back, as many as Redis' own log holds, from one address."""
    operator = store(installation.servers, installation.store_url("operator"))
    operator.config_set("acllog-max-len", 1500)
    url = installation.store_url("exporter")
    first = collector_of(url)
    first.step()
    refused = operator.xlen(REFUSALS)
    operated = operator.xrange(AUDIT)
    context = ssl.create_default_context(cafile=str(installation.servers.secrets / "ca" / "ca.pem"))
    address = ("localhost", installation.servers.redis.port)
    with socket.create_connection(address, 10) as plain, context.wrap_socket(plain, server_hostname="localhost") as raw:
        answers = raw.makefile("rb")
        for number in range(1200):
            raw.sendall(b"AUTH stranger-%d x\r\n" % number)
            assert answers.readline().startswith(b"-WRONGPASS")
    assert first.step() == 1200
    first.close()
    again = collector_of(url)
    assert again.step() == 0, "a restart writes nothing twice"
    again.close()
    audit = AuditLog(installation.store_url("operator"))
    strangers = [event for event in audit.read() if "stranger-" in event.login]
    assert sum(event.count for event in strangers) == 1200
    assert len(strangers) <= 2, "the first, and how many came after it"
    assert operator.xlen(REFUSALS) - refused < 50
    assert operator.xrange(AUDIT) == operated
    assert [event.kind for event in audit.newest(1) if event.source == "operator"] == ["enrolled"]
    kinds = [event.kind for event in audit.read()]
    assert kinds.index("enrolled") < kinds.index("login_failed"), "both streams, by time"
    audit.close()
    operator.close()
