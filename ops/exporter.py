"""`fedmq exporter`: what a whole installation looks like from its store and broker, for Prometheus.

One a installation. Its login can only read; nothing it does slows a job down: a few small reads every few seconds, and
all clients of a job, page by page, at each third of them or more rarely.
"""

import contextlib
import logging
import threading
import time
from collections.abc import Callable

from prometheus_client import CollectorRegistry

from ops.audit import Collector
from ops.exporter_metrics import Fleet, Found, Installation, count_fleet
from ops.handshake import certificate_end
from shared import tls
from shared.command import stop_on_signals
from shared.config import ExporterSettings
from shared.errors import FedMQError, SettingsError
from shared.logs import log_to_stderr
from shared.metrics import serve
from shared.store.redis_acl import RedisDenials
from shared.store.redis_registry import AuditLog
from shared.store.redis_watch import JobFacts, RedisWatch, is_enrolled
from shared.transport.audit import AuditQueue
from shared.transport.link import Link

log = logging.getLogger("fedmq.exporter")

HELP = "Show a whole installation to Prometheus: every job, its fleet, durability, certificates, the audit log."
JOBS_EVERY_S = 30.0  # a new job is found within
CLIENTS_EVERY = 3  # refreshes, and more rarely ...
COUNT_SHARE_MAX = 0.05  # ... where counting takes more of the time: 100,000 clients take 2 s
AUDIT_EVERY_S = 2.0
NO_LOG, NO_LOG_S = "no exchange", 60.0  # what RabbitMQ says, and how long until it is asked again, seconds
CERTIFICATES_EVERY, CERTIFICATES_EVERY_S = 12, 60.0  # refreshes, and at least so often


class Observer:
    """Looks at the store again and again.

    Args:
        settings: checked settings.
        watch: the store.
        shown: where what was found is shown.
    """

    def __init__(self, settings: ExporterSettings, watch: RedisWatch, shown: Installation) -> None:
        self._settings, self._watch, self._shown = settings, watch, shown
        self._jobs: list[str] = []
        self._jobs_at_s = -JOBS_EVERY_S
        self._fleets: dict[str, Fleet] = {}
        self._count_at_s = 0.0  # monotonic; the clients are counted then
        self.problem: str | None = "starting"

    def look(self) -> None:
        """Find out how everything is; a store that does not answer is a finding."""
        try:
            found = self._found()
            self.problem = None
        except FedMQError as error:
            if self.problem != str(error):
                log.warning("%s", error)
            found, self.problem = Found(time.monotonic()), str(error)
            self._count_at_s = 0.0
        self._shown.found = found

    def _found(self) -> Found:
        if not self._jobs or time.monotonic() - self._jobs_at_s >= JOBS_EVERY_S:
            self._jobs, self._jobs_at_s = self._watch.jobs(), time.monotonic()
        jobs = {job: facts for job in self._jobs if (facts := self._watch.facts(job)) is not None}
        started_s = time.monotonic()
        if started_s >= self._count_at_s or jobs.keys() != self._fleets.keys():
            self._fleets = self._count(jobs)
            took_s = time.monotonic() - started_s
            self._count_at_s = started_s + max(CLIENTS_EVERY * self._settings.refresh_s, took_s / COUNT_SHARE_MAX)
        self._shown.count_events(self._watch.audit_counts())
        return Found(time.monotonic(), True, self._watch.durable(), jobs, self._fleets)

    def _count(self, jobs: dict[str, JobFacts]) -> dict[str, Fleet]:
        enrolled: dict[str, dict[str, float | None]] = {job: {} for job in jobs}
        for login, record in self._watch.devices():
            job, _, client = login.partition(".")
            if job in enrolled and is_enrolled(record):
                enrolled[job][client] = record.get("certificate_ends_at")
        now, silent_s = time.time(), self._settings.silent_s
        return {
            job: count_fleet(self._watch.clients(job), enrolled[job], int(facts.head["version"]), now, silent_s)
            for job, facts in jobs.items()
        }


class Certificates:
    """Looks when the certificates of broker, store and our own port end.

    What our port shows was made together with those of aggregators, evaluators and workers, and stands for them.
    """

    def __init__(self, settings: ExporterSettings, shown: Installation) -> None:
        self._urls, self._shown = {"rabbitmq": settings.broker_url, "redis": settings.store_url}, shown
        if settings.metrics_cert:
            with contextlib.suppress(ValueError):  # said by whoever connects
                ca = {
                    name: file for name, file in tls.without_files(settings.store_url)[1].items() if name == "ca_file"
                }
                self._urls["exporter"] = tls.with_files(f"https://localhost:{settings.metrics_port}", ca)
        self._problems: dict[str, str] = {}

    def look(self) -> None:
        """Note their ends; that of a server that does not answer stays as it was, which is said once."""
        for server, url in self._urls.items():
            problem = ""
            try:
                end = certificate_end(url, time.time())
                if end is not None:
                    self._shown.certificates[server] = end
            except (OSError, ValueError) as error:
                problem = str(error)
            if problem and problem != self._problems.get(server):
                log.warning("the certificate of %s cannot be seen: %s", server, problem)
            self._problems[server] = problem


class Auditor:
    """Has failed logins and refusals moved into the audit log; what hinders it is said once."""

    def __init__(self, settings: ExporterSettings) -> None:
        self._settings = settings
        self._queue: AuditQueue | None = None
        self._collector: Collector | None = None
        self._again_at_s, self._problem = 0.0, ""

    def step(self) -> None:
        """Move what is there."""
        if time.monotonic() < self._again_at_s:
            return
        if self._collector is None:
            url, self._queue = self._settings.store_url, AuditQueue(self._settings.broker_url)
            self._collector = Collector(self._queue, RedisDenials(url), AuditLog(url))
        try:
            self._collector.step()
            problem = ""
        except FedMQError as error:
            problem = str(error)
        if self._queue is not None and not self._queue.link.ready.is_set() and NO_LOG in str(self._queue.link.problem):
            problem = "RabbitMQ does not publish its log: log.exchange = true in rabbitmq.conf, in the vhost of ours"
            self.close()  # it would try for ever, several times a second
            self._again_at_s = time.monotonic() + NO_LOG_S
        if problem and problem != self._problem:
            log.warning("the audit log gets nothing new: %s", problem)
        self._problem = problem

    def close(self) -> None:
        """Close its connections."""
        if self._collector is not None:
            self._collector.close()
        self._collector = self._queue = None


def every(seconds: float, stop: threading.Event, task: Callable[[], None], name: str) -> threading.Thread:
    """Call a task in a thread of its own until stopped; what goes wrong in it is logged, and it is called again."""

    def loop() -> None:
        while not stop.is_set():
            try:
                task()
            except Exception:
                log.exception("%s failed; going on", name)
            stop.wait(seconds)

    thread = threading.Thread(target=loop, name=name, daemon=True)
    thread.start()
    return thread


def run(settings: ExporterSettings) -> None:
    """Run until SIGTERM.

    Raises:
        SettingsError: there is no port to serve on, or a URL is none.
    """
    if settings.metrics_port == 0:
        raise SettingsError("FEDMQ_METRICS_PORT=0: an exporter without a port shows nobody anything; 9464 is usual")
    log_to_stderr(settings.log_level, settings.log_format)
    stop = threading.Event()
    stop_on_signals(stop)
    link = Link(settings.broker_url, "fedmq exporter", lambda _channel: [], lambda _problem: None)
    shown = Installation(settings.refresh_s, link.ready.is_set)
    watch, auditor = RedisWatch(settings.store_url), Auditor(settings)
    observer = Observer(settings, watch, shown)
    registry = CollectorRegistry()
    registry.register(shown)
    stop_serving = serve(
        registry, settings.metrics_port, lambda: None, settings.metrics_cert, settings.metrics_key
    )  # healthy also while the store is down: to say that is its work
    try:
        log.info("exporting on port %d", settings.metrics_port)
        certificates_s = min(CERTIFICATES_EVERY_S, CERTIFICATES_EVERY * settings.refresh_s)
        threads = [
            every(settings.refresh_s, stop, observer.look, "store"),
            every(certificates_s, stop, Certificates(settings, shown).look, "certificates"),
            every(min(AUDIT_EVERY_S, settings.refresh_s), stop, auditor.step, "audit"),
        ]
        stop.wait()
        for thread in threads:
            thread.join(1.0)
    finally:
        stop_serving()
        link.close()
        auditor.close()
        watch.close()
