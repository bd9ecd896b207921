"""The pictures and the page a run leaves behind."""

import base64
import html
import io
from collections import Counter
from pathlib import Path
from typing import Any

from ops.history import History

_INK, _GRID, _BLUE, _ORANGE, _GREEN = "#1f2933", "#d9dee4", "#2563eb", "#ea7317", "#0f9d76"

_PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
 body {{ font: 16px/1.5 system-ui, sans-serif; color: {ink}; max-width: 1060px; margin: 2.5rem auto; padding: 0 1rem }}
 h1 {{ font-size: 1.6rem; margin-bottom: .2rem }} h2 {{ font-size: 1.1rem; margin-top: 2.2rem }}
 .sub {{ color: #616e7c; margin-top: 0 }}
 .cards {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: .8rem; margin: 1.5rem 0 }}
 .card {{ border: 1px solid {grid}; border-radius: 10px; padding: .8rem 1rem }}
 .card b {{ display: block; font-size: 1.55rem; font-variant-numeric: tabular-nums }} .card span {{ color: #616e7c }}
 img {{ width: 100%; height: auto }}
 table {{ border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums }}
 td, th {{ text-align: left; padding: .35rem .6rem; border-bottom: 1px solid {grid} }}
 td.n, th.n {{ text-align: right }}
 .bar {{ background: {blue}; height: .7rem; border-radius: 3px; display: inline-block; vertical-align: middle }}
</style>
<h1>{title}</h1><p class="sub">{last_line}</p>
<div class="cards">{cards}</div>
<img alt="accuracy, loss, staleness and bytes over the run" src="data:image/png;base64,{picture}">
<h2>Who contributed</h2>{clients}
<h2>What became of the updates</h2>{outcomes}
<h2>Settings</h2>{settings}
</html>
"""


def save(history: History, folder: Path, title: str, settings: dict[str, Any]) -> None:
    """Write `curves.png` and `report.html`.

    Args:
        history: what happened.
        folder: where to; must exist.
        title: of the page.
        settings: name -> value, shown as a table.
    """
    picture = curves(history)
    (folder / "curves.png").write_bytes(picture)
    last = history.rows[-1]
    staleness = sum(history.staleness) / max(1, len(history.staleness))
    cards = {
        "accuracy": f"{last.accuracy:.3f}",
        "versions": f"{last.version:,}",
        "updates applied": f"{last.updates:,}",
        "mean staleness": f"{staleness:.2f}",
        "sent by devices": _bytes(history.bytes_sent),
        "smaller than float32": f"{history.ratio:.1f} x",
        "pulled by devices": _bytes(history.bytes_pulled),
        "smaller than models": f"{history.ratio_down:.1f} x",
    }
    page = _PAGE.format(
        title=html.escape(title), last_line=html.escape(history.last_line()), ink=_INK, grid=_GRID, blue=_BLUE,
        cards="".join(f'<div class="card"><b>{value}</b><span>{name}</span></div>' for name, value in cards.items()),
        picture=base64.b64encode(picture).decode(),
        clients=_clients(history.by_client),
        outcomes=_table(("outcome", "updates"), sorted(history.outcomes.items())),
        settings=_table(("setting", "value"), settings.items()),
    )  # fmt: skip
    (folder / "report.html").write_text(page)


def curves(history: History) -> bytes:
    """Draw four panels - accuracy, loss, staleness, bytes - as a PNG."""
    import matplotlib
    import matplotlib.ticker

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    style: Any = {
        "font.size": 11, "axes.edgecolor": _GRID, "axes.labelcolor": _INK, "xtick.color": _INK, "ytick.color": _INK,
        "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.color": _GRID,
        "axes.titlelocation": "left", "axes.titleweight": "bold", "axes.axisbelow": True,
    }  # fmt: skip
    rows = history.rows
    updates = [row.updates for row in rows]
    with plt.rc_context(style):
        figure, ((accuracy, loss), (staleness, sent)) = plt.subplots(2, 2, figsize=(11, 7), constrained_layout=True)
        accuracy.plot(updates, [row.accuracy for row in rows], color=_BLUE, linewidth=2)
        accuracy.set(title="Accuracy on held-out data", xlabel="updates applied", ylim=(0, 1.02))
        final = rows[-1].accuracy
        accuracy.axhline(final, color=_BLUE, linewidth=0.8, linestyle=":")
        accuracy.annotate(
            f"{final:.3f}", (updates[-1], final), (-4, -16), textcoords="offset points", ha="right", color=_BLUE
        )
        loss.plot(updates, [row.loss for row in rows], color=_ORANGE, linewidth=2)
        loss.set(title="Loss on held-out data", xlabel="updates applied", yscale="log")
        counts = Counter(history.staleness)
        staleness.bar(list(counts), list(counts.values()), color=_GREEN, width=0.85)
        mean = sum(history.staleness) / max(1, len(history.staleness))
        staleness.axvline(mean, color=_INK, linewidth=1, linestyle="--")
        highest = max(counts.values(), default=1)
        staleness.annotate(f"mean {mean:.2f}", (mean, 1.04 * highest), (6, 0), textcoords="offset points")
        staleness.set_ylim(0, 1.15 * highest)
        staleness.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(integer=True))
        staleness.set(title="Staleness of the updates", xlabel="versions behind", ylabel="updates")
        full = [4 * history.num_params * row.updates / 1e6 for row in rows]
        sent.plot(updates, full, color="#9aa5b1", linewidth=2, label="as float32")
        sent.plot(updates, [row.bytes_sent / 1e6 for row in rows], color=_BLUE, linewidth=2, label="sent")
        sent.plot(updates, [row.bytes_pulled / 1e6 for row in rows], color=_ORANGE, linewidth=2, label="pulled")
        up, down = f"{history.ratio:.1f} x", f"{history.ratio_down:.1f} x"
        sent.set(title=f"Sent: {up} smaller, pulled: {down} smaller", xlabel="updates applied", ylabel="MB")
        sent.set_yscale("symlog", linthresh=0.1)
        sent.legend(frameon=False)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=110)
        plt.close(figure)
    return buffer.getvalue()


def _clients(by_client: Counter[str]) -> str:
    most = max(by_client.values(), default=1)
    rows = "".join(
        f'<tr><td>{html.escape(client)}</td><td class="n">{count}</td>'
        f'<td style="width:70%"><span class="bar" style="width:{100 * count / most:.1f}%"></span></td></tr>'
        for client, count in sorted(by_client.items())
    )
    return f'<table><tr><th>worker</th><th class="n">updates</th><th></th></tr>{rows}</table>'


def _table(head: tuple[str, str], rows: Any) -> str:
    body = "".join(f"<tr><td>{html.escape(str(a))}</td><td>{html.escape(str(b))}</td></tr>" for a, b in rows)
    return f"<table><tr><th>{head[0]}</th><th>{head[1]}</th></tr>{body}</table>"


def _bytes(count: float) -> str:
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"
