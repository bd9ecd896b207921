"""Walking over a buffer's rows block of columns by block of columns, so that no temporary is of model size."""

from collections.abc import Iterator

from aggregator.robust.protocols import Rows

BLOCK_ELEMENTS = 1 << 18  # of all rows together: 1 MiB, which an L2 cache holds beside its scratch
COLUMNS_MIN = 64  # however many rows: a shorter stretch wastes the cache lines it touches


def columns_of(rows: Rows) -> Iterator[slice]:
    """Yield slices that cover the columns of `rows` (float32 [updates, n]) in order, without overlap."""
    width = max(COLUMNS_MIN, BLOCK_ELEMENTS // max(1, rows.shape[0]))
    for start in range(0, rows.shape[1], width):
        yield slice(start, min(start + width, rows.shape[1]))
