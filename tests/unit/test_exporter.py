"""What `fedmq exporter` shows, and what it says when there is nothing to see."""

import queue
import socket
import ssl
import threading
import time
from datetime import timedelta

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from ops.authority import make, utc_now
from ops.exporter import Certificates, Observer
from ops.exporter_metrics import EVALUATIONS_MAX, Found, Installation, count_fleet, shortened
from ops.handshake import certificate_end
from ops.servers import free_port
from shared.config import ExporterSettings
from shared.errors import StoreUnavailable
from shared.metrics import NAMES, serve
from shared.store.redis_watch import JobFacts

NOW = 1_000_000.0


def facts(**changes):
    head = {"version": "7", "revision": "9", "created_at": str(time.time() - 60)}
    given = {
        "head": head, "totals": {"applied": 5}, "buffered": 2, "evaluated": 6, "evaluation": {"accuracy": 0.9},
        "contributions": {"a": 3, "b": 1},
    }  # fmt: skip
    return JobFacts(**given | changes)


def shown(installation):
    registry = CollectorRegistry()
    registry.register(installation)
    lines = generate_latest(registry).decode().splitlines()
    return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines if not line.startswith("#")}


def installation(**found):
    shows = Installation(5.0, lambda: True)
    shows.found = Found(time.monotonic(), True, **found)
    return shows


def test_the_documented_names_are_the_exposed_ones_also_when_nothing_was_found():
    registry = CollectorRegistry()
    registry.register(Installation(5.0, lambda: False))
    lines = generate_latest(registry).decode().splitlines()
    assert {line.split()[2] for line in lines if line.startswith("# TYPE")} == set(NAMES["exporter"])


def test_a_job_is_shown_with_its_totals_and_who_contributes():
    values = shown(installation(durable=True, jobs={"digits": facts()}))
    assert values['fedmq_job_version{job="digits"}'] == 7
    assert values['fedmq_job_updates_total{job="digits",outcome="applied"}'] == 5
    assert values['fedmq_job_updates_total{job="digits",outcome="rejected"}'] == 0, "a rate needs its zero"
    assert values['fedmq_fleet_top_share{job="digits"}'] == 0.75
    assert values['fedmq_fleet_contributors{job="digits"}'] == 2
    assert 59 < values['fedmq_job_head_age_seconds{job="digits"}'] < 70
    assert values["fedmq_store_durable"] == 1


def test_a_job_that_nobody_contributed_to_or_evaluated_has_no_share_and_no_evaluation():
    values = shown(installation(jobs={"new": facts(contributions={}, evaluation={}, evaluated=-1)}))
    assert not [name for name in values if "top_share" in name or "evaluat" in name]


def test_a_store_that_does_not_answer_is_a_zero_and_no_job():
    shows = installation(durable=True, jobs={"digits": facts()})
    shows.found = Found(time.monotonic())
    values = shown(shows)
    assert values["fedmq_store_up"] == 0
    assert "fedmq_store_durable" not in values, "nobody knows"
    assert not [name for name in values if "fedmq_job" in name]


def test_what_was_found_long_ago_is_not_shown_as_if_it_were_now():
    shows = Installation(0.1, lambda: True)
    shows.found = Found(time.monotonic() - 60, True, True, {"digits": facts()})
    assert shown(shows)["fedmq_store_up"] == 0


def test_no_label_names_a_client():
    shows = installation(jobs={"digits": facts(contributions={"phone-17": 2})})
    registry = CollectorRegistry()
    registry.register(shows)
    assert b"phone-17" not in generate_latest(registry)


def test_audit_events_are_counted_from_zero():
    shows = installation()
    shows.count_events({"login_failed": 3, "other": 1})
    shows.count_events({"login_failed": 1})
    values = shown(shows)
    assert values['fedmq_audit_events_total{kind="login_failed"}'] == 4
    assert values['fedmq_audit_events_total{kind="revoked"}'] == 0


def test_many_metrics_are_cut_and_those_of_classes_go_first():
    metrics = {f"accuracy_class_{n}": 0.5 for n in range(1000)} | {"loss": 1.0, "accuracy": 0.5}
    names = shortened(metrics)
    assert len(names) == EVALUATIONS_MAX
    assert names[:2] == ["loss", "accuracy"]


def test_the_fleet_is_counted_by_when_it_was_heard_and_how_far_behind_it_was():
    clients = [
        ("a", {"seen": NOW - 10, "base_version": 100}),
        ("b", {"seen": NOW - 300, "base_version": 97}),
        ("c", {"seen": NOW - 1800, "base_version": 40}),
        ("d", {"seen": NOW - 7200, "base_version": 1}),  # not of the last hour: its version says nothing of now
        ("e", {"seen": NOW - 30}),  # rejected before its version was known
    ]
    fleet = count_fleet(iter(clients), {}, 100, NOW, 86_400)
    assert fleet.seen == {"1m": 2, "10m": 3, "1h": 4, "1d": 5, "ever": 5}
    assert {name: count for name, count in fleet.behind.items() if count} == {"0": 1, "2-3": 1, "31-100": 1}


def test_a_device_is_silent_when_it_was_heard_of_long_ago_and_not_when_it_never_was():
    devices = {"heard": NOW + 9e6, "mute": None, "new": NOW + 8e6, "gone-quiet": None}
    clients = [("heard", {"seen": NOW - 5}), ("gone-quiet", {"seen": NOW - 2e5}), ("stranger", {"seen": NOW})]
    fleet = count_fleet(clients, devices, 0, NOW, 86_400)
    assert (fleet.enrolled, fleet.silent, fleet.never_heard) == (4, 1, 2)
    assert fleet.certificate_ends_at == NOW + 8e6
    values = shown(installation(fleets={"digits": fleet, "bare": count_fleet([], {}, 0, NOW, 1.0)}))
    ends = {name: value for name, value in values.items() if "devices_certificate" in name}
    assert ends == {'fedmq_devices_certificate_expiry_timestamp_seconds{job="digits"}': NOW + 8e6}


def test_a_client_from_far_behind_is_counted_whatever_it_says():
    fleet = count_fleet([("a", {"seen": NOW, "base_version": -(10**30)})], {}, 100, NOW, 1.0)
    assert fleet.behind["over 100"] == 1


class Watch:
    """A store with one job, that can be down."""

    def __init__(self):
        self.down = False
        self.walks = 0

    def jobs(self):
        if self.down:
            raise StoreUnavailable("Redis is away")
        return ["digits"]

    def facts(self, job):
        if self.down:
            raise StoreUnavailable("Redis is away")
        return facts()

    def clients(self, job):
        self.walks += 1
        return iter([("a", {"seen": time.time()}), ("b", {"seen": time.time()})])

    def devices(self):
        return iter([
            ("digits.a", {"state": "enrolled"}), ("digits.b", {"state": "revoked"}), ("other.c", {"state": "enrolled"}),
        ])  # fmt: skip

    def audit_counts(self):
        return {}

    def durable(self):
        return False


def observer():
    watch, shows = Watch(), Installation(5.0, lambda: True)
    settings = ExporterSettings(refresh_s=5.0)
    return watch, shows, Observer(settings, watch, shows)


def test_only_devices_of_the_job_that_are_not_revoked_are_enrolled():
    _, shows, looks = observer()
    looks.look()
    assert shown(shows)['fedmq_devices_enrolled{job="digits"}'] == 1
    assert shown(shows)["fedmq_store_durable"] == 0


def test_all_clients_are_walked_over_only_now_and_then():
    watch, _, looks = observer()
    for _ in range(6):
        looks.look()
    assert watch.walks == 1
    watch.down = True
    looks.look()
    watch.down = False
    looks.look()
    assert watch.walks == 2, "after the store was away nobody knows"


def test_a_store_that_comes_back_is_shown_again():
    watch, shows, looks = observer()
    looks.look()
    watch.down = True
    looks.look()
    assert shown(shows)["fedmq_store_up"] == 0
    watch.down = False
    looks.look()
    values = shown(shows)
    assert (values["fedmq_store_up"], values['fedmq_job_version{job="digits"}']) == (1, 7)


@pytest.fixture
def tls_server(tmp_path):
    """Yield a starter of TLS servers with a certificate that was made at a given time; how each caller left."""
    listening = []
    left = queue.Queue()

    def start(made_at):
        signer, _ = make(made_at)
        identity = signer.server("store", ["some.other.host"], made_at)
        for name, text in (("ca.pem", signer.pem), ("server.pem", identity.certificate), ("server.key", identity.key)):
            (tmp_path / name).write_text(text)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(tmp_path / "server.pem", tmp_path / "server.key")
        server = socket.create_server(("127.0.0.1", 0))
        listening.append(server)

        def serve():
            while True:
                try:
                    plain, _ = server.accept()
                except OSError:
                    return
                try:
                    with context.wrap_socket(plain, server_side=True, suppress_ragged_eofs=False) as secured:
                        left.put("farewell" if secured.recv(1) == b"" else "something else")
                except OSError:
                    left.put("hung up")
                    plain.close()

        threading.Thread(target=serve, daemon=True).start()
        return f"rediss://127.0.0.1:{server.getsockname()[1]}/0?ca_file={tmp_path / 'ca.pem'}"

    start.left = left
    yield start
    for server in listening:
        server.close()


def test_the_end_of_a_certificate_is_seen_whatever_host_it_is_for(tls_server):
    url = tls_server(utc_now())
    assert certificate_end(url, NOW) == pytest.approx(time.time() + 365 * 86_400, abs=100)
    assert tls_server.left.get(timeout=5) == "farewell", "RabbitMQ would wait ten seconds and log an error"


def test_a_certificate_that_has_ended_ends_now(tls_server):
    url = tls_server(utc_now() - timedelta(days=400))
    assert certificate_end(url, NOW) == NOW


def test_without_tls_there_is_no_certificate():
    assert certificate_end("redis://127.0.0.1:1/0", NOW) is None
    assert certificate_end("amqp://127.0.0.1:1/fedmq", NOW) is None


def test_our_own_port_is_looked_at_as_it_serves_and_a_server_that_is_away_is_named_once(tls_server, tmp_path, caplog):
    shows, port = installation(), free_port()
    certificate, key = tmp_path / "server.pem", tmp_path / "server.key"
    store = tls_server(utc_now())
    stop = serve(CollectorRegistry(), port, lambda: None, str(certificate), str(key))
    try:
        certificate.write_text("renewed on disk, but not served yet")
        broker = store.replace("rediss://", "amqps://").replace(store.split(":")[2].split("/")[0], "1")
        settings = ExporterSettings(
            store_url=store, broker_url=broker, metrics_port=port, metrics_cert=str(certificate), metrics_key=str(key)
        )
        certificates = Certificates(settings, shows)
        for _ in range(3):
            certificates.look()
    finally:
        stop()
    in_a_year = pytest.approx(time.time() + 365 * 86_400, abs=100)
    assert shows.certificates == {"redis": in_a_year, "exporter": in_a_year}
    assert ["the certificate of rabbitmq cannot be seen" in text for text in caplog.messages] == [True]
