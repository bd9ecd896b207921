"""What a comparison leaves behind: a page with its pictures, a Markdown table, and two CSV files."""

import csv
import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ops import charts, page
from ops.history import Row
from ops.simulation import pictures
from ops.simulation.experiment import Experiment, Run, shown
from ops.simulation.plan import plain_plan
from ops.simulation.run import Result
from ops.simulation.simulator import WINDOW
from ops.simulation.summary import COSTS, FINAL, Spread, Summary, numbers_of, summarise

NONE = "-"
DECIMALS_MAX = 8


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one run: a result, or why there is none."""

    run: Run
    result: Result | None
    error: str = ""


@dataclass(frozen=True, slots=True)
class Cell:
    """One cell of the table: plain text, and what stands smaller beside it."""

    text: str
    note: str = ""


def leave_behind(experiment: Experiment, outcomes: Sequence[Outcome], out: Path) -> None:
    """Write `report.html` and its pictures, `table.md`, `results.csv` and `curves.csv`.

    Args:
        experiment: what was compared.
        outcomes: one a run.
        out: folder; must exist.
    """
    runs = finished(experiment, outcomes)
    summaries = summarise(runs)
    drawn = pictures.draw(runs, experiment.metric, experiment.target) if any(runs.values()) else {}
    for name, (_, png) in drawn.items():
        (out / name).write_bytes(png)
    (out / "table.md").write_text(markdown(experiment, summaries, outcomes), encoding="utf-8")
    _save_results(outcomes, out / "results.csv")
    _save_curves(outcomes, out / "curves.csv")
    (out / "report.html").write_text(_page(experiment, summaries, outcomes, drawn), encoding="utf-8")


def finished(experiment: Experiment, outcomes: Sequence[Outcome]) -> dict[str, list[Result]]:
    """Return the results of each variant, the baseline first."""
    runs: dict[str, list[Result]] = {variant.name: [] for variant in experiment.variants}
    for outcome in outcomes:
        if outcome.result is not None:
            runs[outcome.run.variant.name].append(outcome.result)
    return runs


# --- the table


def table_of(experiment: Experiment, summaries: Mapping[str, Summary]) -> tuple[list[str], list[list[Cell]]]:
    """Return head and rows of the one table."""
    longest_s = max([s.costs["time_s"].mean for s in summaries.values() if s.costs], default=0.0)
    unit, seconds = charts.time_unit(longest_s)
    scales = dict(zip(COSTS, (seconds, 1.0, 1e6, 1e6), strict=True))
    head = ["variant"] + ([f"reached {experiment.target:g}"] if experiment.target else ["runs"])
    head += [f"virtual time, {unit}", "trips", "MB up", "MB down", f"final {experiment.metric}", "staleness"]
    head += ["refused / rejected / lost, %"]
    rows = []
    for name, summary in summaries.items():
        count = f"{summary.reached} of {summary.runs}" if experiment.target else str(summary.runs)
        row = [Cell(name), Cell(count), *(_cost(summary, cost, scale) for cost, scale in scales.items())]
        row += [
            Cell(_decimals(summary.final, max(4, _decimals_for(summary.final.mean)))),
            Cell(_decimals(summary.staleness, 1)),
        ]
        row += [Cell(" / ".join(_percent(share) for share in (summary.refused, summary.rejected, summary.lost)))]
        rows.append(row)
    return head, rows


def _cost(summary: Summary, cost: str, scale: float) -> Cell:
    if not summary.costs:
        return Cell(NONE)
    value = summary.costs[cost]
    decimals = 0 if cost == "trips" else _decimals_for(value.mean / scale)
    ratio = summary.ratios.get(cost)
    text = _decimals(Spread(value.mean / scale, value.sd / scale), decimals)
    return Cell(text, "" if ratio is None else f"{ratio:.{max(2, _decimals_for(ratio) - 1)}f} x")


def _decimals_for(value: float) -> int:
    """Return how many decimals show three digits."""
    return max(0, min(DECIMALS_MAX, 2 - math.floor(math.log10(value)))) if 0 < value < math.inf else 0


def _decimals(value: Spread, decimals: int) -> str:
    if not math.isfinite(value.mean):
        return NONE
    deviation = f" ± {value.sd:,.{decimals}f}" if math.isfinite(value.sd) else ""
    return f"{value.mean:,.{decimals}f}{deviation}"


def _percent(share: Spread) -> str:
    return f"{100 * share.mean:.1f}" if math.isfinite(share.mean) else NONE


def _explained(experiment: Experiment, summaries: Mapping[str, Summary]) -> str:
    """Say what the table's numbers are."""
    base = next(iter(summaries))
    until = (
        f"until the mean of the last {WINDOW} evaluations first reached {experiment.metric} {experiment.target:g}; "
        f"{NONE} where not every seed did"
        if experiment.target
        else "over the whole run"
    )
    return (
        f"Mean ± standard deviation over the seeds ({', '.join(map(str, experiment.seeds))}). Virtual time, trips and "
        f"bytes are those {until}; x: relative to {base}. Final: mean of the last {FINAL} evaluations. Staleness: mean "
        "over the applied updates, in versions. The last column is of all trips: refused as too stale, rejected, lost "
        "without any update."
    )


def markdown(experiment: Experiment, summaries: Mapping[str, Summary], outcomes: Sequence[Outcome]) -> str:
    """Return the table in Markdown, what its numbers are, and which runs failed."""
    head, rows = table_of(experiment, summaries)
    lines = [_row(head), "|" + "|".join(["---", *["---:"] * (len(head) - 1)]) + "|"]
    lines += [_row([cell.text + (f" ({cell.note})" if cell.note else "") for cell in row]) for row in rows]
    lines += ["", _explained(experiment, summaries)]
    failed = [f"- {o.run.variant.name}, seed {o.run.seed} failed: {_one_line(o.error)}" for o in outcomes if o.error]
    return "\n".join([*lines, *(["", *failed] if failed else [])]) + "\n"


def _row(cells: Sequence[str]) -> str:
    """Return a row of a Markdown table; what a user named is shown as it is."""
    plain = (_one_line(cell).replace("|", "\\|").replace("$", "\\$").replace("<", "&lt;") for cell in cells)
    return f"| {' | '.join(plain)} |"


def _one_line(text: str) -> str:
    return " ".join(text.split())


# --- the page


def _page(
    experiment: Experiment,
    summaries: Mapping[str, Summary],
    outcomes: Sequence[Outcome],
    drawn: Mapping[str, tuple[str, bytes]],
) -> str:
    ended = sum(outcome.result is not None for outcome in outcomes)
    count = f"variants: {len(experiment.variants)}, seeds: {len(experiment.seeds)}, runs finished: {ended}"
    paragraphs = [f"<p>{html.escape(part)}</p>" for part in experiment.text.split("\n\n") if part.strip()]
    body = [
        *paragraphs,
        *_html_table(experiment, summaries),
        *_failures(outcomes),
        "<h2>Pictures</h2>",
        *(page.picture(png, shows) for shows, png in drawn.values()),
        *_conditions(experiment),
    ]
    return page.page(experiment.title, count, body)


def _html_table(experiment: Experiment, summaries: Mapping[str, Summary]) -> list[str]:
    head, rows = table_of(experiment, summaries)
    cells = [[_html_cell(cell) for cell in row] for row in rows]
    for index, row in enumerate(cells):
        row[0] = page.swatch(index) + row[0]
    return [
        f'<div class="wide">{page.table(head, cells, numbers_from=1, kind="dense")}</div>',
        f'<p class="note">{html.escape(_explained(experiment, summaries))}</p>',
    ]


def _html_cell(cell: Cell) -> str:
    note = f"<small>{html.escape(cell.note)}</small>" if cell.note else ""
    return html.escape(cell.text) + note


def _failures(outcomes: Sequence[Outcome]) -> list[str]:
    """Say which runs gave no result, and in which of the others a training raised."""
    lines = []
    for outcome in outcomes:
        name = html.escape(f"{outcome.run.variant.name}, seed {outcome.run.seed}")
        if outcome.result is None:
            lines.append(f'<li class="bad">{name} failed: {html.escape(outcome.error)}</li>')
        else:
            raised = (f"{count} x {message}" for message, count in outcome.result.failures.items())
            lines += [f"<li>{name}, trainings raised: {html.escape(text)}</li>" for text in raised]
    return [f"<h2>What failed</h2><ul>{''.join(lines)}</ul>"] if lines else []


def _conditions(experiment: Experiment) -> list[str]:
    """Return what was run: the options of all, those of each variant, and the defaults that were left."""
    own = [(variant.name, shown(variant.options) or "as above") for variant in experiment.variants]
    given = {key.split(".")[0] for key in experiment.base}
    given |= {key.split(".")[0] for variant in experiment.variants for key in variant.options}
    plans = [plain_plan(run.plan) for run in experiment.runs]
    rest = {
        key: value
        for key, value in plans[0].items()
        if key not in given | {"seed"} and all(plan.get(key) == value for plan in plans)
    }
    seeds = ", ".join(map(str, experiment.seeds))
    defaults = page.pairs(("option", "value"), sorted(rest.items()))
    return [
        "<h2>Conditions</h2>", page.pairs(("option of all", "value"), (experiment.base | {"seeds": seeds}).items()),
        "<h2>Variants</h2>", page.pairs(("variant", "its own options"), own),
        f"<details><summary>Everything else, at its default</summary>{defaults}</details>",
    ]  # fmt: skip


# --- the numbers as files


def _save_results(outcomes: Sequence[Outcome], path: Path) -> None:
    """Write one row a run; bytes and seconds, empty where there is nothing."""
    rows = [_result_row(outcome) for outcome in outcomes]
    _write(path, rows)


def _result_row(outcome: Outcome) -> dict[str, Any]:
    row: dict[str, Any] = {"variant": outcome.run.variant.name, "seed": outcome.run.seed, "error": outcome.error}
    result = outcome.result
    if result is None:
        return row
    numbers, history, last = numbers_of(result), result.history, result.history.rows[-1]
    fleet = result.plan.fleet
    reached = numbers.costs if fleet.target else {}
    return row | {f"target_{cost}": reached.get(cost, "") for cost in COSTS} | {
        f"final_{fleet.metric}": numbers.final, "staleness_mean": numbers.staleness,
        "staleness_max": max(history.staleness, default=0), "virtual_s": result.virtual_s, "versions": last.version,
        "published": result.published, "trips": history.trips, "applied": history.outcomes["applied"],
        "stale": history.outcomes["stale"], "rejected": history.outcomes["rejected"], "lost": result.lost,
        "aborted": result.aborted, "raised": sum(result.failures.values()), "bytes_sent": history.bytes_sent,
        "bytes_pulled": history.bytes_pulled, "wall_s": f"{result.wall_s:.1f}", "sha256": result.sha256,
    }  # fmt: skip


def _save_curves(outcomes: Sequence[Outcome], path: Path) -> None:
    """Write one row an evaluation."""
    rows = [
        {"variant": outcome.run.variant.name, "seed": outcome.run.seed} | _curve_row(row)
        for outcome in outcomes
        if outcome.result is not None
        for row in outcome.result.history.rows
    ]
    _write(path, rows)


def _curve_row(row: Row) -> dict[str, Any]:
    own = ("time_s", "version", "trips", "updates", "staleness_mean", "bytes_sent", "bytes_pulled")
    return {name: getattr(row, name) for name in own} | dict(row.metrics)


def _write(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    columns = dict.fromkeys(name for row in rows for name in row)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(columns), restval="")
        writer.writeheader()
        writer.writerows(rows)
