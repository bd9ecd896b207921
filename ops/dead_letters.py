"""`fedmq deadletters`: what was rejected, why, and what to do about it.

Everything shown here may have been sent by anybody: it is printed without control characters and never as markup.
"""

import calendar
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from hashlib import blake2b
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from shared.config import Settings
from shared.errors import BrokerUnavailable, PublishRefused, Reason, SettingsError
from shared.logs import log_to_stderr
from shared.messages import unpacked
from shared.transport.dead_letters import DeadLetters, Letter

CELL_CHARS_MAX = 60  # in the list
VALUE_CHARS_MAX = 1000  # anywhere
FIRST_BYTES = 32  # shown of a body that does not decode
NAMES_MAX = 5  # of updates in a message
UNITS_S = {"s": 1, "min": 60, "h": 3600, "d": 86_400}
BROKER = "broker:"  # begins the reason of what RabbitMQ moved here by itself
BROKER_ADVICE = (
    "RabbitMQ moved it here by itself: the queue of updates has a limit or a policy that FedMQ did not ask for. Remove "
    "that, then replay the letter."
)

ADVICE: dict[Reason, str] = {
    Reason.TOO_LARGE: "Raise the limit that the detail names, restart the aggregator and replay; or have the worker "
    "send less: another codec, or parts.",
    Reason.MALFORMED: "The sender does not speak the contract: compare its message with the README's contract, mend it "
    "and drop the letter.",
    Reason.FORMAT: "The sender speaks another version of the contract: update the aggregator and replay, or update the "
    "worker and drop the letter.",
    Reason.JOB: "The sender published to this job's key what it made for another job: check its FEDMQ_JOB and drop the "
    "letter.",
    Reason.CLIENT: "Client, routing key and broker login do not agree: check FEDMQ_CLIENT_ID and the login; if nobody "
    "misconfigured them, somebody sends in another's name. Drop the letter.",
    Reason.LAYOUT: "It was made for a model with other tensors: update the worker's task to the job's model and drop "
    "the letter.",
    Reason.BASE_VERSION: "It was trained from a version that this store never published, or no longer has: was the "
    "store set back, or does the worker read another one? Replay it if the version is there again, or drop it.",
    Reason.NUM_SAMPLES: "The worker's task reports an impossible number of samples: mend the task and drop the letter.",
    Reason.CHECKSUM: "The bytes changed on their way or on the sender's disk: drop the letter; if there are more of "
    "that client, check its disk and memory.",
    Reason.CODEC: "This aggregator cannot decode it: if the worker is newer, update the aggregator and replay; "
    "otherwise drop the letter.",
    Reason.NOT_FINITE: "The training diverged (NaN or overflow): lower the learning rate or clip gradients in the "
    "task; drop the letter.",
    Reason.RULE: "The job's rule cannot use it, the detail says why: change what the worker does, or the rule, and "
    "replay only in the latter case.",
    Reason.INCOMPLETE: "It was sent in parts and could not be put together: if there was no room, raise "
    "FEDMQ_PARTS_BYTES_MAX; only the worker can send it again. Drop the letter.",
    Reason.SURPLUS: "Its client had its share of the open buffer: replay it when the next version is made, or drop it.",
    Reason.SUSPICIOUS: "A defence took it for an attack: look at that client's other letters; replay it only if the "
    "defence was wrong and its limit has been changed.",
}

GIVEN_BACK = (
    "its codec keeps what was refused (ef): the worker sends its mass again with a later update, so applying this too "
    "would count it twice"
)
ONE_PART = "it is one part of an update; the others are not here, only its worker can send it again"


@dataclass(frozen=True, slots=True)
class Selection:
    """Which letters a command is about.

    Attributes:
        ids: update ids, their beginnings, or numbers from the list.
        every: all of them.
        reason, client: those with this one.
        older_than_s: those rejected longer ago.
    """

    ids: tuple[str, ...] = ()
    every: bool = False
    reason: str | None = None
    client: str | None = None
    older_than_s: float | None = None

    @property
    def empty(self) -> bool:
        """Whether nothing was said."""
        return not (self.ids or self.every or self.reason or self.client or self.older_than_s is not None)

    def fits(self, letter: Letter, now: float) -> bool:
        """Tell whether reason, client and age fit; a letter whose age nobody knows is not old."""
        if letter.reason != (self.reason or letter.reason) or letter.client != (self.client or letter.client):
            return False
        if self.older_than_s is None:
            return True
        at = time_of(letter)
        return at is not None and now - at > self.older_than_s


def select(
    ids: Sequence[str], every: bool, reason: str | None, client: str | None, older_than: str | None
) -> Selection:
    """Check what the command line gave.

    Raises:
        SettingsError: no such reason, no duration, or ids together with --all.
    """
    reasons = [str(known) for known in Reason]
    if reason is not None and reason not in reasons and not reason.startswith(BROKER):
        raise SettingsError(f"--reason {reason!r}: must be one of {', '.join(reasons)}, or begin with {BROKER}")
    if ids and (every or reason or client or older_than):
        raise SettingsError("give ids, or --all, --reason, --client and --older-than, not both")
    return Selection(tuple(ids), every, reason, client, None if older_than is None else seconds_of(older_than))


def seconds_of(text: str) -> float:
    """Read a duration such as `90s`, `30min`, `12h` or `7d`.

    Raises:
        SettingsError: it is none.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(s|min|h|d)", text.strip())
    if match is None:
        raise SettingsError(f"{text!r} is no duration: say for example 90s, 30min, 12h or 7d")
    return float(match[1]) * UNITS_S[match[2]]


def envelope_of(body: bytes) -> dict[str, Any] | None:
    """Return the fields of a message with the payload's size in its place, None if it is no map; checks nothing."""
    try:
        record = unpacked(body)
    except Exception:  # msgpack raises whatever it likes, as in `shared.messages.decode`
        return None
    if not isinstance(record, dict):
        return None
    fields = {str(name): value for name, value in record.items()}
    if isinstance(fields.get("payload"), bytes):
        fields["payload"] = f"{len(fields['payload']):,} bytes"
    return fields


def why_not(letter: Letter) -> str | None:
    """Return why a letter must not be replayed, None if it may."""
    fields = envelope_of(letter.body) or {}
    codec = fields.get("codec")
    name = str(codec.get("name", "")) if isinstance(codec, dict) else ""
    if name.partition("|")[0].strip() == "ef":
        return GIVEN_BACK
    return ONE_PART if "part" in fields or letter.properties.get("type") == "update-part" else None


def advice_on(reason: str) -> str:
    """Return what to do about a letter."""
    if reason in list(Reason):
        return ADVICE[Reason(reason)]
    return BROKER_ADVICE if reason.startswith(BROKER) else "An aggregator of another version wrote this reason."


def time_of(letter: Letter) -> float | None:
    """Return when a letter was rejected, else when its update was made; unix seconds.

    What the broker moved by itself carries its device's own time: then the broker's counts.
    """
    deaths = letter.headers.get("x-death")
    if letter.reason.startswith(BROKER) and isinstance(deaths, list) and deaths and isinstance(deaths[0], dict):
        moved = deaths[0].get("time")
        if isinstance(moved, datetime):
            return float(calendar.timegm(moved.utctimetuple()))
    if letter.rejected_at is not None and 0 <= letter.rejected_at < TIME_S_MAX:
        return float(letter.rejected_at)
    created = (envelope_of(letter.body) or {}).get("created_at")
    return float(created) if isinstance(created, int | float) and 0 <= created < TIME_S_MAX else None


TIME_S_MAX = 1e11  # a date beyond the year 5000 is none; and no calendar has the largest that AMQP can carry
COLUMNS = ("#", "reason", "client", "update", "codec", "base", "bytes", "rejected", "detail")
NARROW = ("#", "reason", "update", "bytes", "detail")  # one line a letter; `show` has the rest
WIDE = 120  # characters


def list_letters(settings: Settings, reason: str | None, client: str | None, limit: int) -> None:
    """Print a table of the dead letters, and how many there are of each reason.

    Nothing is removed, and the order stays. While this reads, the letters are out of the queue: somebody else who looks
    meanwhile sees fewer or none.

    Args:
        settings: job and broker.
        reason: only those with this one.
        client: only those of this one.
        limit: rows, the oldest letters first.
    """
    log_to_stderr("error", settings.log_format)
    selection = select((), False, reason, client, None)
    console = Console()
    columns = COLUMNS if console.width >= WIDE else NARROW
    table = Table(title=f"dead letters of job {settings.job}", title_justify="left")
    for column in columns:
        whole = column != "detail" or columns is COLUMNS
        table.add_column(
            column, justify="right" if column in ("#", "base", "bytes") else "left", no_wrap=columns is NARROW,
            overflow="fold" if whole else "ellipsis",
        )  # fmt: skip
    counts: Counter[str] = Counter()
    with DeadLetters(settings.broker_url, settings.job) as box:
        for letter in box.letters():
            if selection.fits(letter, time.time()):
                counts[letter.reason] += 1
                if counts.total() <= limit:
                    table.add_row(*(_row(letter)[COLUMNS.index(column)] for column in columns))
    if not counts:
        console.print(
            f"job {settings.job} has no dead letters{'' if box.count == 0 else f' like that, of {box.count}'}"
        )
        return
    console.print(table)
    if counts.total() > limit:
        print(f"the first {limit} of {counts.total()}; --limit shows more")
    print(f"{counts.total()} letters: " + ", ".join(f"{n} {plain(reason)}" for reason, n in counts.most_common()))


def show(settings: Settings, name: str, out: Path | None) -> None:
    """Print everything known of a letter, and what to do about it.

    Args:
        settings: job and broker.
        name: update id, the beginning of one, or a number from the list.
        out: write the body there.

    Raises:
        SettingsError: there is no such letter, or several while `out` wants one.
    """
    log_to_stderr("error", settings.log_format)
    chosen = _chosen(settings, Selection(ids=(name,)))
    if out is not None and chosen.total() > 1:
        raise SettingsError(f"{chosen.total()} letters are {name!r}: give the number of one from `deadletters list`")
    with DeadLetters(settings.broker_url, settings.job) as box:
        for letter in box.letters():
            if not _taken(chosen, letter):
                continue
            _print_letter(letter)
            if out is not None:
                _write(out, letter.body)


def replay(settings: Settings, selection: Selection, dry_run: bool) -> None:
    """Publish letters to the job's updates once more; each goes once RabbitMQ has confirmed its copy.

    The copy passes by the memory of what was refused before, never by that of what was applied: an id counts once,
    however often it is replayed. A crash leaves letters that were sent already; that does no harm either.

    Args:
        settings: job and broker.
        selection: which letters.
        dry_run: only say what would be done.

    Raises:
        SettingsError: nothing is selected, or there is no such letter.
        PublishRefused: the queue takes no more; the rest stays.
        BrokerUnavailable: the connection was lost; what was not confirmed stays.
    """
    log_to_stderr("error", settings.log_format)
    _refuse_empty(selection, "replay")
    sent, skipped = 0, Counter[str]()

    def send(box: DeadLetters, letter: Letter) -> None:
        nonlocal sent
        reason = why_not(letter)
        if reason is not None:
            skipped[reason] += 1
            return
        if not dry_run:
            box.send_again(letter)
            box.remove(letter)
        sent += 1

    try:
        _act(settings, _chosen(settings, selection), send)
    except (PublishRefused, BrokerUnavailable) as error:
        raise type(error)(f"{error}; {sent} were replayed before, the others stay as they are") from error
    finally:
        for reason, count in skipped.items():
            print(f"{count} not replayed: {reason}")
    print(f"{sent} would be replayed" if dry_run else f"{sent} replayed; `fedmq status` counts what becomes of them")


def drop(settings: Settings, selection: Selection, yes: bool) -> None:
    """Remove letters for good.

    Args:
        settings: job and broker.
        selection: which letters.
        yes: do not ask.

    Raises:
        SettingsError: nothing is selected, there is no such letter, or nobody is there to be asked.
    """
    log_to_stderr("error", settings.log_format)
    _refuse_empty(selection, "drop")
    chosen = _chosen(settings, selection)
    count = chosen.total()
    if count and not yes:
        if not sys.stdin.isatty():
            raise SettingsError(f"this would remove {count} letters for good: say --yes")
        if not typer.confirm(f"remove {count} letters of job {settings.job} for good?"):
            print("nothing was removed")
            return
    removed = 0

    def remove(box: DeadLetters, letter: Letter) -> None:
        nonlocal removed
        box.remove(letter)
        removed += 1

    _act(settings, chosen, remove)
    print(f"{removed} removed" + (f"; {count - removed} were gone before" if count > removed else ""))


def plain(text: object, chars_max: int = VALUE_CHARS_MAX) -> str:
    """Return the beginning of what somebody sent as one line, without anything that could move the cursor."""
    shown = str(text)
    cut = shown[:chars_max] + "..." * (len(shown) > chars_max)
    return "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in cut)


def _refuse_empty(selection: Selection, command: str) -> None:
    if selection.empty:
        older = ", --older-than" * (command == "drop")
        raise SettingsError(
            f"say which letters to {command}: ids, --all, --reason{older} or --client; see `deadletters list`"
        )


def _chosen(settings: Settings, selection: Selection) -> Counter[bytes]:
    """Look through the letters; return the fingerprints of those that are meant.

    Raises:
        SettingsError: an id fits no letter, or the beginnings of several.
    """
    now, found = time.time(), dict[int, bytes]()
    named: dict[str, dict[str, dict[int, bytes]]] = {text: {} for text in selection.ids}
    with DeadLetters(settings.broker_url, settings.job) as box:
        for letter in box.letters():
            mark = _fingerprint(letter)
            if not selection.ids and selection.fits(letter, now):
                found[letter.number] = mark
            for text, fits in named.items():
                if text == str(letter.number) or (letter.update_id.startswith(text) and not text.isdecimal()):
                    fits.setdefault(letter.update_id, {})[letter.number] = mark
    for text, fits in named.items():
        found |= _only(text, fits, box.count)
    return Counter(found.values())


def _only(text: str, fits: dict[str, dict[int, bytes]], count: int) -> dict[int, bytes]:
    """Return the letters of the one update that a text names."""
    if not fits:
        raise SettingsError(f"no letter is {plain(text)!r}, of {count}; see `fedmq deadletters list`")
    if text in fits:
        return fits[text]
    if len(fits) > 1:
        names = ", ".join(plain(name) for name in sorted(fits)[:NAMES_MAX])
        raise SettingsError(f"{plain(text)!r} begins {len(fits)} update ids: {names}{' ...' * (len(fits) > NAMES_MAX)}")
    return next(iter(fits.values()))


def _act(settings: Settings, chosen: Counter[bytes], action: Callable[[DeadLetters, Letter], None]) -> None:
    """Do something to each letter that was chosen, and is still there."""
    if not chosen:
        return
    with DeadLetters(settings.broker_url, settings.job) as box:
        for letter in box.letters():
            if _taken(chosen, letter):
                action(box, letter)


def _taken(chosen: Counter[bytes], letter: Letter) -> bool:
    """Tell whether a letter was chosen; each choice is good for one letter."""
    mark = _fingerprint(letter)
    if chosen[mark] <= 0:
        return False
    chosen[mark] -= 1
    return True


def _fingerprint(letter: Letter) -> bytes:
    """Return what tells a letter from others when it is met again; its number may have changed by then."""
    told = repr((letter.update_id, letter.reason, letter.detail, letter.rejected_at, letter.routing_key))
    return blake2b(letter.body + told.encode(), digest_size=12).digest()


def _row(letter: Letter) -> list[Text]:
    fields = envelope_of(letter.body) or {}
    codec = fields.get("codec")
    cells = (
        letter.number, letter.reason, letter.client, letter.update_id or "-",
        codec.get("name", "?") if isinstance(codec, dict) else "?", fields.get("base_version", "?"),
        f"{len(letter.body):,}", _clock(time_of(letter)), letter.detail,
    )  # fmt: skip
    return [Text(plain(cell, CELL_CHARS_MAX)) for cell in cells]


def _clock(seconds: float | None) -> str:
    return "?" if seconds is None else time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))


def _print_letter(letter: Letter) -> None:
    fields = envelope_of(letter.body)
    lines: dict[str, object] = {
        "number": letter.number, "reason": letter.reason, "detail": letter.detail or "-",
        "what to do": advice_on(letter.reason), "replay": why_not(letter) or "possible",
        "rejected": _clock(letter.rejected_at), "routing key": letter.routing_key,
        "message_id": letter.update_id or "-",
    }  # fmt: skip
    lines |= letter.properties
    lines |= {f"header {name}": value for name, value in letter.headers.items() if not name.startswith("fedmq-")}
    lines["body"] = f"{len(letter.body):,} bytes"
    if fields is None:
        lines["first bytes"] = letter.body[:FIRST_BYTES].hex(" ")
    else:
        lines |= {f"  {name}": value for name, value in fields.items()}
    table = Table.grid(padding=(0, 2))
    for name, value in lines.items():
        table.add_row(Text(plain(name)), Text(plain(value)))
    Console().print(table)
    print()


def _write(path: Path, body: bytes) -> None:
    try:
        path.write_bytes(body)
    except OSError as error:
        raise SettingsError(f"cannot write {path}: {error.strerror}") from error
    print(f"wrote the body to {path}: {len(body):,} bytes")
