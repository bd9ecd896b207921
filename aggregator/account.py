"""What became of every delivery since the last commit: it goes into the ledger, the totals and the metrics.

Outcomes are counted when the commit that holds them is durable, so that a fold repeated after a conflict or a
crash is not counted twice.
"""

import json
from dataclasses import dataclass, field
from typing import Any

from shared.errors import Reason, RejectedUpdate
from shared.messages import UPDATE_ID, Update
from shared.metrics import AggregatorMetrics

CLOCK_S_MAX = 60.0  # a device's clock may be so far ahead of ours
LATENCY_S_MAX = 90 * 86_400.0  # longer than any outbox waits

APPLIED, DUPLICATE, STALE, REJECTED = "applied", "duplicate", "stale", "rejected"


@dataclass(slots=True)
class Account:
    """The entries since the last commit; memory is bounded by the prefetch window."""

    entries: list[dict[str, Any]] = field(default_factory=list)
    clients: dict[str, str] = field(default_factory=dict)
    outcomes: dict[str, list[tuple[str, str]]] = field(default_factory=dict)
    created_at: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)  # L2, of those applied updates whose norm was measured

    def settle(
        self, update: Update, size: int, outcome: str, staleness: int, weight: float, version: int, now: float
    ) -> None:
        """Note an update that was applied, refused as stale, or seen before.

        Args:
            update: the message.
            size: of the message, in bytes.
            outcome: `applied`, `stale` or `duplicate`.
            staleness: tau, in versions.
            weight: factor of its delta; 0 unless applied.
            version: model version it met.
            now: unix seconds.
        """
        entry = {
            "id": update.update_id, "outcome": outcome, "base_version": update.base_version, "staleness": staleness,
            "weight": weight, "version": version, "num_samples": update.num_samples, "bytes": size,
        }  # fmt: skip
        self.entries.append(entry)
        self.outcomes.setdefault(update.client, []).append((update.update_id, outcome))
        if outcome == DUPLICATE:
            return
        self.clients[update.client] = json.dumps(
            {"seen": now, "train_seconds": update.train_seconds, "metrics": dict(update.metrics)} | entry
        )
        if outcome == APPLIED:
            self.created_at.append(update.created_at)

    def reject(self, client: str, update_id: str, error: RejectedUpdate, version: int, now: float, known: bool) -> bool:
        """Note an update that is rejected; tell whether that is an outcome of its own.

        It is not where the update had its outcome before, nor where somebody else may have sent it in the name of
        its client, who is then not told of it either.

        Args:
            client: last word of the routing key.
            update_id: as the message's properties have it.
            error: why.
            version: model version it met.
            now: unix seconds.
            known: that update had its outcome before.
        """
        match = UPDATE_ID.fullmatch(update_id)
        own = match is not None and match[1] == client and error.reason is not Reason.CLIENT
        outcome = DUPLICATE if own and known else REJECTED
        entry = {
            "id": update_id[:256], "outcome": outcome, "reason": str(error.reason), "detail": error.detail[:200],
            "client": client, "version": version,
        }  # fmt: skip
        self.entries.append(entry)
        if len(client) <= 64:
            self.clients[client] = json.dumps({"seen": now} | entry)
        if own:
            self.outcomes.setdefault(client, []).append((update_id, outcome))
        return own and not known

    def add_to(self, totals: dict[str, int]) -> dict[str, int]:
        """Return the totals after these entries."""
        after = dict(totals)
        for entry in self.entries:
            after[entry["outcome"]] = after.get(entry["outcome"], 0) + 1
        return after

    def observe(self, metrics: AggregatorMetrics, job: str, now: float) -> None:
        """Count everything, once it is durable."""
        for entry in self.entries:
            metrics.updates.labels(job, entry["outcome"]).inc()
            if entry["outcome"] == REJECTED:
                metrics.rejected.labels(job, entry["reason"]).inc()
            elif entry["outcome"] == APPLIED:
                metrics.staleness.observe(entry["staleness"])
        for created_at in self.created_at:
            latency_s = now - created_at
            if -CLOCK_S_MAX <= latency_s <= LATENCY_S_MAX:  # else it says how wrong the device's clock is
                metrics.latency.observe(max(0.0, latency_s))
        for norm in self.norms:
            metrics.norm.observe(norm)

    def meta(self) -> dict[str, str]:
        """Return facts about the versions these entries made."""
        applied = [entry["staleness"] for entry in self.entries if entry["outcome"] == APPLIED]
        if not applied:
            return {"updates": "0"}
        return {
            "updates": str(len(applied)),
            "staleness_mean": f"{sum(applied) / len(applied):.4g}",
            "staleness_max": str(max(applied)),
        }
