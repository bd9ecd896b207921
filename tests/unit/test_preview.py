"""The dashboards without Grafana: what the page and its server say when Prometheus answers, and when it does not."""

import json
import re
import ssl
import threading
import time
import urllib.error
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from ops import authority
from ops.grafana.build import FOLDER
from ops.grafana.drawing import draw
from ops.grafana.preview import ORDER, main, page, series_of, server_of, span_of
from ops.grafana.svg import Series

PANEL = {
    "targets": [
        {
            "expr": 'up{job="$job"}[$__rate_interval]', "legendFormat": "{{a}} of {{nobody}}", "refId": "A",
            "instant": False,
        },
        {"expr": "up", "legendFormat": "__auto", "refId": "B", "instant": True},
    ]
}  # fmt: skip


class Answers:
    """A Prometheus that notes what it is asked."""

    def __init__(self, result=(), jobs=("digits",)):
        self.asked, self._result, self._jobs = [], list(result), list(jobs)

    def ask(self, path, **parameters):
        self.asked.append((path, parameters))
        return {"result": self._result}

    def jobs(self):
        return self._jobs


class Away(Answers):
    """One that does not answer."""

    def ask(self, path, **parameters):
        raise OSError("connection refused")

    def jobs(self):
        return self.ask("jobs")


def test_the_variables_of_grafana_are_filled_in_and_series_are_named():
    prometheus = Answers([{"metric": {"a": "x"}, "values": [[1, "2"], [2, "NaN"]]}])
    ranged, instant = series_of(prometheus, PANEL, "digits", (1000.0, 4600.0), rate_s=20.0)
    assert prometheus.asked[0][1]["query"] == 'up{job="digits"}[20s]'
    assert [path for path, _ in prometheus.asked] == ["query_range", "query"]
    assert (ranged.name, instant.name) == ("x of ", "x")
    assert ranged.points[0] == (1.0, 2.0)


def test_a_long_span_widens_the_window_of_rates_with_its_steps():
    prometheus = Answers()
    series_of(prometheus, PANEL, "digits", (0.0, 86_400.0), rate_s=20.0)
    assert prometheus.asked[0][1]["query"].endswith("[360s]")


@pytest.mark.parametrize("error", [ValueError("too many points"), TimeoutError("too many points")])
def test_a_query_that_is_refused_is_said_in_its_panel_and_the_others_are_drawn(error):
    class Refuses(Answers):
        def ask(self, path, **parameters):
            if "count(fedmq_job_version" in parameters["query"]:
                return {"result": []}
            raise error

    text = page(Refuses(), "overview", "digits", 5.0)
    assert text.count('class="bad">too many points') > 5


def panel_of(kind):
    """Return a panel of a dashboard; of lines, one without thresholds' lines."""
    dashboards = (json.loads((FOLDER / f"{name}.json").read_text()) for name in ORDER)
    return next(panel for dashboard in dashboards for panel in dashboard["panels"] if panel["type"] == kind)


def drawn(kind, moments, span, across=None):
    panel = panel_of(kind)
    if across is not None:
        panel["fieldConfig"]["defaults"]["custom"]["spanNulls"] = across
    points = [(moment, 1.0 + moment % 7) for moment in moments]
    text = draw(panel, [Series("a", "A", {}, points)], span, 400, 200)
    return text.count("<polyline"), text.count("<polygon"), text.count("<circle")


@pytest.mark.parametrize("kind", ["timeseries", "stat"])
def test_a_line_and_its_area_end_at_a_gap_and_begin_again(kind):
    span = (1000.0, 1900.0)
    assert drawn(kind, range(1000, 1900, 10), span) == (1, 1, 0)
    assert drawn(kind, [*range(1000, 1200, 10), *range(1250, 1900, 10)], span) == (1, 1, 0), "60 s is no gap"
    assert drawn(kind, [*range(1000, 1200, 10), *range(1251, 1900, 10)], span) == (2, 2, 0)
    assert drawn(kind, [1000, 1010, 1500, 1890, 1900], span) == (2, 3, 1), "a point alone is a dot"


def test_values_that_are_none_are_a_gap():
    points = [(1000.0 + 10 * n, float("nan") if 20 <= n < 30 else 1.0) for n in range(60)]
    text = draw(panel_of("timeseries"), [Series("a", "A", {}, points)], (1000.0, 1600.0), 400, 200)
    assert text.count("<polyline") == 2


def test_neighbours_are_joined_when_a_step_is_longer_than_the_gap():
    day = (0.0, 86_400.0)
    assert drawn("timeseries", range(0, 86_400, 360), day) == (1, 1, 0)


@pytest.mark.parametrize(("across", "lines"), [(True, 1), (False, 2), (300_000, 1), (100_000, 2)])
def test_how_far_a_line_reaches_is_the_panels(across, lines):
    assert drawn("timeseries", [1000, 1003, 1250, 1253], (1000.0, 1900.0), across)[0] == lines


def test_a_page_is_as_wide_as_its_window():
    text = page(Answers([{"metric": {}, "values": [[time.time(), "1"]], "value": [1, "1"]}]), "overview", "digits", 5.0)
    assert max(map(int, re.findall(r"width:\s*(\d+)px", text)), default=0) <= 1280
    places = re.findall(r"left:([\d.]+)%;top:([\d.]+)%;width:([\d.]+)%;height:([\d.]+)%", text)
    assert len(places) == text.count('class="panel"') > 5
    assert all(float(x) + float(w) <= 100 and float(y) + float(h) <= 100 for x, y, w, h in places)
    assert re.search(r"<svg viewBox=", text)
    assert not re.search(r"<svg[^>]* width=", text)


@pytest.mark.parametrize(
    ("began_s", "shown_s"), [(None, 900), (5000, 900), (300, 300), (3, 60)], ids=["none", "long ago", "late", "now"]
)
def test_a_page_begins_where_the_job_does(began_s, shown_s):
    now = 1_700_000_000.0
    first = max(now - 900, now - began_s) if began_s else None
    prometheus = Answers([{"metric": {}, "values": [[first, "1"], [now, "1"]]}] if first else ())
    assert span_of(prometheus, "digits", 15.0, now) == (now - shown_s, now)
    asked = prometheus.asked[0][1]
    assert 'exported_job="digits"' in asked["query"]
    assert float(asked["start"]) == now - 900


@pytest.mark.parametrize("job", ["<job>", 'x"} or up{job="', ".*", ""])
def test_a_job_that_is_none_is_refused_before_it_becomes_part_of_a_query(job):
    prometheus = Answers()
    with pytest.raises(ValueError, match="must be of"):
        page(prometheus, "overview", job, 5.0)
    assert not prometheus.asked


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    """Return the files of a server's certificate, its key and its authority."""
    folder, now = tmp_path_factory.mktemp("tls"), authority.utc_now()
    signer = authority.make(now)[0]
    identity = signer.server("prometheus", ["127.0.0.1"], now)
    files = [folder / name for name in ("cert.pem", "key.pem", "ca.pem")]
    for path, text in zip(files, (identity.certificate, identity.key, signer.pem), strict=True):
        path.write_text(text)
    return files


@pytest.fixture
def listens():
    """Yield a starter of servers that give every request one answer."""
    servers = []

    def start(status, body, cert=None):
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                self.send_response(status)
                self.end_headers()
                self.wfile.write(body.encode())

            def log_message(self, *args):
                pass

        servers.append(ThreadingHTTPServer(("127.0.0.1", 0), Handler))
        servers[-1].handle_error = lambda *_: None
        if cert:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(*cert)
            servers[-1].socket = context.wrap_socket(
                servers[-1].socket, server_side=True, do_handshake_on_connect=False
            )
        threading.Thread(target=servers[-1].serve_forever, daemon=True).start()
        return f"127.0.0.1:{servers[-1].server_address[1]}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def ends(capsys, *arguments):
    """Return the exit code and the one line that is said."""
    with pytest.raises(SystemExit) as caught:
        main([str(argument) for argument in arguments])
    said = capsys.readouterr()
    assert not said.out
    assert said.err.count("\n") == 1, said.err
    return caught.value.code, said.err


@pytest.fixture
def served():
    """Yield a starter of servers; they end with the test."""
    servers = []

    def start(prometheus):
        servers.append(server_of(prometheus, 0, 5.0, 20.0))
        threading.Thread(target=servers[-1].serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{servers[-1].server_address[1]}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def get(url):
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def test_the_server_has_grafanas_health_and_every_dashboard(served):
    url = served(Answers())
    assert json.loads(get(f"{url}/api/health")[1])["database"] == "ok"
    for name in ("overview", "pipeline", "fleet", "safety"):
        status, text = get(f"{url}/d/{name}?job=digits&minutes=5")
        assert (status, "Job digits, last 5 minutes" in text) == (200, True)
    assert "Overview" in get(url)[1]


@pytest.mark.parametrize("path", ["/d/../../etc/passwd", "/d/nothing", "/favicon.ico"])
def test_what_is_no_dashboard_is_not_found(served, path):
    assert get(served(Answers()) + path)[0] == 404


@pytest.mark.parametrize("minutes", ["x", "nan", "-1", "0", "1e999"])
def test_minutes_that_are_none_are_refused(served, minutes):
    status, text = get(f"{served(Answers())}/d/overview?minutes={minutes}")
    assert status == 502
    assert "minutes" in text or "float" in text


def test_a_prometheus_that_is_away_is_said_and_health_stays_good(served):
    url = served(Away())
    assert get(f"{url}/d/overview") == (502, "connection refused\n")
    assert get(f"{url}/api/health")[0] == 200


def test_wrong_usage_ends_with_what_to_do(capsys):
    code, said = ends(capsys, "localhost:9090", "out.html")
    assert (code, "no URL of a Prometheus" in said) == (2, True)
    for wrong in (["--minutes", "0"], ["--minutes", "nan"], ["--job", "<x>"]):
        with pytest.raises(SystemExit) as caught:
            main(["http://127.0.0.1:1", "out.html", *wrong])
        assert (caught.value.code, wrong[0] in capsys.readouterr().err) == (2, True)
    with pytest.raises(SystemExit):
        main(["http://127.0.0.1:1"])
    assert "OUT.html or --serve PORT" in capsys.readouterr().err


JOB = ((), ("--job", "digits"))


@pytest.mark.parametrize("job", JOB, ids=["first", "given"])
def test_nobody_there_is_said_once_and_nothing_is_written(tmp_path, capsys, job):
    code, said = ends(capsys, "http://127.0.0.1:1", tmp_path / "out.html", *job)
    assert code == 3
    assert re.search(r"asked http://127\.0\.0\.1:1/api/v1/.*refused", said)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("job", JOB, ids=["first", "given"])
@pytest.mark.parametrize(
    ("status", "body"),
    [(400, "Client sent an HTTP request to an HTTPS server.\n"), (200, "<html>hello</html>"), (404, '{"detail": "no"}'),
     (200, "[1]"), (502, "")],
)  # fmt: skip
def test_who_is_no_prometheus_is_said_with_what_came(tmp_path, capsys, listens, status, body, job):
    where = listens(status, body)
    code, said = ends(capsys, f"http://{where}", tmp_path / "out.html", *job)
    assert code == 3
    for part in (f"asked http://{where}/api/v1/", str(status), repr(body.strip()), "is it https?", "--ca ca.pem"):
        assert part in said
    assert not list(tmp_path.iterdir())


def test_http_to_a_server_of_https_and_the_other_way_round(tmp_path, capsys, listens, certificate):
    cert, key, ca = certificate
    where = listens(200, "{}", (cert, key))
    code, said = ends(capsys, f"http://{where}", tmp_path / "out.html", "--job", "digits")
    assert (code, f"is it https? Then https://{where} --ca ca.pem" in said) == (3, True), said
    code, said = ends(capsys, f"https://{where}", tmp_path / "out.html", "--job", "digits")
    assert (code, "--ca ca.pem" in said) == (3, True), said
    code, said = ends(capsys, f"https://{listens(200, '{}')}", tmp_path / "out.html", "--ca", ca)
    assert (code, "is it https?" in said) == (3, True), said


def test_files_of_tls_that_are_not_there_or_none_are_named(tmp_path, capsys):
    (tmp_path / "none.pem").write_text("none")
    for name in ("missing.pem", "none.pem"):
        path = tmp_path / name
        for scheme in ("http", "https"):
            code, said = ends(capsys, f"{scheme}://127.0.0.1:1", tmp_path / "out.html", "--ca", path)
            assert (code, f"--ca {path}" in said) == (2, True)
        code, said = ends(capsys, "http://127.0.0.1:1", "--serve", 0, "--cert", path, "--key", path)
        assert (code, f"--cert {path}" in said) == (2, True)


def test_what_is_written_is_said_and_fits_its_frames(tmp_path, capsys, listens, certificate):
    cert, key, ca = certificate
    where = listens(200, '{"status": "success", "data": {"result": []}}', (cert, key))
    main([f"https://{where}", str(tmp_path / "x" / "out.html"), "--ca", str(ca), "--job", "digits"])
    said = capsys.readouterr().out
    written = {f"out{end}.html" for end in ("", *(f"-{name}" for name in ORDER))}
    assert {path.name for path in (tmp_path / "x").iterdir()} == written
    assert all(str(tmp_path / "x" / name) in said for name in written)
    assert "Job digits, last 15 minutes." in (tmp_path / "x" / "out-overview.html").read_text()
    index = (tmp_path / "x" / "out.html").read_text()
    assert len(re.findall(r'<iframe src="out-\w+\.html" style="height:calc\([\d.]+vw \+ 90px\)">', index)) == 4
    assert "iframe { display: block; width: 100%" in index
    assert not re.search(r'width[=:]"?\d+(px|")', index)
