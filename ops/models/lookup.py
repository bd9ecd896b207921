"""Finding the version that somebody means: a number, a tag, or `newest`."""

import re
from collections.abc import Sequence

from shared.config import AggregatorSettings, Settings
from shared.errors import SettingsError, VersionGone
from shared.model_image import ModelImage
from shared.store.ports import StoredVersion
from shared.store.redis_versions import RedisVersions

NEWEST = "newest"
TAG = re.compile(r"[A-Za-z0-9_-]{1,64}")
NAMED_MAX = 10  # versions in a message


def opened(settings: Settings) -> RedisVersions:
    """Return the job's versions, to be read.

    Raises:
        SettingsError: the job has no model.
        StoreUnavailable: Redis does not answer.
    """
    return _with_model(RedisVersions(settings.store_url, settings.job), settings.job)


def opened_to_write(settings: AggregatorSettings) -> RedisVersions:
    """Return the job's versions, to be changed as durably as commits are.

    Raises:
        SettingsError: the job has no model, or the store may forget what it acknowledged.
        StoreUnavailable: Redis does not answer.
    """
    store = RedisVersions(settings.store_url, settings.job, settings.durable, settings.store_replicas)
    store.check()
    return _with_model(store, settings.job)


def number_of(store: RedisVersions, name: str) -> int:
    """Return the stored version that a number, a tag or `newest` names.

    Raises:
        SettingsError: it names none, or one that is not stored.
    """
    entries = store.versions()
    stored = [entry.version for entry in entries]
    if name == NEWEST and stored:
        return stored[-1]
    version = int(name) if name.isdecimal() else store.tagged(name)
    if version in stored:
        return int(version)
    if version is not None and not name.isdecimal():
        raise SettingsError(f"tag {name!r} names version {version}, which is not stored; stored are {listed(stored)}")
    tags = sorted(tag for entry in entries for tag in entry.tags)
    kind = "is not stored" if name.isdecimal() else f"is no number and no tag (tags: {', '.join(tags) or 'none'})"
    raise SettingsError(f"version {name!r} {kind}; stored are {listed(stored)}, or say `{NEWEST}`")


def image_of(store: RedisVersions, version: int) -> ModelImage:
    """Return the weights of a version.

    Raises:
        SettingsError: it has gone meanwhile, or is damaged.
    """
    try:
        return store.model(version)
    except VersionGone as error:
        stored = [entry.version for entry in store.versions()]
        raise SettingsError(f"{error}; stored are {listed(stored)}") from error


def entry_of(store: RedisVersions, version: int) -> StoredVersion:
    """Return a stored version's time and tags; those of one that has gone meanwhile are unknown."""
    return next((entry for entry in store.versions() if entry.version == version), StoredVersion(version, 0.0))


def check_tag(name: str) -> str:
    """Return a name that a tag can have.

    Raises:
        SettingsError: it cannot.
    """
    if not TAG.fullmatch(name):
        raise SettingsError(f"tag {name!r}: must be of {TAG.pattern}")
    if name.isdecimal() or name == NEWEST:
        raise SettingsError(f"tag {name!r} would be taken for a version: choose a word")
    return name


def listed(versions: Sequence[int]) -> str:
    """Return versions for a message, the newest of many."""
    if len(versions) <= NAMED_MAX:
        return str(list(versions))
    return f"{len(versions)}, from {versions[0]} to {versions[-1]}; the newest are {list(versions[-NAMED_MAX:])}"


def _with_model(store: RedisVersions, job: str) -> RedisVersions:
    if store.head() is None:
        raise SettingsError(f"job {job!r} has no model in this store: `fedmq models init TASK --job {job}` makes one")
    return store
