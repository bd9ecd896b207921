"""Metrics of a program that nobody can scrape: pushed to a Pushgateway, or written to a file for a textfile collector.

A push is labelled `job` (which program), `instance` (which device), `exported_job` (the job of FedMQ): a Prometheus
that scrapes the gateway with `honor_labels: true` holds the series it would hold had it scraped the device. The file
has FedMQ's job as `job`, as `/metrics` has; Prometheus makes it `exported_job`.
"""

import base64
import logging
import threading
from collections.abc import Callable
from typing import Any
from urllib.error import HTTPError
from urllib.parse import unquote, urlsplit, urlunsplit
from urllib.request import HTTPSHandler, Request, build_opener

from prometheus_client import CollectorRegistry, push_to_gateway, write_to_textfile

from shared import tls
from shared.config import Settings
from shared.metrics import of_job
from shared.urls import hide_password

log = logging.getLogger("fedmq.metrics")

ANSWER_S_MAX = 5.0  # of a gateway
Handle = Callable[[str, str, float | None, list[tuple[str, str]], bytes], Callable[[], None]]  # as prometheus_client's


def start(registry: CollectorRegistry, settings: Settings, program: str, instance: str) -> Callable[[], None]:
    """Push metrics and write them to a file from a thread of its own, as the settings say.

    What fails is said once, until it works again; nothing waits for it.

    Args:
        registry: what is pushed.
        settings: FEDMQ_METRICS_PUSH_URL, FEDMQ_METRICS_PUSH_S, FEDMQ_METRICS_FILE.
        program: aggregator, worker or evaluator.
        instance: a worker's client id, else the host's name.

    Returns:
        A function that does so for a last time and ends the thread.
    """
    ways: list[tuple[str, Callable[[], None]]] = []
    if url := settings.metrics_push_url:
        ways.append(
            (f"metrics cannot be pushed to {hide_password(url)}", _pushing(registry, settings, program, instance))
        )
    if (path := settings.metrics_file) is not None:
        labelled = of_job(registry, settings.job)
        ways.append((f"metrics cannot be written to {path}", lambda: write_to_textfile(str(path), labelled)))
    if not ways:
        return lambda: None
    ended = threading.Event()
    thread = threading.Thread(
        target=_run, args=(ways, settings.metrics_push_s, ended), name="metrics push", daemon=True
    )
    thread.start()

    def stop() -> None:
        ended.set()
        thread.join(2 * ANSWER_S_MAX)

    return stop


def _run(ways: list[tuple[str, Callable[[], None]]], every_s: float, ended: threading.Event) -> None:
    failing: set[str] = set()
    last = False
    while not last:
        last = ended.is_set()
        for complaint, way in ways:
            try:
                way()
            except Exception as error:  # a collector may raise anything: the next try may find it well again
                if complaint not in failing:
                    log.warning("%s: %s; trying on", complaint, _said(error))
                failing.add(complaint)
            else:
                if complaint in failing:
                    log.info("%s: it works again", complaint)
                failing.discard(complaint)
        if not last:
            ended.wait(every_s)


def _pushing(registry: CollectorRegistry, settings: Settings, program: str, instance: str) -> Callable[[], None]:
    """Return a function that pushes once."""
    url, files = tls.without_files(settings.metrics_push_url)
    parts = urlsplit(url)
    gateway = urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))
    login = f"{unquote(parts.username)}:{unquote(parts.password or '')}" if parts.username else ""
    handle = _handler(login, files if parts.scheme == "https" else None)
    labels = {"instance": instance, "exported_job": settings.job}
    return lambda: push_to_gateway(gateway, program, registry, labels, ANSWER_S_MAX, handle)


def _handler(login: str, files: dict[str, str] | None) -> Handle:
    """Return how prometheus_client is to send: with the login, and over TLS with our own authority.

    Args:
        login: `name:password`, or "".
        files: of `tls.client_context`; None without TLS.
    """

    def handle(
        url: str, method: str, timeout: float | None, headers: list[tuple[str, str]], data: bytes
    ) -> Callable[[], None]:
        def send() -> None:
            given = dict(headers)
            if login:
                given["Authorization"] = "Basic " + base64.b64encode(login.encode()).decode()
            handlers: list[Any] = [] if files is None else [HTTPSHandler(context=tls.client_context(files))]
            request = Request(url, data, given, method=method)  # noqa: S310 - http or https, the settings see to it
            with build_opener(*handlers).open(request, timeout=timeout):
                pass

        return send

    return handle


def _said(error: Exception) -> str:
    """Return what went wrong, and what the gateway says to it."""
    if not isinstance(error, HTTPError):
        reason = getattr(error, "reason", None)
        mend = tls.hint(error)
        kind = "" if isinstance(error, OSError | ValueError) else f"{type(error).__name__}: "
        return f"{kind}{reason or error}{'; ' if mend else ''}{mend}"
    text = error.read(200).decode(errors="replace").strip()
    return f"{error.code} {error.reason}{': ' if text else ''}{text}"
