"""All through one port, as networks want it that let nothing but 443 out: broker_config/haproxy.cfg, really run."""

import os
import shutil
import socket
import ssl
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from ops.secured_servers import SecuredServers
from ops.servers import free_port
from shared.clock import SystemClock
from shared.errors import StoreUnavailable
from shared.model_image import ModelImage
from shared.store.redis import RedisStore
from shared.transport.ports import Outgoing
from shared.transport.rabbitmq import RabbitSink, RabbitSource
from tests.contract.faults import wait_until
from tests.secured_fixture import JOB, enrolled, urls_of

HOST = "fedmq.test"
CONFIG = Path(__file__).parents[2] / "broker_config" / "haproxy.cfg"


class Port443:
    """The proxy before a pair of servers."""

    def __init__(self, servers: SecuredServers, port: int) -> None:
        self.servers, self.port = servers, port
        self.context = ssl.create_default_context(cafile=str(servers.secrets / "ca" / "ca.pem"))

    def say(self, name: str, words: bytes) -> bytes:
        """Say something over TLS to the server of a name; return the answer."""
        with (
            socket.create_connection(("127.0.0.1", self.port), 5) as bare,
            self.context.wrap_socket(bare, server_hostname=name) as secured,
        ):
            secured.sendall(words)
            return secured.recv(64)

    def refused(self, words: bytes, wait_s: float = 10.0) -> bool:
        """Say something without TLS; tell whether it was hung up without an answer."""
        with socket.create_connection(("127.0.0.1", self.port), wait_s) as bare:
            bare.settimeout(wait_s)
            bare.sendall(words)
            try:
                return bare.recv(64) == b""
            except ConnectionResetError:
                return True


@pytest.fixture(scope="module")
def proxy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Port443]:
    program = shutil.which("haproxy", path=f"{os.environ['PATH']}:/usr/sbin:/usr/local/sbin")
    assert program, "haproxy is not installed: make servers"
    port, log_file = free_port(), tmp_path_factory.mktemp("haproxy") / "log"
    with SecuredServers((JOB,), hosts=(HOST,)) as servers, log_file.open("wb") as log:
        environment = os.environ | {
            "PORT443_BIND": f"127.0.0.1:{port}", "PORT443_BROKER": f"127.0.0.1:{servers.rabbitmq.port}",
            "PORT443_STORE": f"127.0.0.1:{servers.redis.port}",
        }  # fmt: skip
        running = subprocess.Popen([program, "-db", "-f", str(CONFIG)], env=environment, stdout=log, stderr=log)
        try:

            def listens() -> bool:
                assert running.poll() is None, log_file.read_text()
                with socket.socket() as probe:
                    return probe.connect_ex(("127.0.0.1", port)) == 0

            wait_until(listens, 10)
            yield Port443(servers, port)
        finally:
            running.terminate()
            running.wait(10)


def test_the_name_decides_which_server_answers(proxy: Port443) -> None:
    assert proxy.say(f"broker.{HOST}", b"AMQP\x00\x00\x09\x01").startswith(b"\x01\x00\x00")
    assert proxy.say(f"store.{HOST}", b"PING\r\n").startswith(b"-NOAUTH")


def test_the_case_of_a_name_does_not_matter(proxy: Port443) -> None:
    assert proxy.say(f"Store.{HOST.upper()}", b"PING\r\n").startswith(b"-NOAUTH")


@pytest.mark.parametrize("name", [HOST, f"www.{HOST}", "localhost"])
def test_another_name_leads_nowhere(proxy: Port443, name: str) -> None:
    with pytest.raises((ssl.SSLError, ConnectionResetError)):
        proxy.say(name, b"PING\r\n")


@pytest.mark.parametrize("words", [b"AMQP\x00\x00\x09\x01", b"PING\r\n", b"GET / HTTP/1.1\r\n\r\n"])
def test_who_speaks_no_tls_is_hung_up_on(proxy: Port443, words: bytes) -> None:
    assert proxy.refused(words)


def test_who_says_nothing_is_hung_up_on(proxy: Port443) -> None:
    assert proxy.refused(b"")


def test_a_device_works_through_it(proxy: Port443, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An enrolled device's own URLs, with other names and one port: it reads its job's model and publishes."""
    look_up = socket.getaddrinfo

    def here(host: object, *rest: object, **more: object) -> object:
        return look_up("127.0.0.1" if str(host).endswith(HOST) else host, *rest, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(socket, "getaddrinfo", here)
    broker, store = urls_of(enrolled(proxy.servers, tmp_path, "cam"))
    broker = broker.replace(f"localhost:{proxy.servers.rabbitmq.port}", f"broker.{HOST}:{proxy.port}")
    store = store.replace(f"localhost:{proxy.servers.redis.port}", f"store.{HOST}:{proxy.port}")
    image = ModelImage.of({"w": np.zeros((4, 3), np.float32)})
    RedisStore(proxy.servers.url("aggregator", "store_url"), JOB).create(image, SystemClock().now())
    source = RabbitSource(proxy.servers.url("aggregator", "broker_url"), JOB, 8)
    source.link.wait_ready(20)
    device = RedisStore(store, JOB)
    sink = RabbitSink(broker, "cam")
    try:
        assert device.head() is not None
        sink.link.wait_ready(20)
        sink.publish(Outgoing(JOB, "cam", "cam/0/0", b"from behind a wall"), 10)
        got: list[bytes] = []
        wait_until(lambda: got.extend(d.body for d in source.receive(8, 0.1)) or bool(got), 10)
        assert got == [b"from behind a wall"]
    finally:
        sink.close()
        source.close()
        device.close()


def test_the_servers_certificate_is_checked_through_it(proxy: Port443, tmp_path: Path) -> None:
    """It passes bytes on: a name that RabbitMQ's certificate lacks is refused by the device, not by the proxy."""
    with pytest.raises((ssl.SSLCertVerificationError, StoreUnavailable)):
        proxy.say("broker.elsewhere.test", b"AMQP\x00\x00\x09\x01")
