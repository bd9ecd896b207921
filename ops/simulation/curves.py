"""A metric along a run, and several runs as one line with a band around it."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ops.history import History

POINTS = 300  # of the common grid

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Band:
    """Several runs on a common grid: mean, least and largest value at each point, float64 [points]."""

    x: Floats
    mean: Floats
    low: Floats
    high: Floats


def smoothed(values: Sequence[float], window: int) -> Floats:
    """Return the mean of each value and the ones before it, at most `window` together, float64 [values]."""
    sums = np.concatenate([[0.0], np.cumsum(np.asarray(values, dtype=np.float64))])
    ends = np.arange(1, len(sums))
    starts = np.maximum(0, ends - window)
    means: Floats = (sums[ends] - sums[starts]) / (ends - starts)
    return means


def course(history: History, along: str, metric: str, window: int) -> tuple[Floats, Floats]:
    """Return a metric's smoothed values beside what was spent until then; evaluations without it are left out.

    Args:
        history: of a run.
        along: a column of its rows, e.g. bytes_sent.
        metric: a name of what evaluate() returned.
        window: evaluations to average over.
    """
    rows = [row for row in history.rows if np.isfinite(row.metrics.get(metric, np.nan))]
    x = np.array([getattr(row, along) for row in rows], dtype=np.float64)
    return x, smoothed([row.metrics[metric] for row in rows], window)


def band(courses: Sequence[tuple[Floats, Floats]], logarithmic: bool = False) -> Band | None:
    """Put runs on a common grid, linearly interpolated, from where all have begun to where the first one ends.

    Args:
        courses: x (ascending) and value of each run.
        logarithmic: points at equal ratios of x; what lies at x = 0 is left out.

    Returns:
        The band; None where no run has a value, or none lies in the common range.
    """
    courses = [(x[x > 0], y[x > 0]) if logarithmic else (x, y) for x, y in courses]
    courses = [(x, y) for x, y in courses if len(x)]
    if not courses:
        return None
    start, end = max(x[0] for x, _ in courses), min(x[-1] for x, _ in courses)
    if end < start:
        return None
    grid = np.geomspace(start, end, POINTS) if logarithmic else np.linspace(start, end, POINTS)
    values = np.array([np.interp(grid, x, y) for x, y in courses])
    return Band(grid, values.mean(axis=0), values.min(axis=0), values.max(axis=0))
