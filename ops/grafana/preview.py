"""The dashboards without Grafana: a page that draws every panel from a live Prometheus.

    python -m ops.grafana.preview http://127.0.0.1:9090 dashboards.html --job digits
    python -m ops.grafana.preview https://prometheus:9090 --ca ca.pem --serve 3000

It reads the same JSON as Grafana. It is for looking at the dashboards where there is no Grafana; nothing here can be
clicked.
"""

import argparse
import html
import json
import math
import re
import ssl
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from ops.grafana.build import FOLDER
from ops.grafana.drawing import draw
from ops.grafana.svg import Series
from shared.messages import ID

ORDER = ("overview", "pipeline", "fleet", "safety")
COLUMN, ROW, GAP = 60, 36, 8  # pixels of Grafana's grid
POINTS = 240  # of a range query
ANSWER_S_MAX = 30.0

_PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title><style>
 body {{ background: #111217; color: #d8d9da; font: 13px/1.35 Inter, system-ui, sans-serif; margin: 14px auto;
   width: {width}px }}
 h1 {{ font-size: 18px; font-weight: 500; margin: 4px 0 10px }} h1 small {{ color: #8e8e96; font-weight: 400 }}
 nav a {{ color: #6e9fff; margin-right: 16px }} svg text {{ font-family: Inter, system-ui, sans-serif }}
 .grid {{ position: relative }} .panel {{ position: absolute; background: #181b1f; border: 1px solid #25272b;
   border-radius: 3px; box-sizing: border-box; overflow: hidden; padding: 6px 8px }}
 .panel h2 {{ font-size: 13px; font-weight: 500; margin: 0 0 4px; white-space: nowrap }}
 .none {{ color: #8e8e96; text-align: center; font-size: 20px; padding-top: 14px }} .bad {{ color: #f2495c }}
 table {{ border-collapse: collapse; width: 100% }} td, th {{ text-align: left; padding: 3px 10px 3px 0;
   border-bottom: 1px solid #25272b }} th {{ color: #6e9fff; font-weight: 500 }}
</style>{body}</html>
"""


class Prometheus:
    """The few questions a dashboard asks.

    Args:
        url: `http://` or `https://`, without a path.
        ca: PEM file of its authority.
    """

    def __init__(self, url: str, ca: str | None = None) -> None:
        if urllib.parse.urlsplit(url).scheme not in ("http", "https"):
            raise SystemExit(f"preview: {url!r} is no URL of a Prometheus; write http://127.0.0.1:9090")
        self._url = url.rstrip("/")
        self._context = ssl.create_default_context(cafile=ca) if url.startswith("https") else None

    def ask(self, path: str, **parameters: str) -> Any:
        """Return the data of an answer.

        Raises:
            OSError: it cannot be reached.
            ValueError: it refuses the query; the message says why.
        """
        url = f"{self._url}/api/v1/{path}?{urllib.parse.urlencode(parameters)}"
        try:
            with urllib.request.urlopen(url, timeout=ANSWER_S_MAX, context=self._context) as answer:  # noqa: S310
                return json.load(answer)["data"]
        except urllib.error.HTTPError as error:
            raise ValueError(json.load(error).get("error", str(error))) from error

    def jobs(self) -> list[str]:
        """Return the ids of FedMQ's jobs."""
        return list(self.ask("label/exported_job/values", **{"match[]": "fedmq_job_version"}))


def series_of(
    prometheus: Prometheus, panel: dict[str, Any], job: str, span: tuple[float, float], rate_s: float = 20.0
) -> list[Series]:
    """Return what the queries of a panel find.

    Args:
        prometheus: where to ask.
        panel: as the dashboard's JSON has it.
        job: FedMQ's.
        span: first and last moment, unix seconds.
        rate_s: what Grafana calls `$__rate_interval`, at least four scrape intervals.
    """
    step = max(1.0, (span[1] - span[0]) / POINTS)
    found = []
    for target in panel.get("targets", ()):
        expression = target["expr"].replace("$job", job).replace("$__rate_interval", f"{max(rate_s, step):.0f}s")
        if target["instant"]:
            result = prometheus.ask("query", query=expression, time=f"{span[1]:.3f}")["result"]
        else:
            result = prometheus.ask(
                "query_range", query=expression, start=f"{span[0]:.3f}", end=f"{span[1]:.3f}", step=f"{step:.3f}"
            )["result"]
        for one in result:
            values = one.get("values") or [one["value"]]
            points = [(float(moment), float(value)) for moment, value in values]
            found.append(Series(_name(target, one["metric"]), target["refId"], one["metric"], points))
    return found


def _name(target: dict[str, Any], labels: dict[str, str]) -> str:
    legend = str(target["legendFormat"])
    if legend == "__auto":
        return ", ".join(labels.values()) or "value"
    return re.sub(r"{{(\w+)}}", lambda match: labels.get(match[1], ""), legend)


def page(prometheus: Prometheus, name: str, job: str, minutes: float, rate_s: float = 20.0) -> str:
    """Return one dashboard as a page that needs nothing beside it.

    Raises:
        ValueError: the job is none.
    """
    if not ID.fullmatch(job):
        raise ValueError(f"job {job!r}: must be of {ID.pattern}")
    dashboard = json.loads((FOLDER / f"{name}.json").read_text())
    now = time.time()
    span = (now - 60 * minutes, now)
    panels, bottom = [], 0
    for panel in dashboard["panels"]:
        place = panel["gridPos"]
        width, height = place["w"] * COLUMN - GAP, place["h"] * ROW - GAP
        bottom = max(bottom, (place["y"] + place["h"]) * ROW)
        try:
            inside = draw(panel, series_of(prometheus, panel, job, span, rate_s), span, width - 18, height - 36)
        except (OSError, ValueError) as error:
            inside = f'<div class="bad">{html.escape(str(error))}</div>'
        where = f"left:{place['x'] * COLUMN}px;top:{place['y'] * ROW}px;width:{width}px;height:{height}px"
        title = f'<h2 title="{html.escape(panel["description"])}">{html.escape(panel["title"])}</h2>'
        panels.append(f'<div class="panel" style="{where}">{title}{inside}</div>')
    shown = f"<h1>{html.escape(dashboard['title'])} <small>{html.escape(dashboard['description'])} Job {job}, "
    shown += f"last {minutes:g} minutes.</small></h1>"
    body = f'{shown}<div class="grid" style="height:{bottom}px">{"".join(panels)}</div>'
    return _PAGE.format(title=html.escape(dashboard["title"]), width=24 * COLUMN, body=body)


def write(prometheus: Prometheus, out: Path, job: str, minutes: float, rate_s: float) -> None:
    """Write a page for each dashboard: OUT-overview.html, ..., and OUT.html with all of them."""
    out.parent.mkdir(parents=True, exist_ok=True)
    links = []
    for name in ORDER:
        path = out.with_name(f"{out.stem}-{name}.html")
        path.write_text(page(prometheus, name, job, minutes, rate_s))
        links.append(f'<iframe src="{path.name}" width="1480" height="1300" style="border:0"></iframe>')
    out.write_text(_PAGE.format(title="FedMQ", width=1490, body="".join(links)))


def server_of(
    prometheus: Prometheus, port: int, minutes: float, rate_s: float, cert: tuple[str, str] | None = None
) -> ThreadingHTTPServer:
    """Return a server of the dashboards: `/d/overview?job=...`, `/api/health` as Grafana has it.

    Args:
        prometheus: where to ask.
        port: TCP port, on every address; 0: a free one.
        minutes: how far back a page looks unless asked otherwise.
        rate_s: window of rates.
        cert: PEM files of a certificate and its key; over TLS with them.
    """

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            parts = urllib.parse.urlsplit(self.path)
            given = dict(urllib.parse.parse_qsl(parts.query))
            name = parts.path.removeprefix("/d/").strip("/") or ORDER[0]
            if parts.path == "/api/health":
                self._answer(200, "application/json", json.dumps({"database": "ok", "version": "preview"}))
            elif name not in ORDER:
                self._answer(404, "text/plain", f"no dashboard {name!r}; there are {', '.join(ORDER)}\n")
            else:
                try:
                    job = given.get("job") or next(iter(prometheus.jobs()), "default")
                    ago = float(given.get("minutes", minutes))
                    if not (math.isfinite(ago) and ago > 0):
                        raise ValueError(f"minutes={given['minutes']!r}: give a number over 0")
                    self._answer(200, "text/html; charset=utf-8", page(prometheus, name, job, ago, rate_s))
                except (OSError, ValueError) as error:
                    self._answer(502, "text/plain", f"{error}\n")

        def _answer(self, status: int, kind: str, text: str) -> None:
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, format: str, *args: Any) -> None:
            """No news."""

    try:
        server = ThreadingHTTPServer(("", port), Handler)
    except OSError as error:
        raise SystemExit(f"preview: port {port} cannot be used: {error.strerror}; choose another") from error
    if cert is not None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(*cert)
        server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
    return server


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line and do it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prometheus", help="its URL")
    parser.add_argument("out", nargs="?", type=Path, help="HTML file to write")
    parser.add_argument("--serve", type=int, metavar="PORT", help="serve the pages here instead")
    parser.add_argument("--job", help="FedMQ's job [default: the first]")
    parser.add_argument("--minutes", type=float, default=60.0, help="how far back [default: 60]")
    parser.add_argument("--rate", type=float, default=20.0, help="window of rates, at least 4 scrapes, s [default: 20]")
    parser.add_argument("--ca", help="PEM file of the authority behind an https URL")
    parser.add_argument("--cert", help="serve over TLS with this certificate, a PEM file")
    parser.add_argument("--key", help="its key")
    given = parser.parse_args(arguments)
    if (given.out is None) == (given.serve is None):
        parser.error("give either OUT.html or --serve PORT")
    if bool(given.cert) != bool(given.key):
        parser.error("--cert and --key go together")
    prometheus = Prometheus(given.prometheus, given.ca)
    if given.serve is not None:
        cert = (given.cert, given.key) if given.cert and given.key else None
        with server_of(prometheus, given.serve, given.minutes, given.rate, cert) as server:
            server.serve_forever()
    try:
        job = given.job or next(iter(prometheus.jobs()), "default")
    except (OSError, ValueError) as error:
        raise SystemExit(f"preview: Prometheus at {given.prometheus}: {error}") from error
    try:
        write(prometheus, given.out, job, given.minutes, given.rate)
    except (OSError, ValueError) as error:
        raise SystemExit(f"preview: {error}") from error


if __name__ == "__main__":
    main()
