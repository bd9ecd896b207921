"""Metrics for production loops that are run by the thousand: a real registry costs more than a run."""

import contextlib
from collections import Counter
from dataclasses import dataclass
from typing import cast

from shared.metrics import WorkerMetrics


class Meters:
    """Metrics that cost nothing: counts outcomes, forgets the rest.

    Args:
        counted: outcome -> how many updates; changed.
    """

    def __init__(self, counted: Counter[str]) -> None:
        self.updates = _Outcomes(counted)

    def begin(self, job: str) -> None:
        """Nothing is shown at 0, as nothing is shown."""

    def __getattr__(self, name: str) -> "_Meter":
        return _METER


class _Meter:
    """One metric that nobody reads."""

    def labels(self, *_: str) -> "_Meter":
        return self

    def inc(self, by: float = 1.0) -> None: ...

    def set(self, value: float) -> None: ...

    def observe(self, value: float) -> None: ...

    def time(self) -> contextlib.AbstractContextManager[None]:
        return _NO_TIME


class _Outcomes:
    """`fedmq_updates_total`."""

    def __init__(self, counted: Counter[str]) -> None:
        self._counted = counted

    def labels(self, job: str, outcome: str) -> "_Outcome":
        return _Outcome(self._counted, outcome)


@dataclass(frozen=True, slots=True)
class _Outcome:
    counted: Counter[str]
    outcome: str

    def inc(self) -> None:
        self.counted[self.outcome] += 1


_METER, _NO_TIME = _Meter(), contextlib.nullcontext()


UNREAD = cast(WorkerMetrics, Meters(Counter()))  # for those whose numbers nobody compares with anything
