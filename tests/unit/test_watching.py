"""Alerts and dashboards as files: valid, documented, and about metrics that exist."""

import json
import re
import subprocess
from pathlib import Path

import pytest

from ops.grafana.build import FOLDER, texts
from ops.grafana.drawing import draw
from ops.grafana.svg import Series, text_of
from ops.servers import find_program
from shared.metrics import NAMES

ROOT = Path(__file__).parents[2]
ALERTS = (ROOT / "ops/prometheus/alerts.yml").read_text()
GUIDE = (ROOT / "ops/guides/watch.md").read_text()
DASHBOARDS = {path.stem: json.loads(path.read_text()) for path in FOLDER.glob("*.json")}
# Seen on the real exporters: RabbitMQ 3.10 to 4.2 (rabbitmq_prometheus), redis_exporter 1.45 to 1.74.
FOREIGN = {
    "rabbitmq_detailed_queue_messages", "rabbitmq_detailed_queue_messages_ready",
    "rabbitmq_detailed_queue_messages_unacked", "rabbitmq_detailed_queue_consumers",
    "rabbitmq_global_messages_received_total", "rabbitmq_global_messages_delivered_total",
    "rabbitmq_global_messages_acknowledged_total", "rabbitmq_global_messages_redelivered_total",
    "rabbitmq_alarms_memory_used_watermark", "rabbitmq_alarms_free_disk_space_watermark",
    "rabbitmq_alarms_file_descriptor_limit", "rabbitmq_process_resident_memory_bytes",
    "rabbitmq_resident_memory_limit_bytes", "rabbitmq_auth_attempts_failed_total", "redis_memory_used_bytes",
    "redis_aof_current_size_bytes", "redis_aof_delayed_fsync", "redis_blocked_clients", "redis_total_error_replies",
}  # fmt: skip
METRIC = re.compile(r"\b((?:fedmq|rabbitmq|redis)_[a-z_]+)\b")
OURS = {name for names in NAMES.values() for name in names}


def alert_names():
    return re.findall(r"- alert: (\w+)", ALERTS)


def expressions():
    found = [("alerts", part) for part in re.findall(r"expr: (.*?)(?=\n +(?:for|labels):)", ALERTS, re.S)]
    for name, dashboard in DASHBOARDS.items():
        found += [(name, target["expr"]) for panel in dashboard["panels"] for target in panel.get("targets", ())]
    return found


def test_prometheus_itself_accepts_the_rules():
    command = [find_program("promtool"), "check", "rules", str(ROOT / "ops/prometheus/alerts.yml")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{len(alert_names())} rules found" in done.stdout


QUEUE = '{queue="fedmq.updates.j"}'
NO_CONSUMER = {f"rabbitmq_detailed_queue_consumers{QUEUE}": "0x200", 'up{job="aggregator"}': "1x200"}


def fires(tmp_path, alert, series, after="50m"):
    """Return the summaries with which an alert fires after some time of these series."""
    rules = tmp_path / "alerts.yml"
    rules.write_text(ALERTS)
    given = [{"series": name, "values": values} for name, values in series.items()]
    # Of what is expected, nothing: promtool says what there is instead.
    case = {"interval": "30s", "input_series": given, "alert_rule_test": [{"eval_time": after, "alertname": alert}]}
    (tmp_path / "test.yml").write_text(json.dumps({"rule_files": [str(rules)], "tests": [case]}))
    command = [find_program("promtool"), "test", "rules", str(tmp_path / "test.yml")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    said = done.stdout + done.stderr
    assert (done.returncode == 0) == ("FAILED" not in said), said
    return re.findall(r'summary="([^"]*)"', said)


def test_the_queue_of_a_former_job_is_no_alarm(tmp_path):
    totals = 'fedmq_job_updates_total{exported_job="j",outcome="applied"}'
    empty = NO_CONSUMER | {f"rabbitmq_detailed_queue_messages{QUEUE}": "0x200", totals: "300x200"}
    assert fires(tmp_path, "NoAggregator", empty) == []
    said = ["No aggregator works on fedmq.updates.j"]
    assert fires(tmp_path, "NoAggregator", empty | {f"rabbitmq_detailed_queue_messages{QUEUE}": "3x200"}) == said
    busy = empty | {totals: "0+10x40 400x160"}
    assert fires(tmp_path, "NoAggregator", busy) == said, "it had updates within an hour"
    assert fires(tmp_path, "NoAggregator", busy, "95m") == []
    assert fires(tmp_path, "NoAggregator", busy | {f"rabbitmq_detailed_queue_consumers{QUEUE}": "1x200"}) == []


def test_the_end_of_a_devices_certificate_is_told_as_that_of_a_server(tmp_path):
    device = 'fedmq_devices_certificate_expiry_timestamp_seconds{exported_job="j"}'
    server = 'fedmq_certificate_expiry_timestamp_seconds{server="redis"}'
    assert fires(tmp_path, "CertificateNearEnd", {device: "99999999x200", server: "99999999x200"}) == []
    assert fires(tmp_path, "CertificateNearEnd", {device: "999999x200", server: "99999999x200"}) == [
        "The certificate of a device of job j ends soon"
    ]
    assert fires(tmp_path, "CertificateNearEnd", {server: "999999x200"}) == ["The certificate of redis ends soon"]


@pytest.mark.parametrize("name", alert_names())
def test_every_alert_has_its_runbook(name):
    block = re.search(rf"- alert: {name}\n(.*?)(?=\n +- alert:|\n  - name:|\Z)", ALERTS, re.S)[1]
    assert f"runbook: ops/guides/watch.md#{name.lower()}" in block
    for part in ("for:", "severity:", "summary:", "description:"):
        assert part in block, part
    assert "$value" in block, "a description without its number"
    section = re.search(rf"^#+ {name}\n(.*?)(?=^#+ |\Z)", GUIDE, re.S | re.M)
    assert section, f"watch.md has no section {name}"
    assert "```sh" in section[1] or "`" in section[1], "a runbook says what to type"


def test_the_guide_tells_of_no_alert_that_is_gone():
    part = GUIDE[GUIDE.index("## Alerts") :]
    assert set(re.findall(r"^### (\w+)$", part, re.M)) == set(alert_names())


def test_every_metric_of_a_query_exists():
    for where, expression in expressions():
        for name in METRIC.findall(re.sub(r'"[^"]*"', '""', expression)):
            base = re.sub(r"_(bucket|sum|count)$", "", name)
            assert {name, base} & (OURS | FOREIGN), f"{where}: {name}"


def test_every_metric_of_ours_is_shown_or_watched():
    used = {name for _, expression in expressions() for name in METRIC.findall(expression)}
    used |= {re.sub(r"_(bucket|sum|count)$", "", name) for name in used}
    only_here = {  # the exporter shows the same of all jobs, also while an aggregator or evaluator is down
        "fedmq_model_version", "fedmq_evaluation", "fedmq_evaluated_version",
        "fedmq_job_evaluated_version", "fedmq_job_revision", "fedmq_job_head_age_seconds",
        "fedmq_published_bytes_total", "fedmq_worker_model_version",
    }  # fmt: skip
    assert OURS - used == only_here


def test_the_guide_explains_every_metric():
    assert {name for name in OURS if f"`{name}" not in GUIDE} == set()


def test_the_committed_dashboards_are_what_their_description_makes():
    assert {path.name: path.read_text() for path in FOLDER.glob("*.json")} == texts()


@pytest.mark.parametrize("name", DASHBOARDS)
def test_a_dashboard_is_what_grafana_wants(name):
    dashboard = DASHBOARDS[name]
    assert dashboard["schemaVersion"] == 39
    ids = [panel["id"] for panel in dashboard["panels"]]
    assert len(ids) == len(set(ids))
    taken = set()
    for panel in dashboard["panels"]:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24, panel["title"]
        cells = {(x, y) for x in range(place["x"], place["x"] + place["w"])
                 for y in range(place["y"], place["y"] + place["h"])}  # fmt: skip
        assert not cells & taken, f"{panel['title']} overlaps"
        taken |= cells
        assert panel["description"] and panel["targets"], panel["title"]
        assert panel["datasource"]["uid"] == "${datasource}"
        assert panel["fieldConfig"]["defaults"]["unit"]
        refs = [target["refId"] for target in panel["targets"]]
        assert len(refs) == len(set(refs))


def series(name, values, labels=None, query="A"):
    return Series(name, query, labels or {}, [(1000.0 + 10 * n, value) for n, value in enumerate(values)])


def panels():
    return [(name, panel) for name, dashboard in DASHBOARDS.items() for panel in dashboard["panels"]]


@pytest.mark.parametrize(("name", "panel"), panels(), ids=lambda x: x["title"] if isinstance(x, dict) else x)
@pytest.mark.parametrize("values", [(1.0, 1.0, 0.0), (float("nan"), 3.0), (float("nan"),), (0.0,), (1e12, -5.0)])
def test_the_preview_draws_every_panel_whatever_the_values(name, panel, values):
    found = [series("a<b>", values, {"le": bound, "alertname": "<x>"}) for bound in ("0.1", "1", "+Inf")]
    drawn = draw(panel, found, (1000.0, 1100.0), 400, 200)
    assert "nan" not in drawn
    assert "<b>" not in drawn, "a label is not escaped"
    assert draw(panel, [], (1000.0, 1100.0), 400, 200).endswith(f">{panel['fieldConfig']['defaults']['noValue']}</div>")


@pytest.mark.parametrize(
    ("value", "unit", "decimals", "text"),
    [
        (0.1234, "percentunit", 1, "12.3 %"), (1536.0, "decbytes", None, "1.54 kB"), (2e6, "Bps", None, "2 MB/s"),
        (90.0, "s", None, "1.5 min"), (0.0025, "s", None, "2.5 ms"), (3.0, "ops", 1, "3.0 /s"), (0.0, "s", 0, "0 s"),
        (float("nan"), "short", 0, "-"), (1234567.0, "short", 0, "1.23 Mil"),
    ],
)  # fmt: skip
def test_values_are_written_with_their_unit(value, unit, decimals, text):
    assert text_of(value, unit, decimals) == text
