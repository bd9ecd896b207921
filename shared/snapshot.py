"""A snapshot: weights as a safetensors file of float32 or, at half the size, of bfloat16.

bfloat16 is the upper half of float32's bits, and rounding to it is integer arithmetic on them: the same on every
machine. Weights stay float32 in memory; those that were rounded lose nothing in a bfloat16 file.
"""

from collections.abc import Iterable, Iterator

import numpy as np
import numpy.typing as npt

from shared.layout import Layout
from shared.model_image import ModelImage, cut, file_header, fill_file, wide_bytes

FLOAT32, BFLOAT16 = "float32", "bfloat16"


def snapshot_bytes(layout: Layout, dtype: str) -> int:
    """Return the size of a snapshot's file."""
    width = 2 if dtype == BFLOAT16 else 4
    return len(file_header(layout, dtype == BFLOAT16)) + width * layout.num_params + layout.kept_bytes


def write_snapshot(image: ModelImage, dtype: str) -> Iterator[memoryview]:
    """Return the file in pieces of at most 64 MiB.

    Args:
        image: the weights; for bfloat16 they are rounded already.
        dtype: `float32` (views of the image) or `bfloat16` (a copy of half its size).
    """
    if dtype != BFLOAT16:
        return image.chunks()
    file = np.empty(snapshot_bytes(image.layout, dtype), np.uint8)
    weights, before, after = _parts(file, image.layout)
    header = file_header(image.layout, True)
    file[: len(header)] = np.frombuffer(header, np.uint8)
    start = len(file_header(image.layout))
    before[:] = image.data[start : start + before.size]
    after[:] = image.data[image.data.size - after.size :]
    np.right_shift(image.weights.view(np.uint32), 16, out=weights, casting="unsafe")
    return cut(file)


def read_snapshot(layout: Layout, dtype: str, pieces: Iterable[bytes]) -> ModelImage:
    """Read what `write_snapshot` gave.

    Raises:
        ValueError: the pieces are not a file of this layout.
    """
    if dtype != BFLOAT16:
        return ModelImage.from_chunks(layout, pieces)
    file = np.empty(snapshot_bytes(layout, dtype), np.uint8)
    fill_file(file, pieces, file_header(layout, True))
    image = ModelImage(layout)
    weights, before, after = _parts(file, layout)
    start = len(file_header(layout))
    image.data[start : start + before.size] = before
    image.data[image.data.size - after.size :] = after
    np.left_shift(weights, 16, out=image.weights.view(np.uint32), dtype=np.uint32)
    return image


def _parts(
    file: npt.NDArray[np.uint8], layout: Layout
) -> tuple[npt.NDArray[np.uint16], npt.NDArray[np.uint8], npt.NDArray[np.uint8]]:
    """Return views of a bfloat16 file: its weights, the kept tensors before them and those after."""
    wide = len(file_header(layout, True))
    start = wide + wide_bytes(layout)
    end = start + 2 * layout.num_params
    return file[start:end].view("<u2"), file[wide:start], file[end:]
