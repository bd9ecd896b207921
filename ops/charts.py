"""What the pictures of runs and of comparisons have in common: colours, style, and the charts both show."""

import io
import re
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, MUTED, GRID, BLUE, ORANGE, GREEN = "#1f2933", "#616e7c", "#d9dee4", "#2563eb", "#ea7317", "#0f9d76"
PALETTE = (  # Okabe and Ito's colours, told apart with any colour vision; their yellow, too pale on white, is a wine
    "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#8C1D5A", "#111111",
)  # fmt: skip
DASHES = ("-", "--", ":", "-.")  # the palette begins anew with the next one
CLASS = "accuracy_class_"  # metrics of this name are accuracies of one class each
NAME_CHARS = 26  # a longer name is broken into lines
_WRITTEN_CLASSES_MAX = 20  # more do not leave the room to write numbers into a heat map
_STYLE: Any = {
    "font.size": 11, "axes.edgecolor": GRID, "axes.labelcolor": INK, "xtick.color": INK, "ytick.color": INK,
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.color": GRID,
    "axes.titlelocation": "left", "axes.titleweight": "bold", "axes.axisbelow": True, "legend.frameon": False,
}  # fmt: skip

Floats = NDArray[np.float64]


@contextmanager
def figure(width: float, height: float) -> Iterator["Figure"]:
    """Give a figure in the house style, in inches; draw on it and make its `png` inside."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_STYLE):
        yield Figure(figsize=(width, height), dpi=110, layout="constrained")


def png(drawn: "Figure") -> bytes:
    """Return a figure as a PNG."""
    buffer = io.BytesIO()
    drawn.savefig(buffer, format="png")
    return buffer.getvalue()


def line_style(index: int) -> dict[str, Any]:
    """Return colour and dash of the index-th of several, the same in every picture."""
    return {"color": PALETTE[index % len(PALETTE)], "linestyle": DASHES[index // len(PALETTE) % len(DASHES)]}


def label(name: str, chars: int = NAME_CHARS) -> str:
    """Return a user's name as matplotlib draws it literally: no mathematics, long ones in several lines."""
    lines = textwrap.fill(name, chars, break_long_words=True, max_lines=4, placeholder=" ...")
    return lines.replace("$", r"\$")


def time_unit(longest_s: float) -> tuple[str, float]:
    """Return the unit for times up to `longest_s`, and how many seconds it has."""
    for unit, seconds, up_to in (("s", 1.0, 180.0), ("min", 60.0, 180 * 60.0), ("h", 3600.0, 100 * 3600.0)):
        if longest_s <= up_to:
            return unit, seconds
    return "days", 86400.0


def legend(axes: "Axes", handles: Sequence[Any], names: Sequence[str]) -> None:
    """Put a legend to the right of the axes."""
    shown = axes.legend(
        handles, ["x"] * len(names), loc="center left", bbox_to_anchor=(1.01, 0.5), labelspacing=0.7, handlelength=2.2
    )  # the names come after: matplotlib leaves out what begins with an underscore
    for text, name in zip(shown.get_texts(), names, strict=True):
        text.set_text(name)


def height_for(names: Iterable[str], least: float, more_lines: int = 0) -> float:
    """Return how many inches high a figure must be for its legend, at least `least`.

    Args:
        names: in the legend.
        least: inches.
        more_lines: under each name.
    """
    return max(least, 0.6 + sum(0.14 + 0.19 * (1 + more_lines + label(name).count("\n")) for name in names))


def contribution(by_client: Mapping[str, int], clients: int) -> Floats:
    """Return the Lorenz curve of the clients' updates, float64 [clients + 1].

        L_i = (updates of the i clients that made the fewest) / (all updates)

    Args:
        by_client: client -> updates; those without any need not stand here.
        clients: how many there are.
    """
    counts = np.zeros(max(clients, len(by_client)))
    counts[: len(by_client)] = sorted(by_client.values())
    counts.sort()
    return np.concatenate([[0.0], np.cumsum(counts) / max(1.0, counts.sum())])


def gini(lorenz: Floats) -> float:
    """Return how unequal a Lorenz curve is: 0 all alike, towards 1 one alone."""
    return float(1 - (lorenz[1:] + lorenz[:-1]).mean())


def contributions(curves: Mapping[str, Sequence[Floats]], title: str = "Who contributed") -> bytes:
    """Draw who contributed how much: one line each, the mean over its runs.

    Args:
        curves: name -> the Lorenz curve of each run; one without runs is left out, but keeps its colour.
        title: of the picture.
    """
    grid = np.linspace(0, 100, 201)
    with figure(9.6, height_for(curves, 4.8, more_lines=1) + 0.4) as drawn:
        axes = drawn.subplots()
        equal = axes.plot([0, 100], [0, 100], color="#9aa5b1", linestyle=(0, (4, 4)), linewidth=1.2)[0]
        handles, names = [equal], ["all the same"]
        lines = {name: _mean_of(runs, grid) for name, runs in curves.items()}
        for index, (name, runs) in enumerate(curves.items()):
            if not runs:
                continue
            over = sum(np.allclose(lines[other], lines[name], atol=0.5) for other in list(curves)[index + 1 :])
            # the same fleet contributes alike whatever the server does: a line shows beside those that cover it
            handles += axes.plot(grid, lines[name], linewidth=2 + 1.8 * over, **line_style(index))
            inequality = f"Gini {np.mean([gini(run) for run in runs]):.2f}"
            names.append(f"{label(name)}\n{inequality}" if len(curves) > 1 else inequality)
        axes.set(
            title=title, xlabel="% of the clients, those with the fewest updates first",
            ylabel="% of the updates applied", xlim=(0, 100), ylim=(0, 100),
        )  # fmt: skip
        legend(axes, handles, names)
        return png(drawn)


def _mean_of(runs: Sequence[Floats], grid: Floats) -> Floats:
    """Return the mean of Lorenz curves at shares of the clients, both in percent; NaN where there is none."""
    if not runs:
        return np.full(len(grid), np.nan)
    mean: Floats = np.mean([np.interp(grid, np.linspace(0, 100, len(run)), 100 * run) for run in runs], axis=0)
    return mean


def classes_of(metrics: Iterable[str]) -> list[str]:
    """Return the names of classes that metrics are about, numbers in their order."""
    names = {metric.removeprefix(CLASS) for metric in metrics if metric.startswith(CLASS)}
    return sorted(names, key=lambda name: (not name.isdecimal(), int(name) if name.isdecimal() else 0, name))


def class_bars(by_class: Mapping[str, float], title: str) -> bytes:
    """Draw the accuracy on each class, class -> accuracy."""
    with figure(11, 3.4) as drawn:
        axes = drawn.subplots()
        places = range(len(by_class))
        axes.bar(places, list(by_class.values()), color=BLUE, width=0.8)
        if len(by_class) <= _WRITTEN_CLASSES_MAX:
            for place, value in zip(places, by_class.values(), strict=True):
                axes.annotate(
                    f"{value:.2f}", (place, value), (0, 3), textcoords="offset points", ha="center", fontsize=9
                )
        _name_classes(axes, list(by_class))
        axes.set(title=title, xlabel="class", ylim=(0, 1.1))
        axes.grid(visible=False, axis="x")
        return png(drawn)


def class_heatmap(classes: Sequence[str], by_name: Mapping[str, Sequence[float]], title: str) -> bytes:
    """Draw the accuracy on each class, one row a name.

    Args:
        classes: in the order of the columns.
        by_name: name -> accuracy on each class; NaN where there is none.
        title: of the picture.
    """
    values = np.array(list(by_name.values()), dtype=np.float64)
    with figure(11, 1.6 + 0.55 * len(values)) as drawn:
        axes = drawn.subplots()
        low = np.floor(10 * np.nanmin(np.append(values, 0.9))) / 10  # the differences are at the top
        image = axes.imshow(values, cmap="cividis", vmin=low, vmax=1, aspect="auto")
        if len(classes) <= _WRITTEN_CLASSES_MAX:
            for (row, column), value in np.ndenumerate(values):
                color = "white" if value < low + 0.55 * (1 - low) else INK
                axes.text(column, row, f"{value:.2f}", ha="center", va="center", color=color, fontsize=9)
        _name_classes(axes, classes)
        axes.set_yticks(range(len(values)), [label(name) for name in by_name], fontsize=10)
        axes.set(title=title, xlabel="class")
        axes.grid(visible=False)
        axes.tick_params(length=0)
        drawn.colorbar(image, ax=axes, pad=0.01, fraction=0.03)
        return png(drawn)


def _name_classes(axes: "Axes", classes: Sequence[str]) -> None:
    step = -(-len(classes) // 40)
    places = range(0, len(classes), step)
    axes.set_xticks(places, [re.sub(r"\$", r"\\$", classes[place]) for place in places])
