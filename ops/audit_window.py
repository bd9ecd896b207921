"""A bound on what strangers can write into the audit log: of what happens again within a minute, only the number.

The first of a kind is written at once, alone; what follows is counted, and written as one entry when the minute is
over: a program that is killed loses that number. Who fails to log in may give any name: those are one by address. Who
is refused is known: those are one by login.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from shared.store.redis_registry import Event, Kind

WINDOW_S = 60.0
ENTRIES_MAX = 100  # of a kind and source written one by one in a window; the others are one number
LOGINS_MAX = 1000  # told apart of one address

_HOST = re.compile(r", from (\S+):\d+\Z")  # of_line() and of_denial() write it there

Key = tuple[str, ...]


@dataclass
class Repeated:
    """What happened again in this window.

    Attributes:
        last: the newest event.
        count: of all but the one that was written, 0: nothing did.
        logins: hashes of those that were given.
    """

    last: Event
    count: int = 0
    logins: set[int] = field(default_factory=set)


@dataclass
class Window:
    """The minute that is open.

    Attributes:
        ends_s: by the caller's clock.
        entries: what was written of it one by one.
        others: of a kind and source, what came beyond `ENTRIES_MAX`.
    """

    ends_s: float = 0.0
    entries: dict[Key, Repeated] = field(default_factory=dict)
    others: dict[Key, Repeated] = field(default_factory=dict)

    def copy(self) -> "Window":
        """Return one that changes apart from this."""
        entries, others = (
            {key: Repeated(one.last, one.count, set(one.logins)) for key, one in those.items()}
            for those in (self.entries, self.others)
        )
        return Window(self.ends_s, entries, others)

    def add(self, events: Iterable[Event], now_s: float) -> list[Event]:
        """Take events; return what is to be written now."""
        written = self.close() if now_s >= self.ends_s else []
        for event in events:
            if not self.entries:
                self.ends_s = now_s + WINDOW_S
            key, group = _key(event), (event.kind, event.source)
            if key not in self.entries and sum(one[:2] == group for one in self.entries) < ENTRIES_MAX:
                self.entries[key] = Repeated(event, 0, {hash(event.login)})
                written.append(event)
                continue
            repeated = self.entries.get(key) or self.others.setdefault(group, Repeated(event))
            repeated.last, repeated.count = event, repeated.count + event.count
            if len(repeated.logins) < LOGINS_MAX:
                repeated.logins.add(hash(event.login))
        return written

    def close(self) -> list[Event]:
        """End the window; return what is to be written of it."""
        again = [_again(one) for one in self.entries.values() if one.count]
        beyond = [_beyond(one) for one in self.others.values()]
        self.entries, self.others = {}, {}
        return again + beyond


def _key(event: Event) -> Key:
    host = _HOST.search(event.detail) if event.kind == Kind.LOGIN_FAILED else None
    who = ("from", host[1]) if host else ("login", event.login)
    return (event.kind, event.source, *who)


def _again(repeated: Repeated) -> Event:
    logins = len(repeated.logins)
    as_many = f" as {_many(logins)} logins" if logins > 1 else ""
    return replace(
        repeated.last, detail=f"again within a minute{as_many}: {repeated.last.detail}", count=repeated.count
    )


def _beyond(repeated: Repeated) -> Event:
    text = (
        f"of {_many(len(repeated.logins))} logins beyond those above within a minute, "
        f"the last: {repeated.last.login!r}: {repeated.last.detail}"
    )
    return replace(repeated.last, login="", detail=text, count=repeated.count)


def _many(logins: int) -> str:
    return f"{logins} or more" if logins >= LOGINS_MAX else str(logins)
