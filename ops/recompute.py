"""Versions of a job from the ledger and the recorded updates: what `fedmq replay` compares.

The production aggregator runs over a store and a source inside this process. It is given the updates that the ledger
says were applied, in that order, and commits where the ledger says a commit was made. So every version that was ever
written comes about again, from the same arithmetic; what was a duplicate, too stale or rejected changed nothing.

The downlink does not enter: workers train from what it publishes, but what they send is in the records as it came.
"""

from collections import deque
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from aggregator.account import APPLIED
from aggregator.aggregator import Aggregator
from aggregator.recorder import Record, read, read_again
from ops.rollback import OUTCOME, roll_back
from shared import choices
from shared.clock import VirtualClock
from shared.config import AggregatorSettings, GivenAggregatorSettings
from shared.errors import FedMQError, Reason, RejectedUpdate, SettingsError, VersionGone
from shared.layout import Layout
from shared.messages import Part, decode
from shared.metrics import AggregatorMetrics
from shared.model_image import ModelImage
from shared.rules import RULE_TABLE, RULES
from shared.store.inprocess import InProcessStore
from shared.store.ports import Commit, Head
from shared.transport.ports import Delivery

NAMES_MAX = 10  # update ids in a message
NEVER_S = 1e12  # longer than any replay: commits are made where the ledger has them
ARITHMETIC = (  # of what a job announced, what its arithmetic depends on
    "rule", "buffer_size", "server_lr", "alpha", "staleness", "staleness_max", "weight_by_samples",
    "server_optimizer", "robust", "clients", "trusted_client",
)  # fmt: skip
TOLD = ("outcome", "base_version", "staleness", "weight", "version", "num_samples", "bytes")  # of a ledger's entry


class Differs(FedMQError):  # noqa: N818 - what the command prints
    """A version cannot be recomputed, or comes out otherwise."""


class History(Protocol):
    """What is still known of a job."""

    def head(self) -> Head | None:
        """Return where it stands."""

    def job(self) -> dict[str, Any]:
        """Return its settings as they were announced."""

    def layout(self) -> Layout:
        """Return its layout."""

    def model(self, version: int) -> ModelImage:
        """Return a stored version; raises `VersionGone`."""

    def versions(self) -> list[int]:
        """Return the stored versions, ascending."""

    def meta(self, version: int) -> Mapping[str, str]:
        """Return what is known of a version, its `sha256` above all; empty when nothing is."""

    def commits(self) -> Iterator[dict[str, Any]]:
        """Yield what the ledger holds, oldest first: revision, version, updates."""


@dataclass(frozen=True, slots=True)
class Recomputed:
    """A version that came about again.

    Attributes:
        version: its number.
        sha256: of its file, recomputed.
        stored: the hash that was written when it was committed; "" where that is no longer known.
        updates: applied since the start.
    """

    version: int
    sha256: str
    stored: str
    updates: int


@dataclass(frozen=True, slots=True)
class Unread:
    """Records that a replay did not look into: what they hold is not compared with anything.

    Attributes:
        before: of updates that were applied before its start.
        after: of updates that were applied after the version it goes up to.
        not_applied: of updates that the ledger has not as applied: duplicates, stale, rejected, or trimmed by now.
        damaged: that cannot be read.
    """

    before: int
    after: int
    not_applied: int
    damaged: int

    def __str__(self) -> str:
        """Say it in words."""
        told = {
            "applied before the start": self.before, "applied after the end": self.after,
            "not applied, or no longer in the ledger": self.not_applied, "damaged": self.damaged,
        }  # fmt: skip
        parts = [f"{count} {what}" for what, count in told.items() if count]
        return f"records not read: {', '.join(parts)}" if parts else "every record was read"


class Message(NamedTuple):
    """A recorded message that the aggregator may have applied.

    Attributes:
        place: in the records.
        size: bytes of the message.
        facts: base_version and num_samples, as the ledger repeats them.
        part: which one, of an update in parts.
        digest: of its bytes.
    """

    place: str
    size: int
    facts: tuple[int, int]
    part: Part | None
    digest: bytes


class Bodies:
    """Where the bytes of each update are among the records; the bytes themselves stay there.

    Args:
        folder: FEDMQ_RECORD_DIR.
        job: the job's id.

    Raises:
        SettingsError: there are no records.
    """

    def __init__(self, folder: Path, job: str) -> None:
        self._folder, self._job = folder, job
        self._found: dict[str, list[Message]] = {}
        self.damaged: list[Record] = []
        for record in read(folder, job):
            self._note(record)

    def of(self, entry: Mapping[str, Any]) -> list[Message]:
        """Return the messages that an entry of the ledger is about, in order; none where they are not here."""
        facts = (entry["base_version"], entry["num_samples"])
        fitting = [message for message in self._found.get(entry["id"], ()) if message.facts == facts]
        whole = [message for message in fitting if message.part is None and message.size == entry["bytes"]]
        if whole:
            return whole[:1]  # the first that came; the same id with other bytes was a duplicate
        cuts: dict[tuple[int, int], dict[int, Message]] = {}
        for message in fitting:
            if message.part is not None:
                cut = (message.part.count, message.part.payload_bytes)
                cuts.setdefault(cut, {}).setdefault(message.part.index, message)
        for (count, _), parts in cuts.items():
            if len(parts) == count and sum(part.size for part in parts.values()) == entry["bytes"]:
                return [parts[index] for index in range(count)]
        return []

    @property
    def ids(self) -> Collection[str]:
        """The ids of updates of which there is a record."""
        return self._found.keys()

    def body(self, message: Message) -> bytes:
        """Return the bytes of a message."""
        return read_again(self._folder, self._job, message.place)

    def lost(self, update_id: str) -> str:
        """Say what is known of an update whose bytes are not here."""
        for record in self.damaged:
            if record.update_id == update_id:
                return f"its record at {record.place} is damaged: {record.damage}"
        if update_id in self._found:
            return "what is recorded under its id has other bytes than the ledger says"
        unread = sum(not record.update_id for record in self.damaged)
        return f"it is not among the records ({unread} of which cannot be read)" if unread else "it was not recorded"

    def _note(self, record: Record) -> None:
        """Keep what may have been applied: the aggregator rejects what does not decode or comes in another's name."""
        if record.damage:
            self.damaged.append(record)
            return
        try:
            update = decode(record.body, len(record.body))
        except RejectedUpdate:
            return
        if (update.job, update.client) != (self._job, record.client) or record.user_id not in (None, update.client):
            return
        digest = blake2b(record.body, digest_size=12).digest()
        known = self._found.setdefault(update.update_id, [])
        if all(message.digest != digest for message in known):
            facts = (update.base_version, update.num_samples)
            known.append(Message(record.place, len(record.body), facts, update.part, digest))


class Bench(InProcessStore):
    """The store that the versions come about in; begins at any version.

    Args:
        version: the first one.
        image: its weights.
        older: other versions that are asked for: bases, and what is rolled back to.
        kept: versions that must not go.
    """

    def __init__(self, version: int, image: ModelImage, older: Mapping[int, ModelImage], kept: set[int]) -> None:
        super().__init__()
        self._wanted = kept
        self.create(image, 0.0)
        dump, head = self.dump(), self.head()
        if version and head is not None:
            models = {number: model.data.tobytes() for number, model in older.items()}
            models[version] = image.data.tobytes()
            self.restore(image.layout, dump | {"head": astuple(replace(head, version=version)), "models": models})

    def commit(self, commit: Commit) -> None:
        """Commit, keeping the versions that are asked for later."""
        dropped = [version for version in commit.dropped_versions if version not in self._wanted]
        super().commit(replace(commit, dropped_versions=dropped))

    def taken(self) -> list[dict[str, Any]]:
        """Return the ledger's entries since the last call."""
        entries = [entry for commit in self.ledger for entry in commit["updates"]]
        self.ledger.clear()
        return entries


class Recorded:
    """An `UpdateSource` of recorded messages."""

    def __init__(self) -> None:
        self.waiting: deque[Delivery] = deque()
        self.refused: RejectedUpdate | None = None

    def receive(self, limit: int, wait_s: float) -> list[Delivery]:
        """Return the next message."""
        return [self.waiting.popleft()] if self.waiting else []

    def ack(self, deliveries: Sequence[Delivery]) -> None:
        """Nothing comes again."""

    def reject(self, delivery: Delivery, reason: Reason, detail: str) -> None:
        """Note what must not happen: this update was applied."""
        self.refused = RejectedUpdate(reason, detail)

    def recover(self) -> None:
        """Nothing is out."""

    def close(self) -> None:
        """Nothing is open."""


class Replay:
    """A job's past, once more.

    Args:
        history: what is known of it.
        bodies: the recorded updates.
        settings: the job's.
        version: to start from.
        image: its weights.
    """

    def __init__(
        self, history: History, bodies: Bodies, settings: AggregatorSettings, version: int, image: ModelImage
    ) -> None:
        self._history, self._bodies, self._start = history, bodies, version
        self._clock, self._source, self._updates = VirtualClock(), Recorded(), 0
        self._held = set(history.versions())
        kept, bases = _asked_for(history, version)
        older = {number: history.model(number) for number in history.versions() if number in kept | bases}
        self._store = Bench(version, image, {n: model for n, model in older.items() if n < version}, kept)
        self._settings = settings
        self._aggregator = Aggregator(
            settings, self._source, self._store, self._clock, AggregatorMetrics(), poll_s=0.0
        )  # fmt: skip

    def check(self, until: int) -> None:
        """See to it that every update up to a version is at hand.

        Raises:
            Differs: naming those that are not, and from which version on everything is there.
        """
        missing, names, reasons = 0, list[str](), list[str]()
        first, whole_from = -1, self._start
        for commit in self._history.commits():
            for entry in commit["updates"]:
                wanted = entry["outcome"] == APPLIED and self._start <= entry["version"] < until
                if not wanted or self._bodies.of(entry):
                    continue
                missing, whole_from = missing + 1, entry["version"] + 1
                first = entry["version"] + 1 if first < 0 else first
                if len(names) < NAMES_MAX:
                    names.append(entry["id"])
                    reasons.append(self._bodies.lost(entry["id"]))
        if missing:
            more = f" and {missing - len(names)} more" * (missing > len(names))
            raise Differs(
                f"{missing} updates of versions {first} to {whole_from} are not at hand: {', '.join(names)}{more}; "
                f"{names[0]}: {reasons[0]}. From version {whole_from} on everything is there: start with "
                f"--from-version {whole_from} and, if it is not stored, its file; or look for a copy of the records"
            )

    def unread(self, until: int) -> Unread:
        """Return which records a replay up to a version has no use for."""
        met = {e["id"]: e["version"] for c in self._history.commits() for e in c["updates"] if e["outcome"] == APPLIED}
        versions = [met.get(update_id) for update_id in self._bodies.ids]
        return Unread(
            before=sum(version is not None and version < self._start for version in versions),
            after=sum(version is not None and version >= until for version in versions),
            not_applied=versions.count(None),
            damaged=len(self._bodies.damaged),
        )

    def run(self, until: int) -> Iterator[Recomputed]:
        """Yield each version as it comes about, up to one.

        Raises:
            Differs: an update is missing, is not applied as the ledger says, or a version has other bytes.
        """
        since: list[str] = []  # ids since the last version that was compared
        for commit in self._history.commits():
            entries = [entry for entry in commit["updates"] if self._concerns(entry, until)]
            before = self.version
            for entry in entries:
                self._do(entry)
            self._aggregator.finish()
            applied = [entry for entry in entries if entry["outcome"] == APPLIED]
            _compare_entries(applied, self._store.taken())
            since += [entry["id"] for entry in applied]
            if entries and self.version != commit["version"]:
                raise Differs(
                    f"the ledger has version {commit['version']} at revision {commit['revision']}, recomputed is "
                    f"version {self.version}: were the job's settings changed since?"
                )
            if self.version != before:
                made = Recomputed(self.version, self.image.sha256, self._stored(self.version), self._updates)
                yield made
                _compare_bytes(made, since)
                since = [] if made.stored else since
            if self.version >= until:
                return

    @property
    def version(self) -> int:
        """The newest version so far."""
        head = self._store.head()
        return self._start if head is None else head.version

    @property
    def image(self) -> ModelImage:
        """Its weights."""
        return self._store.model(self.version)

    def _concerns(self, entry: Mapping[str, Any], until: int) -> bool:
        """Tell whether an entry of the ledger changed the state after the start, on its way to a version."""
        if entry["outcome"] == OUTCOME:
            return bool(entry["version"] > self._start)
        return bool(entry["outcome"] == APPLIED and self._start <= entry["version"] < until)

    def _do(self, entry: Mapping[str, Any]) -> None:
        if entry["outcome"] == OUTCOME:
            self._roll_back(entry)
            return
        messages = self._bodies.of(entry)
        if not messages:
            raise Differs(f"update {entry['id']} of version {self.version + 1}: {self._bodies.lost(entry['id'])}")
        client = str(entry["id"]).split("/", maxsplit=1)[0]
        for message in messages:
            body = self._bodies.body(message)
            self._source.waiting.append(Delivery(body, client, None, entry["id"], (0, 0)))
            self._aggregator.step()
        if self._source.refused is not None:
            raise Differs(
                f"update {entry['id']} is applied in the ledger, towards version {entry['version'] + 1}; recomputed, "
                f"it is rejected: {self._source.refused}"
            )
        self._updates += 1

    def _roll_back(self, entry: Mapping[str, Any]) -> None:
        self._aggregator.finish()
        try:
            roll_back(self._store, entry["to"], self._settings.job, self._clock.now, 0.0)
        except SettingsError as error:
            raise Differs(
                f"version {entry['version']} is a rollback to version {entry['to']}, which cannot be had: {error}; "
                f"start from a version at or before that one, or from version {entry['version']}"
            ) from error
        self._store.ledger[:] = [c for c in self._store.ledger if c["updates"][0].get("outcome") != OUTCOME]

    def _stored(self, version: int) -> str:
        """Return the hash that was written with a version; checks the stored bytes too, where they are still there."""
        stored = self._history.meta(version).get("sha256", "")
        if version in self._held:
            try:
                return self._history.model(version).sha256
            except VersionGone:
                if version in self._history.versions():  # and has not gone just now
                    return f"damaged, once {stored}"
        return stored


def settings_of(job: str, announced: Mapping[str, Any]) -> GivenAggregatorSettings:
    """Return a job's settings for recomputing it: its arithmetic, no limits, commits only where they are asked for.

    Args:
        job: its id.
        announced: what its aggregator wrote into the store.

    Raises:
        SettingsError: no aggregator has run it.
    """
    if "rule" not in announced:
        raise SettingsError(f"job {job!r} has no settings in this store: no aggregator has run it")
    uses = RULES[choices.parse(announced["rule"], RULE_TABLE).name].uses
    optional = {name for spec in RULES.values() for name in spec.uses}
    given = {name: announced[name] for name in ARITHMETIC if name in announced}
    given = {name: value for name, value in given.items() if name in uses or name not in optional}
    return GivenAggregatorSettings(
        **given, job=job, prefetch=65535, commit_interval_s=NEVER_S, commit_age_max_s=NEVER_S, versions_kept=2,
        message_bytes_max=512 * 2**20, update_bytes_max=64 * 2**30, parts_bytes_max=2**60, parts_age_max_s=NEVER_S,
    )  # fmt: skip


def _asked_for(history: History, start: int) -> tuple[set[int], set[int]]:
    """Return the versions that are rolled back to after a start, and those that updates were trained from."""
    targets, bases = set(), set()
    for commit in history.commits():
        for entry in commit["updates"]:
            if entry["outcome"] == OUTCOME and entry["version"] > start:
                targets.add(int(entry["to"]))
            elif entry["outcome"] == APPLIED and entry["version"] >= start:
                bases.add(int(entry["base_version"]))
    return targets, bases


def _compare_entries(told: Sequence[Mapping[str, Any]], made: Sequence[Mapping[str, Any]]) -> None:
    """Compare what the ledger says of each update with what became of it now.

    Raises:
        Differs: naming the first that is different.
    """
    for was, now in zip(told, made, strict=False):
        wrong = [
            f"{name} {was.get(name)!r} became {now.get(name)!r}" for name in TOLD if was.get(name) != now.get(name)
        ]
        if was["id"] != now["id"] or wrong:
            raise Differs(
                f"update {was['id']}, towards version {was['version'] + 1}: {'; '.join(wrong) or now['id']}. The "
                "ledger or the record was changed, or the job's settings were"
            )
    if len(told) != len(made):
        raise Differs(f"{len(told)} updates in the ledger became {len(made)}: {[entry['id'] for entry in made][-1:]}")


def _compare_bytes(made: Recomputed, since: Sequence[str]) -> None:
    """Compare a version with what was stored of it.

    Raises:
        Differs: naming it and the updates it may be owed to.
    """
    if not made.stored or made.stored == made.sha256:
        return
    if made.stored == f"damaged, once {made.sha256}":
        raise Differs(
            f"version {made.version} is recomputed as it was written, but its stored bytes are damaged: --out FILE "
            "--version N writes it"
        )
    names = ", ".join(since[:NAMES_MAX]) + f" and {len(since) - NAMES_MAX} more" * (len(since) > NAMES_MAX)
    raise Differs(
        f"version {made.version} is the first that differs: recomputed {made.sha256}, stored {made.stored}. Up to the "
        f"version compared before it all was equal; since then came {names or 'no update'}. Either a record or the "
        "store was changed, or the job's settings were, or it was computed by another version of FedMQ or numpy"
    )
