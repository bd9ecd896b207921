"""A codec made of stages.

delta -> [small tensors apart] -> [select] -> [rotate] -> quantize -> [zstd]

payload, before zstd:
    float16 small tensors, if there are any           (their size follows from the layout)
    u32 length, positions, if elements are selected
    the quantizer's bytes                             (all the rest)
"""

import struct
from dataclasses import dataclass

import numpy as np

from shared.compression.codec import Decoded, Encoded, Params
from shared.compression.entropy import compress, compressed_bytes_max, decompress
from shared.compression.floats import FLOAT16
from shared.compression.quantizer import SEED_MAX, Nothing, Piece, Quantized, Quantizer, read_count
from shared.compression.rotate import rotate, rotate_back, rotated_size
from shared.compression.selection import Selection
from shared.compression.tensors import SLAB, Indices, Runs, Values, parts_of
from shared.errors import Reason, RejectedUpdate
from shared.layout import Layout
from shared.vector import Vector

_LENGTH = struct.Struct("<I")


@dataclass(frozen=True, slots=True)
class Dense:
    """Decoded values of a stretch of the flat vector, added slab by slab."""

    quantized: Quantized
    runs: Runs

    def add_into(self, total: Vector, weight: float) -> None:
        """Add `weight * values` in place."""
        scratch = np.empty(min(SLAB, self.runs.size), np.float32)
        for start in range(0, self.runs.size, SLAB):
            stop = min(start + SLAB, self.runs.size)
            self.quantized.inflate(start, stop, weight, scratch[: stop - start])
            self.runs.add(total, start, scratch[: stop - start])

    def squared_norm(self) -> float:
        """Return ||values||^2."""
        scratch, square = np.empty(min(SLAB, self.runs.size), np.float32), 0.0
        for start in range(0, self.runs.size, SLAB):
            x = scratch[: min(SLAB, self.runs.size - start)]
            self.quantized.inflate(start, start + x.size, 1.0, x)
            with np.errstate(over="ignore"):
                part = float(np.dot(x, x))
            square += part if np.isfinite(part) else float(np.einsum("i,i->", x, x, dtype=np.float64))
        return square


@dataclass(frozen=True, slots=True)
class Sparse:
    """Decoded values of single elements: only those are touched."""

    quantized: Quantized
    at: Indices  # ascending positions in the flat vector

    def add_into(self, total: Vector, weight: float) -> None:
        """Add `weight * values` in place."""
        scratch = np.empty(min(SLAB, self.at.size), np.float32)
        for start in range(0, self.at.size, SLAB):
            at = self.at[start : start + SLAB]
            self.quantized.inflate(start, start + at.size, weight, scratch[: at.size])
            np.add.at(total, at, scratch[: at.size])  # twice as fast as total[at] += ...: nothing is gathered first

    def squared_norm(self) -> float:
        """Return ||values||^2."""
        return Dense(self.quantized, Runs.of([(0, self.at.size)])).squared_norm()


@dataclass(frozen=True, slots=True)
class DecodedParts:
    """A decoded delta: its small tensors and its body."""

    parts: tuple[Decoded, ...]

    def add_into(self, total: Vector, weight: float) -> None:
        """Add `weight * delta` to `total` in place."""
        for part in self.parts:
            part.add_into(total, weight)

    def squared_norm(self) -> float:
        """Return ||delta||^2."""
        return sum(part.squared_norm() for part in self.parts)


@dataclass(frozen=True, slots=True)
class Pipeline:
    """A codec. Build it with `parse`.

    Attributes:
        quantizer: how values are written.
        selection: which elements travel; None: all.
        rotated: whether a random rotation comes before the quantizer.
        zstd: whether the payload is compressed.
        feedback: whether error feedback is wrapped around.
        whole: no tensor is set apart; always so for plain float types.
    """

    quantizer: Quantizer
    selection: Selection | None = None
    rotated: bool = False
    zstd: bool = False
    feedback: bool = False
    whole: bool = False

    @property
    def name(self) -> str:
        """Its stages, joined by ` | `."""
        stages = ["ef"] * self.feedback + ["all"] * (self.whole and not self.plain)
        stages += [self.selection.name] if self.selection else []
        stages += ["rotate"] * self.rotated + [self.quantizer.name] + ["zstd"] * self.zstd
        return " | ".join(stages)

    @property
    def plain(self) -> bool:
        """Whether every element travels in one float type."""
        return self.quantizer.name in ("float32", "bfloat16", "float16") and not self.selection and not self.rotated

    @property
    def exact(self) -> bool:
        """All but a rotation decodes to the same bits everywhere."""
        return not self.rotated

    @property
    def unbiased(self) -> bool:
        """E[decode(encode(x))] = x, but for the rounding of small tensors to float16."""
        return self.quantizer.unbiased and (self.selection is None or self.selection.unbiased)

    @property
    def contraction(self) -> bool:
        """E||x - decode(encode(x))||^2 < ||x||^2."""
        return self.quantizer.contraction and (self.selection is None or self.selection.contraction)

    def payload_bytes_max(self, layout: Layout) -> int:
        """Return the largest payload."""
        plain = self._plain_bytes_max(layout)
        return compressed_bytes_max(plain) if self.zstd else plain

    def encode(self, delta: Vector, layout: Layout, rng: np.random.Generator) -> Encoded:
        """Run the stages."""
        parts = parts_of(layout, self.whole)
        params: dict[str, str | int | float] = {}
        sections: list[Piece] = []
        if parts.small.size:
            sections += FLOAT16.encode(Values(delta, parts.small, parts.small_ends), rng).pieces
        values = Values(delta, parts.body, parts.ends)
        if self.selection and values.size:
            chosen = self.selection.select(values, rng)
            params |= chosen.params
            sections += [_LENGTH.pack(len(chosen.section)), chosen.section]
            values = Values.plain(chosen.values, _ends_of(chosen.indices, parts.ends))
        if self.rotated and values.size:
            params["seed"] = int(rng.integers(0, SEED_MAX, endpoint=True))
            rotated = rotate(values, int(params["seed"]))
            values = Values.plain(rotated, np.array([rotated.size]))
        if values.size:
            written = self.quantizer.encode(values, rng)
            params |= written.params
            sections += written.pieces
        return Encoded(compress(sections) if self.zstd else b"".join(sections), params)

    def decode(self, payload: bytes | memoryview, params: Params, layout: Layout) -> DecodedParts:
        """Run them backwards, checking every size first."""
        if len(payload) > self.payload_bytes_max(layout):
            raise RejectedUpdate(
                Reason.TOO_LARGE,
                f"{self.name}: payload of {len(payload)} bytes; {layout.num_params} parameters take at most "
                f"{self.payload_bytes_max(layout)}",
            )
        left = memoryview(decompress(payload, self._plain_bytes_max(layout)) if self.zstd else payload)
        parts = parts_of(layout, self.whole)
        decoded: list[Decoded] = []
        if parts.small.size:
            section, left = self._cut(left, FLOAT16.bytes_max(parts.small.size, 1))
            decoded.append(Dense(FLOAT16.decode(section, {}, parts.small.size, parts.small_ends), parts.small))
        if not parts.body.size:
            self._cut(left, 0, last=True)
        elif self.selection:
            decoded.append(self._decode_selected(left, params, layout))
        else:
            decoded.append(Dense(self._decode_values(left, params, parts.body.size, parts.ends), parts.body))
        return DecodedParts(tuple(decoded))

    def _decode_selected(self, left: memoryview, params: Params, layout: Layout) -> Sparse:
        assert self.selection is not None  # noqa: S101 - the caller asked
        parts = parts_of(layout, self.whole)
        head, left = self._cut(left, _LENGTH.size)
        section, left = self._cut(left, _LENGTH.unpack(head)[0])
        indices = self.selection.locate(section, params, parts.body.size)
        quantized = self._decode_values(left, params, indices.size, _ends_of(indices, parts.ends))
        return Sparse(quantized, parts.body.locate(indices))

    def _decode_values(self, left: memoryview, params: Params, count: int, ends: Indices) -> Quantized:
        if not count:
            self._cut(left, 0, last=True)
            return Nothing()
        if not self.rotated:
            return self.quantizer.decode(left, params, count, ends)
        size = rotated_size(count)
        seed = read_count("rotate", params, "seed", SEED_MAX)
        return rotate_back(self.quantizer.decode(left, params, size, np.array([size])), seed, count)

    def _cut(self, left: memoryview, length: int, last: bool = False) -> tuple[memoryview, memoryview]:
        """Take the next section; raises `RejectedUpdate` if there is less, or more after the last."""
        if len(left) < length or (last and len(left) > length):
            raise RejectedUpdate(Reason.CODEC, f"{self.name}: {len(left)} bytes left where {length} are expected")
        return left[:length], left[length:]

    def _plain_bytes_max(self, layout: Layout) -> int:
        parts = parts_of(layout, self.whole)
        count, total = parts.body.size, 0
        if parts.small.size:
            total += FLOAT16.bytes_max(parts.small.size, 1)
        if self.selection and count:
            total += _LENGTH.size + self.selection.section_bytes_max(count)
            count = self.selection.count_max(count)
        if self.rotated:
            return total + self.quantizer.bytes_max(rotated_size(count), 1)
        return total + (self.quantizer.bytes_max(count, len(parts.ends)) if count else 0)


def _ends_of(indices: Indices, ends: Indices) -> Indices:
    """Return, for each tensor, how many of the selected elements lie in it or before."""
    found: Indices = np.searchsorted(indices, ends, side="left").astype(np.int64)
    return found
