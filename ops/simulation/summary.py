"""The numbers of a comparison: each variant's mean and standard deviation over its seeds, beside the first variant."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from ops.simulation.run import Result

FINAL = 10  # evaluations the final value is averaged over
COSTS = ("time_s", "trips", "bytes_sent", "bytes_pulled")  # columns of a history's row


@dataclass(frozen=True, slots=True)
class RunNumbers:
    """What one run came to.

    Attributes:
        costs: of `COSTS`, until the target was reached; of the whole run where there is no target; empty: not reached.
        final: mean of the metric over the last evaluations.
        staleness: mean over the applied updates, versions.
        refused: share of the trips whose update was too stale, in [0, 1].
        rejected: share whose update could not be used or was taken for an attack.
        lost: share that gave no update: lost in mid-training, too late for their round, or the training raised.
    """

    costs: Mapping[str, float]
    final: float
    staleness: float
    refused: float
    rejected: float
    lost: float


@dataclass(frozen=True, slots=True)
class Spread:
    """Mean and sample standard deviation; the latter is NaN for a single value."""

    mean: float
    sd: float


@dataclass(frozen=True, slots=True)
class Summary:
    """What a variant's runs came to.

    Attributes:
        runs: finished ones.
        reached: those of them that reached the target.
        costs: of `COSTS`; empty unless every run reached the target: a mean over the others would flatter it.
        ratios: the means of `costs` by those of the first variant; empty where either is.
    """

    runs: int
    reached: int
    final: Spread
    staleness: Spread
    refused: Spread
    rejected: Spread
    lost: Spread
    costs: Mapping[str, Spread] = field(default_factory=dict)
    ratios: Mapping[str, float] = field(default_factory=dict)


def numbers_of(result: Result) -> RunNumbers:
    """Return a run's numbers."""
    history, fleet = result.history, result.plan.fleet
    row = history.rows[-1] if not fleet.target else None
    if result.target_row is not None:
        row = history.rows[result.target_row]
    values = [row.metrics.get(fleet.metric, math.nan) for row in history.rows[-FINAL:]]
    missing = result.lost + result.aborted + sum(result.failures.values())
    trips = max(1, result.published + missing)
    return RunNumbers(
        costs={cost: getattr(row, cost) for cost in COSTS} if row is not None else {},
        final=statistics.fmean(values),
        staleness=sum(history.staleness) / max(1, len(history.staleness)),
        refused=history.outcomes["stale"] / trips,
        rejected=history.outcomes["rejected"] / trips,
        lost=missing / trips,
    )


def spread(values: Sequence[float]) -> Spread:
    """Return mean and sample standard deviation; NaN where there are too few values."""
    mean = statistics.fmean(values) if values else math.nan
    deviation = statistics.stdev(values) if len(values) > 1 and math.isfinite(mean) else math.nan
    return Spread(mean, deviation)


def summarise(runs: Mapping[str, Sequence[Result]]) -> dict[str, Summary]:
    """Return each variant's summary.

    Args:
        runs: variant -> its finished runs, the baseline first.
    """
    costs: dict[str, dict[str, Spread]] = {}
    summaries: dict[str, Summary] = {}
    for name, results in runs.items():
        every = [numbers_of(result) for result in results]
        whole = bool(every) and all(numbers.costs for numbers in every)
        costs[name] = {cost: spread([n.costs[cost] for n in every]) for cost in COSTS} if whole else {}
        base = costs[next(iter(runs))]
        summaries[name] = Summary(
            len(every), sum(bool(numbers.costs) for numbers in every),
            spread([n.final for n in every]), spread([n.staleness for n in every]), spread([n.refused for n in every]),
            spread([n.rejected for n in every]), spread([n.lost for n in every]), costs[name],
            {cost: value.mean / base[cost].mean for cost, value in costs[name].items() if base and base[cost].mean},
        )  # fmt: skip
    return summaries
