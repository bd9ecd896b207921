"""What an installation knows of its devices, and its audit log, in Redis.

fedmq:installation:devices  hash    <job>.<client> -> JSON: state, job, client, enrolled_at, rotated_at, revoked_at,
certificate_ends_at, token; times in unix seconds
fedmq:installation:audit    stream  one entry an event: kind, login, detail, source, at, count, ref
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any

from shared.errors import SettingsError
from shared.store.redis_link import connect, translated
from shared.store.redis_watch import AUDIT, DEVICES

ANSWER_S_MAX = 10.0
EVENTS_MAX = 100_000  # approximately: Redis trims whole nodes
PAGE = 1000
TEXT_CHARS_MAX = 1000  # of a login or detail: a stranger chooses some of it


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


@dataclass(frozen=True, slots=True)
class Event:
    """An entry of the audit log.

    Attributes:
        kind: what happened.
        login: whose; what a stranger gave for one where a login failed.
        detail: what was done or refused, and from where.
        source: who says so: `operator`, `rabbitmq` or `redis`.
        at: unix seconds by that one's clock.
        count: so often, of refusals by Redis.
        ref: of an entry in Redis' own log, by which it is known again.
    """

    kind: str
    login: str
    detail: str
    source: str
    at: float
    count: int = 1
    ref: str = ""


class AuditLog:
    """Appends to the audit log, and reads it.

    Args:
        url: of Redis.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self._redis = connect(url, ANSWER_S_MAX)

    def append(self, events: Sequence[Event]) -> None:
        """Append events; durable on return where Redis syncs every write."""
        with translated(self.url), self._redis.pipeline(transaction=False) as pipe:
            for event in events:
                fields = {name: str(value)[:TEXT_CHARS_MAX] for name, value in asdict(event).items()}
                pipe.xadd(AUDIT, fields, maxlen=EVENTS_MAX, approximate=True)
            pipe.execute()

    def read(self, since_s: float = 0.0) -> Iterator[Event]:
        """Yield events written since, the oldest first.

        Args:
            since_s: unix seconds by Redis' clock.
        """
        start = f"{int(since_s * 1000)}-0"
        while True:
            with translated(self.url):
                page = self._redis.xrange(AUDIT, start, count=PAGE)
            for identifier, fields in page:
                yield _event(fields)
                start = f"({identifier.decode()}"
            if not page:
                return

    def newest(self, count: int) -> list[Event]:
        """Return so many of the newest events, the oldest of them first."""
        with translated(self.url):
            return [_event(fields) for _, fields in reversed(self._redis.xrevrange(AUDIT, count=count))]

    def close(self) -> None:
        """Close the connections."""
        self._redis.close()


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
            SettingsError: somebody else has written this device's meanwhile.
        """
        told = "" if before is None else json.dumps(before, sort_keys=True)
        with translated(self.url):
            done = self._redis.eval(_PUT, 1, DEVICES, login, told, json.dumps(record, sort_keys=True))
        if not done:
            raise SettingsError(f"{login} is being changed by somebody else: see `fedmq devices show`")

    def clients(self, job: str) -> dict[str, dict[str, Any]]:
        """Return what the aggregator of a job knows of its clients: when last seen, and more."""
        with translated(self.url):
            found = self._redis.hgetall(f"fedmq:{{{job}}}:clients")
        return {name.decode(): json.loads(text) for name, text in found.items()}

    def close(self) -> None:
        """Close the connections."""
        self._redis.close()


def _event(fields: dict[bytes, bytes]) -> Event:
    text = {name.decode(): value.decode(errors="replace") for name, value in fields.items()}
    return Event(
        text.get("kind", ""), text.get("login", ""), text.get("detail", ""), text.get("source", ""),
        float(text.get("at", 0)), int(text.get("count", 1)), text.get("ref", ""),
    )  # fmt: skip
