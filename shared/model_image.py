"""A model version in memory: the bytes of its safetensors file, and the flat weights as a view into them.

    | header length | JSON header | kept tensors of 8 bytes | flat float32 weights | narrower kept tensors |

The averaged tensors lie in the file in flat order without gaps, so the file is written, hashed, stored and
read without a single copy of model size, and any safetensors reader opens it. They are stored as float32
whatever their type in the user's model: the server's arithmetic is float32, the worker casts on loading.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import safetensors
import safetensors.numpy

from shared.errors import SettingsError
from shared.layout import FLOAT_BYTES, KEPT_BYTES, Layout, TensorSpec
from shared.vector import Vector, squared_norm

CHUNK_BYTES = 64 * 2**20  # a stored value; Redis itself takes up to 512 MB

_SAFETENSORS_DTYPES = {
    "int64": "I64", "int32": "I32", "int16": "I16", "int8": "I8",
    "uint64": "U64", "uint32": "U32", "uint16": "U16", "uint8": "U8", "bool": "BOOL",
}  # fmt: skip


class ModelImage:
    """One model as the bytes of a safetensors file.

    Attributes:
        layout: which tensors it holds.
        data: uint8 [file size], the whole file.
        weights: float32 [num_params], a view into `data`: changing it changes the file.
    """

    def __init__(self, layout: Layout) -> None:
        """Make an image with all weights and kept tensors zero."""
        header, wide = file_header(layout), wide_bytes(layout)
        start = len(header) + wide
        self.layout = layout
        self.data: npt.NDArray[np.uint8] = np.zeros(start + 4 * layout.num_params + layout.kept_bytes - wide, np.uint8)
        self.data[: len(header)] = np.frombuffer(header, np.uint8)
        self.weights: Vector = self.data[start : start + 4 * layout.num_params].view("<f4")
        self._header_bytes, self._wide = len(header), wide

    @classmethod
    def of(cls, tensors: Mapping[str, npt.NDArray[Any]], dtypes: Mapping[str, str] | None = None) -> "ModelImage":
        """Make an image of named arrays.

        Args:
            tensors: name -> array, floats and integers.
            dtypes: name -> declared type where it is not the array's own (numpy has no bfloat16).
        """
        declared = {name: str(array.dtype) for name, array in tensors.items()} | dict(dtypes or {})
        image = cls(Layout.of((name, array.shape, declared[name]) for name, array in tensors.items()))
        image.layout.flatten(tensors, out=image.weights)
        for spec in image.layout.kept:
            array = np.ascontiguousarray(tensors[spec.name])
            image._kept_slice(spec)[:] = array.reshape(-1).view(np.uint8)
        return image

    @classmethod
    def from_file(cls, path: Path) -> "ModelImage":
        """Read any safetensors file as a starting point.

        Raises:
            SettingsError: the file is missing, is no safetensors file, or holds weights that are not finite.
        """
        try:
            tensors = safetensors.numpy.load_file(path)
        except (OSError, safetensors.SafetensorError, KeyError, TypeError, ValueError) as error:
            raise SettingsError(f"cannot read {path} as a safetensors file: {error}") from error
        image = cls.of(tensors)
        if not np.isfinite(squared_norm(image.weights)):
            raise SettingsError(f"{path} holds weights that are not finite: start from a sound model")
        return image

    @classmethod
    def from_chunks(cls, layout: Layout, chunks: Iterable[bytes]) -> "ModelImage":
        """Rebuild an image from the pieces `chunks` gave.

        Raises:
            ValueError: the pieces are not a file of this layout.
        """
        image = cls(layout)
        fill_file(image.data, chunks, file_header(layout))
        return image

    def copy(self) -> "ModelImage":
        """Return an image with its own bytes."""
        twin = ModelImage(self.layout)
        twin.data[:] = self.data
        return twin

    @property
    def sha256(self) -> str:
        """Hash of the file, in hex."""
        return hashlib.sha256(self.data.data).hexdigest()

    def chunks(self) -> Iterator[memoryview]:
        """Return the file in pieces of at most 64 MiB; views, not copies."""
        return cut(self.data)

    def tensors(self) -> dict[str, npt.NDArray[Any]]:
        """Return name -> array: views, floats as float32, kept tensors in their own type."""
        named: dict[str, npt.NDArray[Any]] = dict(self.layout.unflatten(self.weights))
        for spec in self.layout.kept:
            named[spec.name] = self._kept_slice(spec).view(spec.dtype).reshape(spec.shape)
        return named

    def save(self, path: Path) -> None:
        """Write the safetensors file."""
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(self.data.data)
        except OSError as error:
            raise SettingsError(f"cannot write {path}: {error.strerror}") from error

    def _kept_slice(self, spec: TensorSpec) -> npt.NDArray[np.uint8]:
        shift = 0 if spec.offset < self._wide else 4 * self.layout.num_params
        start = self._header_bytes + spec.offset + shift
        return self.data[start : start + spec.size * KEPT_BYTES[spec.dtype]]


def chunk_count(layout: Layout) -> int:
    """Return how many pieces `chunks` yields for a model of this layout."""
    return piece_count(len(file_header(layout)) + 4 * layout.num_params + layout.kept_bytes)


def cut(stored: npt.NDArray[np.uint8]) -> Iterator[memoryview]:
    """Yield bytes in pieces of at most 64 MiB; views, not copies."""
    for start in range(0, stored.size, CHUNK_BYTES):
        yield stored[start : start + CHUNK_BYTES].data


def piece_count(size_bytes: int) -> int:
    """Return how many pieces `cut` yields for so many bytes."""
    return -(-size_bytes // CHUNK_BYTES)


def fill_file(file: npt.NDArray[np.uint8], pieces: Iterable[bytes], header: bytes) -> None:
    """Write the pieces of a stored file into `file`, in place.

    Raises:
        ValueError: they are not as long as `file`, or do not begin with `header`.
    """
    position = 0
    for piece in pieces:
        if position + len(piece) > file.size:
            raise ValueError(f"more than the {file.size} bytes a model of this layout has")
        file[position : position + len(piece)] = np.frombuffer(piece, np.uint8)
        position += len(piece)
    if position != file.size or file[: len(header)].tobytes() != header:
        raise ValueError(f"{position} bytes that are not a model of this layout ({file.size} bytes)")


def wide_bytes(layout: Layout) -> int:
    """Return the size of the kept tensors of 8 bytes an element, which lie before the weights."""
    return sum(t.size * 8 for t in layout.kept if KEPT_BYTES[t.dtype] == 8)


@lru_cache(maxsize=16)
def file_header(layout: Layout, bfloat16: bool = False) -> bytes:
    """Write the safetensors header; the layout alone decides it, so every version of a job has the same."""
    wide, width, averaged = wide_bytes(layout), 2 if bfloat16 else 4, "BF16" if bfloat16 else "F32"
    entries: dict[str, Any] = {"__metadata__": {"format": "pt", "layout": layout.hash}}
    for spec in layout.tensors:
        if spec.dtype in FLOAT_BYTES:
            dtype, start, size = averaged, wide + width * spec.offset, width * spec.size
        else:
            dtype, size = _SAFETENSORS_DTYPES[spec.dtype], spec.size * KEPT_BYTES[spec.dtype]
            start = spec.offset if spec.offset < wide else spec.offset + width * layout.num_params
        entries[spec.name] = {"dtype": dtype, "shape": spec.shape, "data_offsets": [start, start + size]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the weights start at a multiple of 8
    return len(text).to_bytes(8, "little") + text
