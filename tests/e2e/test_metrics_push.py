"""Metrics of programs that cannot be scraped: a real Pushgateway, and the file of a textfile collector."""

import logging
import re
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.request

import pytest
from prometheus_client import CollectorRegistry, Counter
from prometheus_client.parser import text_string_to_metric_families

from ops import authority
from ops.servers import find_program, free_port
from shared import metrics_push
from shared.command import DONE
from shared.config import EvaluatorSettings, WorkerSettings, load
from shared.errors import SettingsError
from shared.metrics import NAMES
from tests.contract.faults import wait_until
from tests.e2e.test_worker_process import Fleet

BCRYPT = "$2b$04$wq5xBHLKhkDSaBZCRgqRruwzNHvZF5qzNkOZIAdD381EQ9Bv5kGmO"  # of te/st, with the least cost


class Gateway:
    """A Pushgateway of a test's own."""

    def __init__(self, folder, web=""):
        self.port, self._folder, self._web = free_port(), folder, web
        self.url = f"http://127.0.0.1:{self.port}"
        self.process = None

    def start(self):
        arguments = []
        if self._web:
            (self._folder / "web.yml").write_text(self._web)
            arguments = [f"--web.config.file={self._folder / 'web.yml'}"]
        self.process = subprocess.Popen(
            [find_program("prometheus-pushgateway"), f"--web.listen-address=127.0.0.1:{self.port}", *arguments],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        wait_until(self._answers, 20.0, lambda: "the Pushgateway does not answer")
        return self

    def stop(self):
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None

    def series(self):
        """Return (name, labels) -> value of all it holds."""
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=5) as answer:
            return series_of(answer.read().decode())

    def _answers(self):
        try:
            urllib.request.urlopen(f"{self.url}/-/ready", timeout=1).close()
        except urllib.error.HTTPError:
            return True
        except OSError:
            return False
        return True


def series_of(text):
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


@pytest.fixture
def gateway(tmp_path):
    gateway = Gateway(tmp_path).start()
    yield gateway
    gateway.stop()


@pytest.fixture
def fleet(processes, task, servers, job):
    return Fleet(processes, task, servers.rabbitmq.url, servers.redis.url, job)


def test_a_workers_metrics_are_in_the_gateway_under_its_name(fleet, gateway):
    fleet.aggregator(metrics_push_url=gateway.url, metrics_push_s=0.2)
    workers = [
        fleet.worker(client, updates_max=4, metrics_push_url=gateway.url + "/", metrics_push_s=0.2) for client in "ab"
    ]
    assert [worker.wait(60) for worker in workers] == [DONE, DONE]
    series = gateway.series()

    def value(name, job, instance, **labels):
        return series[name, frozenset({"job": job, "instance": instance, "exported_job": fleet.job, **labels}.items())]

    for client in "ab":  # pushed once more at the end: the last numbers are there
        assert value("fedmq_worker_published_total", "worker", client, outcome="confirmed") == 4
        assert value("fedmq_worker_outbox_updates", "worker", client) == 0
    applied = ("fedmq_updates_total", "aggregator", socket.gethostname())
    wait_until(
        lambda: gateway.series().get((applied[0], _labels(fleet.job, *applied[1:], outcome="applied"))) == 8, 30.0,
        lambda: str(gateway.series()),
    )  # fmt: skip
    families = {name for name, _ in series}
    for name in (*NAMES["worker"], *NAMES["aggregator"]):
        assert any(family.startswith(name) for family in families) or name in LABELLED, name


LABELLED = {  # nothing of it has happened: without a label there is no series
    "fedmq_updates_rejected_total", "fedmq_published_bytes_total", "fedmq_evaluation",
}  # fmt: skip


def _labels(fedmq_job, job, instance, **labels):
    return frozenset({"job": job, "instance": instance, "exported_job": fedmq_job, **labels}.items())


def test_the_file_holds_what_would_be_scraped(fleet, tmp_path):
    fleet.aggregator()
    path = tmp_path / "textfile" / "fedmq.prom"
    path.parent.mkdir()
    worker = fleet.worker(updates_max=3, metrics_file=path, metrics_push_s=0.1)
    seen, torn = set(), []
    while worker.popen.poll() is None:  # whenever it is read it is whole
        if path.exists():
            text = path.read_text()
            torn += [text] if not text.endswith("\n") else []
            seen.add(series_of(text).get(("fedmq_worker_model_version", frozenset({("job", fleet.job)}))))
    assert worker.wait() == DONE
    assert not torn
    series = series_of(path.read_text())
    confirmed = ("fedmq_worker_published_total", frozenset({("job", fleet.job), ("outcome", "confirmed")}))
    assert series[confirmed] == 3
    assert [file.name for file in path.parent.iterdir()] == ["fedmq.prom"]


# --- what goes wrong


def registry_of():
    registry = CollectorRegistry()
    Counter("fedmq_worker_returned", "x", registry=registry).inc(5)
    return registry


def push(**given):
    settings = load(WorkerSettings, {"job": "j", "client_id": "a", "metrics_push_s": "0.05"} | given)
    return metrics_push.start(registry_of(), settings, "worker", "a")


RETURNED = ("fedmq_worker_returned_total", frozenset({"job": "worker", "instance": "a", "exported_job": "j"}.items()))


def test_a_gateway_that_is_away_is_named_once_and_served_when_it_is_back(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    gateway = Gateway(tmp_path)
    stop = push(metrics_push_url=gateway.url)
    wait_until(lambda: "cannot be pushed" in caplog.text, 10.0, lambda: caplog.text)
    time.sleep(0.5)  # ten more attempts
    assert caplog.text.count("cannot be pushed") == 1
    assert "Connection refused" in caplog.text
    gateway.start()
    wait_until(lambda: "it works again" in caplog.text, 10.0, lambda: caplog.text)
    assert gateway.series()[RETURNED] == 5
    stop()
    gateway.stop()


def test_the_login_stands_in_the_url_and_in_no_log(tmp_path, caplog):
    web = f"basic_auth_users:\n  fleet: {BCRYPT}\n"
    gateway = Gateway(tmp_path, web).start()
    stop = push(metrics_push_url=gateway.url.replace("//", "//fleet:not%2Fit@"))
    wait_until(lambda: "cannot be pushed" in caplog.text, 20.0, lambda: caplog.text)
    stop()
    assert "401 Unauthorized" in caplog.text
    assert "not/it" not in caplog.text
    assert "not%2Fit" not in caplog.text
    caplog.clear()
    push(metrics_push_url=gateway.url.replace("//", "//fleet:te%2Fst@"))()
    assert not caplog.text
    gateway.stop()


def test_over_tls_the_gateway_has_to_prove_who_it_is(tmp_path, caplog):
    signer, _ = authority.make(authority.utc_now())
    (tmp_path / "ca.pem").write_text(signer.pem)
    identity = signer.server("gateway", ["localhost"], authority.utc_now())
    (tmp_path / "server.pem").write_text(identity.certificate)
    (tmp_path / "server.key").write_text(identity.key)
    files = f"  cert_file: {tmp_path / 'server.pem'}\n  key_file: {tmp_path / 'server.key'}\n"
    gateway = Gateway(tmp_path, f"tls_server_config:\n{files}").start()
    url = f"https://localhost:{gateway.port}"
    push(metrics_push_url=url)()
    assert "its certificate is not signed by the authority in FEDMQ_TLS_CA" in caplog.text
    caplog.clear()
    push(metrics_push_url=url, tls_ca=str(tmp_path / "ca.pem"))()
    assert not caplog.text
    gateway.stop()


def test_a_gateway_that_never_answers_holds_up_nobody(caplog):
    with socket.socket() as deaf:
        deaf.bind(("127.0.0.1", 0))
        deaf.listen()
        before = time.monotonic()
        stop = push(metrics_push_url=f"http://127.0.0.1:{deaf.getsockname()[1]}")
        assert time.monotonic() - before < 1
        stop()
        assert time.monotonic() - before < 3 * metrics_push.ANSWER_S_MAX
    assert not [t for t in threading.enumerate() if t.name == "metrics push"] or "timed out" in caplog.text


def test_a_collector_that_fails_once_ends_nothing(tmp_path, caplog):
    class Failing:
        left = 1

        def collect(self):
            if self.left:
                self.left -= 1
                raise ZeroDivisionError("a rate of nothing")
            return iter(())

    caplog.set_level(logging.INFO)
    registry = CollectorRegistry()
    registry.register(Failing())
    settings = WorkerSettings(metrics_file=tmp_path / "fedmq.prom", metrics_push_s=1.0)
    stop = metrics_push.start(registry, settings, "worker", "phone")
    wait_until(lambda: "it works again" in caplog.text, 10.0, lambda: caplog.text)
    stop()
    assert "ZeroDivisionError: a rate of nothing; trying on" in caplog.text


def test_a_folder_that_is_not_there_is_named_once(tmp_path, caplog):
    stop = push(metrics_file=str(tmp_path / "none" / "fedmq.prom"))
    wait_until(lambda: "cannot be written" in caplog.text, 10.0, lambda: caplog.text)
    stop()
    assert caplog.text.count("cannot be written") == 1


@pytest.mark.parametrize(
    ("name", "value", "what"),
    [
        ("metrics_push_url", "gateway:9091", "expected http://host:9091"),
        ("metrics_push_url", "http://a:se/cret@host:9091", "port is no number"),
        ("metrics_file", "metrics.txt", "must end in .prom"),
        ("metrics_push_s", "0", "greater than 0"),
    ],
)
def test_wrong_settings_are_found_at_the_start(name, value, what):
    with pytest.raises(SettingsError, match=re.escape(what)) as caught:
        load(EvaluatorSettings, {name: value})
    assert "se/cret" not in str(caught.value)
