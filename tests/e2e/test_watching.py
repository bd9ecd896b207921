"""Dashboards and alerts against a real run: every panel shows data, every alert fires in the failure it names.

One installation for the whole file (`watching_lab.py`); the tests run in the order they stand here, and each leaves the
installation well again.
"""

import contextlib
import json
import math
import re
import signal
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pika
import pytest
import redis

from ops import authority
from ops.grafana.build import FOLDER
from ops.grafana.preview import ORDER, Prometheus, page, series_of
from shared.messages import CONTENT_TYPE, encode
from shared.model_image import ModelImage
from shared.store.redis_link import connect
from shared.transport.link import parameters
from tests.builders import update_of
from tests.e2e.conftest import Processes
from tests.e2e.watching_lab import RULES, Lab

TASK = """
import time
from pathlib import Path

import numpy as np

from worker.task import TrainResult

HERE = Path(__file__).parent


def build():
    return {"w": np.zeros(2000, np.float32)}


def train(model, context):
    if (HERE / "fail").exists() and context.client == "w1":
        raise ValueError("the sensor is gone")
    time.sleep(0.1)
    model["w"] += np.random.default_rng(context.seed).normal(size=2000).astype(np.float32) * 1e-3
    return TrainResult(5, 2, {"loss": 0.5})


def evaluate(model, context):
    falls = (HERE / "fall").exists()
    return {"accuracy": 0.5 if falls else 0.9, "loss": 0.4, "accuracy_class_0": 0.9}
"""
STALENESS_MAX = 30


class Installed(Lab):
    """The lab with a job of plain numpy, and what the tests do to it."""

    def begin(self) -> None:
        """Start everything, and wait until versions are made."""
        self.start_servers()
        self.task = self.folder / "watched_task.py"
        self.task.write_text(TASK)
        self.store: Any = connect(self.servers.url("operator", "store_url"), 10.0)
        self.enroll("w0", "w1")
        initial = self.folder / "initial.safetensors"
        initial.write_bytes(ModelImage.of({"w": np.zeros(2000, np.float32)}).data.tobytes())
        self.aggregator("a0", init_model=initial)
        self.evaluator()
        self.exporter()
        self.start_prometheus()
        self.until(lambda: self.head("version") >= 0, 60.0, "no version 0")
        self.aggregator("a1")
        for name in ("w0", "w1"):
            self.program(
                name, "worker", home="operator", client_id=name, task=self.task, state_dir=self.folder / name,
                outbox_updates_max=50, confirm_timeout_s=2,
            )  # fmt: skip
        self.until(lambda: self.head("version") >= 3, 60.0, "no version 3")

    def aggregator(self, name: str, **settings: Any) -> None:
        """Start an aggregator."""
        own = {"buffer_size": 2, "commit_interval_s": 0.2, "commit_age_max_s": 1, "staleness_max": STALENESS_MAX}
        self.program(name, "aggregator", codec="balanced", **own, **settings)

    def evaluator(self) -> None:
        """Start the evaluator."""
        self.program("evaluator", "evaluator", task=self.task, poll_s=0.1)

    def exporter(self) -> None:
        """Start the exporter."""
        self.program("exporter", "exporter", refresh_s=0.5, silent_s=20)

    def enroll(self, *clients: str) -> None:
        """Write devices into the registry, as `fedmq devices enroll` does."""
        for client in clients:
            record = {"state": "enrolled", "job": self.job, "client": client, "enrolled_at": time.time() - 3600}
            self.store.hset("fedmq:installation:devices", f"{self.job}.{client}", json.dumps(record))

    def head(self, field: str) -> int:
        """Return a number of the job's head, -1 while there is none."""
        value = self.store.hget(f"fedmq:{{{self.job}}}:head", field)
        return -1 if value is None else int(value)

    @contextlib.contextmanager
    def channel(self) -> Iterator[Any]:
        """Open a channel to the broker."""
        connection = pika.BlockingConnection(parameters(self.servers.url("operator", "broker_url"), "a test"))
        try:
            yield connection.channel()
        finally:
            with contextlib.suppress(pika.exceptions.AMQPError):
                connection.close()

    def message(self, base_version: int, sequence: int, client: str = "stranger") -> tuple[str, bytes]:
        """Return id and bytes of a good update from a version."""
        delta = np.full(2000, 1e-4, np.float32)
        update_id = f"{client}/{uuid.uuid4().hex[:8]}/{sequence}"
        update = update_of(
            delta, job=self.job, update_id=update_id, client=client, base_version=base_version, created_at=time.time()
        )
        return update_id, encode(update)

    def publish(self, channel: Any, update_id: str, body: bytes, client: str = "stranger") -> None:
        """Publish a message."""
        properties = pika.BasicProperties(
            delivery_mode=2, content_type=CONTENT_TYPE, message_id=update_id, type="update"
        )
        channel.basic_publish("fedmq.updates", f"update.{self.job}.{client}", body, properties)


@pytest.fixture(autouse=True)
def quiet(caplog: pytest.LogCaptureFixture) -> None:
    """Keep pika's tale of each refused login out of a failure's output."""
    caplog.set_level("CRITICAL", logger="pika")


@contextlib.contextmanager
def again_and_again(act: Callable[[], None], pause_s: float) -> Iterator[None]:
    """Repeat something in a thread for as long as the block lasts."""
    stop, problems = threading.Event(), []

    def loop() -> None:
        try:
            while not stop.wait(pause_s):
                act()
        except Exception as error:
            problems.append(error)

    thread = threading.Thread(target=loop, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(20)
    assert not problems, problems


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Installed]:
    """Yield a running installation."""
    folder = tmp_path_factory.mktemp("watched")
    processes = Processes(folder)
    running = Installed(folder, processes, "watched")
    try:
        running.begin()
        yield running
    finally:
        processes.end()
        running.stop()


def test_prometheus_loads_every_rule_and_nothing_fires_while_all_is_well(lab: Installed) -> None:
    groups = lab.get("/api/v1/rules")["data"]["groups"]
    loaded = {rule["name"] for group in groups for rule in group["rules"]}
    assert loaded == set(re.findall(r"- alert: (\w+)", RULES.read_text()))
    lab.until(lambda: {one["value"][1] for one in lab.query("up")} == {"1"}, 60.0, "something is not scraped")
    lab.until(lambda: not lab.firing(), 30.0, lambda: f"fires: {lab.firing()}")
    problems = [rule["lastError"] for group in lab.get("/api/v1/rules")["data"]["groups"] for rule in group["rules"]
                if rule.get("lastError")]  # fmt: skip
    assert not problems


def test_status_watch_shows_what_moves_until_it_is_left(lab: Installed) -> None:
    screen = lab.program("status", "status", "--watch", "--every-s", "0.5", home="operator")
    before = lab.head("version")
    lab.until(lambda: lab.head("version") > before + 5, 60.0, "nothing moves")
    time.sleep(2)  # a few looks
    screen.popen.send_signal(signal.SIGINT)
    assert screen.wait() == 0
    shown = screen.log()
    for part in (
        r"version +\d+", r"speed +[\d.]+ applied/s", r"curve +[▁▂▃▄▅▆▇█]{2,} +accuracy", "2 enrolled, none silent",
        "moving: ", r"accuracy 0.9, loss 0.4, \+1 more",
    ):  # fmt: skip
        assert re.search(part, shown), f"{part} is not in\n{shown}"


def test_refusals_failures_and_what_falls_are_told_and_every_panel_shows_data(lab: Installed) -> None:
    old = lab.message(lab.head("version"), 0)
    lab.until(lambda: lab.head("version") > STALENESS_MAX + 5, 60.0, "too few versions")
    broker = lab.servers.url("operator", "broker_url").replace("fedmq-operator:", "fedmq-operator:wrong")

    def bad_traffic() -> None:
        head = lab.head("version")
        with lab.channel() as channel:
            for number in range(4):
                lab.publish(channel, f"stranger/garbage/{uuid.uuid4().hex}", b"garbage")
                lab.publish(channel, *lab.message(head - STALENESS_MAX - 3, number))
                lab.publish(channel, *lab.message(head - STALENESS_MAX // 2, number))
            for _ in range(12):
                lab.publish(channel, *old)

    def break_in() -> None:
        with pytest.raises(pika.exceptions.AMQPError):
            pika.BlockingConnection(parameters(broker, "an intruder"))
        stranger = connect(lab.servers.url("operator", "store_url").replace("fedmq-operator:", "nobody:"), 5.0)
        with pytest.raises(redis.exceptions.AuthenticationError):
            stranger.ping()
        stranger.close()

    lab.enroll("w2", "w3")  # w2 spoke long ago, w3 never
    spoke = json.dumps({"seen": time.time() - 3600})
    lab.store.hset(f"fedmq:{{{lab.job}}}:clients", "w2", spoke)
    (lab.folder / "fail").touch()
    (lab.folder / "fall").touch()
    certificate(lab, days=3)
    lab.programs["a1"].kill()
    with again_and_again(bad_traffic, 0.4), again_and_again(break_in, 0.5):
        lab.until_firing(
            "ManyRejected", "DeadLetters", "ManyStale", "StalenessRising", "DuplicatesUnusual", "LoginFailures",
            "DevicesSilent", "TaskFailing", "AccuracyFalling", "CertificateNearEnd", "AggregatorDown",
        )  # fmt: skip
        [mute] = lab.query("fedmq_devices_never_heard")
        assert mute["value"][1] == "1", "w3 alone; those whose task fails become silent"
        every_panel_shows_data(lab)
        for name in ORDER:
            assert 'class="bad"' not in page(Prometheus(lab.prometheus_url), name, lab.job, 1.0, 8.0)
        lab.store.config_set("appendonly", "no")  # with it go the exporter's numbers of that file
        lab.until_firing("StoreNotDurable")
    lab.store.hdel("fedmq:installation:devices", f"{lab.job}.w2")
    lab.store.config_set("appendonly", "yes")
    (lab.folder / "fail").unlink()
    (lab.folder / "fall").unlink()
    certificate(lab, days=300)
    lab.aggregator("a1")
    lab.until_clear(*lab.firing())


def test_without_an_aggregator_the_queue_grows_and_the_evaluator_is_missed(lab: Installed) -> None:
    for name in ("a0", "a1", "evaluator"):
        lab.programs[name].kill()

    def publish() -> None:
        with lab.channel() as channel:
            for number in range(40):
                lab.publish(channel, *lab.message(lab.head("version"), number))

    with again_and_again(publish, 0.4):
        lab.until_firing("NoAggregator", "NothingApplied", "QueueGrowing", "ServiceDown")
    for name in ("a0", "a1"):
        lab.aggregator(name)
    lab.evaluator()
    lab.until_clear("NoAggregator", "AggregatorDown", "NothingApplied", "QueueGrowing", "ServiceDown")


def test_a_broker_without_memory_blocks_publishers_and_outboxes_fill(lab: Installed) -> None:
    lab.programs["exporter"].kill()
    lab.rabbitmqctl("set_vm_memory_high_watermark", "absolute", "1MB")
    lab.until_firing("BrokerBlocksPublishers", "OutboxFilling", "ExporterDown")
    lab.rabbitmqctl("set_vm_memory_high_watermark", "absolute", "1200MB")
    lab.exporter()
    lab.until_clear("BrokerBlocksPublishers", "OutboxFilling", "ExporterDown")


def test_servers_that_are_away_are_told_apart_and_a_fleet_that_went_silent(lab: Installed) -> None:
    for name in ("w0", "w1"):
        lab.programs[name].terminate()
    clients = f"fedmq:{{{lab.job}}}:clients"
    lab.until(lambda: not lab.query("fedmq_worker_outbox_updates"), 30.0, "workers are still scraped")

    def age() -> None:  # in earnest it takes ten minutes
        for client, text in lab.store.hgetall(clients).items():
            lab.store.hset(clients, client, json.dumps(json.loads(text) | {"seen": time.time() - 700}))

    with again_and_again(age, 0.5):
        lab.until_firing("FleetSilent")
    lab.servers.redis.stop()
    lab.until_firing("StoreUnreachable", "StoreFailing")
    lab.servers.redis.start()
    lab.until_clear("StoreUnreachable", "StoreFailing")
    lab.servers.rabbitmq.stop()
    lab.until_firing("BrokerUnreachable")
    lab.servers.rabbitmq.start()
    lab.until_clear("BrokerUnreachable")


def test_every_alert_was_made_to_fire_here() -> None:
    told = set(re.findall(r'"([A-Z]\w+)"', Path(__file__).read_text()))
    assert set(re.findall(r"- alert: (\w+)", RULES.read_text())) <= told


def every_panel_shows_data(lab: Installed) -> None:
    """Fail with the queries of the dashboards that find nothing finite."""
    prometheus = Prometheus(lab.prometheus_url)
    now = time.time()
    empty = []
    for path in FOLDER.glob("*.json"):
        for panel in json.loads(path.read_text())["panels"]:
            found = series_of(prometheus, panel, lab.job, (now - 30, now), rate_s=8.0)
            for target in panel["targets"]:
                values = [value for one in found if one.query == target["refId"] for _, value in one.points]
                if not any(math.isfinite(value) for value in values):
                    empty.append(f"{path.stem} / {panel['title']} {target['refId']}: {target['expr']}")
    assert not empty, "\n".join(empty)


def certificate(lab: Installed, days: int) -> None:
    """Give Redis a certificate that ends in so many days; it reads it at once."""
    signer = authority.read(lab.servers.secrets / "ca")
    made_at = authority.utc_now() - timedelta(days=authority.SERVER_DAYS - days)
    made = signer.server("redis", ["localhost", "127.0.0.1", "redis"], made_at)
    folder = lab.servers.secrets / "redis"
    (folder / "server.pem").write_text(made.certificate)
    (folder / "server.key").write_text(made.key)
    lab.store.config_set("tls-cert-file", str(folder / "server.pem"))
