"""Failed logins and refusals of both servers, moved into the audit log; the exporter does it in a thread.

RabbitMQ publishes its log (log.exchange), Redis keeps a list of its own (ACL LOG). Much in both is chosen by strangers:
the login of somebody who is let in is taken only from where the server itself writes it.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from shared.store.redis_acl import Denial, RedisDenials
from shared.store.redis_registry import AuditLog, Event, Kind
from shared.transport.audit import AuditQueue, LogLine

LINES_MAX = 256  # of RabbitMQ's log in one step
REMEMBERED = 1000  # events of the audit log, looked at when starting: what stands there is not written again
SAME_S = 0.5  # Redis 7.0 tells the age of an entry, to which the way of the answer adds
RABBITMQ, REDIS = "rabbitmq", "redis"

# Anchored: a connection's name, a queue's and a routing key stand in these texts as their sender chose them, line feeds
# and quotes included, but the address stands before them all, and who was refused at the very end.
_ADDRESS = re.compile(r"\A[^(\n]*\((\S+) -> ")
_LOGIN_REFUSED = re.compile(r"\AError on .*^\S+ login refused: user '(.*)' - ([^'\n]*)\Z", re.S | re.M)
_HTTP_DENIED = re.compile(r"\AHTTP access denied: (?:user '(.*)' - )?([^'\n]*)\Z", re.S)
_REFUSED = re.compile(r"(?:.*^operation (\S+) caused [^\n]*?: )?([^:\n]*? refused for user '([\w.-]+)')\Z", re.S | re.M)
_IMPOSTOR = re.compile(r"^operation (\S+) caused .*?: (user_id .*authenticated user was '([\w.-]+)')\Z", re.S | re.M)


class Collector:
    """Moves what both servers refused into the audit log; each at least once.

    Args:
        queue: RabbitMQ's log.
        denials: Redis' log.
        audit: where they go.
    """

    def __init__(self, queue: AuditQueue, denials: RedisDenials, audit: AuditLog) -> None:
        self._queue, self._denials, self._audit = queue, denials, audit
        self._seen: Seen | None = None

    def step(self) -> int:
        """Move what is there now; return the number of events.

        Raises:
            StoreUnavailable: nothing is lost, it is there at the next step.
            SettingsError: Redis refuses our login.
        """
        lines = self._queue.take(LINES_MAX)
        try:
            events = [event for line in lines if (event := of_line(line)) is not None]
            self._audit.append(events)
        except BaseException:
            self._queue.link.reconnect("what was taken could not be written")  # it comes again
            raise
        self._queue.ack(lines)
        return len(events) + self._from_redis()

    def close(self) -> None:
        """Close all connections."""
        self._queue.close()
        self._denials.close()
        self._audit.close()

    def _from_redis(self) -> int:
        if self._seen is None:
            self._seen = Seen.of(self._audit.newest(REMEMBERED))
        fresh = self._seen.fresh(self._denials.read())
        self._audit.append([event for event, _ in fresh])
        for _, denial in fresh:
            self._seen.note(denial)
        return len(fresh)


@dataclass
class Seen:
    """What of Redis' log stands in the audit log already.

    Attributes:
        entries: key of an entry -> how often it had happened, and when last, unix seconds.
    """

    entries: dict[str, tuple[int, float]] = field(default_factory=dict)

    @classmethod
    def of(cls, events: Sequence[Event]) -> "Seen":
        """Read it from the audit log's newest events, the oldest first."""
        seen = cls()
        for event in events:
            if event.source == REDIS and event.ref:
                key, _, total = event.ref.rpartition(" ")
                seen.entries[key] = (int(total), event.at)
        return seen

    def fresh(self, denials: Sequence[Denial]) -> list[tuple[Event, Denial]]:
        """Return what is new, as events that count only what is new."""
        now: dict[str, tuple[int, float]] = dict(self.entries)
        found: list[tuple[Event, Denial]] = []
        for denial in denials:
            count, at = now.get(denial.key, (0, 0.0))
            grown = denial.count - count
            if denial.at < at - SAME_S or (denial.at <= at + SAME_S and grown <= 0):
                continue
            fresh = grown if grown > 0 else denial.count  # fewer than before: Redis has begun to count anew
            now[denial.key] = (denial.count, denial.at)
            if not _is_noise(denial):
                found.append((of_denial(denial, fresh), denial))
        return found

    def note(self, denial: Denial) -> None:
        """Remember that an entry is in the audit log."""
        self.entries[denial.key] = (denial.count, denial.at)


def of_line(line: LogLine) -> Event | None:
    """Return what an event of RabbitMQ's log says about a failed login or a refusal, None: it is about neither."""
    address = _ADDRESS.search(line.text)
    origin = f", from {address[1]}" if address else ""
    if found := _IMPOSTOR.search(line.text) or _REFUSED.search(line.text):
        operation = f"{found[1]}: " if found[1] else ""
        return Event(Kind.REFUSED, found[3], f"{operation}{found[2]}{origin}", RABBITMQ, line.at)
    if found := _LOGIN_REFUSED.search(line.text):
        return Event(Kind.LOGIN_FAILED, found[1], f"{found[2]}{origin}", RABBITMQ, line.at)
    if found := _HTTP_DENIED.search(line.text):
        kind = Kind.REFUSED if "Not management user" in found[2] else Kind.LOGIN_FAILED
        return Event(kind, found[1] or "", f"management API: {found[2]}", RABBITMQ, line.at)
    return None


def of_denial(denial: Denial, count: int) -> Event:
    """Return an entry of Redis' log as an event."""
    kind = Kind.LOGIN_FAILED if denial.reason == "auth" else Kind.REFUSED
    what = "wrong login or password" if denial.reason == "auth" else f"{denial.reason} {denial.object}"
    origin = f", from {denial.address}" if denial.address else ""
    ref = f"{denial.key} {denial.count}"
    return Event(kind, denial.login, f"{what}{origin}", REDIS, denial.at, count, ref)


def _is_noise(denial: Denial) -> bool:
    """Client libraries say their name when they connect, and do not mind when they may not."""
    return denial.reason == "command" and denial.object.lower().startswith("client|setinfo")
