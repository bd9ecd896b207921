"""What a demo shows while it runs and when it is over."""

import time
from types import TracebackType

from rich.console import Console
from rich.live import Live
from rich.table import Table

from ops.history import History
from ops.plan import Plan

RATE_S = 2.0  # updates/s is taken over about so long
PLAIN_LINE_S = 2.0  # between two progress lines where there is no terminal


def table_of(history: History, title: str) -> Table:
    """Return about ten rows of the run."""
    table = Table(title=title, title_justify="left")
    for column in ("version", "updates", "staleness", "MB sent", "MB pulled", "accuracy", "loss"):
        table.add_column(column, justify="right")
    step = max(1, -(-len(history.rows) // 10))
    shown = history.rows[::step]
    for row in shown if shown[-1:] == history.rows[-1:] else [*shown, history.rows[-1]]:
        table.add_row(
            str(row.version), str(row.updates), f"{row.staleness_mean:.2f}", f"{row.bytes_sent / 1e6:.2f}",
            f"{row.bytes_pulled / 1e6:.2f}", f"{row.accuracy:.3f}", f"{row.loss:.3f}",
        )  # fmt: skip
    return table


class Screen:
    """Live progress: a panel on a terminal, a line now and then elsewhere."""

    def __init__(self, job: Plan, where: str) -> None:
        self._job, self._console = job, Console()
        self._console.print(
            f"{job.task}: {job.workers} workers, FedBuff of {job.buffer_size}, codec {job.codec}, "
            f"downlink {job.downlink}; {where}"
        )
        self._live = Live(console=self._console, refresh_per_second=8, transient=True)
        self._printed = time.monotonic()
        self._rate_from = (self._printed, 0)

    def __enter__(self) -> "Screen":
        """Start the panel."""
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Remove the panel."""
        if self._console.is_terminal:
            self._live.stop()

    def show(self, history: History) -> None:
        """Show the newest evaluation."""
        row, now = history.rows[-1], time.monotonic()
        since, updates = self._rate_from
        rate = (row.updates - updates) / max(1e-9, now - since)
        if now - since >= RATE_S:
            self._rate_from = (now, row.updates)
        if self._console.is_terminal:
            done = min(1.0, row.updates / self._job.updates)
            panel = Table.grid(padding=(0, 2))
            panel.add_row("version", "updates", "updates/s", "staleness", "accuracy", "")
            bar = "█" * int(30 * done) + "░" * (30 - int(30 * done))
            panel.add_row(
                f"[bold]{row.version}[/]", f"[bold]{row.updates}[/]", f"[bold]{rate:.0f}[/]",
                f"[bold]{row.staleness_mean:.2f}[/]", f"[bold green]{row.accuracy:.3f}[/]", f"[blue]{bar}[/]",
            )  # fmt: skip
            self._live.update(panel)
        elif now - self._printed >= PLAIN_LINE_S:
            self._printed = now
            self._console.print(
                f"version {row.version}, {row.updates} updates, {rate:.0f} updates/s, "
                f"staleness {row.staleness_mean:.2f}, accuracy {row.accuracy:.3f}"
            )
