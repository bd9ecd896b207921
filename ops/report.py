"""The pictures and the page a run leaves behind."""

import html
import math
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ops import charts, page
from ops.charts import BLUE, GREEN, INK, ORANGE
from ops.history import History

if TYPE_CHECKING:
    from matplotlib.axes import Axes

NAMED_CLIENTS_MAX = 30  # with more, who contributed is a picture and not a list


def save(
    history: History, folder: Path, title: str, settings: dict[str, Any], clients: int = 0, virtual: bool = False
) -> None:
    """Write `curves.png` and `report.html`.

    Args:
        history: what happened.
        folder: where to; must exist.
        title: of the page.
        settings: name -> value, shown as a table.
        clients: how many there are; 0: as many as contributed.
        virtual: show the course over virtual time, not over updates.
    """
    picture = curves(history, virtual)
    (folder / "curves.png").write_bytes(picture)
    body = [
        page.cards(_cards(history, virtual)),
        page.picture(picture, "accuracy, loss, staleness and bytes over the run"),
        "<h2>Who contributed</h2>", _clients(history.by_client, clients),
        *_classes(history),
        "<h2>What became of the updates</h2>", page.pairs(("outcome", "updates"), sorted(history.outcomes.items())),
        "<h2>Settings</h2>", page.pairs(("setting", "value"), settings.items()),
    ]  # fmt: skip
    (folder / "report.html").write_text(page.page(title, history.last_line(), body), encoding="utf-8")


def _cards(history: History, virtual: bool) -> dict[str, str]:
    last = history.rows[-1]
    staleness = sum(history.staleness) / max(1, len(history.staleness))
    unit, seconds = charts.time_unit(last.time_s)
    return {
        "accuracy": f"{last.accuracy:.3f}",
        "versions": f"{last.version:,}",
        "updates applied": f"{last.updates:,}",
        "mean staleness": f"{staleness:.2f}",
        "sent by devices": page.bytes_text(history.bytes_sent),
        "smaller than float32": f"{history.ratio:.1f} x",
        "pulled by devices": page.bytes_text(history.bytes_pulled),
        "smaller than models": f"{history.ratio_down:.1f} x",
    } | ({"of virtual time": f"{last.time_s / seconds:.3g} {unit}"} if virtual else {})


def curves(history: History, virtual: bool = False) -> bytes:
    """Draw four panels - accuracy, loss, staleness, bytes - as a PNG."""
    unit, seconds = charts.time_unit(history.rows[-1].time_s)
    along = [row.time_s / seconds if virtual else float(row.updates) for row in history.rows]
    name = f"virtual time, {unit}" if virtual else "updates applied"
    with charts.figure(11, 7) as figure:
        figure.set_layout_engine("constrained", hspace=0.06)
        (accuracy, loss), (staleness, sent) = figure.subplots(2, 2)
        _draw_accuracy(accuracy, along, [row.accuracy for row in history.rows])
        losses = [row.loss for row in history.rows]
        loss.plot(along, losses, color=ORANGE, linewidth=2)
        loss.set(title="Loss on held-out data", yscale="log" if min(losses) > 0 else "linear")
        _draw_staleness(staleness, history.staleness)
        _draw_bytes(sent, along, history)
        for axes in (accuracy, loss, sent):
            axes.set_xlabel(name)
        return charts.png(figure)


def _draw_accuracy(axes: "Axes", along: list[float], values: list[float]) -> None:
    axes.plot(along, values, color=BLUE, linewidth=2)
    axes.set(title="Accuracy on held-out data", ylim=(0, 1.02))
    final = values[-1]
    if math.isfinite(final):
        axes.axhline(final, color=BLUE, linewidth=0.8, linestyle=":")
        axes.annotate(f"{final:.3f}", (along[-1], final), (-4, -16), textcoords="offset points", ha="right", color=BLUE)


def _draw_staleness(axes: "Axes", staleness: list[int]) -> None:
    from matplotlib.ticker import MaxNLocator

    counts = Counter(staleness)
    axes.bar(list(counts), list(counts.values()), color=GREEN, width=0.85)
    mean = sum(staleness) / max(1, len(staleness))
    axes.axvline(mean, color=INK, linewidth=1, linestyle="--")
    highest = max(counts.values(), default=1)
    axes.annotate(f"mean {mean:.2f}", (mean, 1.04 * highest), (6, 0), textcoords="offset points")
    axes.set_ylim(0, 1.15 * highest)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set(title="Staleness of the updates", xlabel="versions behind", ylabel="updates")


def _draw_bytes(axes: "Axes", along: list[float], history: History) -> None:
    rows = history.rows
    full = [4 * history.num_params * row.updates / 1e6 for row in rows]
    axes.plot(along, full, color="#9aa5b1", linewidth=2, label="as float32")
    axes.plot(along, [row.bytes_sent / 1e6 for row in rows], color=BLUE, linewidth=2, label="sent")
    axes.plot(along, [row.bytes_pulled / 1e6 for row in rows], color=ORANGE, linewidth=2, label="pulled")
    up, down = f"{history.ratio:.1f} x", f"{history.ratio_down:.1f} x"
    axes.set(title=f"Sent: {up} smaller, pulled: {down} smaller", ylabel="MB")
    axes.set_yscale("symlog", linthresh=0.1)
    axes.legend()


def _clients(by_client: Counter[str], clients: int) -> str:
    if max(clients, len(by_client)) > NAMED_CLIENTS_MAX:
        return _many_clients(by_client, clients)
    most = max(by_client.values(), default=1)
    body = "".join(
        f'<tr><td>{html.escape(client)}</td><td class="n">{count}</td>'
        f'<td style="width:70%"><span class="bar" style="width:{100 * count / most:.1f}%"></span></td></tr>'
        for client, count in sorted(by_client.items(), key=lambda item: (len(item[0]), item[0]))
    )
    return f'<table><tr><th>worker</th><th class="n">updates</th><th></th></tr>{body}</table>'


def _many_clients(by_client: Counter[str], clients: int) -> str:
    lorenz = charts.contribution(by_client, clients)
    total, silent = len(lorenz) - 1, max(0, clients - len(by_client))
    busiest = 100 * (1 - lorenz[total - math.ceil(total / 10)])
    text = (
        f"{total:,} clients: the busiest tenth made {busiest:.0f} % of the updates that were applied, "
        f"{silent:,} made none."
    )
    picture = charts.contributions({"": [lorenz]}, "Share of the updates by share of the clients")
    return f"<p>{text}</p>{page.picture(picture, text)}"


def _classes(history: History) -> list[str]:
    """Return the accuracy on each class at the end, if the task measures it."""
    last = history.rows[-1].metrics
    by_class = {name: last[charts.CLASS + name] for name in charts.classes_of(last)}
    if not by_class:
        return []
    return [
        "<h2>Accuracy by class</h2>",
        page.picture(charts.class_bars(by_class, "At the last evaluation"), "accuracy by class at the end"),
    ]
