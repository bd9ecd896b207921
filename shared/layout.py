"""The layout: named tensors <-> one flat float32 vector.

Floating-point tensors are averaged: they lie one after the other in the flat vector that updates are
made of. Integer and boolean tensors (BatchNorm's `num_batches_tracked`, masks, indices) cannot be
averaged: their policy is `keep`, the value of version 0 travels with every version and no update
changes it. The layout's JSON names every tensor with its policy; its sha256 is the layout hash, by
which an update proves that it was made for this model.
"""

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from shared.errors import SettingsError
from shared.vector import Vector

TENSORS_MAX = 100_000  # a layout with more is refused
NAME_CHARS_MAX = 512  # a tensor's name
NUM_PARAMS_MAX = 2**33  # 8.6e9 parameters, 34 GB of float32: beyond, an offset or a size is a mistake

FLOAT_BYTES = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}
KEPT_BYTES = {
    "int64": 8, "int32": 4, "int16": 2, "int8": 1, "uint64": 8, "uint32": 4, "uint16": 2, "uint8": 1, "bool": 1,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One tensor of the model.

    Attributes:
        name: its key in the state_dict.
        shape: its dimensions; () is a scalar.
        dtype: its type in the user's model, e.g. `float32`, `bfloat16`, `int64`.
        policy: `average` (part of the flat vector) or `keep` (its value never changes).
        offset: for `average`, its first element in the flat vector; for `keep`, its first byte among the kept.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    policy: str
    offset: int

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Layout:
    """Which tensors a model has and where each lies. Build it with `Layout.of`.

    Attributes:
        tensors: the averaged tensors in flat order, then the kept ones, widest type first.
    """

    tensors: tuple[TensorSpec, ...]

    @classmethod
    def of(cls, shapes: Iterable[tuple[str, tuple[int, ...], str]]) -> "Layout":
        """Lay out (name, shape, dtype) triples: floats in the order given, then the others by width.

        Raises:
            SettingsError: a type that is neither float, integer nor bool, a repeated name, no float at all.
        """
        return _laid_out(tuple((name, tuple(shape), dtype) for name, shape, dtype in shapes))

    @classmethod
    def from_json(cls, text: str | bytes) -> "Layout":
        """Read what `json` wrote."""
        fields: list[dict[str, Any]] = json.loads(text)["tensors"]
        return cls(tuple(TensorSpec(**{**field, "shape": tuple(field["shape"])}) for field in fields))

    def __hash__(self) -> int:
        """Hash the layout hash: computed once, however many tensors there are."""
        return hash(self.hash)

    @cached_property
    def json(self) -> str:
        """Canonical JSON: sorted keys, no spaces."""
        return json.dumps({"tensors": [asdict(t) for t in self.tensors]}, sort_keys=True, separators=(",", ":"))

    @cached_property
    def hash(self) -> str:
        """The sha256 of the canonical JSON, in hex."""
        return hashlib.sha256(self.json.encode()).hexdigest()

    @cached_property
    def averaged(self) -> tuple[TensorSpec, ...]:
        """The tensors of the flat vector."""
        return tuple(t for t in self.tensors if t.policy == "average")

    @cached_property
    def kept(self) -> tuple[TensorSpec, ...]:
        """The tensors no update changes."""
        return tuple(t for t in self.tensors if t.policy == "keep")

    @cached_property
    def num_params(self) -> int:
        """Length of the flat vector."""
        return sum(t.size for t in self.averaged)

    @cached_property
    def kept_bytes(self) -> int:
        """Size of the kept tensors together."""
        return sum(t.size * KEPT_BYTES[t.dtype] for t in self.kept)

    def flatten(self, tensors: Mapping[str, npt.NDArray[Any]], out: Vector | None = None) -> Vector:
        """Copy the averaged tensors into one flat vector.

        Args:
            tensors: name -> array of the spec's shape, any float type.
            out: float32 [num_params] to write into; a new one when None.
        """
        flat = np.empty(self.num_params, np.float32) if out is None else out
        for spec in self.averaged:
            flat[spec.offset : spec.offset + spec.size] = tensors[spec.name].reshape(-1)
        return flat

    def unflatten(self, flat: Vector) -> dict[str, Vector]:
        """Return name -> view into `flat` with the tensor's shape; nothing is copied."""
        return {t.name: flat[t.offset : t.offset + t.size].reshape(t.shape) for t in self.averaged}


@lru_cache(maxsize=16)  # a worker's model has the same tensors after every training, and the hash is not computed anew
def _laid_out(shapes: tuple[tuple[str, tuple[int, ...], str], ...]) -> Layout:
    """Lay tensors out, as of `Layout.of`."""
    floats: list[TensorSpec] = []
    kept: list[tuple[str, tuple[int, ...], str]] = []
    names: set[str] = set()
    offset = 0
    for name, shape, dtype in shapes:
        if name in names or not 0 < len(name) <= NAME_CHARS_MAX or len(names) >= TENSORS_MAX:
            raise SettingsError(
                f"tensor {name!r}: names must be unique, 1 to {NAME_CHARS_MAX} characters, at most {TENSORS_MAX}"
            )
        names.add(name)
        if dtype in FLOAT_BYTES:
            floats.append(TensorSpec(name, shape, dtype, "average", offset))
            offset += floats[-1].size
        elif dtype in KEPT_BYTES:
            kept.append((name, shape, dtype))
        else:
            raise SettingsError(f"tensor {name!r} is {dtype}: FedMQ averages floats and keeps integers and booleans")
    if not 0 < offset <= NUM_PARAMS_MAX:
        raise SettingsError(f"the model has {offset} floating-point parameters; 1 to {NUM_PARAMS_MAX} are needed")
    kept_specs: list[TensorSpec] = []
    offset = 0
    for name, shape, dtype in sorted(kept, key=lambda item: -KEPT_BYTES[item[2]]):  # stable: aligned
        kept_specs.append(TensorSpec(name, shape, dtype, "keep", offset))
        offset += kept_specs[-1].size * KEPT_BYTES[dtype]
    return Layout(tuple(floats + kept_specs))


def difference(mine: Layout, theirs: Layout) -> str:
    """Say in one line which tensor first differs between a worker's layout and the job's."""
    ours, job = ({t.name: t for t in layout.tensors} for layout in (mine, theirs))
    for name in job.keys() - ours.keys():
        return f"tensor {name!r} {job[name].shape} {job[name].dtype} of the job is missing in this task's model"
    for name in ours.keys() - job.keys():
        return f"tensor {name!r} {ours[name].shape} {ours[name].dtype} of this task's model is unknown to the job"
    for name, spec in ours.items():
        other = job[name]
        if (spec.shape, spec.dtype) != (other.shape, other.dtype):
            return f"tensor {name!r} is {spec.shape} {spec.dtype} here, {other.shape} {other.dtype} in the job"
        if spec != other:
            return f"tensor {name!r} stands at offset {spec.offset} here, at {other.offset} in the job: another order"
    return "no difference"
