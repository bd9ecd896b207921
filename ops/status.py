"""`fedmq status`: one screen that says where a job stands and why nothing moves, if nothing does."""

import json
import time
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from shared.compression.presets import DOWNLINK_ON
from shared.config import Settings
from shared.errors import SettingsError, Unavailable
from shared.logs import log_to_stderr
from shared.store.ports import Head
from shared.store.redis import RedisStore
from shared.transport.rabbitmq import queue_depths

ACTIVE_S = 60.0  # a worker seen within this time counts as active
BROKER_S_MAX = 5.0
METRICS_SHOWN = 4  # of an evaluation


def show(settings: Settings) -> None:
    """Print the screen."""
    log_to_stderr("error", settings.log_format)  # a screen, not a log
    store = RedisStore(settings.store_url, settings.job)
    head = store.head()
    console = Console()
    found = depths(settings)
    if head is None:
        console.print(
            f"job {settings.job}: no model yet. Run `fedmq models init TASK --job {settings.job}`, "
            "or, if it had one, `fedmq restore FILE`.",
            soft_wrap=True,
        )
        return
    facts = store.status()
    version, metrics = store.newest_evaluation()
    table = Table.grid(padding=(0, 3))
    for name, value in lines(settings.job, head, facts, found, version, metrics, time.time()):
        table.add_row(f"[dim]{name}[/]", value)
    console.print(table)


def depths(settings: Settings) -> dict[str, int] | str:
    """Return the lengths of the job's queues, or why the broker does not tell."""
    try:
        return queue_depths(settings.broker_url, settings.job, BROKER_S_MAX)
    except (Unavailable, SettingsError) as error:
        return str(error)


def lines(
    job: str, head: Head, facts: dict[str, Any], depths: dict[str, int] | str, evaluated: int,
    metrics: dict[str, float],
    now: float,
) -> list[tuple[str, str]]:  # fmt: skip
    """Return name and text of each line."""
    spec, totals = facts["job"], facts["state"].get("totals", {})
    seen = sorted(facts["clients"].items(), key=lambda item: -item[1]["seen"])
    active = [name for name, client in seen if now - client["seen"] <= ACTIVE_S]
    recent = [u for entry in facts["ledger"] for u in entry_updates(entry) if u["outcome"] == "applied"][:100]
    staleness = f"{sum(u['staleness'] for u in recent) / len(recent):.2f} versions on average" if recent else "-"
    evaluation = f"{metrics_text(metrics)} (version {evaluated})" if metrics else "-"
    queue = depths if isinstance(depths, str) else _queue(depths)
    return [
        ("job", f"[bold]{job}[/]  {head.num_params:,} parameters"),
        ("version", f"[bold]{head.version}[/]  made {ago(now - head.created_at)} ago, revision {head.revision}"),
        ("rule", f"{spec.get('rule', '?')}, staleness {spec.get('staleness', '?')}"),
        ("bytes", f"up {spec.get('codec', '?')}; down {_down(spec)}"),
        ("evaluation", evaluation),
        ("updates", ", ".join(f"{count} {outcome}" for outcome, count in sorted(totals.items())) or "none yet"),
        ("staleness", staleness),
        ("workers", f"{len(active)} seen in the last minute, {len(seen)} ever"),
        ("queue", queue),
        *_parts(facts["state"]),
        ("", why(spec, head, facts["state"], depths, active, seen, now)),
    ]


def why(  # noqa: PLR0911 - one answer per situation
    spec: dict[str, Any], head: Head, state: dict[str, Any], depths: dict[str, int] | str, active: list[str],
    seen: list[tuple[str, Any]], now: float,
) -> str:  # fmt: skip
    """Say in one line what the job waits for, or that it moves."""
    buffered, since = len(state.get("buffer", [])), state.get("since", 0.0)
    age = f", oldest {ago(now - since)}" if buffered and since else ""
    buffer = f"buffer {buffered}/{spec.get('buffer_size', '?')}{age}"
    workers = f"{len(active)} workers seen in the last minute"
    if isinstance(depths, str):
        return f"[red]the broker does not answer: {depths}[/]"
    if depths["consumers"] <= 0:
        return f"[red]no aggregator is connected; {max(0, depths['updates'])} updates wait[/]: start `fedmq aggregator`"
    if now - head.created_at < 10 and active:
        return f"[green]moving[/]: {buffer}, {workers}"
    if not seen:
        return f"[yellow]no update has ever arrived[/]: start `fedmq worker --task TASK --job ...`; {buffer}"
    newest = seen[0][1]
    if newest["outcome"] in ("stale", "rejected"):
        detail = plain(newest.get("detail", f"staleness {newest.get('staleness')}"))
        name = plain(seen[0][0])
        return f"[yellow]the last update of {name} was {newest['outcome']}: {detail}[/]; {buffer}, {workers}"
    if not active:
        return f"[yellow]no worker in the last minute[/], the last one {ago(now - newest['seen'])} ago; {buffer}"
    return f"[yellow]waiting for updates[/]: {buffer}, the last came {ago(now - newest['seen'])} ago; {workers}"


def metrics_text(metrics: Mapping[str, float]) -> str:
    """Return an evaluation on one line: the first few numbers, none of single classes, and how many more."""
    names = [name for name in metrics if "_class_" not in name] or list(metrics)
    shown = ", ".join(f"{plain(name)} {metrics[name]:.4g}" for name in names[:METRICS_SHOWN])
    more = len(metrics) - min(len(names), METRICS_SHOWN)
    return f"{shown}, +{more} more" if more else shown


def plain(text: str) -> str:
    """Return what a worker wrote, without anything that rich or a terminal would obey."""
    return escape("".join(char if char.isprintable() else "\ufffd" for char in text))


def entry_updates(entry: dict[str, str]) -> list[dict[str, Any]]:
    """Return the updates of a ledger entry as stored."""
    updates: list[dict[str, Any]] = json.loads(entry["updates"])
    return updates


def _down(spec: dict[str, Any]) -> str:
    """Say what workers pull."""
    snapshots, downlink = f"{spec.get('snapshots', 'float32')} models", spec.get("downlink", "off")
    if downlink == "off":
        return snapshots
    return f"{DOWNLINK_ON if downlink == 'on' else downlink} deltas, or {snapshots}"


def _parts(state: dict[str, Any]) -> list[tuple[str, str]]:
    """Say which updates are under way in parts, if any are."""
    partial = state.get("partial", {})
    if not partial:
        return []
    some = ", ".join(f"{plain(client)} {len(record[4])}/{record[2]}" for client, record in list(partial.items())[:5])
    return [("in parts", f"{len(partial)} updates under way: {some}{', ...' if len(partial) > 5 else ''}")]


def _queue(depths: dict[str, int]) -> str:
    if depths["updates"] < 0:
        return "none: no aggregator runs this job"
    return f"{depths['updates']} waiting, {max(0, depths['dead'])} dead letters"


def ago(seconds: float) -> str:
    """Return a time in its largest unit."""
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{max(0.0, seconds):.0f} s"
