"""The pictures of a comparison; a variant has the same colour in all of them."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ops import charts
from ops.history import History
from ops.simulation.curves import Band, band, course
from ops.simulation.run import Result
from ops.simulation.simulator import WINDOW
from ops.simulation.summary import FINAL

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LOGARITHMIC_FROM = 6.0  # ratio of the longest to the shortest line that asks for a logarithmic axis
START = 0.25  # share of a course, from its start, that may lie outside the picture

Runs = Mapping[str, Sequence[Result]]


def draw(runs: Runs, metric: str, target: float) -> dict[str, tuple[str, bytes]]:
    """Draw everything there is to be seen.

    Args:
        runs: variant -> its finished runs; some variants may have none, not all.
        metric: of the curves.
        target: a line in them; 0: none.

    Returns:
        File name -> what it shows, PNG.
    """
    longest = max(result.virtual_s for results in runs.values() for result in results)
    unit, seconds = charts.time_unit(longest)
    axes = (  # what it is called in a file, column, in a title, at the axis, scale
        ("time", "time_s", "virtual time", f"virtual time, {unit}", seconds),
        ("trips", "trips", "trips", "trips: updates that arrived", 1.0),
        ("bytes_up", "bytes_sent", "bytes up", "MB sent by all devices together", 1e6),
        ("bytes_down", "bytes_pulled", "bytes down", "MB pulled by all devices together", 1e6),
    )
    drawn = {}
    for name, column, short, axis, scale in axes:
        title = f"{metric[:1].upper()}{metric[1:]} against {short}"
        drawn[f"{file_name(metric)}_{name}.png"] = (title, _curves(runs, column, scale, metric, target, title, axis))
    drawn["staleness.png"] = ("staleness of the applied updates", _staleness(runs))
    lorenz = {
        name: [charts.contribution(result.history.by_client, result.plan.fleet.clients) for result in results]
        for name, results in runs.items()
    }
    drawn["contributions.png"] = ("who contributed how much", charts.contributions(lorenz))
    if (picture := _classes(runs)) is not None:
        drawn["classes.png"] = ("final accuracy by class", picture)
    return drawn


def file_name(metric: str) -> str:
    """Return a metric's name as part of a file's."""
    return "".join(c if c.isalnum() or c in "_-" else "_" for c in metric)


def _curves(runs: Runs, column: str, scale: float, metric: str, target: float, title: str, axis: str) -> bytes:
    """Draw a metric against what it cost: the mean of each variant, and a band from the least to the largest value."""
    courses = {name: [course(r.history, column, metric, WINDOW) for r in results] for name, results in runs.items()}
    logarithmic = _spans(courses)
    with charts.figure(10.5, charts.height_for(runs, 5.2)) as figure:
        axes = figure.subplots()
        handles, names, lines = [], [], []
        for index, (name, each) in enumerate(courses.items()):
            line = band([(x / scale, y) for x, y in each], logarithmic)
            if line is None:
                continue
            style = charts.line_style(index)
            axes.fill_between(line.x, line.low, line.high, color=style["color"], alpha=0.16, linewidth=0)
            handles += axes.plot(line.x, line.mean, linewidth=2, **style)
            names.append(charts.label(name))
            lines.append(line)
        range_shown = ", mean and range over seeds" if max(map(len, runs.values())) > 1 else ""
        axes.set(title=title + range_shown, xlabel=axis, ylabel=f"{metric}, mean of {WINDOW} evaluations")
        _window(axes, courses, target)
        if logarithmic:
            _logarithmic(axes, lines)
        if target:
            axes.axhline(target, color=charts.MUTED, linewidth=1, linestyle=(0, (4, 4)), zorder=1)
            axes.annotate(
                f"target {target:g}", (0, target), (4, 3), xycoords=("axes fraction", "data"),
                textcoords="offset points", color=charts.MUTED, fontsize=9,
            )  # fmt: skip
        order = sorted(range(len(lines)), key=lambda i: -lines[i].mean[-1])  # as they stand at the right edge
        charts.legend(axes, [handles[i] for i in order], [names[i] for i in order])
        return charts.png(figure)


def _spans(courses: Mapping[str, Sequence[tuple[Any, Any]]]) -> bool:
    """Say whether the shortest line would be a stub beside the longest."""
    ends = [x[-1] for each in courses.values() for x, _ in each if len(x) and x[-1] > 0]
    return bool(ends) and max(ends) / min(ends) > LOGARITHMIC_FROM


def _logarithmic(axes: "Axes", lines: Sequence[Band]) -> None:
    """Make the x axis logarithmic, from where the first line comes into sight."""
    from matplotlib.ticker import FuncFormatter, NullFormatter

    axes.set_xscale("log")
    seen = [line.x[line.high >= axes.get_ylim()[0]] for line in lines]
    if first := [x[0] for x in seen if len(x)]:
        axes.set_xlim(left=0.8 * min(first))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())


def _window(axes: "Axes", courses: Mapping[str, Sequence[tuple[Any, Any]]], target: float) -> None:
    """Leave out the steep start: the differences are at the end. A falling metric may have a logarithmic axis."""
    values = [y for each in courses.values() for _, y in each if len(y)]
    if not values:
        return
    every, later = np.concatenate(values), np.concatenate([y[int(START * len(y)) :] for y in values])
    falling = np.mean([y[-1] < y[0] for y in values]) > 0.5
    if falling and every.min() > 0 and every.max() / every.min() > LOGARITHMIC_FROM:
        axes.set_yscale("log")
        return
    low, high = (every.min(), later.max()) if falling else (later.min(), every.max())
    if target:
        low, high = min(low, target), max(high, target)
    room = max(1e-6, high - low)
    axes.set_ylim(low - 0.06 * room, high + 0.06 * room)


def _staleness(runs: Runs) -> bytes:
    """Draw each variant's staleness: half of the updates in the box, nine in ten between the whiskers."""
    pooled = {
        name: np.concatenate([np.array(r.history.staleness, dtype=np.float64) for r in results] or [np.zeros(0)])
        for name, results in runs.items()
    }
    with charts.figure(10.5, 1.5 + 0.55 * len(pooled)) as figure:
        axes = figure.subplots()
        for index, values in enumerate(pooled.values()):
            if len(values):
                _box(axes, -index, values, charts.line_style(index)["color"])
        axes.set_yticks([-index for index in range(len(pooled))], [charts.label(name) for name in pooled], fontsize=10)
        axes.set(
            title="Staleness of the applied updates",
            xlabel="versions behind: median, mean (diamond), half in the box, nine in ten between the whiskers",
            ylim=(-len(pooled) + 0.4, 0.6),
        )
        axes.grid(visible=False, axis="y")
        axes.tick_params(axis="y", length=0)
        ends = [np.percentile(values, 95) for values in pooled.values() if len(values)]
        axes.set_xlim(-0.02 * max([1.0, *ends]), 1.3 * max([1.0, *ends]))
        return charts.png(figure)


def _box(axes: "Axes", place: int, values: "np.ndarray[Any, np.dtype[np.float64]]", color: str) -> None:
    p5, p25, p50, p75, p95 = np.percentile(values, (5, 25, 50, 75, 95))
    axes.hlines(place, p5, p95, color=color, linewidth=1.5)
    axes.vlines([p5, p95], place - 0.12, place + 0.12, color=color, linewidth=1.5)
    axes.barh(place, p75 - p25, left=p25, height=0.52, color=color, alpha=0.35, edgecolor=color, linewidth=1.5)
    axes.vlines(p50, place - 0.26, place + 0.26, color=color, linewidth=3)
    axes.plot(values.mean(), place, marker="D", markersize=6, color="white", markeredgecolor=charts.INK)
    axes.annotate(
        f"mean {values.mean():.1f}, max {values.max():.0f}", (p95, place), (8, 0), textcoords="offset points",
        va="center", fontsize=9, color=charts.MUTED,
    )  # fmt: skip


def _classes(runs: Runs) -> bytes | None:
    """Draw the final accuracy on each class, if the task measures it."""
    means = {
        name: {metric: float(np.mean(values)) for metric, values in _final_metrics(results).items()}
        for name, results in runs.items()
    }
    classes = charts.classes_of({metric for each in means.values() for metric in each})
    if not classes:
        return None
    rows = {
        name: [each.get(charts.CLASS + c, float("nan")) for c in classes] for name, each in means.items() if each
    }  # fmt: skip
    return charts.class_heatmap(classes, rows, f"Accuracy by class, mean of the last {FINAL} evaluations")


def _final_metrics(results: Sequence[Result]) -> dict[str, list[float]]:
    """Return every metric's last values, of all runs together."""
    found: dict[str, list[float]] = {}
    histories: list[History] = [result.history for result in results]
    for history in histories:
        for row in history.rows[-FINAL:]:
            for metric, value in row.metrics.items():
                found.setdefault(metric, []).append(value)
    return found
