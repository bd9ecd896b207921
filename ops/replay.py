"""`fedmq replay`: recompute a version from the ledger and the recorded updates, and compare it byte by byte."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from aggregator.rules import rule_of
from ops.recompute import Bodies, History, Replay, settings_of
from ops.rollback import META
from shared import choices
from shared.config import AggregatorSettings, Settings
from shared.errors import FedMQError, SettingsError, VersionGone
from shared.layout import Layout
from shared.logs import log_to_stderr
from shared.model_image import ModelImage
from shared.rules import ROBUST
from shared.store.redis import RedisStore
from shared.store.redis_commit import LEDGER_ENTRIES_MAX

# Rules and defences that remember more than vectors. Everything else that remembers has a vector in the state.
REMEMBERING_RULES = ("rescaled", "ca2fl", "ace", "aced", "area", "ringleader")
REMEMBERING_DEFENCES = ("norm_median", "zeno", "aflguard")


class NothingCompared(FedMQError):  # noqa: N818 - what the command prints
    """A replay came to its end, and there was nothing to compare it with."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a command line asks for.

    Attributes:
        version: number, or `newest`.
        every: go up to the newest and show every version there is a hash of.
        start: safetensors file to begin with.
        start_version: the version that file is; without a file, a stored one.
        out: where to write the recomputed version.
    """

    version: str = "newest"
    every: bool = False
    start: Path | None = None
    start_version: int | None = None
    out: Path | None = None


class InRedis:
    """The history of a job in Redis."""

    def __init__(self, store: RedisStore) -> None:
        self._store = store
        self.head, self.job, self.layout, self.model, self.meta = (
            store.head, store.job, store.layout, store.model, store.meta,
        )  # fmt: skip

    def versions(self) -> list[int]:
        """Return the stored versions."""
        found: list[int] = self._store.status()["versions"]
        return found

    def commits(self) -> Iterator[dict[str, Any]]:
        """Yield the ledger."""
        return self._store.ledger()


def command(settings: Settings, records: Path, wanted: Wanted) -> None:
    """Recompute, print a table, and fail unless all is equal.

    Raises:
        SettingsError: something is missing that a replay needs.
        Differs: it is not equal.
        NothingCompared: no hash was left to compare with.
    """
    log_to_stderr("error", settings.log_format)
    store = RedisStore(settings.store_url, settings.job)
    table = Table(title=f"job {settings.job}", title_justify="left")
    for column in ("version", "recomputed sha256", "stored sha256", ""):
        table.add_column(column, overflow="fold")
    history = InRedis(store)
    until = _until(history, wanted, settings.job)
    start, image = _start(history, wanted, settings.job, until)
    replay = Replay(history, Bodies(records, settings.job), settings_of(settings.job, history.job()), start, image)
    replay.check(until)
    table.caption, table.caption_justify = str(replay.unread(until)), "left"
    updates, equal = 0, 0
    try:
        for made in replay.run(until):
            updates = made.updates
            differs = bool(made.stored) and made.stored != made.sha256
            equal += made.stored == made.sha256
            if differs or made.version == until or (wanted.every and made.stored):
                verdict = "DIFFERS" if differs else "equal" if made.stored else "no hash is left to compare with"
                table.add_row(str(made.version), made.sha256, made.stored or "-", verdict)
            if made.version == until and wanted.out is not None:
                replay.image.save(wanted.out)
    finally:
        if table.row_count:
            Console().print(table)
    if wanted.out is not None:
        print(f"wrote the recomputed version {until} to {wanted.out}")
    done = f"from version {start}: {updates} updates applied again"
    if not equal:
        raise NothingCompared(
            f"{done}, but no version on the way has a hash left to compare with: that says nothing. Hashes go an hour "
            "after their versions: replay up to a stored one, or keep more of them (FEDMQ_VERSIONS_KEPT, tags)"
        )
    print(f"{done}, {equal} versions compared, all equal")


def memory_of(settings: AggregatorSettings) -> list[str]:
    """Name what of a job remembers beyond a version: with any of it, a version alone is nothing to start from."""
    rule = rule_of(settings)
    defences = [stage.name for stage in choices.parse_pipeline(settings.robust, ROBUST)]
    remembering = [f"rule {rule.name}"] if rule.name in REMEMBERING_RULES else []
    remembering += [f"vector {name}" for name in rule.arrays if rule.name not in REMEMBERING_RULES]
    return remembering + [f"defence {name}" for name in defences if name in REMEMBERING_DEFENCES]


def _until(history: History, wanted: Wanted, job: str) -> int:
    """Return the version to go up to."""
    head = history.head()
    if head is None:
        raise SettingsError(f"job {job!r} has no model in this store")
    if wanted.every or wanted.version == "newest":
        return head.version
    if not wanted.version.isdecimal() or int(wanted.version) > head.version:
        raise SettingsError(f"--version {wanted.version!r}: must be a number up to {head.version}, or newest")
    version = int(wanted.version)
    committed = {commit["version"] for commit in history.commits()}
    if version not in committed:
        near = sorted(committed, key=lambda other: abs(other - version))[:2]
        raise SettingsError(
            f"version {version} was never written - several versions may come between two commits - or the ledger no "
            f"longer holds it; near it are {', '.join(map(str, sorted(near))) or 'none'}"
        )
    return version


def _start(history: History, wanted: Wanted, job: str, until: int) -> tuple[int, ModelImage]:
    """Return the version to start from and its weights.

    Raises:
        SettingsError: there is none, or the ledger does not reach back to it.
    """
    reaches = _ledger_begins(history)
    remembering = memory_of(settings_of(job, history.job()))
    stored = [v for v in history.versions() if v >= reaches and v < until and _whole(history, v, remembering)]
    if wanted.start is None and wanted.start_version is None:
        if not stored:
            raise SettingsError(_nothing_to_start_from(until, reaches, remembering))
        return stored[0], history.model(stored[0])
    version = wanted.start_version or 0
    if version < reaches:
        raise SettingsError(
            f"the ledger begins with version {reaches - 1} (about {LEDGER_ENTRIES_MAX:,} commits are kept): start with "
            f"--from-version {reaches} or later"
        )
    if version >= until:
        raise SettingsError(f"--from-version {version} is not before version {until}: there is nothing to recompute")
    if not _whole(history, version, remembering):
        raise SettingsError(
            f"version {version} alone is nothing to start from: {', '.join(remembering)} remember what came before it; "
            "start from version 0, or from a rollback"
        )
    if wanted.start is None:
        try:
            return version, history.model(version)
        except VersionGone as error:
            raise SettingsError(f"{error}; stored are {history.versions()}; give its file with --from") from error
    image = _from_file(wanted.start, history.layout())
    told = history.meta(version).get("sha256", image.sha256)
    if told != image.sha256:
        raise SettingsError(f"{wanted.start} is not version {version}: its sha256 is {image.sha256}, not {told}")
    return version, image


def _whole(history: History, version: int, remembering: Sequence[str]) -> bool:
    """Tell whether a version's weights are all of the state there was."""
    return not version or not remembering or META in history.meta(version)


def _nothing_to_start_from(until: int, reaches: int, remembering: Sequence[str]) -> str:
    memory = f" ({', '.join(remembering)} remember what came before)" if remembering else ""
    if reaches:
        return (
            f"the ledger begins with version {reaches - 1} (about {LEDGER_ENTRIES_MAX:,} commits are kept), and no "
            f"version from {reaches} to {until - 1} is stored that could be started from{memory}: give a file of one "
            "with --from FILE --from-version N"
        )
    which = "version 0" if remembering else f"a version before {until}"
    return (
        f"version 0 is not stored any more: give the file of {which} that the job began with, --from FILE (its "
        f"FEDMQ_INIT_MODEL){memory}"
    )


def _ledger_begins(history: History) -> int:
    """Return the oldest version that the ledger reaches back to: what came after it is all there."""
    first = next(history.commits(), None)
    return 0 if first is None or first["revision"] == 1 else int(first["version"]) + 1


def _from_file(path: Path, layout: Layout) -> ModelImage:
    """Read an exported version, or the file a job began with."""
    try:
        return ModelImage.from_chunks(layout, [path.read_bytes()])
    except OSError as error:
        raise SettingsError(f"cannot read {path}: {error.strerror}") from error
    except ValueError:
        image = ModelImage.from_file(path)
    if image.layout.hash != layout.hash:
        raise SettingsError(f"{path} is of another model: layout {image.layout.hash[:12]}, not {layout.hash[:12]}")
    return image
