"""The per-tensor policy: which elements a lossy pipeline touches, and where they lie in the flat vector.

Matrices and larger (at least two dimensions and `SMALL` elements) make up the *body*, in flat order, joined
without gaps. Everything else - biases, norms, small tensors - is a vanishing part of the bytes and a large part of
the accuracy: it travels beside the body as float16. Sender and receiver derive the same cut from the layout.

Source: FLSim and Konecny et al. leave 1-D parameters unquantised; algorithms notes, 2.4.
"""

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
import numpy.typing as npt

from shared.layout import Layout
from shared.vector import BLOCK_ELEMENTS, Vector

SMALL = 1000  # a tensor with fewer elements is small
SLAB = BLOCK_ELEMENTS  # elements handled at once

Indices = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Runs:
    """Stretches of the flat vector, joined one after the other.

    Attributes:
        flat: first element of each stretch in the flat vector, ascending.
        joined: first element of each in the joined vector, ascending.
        size: length of the joined vector.
    """

    flat: tuple[int, ...]
    joined: tuple[int, ...]
    size: int

    @classmethod
    def of(cls, stretches: list[tuple[int, int]]) -> "Runs":
        """Join (first, length) stretches; neighbours become one."""
        flat: list[int] = []
        joined: list[int] = []
        size = end = 0
        for first, length in stretches:
            if not length:
                continue
            if not flat or first != end:
                flat.append(first)
                joined.append(size)
            size, end = size + length, first + length
        return cls(tuple(flat), tuple(joined), size)

    def pieces(self, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """Yield (flat, offset, length) of the stretches that `joined[start:stop]` is made of."""
        index = bisect_right(self.joined, start) - 1
        position = start
        while position < stop:
            end = min(stop, self.joined[index + 1] if index + 1 < len(self.joined) else self.size)
            yield self.flat[index] + position - self.joined[index], position - start, end - position
            position, index = end, index + 1

    def read(self, vector: Vector, start: int, stop: int, out: Vector) -> Vector:
        """Return `joined[start:stop]` of a flat vector: a view where it is one stretch, else copied into `out`."""
        pieces = list(self.pieces(start, stop))
        if len(pieces) == 1:
            first, _, length = pieces[0]
            return vector[first : first + length]
        for first, offset, length in pieces:
            out[offset : offset + length] = vector[first : first + length]
        return out[: stop - start]

    def add(self, total: Vector, start: int, values: Vector) -> None:
        """Add `values` to the flat vector in place, where `joined[start:]` lies."""
        for first, offset, length in self.pieces(start, start + values.size):
            target = total[first : first + length]
            np.add(target, values[offset : offset + length], out=target)

    def locate(self, indices: Indices) -> Indices:
        """Return where elements of the joined vector lie in the flat one."""
        if len(self.flat) == 1:
            return indices + self.flat[0] if self.flat[0] else indices
        run = np.searchsorted(self._joined_array, indices, side="right") - 1
        return indices + self._shifts[run]

    @cached_property
    def _joined_array(self) -> Indices:
        return np.array(self.joined, np.int64)

    @cached_property
    def _shifts(self) -> Indices:
        return np.array(self.flat, np.int64) - self._joined_array


@dataclass(frozen=True)
class Parts:
    """How a layout is cut.

    Attributes:
        body: what the lossy stages see.
        small: what travels as float16.
        ends: for each tensor of the body, one past its last element in the joined body.
        small_ends: the same for the small ones taken as one.
    """

    body: Runs
    small: Runs
    ends: Indices
    small_ends: Indices


@lru_cache(maxsize=32)
def parts_of(layout: Layout, whole: bool) -> Parts:
    """Cut a layout.

    Args:
        layout: the job's.
        whole: no policy: every tensor belongs to the body.
    """
    body: list[tuple[int, int]] = []
    small: list[tuple[int, int]] = []
    for spec in layout.averaged:
        large = whole or (len(spec.shape) > 1 and spec.size >= SMALL)
        (body if large else small).append((spec.offset, spec.size))
    ends = np.cumsum([length for _, length in body if length], dtype=np.int64)
    together = Runs.of(small)
    return Parts(Runs.of(body), together, ends, np.array([together.size]))


@dataclass(frozen=True)
class Values:
    """Numbers on their way into a quantizer.

    Attributes:
        vector: float32, where they lie.
        runs: which stretches of it.
        ends: for each tensor, one past its last element.
    """

    vector: Vector
    runs: Runs
    ends: Indices

    @classmethod
    def plain(cls, vector: Vector, ends: Indices) -> "Values":
        """Take a vector as it is."""
        return cls(vector, Runs.of([(0, vector.size)]), ends)

    @property
    def size(self) -> int:
        """Number of elements."""
        return self.runs.size

    def slabs(self, step: int = SLAB) -> Iterator[tuple[int, Vector]]:
        """Yield (start, values): views or one scratch, good until the next turn; not to be changed."""
        scratch = np.empty(min(step, self.size), np.float32)
        for start in range(0, self.size, step):
            stop = min(start + step, self.size)
            yield start, self.runs.read(self.vector, start, stop, scratch)

    def by_tensor(self, step: int = SLAB) -> Iterator[tuple[int, int, Vector]]:
        """Yield (tensor, start, values) in slabs that do not cross a tensor's end."""
        scratch = np.empty(min(step, self.size), np.float32)
        first = 0
        for tensor, end in enumerate(self.ends.tolist()):
            for start in range(first, end, step):
                stop = min(start + step, end)
                yield tensor, start, self.runs.read(self.vector, start, stop, scratch)
            first = end


def tensor_pieces(ends: Indices, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
    """Yield (tensor, from, to) for the tensors that elements `start` to `stop` belong to, relative to `start`."""
    tensor = int(np.searchsorted(ends, start, side="right"))
    position = start
    while position < stop:
        end = min(stop, int(ends[tensor]))
        if end > position:
            yield tensor, position - start, end - start
        position, tensor = max(position, end), tensor + 1
