"""`fedmq models`: the versions of a job's model."""

import logging
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from shared.command import log_to_stderr
from shared.config import EvaluatorSettings, Settings
from shared.errors import SettingsError, VersionGone
from shared.layout import KEPT_BYTES
from shared.store.redis import EVALUATION, RedisStore
from worker.task import Task, read

log = logging.getLogger("fedmq")


def init(settings: EvaluatorSettings, out: Path | None) -> None:
    """Build a task's model and store it as version 0, or write it to a file.

    Raises:
        SettingsError: the job has a model already, or the task is unusable.
    """
    log_to_stderr(settings.log_level)
    image = read(Task.load(settings.task, needs=("build",)).build())
    size = f"{image.layout.num_params:,} parameters in {len(image.layout.tensors)} tensors"
    if out is not None:
        image.save(out)
        print(f"wrote {out}: {size}; start a job from it with FEDMQ_INIT_MODEL={out}")
        return
    store = RedisStore(settings.store_url, settings.job)
    if not store.create(image, time.time()):
        raise SettingsError(f"job {settings.job!r} has a model already: choose another --job")
    print(f"version 0 of job {settings.job}: {size}, layout {image.layout.hash[:12]}")


def list_versions(settings: Settings) -> None:
    """Print the stored versions."""
    store = RedisStore(settings.store_url, settings.job)
    table = Table(title=f"job {settings.job}", title_justify="left")
    for column in ("version", "created", "updates", "staleness mean", "staleness max", "evaluation", "sha256"):
        table.add_column(column)
    for version in _versions(store, settings.job):
        meta = store.meta(version)
        created = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(float(meta.get("created_at", 0))))
        evaluation = ", ".join(
            f"{name.removeprefix(EVALUATION)} {float(value):.4g}"
            for name, value in sorted(meta.items()) if name.startswith(EVALUATION)
        )  # fmt: skip
        table.add_row(
            str(version), created, meta.get("updates", ""), meta.get("staleness_mean", ""),
            meta.get("staleness_max", ""), evaluation, meta.get("sha256", "")[:12],
        )  # fmt: skip
    Console().print(table)


def show(settings: Settings, version: str) -> None:
    """Print what is known of a version, and its tensors."""
    store = RedisStore(settings.store_url, settings.job)
    number = _number(store, settings.job, version)
    console = Console()
    for name, value in sorted(store.meta(number).items()):
        console.print(f"{name}: {value}", highlight=False)
    table = Table(title=f"job {settings.job}, version {number}", title_justify="left")
    for column in ("tensor", "shape", "dtype", "policy", "bytes"):
        table.add_column(column)
    for spec in store.layout().tensors:
        size = spec.size * KEPT_BYTES.get(spec.dtype, 4)
        table.add_row(spec.name, str(spec.shape), spec.dtype, spec.policy, f"{size:,}")
    console.print(table)


def export(settings: Settings, version: str, out: Path) -> None:
    """Write a version as a safetensors file."""
    store = RedisStore(settings.store_url, settings.job)
    number = _number(store, settings.job, version)
    try:
        image = store.model(number)
    except VersionGone as error:
        raise SettingsError(f"{error}; stored are {_versions(store, settings.job)}") from error
    image.save(out)
    print(
        f"wrote version {number} of job {settings.job} to {out}: {image.data.size:,} bytes, sha256 {image.sha256[:12]}"
    )


def _versions(store: RedisStore, job: str) -> list[int]:
    head = store.head()
    if head is None:
        raise SettingsError(f"job {job!r} has no model in this store: `fedmq models init TASK --job {job}` makes one")
    versions: list[int] = store.status()["versions"]
    return versions


def _number(store: RedisStore, job: str, version: str) -> int:
    versions = _versions(store, job)
    if version == "newest":
        return versions[-1]
    if not version.isdigit() or int(version) not in versions:
        raise SettingsError(f"version {version!r} is not stored; stored are {versions}, or say `newest`")
    return int(version)
