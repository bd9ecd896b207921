"""`fedmq worker --check`: each thing that can be wrong on a device is named by its own line, with what to do."""

import re
import socket
import ssl
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest

from ops import authority
from ops.servers import free_port
from shared.command import DONE, FAILED, UNREACHABLE, USAGE
from shared.config import WorkerSettings, load
from shared.model_image import ModelImage
from shared.store.redis import RedisStore
from shared.tls import with_files
from shared.transport.rabbitmq import RabbitSource
from tests.contract.faults import rabbitmqctl
from tests.e2e.conftest import NUMPY_TASK, clean_environment
from worker import check

ALL = (
    "settings", "broker-name", "broker-port", "broker-tls", "broker-login", "publish", "store-name", "store-port",
    "store-tls", "store-login", "clock", "job", "task", "memory", "folder", "hours", "command",
)  # fmt: skip
ANNOUNCED = {"codec": "float32", "update_bytes_max": 10**6, "rule": "fedbuff"}


@pytest.fixture
def device(servers, job, task, tmp_path, monkeypatch, capsys):
    """Return a function that checks a device of a job that runs, with some settings changed."""
    monkeypatch.setattr(check, "log_to_stderr", lambda level: None)  # it would silence the tests that come after
    monkeypatch.setenv("COLUMNS", "80")
    store = RedisStore(servers.redis.url, job)
    store.create(ModelImage.of({"w": np.zeros((4, 3), np.float32), "steps": np.array([7])}), time.time())
    store.announce(ANNOUNCED)
    source = RabbitSource(servers.rabbitmq.url, job, 1)
    source.link.wait_ready(10)

    def run(**changes):
        flags = {
            "broker_url": servers.rabbitmq.url, "store_url": servers.redis.url, "job": job, "client_id": "phone-1",
            "task": str(task), "state_dir": str(tmp_path / "state"),
        } | {name: str(value) for name, value in changes.items()}  # fmt: skip
        code = check.run(lambda: load(WorkerSettings, flags))
        found = re.findall(r"^(ok|wrong) +(\S+) +(.*)$", capsys.readouterr().out, re.M)
        return code, {name: (word, text) for word, name, text in found}

    yield run
    assert source.receive(1, 0.3) == []  # nothing was published
    source.close()


def wrong(answer):
    return {name: text for name, (word, text) in answer[1].items() if word == "wrong"}


def test_a_device_with_nothing_wrong(device, tmp_path):
    answer = device(hours="0-24", ready_command="echo mains")
    assert (answer[0], wrong(answer)) == (DONE, {})
    assert tuple(answer[1]) == ALL
    said = {name: text for name, (_, text) in answer[1].items()}
    assert said["publish"] == "may publish updates of phone-1"
    assert said["job"] == "version 0, 12 parameters"
    assert said["task"].endswith("builds 12 parameters, as the job has them")
    assert said["hours"].startswith("0-24: open now, ")
    assert said["command"] == "says yes: mains"
    assert not (tmp_path / "state").exists()  # it would belong to whoever checks


def test_as_a_program(servers, task, tmp_path):
    """Both `fedmq worker --check` and `python -m worker --check`; a file that others can read is the first thing."""
    config = tmp_path / "phone-1.toml"
    config.write_text(f'broker_url = "{servers.rabbitmq.url}"\nstore_url = "{servers.redis.url}"\njob = "none-yet"\n')
    config.chmod(0o644)
    commands = (["-m", "worker"], ["-m", "ops.cli", "worker"])
    for program in commands:
        done = run(program, config, task)
        assert done.returncode == USAGE, done
        assert re.match(r"wrong settings +.*mode 0644.*chmod 600", done.stdout.replace("\n", " ")), done
    config.chmod(0o600)
    answers = [run(program, config, task) for program in commands]
    assert [done.returncode for done in answers] == [FAILED, FAILED]
    for done in answers:
        assert "`fedmq models init TASK --job none-yet`" in done.stdout
        assert (done.stderr, "fedmq:fedmq" in done.stdout) == ("", False)


def run(program, config, task):
    source = "import sys; from ops.cli import main; main()"
    head = [sys.executable, "-c", source, "worker"] if "ops.cli" in program else [sys.executable, *program]
    return subprocess.run(
        [*head, "--check", "--config", str(config), "--task", str(task)], cwd=task.parent, env=clean_environment({}),
        capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip


def test_wrong_settings_are_a_line(device):
    code, said = device(hours="99", uplink_bytes_per_s="5")
    assert code == USAGE
    assert list(said) == ["settings"]
    assert said["settings"][0] == "wrong"


# --- the way there


@pytest.mark.parametrize(("kind", "scheme"), [("broker", "amqp"), ("store", "redis")])
def test_a_name_that_does_not_resolve(device, kind, scheme):
    answer = device(**{f"{kind}_url": f"{scheme}://x:hush@no-such-host.invalid"})
    assert answer[0] == UNREACHABLE
    [(name, text)] = wrong(answer).items()
    assert name == f"{kind}-name"
    assert f"check FEDMQ_{kind.upper()}_URL, and this device's network and DNS" in text
    assert f"{kind}-port" not in answer[1]
    assert "hush" not in str(answer)


@pytest.mark.parametrize(("kind", "scheme"), [("broker", "amqp"), ("store", "redis")])
def test_a_port_where_nothing_listens(device, kind, scheme):
    answer = device(**{f"{kind}_url": f"{scheme}://127.0.0.1:{free_port()}"})
    assert answer[0] == UNREACHABLE
    [(name, text)] = wrong(answer).items()
    assert name == f"{kind}-port"
    assert "Connection refused; nothing listens there" in text


# --- TLS


@pytest.fixture(scope="module")
def ca(tmp_path_factory):
    """Yield an authority's file and what signs with it."""
    folder = tmp_path_factory.mktemp("ca")
    return folder, authority.make(authority.utc_now() - timedelta(days=900))[0]


@contextmanager
def tls_server(folder: Path, signer, now, host="localhost", wrap=True):
    """Serve handshakes with a certificate made at `now`; yield the port and the authority's file."""
    (folder / "ca.pem").write_text(signer.pem)
    identity = signer.server("server", [host], now)
    (folder / "server.pem").write_text(identity.certificate)
    (folder / "server.key").write_text(identity.key)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "server.pem", folder / "server.key")
    listening, ended = socket.create_server(("127.0.0.1", 0)), threading.Event()

    def serve():
        while not ended.is_set():
            try:
                bare, _ = listening.accept()
                bare.settimeout(2)
                with bare if not wrap else context.wrap_socket(bare, server_side=True) as connection:
                    connection.recv(1)
                    connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n") if not wrap else None
            except OSError:
                continue

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield listening.getsockname()[1], folder / "ca.pem"
    finally:
        ended.set()
        listening.close()


TLS = {  # what the certificate is, and what is to be done
    "expired": (timedelta(days=-800), "localhost", "has expired, or this machine's clock is wrong: it is 20"),
    "not yet valid": (timedelta(days=30), "localhost", "so this machine's clock is wrong: it says 20"),
    "another name": (timedelta(0), "elsewhere", "its certificate is for another host name"),
}


@pytest.mark.parametrize("kind", ["broker", "store"])
@pytest.mark.parametrize("what", TLS)
def test_a_certificate_that_is_no_good(device, ca, tmp_path, kind, what):
    shift, host, mend = TLS[what]
    with tls_server(tmp_path, ca[1], authority.utc_now() + shift, host) as (port, file):
        scheme = "amqps" if kind == "broker" else "rediss"
        answer = device(**{f"{kind}_url": with_files(f"{scheme}://x:hush@localhost:{port}", {"ca_file": str(file)})})
    assert answer[0] == UNREACHABLE
    [(name, text)] = wrong(answer).items()
    assert name == f"{kind}-tls"
    assert mend in text
    assert "hush" not in str(answer)


def test_a_certificate_of_another_authority(device, ca, tmp_path):
    other = tmp_path / "other.pem"
    other.write_text(authority.make(authority.utc_now())[0].pem)
    with tls_server(tmp_path, ca[1], authority.utc_now()) as (port, _):
        answer = device(broker_url=with_files(f"amqps://localhost:{port}", {"ca_file": str(other)}))
    [(name, text)] = wrong(answer).items()
    assert (name, answer[0]) == ("broker-tls", UNREACHABLE)
    assert "not signed by the authority in FEDMQ_TLS_CA" in text


def test_a_port_without_tls(device, ca, tmp_path):
    (tmp_path / "ca.pem").write_text(ca[1].pem)
    with tls_server(tmp_path, ca[1], authority.utc_now(), wrap=False) as (port, file):
        answer = device(store_url=with_files(f"rediss://localhost:{port}", {"ca_file": str(file)}))
    [(name, text)] = wrong(answer).items()
    assert (name, answer[0]) == ("store-tls", UNREACHABLE)
    assert "speaks no TLS on this port" in text


def test_a_sound_certificate_says_until_when(device, ca, tmp_path):
    with tls_server(tmp_path, ca[1], authority.utc_now()) as (port, file):
        answer = device(broker_url=with_files(f"amqps://x:y@localhost:{port}", {"ca_file": str(file)}))
    assert re.match(r"TLSv1\.[23], its certificate is good until \w+ +\d+ .* 20\d\d GMT", answer[1]["broker-tls"][1])
    assert list(wrong(answer)) == ["broker-login"]  # it is no RabbitMQ


def test_certificate_files_that_are_none(device, ca, tmp_path):
    (tmp_path / "ca.pem").write_text("no certificate")
    answer = device(tls_ca=tmp_path / "ca.pem", broker_url="amqps://127.0.0.1", store_url="rediss://127.0.0.1")
    assert "task" not in wrong(answer)  # the store's URL is not its fault
    assert answer[1]["task"][1].endswith("cannot be seen without the store")
    with tls_server(tmp_path, ca[1], authority.utc_now()) as (port, _):
        none = tmp_path / "none.pem"
        none.write_text("no certificate")
        answer = device(tls_ca=none, broker_url=f"amqps://localhost:{port}", store_url="rediss://127.0.0.1")
    assert (answer[0], "holds no certificate" in wrong(answer)["broker-tls"]) == (USAGE, True)


# --- logins


def test_a_password_the_broker_refuses(device, servers):
    answer = device(broker_url=servers.rabbitmq.url.replace("fedmq:fedmq@", "fedmq:hush@"))
    [(name, text)] = wrong(answer).items()
    assert (name, answer[0]) == ("broker-login", USAGE)
    assert "refuses this login or password: check FEDMQ_BROKER_URL" in text
    assert "hush" not in str(answer)


@pytest.fixture
def pinned(servers, job):
    """Make a login that may publish as one device alone; return its URL."""
    login = f"{job}.phone-1"
    rabbitmqctl(servers.rabbitmq, "add_user", login, "pass")
    rabbitmqctl(servers.rabbitmq, "set_permissions", "-p", "fedmq", login, "^$", r"^fedmq\.updates$", "^$")
    rabbitmqctl(
        servers.rabbitmq, "set_topic_permissions", "-p", "fedmq", login, "fedmq.updates", rf"^update\.{job}\.phone-1$",
        "^$",
    )  # fmt: skip
    yield servers.rabbitmq.url.replace("fedmq:fedmq@", f"{login}:pass@")
    rabbitmqctl(servers.rabbitmq, "delete_user", login)


def test_a_login_pinned_to_this_device_may_publish_and_to_another_not(device, pinned, job):
    assert device(broker_url=pinned)[0] == DONE
    answer = device(broker_url=pinned, client_id="phone-2")
    [(name, text)] = wrong(answer).items()
    assert (name, answer[0]) == ("publish", USAGE)
    assert f"login '{job}.phone-1' may not publish as client 'phone-2' of job '{job}'" in text
    assert "FEDMQ_JOB and FEDMQ_CLIENT_ID must be those it was enrolled for" in text


def test_a_login_of_the_store_that_is_refused(device, servers, job):
    store = RedisStore(servers.redis.url, job)._redis
    answer = device(store_url=servers.redis.url.replace("//", "//nobody:hush@"))
    [(name, text)] = wrong(answer).items()
    assert (name, answer[0]) == ("store-login", USAGE)
    assert "check FEDMQ_STORE_URL" in text
    assert "hush" not in str(answer)
    store.execute_command("ACL", "SETUSER", "elsewhere", "on", ">pass", "%R~fedmq:{other}:*", "+@all")
    answer = device(store_url=servers.redis.url.replace("//", "//elsewhere:pass@"))
    [(name, text)] = wrong(answer).items()
    assert (name, answer[0]) == ("store-login", USAGE)
    store.execute_command("ACL", "DELUSER", "elsewhere")


# --- the job, the task, the clock


def test_a_job_that_has_no_model(device):
    answer = device(job="unheard-of")
    assert "no model: `fedmq models init TASK --job unheard-of`" in wrong(answer)["job"]
    assert answer[0] == FAILED


@pytest.mark.parametrize(
    ("source", "what", "code"),
    [
        (NUMPY_TASK.replace("(4, 3)", "(4, 5)"), "tensor 'w' is (4, 5) float32 here, (4, 3) float32 in the job", USAGE),
        ("import no_such_module\n", "raises on import (line 1): ModuleNotFoundError", USAGE),
        (NUMPY_TASK.replace("return {", "return 1 / 0, {"), "build() of", FAILED),
        ("def build(): pass\n", "lacks train()", USAGE),
    ],
)
def test_a_task_that_does_not_load_or_fit(device, tmp_path, source, what, code):
    path = tmp_path / "other_task.py"
    path.write_text(source)
    answer = device(task=path)
    [(name, text)] = wrong(answer).items()
    assert (name, answer[0]) == ("task", code)
    assert what in text
    assert "memory" not in answer[1]


def test_no_task_at_all(device):
    answer = device(task="")
    assert "give --task my_task.py" in wrong(answer)["task"]


def test_an_update_that_would_be_too_large(device, servers, job):
    RedisStore(servers.redis.url, job).announce(ANNOUNCED | {"update_bytes_max": 1024})
    assert "update_bytes_max is 1024: choose a smaller FEDMQ_CODEC" in wrong(device())["task"]


@pytest.mark.parametrize(("year", "sign"), [(1970, "-"), (2038, r"\+")])
def test_a_clock_that_is_years_off(device, monkeypatch, year, sign):
    real = time.time
    shift = time.mktime((year, 6, 1, 0, 0, 0, 0, 0, 0)) - real()
    monkeypatch.setattr(check.time, "time", lambda: real() + shift)
    answer = device()
    [text] = [text for name, text in wrong(answer).items() if name == "clock"]
    assert re.search(rf"this clock is {sign}\d{{8,}} s off the store's, it says .* UTC: set up NTP", text)


# --- the device itself


def test_memory_that_is_short(device, monkeypatch):
    monkeypatch.setattr(check, "available_bytes", lambda: 10**6)
    answer = device()
    assert answer[0] == FAILED
    assert wrong(answer)["memory"].startswith("1 MB are available, and a worker of this model takes about 75 MB")


def test_a_state_folder_that_is_a_file(device, tmp_path):
    (tmp_path / "file").write_text("")
    answer = device(state_dir=tmp_path / "file")
    assert answer[0] == USAGE
    assert wrong(answer)["folder"] == f"{tmp_path / 'file'} is no folder: FEDMQ_STATE_DIR needs one"


def test_a_state_folder_of_somebody_else(device, tmp_path, monkeypatch):
    monkeypatch.setattr(check.os, "access", lambda path, mode: False)
    answer = device()
    assert answer[0] == USAGE
    assert "cannot be written by user" in wrong(answer)["folder"]


def test_a_file_in_it_that_root_left_there(device, job, tmp_path, monkeypatch):
    folder = tmp_path / "state" / job / "phone-1"
    folder.mkdir(parents=True)
    (folder / "outbox.json").write_text("{}")
    monkeypatch.setattr(check.os, "geteuid", lambda: 54321)
    answer = device()
    assert re.search(rf"outbox.json belongs to user \d+: chown -R 54321 {folder}", wrong(answer)["folder"])


def test_a_disk_that_is_nearly_full(device):
    answer = device(disk_free_min_bytes=10**17)
    assert answer[0] == FAILED
    assert "training would pause" in wrong(answer)["folder"]


def test_beside_a_running_worker_it_says_what_waits(device, job, tmp_path):
    from worker.outbox import Outbox

    outbox = Outbox(tmp_path / "state" / job / "phone-1", "phone-1", 10, 10**6)
    outbox.put(b"one")
    answer = device()
    assert (answer[0], wrong(answer)) == (DONE, {})
    assert "1 updates waiting" in answer[1]["folder"][1]
    outbox.close()


def test_hours_and_command_that_say_not_now_are_no_fault(device):
    code, said = device(hours=f"{(time.localtime().tm_hour + 3) % 24}:30-{(time.localtime().tm_hour + 5) % 24}",
                        ready_command="sh -c 'echo on battery; exit 1'")  # fmt: skip
    assert code == DONE
    assert re.search(r"closed now, \w+ \d\d:\d\d; opens in [23] h \d+ min", said["hours"][1])
    assert said["command"] == ("ok", "says no, so training waits: on battery")


def test_a_command_that_cannot_be_run(device):
    answer = device(ready_command="/no/such/hook --please")
    assert answer[0] == USAGE
    assert "/no/such/hook cannot be run: No such file or directory: no training would ever" in wrong(answer)["command"]
