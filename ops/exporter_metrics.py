"""What `fedmq exporter` shows: the installation as it was found last. No client id is a label."""

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from shared.store.redis_watch import JobFacts

SEEN = {"1m": 60.0, "10m": 600.0, "1h": 3600.0, "1d": 86_400.0, "ever": float("inf")}
BEHIND = {"0": 0, "1": 1, "2-3": 3, "4-10": 10, "11-30": 30, "31-100": 100, "over 100": float("inf")}
ACTIVE_S = 3600.0  # whose versions are looked at
AUDIT_KINDS = ("enrolled", "revoked", "rotated", "login_failed", "refused")  # there from the start: a rate needs a zero
OUTCOMES = ("applied", "duplicate", "stale", "rejected")
EVALUATIONS_MAX = 20  # metrics of a job; a thousand classes are for `fedmq models show`
STALE_REFRESHES = 6  # without a new look the old one says nothing any more


@dataclass(frozen=True, slots=True)
class Fleet:
    """The clients of a job, counted.

    Attributes:
        seen: window -> clients heard of within it.
        behind: range of versions -> clients of the last hour whose last update started so far behind the head.
        enrolled: devices with a login, not revoked.
        silent: those of them that were heard of, and not for too long.
        never_heard: those of them that never were.
        certificate_ends_at: unix seconds when the first certificate of one of them ends; None when none has any.
    """

    seen: dict[str, int] = field(default_factory=dict)
    behind: dict[str, int] = field(default_factory=dict)
    enrolled: int = 0
    silent: int = 0
    never_heard: int = 0
    certificate_ends_at: float | None = None


@dataclass(frozen=True, slots=True)
class Found:
    """The whole installation at one moment.

    Attributes:
        at_s: monotonic seconds when it was looked at.
        store_up: whether the store answered.
        durable: whether it keeps what it acknowledges; None when it does not answer.
        jobs: job -> where it stands.
        fleets: job -> its clients.
    """

    at_s: float
    store_up: bool = False
    durable: bool | None = None
    jobs: dict[str, JobFacts] = field(default_factory=dict)
    fleets: dict[str, Fleet] = field(default_factory=dict)


def count_fleet(
    clients: Iterable[tuple[str, Mapping[str, Any]]], devices: Mapping[str, float | None], version: int, now: float,
    silent_s: float,
) -> Fleet:  # fmt: skip
    """Count the clients of a job in one pass; nothing of each is kept but when an enrolled one was heard of.

    Args:
        clients: client -> what the store knows of it.
        devices: enrolled and not revoked -> unix seconds when its certificate ends, None when it has none.
        version: the job's newest.
        now: unix seconds.
        silent_s: a device unheard for so long is silent.
    """
    ages: list[float] = []
    behind: Counter[str] = Counter()
    heard: dict[str, float] = {}
    for client, record in clients:
        seen = float(record.get("seen", 0.0))
        ages.append(now - seen)
        if client in devices:
            heard[client] = seen
        if now - seen <= ACTIVE_S and "base_version" in record:
            distance = max(0, version - int(record["base_version"]))
            behind[next(name for name, most in BEHIND.items() if distance <= most)] += 1
    return Fleet(
        seen={name: sum(age <= within for age in ages) for name, within in SEEN.items()},
        behind={name: behind[name] for name in BEHIND},
        enrolled=len(devices),
        silent=sum(now - last > silent_s for last in heard.values()),
        never_heard=len(devices) - len(heard),
        certificate_ends_at=min((end for end in devices.values() if end is not None), default=None),
    )


class Installation(Collector):
    """Shows what was found last; a scrape reads nothing, so that a store that hangs cannot make it late.

    Args:
        refresh_s: how often `found` is set anew.
        broker_up: whether the broker answers.
    """

    def __init__(self, refresh_s: float, broker_up: Callable[[], bool]) -> None:
        self._refresh_s, self._broker_up = refresh_s, broker_up
        self.found = Found(time.monotonic())
        self.certificates: dict[str, float] = {}
        self._audit: Counter[str] = Counter(dict.fromkeys(AUDIT_KINDS, 0))
        self._lock = threading.Lock()

    def count_events(self, counts: Mapping[str, int]) -> None:
        """Count events of the audit log, kind -> how many."""
        with self._lock:
            self._audit.update(counts)

    def collect(self) -> Iterator[Metric]:
        """Yield every metric, those without samples too."""
        found = self.found
        if time.monotonic() - found.at_s > STALE_REFRESHES * self._refresh_s + 10:
            found = Found(found.at_s)
        yield _gauge("fedmq_store_up", "1: Redis answers", [((), float(found.store_up))])
        durable = [] if found.durable is None else [((), float(found.durable))]
        yield _gauge("fedmq_store_durable", "1: Redis keeps what it acknowledges; 0: it may forget", durable)
        yield _gauge("fedmq_broker_up", "1: RabbitMQ answers", [((), float(self._broker_up()))])
        ends = [((server,), end) for server, end in self.certificates.items()]
        yield _gauge("fedmq_certificate_expiry_timestamp_seconds", "When a server's certificate ends", ends, ["server"])
        with self._lock:
            events = [((kind,), float(count)) for kind, count in self._audit.items()]
        yield _counter("fedmq_audit_events", "Events of the audit log seen by this exporter", events, ["kind"])
        yield from _of_jobs(found.jobs, time.time())
        yield from _of_fleets(found.fleets)


def _of_jobs(jobs: Mapping[str, JobFacts], now: float) -> Iterator[Metric]:
    heads = {job: facts.head for job, facts in jobs.items()}
    yield _gauge("fedmq_job_version", "Newest model version", _each(heads, lambda h: float(h["version"])), ["job"])
    yield _gauge("fedmq_job_revision", "Number of commits", _each(heads, lambda h: float(h["revision"])), ["job"])
    ages = _each(heads, lambda h: max(0.0, now - float(h["created_at"])))
    yield _gauge("fedmq_job_head_age_seconds", "Since the newest version was committed", ages, ["job"])
    buffers = _each(jobs, lambda facts: float(facts.buffered))
    yield _gauge("fedmq_job_buffer_updates", "Updates in the open buffer", buffers, ["job"])
    totals = [((job, name), float(f.totals.get(name, 0))) for job, f in jobs.items() for name in OUTCOMES]
    yield _counter("fedmq_job_updates", "Updates by outcome over the job's whole life", totals, ["job", "outcome"])
    numbers = [((j, name), f.evaluation[name]) for j, f in jobs.items() for name in shortened(f.evaluation)]
    yield _gauge("fedmq_job_evaluation", "Newest evaluation", numbers, ["job", "metric"])
    evaluated = _each({job: f for job, f in jobs.items() if f.evaluated >= 0}, lambda f: float(f.evaluated))
    yield _gauge("fedmq_job_evaluated_version", "Version last evaluated", evaluated, ["job"])
    contributors = _each(jobs, lambda f: float(len(f.contributions)))
    yield _gauge("fedmq_fleet_contributors", "Clients applied in the newest ledger entries", contributors, ["job"])
    busy = {job: f.contributions for job, f in jobs.items() if f.contributions}
    top = _each(busy, lambda counts: max(counts.values()) / sum(counts.values()))
    yield _gauge("fedmq_fleet_top_share", "Share of those updates that came from one client", top, ["job"])


def _of_fleets(fleets: Mapping[str, Fleet]) -> Iterator[Metric]:
    seen = [((job, name), float(n)) for job, fleet in fleets.items() for name, n in fleet.seen.items()]
    yield _gauge("fedmq_fleet_clients", "Clients heard of within a time", seen, ["job", "seen"])
    behind = [((job, name), float(n)) for job, fleet in fleets.items() for name, n in fleet.behind.items()]
    yield _gauge(
        "fedmq_fleet_clients_behind", "Clients of the last hour by how many versions behind the head they trained",
        behind, ["job", "behind"],
    )  # fmt: skip
    enrolled = _each(fleets, lambda fleet: float(fleet.enrolled))
    yield _gauge("fedmq_devices_enrolled", "Devices with a login, not revoked", enrolled, ["job"])
    silent = _each(fleets, lambda fleet: float(fleet.silent))
    yield _gauge("fedmq_devices_silent", "Enrolled devices once heard of, and not for FEDMQ_SILENT_S", silent, ["job"])
    never_heard = _each(fleets, lambda fleet: float(fleet.never_heard))
    yield _gauge("fedmq_devices_never_heard", "Enrolled devices that were never heard of", never_heard, ["job"])
    ends = [((job,), f.certificate_ends_at) for job, f in fleets.items() if f.certificate_ends_at is not None]
    yield _gauge(
        "fedmq_devices_certificate_expiry_timestamp_seconds",
        "When the first certificate of a device ends",
        ends,
        ["job"],
    )


def shortened(metrics: Mapping[str, float]) -> list[str]:
    """Return the names of a job's first metrics, those of single classes last."""
    return sorted(metrics, key=lambda name: "_class_" in name)[:EVALUATIONS_MAX]


Samples = Sequence[tuple[tuple[str, ...], float]]


def _each(by_job: Mapping[str, Any], value: Callable[[Any], float]) -> Samples:
    return [((job,), value(of_job)) for job, of_job in by_job.items()]


def _gauge(name: str, text: str, samples: Samples, labels: Sequence[str] = ()) -> Metric:
    family = GaugeMetricFamily(name, text, labels=labels)
    for values, value in samples:
        family.add_metric(values, value)
    return family


def _counter(name: str, text: str, samples: Samples, labels: Sequence[str] = ()) -> Metric:
    family = CounterMetricFamily(name, text, labels=labels)
    for values, value in samples:
        family.add_metric(values, value)
    return family
