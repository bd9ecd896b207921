"""`fedmq models prune`: drop versions that nobody needs, while the job runs."""

import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import typer

from aggregator.retention import droppable
from aggregator.rules import rule_of
from ops.dead_letters import seconds_of
from ops.models.lookup import listed, opened_to_write
from ops.recompute import settings_of
from shared.config import AggregatorSettings
from shared.errors import SettingsError
from shared.store.ports import Head


def prune(settings: AggregatorSettings, keep: int | None, older_than: str | None, dry_run: bool, yes: bool) -> None:
    """Drop stored versions.

    Never the newest, one that has a tag, or one that the job's rule needs: those of fedasync within staleness_max,
    version 0 of area. Snapshots and deltas that workers pull are no versions and stay. A running aggregator goes on.

    Args:
        settings: job and store.
        keep: how many of the newest stay; None: the newest one.
        older_than: only those made so long ago, such as `7d`; None: of any age.
        dry_run: only say what would be done.
        yes: do not ask.

    Raises:
        SettingsError: nothing was said, or nobody is there to be asked.
    """
    if keep is None and older_than is None:
        raise SettingsError("say which versions may go: --keep 3, --older-than 7d, or both")
    age_s = seconds_of(older_than) if older_than is not None else 0.0
    store = opened_to_write(settings)
    stored, head = store.versions(), store.head()
    if head is None:  # gone just now
        raise SettingsError(f"job {settings.job!r} has no model in this store any more")
    needed = needed_by(settings.job, store.job(), head)
    older = [entry for entry in stored if entry.version < head.version]
    chosen = droppable(older, (keep or 1) - 1, age_s, 0, needed, time.time())
    print(f"job {settings.job} stores {len(stored)} versions, the newest is {head.version}")
    if tagged := [f"{entry.version} ({', '.join(entry.tags)})" for entry in older if entry.tags]:
        print(f"tagged, so they stay: {', '.join(tagged)}")
    if bound := [entry.version for entry in older if needed(entry.version)]:
        print(f"the job's rule needs them, so they stay: {listed(bound)}")
    if not chosen:
        print("nothing may go")
    elif dry_run:
        print(f"would drop {len(chosen)} versions: {listed(chosen)}")
    elif not yes and not _agreed(settings.job, chosen):
        print("nothing was dropped")
    else:
        gone = store.drop(chosen)
        print(f"dropped {len(gone)} versions: {listed(gone)}")
        if left := [version for version in chosen if version not in gone]:
            print(f"tagged meanwhile, so they stay: {listed(left)}")


def needed_by(job: str, announced: Mapping[str, Any], head: Head) -> Callable[[int], bool]:
    """Return whether a job's rule needs a version. One that is not needed now never will be: versions only ascend.

    Args:
        job: its id.
        announced: what the job's aggregator wrote into the store; empty where none has run.
        head: where the job stands.
    """
    if "rule" not in announced:
        return lambda version: False
    needs = rule_of(settings_of(job, announced)).needs
    oldest = head.version - int(announced["staleness_max"])
    return lambda version: (needs.base and version >= oldest) or (needs.start and version == 0)


def _agreed(job: str, chosen: list[int]) -> bool:
    if not sys.stdin.isatty():
        raise SettingsError(f"this would drop {len(chosen)} versions for good: {listed(chosen)}; say --yes")
    return typer.confirm(f"drop {len(chosen)} versions of job {job} for good ({listed(chosen)})?")
