"""Logins at Redis: what each role may do there, and the commands that make, change and end a login.

A rule names every command; a command that is not named is refused. Keys of one job begin with `fedmq:{<job>}:`, and ids
have none of the characters that patterns know. Rules use no subcommand that Redis 7.0 lacks: it would refuse the whole
file; what 7.2 has besides (WAITAOF, CLIENT SETINFO) comes with the category of harmless connection commands.
"""

import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import redis

from shared.errors import SettingsError
from shared.store.redis_link import connect, translated
from shared.store.redis_watch import ACL_LOG_SEEN, REFUSALS
from shared.urls import hide_password

ANSWER_S_MAX = 10.0
ENTRIES_MAX = 10_000  # of Redis' log, read at once

READING = (
    "exists", "get", "mget", "getrange", "strlen", "hget", "hmget", "hgetall", "hkeys", "hlen", "hscan", "xrange",
    "xrevrange", "xlen", "zrange", "zrangebyscore", "zrevrange", "zcount", "zcard", "zscore", "type", "ttl", "pttl",
    "time",
)  # fmt: skip
WRITING = (
    "eval", "set", "setrange", "del", "unlink", "rename", "persist", "expire", "pexpire", "hset", "hdel", "xadd",
    "xtrim", "xdel", "zadd", "zrem", "zremrangebyscore", "zremrangebyrank", "multi", "exec", "discard",
)  # fmt: skip
PULLING = (  # all that a worker sends
    "exists", "get", "mget", "getrange", "strlen", "hget", "hgetall", "xrange", "zrangebyscore", "time",
)  # fmt: skip
CONNECTION = ("+@connection", "-@admin", "-@dangerous")  # PING, SELECT, WAIT, WAITAOF; not CLIENT LIST or KILL
DEVICE_KEYS = ("head", "layout", "job", "snapshots", "deltas", "meta:*", "model:*", "snapshot:*", "delta:*")


def device_rules(job: str, client: str) -> list[str]:
    """Return what a worker may do: read what it trains from and what became of its own updates."""
    keys = [f"%R~{_prefix(job)}{name}" for name in (*DEVICE_KEYS, f"outcomes:{client}")]
    return [*keys, "-@all", *_allowed(PULLING)]


def aggregator_rules(job: str) -> list[str]:
    """Return what an aggregator may do: everything with its job's keys, and ask how durable the server is."""
    asking = ("info", "config|get")
    return [f"~{_prefix(job)}*", "-@all", *CONNECTION, *_allowed((*READING, *WRITING, *asking))]


def evaluator_rules(job: str) -> list[str]:
    """Return what an evaluator may do: read its job, write what it measured."""
    keys = [f"%R~{_prefix(job)}*", f"~{_prefix(job)}evaluations", f"~{_prefix(job)}meta:*"]
    return [
        *keys,
        "-@all",
        *CONNECTION,
        *_allowed((*READING, "eval", "hset", "xadd", "info", "multi", "exec", "discard")),
    ]


def exporter_rules() -> list[str]:
    """Return what the exporter may do: read all jobs, write of refusals; not of what the operator did."""
    asking = ("scan", "info", "config|get", "acl|log", "memory|usage")
    written = [f"~{REFUSALS}", f"~{ACL_LOG_SEEN}"]
    return ["%R~fedmq:*", *written, "-@all", *CONNECTION, *_allowed((*READING, "xadd", "set", *asking))]


def redis_exporter_rules() -> list[str]:
    """Return what Prometheus' exporter of Redis may do: numbers about the server, no key."""
    asking = (
        "info", "config|get", "client|list", "slowlog|get", "slowlog|len", "latency|latest", "latency|history",
        "latency|histogram", "memory|stats", "dbsize",
    )  # fmt: skip
    return ["-@all", *CONNECTION, *_allowed(asking)]


def operator_rules() -> list[str]:
    """Return what the operator may do: everything."""
    return ["~*", "&*", "+@all"]


def acl_line(login: str, password: str, rules: Iterable[str]) -> str:
    """Return a login as a line of users.acl, which holds no password, only its SHA-256."""
    digest = hashlib.sha256(password.encode()).hexdigest()
    return " ".join(["user", login, "on", f"#{digest}", *rules])


# Who gives no login is nobody: `off` alone sees to that. Its rights stay whole, as Redis loads its own append-only file
# with them: without, it throws away every transaction in it, which is every commit.
DEFAULT_OFF = "user default off resetpass ~* &* +@all"


@dataclass(frozen=True, slots=True)
class Denial:
    """An entry of Redis' own log of refusals; it counts the same refusal again within a minute in one entry.

    Attributes:
        key: the same for the same entry.
        reason: `auth`, `command`, `key` or `channel`.
        login: who was refused.
        object: the command, key or channel; `AUTH` of a wrong password.
        address: of the client.
        count: how often.
        at: of the last time, unix seconds by Redis' clock.
    """

    key: str
    reason: str
    login: str
    object: str
    address: str
    count: int
    at: float


class RedisLogins:
    """Makes and ends logins; for the operator.

    Args:
        url: of Redis with a login that may do so.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self._redis = connect(url, ANSWER_S_MAX)

    def check(self) -> None:
        """Make sure that logins outlive a restart of Redis.

        Raises:
            StoreUnavailable: it cannot be reached.
            SettingsError: it keeps logins in memory alone, or refuses ours.
        """
        with translated(self.url):
            if not self._redis.config_get("aclfile").get("aclfile"):
                raise SettingsError(
                    f"Redis at {hide_password(self.url)} has no aclfile, so its next start would forget every login: "
                    "start it with `aclfile /run/fedmq/users.acl`, see broker_config/redis.conf"
                )

    def put(self, login: str, password: str, rules: Iterable[str]) -> None:
        """Make a login, or give it another password and these rules alone; connections made before stay."""
        with translated(self.url):
            self._redis.execute_command("ACL SETUSER", login, "reset", "on", f">{password}", *rules)
            self._save()

    def delete(self, login: str) -> bool:
        """End a login, Redis closes its connections at once; tell whether there was one."""
        with translated(self.url):
            deleted = int(self._redis.execute_command("ACL DELUSER", login))
            self._save()  # also when nothing was deleted: a crash may have come in between
        return bool(deleted)

    def close_connections(self, login: str) -> int:
        """Close the connections of a login; return how many there were, 0 also if there is no such login."""
        with translated(self.url):
            try:
                return int(self._redis.execute_command("CLIENT KILL", "USER", login))
            except redis.ResponseError as error:
                if "No such user" in str(error):
                    return 0
                raise

    def names(self) -> set[str]:
        """Return all logins."""
        with translated(self.url):
            return {_text(name) for name in self._redis.execute_command("ACL USERS")}

    def close(self) -> None:
        """Close the connections to Redis."""
        self._redis.close()

    def _save(self) -> None:
        try:
            self._redis.execute_command("ACL SAVE")
        except redis.ResponseError as error:
            raise SettingsError(
                f"Redis at {hide_password(self.url)} cannot write its aclfile ({error}): the change is lost at its "
                "next start; its folder must belong to Redis' user and have room, then do this again"
            ) from error


class RedisDenials:
    """Reads Redis' own log of refusals (ACL LOG), which keeps the last `acllog-max-len`.

    Args:
        url: of Redis with a login that may.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self._redis = connect(url, ANSWER_S_MAX)

    def read(self) -> list[Denial]:
        """Return the entries, the oldest first."""
        with translated(self.url), self._redis.pipeline(transaction=False) as pipe:
            pipe.execute_command("ACL LOG", ENTRIES_MAX)
            pipe.time()
            entries, (seconds, microseconds) = pipe.execute()
        now = seconds + microseconds / 1e6
        denials = [_denial(_fields(entry), now) for entry in entries]
        return sorted(denials, key=lambda denial: denial.at)

    def close(self) -> None:
        """Close the connections to Redis."""
        self._redis.close()


def _denial(fields: dict[str, str], now: float) -> Denial:
    reason, login, named = fields["reason"], fields["username"], fields["object"]
    at = int(fields["timestamp-last-updated"]) / 1000 if "timestamp-last-updated" in fields else 0.0
    at = at or now - float(fields["age-seconds"])
    address = re.search(r"\baddr=(\S+)", fields.get("client-info", ""))
    # An entry has an id from 7.2 on, which begins anew with Redis. Before, the same refusal within a minute is the same
    # entry: ops/audit.py goes by time.
    if "entry-id" in fields:
        key = f"{fields['entry-id']}@{fields['timestamp-created']}"
    else:
        parts = "\0".join((reason, fields["context"], login, named))
        key = hashlib.blake2b(parts.encode(), digest_size=12).hexdigest()
    return Denial(key, reason, login, named, address[1] if address else "", int(fields["count"]), at)


def _fields(entry: Any) -> dict[str, str]:
    """Read an entry as redis-py gives it: parsed, or names and values in turn."""
    pairs = entry.items() if isinstance(entry, dict) else zip(entry[::2], entry[1::2], strict=True)
    fields: dict[str, str] = {}
    for name, value in pairs:
        if isinstance(value, dict):  # client-info, parsed
            fields[_text(name)] = " ".join(f"{_text(part)}={_text(of)}" for part, of in value.items())
        else:
            fields[_text(name)] = _text(value)
    return fields


def _text(value: Any) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value)


def _prefix(job: str) -> str:
    return f"fedmq:{{{job}}}:"


def _allowed(commands: Iterable[str]) -> list[str]:
    return [f"+{command}" for command in commands]
