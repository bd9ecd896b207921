"""`fedmq backup` and `fedmq restore`: a whole job in a file, taken while the aggregator commits."""

import time
from collections.abc import Iterable, Iterator
from importlib.metadata import version as installed_version
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from ops import backup_file
from ops.backup_file import Header
from shared.clock import SystemClock
from shared.config import AggregatorSettings, Settings, load
from shared.errors import SettingsError
from shared.store.ports import Head
from shared.store.redis_backup import Entry, Piece, RedisArchive


def backup(settings: Settings, path: Path, force: bool) -> None:
    """Write everything a store holds of a job to a file, as it stands at one revision.

    While it is read Redis holds a copy of the job: as much memory again, and about a second a GB in which Redis
    answers nobody.

    Args:
        settings: job and store.
        path: the file.
        force: replace a file that is there.

    Raises:
        SettingsError: there is no such job, no room in Redis or on the disk, or the file exists.
    """
    backup_file.check_free(path, force)
    archive = RedisArchive(settings.store_url, settings.job)
    if archive.head() is None:
        raise SettingsError(f"job {settings.job!r} has no model in this store: there is nothing to back up")
    with archive.frozen(SystemClock()) as frozen:
        head = frozen.head
        header = Header(
            settings.job, head.revision, head.version, head.layout, head.num_params, time.time(),
            installed_version("fedmq"),
        )  # fmt: skip
        size_bytes = backup_file.write(path, header, _shown(frozen.records(), _size(frozen.entries), "reading"), force)
    archive.close()
    print(
        f"wrote job {settings.job} at version {head.version}, revision {head.revision} to {path}: "
        f"{len(frozen.entries)} keys, {size_bytes:,} bytes; updates that wait in RabbitMQ are not in it"
    )


def restore(flags: dict[str, str | None], path: Path, replace: bool) -> None:
    """Make a job what a file holds of it, all or nothing.

    Args:
        flags: what the command line gave of job and store; without a job it is the file's.
        path: the file.
        replace: a job that is there goes.

    Raises:
        SettingsError: the file cannot be used, the job exists, or it is of another model.
    """
    header = backup_file.verify(path)
    settings = load(AggregatorSettings, flags | {"job": flags.get("job") or header.job})
    archive = RedisArchive(settings.store_url, settings.job, settings.durable, settings.store_replicas)
    archive.check()
    old = _replaced(archive, settings.job, header, replace)
    records = _shown(backup_file.records(path), path.stat().st_size, "writing")
    revision = archive.install(records, header.revision, time.time(), replace)
    archive.close()
    print(_told(settings.job, path, header, old, revision))


def _replaced(archive: RedisArchive, job: str, header: Header, replace: bool) -> Head | None:
    """Return the head of a job that is to be replaced, None where there is none."""
    old = archive.head()
    if not replace and old is not None:
        raise SettingsError(
            f"job {job!r} exists, at version {old.version}, revision {old.revision}; the backup is of version "
            f"{header.version}, revision {header.revision}: say --replace to go back to it, or restore it beside as "
            "--job OTHER"
        )
    if not replace and (names := archive.names()):
        raise SettingsError(
            f"job {job!r} has no head, but {len(names)} keys are there, {names[0]!r} for one: say --replace to drop "
            "them"
        )
    if old is not None and old.layout != header.layout:
        raise SettingsError(
            f"job {job!r} is of another model than the backup (layout {old.layout[:12]} with {old.num_params} "
            f"parameters, the backup's is {header.layout[:12]} with {header.num_params}): restore it beside as "
            "--job OTHER"
        )
    return old


def _told(job: str, path: Path, header: Header, old: Head | None, revision: int) -> str:
    """Say what a restore did, and what it could not."""
    taken = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(header.created_at))
    lines = [
        f"restored job {job} from {path}, taken {taken}: version {header.version}, revision {header.revision}, which "
        f"counts as {revision} now"
    ]
    if old is not None:
        lines.append(
            f"replaced: version {old.version}, revision {old.revision}. What was applied after revision "
            f"{header.revision} is not in the model any more"
        )
    lines.append(
        "updates that still wait in RabbitMQ or with their workers come again and count once; those applied after the "
        f"backup and acked are lost, and those trained from versions beyond {header.version} are refused"
    )
    return "\n".join(lines)


def _size(entries: Iterable[Entry]) -> int:
    return sum(entry.size for entry in entries if entry.kind == "string")


def _shown(
    records: Iterable[tuple[Entry, Iterable[Piece]]], total_bytes: int, verb: str
) -> Iterator[tuple[Entry, Iterable[Piece]]]:
    """Pass records through; on a terminal show how far they are."""
    console = Console(stderr=True)
    columns = (TextColumn(verb), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(verb, total=total_bytes)

        def counted(pieces: Iterable[Piece]) -> Iterator[Piece]:
            for piece in pieces:
                yield piece
                progress.advance(task, len(piece) if isinstance(piece, bytes) else 0)

        for entry, pieces in records:
            yield entry, counted(pieces)
