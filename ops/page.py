"""The pieces of a page that a run or a comparison leaves behind: one file that needs nothing beside it."""

import base64
import html
from collections.abc import Iterable, Mapping, Sequence

from ops import charts
from ops.charts import BLUE, GRID, INK

_PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
 body {{ font: 16px/1.5 system-ui, sans-serif; color: {ink}; max-width: 1060px; margin: 2.5rem auto; padding: 0 1rem }}
 h1 {{ font-size: 1.6rem; margin-bottom: .2rem }} h2 {{ font-size: 1.1rem; margin-top: 2.2rem }}
 .sub, .note, small {{ color: #616e7c }} .sub {{ margin-top: 0 }} .note {{ font-size: .9rem }}
 .cards {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: .8rem; margin: 1.5rem 0 }}
 .card {{ border: 1px solid {grid}; border-radius: 10px; padding: .8rem 1rem }}
 .card b {{ display: block; font-size: 1.55rem; font-variant-numeric: tabular-nums }} .card span {{ color: #616e7c }}
 .wide {{ overflow-x: auto }} .bad {{ color: #b42318 }}
 img {{ width: 100%; height: auto; margin: .5rem 0 }} details {{ margin-top: 1.5rem }}
 table {{ border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums }}
 td, th {{ text-align: left; padding: .35rem .6rem; border-bottom: 1px solid {grid}; vertical-align: top }}
 td {{ overflow-wrap: anywhere }} td.n, th.n {{ text-align: right }}
 td.n {{ white-space: nowrap }} td.n small {{ display: block }} table.dense {{ font-size: .88rem }}
 table.pairs td:first-child {{ width: 35% }} table.dense td:first-child {{ min-width: 11rem }}
 .swatch {{ width: 1.4rem; border-top: .25rem solid; display: inline-block;
   vertical-align: middle; margin-right: .5rem }}
 .bar {{ background: {blue}; height: .7rem; border-radius: 3px; display: inline-block; vertical-align: middle }}
</style>
<h1>{title}</h1><p class="sub">{subtitle}</p>
{body}
</html>
"""


def page(title: str, subtitle: str, body: Iterable[str]) -> str:
    """Return a whole page.

    Args:
        title: plain text.
        subtitle: plain text.
        body: HTML, piece by piece.
    """
    return _PAGE.format(
        title=html.escape(title), subtitle=html.escape(subtitle), body="\n".join(body), ink=INK, grid=GRID, blue=BLUE
    )


def swatch(index: int) -> str:
    """Return the line that stands for the index-th of several in the pictures."""
    style = charts.line_style(index)
    border = {"-": "solid", "--": "dashed", ":": "dotted", "-.": "double"}[style["linestyle"]]
    return f'<span class="swatch" style="border-top-color:{style["color"]};border-top-style:{border}"></span>'


def cards(values: Mapping[str, str]) -> str:
    """Return the large numbers at the head, name -> text."""
    each = (
        f'<div class="card"><b>{html.escape(value)}</b><span>{html.escape(name)}</span></div>'
        for name, value in values.items()
    )
    return f'<div class="cards">{"".join(each)}</div>'


def picture(png: bytes, alt: str) -> str:
    """Return an image that is part of the page; `alt` is plain text."""
    return f'<img alt="{html.escape(alt)}" src="data:image/png;base64,{base64.b64encode(png).decode()}">'


def pairs(head: tuple[str, str], rows: Iterable[tuple[object, object]]) -> str:
    """Return a table of two columns, all plain text."""
    return table(head, ([html.escape(str(a)), html.escape(str(b))] for a, b in rows), kind="pairs")


def table(head: Sequence[str], rows: Iterable[Sequence[str]], numbers_from: int | None = None, kind: str = "") -> str:
    """Return a table.

    Args:
        head: plain text.
        rows: HTML, cell by cell.
        numbers_from: this column and those after it are set to the right.
        kind: its CSS class.
    """
    first = len(head) if numbers_from is None else numbers_from
    number = [' class="n"' if column >= first else "" for column in range(len(head))]
    top = "".join(f"<th{n}>{html.escape(name)}</th>" for n, name in zip(number, head, strict=True))
    body = ("".join(f"<td{n}>{cell}</td>" for n, cell in zip(number, row, strict=True)) for row in rows)
    return f'<table class="{kind}"><tr>{top}</tr>{"".join(f"<tr>{row}</tr>" for row in body)}</table>'


def bytes_text(count: float) -> str:
    """Return a number of bytes as one reads it, three digits."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"
