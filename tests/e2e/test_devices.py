"""A device from its enrolment to its end, on servers as an installation has them: it trains, is refused, is thrown out.

What the servers refuse a login act by act is in tests/contract/test_identity*.py.
"""

import json
import re
import socket
import ssl
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path

import numpy as np
import pika.exceptions
import pytest
import redis

from ops import authority, roles
from ops.audit import Collector
from ops.broker_admin import BrokerAdmin
from ops.devices import Devices
from ops.private_file import PreparedFile
from ops.secured_servers import SecuredServers
from shared.command import DONE, FAILED, USAGE
from shared.errors import SettingsError, Unavailable
from shared.model_image import ModelImage
from shared.store.redis import RedisStore
from shared.store.redis_acl import RedisDenials
from shared.store.redis_registry import AuditLog
from shared.transport.audit import AuditQueue
from shared.transport.names import AUDIT_QUEUE
from shared.transport.rabbitmq import RabbitSink
from tests.contract.faults import wait_until
from tests.e2e.conftest import clean_environment
from tests.secured_fixture import JOB, OTHER, amqp, enrolled, operator_settings, secured, store, urls_of

__all__ = ["secured"]

SETTINGS = {  # all that a device may ever read: models, snapshots, deltas
    "codec": "float32", "staleness": "constant", "buffer_size": 1, "commit_interval_s": 0.02, "downlink": "on",
}  # fmt: skip
ENDED = "EOF occurred in violation of protocol"
CLOSED_S_MAX = 5.0  # "at once": a revoked device's connections


class Site:
    """An installation and one job of it: its operator's commands, its aggregator, its devices."""

    def __init__(self, servers, processes, task, folder):
        self.servers, self.processes, self.task, self.folder = servers, processes, task, folder
        self.operator = servers.secrets / "operator" / "fedmq.toml"
        self.store = RedisStore(servers.url("operator", "store_url"), JOB)
        self.admin = BrokerAdmin(servers.url("operator", "broker_admin_url"))

    def fedmq(self, *arguments, code=DONE, answer=""):
        """Run a command with the operator's settings; return what it printed."""
        done = subprocess.run(
            [sys.executable, "-m", "ops.cli", *arguments, "--config", str(self.operator)], cwd=self.folder, text=True,
            capture_output=True, env=clean_environment({"PYTHONPATH": str(Path.cwd())}), input=answer, timeout=60,
            check=False,
        )  # fmt: skip
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout + done.stderr

    def aggregator(self, home="aggregator"):
        """Start an aggregator with the settings that `fedmq secrets make` wrote; it makes version 0."""
        start = self.folder / "start.safetensors"
        ModelImage.of({"w": np.zeros((4, 3), np.float32), "steps": np.array([7], np.int64)}).save(start)
        file = self.servers.secrets / home / "fedmq.toml"
        return self.processes.start("aggregator", f"--config={file}", init_model=start, **SETTINGS)

    def worker(self, file, **more):
        """Start a worker with nothing but a device's file and a task."""
        state = self.folder / f"state-{file.stem}"
        return self.processes.start("worker", f"--config={file}", task=self.task, state_dir=state, wait_s=20, **more)

    def applied(self, client):
        """Return how many updates of a client count."""
        entries = [update for entry in self.store.ledger() for update in entry["updates"]]
        return sum(update["outcome"] == "applied" and update["id"].startswith(f"{client}/") for update in entries)

    def log(self, login):
        """Return the kinds of the audit log's events about a login."""
        audit = AuditLog(self.servers.url("operator", "store_url"))
        kinds = [event.kind for event in audit.read() if event.login == login]
        audit.close()
        return kinds


@pytest.fixture
def site(secured, processes, task, tmp_path):
    site = Site(secured, processes, task, tmp_path)
    yield site
    site.store.close()


def test_a_device_joins_with_one_file_trains_and_is_thrown_out(site):
    site.aggregator()
    said = site.fedmq("devices", "enroll", "cam-1", "--job", JOB)
    assert "cam-1.toml is all it needs" in said
    file = site.folder / "cam-1.toml"
    assert file.stat().st_mode & 0o777 == 0o600
    worker = site.worker(file)
    wait_until(lambda: site.applied("cam-1") >= 3, 30, worker.log)
    denials = RedisDenials(site.servers.url("operator", "store_url"))
    refused = [denial for denial in denials.read() if denial.login.startswith((f"{JOB}.", "fedmq"))]
    denials.close()
    assert refused == [], "what devices and services need is refused"
    shown = site.fedmq("devices", "show", "cam-1", "--job", JOB)
    assert "job-a.cam-1, at RabbitMQ and Redis" in shown
    assert re.search(r"last seen +20\d\d-", shown)
    assert re.search(r"connections +127\.0\.0\.1", shown)

    started = time.monotonic()
    assert Devices(operator_settings(site.servers)).revoke(JOB, "cam-1")
    assert site.admin.connections("job-a.cam-1") == []
    wait_until(lambda: "refuses this login or password" in worker.log(), CLOSED_S_MAX, worker.log)
    assert time.monotonic() - started < CLOSED_S_MAX
    assert "CONNECTION_FORCED - user 'job-a.cam-1' is deleted" in worker.log()
    worker.kill()
    count = site.applied("cam-1")
    again = site.worker(file)
    assert again.wait() == USAGE
    assert "refuses: invalid username-password pair" in again.log()

    assert re.search(r"cam-1 +job-a .*revoked 20", site.fedmq("devices", "list", "--job", JOB))
    site.fedmq("devices", "enroll", "cam-1", "--job", JOB, "--out", "back.toml")
    back = site.worker(site.folder / "back.toml", downlink_bytes_per_s=100_000)  # which reads piece by piece
    wait_until(lambda: site.applied("cam-1") > count, 30, back.log)
    assert site.log("job-a.cam-1") == ["enrolled", "revoked", "enrolled"]


def test_a_device_with_a_new_password_goes_on_and_the_old_file_is_of_no_use(site):
    old = enrolled(site.servers, site.folder, "cam-2")
    site.aggregator()
    worker = site.worker(old)
    wait_until(lambda: site.applied("cam-2") >= 1, 30, worker.log)
    site.fedmq("devices", "rotate", "cam-2", "--job", JOB, "--out", "new.toml")
    wait_until(lambda: "refuses this login or password" in worker.log(), CLOSED_S_MAX, worker.log)
    worker.kill()
    count = site.applied("cam-2")
    for url, connect in zip(urls_of(old), (reach_broker, reach_store), strict=True):
        with pytest.raises(SettingsError, match="refuses"):
            connect(url)
    new = site.worker(site.folder / "new.toml")
    wait_until(lambda: site.applied("cam-2") > count, 30, new.log)
    assert site.log("job-a.cam-2") == ["enrolled", "rotated"]


def test_open_connections_of_the_old_password_are_closed_at_both_servers(devices, secured, tmp_path):
    broker_url, store_url = urls_of(enrolled(secured, tmp_path, "turned"))
    connection, client = amqp(secured, broker_url), store(secured, store_url)
    client.time()
    devices.rotate(JOB, "turned", tmp_path / "new.toml", False)
    with pytest.raises(pika.exceptions.ConnectionClosedByBroker, match="CONNECTION_FORCED"):
        wait_until(lambda: connection.process_data_events(0.1), CLOSED_S_MAX)
    with pytest.raises(redis.AuthenticationError):  # it was closed, and does not get in anew
        client.time()
    client.close()


def test_what_an_operator_may_get_wrong_is_said(site):
    site.fedmq("devices", "enroll", "cam-3", "--job", JOB)
    for arguments, says in (
        (("enroll", "cam-3"), "cam-3 is enrolled in job job-a since 20"),
        (("enroll", "cam.3"), "'cam.3' is no name of a device: it must be of [A-Za-z0-9_-]{1,64}"),
        (("enroll", "cam-4", "--out", "cam-3.toml"), "cam-3.toml exists: move it away, or give another --out"),
        (("enroll", "cam-4", "--out", "no/where.toml"), "no/where.toml cannot be written: No such file or directory"),
        (("enroll", "cam-4", "--store-host", "a b"), "'a b' is not of the form HOST:PORT"),
        (("enroll", "cam-4", "--store-host", "a:\u0661\u0662"), "'a:\u0661\u0662' is not of the form HOST:PORT"),
        (("enroll", "cam-4", "--store-host", "[x]:6379"), "'[x]:6379' is not of the form HOST:PORT"),
        (
            ("rotate", "cam-4", "--out", "x.toml"),
            "cam-4 is not enrolled in job job-a: `fedmq devices enroll cam-4`; did you mean job-a.cam-3",
        ),
        (("revoke", "cam-33", "--yes"), "there is no device cam-33 of job job-a; did you mean job-a.cam-3"),
    ):
        assert says in site.fedmq("devices", *arguments, "--job", JOB, code=USAGE), arguments
    assert site.fedmq("devices", "revoke", "cam-3", "--job", JOB, code=FAILED, answer="n\n").endswith("[y/N]: ")
    assert "nothing was revoked" in site.fedmq("devices", "revoke", "cam-3", "--job", JOB, code=USAGE, answer="")
    assert sorted(path.name for path in site.folder.glob("*.toml")) == ["cam-3.toml"]
    assert "is revoked, its connections are closed" in site.fedmq("devices", "revoke", "cam-3", "--job", JOB, "--yes")
    assert "was revoked before" in site.fedmq("devices", "revoke", "cam-3", "--job", JOB, "--yes")


# Where it breaks off


class Cut(BaseException):
    """The program ends here."""


@pytest.fixture
def devices(secured):
    devices = Devices(operator_settings(secured))
    yield devices
    devices.close()


def works(file):
    """Tell whether a device gets in everywhere with its file."""
    broker_url, store_url = urls_of(file)
    reach_broker(broker_url)
    reach_store(store_url)
    return True


STEPS = ["_broker.put", "_store.put", "_registry.put", "file", "end"]


@pytest.mark.parametrize("step", STEPS)
def test_an_enrolment_that_breaks_off_is_mended_by_another_or_a_revocation(devices, tmp_path, monkeypatch, step):
    for number, mend in enumerate(("enroll", "revoke")):
        name, file = f"dev-{STEPS.index(step)}-{number}", tmp_path / f"{mend}.toml"
        with monkeypatch.context() as patch, pytest.raises(Cut):
            cut(devices, patch, step)
            devices.enroll(JOB, name, file, False, None, None)
        if file.exists():
            assert works(file), "a device either works or has no file"
        assert not list(tmp_path.glob(".*")), "a password is left behind"
        if mend == "enroll":
            file.unlink(missing_ok=True)
            devices.enroll(JOB, name, file, False, None, None)
            assert works(file)
        if step != "_registry.put":
            assert devices.revoke(JOB, name)
            assert not devices._broker.exists(f"{JOB}.{name}")
            assert f"{JOB}.{name}" not in devices._store.names()
            assert devices._registry.get(f"{JOB}.{name}")["state"] == "revoked"


def cut(devices, patch, step):
    """Have the program end at a step of an enrolment."""

    def end(*_given, **_more):
        raise Cut

    if step == "file":
        patch.setattr("ops.private_file.PreparedFile.place", end)
    elif step == "end":
        todo = iter((devices._registry.put, end))
        patch.setattr(devices._registry, "put", lambda *given: next(todo)(*given))
    else:
        part, method = step.split(".")
        patch.setattr(getattr(devices, part), method, end)


@pytest.mark.parametrize("gone", ["broker", "store"])
def test_a_device_half_gone_is_revoked_whole(devices, secured, tmp_path, gone):
    name = f"half-{gone}"
    enrolled(secured, tmp_path, name)
    login = f"{JOB}.{name}"
    (devices._broker if gone == "broker" else devices._store).delete(login)
    assert devices.revoke(JOB, name)
    assert not devices.revoke(JOB, name)
    assert not devices._broker.exists(login)
    assert login not in devices._store.names()


def test_a_device_that_the_registry_forgot_is_revoked_too(devices, secured, tmp_path):
    enrolled(secured, tmp_path, "lost")
    devices._registry._redis.hdel("fedmq:installation:devices", f"{JOB}.lost")
    assert devices.revoke(JOB, "lost")
    assert not devices._broker.exists(f"{JOB}.lost")


def test_a_server_that_is_down_does_not_keep_the_other_from_throwing_a_device_out(devices, secured, tmp_path):
    file = enrolled(secured, tmp_path, "bad")
    settings = operator_settings(secured)
    nowhere = settings.broker_admin_url.replace(str(secured.admin_port), "1")
    without = Devices(settings.model_copy(update={"broker_admin_url": nowhere}))
    with pytest.raises(Unavailable, match=r"RabbitMQ may still let bad in: cannot reach .*; revoke it again"):
        without.revoke(JOB, "bad")
    without.close()
    with pytest.raises(SettingsError, match="refuses"):
        reach_store(urls_of(file)[1])
    assert devices.revoke(JOB, "bad")


def test_logins_and_commits_outlive_a_restart_of_redis(secured, tmp_path):
    """Redis replays transactions as its default user: one that is allowed nothing would lose every commit."""
    file = enrolled(secured, tmp_path, "lasting")
    job = RedisStore(secured.url(f"aggregator.{OTHER}", "store_url"), OTHER)
    assert job.create(ModelImage.of({"w": np.ones((4, 3), np.float32)}), time.time())
    before = job.head()
    secured.redis.stop()
    secured.redis.start()
    assert works(file)
    assert job.head() == before is not None
    assert job.model(0).sha256 == before.sha256
    job.close()
    denials = RedisDenials(secured.url("operator", "store_url"))
    assert [denial for denial in denials.read() if denial.login == "default"] == []
    denials.close()


def test_two_who_enrol_the_same_device_at_once_do_not_both_win(devices, secured, tmp_path, monkeypatch):
    other = Devices(operator_settings(secured))
    put = devices._store.put

    def meanwhile(*given):
        put(*given)
        other.enroll(JOB, "twice", tmp_path / "other.toml", False, None, None)

    monkeypatch.setattr(devices._store, "put", meanwhile)
    with pytest.raises(SettingsError, match="being changed by somebody else"):
        devices.enroll(JOB, "twice", tmp_path / "mine.toml", False, None, None)
    other.close()
    assert [path.name for path in tmp_path.glob("*.toml")] == ["other.toml"]
    assert works(tmp_path / "other.toml")


def ended(devices, name):
    """Tell whether nobody lets a device in, and its record says so."""
    login = f"{JOB}.{name}"
    assert not devices._broker.exists(login)
    assert login not in devices._store.names()
    return devices._registry.get(login)["state"] == "revoked"


MAKING = ["_broker.put", "_store.put", "_store.close_connections", "ops.private_file.PreparedFile.place", "end"]


@pytest.mark.parametrize("step", MAKING)
@pytest.mark.parametrize("what", ["enroll", "rotate"])
def test_who_is_revoked_while_getting_a_password_has_none(devices, secured, tmp_path, monkeypatch, what, step):
    """Revoked, whole, right before a step of the other."""
    name, other = f"late-{what}-{MAKING.index(step)}", Devices(operator_settings(secured))
    if what == "rotate":
        enrolled(secured, tmp_path, name)
    put, often = devices._registry.put, []

    def meanwhile(act):
        def acted(*given):
            if not often:
                often.append(other.revoke(JOB, name))
            return act(*given)

        return acted

    if step == "end":
        todo = iter((put, meanwhile(put)))
        monkeypatch.setattr(devices._registry, "put", lambda *given: next(todo)(*given))
    elif "place" in step:
        monkeypatch.setattr(step, meanwhile(PreparedFile.place))
    else:
        part, method = step.split(".")
        monkeypatch.setattr(getattr(devices, part), method, meanwhile(getattr(getattr(devices, part), method)))
    given = (False, None, None) if what == "enroll" else (False,)
    with pytest.raises(SettingsError, match="was revoked meanwhile: it has no login"):
        getattr(devices, what)(JOB, name, tmp_path / "new.toml", *given)
    other.close()
    assert often == [True]
    assert not (tmp_path / "new.toml").exists()
    assert ended(devices, name)


@pytest.mark.parametrize("what", ["enroll", "rotate"])
@pytest.mark.parametrize("step", ["_broker.delete", "_store.delete", "_registry.put"])
def test_who_gets_a_password_while_being_revoked_has_none(devices, secured, tmp_path, monkeypatch, what, step):
    """It gets one, whole, right before a step of the revocation; `enroll` mends one that had broken off."""
    name, other = f"early-{what}-{step.strip('_').partition('.')[0]}", Devices(operator_settings(secured))
    if what == "rotate":
        enrolled(secured, tmp_path, name)
    else:
        with monkeypatch.context() as patch, pytest.raises(Cut):
            cut(devices, patch, "file")
            devices.enroll(JOB, name, tmp_path / f"{name}.toml", False, None, None)
    given, often = (False, None, None) if what == "enroll" else (False,), []
    part, method = step.split(".")
    act = getattr(getattr(devices, part), method)

    def meanwhile(*more):
        if not often:
            often.append(getattr(other, what)(JOB, name, tmp_path / "new.toml", *given))
        return act(*more)

    monkeypatch.setattr(getattr(devices, part), method, meanwhile)
    assert devices.revoke(JOB, name)
    other.close()
    assert ended(devices, name)


def test_a_rotation_that_breaks_off_has_thrown_out_the_old_password(devices, secured, tmp_path, monkeypatch):
    broker_url, _ = urls_of(enrolled(secured, tmp_path, "cut"))
    connection = amqp(secured, broker_url)
    cut(devices, monkeypatch, "end")
    with pytest.raises(Cut):
        devices.rotate(JOB, "cut", tmp_path / "new.toml", False)
    with pytest.raises(pika.exceptions.ConnectionClosedByBroker, match="CONNECTION_FORCED"):
        wait_until(lambda: connection.process_data_events(0.1), CLOSED_S_MAX)


def test_a_login_that_outlives_its_record_is_shown(site):
    site.fedmq("devices", "enroll", "undead", "--job", JOB)
    site.fedmq("devices", "revoke", "undead", "--job", JOB, "--yes")
    assert re.search(r"undead .*revoked 20\S+ \S+\n", site.fedmq("devices", "list", "--job", JOB))
    site.admin.put(roles.device(JOB, "undead"), "x")
    said = r"revoked 20\S+ \S+, but RabbitMQ still lets it in: revoke it again"
    assert re.search(f"undead .*{said}", site.fedmq("devices", "list", "--job", JOB))
    assert re.search(said, site.fedmq("devices", "show", "undead", "--job", JOB))
    assert "is revoked, its connections are closed" in site.fedmq("devices", "revoke", "undead", "--job", JOB, "--yes")
    assert not site.admin.exists(f"{JOB}.undead")


# The audit log


def test_failed_logins_and_refusals_appear_in_the_audit_log(site):
    file = enrolled(site.servers, site.folder, "nosy")
    before = amqp(site.servers, site.servers.url("operator", "broker_url"))
    before.channel().queue_purge(AUDIT_QUEUE)  # of other tests: failed logins of one address are one entry a minute
    before.close()
    cleared = store(site.servers, site.servers.url("operator", "store_url"))
    cleared.acl_log_reset()
    cleared.close()
    url = site.servers.url("exporter", "store_url")
    collector = Collector(AuditQueue(site.servers.url("exporter", "broker_url")), RedisDenials(url), AuditLog(url))
    collector._queue.link.wait_ready(30)
    collector.step()
    broker_url, store_url = urls_of(file)
    for given, reach in ((broker_url, reach_broker), (store_url, reach_store)):
        with pytest.raises(SettingsError):
            reach(given.replace("nosy:", "nosy:x"))
    connection = amqp(site.servers, broker_url)
    with pytest.raises(pika.exceptions.ChannelClosedByBroker):
        connection.channel().queue_purge(f"fedmq.updates.{JOB}")
    connection.close()
    with pytest.raises(SettingsError, match="no permissions"):
        RedisStore(store_url, JOB).announce({"codec": "none"})
    moved = []
    wait_until(lambda: moved.append(collector.step()) or sum(moved) >= 4, 10, lambda: moved)
    assert collector.step() == 0
    collector.close()
    lines = site.fedmq("devices", "log", "--since", "1h")
    for line in (
        r"login_failed job-a.nosy  invalid credentials, from 127.0.0.1:\d+$",  # once for each attempt to connect
        r"login_failed job-a.nosy  wrong login or password, from 127.0.0.1:\d+( \(\d times\))?$",
        r"refused +job-a.nosy  queue.purge: access to queue 'fedmq.updates.job-a' in vhost 'fedmq' refused for user",
        r"refused +job-a.nosy  command hset, from 127.0.0.1:\d+$",
    ):
        assert re.search(line, lines, re.M), lines
    only = [json.loads(line) for line in site.fedmq("devices", "log", "--kind", "refused", "--json").splitlines()]
    assert {event["source"] for event in only if event["login"] == "job-a.nosy"} == {"rabbitmq", "redis"}
    again = Collector(AuditQueue(site.servers.url("exporter", "broker_url")), RedisDenials(url), AuditLog(url))
    again._queue.link.wait_ready(30)
    assert again.step() == 0, "a restart writes nothing twice"
    again.close()


# TLS


def reach_broker(url):
    """Return when RabbitMQ lets us in; raises what a worker's user would be told."""
    sink = RabbitSink(url, "cam")
    try:
        sink.link.wait_ready(4)
    finally:
        sink.close()


def reach_store(url):
    """The same of Redis."""
    client = RedisStore(url, JOB)
    try:
        client.head()
    finally:
        client.close()


def told(url):
    """Return what a user of this URL is told."""
    with pytest.raises((Unavailable, SettingsError)) as caught:
        (reach_broker if url.startswith("amqp") else reach_store)(url)
    return str(caught.value)


@pytest.mark.parametrize("server", ["broker", "store"])
class TestTls:
    @pytest.fixture
    def url(self, secured, tmp_path, server):
        name = f"tls-{server}-{uuid.uuid4().hex[:6]}"
        return urls_of(enrolled(secured, tmp_path, name))[server == "store"]

    def test_an_authority_that_did_not_sign(self, url, tmp_path):
        (tmp_path / "wrong.pem").write_text(authority.make(authority.utc_now())[0].pem)
        wrong = re.sub("ca_file=.*", f"ca_file={tmp_path}/wrong.pem", url)
        assert "; its certificate is not signed by the authority in FEDMQ_TLS_CA" in told(wrong)

    def test_no_authority(self, url):
        assert "; its certificate is not signed by the authority in FEDMQ_TLS_CA" in told(url.partition("?")[0])

    def test_another_host_name(self, url):
        text = told(url.replace("@localhost", "@127.1"))
        assert "Hostname mismatch, certificate is not valid for '127.1'" in text
        mend = "its certificate is for another host name: use the name it was made for, or make it anew with this one"
        assert text.endswith(f"; {mend}")

    def test_no_tls_at_all(self, url):
        plain = url.partition("?")[0].replace("amqps:", "amqp:").replace("rediss:", "redis:")
        assert "; if it speaks TLS alone, write " in told(plain)

    def test_an_expired_certificate(self, secured, url, tmp_path):
        signer = authority.read(secured.secrets / "ca")
        past = authority.utc_now() - timedelta(days=authority.SERVER_DAYS + 3)
        with stand_in(signer.server("old", ["localhost"], past), tmp_path) as port:
            old = re.sub(r"@localhost:\d+", f"@localhost:{port}", url)
            assert "; its certificate has expired, or this machine's clock is wrong: it is 20" in told(old)

    def test_no_password_in_any_of_it(self, url):
        password = url.split(":")[2].split("@")[0]
        for wrong in (url.partition("?")[0], url.replace("@localhost", "@127.1")):
            assert password not in told(wrong)


def test_certificates_without_tls_are_refused_before_anything_is_sent(site):
    file = enrolled(site.servers, site.folder, "plain")
    text = file.read_text().replace("amqps:", "amqp:").replace("rediss:", "redis:")
    file.write_text(text)
    worker = site.worker(file)
    assert worker.wait() == USAGE
    assert "without TLS and would send the password in the clear: write amqps://" in worker.log()


@contextmanager
def stand_in(identity: authority.Identity, folder: Path) -> Iterator[int]:
    """Answer on a port with a certificate, and say nothing more; yield the port."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    (folder / "stand.pem").write_text(identity.certificate + identity.key)
    context.load_cert_chain(folder / "stand.pem")
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve():
            with suppress(OSError):
                while True:
                    connection, _ = server.accept()
                    with suppress(OSError):
                        context.wrap_socket(connection, server_side=True).close()

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield server.getsockname()[1]
        server.shutdown(socket.SHUT_RDWR)
    thread.join(5)


def test_mutual_tls_lets_in_who_has_a_certificate_and_nobody_else(tmp_path):
    with SecuredServers((JOB,), mutual=True) as servers:
        urls = urls_of(enrolled(servers, tmp_path, "cam", certificate=True))
        reach_broker(urls[0])
        reach_store(urls[1])
        bare = [re.sub("&(cert|key)_file=[^&]*", "", url) for url in urls]
        for url in bare:
            text = told(url)  # Redis may hang up before its reason has arrived
            assert "; it asks for a client certificate: FEDMQ_TLS_CERT and FEDMQ_TLS_KEY" in text or ENDED in text
        stranger = authority.make(authority.utc_now())[0].client("job-a.cam", authority.utc_now())
        (tmp_path / "cam.cert").write_text(stranger.certificate)
        (tmp_path / "cam.key").write_text(stranger.key)
        for url in urls:
            text = told(url)
            assert (
                "; it does not accept our client certificate's authority: check FEDMQ_TLS_CERT" in text or ENDED in text
            )
        assert works(enrolled(servers, tmp_path, "other", certificate=True))


def test_the_demos_workers_are_enrolled_once_and_what_is_missing_is_made_good(secured, tmp_path):
    """The script of docker-compose.yml at each `up`: those that have a good file keep it."""
    variables = {
        "FEDMQ_CONFIG": str(secured.secrets / "operator" / "fedmq.toml"), "FEDMQ_JOB": JOB, "WORKERS_MAX": "3",
        "WORKERS_FOLDER": str(tmp_path),
    }  # fmt: skip

    def up():
        script = Path(__file__).parents[2] / "ops" / "docker" / "enrol-workers"
        done = subprocess.run(
            [sys.executable, script], env=clean_environment(variables), capture_output=True, text=True, timeout=60,
            check=False,
        )  # fmt: skip
        assert done.returncode == 0, done
        return done.stdout.strip()

    assert up() == f"3 workers of job {JOB} enrolled, 0 were"
    files = {path.name: path.read_text() for path in (tmp_path / JOB).iterdir()}
    assert sorted(files) == ["worker-0.toml", "worker-1.toml", "worker-2.toml"]
    assert up() == f"0 workers of job {JOB} enrolled, 3 were"
    assert {path.name: path.read_text() for path in (tmp_path / JOB).iterdir()} == files
    (tmp_path / JOB / "worker-1.toml").unlink()
    assert up() == f"1 workers of job {JOB} enrolled, 2 were"
    assert (tmp_path / JOB / "worker-1.toml").read_text() != files["worker-1.toml"]
