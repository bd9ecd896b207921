"""Prometheus metrics of the contract, and the small server for `/metrics` and `/healthz`.

Prefix `fedmq_`, base units, no client id in a label. `NAMES` is what the documentation lists; a test compares.
"""

import copy
import json
import socket
import socketserver
import ssl
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics, make_wsgi_app
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector
from prometheus_client.samples import Sample

from shared.errors import Reason, SettingsError

disable_created_metrics()  # type: ignore[no-untyped-call]

SILENT_S_MAX = 10.0  # a scraper that says nothing for so long is hung up on

_SECONDS = (*(base * 10.0**power for power in range(-4, 2) for base in (1, 2, 5)), 100.0)
_LATENCY = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000, 3600, 6 * 3600, 24 * 3600)
_VERSIONS = (0, 1, 2, 3, 5, 10, 20, 30, 50, 100, 200, 500, 1000)
_NORMS = tuple(base * 10.0**power for power in range(-4, 5) for base in (1, 2, 5))
_BYTES = (1e3, 3e3, 1e4, 3e4, 1e5, 3e5, 1e6, 3e6, 1e7, 3e7, 1e8)


class AggregatorMetrics:
    """What the aggregator counts, on a registry of its own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        r = self.registry
        self.updates = Counter("fedmq_updates", "Updates by outcome, once durable", ["job", "outcome"], registry=r)
        self.rejected = Counter("fedmq_updates_rejected", "Rejected updates by reason", ["job", "reason"], registry=r)
        self.staleness = Histogram(
            "fedmq_update_staleness_versions", "Staleness of applied updates", buckets=_VERSIONS, registry=r
        )
        self.update_bytes = Histogram("fedmq_update_bytes", "Size of received updates", buckets=_BYTES, registry=r)
        self.latency = Histogram(
            "fedmq_update_latency_seconds", "From created on the device to durable", buckets=_LATENCY, registry=r
        )
        self.decode = Histogram("fedmq_decode_seconds", "Decode, check and fold", buckets=_SECONDS, registry=r)
        self.commit = Histogram("fedmq_commit_seconds", "One durable commit", buckets=_SECONDS, registry=r)
        self.published_bytes = Counter(
            "fedmq_published_bytes", "Bytes published for workers beside the model", ["kind"], registry=r
        )
        self.version = Gauge("fedmq_model_version", "Newest committed model version", registry=r)
        self.buffered = Gauge("fedmq_buffer_updates", "Updates in the open buffer", registry=r)
        self.parameters = Gauge("fedmq_model_parameters", "Weights of the model", registry=r)
        self.norm = Histogram(
            "fedmq_update_norm", "L2 norm of applied deltas, of a sample where measuring all is dear", buckets=_NORMS,
            registry=r,
        )  # fmt: skip
        self.commits = Counter("fedmq_commits", "Durable commits of this aggregator", registry=r)
        self.committed_at = Gauge(
            "fedmq_last_commit_timestamp_seconds", "When this aggregator last made a durable commit", registry=r
        )
        self.serving = Gauge("fedmq_serving", "1: the newest commit is this aggregator's own; 0: standby", registry=r)
        self.store_failures = Counter(
            "fedmq_store_failures", "Steps that ended because broker or store did not answer", registry=r
        )

    def begin(self, job: str) -> None:
        """Show every outcome and reason at 0: of a series that begins with its first event no rate is seen."""
        for outcome in ("applied", "duplicate", "stale", "rejected"):
            self.updates.labels(job, outcome)
        for reason in Reason:
            self.rejected.labels(job, str(reason))


class WorkerMetrics:
    """What a worker counts."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        r = self.registry
        self.train = Histogram("fedmq_worker_train_seconds", "One local training", buckets=_LATENCY, registry=r)
        self.outbox = Gauge("fedmq_worker_outbox_updates", "Updates not yet confirmed", registry=r)
        self.version = Gauge("fedmq_worker_model_version", "Version last trained from", registry=r)
        self.published = Counter("fedmq_worker_published", "Publishes by outcome", ["outcome"], registry=r)
        self.sent_bytes = Counter("fedmq_worker_sent_bytes", "Bytes of confirmed updates", registry=r)
        self.pulled_bytes = Counter("fedmq_worker_pulled_bytes", "Bytes of pulled models and deltas", registry=r)
        self.pulls = Counter("fedmq_worker_pulls", "Pulls by how the weights came", ["how"], registry=r)
        self.mismatches = Counter(
            "fedmq_worker_downlink_mismatches", "Pulled weights of another hash than announced", registry=r
        )
        self.failures = Counter("fedmq_worker_task_failures", "Trainings that gave no update", registry=r)
        self.residual_norm = Gauge("fedmq_worker_residual_norm", "L2 norm of the residual", registry=r)
        self.returned = Counter("fedmq_worker_returned", "Refused updates taken back into the residual", registry=r)

    def pulled(self) -> tuple[int, int]:
        """Return what was pulled so far: bytes, and how often."""
        bytes_pulled = sum(s.value for s in _totals(self.pulled_bytes))
        return int(bytes_pulled), int(sum(s.value for s in _totals(self.pulls)))


def _totals(counter: Counter) -> list[Sample]:
    return [sample for metric in counter.collect() for sample in metric.samples if sample.name.endswith("_total")]


class EvaluatorMetrics:
    """What the evaluator measures."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.evaluation = Gauge("fedmq_evaluation", "Newest evaluation", ["metric"], registry=self.registry)
        self.version = Gauge("fedmq_evaluated_version", "Version last evaluated", registry=self.registry)


NAMES = {
    "aggregator": (
        "fedmq_updates_total", "fedmq_updates_rejected_total", "fedmq_update_staleness_versions",
        "fedmq_update_bytes", "fedmq_update_latency_seconds", "fedmq_decode_seconds", "fedmq_commit_seconds",
        "fedmq_published_bytes_total", "fedmq_model_version", "fedmq_buffer_updates", "fedmq_model_parameters",
        "fedmq_update_norm", "fedmq_commits_total", "fedmq_last_commit_timestamp_seconds", "fedmq_serving",
        "fedmq_store_failures_total",
    ),
    "worker": (
        "fedmq_worker_train_seconds", "fedmq_worker_outbox_updates", "fedmq_worker_model_version",
        "fedmq_worker_published_total", "fedmq_worker_sent_bytes_total", "fedmq_worker_pulled_bytes_total",
        "fedmq_worker_pulls_total", "fedmq_worker_downlink_mismatches_total",
        "fedmq_worker_task_failures_total", "fedmq_worker_residual_norm", "fedmq_worker_returned_total",
    ),
    "evaluator": ("fedmq_evaluation", "fedmq_evaluated_version"),
    "exporter": (
        "fedmq_store_up", "fedmq_store_durable", "fedmq_broker_up", "fedmq_certificate_expiry_timestamp_seconds",
        "fedmq_audit_events_total", "fedmq_job_version", "fedmq_job_revision", "fedmq_job_head_age_seconds",
        "fedmq_job_buffer_updates", "fedmq_job_updates_total", "fedmq_job_evaluation", "fedmq_job_evaluated_version",
        "fedmq_fleet_contributors", "fedmq_fleet_top_share", "fedmq_fleet_clients", "fedmq_fleet_clients_behind",
        "fedmq_devices_enrolled", "fedmq_devices_silent", "fedmq_devices_never_heard",
        "fedmq_devices_certificate_expiry_timestamp_seconds",
    ),
}  # fmt: skip


def of_job(registry: CollectorRegistry, job: str) -> CollectorRegistry:
    """Return a registry that shows everything of another one with the label `job`: one Prometheus sees many jobs.

    Prometheus calls the label `exported_job`, because `job` is its own word for a group of targets.
    """

    class OfJob(Collector):
        def collect(self) -> Iterator[Metric]:
            for metric in registry.collect():
                labelled = copy.copy(metric)
                labelled.samples = [s._replace(labels={"job": job, **s.labels}) for s in metric.samples]
                yield labelled

    labelled_registry = CollectorRegistry()
    labelled_registry.register(OfJob())
    return labelled_registry


Health = Callable[[], str | None]  # None when well, else what is wrong


class _Server(socketserver.ThreadingMixIn, WSGIServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Not every caller speaks TLS, or stays to hear the answer: no news either."""


def _over_tls(listening: socket.socket, cert: str, key: str) -> ssl.SSLSocket:
    """Wrap a listening socket; each handshake waits for its own thread, so that a slow one holds up nobody."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        context.load_cert_chain(cert, key)
    except (ssl.SSLError, OSError) as error:
        raise SettingsError(f"FEDMQ_METRICS_CERT, FEDMQ_METRICS_KEY: no certificate with its key: {error}") from error
    return context.wrap_socket(listening, server_side=True, do_handshake_on_connect=False)


class _Silent(WSGIRequestHandler):
    timeout = SILENT_S_MAX

    def log_message(self, format: str, *args: Any) -> None:
        """Scrapes are not news."""


def serve(registry: CollectorRegistry, port: int, health: Health, cert: str = "", key: str = "") -> Callable[[], None]:
    """Serve `/metrics` and `/healthz` on `port`; return a function that stops it. Port 0 serves nothing.

    Args:
        registry: what is served.
        port: TCP port, on every address.
        health: None when well.
        cert: PEM file of a certificate; over TLS with one.
        key: PEM file of its key.

    Raises:
        SettingsError: the port is taken, or the certificate is none.
    """
    if port == 0:
        return lambda: None
    metrics = make_wsgi_app(registry)

    def application(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        if environ.get("PATH_INFO") != "/healthz":
            answer: Iterable[bytes] = metrics(environ, start_response)
            return answer
        problem = health()
        status = "503 Service Unavailable" if problem else "200 OK"
        start_response(status, [("Content-Type", "application/json")])
        return [json.dumps({"ok": problem is None, "problem": problem}).encode()]

    try:
        server = make_server("", port, application, _Server, _Silent)
    except OSError as error:
        raise SettingsError(f"FEDMQ_METRICS_PORT {port} cannot be used: {error.strerror}; choose another") from error
    if cert:
        server.socket = _over_tls(server.socket, cert, key)
    threading.Thread(target=server.serve_forever, name="metrics", daemon=True).start()

    def stop() -> None:
        server.shutdown()
        server.server_close()

    return stop
