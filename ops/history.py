"""What a run did: the ledger's entries and the evaluations, gathered for the screen and the report."""

import csv
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

EVENTS = ("rollback", "restore")  # in the ledger, of no update


@dataclass(frozen=True, slots=True)
class Row:
    """One evaluation. Times are seconds since the start of the run; bytes count whole messages.

    Attributes:
        trips: updates that arrived, whatever became of them.
        updates: those that were applied.
        metrics: everything `evaluate` returned.
    """

    time_s: float
    version: int
    trips: int
    updates: int
    staleness_mean: float
    bytes_sent: int
    bytes_pulled: int
    accuracy: float
    loss: float
    metrics: Mapping[str, float] = field(default_factory=dict)


@dataclass
class History:
    """Everything the report shows.

    Attributes:
        num_params: length of the model's flat vector.
        rows: one per evaluation.
        outcomes: outcome -> distinct updates.
        staleness: of each applied update, in order.
        by_client: client -> applied updates.
        bytes_sent: of all messages that were settled.
        bytes_pulled: of all models and deltas the workers fetched.
        pulls: how often they fetched one.
    """

    num_params: int
    rows: list[Row] = field(default_factory=list)
    outcomes: Counter[str] = field(default_factory=Counter)
    staleness: list[int] = field(default_factory=list)
    by_client: Counter[str] = field(default_factory=Counter)
    bytes_sent: int = 0
    bytes_pulled: int = 0
    pulls: int = 0

    def add_entries(self, entries: Iterable[Mapping[str, Any]]) -> None:
        """Take in ledger entries, in order."""
        for entry in entries:
            if entry["outcome"] in EVENTS:
                continue
            self.outcomes[entry["outcome"]] += 1
            self.bytes_sent += entry.get("bytes", 0)
            if entry["outcome"] == "applied":
                self.staleness.append(entry["staleness"])
                self.by_client[entry["id"].split("/")[0]] += 1

    def pulled(self, size_bytes: int, pulls: int) -> None:
        """Take in what the workers have fetched so far."""
        self.bytes_pulled, self.pulls = size_bytes, pulls

    def evaluated(self, time_s: float, version: int, metrics: Mapping[str, float]) -> None:
        """Take in one evaluation."""
        recent = self.staleness[-50:]
        mean = sum(recent) / len(recent) if recent else 0.0
        nan = float("nan")
        if self.rows and self.rows[-1].version == version:  # measured again: the later row knows all updates
            self.rows.pop()
        self.rows.append(
            Row(
                time_s, version, self.trips, len(self.staleness), mean, self.bytes_sent, self.bytes_pulled,
                metrics.get("accuracy", nan), metrics.get("loss", nan), dict(metrics),
            )
        )  # fmt: skip

    @property
    def trips(self) -> int:
        """How many updates arrived, each counted once."""
        return sum(count for outcome, count in self.outcomes.items() if outcome != "duplicate")

    @property
    def ratio(self) -> float:
        """How many times smaller the messages were than float32 deltas alone."""
        settled = sum(self.outcomes[outcome] for outcome in ("applied", "stale", "duplicate"))
        return settled * 4 * self.num_params / self.bytes_sent if self.bytes_sent else 0.0

    @property
    def ratio_down(self) -> float:
        """How many times less was pulled than the same number of float32 models."""
        return self.pulls * 4 * self.num_params / self.bytes_pulled if self.bytes_pulled else 0.0

    def last_line(self) -> str:
        """Say what was reached, in one line."""
        last = self.rows[-1]
        return (
            f"accuracy {last.accuracy:.3f} after {last.version} versions, {last.updates} updates, "
            f"{self.bytes_sent} bytes sent ({self.ratio:.1f} x smaller than float32), "
            f"{self.bytes_pulled} bytes pulled ({self.ratio_down:.1f} x smaller)"
        )

    def save_csv(self, path: Path) -> None:
        """Write the rows; what else `evaluate` returned follows in columns of its own."""
        own = [f.name for f in fields(Row) if f.name != "metrics"]
        more = sorted({name for row in self.rows for name in row.metrics} - set(own))
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, own + more, restval="", extrasaction="ignore")
            writer.writeheader()
            writer.writerows(dict(row.metrics) | asdict(row) for row in self.rows)

    def dump(self) -> dict[str, Any]:
        """Return everything in msgpack's types."""
        plain = {f.name: getattr(self, f.name) for f in fields(self)}
        counters = {name: dict(plain[name]) for name in ("outcomes", "by_client")}
        return plain | counters | {"rows": [asdict(row) for row in self.rows]}

    @classmethod
    def restored(cls, dump: Mapping[str, Any]) -> "History":
        """Return what was dumped."""
        counters = {name: Counter(dump[name]) for name in ("outcomes", "by_client")}
        return cls(**{**dump, **counters, "rows": [Row(**row) for row in dump["rows"]]})
