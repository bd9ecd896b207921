"""The dashboards without Grafana: a page that draws every panel from a live Prometheus.

    python -m ops.grafana.preview http://127.0.0.1:9090 dashboards.html --job digits
    python -m ops.grafana.preview https://prometheus:9090 --ca ca.pem --serve 3000

It reads the same JSON as Grafana. It is for looking at the dashboards where there is no Grafana; nothing here can be
clicked.
"""

import argparse
import html
import http.client
import json
import math
import re
import ssl
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NoReturn

from ops.grafana.build import FOLDER
from ops.grafana.drawing import draw
from ops.grafana.svg import Series, step_of
from shared.command import FAILED, UNREACHABLE, USAGE
from shared.messages import ID

ORDER = ("overview", "pipeline", "fleet", "safety")
COLUMN, ROW, GAP = 52, 36, 8  # Grafana's grid, pixels in a window 1280 wide; drawn as wide as the window is
COLUMNS = 24
TITLE = 24  # pixels above a picture
MINUTES = 15.0  # how far back
SPAN_S_MIN = 60.0  # a job that began just now
ANSWER_S_MAX = 30.0

_PAGE = """<!doctype html><html lang="en"><meta charset="utf-8">
<meta name="viewport" content="width=device-width"><title>{title}</title><style>
 body {{ background: #111217; color: #d8d9da; font: 13px/1.35 Inter, system-ui, sans-serif; margin: {margin} }}
 iframe {{ display: block; width: 100%; border: 0 }}
 h1 {{ font-size: 18px; font-weight: 500; margin: 4px 0 10px }} h1 small {{ color: #8e8e96; font-weight: 400 }}
 nav a {{ color: #6e9fff; margin-right: 16px }} svg text {{ font-family: Inter, system-ui, sans-serif }}
 .panel > svg {{ display: block; width: 100%; height: calc(100% - {top}px) }}
 .grid {{ position: relative }} .panel {{ position: absolute; background: #181b1f; border: 1px solid #25272b;
   border-radius: 3px; box-sizing: border-box; overflow: hidden; padding: 6px 8px }}
 .panel h2 {{ font-size: 13px; font-weight: 500; margin: 0 0 4px; white-space: nowrap; overflow: hidden;
   text-overflow: ellipsis }}
 .none {{ color: #8e8e96; text-align: center; font-size: 20px; padding-top: 14px }} .bad {{ color: #f2495c }}
 table {{ border-collapse: collapse; width: 100% }} td, th {{ text-align: left; padding: 3px 10px 3px 0;
   border-bottom: 1px solid #25272b }} th {{ color: #6e9fff; font-weight: 500 }}
</style>{body}</html>
"""


class NoAnswerError(OSError):
    """Nothing came, or nothing a Prometheus says: what was asked, what came, what to try."""


class Prometheus:
    """The few questions a dashboard asks.

    Args:
        url: `http://` or `https://`, without a path.
        ca: PEM file of its authority.
    """

    def __init__(self, url: str, ca: str | None = None) -> None:
        if urllib.parse.urlsplit(url).scheme not in ("http", "https"):
            _end(USAGE, f"{url!r} is no URL of a Prometheus; write http://127.0.0.1:9090")
        self._url = url.rstrip("/")
        try:
            self._context = ssl.create_default_context(cafile=ca)
        except OSError as error:  # ssl.SSLError is one: the file is no certificate
            _end(USAGE, f"--ca {ca}: {error.strerror or error}; give the PEM file of the authority")

    def ask(self, path: str, **parameters: str) -> Any:
        """Return the data of an answer.

        Raises:
            NoAnswerError: it cannot be reached, or what answers is no Prometheus.
            TimeoutError: it takes longer than `ANSWER_S_MAX`.
            ValueError: it refuses the query; the message says why.
        """
        asked = f"{self._url}/api/v1/{path}"
        try:
            status, body = self._get(f"{asked}?{urllib.parse.urlencode(parameters)}")
        except TimeoutError as error:
            raise TimeoutError(f"asked {asked}; no answer within {ANSWER_S_MAX:g} s") from error
        except (OSError, http.client.HTTPException) as error:
            raise NoAnswerError(f"asked {asked}; {getattr(error, 'reason', error)}; {self._advice(error)}") from error
        try:
            answer = json.loads(body)
        except ValueError:
            answer = None
        if isinstance(answer, dict) and "error" in answer:
            raise ValueError(str(answer["error"]))
        if not isinstance(answer, dict) or "data" not in answer:
            came = " ".join(body[:200].decode(errors="replace").split())
            raise NoAnswerError(f"asked {asked}; got {status}, not a Prometheus' JSON: {came!r}; {self._advice()}")
        return answer["data"]

    def _get(self, url: str) -> tuple[int, bytes]:
        try:
            with urllib.request.urlopen(url, timeout=ANSWER_S_MAX, context=self._context) as answer:  # noqa: S310
                return answer.status, answer.read()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read()

    def _advice(self, error: Exception | None = None) -> str:
        reason = getattr(error, "reason", error)
        if isinstance(reason, ConnectionRefusedError):
            return "is it running, and is this its port?"
        if self._url.startswith("http:"):
            return f"is it https? Then https:{self._url.removeprefix('http:')} --ca ca.pem"
        if isinstance(reason, ssl.SSLCertVerificationError):
            return "give the authority that signed its certificate: --ca ca.pem"
        return "is it a Prometheus, and is it https?"

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
    step = step_of(span)
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


def span_of(prometheus: Prometheus, job: str, minutes: float, now: float) -> tuple[float, float]:
    """Return the last minutes, or less: from the job's first point, at least `SPAN_S_MIN`.

    Raises:
        NoAnswerError: there is nobody to ask.
    """
    span = (now - 60 * minutes, now)
    known = f'count(fedmq_job_version{{exported_job="{job}"}})'
    try:
        found = prometheus.ask(
            "query_range", query=known, start=f"{span[0]:.3f}", end=f"{now:.3f}", step=f"{step_of(span):.3f}"
        )["result"]
    except ValueError:
        return span  # each panel says what is refused
    began = min((float(one["values"][0][0]) for one in found), default=span[0])
    return max(span[0], min(began, now - SPAN_S_MIN)), now


def page(prometheus: Prometheus, name: str, job: str, minutes: float, rate_s: float = 20.0) -> str:
    """Return one dashboard as a page that needs nothing beside it.

    Raises:
        NoAnswerError: there is nobody to ask.
        ValueError: the job is none.
    """
    if not ID.fullmatch(job):
        raise ValueError(f"job {job!r}: must be of {ID.pattern}")
    dashboard = json.loads((FOLDER / f"{name}.json").read_text())
    span = span_of(prometheus, job, minutes, time.time())
    across, down = COLUMNS * COLUMN, _rows(dashboard) * ROW
    panels = []
    for panel in dashboard["panels"]:
        place = panel["gridPos"]
        width, height = place["w"] * COLUMN - GAP, place["h"] * ROW - GAP
        try:
            inside = draw(panel, series_of(prometheus, panel, job, span, rate_s), span, width - 18, height - 14 - TITLE)
        except (TimeoutError, ValueError) as error:
            inside = f'<div class="bad">{html.escape(str(error))}</div>'
        where = f"left:{_share(place['x'] * COLUMN, across)};top:{_share(place['y'] * ROW, down)};"
        where += f"width:{_share(width, across)};height:{_share(height, down)}"
        title = f'<h2 title="{html.escape(panel["description"])}">{html.escape(panel["title"])}</h2>'
        panels.append(f'<div class="panel" style="{where}">{title}{inside}</div>')
    shown = f"<h1>{html.escape(dashboard['title'])} <small>{html.escape(dashboard['description'])} Job {job}, "
    shown += f"last {(span[1] - span[0]) / 60:.3g} minutes.</small></h1>"
    body = f'{shown}<div class="grid" style="aspect-ratio:{across}/{down}">{"".join(panels)}</div>'
    return _PAGE.format(title=html.escape(dashboard["title"]), margin="14px 16px", top=TITLE, body=body)


def _rows(dashboard: dict[str, Any]) -> int:
    return max(int(panel["gridPos"]["y"] + panel["gridPos"]["h"]) for panel in dashboard["panels"])


def _share(pixels: float, whole: float) -> str:
    return f"{100 * pixels / whole:.3f}%"


def write(prometheus: Prometheus, out: Path, job: str, minutes: float, rate_s: float) -> list[Path]:
    """Write a page for each dashboard: OUT-overview.html, ..., and OUT.html with all of them; nothing if one fails.

    Returns:
        What was written, OUT.html first.
    """
    pages = {out.with_name(f"{out.stem}-{name}.html"): page(prometheus, name, job, minutes, rate_s) for name in ORDER}
    frames = []
    for name, path in zip(ORDER, pages, strict=True):
        share = _rows(json.loads((FOLDER / f"{name}.json").read_text())) * ROW / (COLUMNS * COLUMN)
        height = f"calc({100 * share:.1f}vw + 90px)"  # 90: the headline, on a small window in two lines
        frames.append(f'<iframe src="{urllib.parse.quote(path.name)}" style="height:{height}"></iframe>')
    index = {out: _PAGE.format(title="FedMQ", margin="0", top=TITLE, body="".join(frames))}
    out.parent.mkdir(parents=True, exist_ok=True)
    for path, text in (pages | index).items():
        path.write_text(text)
    return [out, *pages]


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
        _end(USAGE, f"port {port} cannot be used: {error.strerror}; choose another")
    if cert is not None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        try:
            context.load_cert_chain(*cert)
        except OSError as error:
            server.server_close()
            _end(USAGE, f"--cert {cert[0]} --key {cert[1]}: {error.strerror or error}; give PEM files")
        server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
    return server


def _end(code: int, message: str) -> NoReturn:
    sys.stderr.write(f"preview: {message}\n")
    raise SystemExit(code)


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line and do it; exits with 2 for wrong usage, 3 when no Prometheus answers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prometheus", help="its URL")
    parser.add_argument("out", nargs="?", type=Path, help="HTML file to write")
    parser.add_argument("--serve", type=int, metavar="PORT", help="serve the pages here instead")
    parser.add_argument("--job", help="FedMQ's job [default: the first]")
    parser.add_argument(
        "--minutes",
        type=float,
        default=MINUTES,
        help=f"how far back, or to the job's first point if that is later [default: {MINUTES:g}]",
    )
    parser.add_argument("--rate", type=float, default=20.0, help="window of rates, at least 4 scrapes, s [default: 20]")
    parser.add_argument("--ca", help="PEM file of the authority behind an https URL")
    parser.add_argument("--cert", help="serve over TLS with this certificate, a PEM file")
    parser.add_argument("--key", help="its key")
    given = parser.parse_args(arguments)
    if (given.out is None) == (given.serve is None):
        parser.error("give either OUT.html or --serve PORT")
    if bool(given.cert) != bool(given.key):
        parser.error("--cert and --key go together")
    if not (math.isfinite(given.minutes) and given.minutes > 0):
        parser.error("--minutes: give a number over 0")
    if given.job is not None and not ID.fullmatch(given.job):
        parser.error(f"--job {given.job!r}: must be of {ID.pattern}")
    prometheus = Prometheus(given.prometheus, given.ca)
    if given.serve is not None:
        cert = (given.cert, given.key) if given.cert and given.key else None
        with server_of(prometheus, given.serve, given.minutes, given.rate, cert) as server:
            server.serve_forever()
    try:
        job = given.job or next(iter(prometheus.jobs()), "default")
        written = write(prometheus, given.out, job, given.minutes, given.rate)
    except (NoAnswerError, TimeoutError) as error:
        _end(UNREACHABLE, str(error))
    except (OSError, ValueError) as error:
        _end(FAILED, str(error))
    print(f"wrote {', '.join(map(str, written))}: job {job}")


if __name__ == "__main__":
    main()
