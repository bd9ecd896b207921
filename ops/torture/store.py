"""The way to the store, with everything that can happen there."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NoReturn, ParamSpec, TypeVar

from ops.torture.fate import Fate, Killed, World
from ops.torture.history import History
from shared.errors import StoreUnavailable, VersionConflict
from shared.layout import Layout
from shared.model_image import ModelImage
from shared.published import Delta, DeltaEntry, Index, SnapshotEntry
from shared.store.inprocess import InProcessStore
from shared.store.ports import Commit, Head, Stored, StoredVersion

P = ParamSpec("P")
R = TypeVar("R")


def _never() -> None:
    """What `Torn.tear` is where nobody says otherwise."""


@dataclass(frozen=True, slots=True)
class Torn(Commit):
    """A commit whose process dies while the store works on it.

    Attributes:
        tear: when called, the process is gone. A store that is all or nothing has no use for it.
    """

    tear: Callable[[], None] = _never


class TortureStore:
    """One process's way to the store, as all three of its ports.

    Args:
        inner: the store.
        world: time.
        fate: of the process.
        history: what came of it.
    """

    def __init__(self, inner: InProcessStore, world: World, fate: Fate, history: History) -> None:
        self._inner, self._world, self._fate, self._history = inner, world, fate, history

    def head(self) -> Head | None:
        """Return where the job stands."""
        return self._call(self._inner.head)

    def layout(self) -> Layout:
        """Return the job's layout."""
        return self._inner.layout()

    def model(self, version: int) -> ModelImage:
        """Return the weights of a version."""
        image = self._call(self._inner.model, version)
        self._history.saw_model(version, image)
        return image

    def job(self) -> dict[str, Any]:
        """Return what was announced."""
        return self._call(self._inner.job)

    def record_evaluation(self, version: int, metrics: Mapping[str, float]) -> None:
        """Add an evaluator's numbers."""
        self._call(self._inner.record_evaluation, version, metrics)

    def outcomes(self, client: str, after: int) -> tuple[list[tuple[str, str]], int]:
        """Return what became of a client's updates."""
        return self._call(self._inner.outcomes, client, after)

    def published(self, after: int) -> Index:
        """Return what is published."""
        return self._call(self._inner.published, after)

    def snapshot(self, entry: SnapshotEntry) -> ModelImage:
        """Return the weights of a snapshot."""
        return self._call(self._inner.snapshot, entry)

    def deltas(self, entries: Sequence[DeltaEntry]) -> list[Delta]:
        """Return deltas."""
        return self._call(self._inner.deltas, entries)

    def create(self, model: ModelImage, now: float) -> bool:
        """Store version 0."""
        return self._call(self._inner.create, model, now)

    def announce(self, job: Mapping[str, Any]) -> None:
        """Write what `job` returns."""
        self._call(self._inner.announce, job)

    def load(self) -> Stored | None:
        """Return the state of the newest revision."""
        stored = self._call(self._inner.load)
        if stored is not None:
            self._history.saw_model(stored.head.version, stored.model)
        return stored

    def versions(self) -> list[StoredVersion]:
        """Return the stored versions."""
        return self._call(self._inner.versions)

    def kept(self, name: str) -> bytes | None:
        """Return a record of the rule."""
        return self._call(self._inner.kept, name)

    def commit(self, commit: Commit) -> None:
        """Commit: now, later or not at all, and answer or not."""
        fate = self._fate
        fate.before("commit")
        self._reach()
        if fate.take("write_lost") is not None:
            raise StoreUnavailable("no answer: the commit never arrived")
        if (given := fate.take("commit_late")) is not None:
            self._commit_later(commit, given["seconds"])
            raise StoreUnavailable("no answer: the commit is on its way")
        if (given := fate.take("killed_in_commit")) is not None:
            self._die_in(commit, given["happens"], given["seconds"])
        self._inner.commit(commit)
        self._history.committed(self._inner)
        if fate.take("commit_confirm_lost") is not None:
            raise StoreUnavailable("no answer: it was lost")
        fate.after()

    def _call(self, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        self._fate.before(function.__name__)
        self._reach()
        result = function(*args, **kwargs)
        self._fate.after()
        return result

    def _reach(self) -> None:
        """Find the store, or not, sooner or later."""
        world = self._world
        if world.time_s < world.store_away_s:
            raise StoreUnavailable("the store is away")
        if (given := self._fate.take("store_slow")) is not None:
            world.move_to(world.time_s + given["seconds"])

    def _commit_later(self, commit: Commit, seconds: float) -> None:
        """Have a commit arrive when its sender has long given up waiting."""
        copy = _copy(commit)

        def arrive() -> None:
            try:
                self._inner.commit(copy)
                self._history.committed(self._inner)
            except VersionConflict:
                pass

        self._world.later(seconds, arrive)

    def _die_in(self, commit: Commit, happens: str, seconds: float) -> NoReturn:
        """Die while the store works on a commit."""
        if happens == "late":
            self._commit_later(commit, seconds)
        elif happens == "now":
            names = Commit.__dataclass_fields__
            try:
                self._inner.commit(Torn(**{name: getattr(commit, name) for name in names}, tear=_tear))
            finally:
                self._history.committed(self._inner)
        self._fate.die("killed_in_commit", "in")


def _tear() -> None:
    raise Killed("killed_in_commit")


def _copy(commit: Commit) -> Commit:
    """Return a commit that its sender cannot change any more."""
    publication = commit.publication
    if publication.snapshot is not None:
        entry, image = publication.snapshot
        publication = replace(publication, snapshot=(entry, image.copy()))
    return replace(
        commit, model=None if commit.model is None else commit.model.copy(), publication=publication,
        arrays={name: array.copy() for name, array in commit.arrays.items()},
    )  # fmt: skip
