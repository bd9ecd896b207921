"""The account of a long run, as Jepsen draws one up, and what to do with a failure."""

import subprocess
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path

from rich.console import Console
from rich.table import Table

from ops.torture.faults import NAMES
from ops.torture.schedule import Schedule
from ops.torture.simulator import Outcome

WORDS = {
    "made": "finished by a worker",
    "attempted": "handed to the broker",
    "confirmed": "the broker said that it has them",
    "applied": "changed the model, once",
    "refused": "too stale",
    "rejected": "dead letters, with a reason",
    "lost": "confirmed, and without an outcome",
    "duplicated": "changed the model more than once",
    "unexpected": "changed the model, and nobody made them",
    "recovered": "a publish of theirs was not confirmed, and they have their one outcome",
    "gone": "lost with a worker's disk before they were confirmed",
}


@dataclass(slots=True)
class Totals:
    """What all runs came to.

    Attributes:
        seeds: how many were run.
        events: of all schedules.
        updates: word of the account -> how many.
        struck: fault -> how often it struck.
        failed: (seed, what was found).
    """

    seeds: int = 0
    events: int = 0
    updates: Counter[str] = field(default_factory=Counter)
    struck: Counter[str] = field(default_factory=Counter)
    failed: list[tuple[int, str]] = field(default_factory=list)

    def count(self, seed: int, outcome: Outcome) -> None:
        """Add a run."""
        self.seeds += 1
        self.events += outcome.events
        self.updates += Counter(asdict(outcome.account))
        self.struck += outcome.struck
        if outcome.violation is not None:
            self.failed.append((seed, str(outcome.violation)))

    def add(self, other: "Totals") -> None:
        """Add others' runs."""
        self.seeds += other.seeds
        self.events += other.events
        self.updates += other.updates
        self.struck += other.struck
        self.failed += other.failed


def show(console: Console, totals: Totals, seconds: float) -> None:
    """Print the account."""
    faults = Table("fault", "struck", title="Faults", title_justify="left")
    for name in NAMES:
        faults.add_row(name, f"{totals.struck[name]:,}")
    updates = Table("updates", "number", "meaning", title="Updates", title_justify="left")
    for word, meaning in WORDS.items():
        updates.add_row(word, f"{totals.updates[word]:,}", meaning)
    console.print(faults, updates, sep="\n")
    rate = totals.seeds / max(seconds, 1e-9)
    verdict = f"{len(totals.failed)} failed" if totals.failed else "every promise kept"
    console.print(
        f"{totals.seeds:,} seeds, {totals.events:,} events, {sum(totals.struck.values()):,} faults in {seconds:.1f} s "
        f"({rate:.0f} seeds/s): {verdict}",
        highlight=False,
    )


def regression(schedule: Schedule, found: str) -> str:
    """Return the JSON file that makes a regression test of a schedule."""
    return schedule.json(found=found, commit=commit())


def commit() -> str:
    """Return the git commit of this code; "unknown" outside of a repository."""
    try:
        answer = subprocess.run(
            ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return answer.stdout.strip()
