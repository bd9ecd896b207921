"""Grafana's panels as SVG, without Grafana: enough of each kind to judge a dashboard by."""

import html
import itertools
import math
from collections.abc import Sequence
from typing import Any

from ops.grafana.svg import (
    BOTTOM,
    GRID,
    HEAT,
    LEFT,
    TEXT,
    TOP,
    Point,
    Series,
    area_of,
    curve_of,
    label,
    path_of,
    rect,
    runs_of,
    svg,
    text_of,
    threshold_color,
    time_axis,
    word_of,
)
from ops.grafana.timeseries import timeseries

STAT_GAP_MS = 60_000  # a stat's JSON has no `spanNulls`: as the lines have it


def draw(panel: dict[str, Any], series: Sequence[Series], span: tuple[float, float], width: int, height: int) -> str:
    """Return the inside of a panel as HTML.

    Args:
        panel: as the dashboard's JSON has it.
        series: what its queries returned.
        span: first and last moment, unix seconds.
        width: of the inside, pixels.
        height: the same.
    """
    kind = {
        "stat": _stat, "timeseries": timeseries, "heatmap": _heatmap, "bargauge": _bars, "table": _table,
        "state-timeline": _states,
    }[panel["type"]]  # fmt: skip
    if not any(math.isfinite(value) for one in series for _, value in one.points):
        return f'<div class="none">{html.escape(panel["fieldConfig"]["defaults"].get("noValue", "No data"))}</div>'
    return kind(panel, series, span, width, height)


def _stat(panel: dict[str, Any], series: Sequence[Series], span: tuple[float, float], width: int, height: int) -> str:
    defaults = panel["fieldConfig"]["defaults"]
    points = [point for point in series[0].points if math.isfinite(point[1])]
    value = points[-1][1]
    text, color = word_of(defaults, value) or (
        text_of(value, defaults["unit"], defaults.get("decimals")), threshold_color(defaults, value),
    )  # fmt: skip
    low, high = min(v for _, v in points), max(v for _, v in points)
    parts = []
    for run in runs_of(points, {"custom": {"spanNulls": STAT_GAP_MS}}, span):
        spots = [
            (width * (t - span[0]) / (span[1] - span[0]),
             height - 2 - 0.38 * height * ((v - low) / (high - low) if high > low else 0.5))
            for t, v in run
        ]  # fmt: skip
        parts.append(area_of(f"{spots[0][0]:.1f},{height} {path_of(spots)} {spots[-1][0]:.1f},{height}", color, 0.18))
        parts.append(curve_of(spots, color, 1.2, 0.7))
    size = min(34, int(width / (0.6 * len(text))))
    return svg(width, height, [*parts, label(width / 2, height * 0.52, text, "middle", color, size)])


def _heatmap(
    panel: dict[str, Any], series: Sequence[Series], span: tuple[float, float], width: int, height: int
) -> str:
    unit = panel["fieldConfig"]["defaults"]["unit"]
    ordered = sorted(series, key=lambda one: float(one.labels["le"]))
    moments = sorted({moment for one in ordered for moment, _ in one.points})
    at = [dict(one.points) for one in ordered]
    counts = [
        [max(0.0, at[row].get(m, 0.0) - (at[row - 1].get(m, 0.0) if row else 0.0)) for m in moments]
        for row in range(len(ordered))
    ]
    used = [row for row, line in enumerate(counts) if max(line, default=0.0) > 1e-9]
    rows = range(max(0, min(used) - 1), min(len(counts), max(used) + 2)) if used else range(len(counts))
    bottom, right = height - BOTTOM, width - 10
    tall, most = (bottom - TOP) / len(rows), max(max(line) for line in counts) or 1.0
    step = min((b - a for a, b in itertools.pairwise(moments)), default=1.0)
    wide = (right - LEFT) * step / (span[1] - span[0])
    parts = []
    for place, row in enumerate(rows):
        y = bottom - (place + 1) * tall
        for moment, count in zip(moments, counts[row], strict=True):
            if count > 1e-9:
                color = HEAT[min(len(HEAT) - 1, int(math.sqrt(count / most) * len(HEAT)))]
                x = max(LEFT, LEFT + (right - LEFT) * (moment - span[0]) / (span[1] - span[0]) - wide)
                parts.append(rect(x, y + 0.5, wide + 0.4, tall - 1, color))
        if place % max(1, math.ceil(14 / tall)) == 0:
            bound = float(ordered[row].labels["le"])
            parts.append(label(LEFT - 6, y + 4, text_of(bound, unit) if math.isfinite(bound) else "more", "end"))
    return svg(width, height, [*time_axis(span, LEFT, right, bottom, TOP), *parts])


def _bars(panel: dict[str, Any], series: Sequence[Series], span: tuple[float, float], width: int, height: int) -> str:
    del span
    defaults = panel["fieldConfig"]["defaults"]
    most = defaults.get("max") or max(one.points[-1][1] for one in series) or 1.0
    tall = min(40.0, height / max(1, len(series)))
    parts = []
    for index, one in enumerate(series):
        value, y = one.points[-1][1], index * tall
        long = (width - 230) * min(1.0, max(0.0, value / most))
        color = threshold_color(defaults, value)
        parts.append(label(8, y + tall / 2 + 4, one.name, color=TEXT, size=13))
        parts.append(rect(110, y + 5, width - 230, tall - 10, GRID))
        parts.append(rect(110, y + 5, long, tall - 10, color))
        parts.append(
            label(
                width - 110,
                y + tall / 2 + 5,
                text_of(value, defaults["unit"], defaults.get("decimals")),
                color=color,
                size=16,
            )
        )
    return svg(width, height, parts)


def _states(panel: dict[str, Any], series: Sequence[Series], span: tuple[float, float], width: int, height: int) -> str:
    defaults = panel["fieldConfig"]["defaults"]
    left, right, bottom = 8 + 7 * max(len(one.name) for one in series), width - 10, height - BOTTOM
    tall = (bottom - TOP) / len(series)
    parts = time_axis(span, left, right, bottom, TOP)
    for index, one in enumerate(series):
        y = TOP + index * tall
        parts.append(label(left - 6, y + tall / 2 + 4, one.name, "end", TEXT))
        for begin, end, value in _spells(one.points, span[1]):
            color = (word_of(defaults, value) or ("", threshold_color(defaults, value)))[1]
            x0, x1 = (left + (right - left) * (m - span[0]) / (span[1] - span[0]) for m in (begin, end))
            parts.append(rect(x0, y + tall * 0.12, x1 - x0, tall * 0.76, color, 0.8))
        word = word_of(defaults, one.points[-1][1])
        if word:
            parts.append(label(right - 6, y + tall / 2 + 4, word[0], "end", "#111217", 12))
    return svg(width, height, parts)


def _spells(points: Sequence[Point], end: float) -> list[tuple[float, float, float]]:
    """Return begin, end and value of each time in which the value stays the same."""
    spells: list[tuple[float, float, float]] = []
    step = min((b[0] - a[0] for a, b in itertools.pairwise(points)), default=0.0)
    for number, (moment, value) in enumerate(points):
        until = min(points[number + 1][0] if number + 1 < len(points) else end, moment + 2 * step)
        if spells and spells[-1][2] == value and moment <= spells[-1][1] + 1e-6:
            spells[-1] = (spells[-1][0], until, value)
        else:
            spells.append((moment, until, value))
    return spells


def _table(panel: dict[str, Any], series: Sequence[Series], span: tuple[float, float], width: int, height: int) -> str:
    del span, width, height
    options = panel["transformations"][0]["options"]
    hidden, renamed = options["excludeByName"], options["renameByName"]
    columns = sorted(
        {name for one in series for name in one.labels if name not in hidden},
        key=lambda n: (n != "alertname", n != "severity", n),
    )
    head = "".join(f"<th>{html.escape(renamed.get(name, name))}</th>" for name in columns)
    rows = ("".join(f"<td>{html.escape(one.labels.get(name, ''))}</td>" for name in columns) for one in series)
    return f"<table><tr>{head}</tr>{''.join(f'<tr>{row}</tr>' for row in rows)}</table>"
