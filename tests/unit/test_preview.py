"""The dashboards without Grafana: what the page and its server say when Prometheus answers, and when it does not."""

import json
import threading
import urllib.error
import urllib.request

import pytest

from ops.grafana.preview import Prometheus, main, page, series_of, server_of

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


def test_a_query_that_fails_is_said_in_its_panel_and_the_others_are_drawn():
    text = page(Away(), "overview", "digits", 5.0)
    assert text.count('class="bad">connection refused') > 5


@pytest.mark.parametrize("job", ["<job>", 'x"} or up{job="', ".*", ""])
def test_a_job_that_is_none_is_refused_before_it_becomes_part_of_a_query(job):
    prometheus = Answers()
    with pytest.raises(ValueError, match="must be of"):
        page(prometheus, "overview", job, 5.0)
    assert not prometheus.asked


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
    with pytest.raises(SystemExit, match="no URL of a Prometheus"):
        Prometheus("localhost:9090")
    with pytest.raises(SystemExit):
        main(["http://127.0.0.1:1"])
    assert "OUT.html or --serve PORT" in capsys.readouterr().err
    with pytest.raises(SystemExit, match=r"Prometheus at http://127\.0\.0\.1:1: .*refused"):
        main(["http://127.0.0.1:1", "out.html"])
