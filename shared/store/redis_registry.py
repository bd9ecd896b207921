"""What an installation knows of its devices, and its audit log, in Redis.

fedmq:installation:devices  hash    <job>.<client> -> JSON: state, job, client, enrolled_at, rotated_at, revoked_at,
certificate_ends_at, token; times in unix seconds
fedmq:installation:audit    stream  what the operator did, an entry an event: kind, login, detail, source, at, count
fedmq:installation:refused  stream  failed logins and refusals, the same: of its own, as strangers decide how many
fedmq:installation:acl_log  string  JSON: entry of Redis' own log of refusals -> its count, and when last, as moved
"""

import heapq
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any

from shared.errors import SettingsError
from shared.store.redis_link import connect, translated
from shared.store.redis_watch import ACL_LOG_SEEN, AUDIT, DEVICES, REFUSALS

ANSWER_S_MAX = 10.0
EVENTS_MAX = 100_000  # of each stream, approximately: Redis trims whole nodes
PAGE = 1000
TEXT_CHARS_MAX = 1000  # of a login or detail: a stranger chooses some of it

AclLog = dict[str, tuple[int, float]]  # entry of Redis' log -> how often it had happened, and when last, unix seconds


# KEYS[1] devices; ARGV: login, the record as it was read ('' when there was none), the new one.
_PUT = """
if (redis.call('HGET', KEYS[1], ARGV[1]) or '') ~= ARGV[2] then return 0 end
redis.call('HSET', KEYS[1], ARGV[1], ARGV[3])
return 1
"""


class Kind(StrEnum):
    """What an event of the audit log is about."""

    ENROLLED = "enrolled"
    REVOKED = "revoked"
    ROTATED = "rotated"
    LOGIN_FAILED = "login_failed"
    REFUSED = "refused"


BY_STRANGERS = (Kind.LOGIN_FAILED, Kind.REFUSED)


@dataclass(frozen=True, slots=True)
class Event:
    """An entry of the audit log.

    Attributes:
        kind: what happened.
        login: whose; what a stranger gave for one where a login failed.
        detail: what was done or refused, and from where.
        source: who says so: `operator`, `rabbitmq` or `redis`.
        at: unix seconds by that one's clock.
        count: so often.
    """

    kind: str
    login: str
    detail: str
    source: str
    at: float
    count: int = 1


class AuditLog:
    """Appends to the audit log, and reads it.

    Args:
        url: of Redis.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self._redis = connect(url, ANSWER_S_MAX)

    def append(self, events: Sequence[Event], seen: AclLog | None = None) -> None:
        """Append events; durable on return where Redis syncs every write.

        Args:
            events: of any kind.
            seen: what of Redis' log is moved with them; None: that is as it was.
        """
        with translated(self.url), self._redis.pipeline(transaction=False) as pipe:
            for event in events:
                fields = {name: str(value)[:TEXT_CHARS_MAX] for name, value in asdict(event).items()}
                stream = REFUSALS if event.kind in BY_STRANGERS else AUDIT
                pipe.xadd(stream, fields, maxlen=EVENTS_MAX, approximate=True)
            if seen is not None:
                pipe.set(ACL_LOG_SEEN, json.dumps(seen))
            pipe.execute()

    def seen(self) -> AclLog:
        """Return what of Redis' log was moved before."""
        with translated(self.url):
            text = self._redis.get(ACL_LOG_SEEN)
        return {key: (int(count), float(at)) for key, (count, at) in json.loads(text or "{}").items()}

    def read(self, since_s: float = 0.0) -> Iterator[Event]:
        """Yield events of both streams written since, the oldest first.

        Args:
            since_s: unix seconds by Redis' clock.
        """
        for _, event in heapq.merge(*(self._read(name, since_s) for name in (AUDIT, REFUSALS)), key=_written):
            yield event

    def newest(self, count: int) -> list[Event]:
        """Return so many of the newest events of each stream, the oldest of them first."""
        found: list[_Entry] = []
        for stream in (AUDIT, REFUSALS):
            with translated(self.url):
                found += [_entry(*entry) for entry in self._redis.xrevrange(stream, count=count)]
        return [event for _, event in sorted(found, key=_written)]

    def close(self) -> None:
        """Close the connections."""
        self._redis.close()

    def _read(self, stream: str, since_s: float) -> "Iterator[_Entry]":
        start = f"{int(since_s * 1000)}-0"
        while True:
            with translated(self.url):
                page = self._redis.xrange(stream, start, count=PAGE)
            for identifier, fields in page:
                yield _entry(identifier, fields)
                start = f"({identifier.decode()}"
            if not page:
                return


class Changed(SettingsError):  # noqa: N818 - as VersionConflict
    """Somebody else has written a record meanwhile."""


class DeviceRegistry:
    """The devices of all jobs; a record is a dictionary, see the module's docstring.

    Args:
        url: of Redis.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self._redis = connect(url, ANSWER_S_MAX)

    def get(self, login: str) -> dict[str, Any] | None:
        """Return what is known of a device."""
        with translated(self.url):
            text = self._redis.hget(DEVICES, login)
        return None if text is None else dict(json.loads(text))

    def all(self) -> dict[str, dict[str, Any]]:
        """Return login -> record, sorted."""
        with translated(self.url):
            found = self._redis.hgetall(DEVICES)
        return {login.decode(): json.loads(text) for login, text in sorted(found.items())}

    def put(self, login: str, before: dict[str, Any] | None, record: dict[str, Any]) -> None:
        """Write a record in the place of the one read before.

        Raises:
            Changed: somebody else has written this device's meanwhile.
        """
        told = "" if before is None else json.dumps(before, sort_keys=True)
        with translated(self.url):
            done = self._redis.eval(_PUT, 1, DEVICES, login, told, json.dumps(record, sort_keys=True))
        if not done:
            raise Changed(f"{login} is being changed by somebody else: see `fedmq devices show`")

    def clients(self, job: str) -> dict[str, dict[str, Any]]:
        """Return what the aggregator of a job knows of its clients: when last seen, and more."""
        with translated(self.url):
            found = self._redis.hgetall(f"fedmq:{{{job}}}:clients")
        return {name.decode(): json.loads(text) for name, text in found.items()}

    def close(self) -> None:
        """Close the connections."""
        self._redis.close()


_Entry = tuple[tuple[int, int], Event]  # Redis' milliseconds and number of an entry, and what it says


def _entry(identifier: bytes, fields: Mapping[bytes, bytes]) -> _Entry:
    text = {name.decode(): value.decode(errors="replace") for name, value in fields.items()}
    milliseconds, _, number = identifier.decode().partition("-")
    return (int(milliseconds), int(number)), Event(
        text.get("kind", ""), text.get("login", ""), text.get("detail", ""), text.get("source", ""),
        float(text.get("at", 0)), int(text.get("count", 1)),
    )  # fmt: skip


def _written(entry: _Entry) -> tuple[int, int]:
    return entry[0]
