"""`fedmq status --watch`: the same facts on one screen, anew every few seconds, with what moved since the last look."""

import math
import threading
import time
from collections import Counter, deque
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table

from ops import status
from shared.command import stop_on_signals
from shared.config import Settings
from shared.errors import SettingsError, Unavailable
from shared.logs import log_to_stderr
from shared.store.redis import RedisStore
from shared.store.redis_watch import RedisWatch, is_enrolled

BARS = "▁▂▃▄▅▆▇█"
CURVE = 40  # evaluations in the curve
SILENT_S = 86_400.0
REASONS_MAX = 3
RATE_S = 30.0  # rates are over about so long
QUEUES_S = 5.0


@dataclass
class Trail:
    """What the looks before this one found.

    Attributes:
        looks: monotonic seconds, version and totals of each.
        queues: the last answer of the broker, and when it came.
    """

    looks: deque[tuple[float, int, dict[str, int]]] = field(default_factory=deque)
    queues: tuple[float, dict[str, int] | str] | None = None  # monotonic seconds, and what the broker said

    def depths(self, settings: Settings) -> dict[str, int] | str:
        """Return the lengths of the queues, at most `QUEUES_S` old: each look at them is a new connection."""
        now_s = time.monotonic()
        if self.queues is None or now_s - self.queues[0] >= QUEUES_S:
            self.queues = now_s, status.depths(settings)
        return self.queues[1]

    def rates(self, now_s: float, version: int, totals: dict[str, int]) -> tuple[float, dict[str, float]] | None:
        """Note a look; return versions a minute and outcome -> updates a second since the oldest one kept.

        None while there is nothing to compare with, and when the job went back: a rollback or a restore.
        """
        if self.looks and version < self.looks[-1][1]:
            self.looks.clear()
        self.looks.append((now_s, version, totals))
        while len(self.looks) > 2 and now_s - self.looks[1][0] >= RATE_S:
            self.looks.popleft()
        then_s, before, old = self.looks[0]
        passed_s = now_s - then_s
        if passed_s <= 0:
            return None
        rates = {name: (count - old.get(name, 0)) / passed_s for name, count in totals.items()}
        return 60 * (version - before) / passed_s, {name: rate for name, rate in rates.items() if rate > 0}


def sparkline(values: list[float], width: int = CURVE) -> str:
    """Return a curve of one line; the newest value is at its right end."""
    shown = [value for value in values[-width:] if math.isfinite(value)]
    if not shown:
        return ""
    low, high = min(shown), max(shown)
    scale = (len(BARS) - 1) / (high - low) if high > low else 0.0
    return "".join(BARS[round((value - low) * scale)] for value in shown)


def watch(settings: Settings, every_s: float) -> None:
    """Show the screen until Ctrl-C; a server that does not answer is shown, and asked again."""
    log_to_stderr("error", settings.log_format)
    stop = threading.Event()
    stop_on_signals(stop)
    console = Console()
    store = RedisStore(settings.store_url, settings.job)
    fleet = RedisWatch(settings.store_url)
    trail = Trail()
    try:
        with Live(console=console, auto_refresh=False, screen=console.is_terminal) as live:
            while not stop.is_set():
                live.update(screen(settings, store, fleet, trail), refresh=True)
                stop.wait(every_s)
        if console.is_terminal:  # what it was last stays there; elsewhere `Live` has printed it
            console.print(screen(settings, store, fleet, trail))
    finally:
        fleet.close()
        store.close()


def screen(settings: Settings, store: RedisStore, fleet: RedisWatch, trail: Trail) -> Table:
    """Return the screen as it is now."""
    now = time.time()
    table = Table.grid(padding=(0, 2), expand=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    table.add_row("[dim]at[/]", f"{time.strftime('%H:%M:%S')}   [dim]Ctrl-C leaves[/]")
    try:
        depths = trail.depths(settings)
        head = store.head()
        if head is None:
            table.add_row("[dim]job[/]", f"{settings.job}: no model yet. Run `fedmq models init TASK`.")
            return table
        facts = store.status()
        evaluations = fleet.evaluations(settings.job, CURVE)
        version, metrics = evaluations[-1] if evaluations else (-1, {})
        rows = dict(status.lines(settings.job, head, facts, depths, version, metrics, now))
        moved = trail.rates(time.monotonic(), head.version, dict(facts["state"].get("totals", {})))
        rows = _moving(rows, moved, facts, now) | _curve(evaluations)
        rows["devices"] = _devices(fleet, settings.job, facts["clients"], now)
        last = rows.pop("", "")
        for name, value in {**rows, "": last}.items():
            table.add_row(f"[dim]{name}[/]", value)
    except (Unavailable, SettingsError) as error:
        table.add_row("[dim]job[/]", settings.job)
        table.add_row("", f"[red]{status.plain(str(error))}[/]")
    return table


def _moving(
    rows: dict[str, str], moved: tuple[float, dict[str, float]] | None, facts: dict[str, Any], now: float
) -> dict[str, str]:
    """Add rates, rejections and the last commit to what `fedmq status` shows."""
    versions, updates = moved or (0.0, {})
    rates = ", ".join(f"{rate:.3g} {outcome}/s" for outcome, rate in sorted(updates.items()))
    rows["speed"] = f"{rates}, {versions:.3g} versions/min" if rates else "nothing since the last look"
    reasons: Counter[str] = Counter(
        update.get("reason", "?") for entry in facts["ledger"] for update in status.entry_updates(entry)
        if update["outcome"] == "rejected"
    )  # fmt: skip
    top = ", ".join(f"{count} {status.plain(reason)}" for reason, count in reasons.most_common(REASONS_MAX))
    rows["rejected"] = f"{top} in the newest commits" if top else "none in the newest commits"
    heard = max((client["seen"] for client in facts["clients"].values()), default=None)
    rows["last heard"] = f"{status.ago(now - heard)} ago" if heard else "never"
    return rows


def _curve(evaluations: list[tuple[int, dict[str, float]]]) -> dict[str, str]:
    """Return a row with the curve of the first metric."""
    if len(evaluations) < 2:
        return {}
    name = next(iter(evaluations[-1][1]), None)
    values = [metrics[name] for _, metrics in evaluations if name in metrics] if name else []
    if not values:
        return {}
    return {"curve": f"[green]{sparkline(values)}[/]  {status.plain(str(name))} {min(values):.3g} to {max(values):.3g}"}


def _devices(fleet: RedisWatch, job: str, clients: dict[str, Any], now: float) -> str:
    """Say how many devices are enrolled, and which of them are silent."""
    silent, enrolled, never_heard = [], 0, 0
    for login, record in fleet.devices():
        of, _, client = login.partition(".")
        if of != job or not is_enrolled(record):
            continue
        enrolled += 1
        seen = clients.get(client, {}).get("seen")
        never_heard += seen is None
        if seen is not None and now - seen > SILENT_S:
            silent.append(client)
    if not enrolled:
        return "none enrolled"
    named = status.plain(", ".join(sorted(silent)[:3])) + (", ..." if len(silent) > 3 else "")
    never = f", {never_heard} never heard of" if never_heard else ""
    return f"{enrolled} enrolled{never}, " + (
        f"[yellow]{len(silent)} silent for a day: {named}[/]" if silent else "none silent"
    )
