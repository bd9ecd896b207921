"""Prometheus metrics of the contract, and the small server for `/metrics` and `/healthz`.

Prefix `fedmq_`, base units, no client id in a label. `NAMES` is what the documentation lists; a test compares.
"""

import json
import socketserver
import threading
from collections.abc import Callable, Iterable
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics, make_wsgi_app
from prometheus_client.samples import Sample

from shared.errors import SettingsError

disable_created_metrics()  # type: ignore[no-untyped-call]

_SECONDS = (0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100)
_LATENCY = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000, 3600, 6 * 3600, 24 * 3600)
_VERSIONS = (0, 1, 2, 3, 5, 10, 20, 30, 50, 100, 200, 500, 1000)
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
        "fedmq_published_bytes_total", "fedmq_model_version", "fedmq_buffer_updates",
    ),
    "worker": (
        "fedmq_worker_train_seconds", "fedmq_worker_outbox_updates", "fedmq_worker_model_version",
        "fedmq_worker_published_total", "fedmq_worker_sent_bytes_total", "fedmq_worker_pulled_bytes_total",
        "fedmq_worker_pulls_total", "fedmq_worker_downlink_mismatches_total",
        "fedmq_worker_task_failures_total", "fedmq_worker_residual_norm", "fedmq_worker_returned_total",
    ),
    "evaluator": ("fedmq_evaluation", "fedmq_evaluated_version"),
}  # fmt: skip

Health = Callable[[], str | None]  # None when well, else what is wrong


class _Server(socketserver.ThreadingMixIn, WSGIServer):
    daemon_threads = True


class _Silent(WSGIRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        """Scrapes are not news."""


def serve(registry: CollectorRegistry, port: int, health: Health) -> Callable[[], None]:
    """Serve `/metrics` and `/healthz` on `port`; return a function that stops it. Port 0 serves nothing.

    Raises:
        SettingsError: the port is taken.
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
    threading.Thread(target=server.serve_forever, name="metrics", daemon=True).start()

    def stop() -> None:
        server.shutdown()
        server.server_close()

    return stop
