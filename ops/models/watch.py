"""`fedmq models watch`: follow a job's versions, and run a command for each: deploy it, test it, announce it."""

import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from ops.models.facts import evaluation_of, facts_of
from ops.models.listing import clock, metrics
from ops.models.lookup import check_tag, entry_of, opened
from shared.config import Settings
from shared.errors import StoreUnavailable
from shared.store.redis_versions import RedisVersions

EVALUATED_MAX = 64  # newest versions whose evaluation is waited for
METRICS_MAX = 2
RETRY_S = 2.0


@dataclass(slots=True)
class Watch:
    """What has been told so far.

    Attributes:
        version: the newest one told of, or that the tag named; None: nothing yet.
        due: the version that the command is still to be run for, None: there is none.
        waiting: versions told of that had no evaluation, oldest first.
        missed: the store did not answer the last time.
    """

    version: int | None = None
    due: int | None = None
    waiting: list[int] = field(default_factory=list)
    missed: bool = False


def command(settings: Settings, tag: str | None, execute: str | None, poll_s: float) -> None:
    """Print a line for each version as it appears, and run a command for it; until Ctrl-C.

    What is there at the start counts as new, so that a watcher that was away catches up. While the command runs,
    versions may come: it is run for the newest of them only. A command that fails is told of and not repeated.

    Args:
        settings: job and store.
        tag: follow what this tag names instead of the newest version.
        execute: for the shell; it finds FEDMQ_VERSION, FEDMQ_TAG and FEDMQ_SHA256 in its environment, and FEDMQ_JOB
            and FEDMQ_STORE_URL for more commands of FedMQ.
        poll_s: how often to look, seconds.

    Raises:
        SettingsError: the job has no model, or the tag is none.
        StoreUnavailable: the store does not answer at the start; later it is waited for.
    """
    if tag is not None:
        check_tag(tag)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: in a container nobody else would end it
    store, watch = opened(settings), Watch()
    if tag is not None and store.tagged(tag) is None:
        say(f"job {settings.job} has no tag {tag} yet: waiting for it")
    while True:
        try:
            look(store, watch, tag)
            watch.missed = False
            if watch.due is not None and execute is not None:
                run(execute, settings, watch.due, tag or "", store.meta(watch.due).get("sha256", ""))
            watch.due = None
        except StoreUnavailable as error:
            if not watch.missed:
                say(f"{error}; going on when it answers")
            watch.missed = True
            time.sleep(RETRY_S)
        time.sleep(poll_s)


def look(store: RedisVersions, watch: Watch, tag: str | None) -> None:
    """Tell what is new since the last look, and note what the command is to be run for.

    Raises:
        StoreUnavailable: what was told is noted; the rest comes with the next look.
    """
    if tag is not None:
        _tag_moved(store, watch, tag)
    else:
        _versions_made(store, watch)
    for version in list(watch.waiting):
        if evaluation := evaluation_of(store.meta(version)):
            say(f"version {version}: {metrics(evaluation, METRICS_MAX)}")
            watch.waiting.remove(version)
    del watch.waiting[:-EVALUATED_MAX]


def run(execute: str, settings: Settings, version: int, tag: str, sha256: str) -> int:
    """Run a command for a version; return its exit code."""
    given: Mapping[str, str] = {
        "FEDMQ_VERSION": str(version), "FEDMQ_TAG": tag, "FEDMQ_SHA256": sha256, "FEDMQ_JOB": settings.job,
        "FEDMQ_STORE_URL": settings.store_url,
    }  # fmt: skip
    started = time.monotonic()
    done = subprocess.run(["/bin/sh", "-c", execute], env=os.environ | dict(given), check=False)
    took = f"after {time.monotonic() - started:.1f} s"
    if done.returncode:
        say(f"version {version}: the command FAILED with exit code {done.returncode} {took}; it is not run again")
    else:
        say(f"version {version}: the command is done {took}")
    return done.returncode


def say(text: str, now: Callable[[], float] = time.time) -> None:
    """Print a line with the time, at once also into a pipe."""
    print(f"{clock(now())} {text}", flush=True)


def _tag_moved(store: RedisVersions, watch: Watch, tag: str) -> None:
    version = store.tagged(tag)
    if version == watch.version:
        return
    if version is None:
        say(f"tag {tag} was removed; it was version {watch.version}")
    else:
        moved = "" if watch.version is None else f", it was version {watch.version}"
        say(f"tag {tag} is version {version}{moved}: {_told(store, watch, version)}")
    watch.version = watch.due = version


def _versions_made(store: RedisVersions, watch: Watch) -> None:
    head = store.head()
    if head is None or head.version == watch.version:
        return
    if watch.version is None:
        watch.version = head.version - 1
    if head.version < watch.version:
        say(f"the job was set back from version {watch.version} to version {head.version}")
        watch.version, watch.waiting = head.version - 1, []
    for entry in store.versions():
        if watch.version < entry.version <= head.version:
            say(f"version {entry.version}: {_told(store, watch, entry.version)}")
            watch.version = watch.due = entry.version
    watch.version = watch.due = head.version


def _told(store: RedisVersions, watch: Watch, version: int) -> str:
    """Return what is known of a version; where it was not evaluated, note that."""
    facts = facts_of(store, entry_of(store, version))
    parts = [f"made {clock(facts.created_at)}", f"{facts.updates} updates"]
    if facts.clients:
        parts[-1] += f" of {facts.clients} clients"
    if facts.staleness is not None:
        parts.append(f"staleness {facts.staleness[0]:.3g}, at most {facts.staleness[1]}")
    if facts.tags:
        parts.append(f"tags {', '.join(facts.tags)}")
    if facts.evaluation:
        parts.append(metrics(facts.evaluation, METRICS_MAX))
    elif version not in watch.waiting:
        watch.waiting.append(version)
    return "; ".join(parts)
