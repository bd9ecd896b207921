"""Failed logins and refusals of both servers, moved into the audit log; the exporter does it in a thread.

RabbitMQ publishes its log (log.exchange), Redis keeps a list of its own (ACL LOG). Much in both is chosen by strangers:
the login of somebody who is let in is taken only from where the server itself writes it.
"""

import contextlib
import re
import time
from collections.abc import Callable, Sequence

from ops.audit_window import Window
from shared.errors import FedMQError
from shared.store.redis_acl import Denial, RedisDenials
from shared.store.redis_registry import AclLog, AuditLog, Event, Kind
from shared.transport.audit import AuditQueue, LogLine

LINES_MAX = 256  # of RabbitMQ's log in one step
SAME_S = 0.5  # Redis 7.0 tells the age of an entry, to which the way of the answer adds
RABBITMQ, REDIS = "rabbitmq", "redis"

# Strangers choose most of a text, and patterns take time that grows with its square: they see its two ends alone. Every
# pattern is anchored: a connection's name, a queue's and a routing key stand in these texts as their sender chose them,
# line feeds and quotes included, but the address stands before them all, and who was refused at the very end.
HEAD_CHARS, TAIL_CHARS = 512, 1024  # a queue's name and a routing key have at most 255
_ADDRESS = re.compile(r"[^(]*\((\S+) -> ")
_LOGIN_REFUSED = re.compile(r"Error on .*^\S+ login refused: user '(.*)' - ([^'\n]*)", re.S | re.M)
_HTTP_DENIED = re.compile(r"HTTP access denied: (?:user '(.*)' - )?([^'\n]*)", re.S)
_REFUSED = re.compile(r"(?:.*: )?([^:]* refused for user '([\w.-]+)')")  # of the last line
_IMPOSTOR = re.compile(r"user_id .*authenticated user was '([\w.-]+)'", re.S)
_OPERATION = re.compile(r"^operation (\S+) caused ", re.M)


class Collector:
    """Moves what both servers refused into the audit log; each at least once, but see the repeated in audit_window.py.

    Args:
        queue: RabbitMQ's log.
        denials: Redis' log.
        audit: where they go.
        clock: seconds.
    """

    def __init__(
        self, queue: AuditQueue, denials: RedisDenials, audit: AuditLog, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._queue, self._denials, self._audit, self._clock = queue, denials, audit, clock
        self._seen: AclLog | None = None
        self._window = Window()

    def step(self) -> int:
        """Move what is there now; return the number of events.

        Raises:
            StoreUnavailable: nothing is lost, it is there at the next step.
            SettingsError: Redis refuses our login.
        """
        lines = self._queue.take(LINES_MAX)
        try:
            events = [event for line in lines if (event := of_line(line)) is not None]
            self._write(events)
        except BaseException:
            self._queue.link.reconnect("what was taken could not be written")  # it comes again
            raise
        self._queue.ack(lines)
        return len(events) + self._from_redis()

    def close(self) -> None:
        """Write what was counted, and close all connections."""
        with contextlib.suppress(FedMQError):
            self._audit.append(self._window.close())
        self._queue.close()
        self._denials.close()
        self._audit.close()

    def _from_redis(self) -> int:
        if self._seen is None:
            self._seen = self._audit.seen()
        events, seen = moved(self._denials.read(), self._seen)
        self._write(events, None if seen == self._seen else seen)
        self._seen = seen
        return len(events)

    def _write(self, events: Sequence[Event], seen: AclLog | None = None) -> None:
        window = self._window.copy()
        written = window.add(events, self._clock())
        if written or seen is not None:
            self._audit.append(written, seen)
        self._window = window  # not before: what could not be written comes again


def moved(denials: Sequence[Denial], seen: AclLog) -> tuple[list[Event], AclLog]:
    """Return what of Redis' log is new, as events that count only what is new.

    Args:
        denials: the log, the oldest first.
        seen: what of it was moved before.

    Returns:
        The events, and `seen` of the next time: of what is in the log now, so it is no longer than that.
    """
    known: AclLog = dict(seen)
    found: list[Event] = []
    for denial in denials:
        count, at = known.get(denial.key, (0, 0.0))
        grown = denial.count - count
        if denial.at < at - SAME_S or (denial.at <= at + SAME_S and grown <= 0):
            continue
        fresh = grown if grown > 0 else denial.count  # fewer than before: Redis has begun to count anew
        known[denial.key] = (denial.count, denial.at)
        if not _is_noise(denial):
            found.append(of_denial(denial, fresh))
    return found, {denial.key: known[denial.key] for denial in denials}


def of_line(line: LogLine) -> Event | None:
    """Return what an event of RabbitMQ's log says about a failed login or a refusal, None: it is about neither."""
    text = line.text
    if len(text) > HEAD_CHARS + TAIL_CHARS:
        text = f"{text[:HEAD_CHARS]} ... {text[-TAIL_CHARS:]}"
    address = _ADDRESS.match(text.partition("\n")[0])
    origin = f", from {address[1]}" if address else ""
    if found := _refused(text):
        return Event(Kind.REFUSED, found[0], f"{found[1]}{origin}", RABBITMQ, line.at)
    if matched := _LOGIN_REFUSED.fullmatch(text):
        return Event(Kind.LOGIN_FAILED, matched[1], f"{matched[2]}{origin}", RABBITMQ, line.at)
    if matched := _HTTP_DENIED.fullmatch(text):
        kind = Kind.REFUSED if "Not management user" in matched[2] else Kind.LOGIN_FAILED
        return Event(kind, matched[1] or "", f"management API: {matched[2]}", RABBITMQ, line.at)
    return None


def _refused(text: str) -> tuple[str, str] | None:
    """Return who was refused, and what."""
    last = text.rpartition("\n")[2]
    if found := _REFUSED.fullmatch(last):
        operation = _OPERATION.match(last)
        return found[2], f"{operation[1]}: {found[1]}" if operation else found[1]
    operation = _OPERATION.search(text)
    start = text.find(": user_id ", operation.end()) if operation else -1
    if operation and start >= 0 and (found := _IMPOSTOR.fullmatch(text, start + 2)):
        return found[1], f"{operation[1]}: {found[0]}"
    return None


def of_denial(denial: Denial, count: int) -> Event:
    """Return an entry of Redis' log as an event."""
    kind = Kind.LOGIN_FAILED if denial.reason == "auth" else Kind.REFUSED
    what = "wrong login or password" if denial.reason == "auth" else f"{denial.reason} {denial.object}"
    origin = f", from {denial.address}" if denial.address else ""
    return Event(kind, denial.login, f"{what}{origin}", REDIS, denial.at, count)


def _is_noise(denial: Denial) -> bool:
    """Client libraries say their name when they connect, and do not mind when they may not."""
    return denial.reason == "command" and denial.object.lower().startswith("client|setinfo")
