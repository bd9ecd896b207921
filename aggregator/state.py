"""The whole aggregation state, as it is loaded, changed in memory and committed."""

from dataclasses import dataclass, field
from typing import Any

import msgpack
import numpy as np

from shared.model_image import ModelImage
from shared.store.ports import Stored
from shared.vector import Vector

STATE_FORMAT = 1


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


@dataclass(slots=True)
class State:
    """What one aggregator holds; model-size vectors are changed in place.

    Attributes:
        revision: of the store, when this was loaded or last committed.
        version: model version, may be ahead of the last committed one.
        committed_version: newest version that others can have pulled.
        model: the weights of `version`.
        arrays: model-size vectors of the rule, e.g. the running sum.
        buffer: contributions since the last version.
        buffer_since: unix seconds when the oldest of them came; 0 while there is none.
        applied: update_id -> base_version of applied updates within the staleness horizon.
        floor: updates with a base_version below it are refused for good: their ids may have been forgotten. It
            never sinks, also when staleness_max is raised.
        versions: versions whose weights the store holds, ascending.
        totals: outcome -> number of updates, over the job's whole life.
    """

    revision: int
    version: int
    committed_version: int
    model: ModelImage
    arrays: dict[str, Vector] = field(default_factory=dict)
    buffer: list[Contribution] = field(default_factory=list)
    buffer_since: float = 0.0
    applied: dict[str, int] = field(default_factory=dict)
    floor: int = 0
    versions: list[int] = field(default_factory=list)
    totals: dict[str, int] = field(default_factory=dict)

    @property
    def weights(self) -> Vector:
        """The flat weights, a view into the model."""
        return self.model.weights


def from_stored(stored: Stored, array_names: tuple[str, ...]) -> State:
    """Build the state of a stored revision; missing arrays start at zero."""
    fresh: dict[str, Any] = {"buffer": [], "since": 0.0, "floor": 0, "totals": {}}
    small = msgpack.unpackb(stored.state) if stored.state else fresh
    arrays = {
        name: stored.arrays.get(name, np.zeros(stored.head.num_params, np.float32)) for name in array_names
    }  # fmt: skip
    return State(
        revision=stored.head.revision,
        version=stored.head.version,
        committed_version=stored.head.version,
        model=stored.model,
        arrays=arrays,
        buffer=[Contribution(*item) for item in small["buffer"]],
        buffer_since=small["since"],
        applied=stored.applied,
        floor=small["floor"],
        versions=stored.versions,
        totals=small["totals"],
    )


def open_buffer_kind(stored: Stored) -> str | None:
    """Return what the stored open buffer is a sum of (`Rule.buffer_kind`), None while it is empty."""
    small = msgpack.unpackb(stored.state) if stored.state else {"buffer": []}
    return str(small["rule"]) if small["buffer"] else None


def small_part(state: State, rule: str, arrays: tuple[str, ...]) -> bytes:
    """Write the part of the state that is not of model size.

    Args:
        state: the state.
        rule: `Rule.buffer_kind` of its buffer.
        arrays: which model-size vectors go with it.
    """
    buffer = [[c.update_id, c.staleness, c.weight, c.mass] for c in state.buffer]
    record: dict[str, Any] = {"format": STATE_FORMAT, "rule": rule, "arrays": list(arrays), "buffer": buffer}
    record |= {"since": state.buffer_since, "floor": state.floor, "totals": state.totals}
    packed: bytes = msgpack.packb(record)
    return packed


def forget_old_ids(state: State, floor: int) -> None:
    """Raise the floor and drop applied ids with a base_version below it: such updates are refused from now on."""
    state.floor = max(state.floor, floor)
    if state.applied and min(state.applied.values()) < state.floor:
        state.applied = {update_id: base for update_id, base in state.applied.items() if base >= state.floor}
