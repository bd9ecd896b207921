"""The residual on disk: one file, replaced as a whole.

    fedmq-residual 1 <crc32 of all that follows, 8 hex digits>
    {"layout": ..., "num_params": ..., "version": ..., "made": ..., "returned": [...], "means": {...}, ...}: `Header`
    the array, float32, little-endian; missing when it is zero

Each update made with feedback writes it once: 4 bytes a parameter, whatever the codec makes of the update. With 10
million parameters and an update every five minutes that is 12 GB a day, which a cheap SD card bears for a few years;
a device that trains more often should have FEDMQ_STATE_DIR on a better disk, or its job a codec without feedback.
There is no way around it that keeps the promise: an update may not leave before what it left out is durable. What
comes back from a refused update shares the write of the next one, and a zero residual is a header alone.
"""

import json
import math
import zlib
from dataclasses import asdict, dataclass, field, replace

import numpy as np

from shared.layout import NUM_PARAMS_MAX
from shared.vector import Vector
from worker.folder import Files

NAME = "residual"
RESIDUAL, MEMORY = "residual", "memory"
MAGIC = "fedmq-residual 1"
LINE_BYTES_MAX = 1 << 20  # the header with the numbers of a full outbox takes a hundredth of it
MEANS_MAX = 10_000  # newest updates of which it holds the mean version, a third of the line


@dataclass(frozen=True, slots=True)
class Header:
    """What the residual on disk accounts for.

    Attributes:
        layout: hash of the layout it was made for.
        num_params: length of its array; 0 when it is zero.
        version: mean version at which what is in it was trained, weighted by norm.
        made: number of the last update whose leftovers it holds, -1 for none.
        returned: numbers of the refused updates whose mass it took back in this write.
        means: number -> mean version of what an update carries, of those that may come back.
        newest_version: of the model, that was seen.
        newest_revision: of the job, that was seen; a lower one means that the job began anew.
        first: number of the first update of this run of the job; those before never come back.
        kind: what its array is: a residual, or (rule area) a memory with its sign turned.
    """

    layout: str = ""
    num_params: int = 0
    version: float = 0.0
    made: int = -1
    returned: list[int] = field(default_factory=list)
    means: dict[int, float] = field(default_factory=dict)
    newest_version: int = 0
    newest_revision: int = 0
    first: int = 0
    kind: str = RESIDUAL


def write(folder: Files, header: Header, vector: Vector | None) -> None:
    """Replace the residual; it is durable on return.

    Args:
        folder: the worker's.
        header: with `num_params` of this vector.
        vector: float32 [num_params]; None is zero.
    """
    line = json.dumps(asdict(header)).encode() + b"\n"
    array = _bytes(vector)
    folder.write(NAME, f"{MAGIC} {zlib.crc32(array, zlib.crc32(line)):08x}\n".encode(), line, array)


def read(folder: Files) -> tuple[Header, Vector | None]:
    """Read a residual.

    Returns:
        its header and array; None is zero, also when there is no file.

    Raises:
        ValueError: it is damaged; the message says how.
        OSError: it cannot be read.
    """
    return parse(folder.read(NAME)) if NAME in folder.names() else (Header(), None)


def parse(file: bytes) -> tuple[Header, Vector | None]:
    """Return what a residual's file says.

    Raises:
        ValueError: it is damaged.
    """
    first = file[: file.find(b"\n", 0, LINE_BYTES_MAX) + 1]
    line = file[len(first) : file.find(b"\n", len(first), len(first) + LINE_BYTES_MAX) + 1]
    header = _header(line)
    left = len(file) - len(first) - len(line)
    if left != 4 * header.num_params:
        raise ValueError(f"{left} bytes of array instead of {4 * header.num_params}")
    crc = zlib.crc32(memoryview(file)[len(first) :])
    if first != f"{MAGIC} {crc:08x}\n".encode():
        raise ValueError(f"its first line is {first[:60]!r}, its checksum {crc:08x}")
    array = np.frombuffer(file, "<f4", offset=len(first) + len(line))
    return header, array.astype(np.float32) if header.num_params else None  # a copy: it changes in place


def _bytes(vector: Vector | None) -> memoryview:
    return memoryview(b"") if vector is None else vector.astype("<f4", copy=False).view(np.uint8).data


def _header(line: bytes) -> Header:
    try:
        header = Header(**json.loads(line))
        header = replace(header, means={int(number): mean for number, mean in header.means.items()})
        whole = [header.made, header.newest_version, header.newest_revision, header.first, *header.returned]
        fits = 0 <= header.num_params <= NUM_PARAMS_MAX and all(isinstance(number, int) for number in whole)
        finite = all(math.isfinite(mean) for mean in (header.version, *header.means.values()))
        if not fits or not finite or not isinstance(header.layout, str) or header.kind not in (RESIDUAL, MEMORY):
            raise ValueError("a value out of range")
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"its header cannot be read: {error}") from error
    return header
