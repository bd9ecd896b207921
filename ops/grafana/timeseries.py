"""Grafana's time series as SVG: two axes, stacks, thresholds, a legend with the newest values."""

import math
from collections.abc import Sequence
from typing import Any

from ops.grafana.svg import (
    BOTTOM,
    GRID,
    LEFT,
    PALETTE,
    RIGHT,
    TEXT,
    TOP,
    Point,
    Series,
    area_of,
    color_of,
    curve_of,
    darkened,
    label,
    path_of,
    runs_of,
    svg,
    text_of,
    time_axis,
)


def _nice(low: float, high: float, count: int = 5) -> list[float]:
    """Return round values for an axis."""
    if high <= low:
        high = low + (abs(low) or 1.0)
    raw = (high - low) / count
    size = 10 ** math.floor(math.log10(raw))
    step = next(size * m for m in (1, 2, 2.5, 5, 10) if size * m >= raw)
    first = math.floor(low / step)
    return [first * step + i * step for i in range(math.ceil(high / step - 1e-9) - first + 1)]


class _Axis:
    """Values to pixels."""

    def __init__(self, values: Sequence[float], unit: str, plot: tuple[float, float], low: float | None,
                 high: float | None, log: bool) -> None:  # fmt: skip
        self.unit, self._plot, self._log = unit, plot, log
        if log:
            positive = [v for v in values if v > 0] or [1.0]
            powers = range(math.floor(math.log10(min(positive))), math.ceil(math.log10(max(positive)) + 1e-9) + 1)
            self.ticks = [10.0**p for p in powers] if len(powers) > 1 else [10.0 ** powers[0], 10.0 ** (powers[0] + 1)]
        else:
            least = min(values) if low is None else min(low, *values, low)
            most = max(values) if high is None else max(high, *values)
            self.ticks = _nice(least, most if most > least else least + 1)

    def y(self, value: float) -> float:
        """Return the pixel of a value."""
        low, high = self.ticks[0], self.ticks[-1]
        share = (
            (math.log10(max(value, low)) - math.log10(low)) / (math.log10(high) - math.log10(low))
            if self._log else (value - low) / (high - low)
        )  # fmt: skip
        return self._plot[1] - share * (self._plot[1] - self._plot[0])


def _override(panel: dict[str, Any], query: str) -> dict[str, Any]:
    for override in panel["fieldConfig"]["overrides"]:
        if override["matcher"]["options"] == query:
            return {one["id"]: one["value"] for one in override["properties"]}
    return {}


def timeseries(
    panel: dict[str, Any], series: Sequence[Series], span: tuple[float, float], width: int, height: int
) -> str:
    """Return a panel of lines; `drawing.draw` has the arguments."""
    defaults = panel["fieldConfig"]["defaults"]
    custom = defaults["custom"]
    stacked = custom["stacking"]["mode"] == "normal"
    overrides = [_override(panel, one.query) for one in series]
    on_right = ["custom.axisPlacement" in override for override in overrides]
    colors = [
        color_of(override["color"]["fixedColor"]) if "color" in override else PALETTE[index % len(PALETTE)]
        for index, override in enumerate(overrides)
    ]
    lines = _stack(series, on_right) if stacked else [list(one.points) for one in series]
    left, right = LEFT, width - (RIGHT if any(on_right) else 10)
    bottom = height - BOTTOM - 18 * _legend_rows(series, width)
    axes: dict[bool, _Axis] = {}
    for side in set(on_right):
        values = [v for line, r in zip(lines, on_right, strict=True) for _, v in line if r == side and math.isfinite(v)]
        unit = next((o["unit"] for o, r in zip(overrides, on_right, strict=True) if r and side), defaults["unit"])
        axes[side] = _Axis(
            values or [0.0, 1.0], unit, (TOP, bottom), defaults.get("min"), None if side else defaults.get("max"),
            custom["scaleDistribution"]["type"] == "log",
        )  # fmt: skip
    parts = time_axis(span, left, right, bottom, TOP)
    for side, axis in axes.items():
        for tick in axis.ticks:
            if not side or False not in axes:
                parts.append(
                    f'<line x1="{left}" x2="{right}" y1="{axis.y(tick):.1f}" y2="{axis.y(tick):.1f}" stroke="{GRID}"/>'
                )
            x, anchor = (right + 6, "start") if side else (left - 6, "end")
            parts.append(label(x, axis.y(tick) + 4, text_of(tick, axis.unit), anchor))
    for index in reversed(range(len(series))):
        parts += _line(
            runs_of(lines[index], defaults, span),
            axes[on_right[index]],
            span,
            (left, right, bottom),
            colors[index],
            stacked and not on_right[index],
        )
    if custom["thresholdsStyle"]["mode"] != "off" and False in axes:
        parts += _threshold_lines(defaults, axes[False], left, right)
    parts += _legend(panel, series, colors, overrides, width, height)
    return svg(width, height, parts)


def _stack(series: Sequence[Series], on_right: Sequence[bool]) -> list[list[Point]]:
    totals: dict[float, float] = {}
    lines = []
    for one, right in zip(series, on_right, strict=True):
        if right:
            lines.append(list(one.points))
            continue
        line = []
        for moment, value in one.points:
            totals[moment] = totals.get(moment, 0.0) + (value if math.isfinite(value) else 0.0)
            line.append((moment, totals[moment]))
        lines.append(line)
    return lines


def _line(
    runs: Sequence[Sequence[Point]],
    axis: _Axis,
    span: tuple[float, float],
    plot: tuple[float, float, float],
    color: str,
    fill: bool,
) -> list[str]:
    left, right, bottom = plot
    parts = []
    for run in runs:
        spots = [(left + (right - left) * (t - span[0]) / (span[1] - span[0]), axis.y(value)) for t, value in run]
        closed = f"{spots[0][0]:.1f},{bottom} {path_of(spots)} {spots[-1][0]:.1f},{bottom}"
        parts.append(area_of(closed, darkened(color), 1.0) if fill else area_of(closed, color, 0.07))
        parts.append(curve_of(spots, color, 1.8))
    return parts


def _threshold_lines(defaults: dict[str, Any], axis: _Axis, left: float, right: float) -> list[str]:
    parts = []
    for step in defaults["thresholds"]["steps"]:
        if step["value"] is not None and axis.ticks[0] <= step["value"] <= axis.ticks[-1]:
            y = axis.y(step["value"])
            parts.append(
                f'<line x1="{left}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}" stroke="{color_of(step["color"])}" '
                'stroke-dasharray="8 5"/>'
            )
    return parts


def _legend_width(name: str) -> float:
    return 34 + 6.4 * (len(name) + 10)


def _legend_rows(series: Sequence[Series], width: int) -> int:
    rows, x = 1, 0.0
    for one in series:
        x += _legend_width(one.name)
        if x > width and x > _legend_width(one.name):
            rows, x = rows + 1, _legend_width(one.name)
    return rows


def _legend(
    panel: dict[str, Any], series: Sequence[Series], colors: Sequence[str], overrides: Sequence[dict[str, Any]],
    width: int, height: int,
) -> list[str]:  # fmt: skip
    parts, x, y = [], 8.0, height - 18 * (_legend_rows(series, width) - 1) - 5.0
    defaults = panel["fieldConfig"]["defaults"]
    for one, color, override in zip(series, colors, overrides, strict=True):
        if x + _legend_width(one.name) > width and x > 8:
            x, y = 8.0, y + 18
        finite = [value for _, value in one.points if math.isfinite(value)]
        last = text_of(finite[-1], override.get("unit", defaults["unit"]), defaults.get("decimals")) if finite else "-"
        parts.append(f'<rect x="{x}" y="{y - 5}" width="14" height="4" rx="2" fill="{color}"/>')
        parts.append(label(x + 19, y, one.name, color=TEXT))
        parts.append(label(x + 30 + 6.4 * len(one.name), y, last))
        x += _legend_width(one.name)
    return parts
