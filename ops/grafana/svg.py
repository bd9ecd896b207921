"""What all drawn panels have in common: units, colours, shapes."""

import html
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

COLORS = {"blue": "#5794F2", "green": "#73BF69", "orange": "#FF9830", "red": "#F2495C"}
PALETTE = ("#73BF69", "#F2CC0C", "#5794F2", "#FF9830", "#F2495C", "#B877D9", "#8AB8FF", "#FFEE52")
HEAT = ("#0d0887", "#5302a3", "#8b0aa5", "#b83289", "#db5c68", "#f48849", "#febd2a", "#f0f921")
TEXT, MUTED, GRID = "#d8d9da", "#8e8e96", "#2c3235"
LEFT, RIGHT, TOP, BOTTOM = 54, 52, 6, 22  # pixels around a plot
POINTS = 240  # of a range query

Point = tuple[float, float]  # unix seconds, value


@dataclass(frozen=True, slots=True)
class Series:
    """One line of a panel: its name, the query it came from, and its points in order of time."""

    name: str
    query: str
    labels: dict[str, str]
    points: list[Point]


def step_of(span: tuple[float, float]) -> float:
    """Return the seconds between the points of a range query."""
    return max(1.0, (span[1] - span[0]) / POINTS)


def runs_of(points: Sequence[Point], defaults: dict[str, Any], span: tuple[float, float]) -> list[list[Point]]:
    """Return the finite points, parted where a line must not join them.

    Args:
        points: in order of time.
        defaults: of the panel's fields; `spanNulls`: the longest gap to draw across, milliseconds, or always, never.
        span: what was asked for: neighbours are as far apart as its steps, however short `spanNulls` is.
    """
    across = defaults.get("custom", {}).get("spanNulls", False)
    gap_s = (math.inf if across else 0.0) if isinstance(across, bool) else across / 1000
    gap_s = max(gap_s, 1.5 * step_of(span))
    runs: list[list[Point]] = []
    for point in points:
        if not math.isfinite(point[1]):
            continue
        if runs and point[0] - runs[-1][-1][0] <= gap_s:
            runs[-1].append(point)
        else:
            runs.append([point])
    return runs


def text_of(value: float, unit: str, decimals: int | None = None) -> str:
    """Return a value as Grafana would write it."""
    if not math.isfinite(value):
        return "-"
    if unit == "percentunit":
        return f"{100 * value:.{1 if decimals is None else decimals}f} %"
    if unit in ("decbytes", "Bps"):
        return _scaled(value, ("B", "kB", "MB", "GB", "TB")) + "/s" * (unit == "Bps")
    if unit == "s":
        return _duration(value)
    shown = f"{value:.{decimals}f}" if decimals is not None and abs(value) < 1000 else ""
    if unit == "none":
        return shown or f"{value:.4g}"
    return (shown or _scaled(value, ("", "K", "Mil", "Bil"))) + (" /s" if unit == "ops" else "")


def _scaled(value: float, units: Sequence[str]) -> str:
    for unit in units[:-1]:
        if abs(value) < 1000:
            return f"{value:.3g} {unit}".strip()
        value /= 1000
    return f"{value:.3g} {units[-1]}"


def _duration(seconds: float) -> str:
    for unit, size in (("d", 86_400), ("h", 3600), ("min", 60), ("s", 1), ("ms", 1e-3)):
        if abs(seconds) >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds * 1e6:.3g} µs" if seconds else "0 s"


def color_of(name: str) -> str:
    """Return a colour as CSS knows it."""
    return COLORS.get(name, name)


def darkened(color: str, share: float = 0.55) -> str:
    """Mix a colour with the panel's background: what lies in front hides what lies behind."""
    background = (0x18, 0x1B, 0x1F)
    mixed = (int(color[1 + 2 * i : 3 + 2 * i], 16) * share + background[i] * (1 - share) for i in range(3))
    return "#" + "".join(f"{int(part):02x}" for part in mixed)


def threshold_color(defaults: dict[str, Any], value: float) -> str:
    """Return the colour that a panel's thresholds give a value."""
    chosen = "blue"
    for step in defaults["thresholds"]["steps"]:
        if step["value"] is None or value >= step["value"]:
            chosen = step["color"]
    return color_of(chosen)


def word_of(defaults: dict[str, Any], value: float) -> tuple[str, str] | None:
    """Return the word and colour that a panel has for a value, None when it has none."""
    for mapping in defaults.get("mappings", ()):
        for key, shown in mapping["options"].items():
            if float(key) == value:
                return shown["text"], color_of(shown["color"])
    return None


def svg(width: float, height: float, parts: Sequence[str]) -> str:
    """Return a picture of these parts, as large as there is room."""
    return f'<svg viewBox="0 0 {width:g} {height:g}">{"".join(parts)}</svg>'


def label(x: float, y: float, text: str, anchor: str = "start", color: str = MUTED, size: int = 11) -> str:
    """Return a text."""
    place = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"'
    return f'<text {place} fill="{color}" font-size="{size}">{html.escape(text)}</text>'


def rect(x: float, y: float, width: float, height: float, color: str, opacity: float = 1.0) -> str:
    """Return a rectangle."""
    place = f'x="{x:.1f}" y="{y:.1f}" width="{max(0.0, width):.1f}" height="{height:.1f}"'
    return f'<rect {place} fill="{color}" opacity="{opacity}"/>'


def area_of(points: str, color: str, opacity: float) -> str:
    """Return a filled polygon."""
    return f'<polygon points="{points}" fill="{color}" opacity="{opacity}"/>'


def curve_of(spots: Sequence[tuple[float, float]], color: str, width: float, opacity: float = 1.0) -> str:
    """Return a line through these pixels; a dot when there is but one."""
    if len(spots) == 1:
        (x, y), shade = spots[0], f'fill="{color}" opacity="{opacity:g}"'
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{width:g}" {shade}/>'
    stroke = f'fill="none" stroke="{color}" stroke-width="{width:g}" opacity="{opacity:g}"'
    return f'<polyline points="{path_of(spots)}" {stroke}/>'


def path_of(spots: Sequence[tuple[float, float]]) -> str:
    """Return pixels as SVG lists them."""
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in spots)


def time_axis(span: tuple[float, float], left: float, right: float, bottom: float, top: float) -> list[str]:
    """Return vertical lines with their times, at most one each 90 pixels."""
    steps = (5, 10, 30, 60, 120, 300, 600, 1800, 3600, 7200, 21_600, 86_400)
    step = next((s for s in steps if (span[1] - span[0]) / s <= max(2, (right - left) / 90)), 86_400)
    form = "%H:%M:%S" if step < 60 else "%H:%M"
    parts = []
    for tick in range(int(span[0] // step + 1) * step, int(span[1]) + 1, step):
        x = left + (right - left) * (tick - span[0]) / (span[1] - span[0])
        parts.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{top}" y2="{bottom}" stroke="{GRID}"/>')
        parts.append(label(x, bottom + 15, time.strftime(form, time.localtime(tick)), "middle"))
    return parts
