"""`fedmq models rollback`: make an old version the newest one, by an ordinary commit.

    x_{v+1} <- x_old

It undoes everything that came after the old version: the open buffer, and what the rule and the server optimizer
remember, go with the versions. Updates trained from any version before the new one are refused as stale from here on,
so that what led astray does not come back with them; a worker with error feedback sends their mass again.
"""

import json
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

from tenacity import Retrying, retry_if_exception_type, stop_after_attempt, wait_random

from aggregator.state import from_stored, rule_of_state, small_part
from shared.config import AggregatorSettings
from shared.errors import SettingsError, VersionConflict, VersionGone
from shared.model_image import ModelImage
from shared.published import Publication
from shared.store.ports import Commit, StateStore, Stored
from shared.store.redis import RedisStore

ATTEMPTS_MAX = 20  # a live aggregator commits about twice a second
OUTCOME = "rollback"  # in the ledger, beside those of updates
META = "rolled_back_to"


@dataclass(frozen=True, slots=True)
class RolledBack:
    """What a rollback did.

    Attributes:
        version: the new one.
        revision: that holds it.
        undone: the newest version before it.
        discarded: updates of the open buffer that went.
    """

    version: int
    revision: int
    undone: int
    discarded: int


def command(settings: AggregatorSettings, name: str) -> None:
    """Roll a job back and say what that did.

    Args:
        settings: job and store.
        name: a version or a tag.

    Raises:
        SettingsError: there is no such version, it is the newest, or the job's rule does not allow it.
    """
    store = RedisStore(settings.store_url, settings.job, settings.durable, settings.store_replicas)
    store.check()
    version = _version(store, settings.job, name)
    before = _done_before(store, version)
    if before is not None:
        print(f"version {before} of job {settings.job} is version {version} already, and nothing came after it")
        return
    done = roll_back(store, version, settings.job, time.time)
    store.close()
    print(
        f"version {done.version} of job {settings.job}, revision {done.revision}, has the weights of {version}. "
        f"Versions {version + 1} to {done.undone} and {done.discarded} updates of the open buffer are undone; the "
        f"server optimizer and the rule begin anew; updates trained from before version {done.version} are refused "
        "as stale"
    )


def roll_back(store: StateStore, version: int, job: str, now: Callable[[], float], pause_s: float = 0.5) -> RolledBack:
    """Commit the weights of an old version as a new one; again when an aggregator committed meanwhile.

    Args:
        store: the job's.
        version: an old one, stored.
        job: its id, for messages.
        now: unix seconds.
        pause_s: longest rest between two attempts.

    Raises:
        SettingsError: it cannot be rolled back to, or aggregators commit faster than this can.
        StoreUnavailable: it may or may not have happened.
    """
    retrying = Retrying(
        retry=retry_if_exception_type(VersionConflict), stop=stop_after_attempt(ATTEMPTS_MAX),
        wait=wait_random(0, pause_s), reraise=True,
    )  # fmt: skip
    read = cache(store.model)  # versions do not change: only the first attempt pays for it
    try:
        return retrying(_attempt, store, read, version, job, now)
    except VersionConflict as error:
        raise SettingsError(
            f"the aggregator of job {job!r} committed {ATTEMPTS_MAX} times while this tried to: stop it, and try again"
        ) from error


def _attempt(
    store: StateStore, read: Callable[[int], ModelImage], version: int, job: str, now: Callable[[], float]
) -> RolledBack:
    stored = store.load()
    if stored is None:
        raise SettingsError(f"job {job!r} has no model in this store")
    _refuse(stored, store, version, job)
    try:
        model = read(version)
    except VersionGone as error:
        raise SettingsError(f"{error}; stored are {stored.versions}") from error
    made, discarded = _commit(stored, store, model, version, now())
    store.commit(made)
    return RolledBack(made.version, made.expected_revision + 1, stored.head.version, discarded)


def _refuse(stored: Stored, store: StateStore, version: int, job: str) -> None:
    """Say what speaks against it.

    Raises:
        SettingsError: always one reason.
    """
    if version == stored.head.version:
        raise SettingsError(
            f"version {version} is the newest of job {job!r}: there is nothing to undo; older ones that are stored: "
            f"{stored.versions[:-1]}"
        )
    if version not in stored.versions:
        raise SettingsError(f"version {version} is not stored; stored are {stored.versions}")
    rules = {str(rule_of_state(stored)), str(store.job().get("rule", ""))}
    if any(rule.partition("(")[0].strip() == "area" for rule in rules):
        raise SettingsError(
            f"job {job!r} runs rule area, whose workers remember what they sent: a model they did not make together "
            "cannot be theirs. Export the version (`fedmq models export FILE --version "
            f"{version}`) and begin a new job from it (FEDMQ_INIT_MODEL=FILE)"
        )


def _commit(stored: Stored, store: StateStore, model: ModelImage, version: int, now: float) -> tuple[Commit, int]:
    """Return the commit that undoes everything after a version, and how many buffered updates go with it."""
    state = from_stored(stored, "", (), {}, store.kept)  # as for another rule: nothing that a rule keeps stays
    rule, floor, index = rule_of_state(stored) or "", state.floor, store.published(-1)
    discarded = [contribution.update_id for contribution in state.buffer]
    state.buffer.clear()
    state.buffer_since = 0.0
    state.version = state.floor = stored.head.version + 1
    told = {
        "id": "", "outcome": OUTCOME, "version": state.version, "to": version, "from": stored.head.version,
        "discarded": discarded,
    }  # fmt: skip
    commit = Commit(
        expected_revision=state.revision,
        token=f"{OUTCOME} {uuid.uuid4().hex}",
        version=state.version,
        model=model,
        arrays={},
        state=small_part(state, "", rule, ()),
        applied={},
        applied_floor=floor,  # what is delivered once more before the next version is still known
        ledger=json.dumps([told]),
        clients={},
        meta={"updates": "0", META: str(version), "discarded": str(len(discarded))},
        dropped_versions=[],
        now=now,
        publication=Publication(dropped_deltas=index.deltas, dropped_snapshots=index.snapshots),  # they end elsewhere
        kept=dict(state.kept.changes),
    )
    return commit, len(discarded)


def _version(store: RedisStore, job: str, name: str) -> int:
    """Return the version that a number or a tag names."""
    head = store.head()
    if head is None:
        raise SettingsError(f"job {job!r} has no model in this store: `fedmq models init TASK --job {job}` makes one")
    number = int(name) if name.isdecimal() else store.tagged(name)
    if number is None:
        raise SettingsError(f"{name!r} is no version and no tag of job {job!r}: see `fedmq models list --job {job}`")
    return number


def _done_before(store: RedisStore, version: int) -> int | None:
    """Return the newest version if it is a rollback to this one and nothing has been committed since."""
    head = store.head()
    if head is None:
        return None
    meta = store.meta(head.version)
    return head.version if (meta.get(META), meta.get("revision")) == (str(version), str(head.revision)) else None
