"""The whole aggregation state, as it is loaded, changed in memory and committed."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import msgpack
import numpy as np

from aggregator.partial import PREFIX, Partial
from shared.model_image import ModelImage
from shared.store.ports import Stored
from shared.vector import Vector

STATE_FORMAT = 2


@dataclass(frozen=True, slots=True)
class Contribution:
    """One update as the open buffer remembers it.

    Attributes:
        update_id: its id.
        staleness: tau at apply, in versions.
        weight: factor of its delta in the running sum.
        mass: its share in the divisor (1, or num_samples when weighting by samples).
    """

    update_id: str
    staleness: int
    weight: float
    mass: float


class Kept:
    """What rules keep beside the vectors, one record a client or a place in the buffer: in the store, not in memory.

    Reads go to what changed since the last commit, then to the store. Names are those of the open state: a record
    that the state does not list does not exist.

    Args:
        read: from the store; None when there is none of that name.
        names: of the records the state has.
    """

    def __init__(self, read: Callable[[str], bytes | None], names: set[str] | None = None) -> None:
        self._read = read
        self.names = names or set()
        self.changes: dict[str, bytes | None] = {}  # since the last commit; None: dropped
        self.changed_bytes = 0

    def get(self, name: str) -> bytes | None:
        """Return a record, None when there is none."""
        if name not in self.names:
            return None
        return self.changes[name] if name in self.changes else self._read(name)

    def put(self, name: str, record: bytes) -> None:
        """Write a record."""
        self.names.add(name)
        self._change(name, record)

    def drop(self, name: str) -> None:
        """Remove a record; one that is not there is no matter."""
        if name in self.names:
            self.names.discard(name)
            self._change(name, None)

    def committed(self) -> None:
        """Note that the changes are durable."""
        self.changes, self.changed_bytes = {}, 0

    def _change(self, name: str, record: bytes | None) -> None:
        self.changed_bytes += len(record or b"") - len(self.changes.get(name) or b"")
        self.changes[name] = record


@dataclass(slots=True)
class State:
    """What one aggregator holds; model-size vectors are changed in place.

    Attributes:
        revision: of the store, when this was loaded or last committed.
        version: model version, may be ahead of the last committed one.
        committed_version: newest version that others can have pulled.
        model: the weights of `version`.
        arrays: model-size vectors of the rule, e.g. the running sum.
        arrays_changed: since the last commit.
        stored_arrays: names of those that the store holds.
        kept: records of the rule, one a client or a place in the buffer, e.g. a client's last delta.
        facts: small facts of the rule, msgpack's types; keys of maps are text.
        buffer: contributions since the last version.
        buffer_since: unix seconds when the oldest of them came; 0 while there is none.
        applied: update_id -> base_version of applied updates within the staleness horizon.
        refused: update_id -> `stale`, or the reason of its rejection; the first outcome of an update is final.
        refused_now: those of them since the last commit.
        partial: client -> its update of which some parts are here; their payload is in `kept`.
        floor: updates with a base_version below it are refused for good: their ids may have been forgotten. It
            never sinks, also when staleness_max is raised.
        totals: outcome -> number of updates, over the job's whole life.
    """

    revision: int
    version: int
    committed_version: int
    model: ModelImage
    arrays: dict[str, Vector] = field(default_factory=dict)
    arrays_changed: bool = False
    stored_arrays: tuple[str, ...] = ()
    kept: Kept = field(default_factory=lambda: Kept(lambda name: None))
    facts: dict[str, Any] = field(default_factory=dict)
    buffer: list[Contribution] = field(default_factory=list)
    buffer_since: float = 0.0
    applied: dict[str, int] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    refused_now: dict[str, str] = field(default_factory=dict)
    partial: dict[str, Partial] = field(default_factory=dict)
    floor: int = 0
    totals: dict[str, int] = field(default_factory=dict)

    @property
    def weights(self) -> Vector:
        """The flat weights, a view into the model."""
        return self.model.weights

    def contributions_of(self, client: str) -> int:
        """Return how many updates of a client the open buffer holds."""
        return sum(contribution.update_id.startswith(f"{client}/") for contribution in self.buffer)

    def refuse(self, update_id: str, outcome: str) -> None:
        """Note that an update is refused for good."""
        self.refused[update_id] = self.refused_now[update_id] = outcome


def from_stored(
    stored: Stored, rule: str, sums: tuple[str, ...], arrays: Mapping[str, float], read: Callable[[str], bytes | None]
) -> State:
    """Build the state of a stored revision.

    Args:
        stored: what the store holds.
        rule: name of the rule; what another one kept is dropped.
        sums: vectors of the open buffer; missing ones start at zero.
        arrays: vectors that last -> what missing ones are filled with.
        read: reads a kept record from the store.
    """
    fresh: dict[str, Any] = {"buffer": [], "since": 0.0, "floor": 0, "totals": {}, "partial": {}}
    small = msgpack.unpackb(stored.state) if stored.state else fresh
    kept, own = Kept(read, set(stored.kept)), small.get("facts_of") == rule
    if not own:
        for name in sorted(name for name in kept.names if not name.startswith(PREFIX)):
            kept.drop(name)
    return State(
        revision=stored.head.revision,
        version=stored.head.version,
        committed_version=stored.head.version,
        model=stored.model,
        arrays={name: _array(stored, name, 0.0, True) for name in sums}
        | {name: _array(stored, name, first, own) for name, first in arrays.items()},
        stored_arrays=tuple(name for name in stored.arrays if own or name in sums),
        kept=kept,
        facts=small["facts"] if own else {},
        buffer=[Contribution(*item) for item in small["buffer"]],
        buffer_since=small["since"],
        applied=stored.applied,
        refused=stored.refused,
        partial={client: Partial.read(record) for client, record in small["partial"].items()},
        floor=small["floor"],
        totals=small["totals"],
    )


def _array(stored: Stored, name: str, first: float, own: bool) -> Vector:
    if own and name in stored.arrays:
        return stored.arrays[name]
    return np.full(stored.head.num_params, first, np.float32)


def open_buffer_kind(stored: Stored) -> str | None:
    """Return what the stored open buffer is a sum of (`Rule.buffer_kind`), None while it is empty."""
    small = msgpack.unpackb(stored.state) if stored.state else {"buffer": []}
    return str(small["rule"]) if small["buffer"] else None


def rule_of_state(stored: Stored) -> str | None:
    """Return the name of the rule that made the stored state, None before its first commit."""
    small = msgpack.unpackb(stored.state) if stored.state else {}
    name: str | None = small.get("facts_of")
    return name


def small_part(state: State, kind: str, rule: str, arrays: tuple[str, ...]) -> bytes:
    """Write the part of the state that is not of model size.

    Args:
        state: the state.
        kind: `Rule.buffer_kind` of its buffer.
        rule: name of the rule, whose facts and kept records these are.
        arrays: which model-size vectors go with it.
    """
    buffer = [[c.update_id, c.staleness, c.weight, c.mass] for c in state.buffer]
    record: dict[str, Any] = {"format": STATE_FORMAT, "rule": kind, "arrays": list(arrays), "buffer": buffer}
    record |= {"since": state.buffer_since, "floor": state.floor, "totals": state.totals}
    record |= {"facts_of": rule, "facts": state.facts}
    record |= {"partial": {client: partial.record() for client, partial in state.partial.items()}}
    packed: bytes = msgpack.packb(record)
    return packed


def forget_old_ids(state: State, floor: int) -> None:
    """Raise the floor and drop applied ids with a base_version below it: such updates are refused from now on."""
    if floor <= state.floor:
        return  # nothing has become too old; to look at 100,000 ids would cost as much as ten folds
    state.floor = floor
    state.applied = {update_id: base for update_id, base in state.applied.items() if base >= floor}
