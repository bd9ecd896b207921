"""`fedmq models list` and `show`."""

import json
import time
from collections.abc import Sequence

from rich.box import HEAVY_HEAD, SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ops.models.facts import Facts, facts_of
from ops.models.lookup import entry_of, number_of, opened
from shared.config import Settings
from shared.layout import KEPT_BYTES
from shared.store.redis_versions import RedisVersions

WIDE = 120  # columns of a terminal from which on everything is shown
METRICS_MAX = (2, 1)  # of a version in the list: wide, narrow
CONTRIBUTIONS_MAX = 50  # printed; --json has all
AGES_S = ((1.0, "s"), (60.0, "min"), (3600.0, "h"), (86_400.0, "d"))


def list_versions(settings: Settings, as_json: bool) -> None:
    """Print the stored versions.

    Args:
        settings: job and store.
        as_json: one JSON list instead of a table.
    """
    store = opened(settings)
    known = [facts_of(store, entry) for entry in store.versions()]
    if as_json:
        print(json.dumps([facts.record() for facts in known], indent=2))
        return
    console = Console()
    wide = console.width >= WIDE
    table = Table(
        title=f"job {settings.job}", title_justify="left", box=HEAVY_HEAD if wide else SIMPLE_HEAD,
        padding=(0, 1) if wide else (0, 1, 0, 0), show_edge=wide, pad_edge=wide,
    )  # fmt: skip
    names = ("version", "created", "updates", "staleness", "evaluation", "tags", "sha256")
    narrow = ("version", "age", "updates", "stale", "evaluation", "tags", "sha256")
    for name in names if wide else narrow:
        table.add_column(name, justify="right" if name == "version" else "left", overflow="fold")
    for facts in known:
        table.add_row(*_row(facts, wide))
    console.print(table)


def show(settings: Settings, name: str, as_json: bool) -> None:
    """Print what is known of a version, who contributed to it, and its tensors.

    Args:
        settings: job and store.
        name: a version, a tag, or newest.
        as_json: one JSON object instead.
    """
    store = opened(settings)
    facts = facts_of(store, entry_of(store, number_of(store, name)))
    if as_json:
        print(json.dumps(_whole(store, facts), indent=2))
        return
    console = Console(highlight=False, markup=False)
    for label, text in _lines(store, facts).items():
        console.print(f"{label}: {text}")
    if facts.contributions:
        console.print(_contributors(facts))
        if (more := len(facts.contributions) - CONTRIBUTIONS_MAX) > 0:
            console.print(f"and {more} more; --json shows all")
    table = Table(title=f"job {settings.job}, version {facts.version}", title_justify="left")
    for column in ("tensor", "shape", "dtype", "policy", "bytes"):
        table.add_column(column, overflow="fold")
    for spec in store.layout().tensors:
        size = spec.size * KEPT_BYTES.get(spec.dtype, 4)
        table.add_row(Text(spec.name), str(spec.shape), spec.dtype, spec.policy, f"{size:,}")
    console.print(table)


def lasting(seconds: float) -> str:
    """Return a duration in its largest unit, e.g. `12 min`."""
    unit_s, unit = next((pair for pair in reversed(AGES_S) if seconds >= pair[0]), AGES_S[0])
    return f"{max(0.0, seconds) / unit_s:.0f} {unit}"


def clock(seconds: float) -> str:
    """Return a time as the terminal's clock would show it."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))


def metrics(evaluation: dict[str, float], most: int, digits: int = 4) -> str:
    """Return the first few numbers of an evaluation, and how many more there are."""
    shown = [f"{name} {value:.{digits}g}" for name, value in list(evaluation.items())[:most]]
    more = len(evaluation) - len(shown)
    return ", ".join([*shown, *([f"+{more} more"] if more else [])])


def _row(facts: Facts, wide: bool) -> Sequence[Text]:
    by = "" if facts.clients is None else f" by {facts.clients}" if facts.updates else ""
    mean, most = facts.staleness or (None, None)
    stale = "" if mean is None else f"{mean:.3g}, at most {most}" if wide else f"{mean:.2g}/{most}"
    cells = (
        str(facts.version), clock(facts.created_at) if wide else lasting(time.time() - facts.created_at),
        f"{facts.updates}{by}", stale, metrics(facts.evaluation, METRICS_MAX[0 if wide else 1], 4 if wide else 3),
        (", " if wide else "\n").join(facts.tags), facts.sha256[: 12 if wide else 7],
    )  # fmt: skip
    return [Text(cell) for cell in cells]


def _whole(store: RedisVersions, facts: Facts) -> dict[str, object]:
    """Return everything known of a version, in JSON's types."""
    job = store.job()
    contributions = facts.contributions
    return facts.record() | {
        "revision": facts.revision, "parent": facts.parent, "rolled_back_to": facts.rolled_back_to,
        "rule": job.get("rule"), "codec": job.get("codec"), "layout": store.layout().hash,
        "num_params": store.layout().num_params,
        "contributions": None if contributions is None else [
            {
                "client": each.client, "update_id": each.update_id, "staleness": each.staleness,
                "weight": each.weight, "num_samples": each.num_samples,
            }
            for each in contributions
        ],
        "tensors": [
            {"name": spec.name, "shape": list(spec.shape), "dtype": spec.dtype, "policy": spec.policy}
            for spec in store.layout().tensors
        ],
    }  # fmt: skip


def _lines(store: RedisVersions, facts: Facts) -> dict[str, str]:
    """Return label -> text of what a person wants to know first."""
    job = store.job()
    clients = "unknown, the ledger does not reach back" if facts.clients is None else f"{facts.clients} clients"
    mean, most = facts.staleness or (None, None)
    lines = {
        "version": str(facts.version), "created": clock(facts.created_at), "sha256": facts.sha256,
        "tags": ", ".join(facts.tags) or "none", "made from": _origin(facts),
        "updates": f"{facts.updates} of {clients}" if facts.updates else "none",
    }  # fmt: skip
    if mean is not None:
        lines["staleness"] = f"{mean:.3g} on average, at most {most}"
    if facts.evaluation:
        lines["evaluation"] = metrics(facts.evaluation, len(facts.evaluation))
    if "rule" in job:
        lines["the job's rule and codec now"] = f"{job['rule']}, {job.get('codec', '?')}"
    shown = ("updates", "staleness_mean", "staleness_max", "sha256", "created_at")
    rest = {name: text for name, text in sorted(facts.meta.items()) if name not in shown}
    return lines | {name: text for name, text in rest.items() if not name.startswith("evaluation:")}


def _origin(facts: Facts) -> str:
    if facts.rolled_back_to is not None:
        return f"version {facts.rolled_back_to}, by a rollback"
    if facts.parent is not None:
        return f"version {facts.parent}"
    return "the model the job began with" if not facts.version else "unknown, the ledger does not reach back"


def _contributors(facts: Facts) -> Table:
    table = Table(title="who contributed", title_justify="left")
    for column in ("client", "update", "staleness", "weight", "samples"):
        table.add_column(column, justify="left" if column in ("client", "update") else "right", overflow="fold")
    for each in (facts.contributions or ())[:CONTRIBUTIONS_MAX]:
        own = each.update_id.removeprefix(f"{each.client}/")
        table.add_row(Text(each.client), Text(own), str(each.staleness), f"{each.weight:.4g}", f"{each.num_samples:,}")
    return table
