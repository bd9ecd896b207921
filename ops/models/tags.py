"""`fedmq models tag` and `promote`: names for versions, such as production and canary."""

import json
import re
import time
from collections.abc import Callable
from operator import ge, gt, le, lt

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ops.models.facts import evaluation_of
from ops.models.listing import clock, lasting
from ops.models.lookup import check_tag, number_of, opened, opened_to_write
from shared.config import AggregatorSettings, Settings
from shared.errors import FedMQError, SettingsError, VersionConflict, VersionGone
from shared.store.ports import TagChange
from shared.store.redis_versions import RedisVersions

COMPARISONS: dict[str, Callable[[float, float], bool]] = {">=": ge, "<=": le, ">": gt, "<": lt}
GUARD = re.compile(r"\s*([^<>=\s]+)\s*(>=|<=|>|<)\s*([^<>=\s]+)\s*")


class NotPromoted(FedMQError):  # noqa: N818 - what the command prints
    """A tag stays where it is: the version is not good enough, or the other tag was moved meanwhile."""


def list_tags(settings: Settings, history: bool, as_json: bool) -> None:
    """Print which version each tag names, or who named what when.

    Args:
        settings: job and store.
        history: every change instead of what is now.
        as_json: one JSON list instead of a table.
    """
    store = opened(settings)
    changes = store.tag_changes()
    if as_json:
        print(json.dumps(_records(store, changes, history), indent=2))
        return
    if not changes:
        print(f"job {settings.job} has no tags: `fedmq models tag NAME VERSION --job {settings.job}` sets one")
        return
    console = Console()
    table = Table(title=f"tags of job {settings.job}", title_justify="left")
    for column in ("time", "tag", "version", "before") if history else ("tag", "version", "since", "before"):
        table.add_column(column, overflow="fold")
    rows = (
        [(clock(c.at), c.name, _shown(c.version, "removed"), _shown(c.previous, "")) for c in changes]
        if history
        else [
            (name, str(version), "" if last is None else f"{clock(last.at)}, {lasting(time.time() - last.at)} ago",
             "" if last is None else _shown(last.previous, ""))
            for name, version, last in _current(store, changes)
        ]
    )  # fmt: skip
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    if rows:
        console.print(table)
    else:
        print(f"job {settings.job} has no tags any more: --history shows those it had")


def set_tag(settings: AggregatorSettings, name: str, version: str) -> None:
    """Give a version a name, or move the name to it.

    Args:
        settings: job and store.
        name: of the tag.
        version: a number, another tag, or newest.

    Raises:
        SettingsError: there is no such version, or the name is none.
    """
    check_tag(name)
    store = opened_to_write(settings)
    _move(store, settings.job, name, number_of(store, version), "")


def delete(settings: AggregatorSettings, name: str) -> None:
    """Remove a tag; its version may be dropped from then on.

    Raises:
        SettingsError: there is no such tag.
    """
    store = opened_to_write(settings)
    previous = store.untag(check_tag(name), time.time())
    if previous is None:
        raise SettingsError(f"job {settings.job!r} has no tag {name!r}; {_tags(store)}")
    print(f"tag {name} of job {settings.job} is removed; it was version {previous}")


def promote(settings: AggregatorSettings, source: str, target: str, guard: str | None) -> None:
    """Move one tag to the version that another one names.

    Args:
        settings: job and store.
        source: the tag that names the version, e.g. canary.
        target: the tag that is moved, e.g. production.
        guard: what must be true of the version's evaluation, such as `accuracy>=0.94`; None: nothing.

    Raises:
        SettingsError: there is no such tag, or the guard is none.
        NotPromoted: the guard is not met, or the source was moved meanwhile.
    """
    wanted = None if guard is None else read_guard(guard)
    if check_tag(source) == check_tag(target):
        raise SettingsError(f"{source!r} and {target!r} are the same tag: there is nothing to promote")
    store = opened_to_write(settings)
    version = store.tagged(source)
    if version is None:
        raise SettingsError(f"job {settings.job!r} has no tag {source!r}; {_tags(store)}")
    if wanted is not None:
        _check_metric(store, version, *wanted)
    _move(store, settings.job, target, version, source)


def read_guard(text: str) -> tuple[str, str, float]:
    """Read `METRIC>=NUMBER`; also <=, > and <.

    Raises:
        SettingsError: it is something else.
    """
    match = GUARD.fullmatch(text)
    try:
        if match is not None:
            return match[1], match[2], float(match[3])
    except ValueError:
        pass
    raise SettingsError(f'--if-metric {text!r}: say for example --if-metric "accuracy>=0.94" (>=, <=, > or <)')


def _check_metric(store: RedisVersions, version: int, metric: str, comparison: str, limit: float) -> None:
    """Make sure that a version's evaluation is as wanted.

    Raises:
        NotPromoted: it is not, or the version was not evaluated.
    """
    evaluation = evaluation_of(store.meta(version))
    if metric not in evaluation:
        known = f"its metrics are {', '.join(evaluation)}" if evaluation else "it has not been evaluated"
        raise NotPromoted(f"version {version} has no {metric!r}, so nothing was promoted: {known}")
    if not COMPARISONS[comparison](evaluation[metric], limit):
        raise NotPromoted(
            f"{metric} of version {version} is {evaluation[metric]:.6g}, not {comparison} {limit:g}: nothing was "
            "promoted"
        )


def _move(store: RedisVersions, job: str, name: str, version: int, source: str) -> None:
    """Move a tag and say what it was before."""
    try:
        previous = store.tag(name, version, time.time(), source)
    except VersionGone as error:
        raise SettingsError(f"{error} any more: the tag {name!r} stays as it is") from error
    except VersionConflict as error:
        raise NotPromoted(f"{error}: the tag {name!r} stays as it is; look at it and try again") from error
    if previous == version:
        print(f"tag {name} of job {job} is version {version} already")
    else:
        before = "it was not set before" if previous is None else f"it was version {previous} before"
        print(f"tag {name} of job {job} is version {version} now; {before}")


def _current(store: RedisVersions, changes: list[TagChange]) -> list[tuple[str, int, TagChange | None]]:
    """Return each tag, what it names, and the change that made it so."""
    last = {change.name: change for change in changes}
    named = sorted((tag, entry.version) for entry in store.versions() for tag in entry.tags)
    return [(tag, version, last.get(tag)) for tag, version in named]


def _records(store: RedisVersions, changes: list[TagChange], history: bool) -> list[dict[str, object]]:
    if history:
        return [{"at": c.at, "tag": c.name, "version": c.version, "previous": c.previous} for c in changes]
    return [
        {
            "tag": name, "version": version, "since": None if last is None else last.at,
            "previous": None if last is None else last.previous,
        }
        for name, version, last in _current(store, changes)
    ]  # fmt: skip


def _tags(store: RedisVersions) -> str:
    names = sorted(tag for entry in store.versions() for tag in entry.tags)
    return f"its tags are {', '.join(names)}" if names else "it has none"


def _shown(version: int | None, absent: str) -> str:
    return absent if version is None else str(version)
