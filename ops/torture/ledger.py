"""The ledger checker: what goes in comes out once, and for a reason that is true."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from ops.torture.history import History, Violation
from shared.config import AggregatorSettings
from shared.store.inprocess import InProcessStore
from shared.transport.inprocess import DeadLetter

FINAL = ("applied", "stale", "rejected")
SURPLUS = "surplus"  # the one reason for which a sound update may be rejected, in jobs that count a client's updates
ABANDONED = "incomplete"  # a newer update of the client came before the last part


@dataclass(frozen=True, slots=True)
class Ledger:
    """What the store says became of every delivery.

    Attributes:
        commits: revision, version and updates of each commit, in order.
        first: update_id -> its first outcome.
        abandoned: ids rejected because parts of them never came: what came is forgotten, there is nothing to bury.
    """

    commits: list[dict[str, Any]]
    first: dict[str, str]
    abandoned: frozenset[str]

    @classmethod
    def of(cls, store: InProcessStore) -> "Ledger":
        """Read it."""
        first: dict[str, str] = {}
        for commit in store.ledger:
            for entry in commit["updates"]:
                if entry["outcome"] in FINAL:
                    first.setdefault(entry["id"], entry["outcome"])
        entries = (entry for commit in store.ledger for entry in commit["updates"])
        abandoned = frozenset(entry["id"] for entry in entries if entry.get("reason") == ABANDONED)
        return cls(list(store.ledger), first, abandoned)


@dataclass(frozen=True, slots=True)
class Account:
    """What became of the updates of a run, in Jepsen's words.

    Attributes:
        made: finished by a worker.
        attempted: handed to `publish`.
        confirmed: the broker said that it has them.
        applied: they changed the model, some of them when their dead letter was sent once more.
        refused: too stale, and never applied.
        rejected: dead letters, and never applied.
        lost: confirmed, and without an outcome.
        duplicated: applied more than once.
        unexpected: applied, and nobody made them.
        recovered: a publish of theirs was not confirmed or their worker died, and they have their one outcome.
        gone: not confirmed yet when their worker's disk was lost, and without an outcome.
    """

    made: int = 0
    attempted: int = 0
    confirmed: int = 0
    applied: int = 0
    refused: int = 0
    rejected: int = 0
    lost: int = 0
    duplicated: int = 0
    unexpected: int = 0
    recovered: int = 0
    gone: int = 0


def account(history: History, ledger: Ledger) -> Account:
    """Draw up the account of a run."""
    times = Counter(e["id"] for commit in ledger.commits for e in commit["updates"] if e["outcome"] == "applied")
    confirmed = history.confirmed()
    never = Counter(outcome for update_id, outcome in ledger.first.items() if update_id not in times)
    return Account(
        made=len(history.made),
        attempted=len(history.handed),
        confirmed=len(confirmed),
        applied=len(times),
        refused=never["stale"],
        rejected=never["rejected"],
        lost=sum(update_id not in ledger.first for update_id in confirmed),
        duplicated=sum(count > 1 for count in times.values()),
        unexpected=sum(update_id not in history.made for update_id in times),
        recovered=sum(count > 0 and update_id in ledger.first for update_id, count in history.open_attempts.items()),
        gone=sum(update_id not in ledger.first for update_id in history.gone),
    )


def check(history: History, ledger: Ledger, settings: AggregatorSettings, dead: Iterable[DeadLetter]) -> None:
    """Make sure that every update has one outcome, and the right one.

    Args:
        history: what was seen from outside.
        ledger: what the store says.
        settings: the job's.
        dead: the dead letters.

    Raises:
        Violation: with the first update of which that is not so.
    """
    _check_revisions(history, ledger)
    _check_outcomes(history, ledger, settings.staleness_max, has_shares(settings))
    for update_id in sorted(history.confirmed()):
        if update_id not in ledger.first:
            raise Violation("ledger", f"{update_id} was confirmed and has no outcome: it is lost")
    for update_id in history.made:
        if update_id not in ledger.first and update_id not in history.gone:
            raise Violation("ledger", f"{update_id} was finished, and its worker lost it")
    buried = {one.update_id for one in dead if one.update_id in history.bodies.get(one.body, ())}
    for update_id, outcome in ledger.first.items():
        if outcome == "rejected" and update_id not in buried and update_id not in ledger.abandoned:
            raise Violation("ledger", f"{update_id} was rejected, and is not among the dead letters")
    entries = Counter(entry["outcome"] for commit in ledger.commits for entry in commit["updates"])
    for outcome, count in history.counted.items():
        if count > entries[outcome]:
            raise Violation("ledger", f"{count} {outcome} updates were counted, the ledger has {entries[outcome]}")


def _check_revisions(history: History, ledger: Ledger) -> None:
    """Revisions are without gaps, versions never go back, and the ledger says the same as the head did."""
    seen = {head.revision: head.version for head in history.heads}
    version = 0
    for number, commit in enumerate(ledger.commits, 1):
        if commit["revision"] != number:
            raise Violation("ledger", f"commit {number} of the ledger is of revision {commit['revision']}")
        if commit["version"] < version:
            raise Violation("ledger", f"revision {number} goes back from version {version} to {commit['version']}")
        version = commit["version"]
        if seen.get(number, version) != version:
            raise Violation("ledger", f"revision {number} is version {version}, the head said {seen[number]}")


def has_shares(settings: AggregatorSettings) -> bool:
    """Tell whether a client has its share of the open buffer, beyond which a sound update of it is rejected."""
    return settings.rule == "fedavg" or settings.robust == "one_slot"


def _check_outcomes(history: History, ledger: Ledger, staleness_max: int, shares: bool) -> None:
    """Nothing is applied twice, or applied or refused wrongly; no outcome follows another."""
    final: dict[str, str] = {}
    floor = 0  # below it ids may be forgotten: what comes again then is too stale for ever
    for commit in ledger.commits:
        for entry in commit["updates"]:
            update_id, outcome = entry["id"], entry["outcome"]
            made, before = history.made.get(update_id), final.get(update_id)
            if made is None:
                raise Violation("ledger", f"{update_id} is {outcome}, and nobody made it: it is unexpected")
            if "staleness" in entry and entry["staleness"] != entry["version"] - made.base_version:
                raise Violation(
                    "ledger", f"{update_id} has staleness {entry['staleness']}: it met version {entry['version']} and "
                    f"was trained from {made.base_version}",
                )  # fmt: skip
            floor = max(floor, entry["version"] - staleness_max)
            too_old = made.base_version < floor
            if outcome == "duplicate":
                if before is None:
                    raise Violation("ledger", f"{update_id} is a duplicate of nothing: it is lost")
                continue
            _check_reason(history, entry, too_old, shares)
            if before == "applied" and outcome != "applied" and too_old:
                continue  # its id was forgotten by now
            again = before in ("rejected", "stale") and update_id in history.replayed
            if before is not None and not again:
                raise Violation("ledger", f"{update_id} is {outcome} after it was {before}")
            final[update_id] = outcome


def _check_reason(history: History, entry: dict[str, Any], too_old: bool, shares: bool) -> None:
    update_id, outcome = entry["id"], entry["outcome"]
    if outcome == "applied" and too_old:
        raise Violation("ledger", f"{update_id} is applied with staleness {entry['staleness']}, beyond the limit")
    if outcome == "stale" and not too_old:
        raise Violation("ledger", f"{update_id} is refused as stale with staleness {entry['staleness']}")
    abandoned = entry.get("reason") == ABANDONED and update_id in history.needed
    harmed = update_id in history.damaged or abandoned or (shares and entry.get("reason") == SURPLUS)
    if outcome == "rejected" and not harmed:
        raise Violation("ledger", f"{update_id} was sound and is rejected as {entry['reason']}: {entry['detail']}")
