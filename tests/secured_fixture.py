"""A RabbitMQ and a Redis as an installation has them: only TLS, `fedmq secrets make`, the files of broker_config/.

A module's tests share a pair. A server that is not installed is an error, never a skip.
"""

import signal
import ssl
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pika
import pika.exceptions
import pytest
import redis

from ops.devices import Devices
from ops.secured_servers import SecuredServers
from shared.config import OperatorSettings
from shared.tls import with_files
from shared.transport.rabbitmq import RabbitSource

__all__ = ["installation", "secured"]

JOB, OTHER = "job-a", "job-b"
DEVICE, NEIGHBOUR, STRANGER = "cam", "cam2", "far"  # the neighbour's name begins with the device's
DEVICES = {DEVICE: JOB, NEIGHBOUR: JOB, STRANGER: OTHER}


@pytest.fixture(scope="module")
def secured() -> Iterator[SecuredServers]:
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: pytest tears its fixtures down
    try:
        with SecuredServers((JOB, OTHER)) as running:
            yield running
    finally:
        signal.signal(signal.SIGTERM, before)


def operator_settings(servers: SecuredServers) -> OperatorSettings:
    """Return the operator's settings as `load` leaves them, without the environment."""
    given = servers.settings("operator")
    urls = {name: servers.url("operator", name) for name in ("broker_url", "store_url", "broker_admin_url")}
    return OperatorSettings(**(given | urls))


def enrolled(servers: SecuredServers, folder: Path, name: str, job: str = JOB, certificate: bool = False) -> Path:
    """Enrol a device; return its file."""
    file = folder / f"{name}.toml"
    devices = Devices(operator_settings(servers))
    try:
        devices.enroll(job, name, file, certificate, None, None)
    finally:
        devices.close()
    return file


def urls_of(file: Path) -> tuple[str, str]:
    """Return a device's URLs of broker and store with the certificates in its file."""
    given = tomllib.loads(file.read_text())
    files = {}
    for kind in ("ca", "cert", "key"):
        if text := given.get(f"tls_{kind}"):
            path = file.with_suffix(f".{kind}")
            path.write_text(text)
            files[f"{kind}_file"] = str(path)
    return with_files(given["broker_url"], files), with_files(given["store_url"], files)


def amqp(servers: SecuredServers, url: str) -> pika.BlockingConnection:
    """Return a connection of a bare client: what the server refuses is not left to our own code."""
    parts = urlsplit(url)
    context = ssl.create_default_context(cafile=str(servers.secrets / "ca" / "ca.pem"))
    return pika.BlockingConnection(
        pika.ConnectionParameters(
            "localhost", servers.rabbitmq.port, "fedmq", pika.PlainCredentials(parts.username, parts.password),
            ssl_options=pika.SSLOptions(context, "localhost"),
        )
    )  # fmt: skip


def store(servers: SecuredServers, url: str) -> redis.Redis:
    """Return a bare client of Redis with the login of a URL."""
    parts = urlsplit(url)
    return redis.Redis(
        "localhost", servers.redis.port, username=parts.username, password=parts.password, ssl=True,
        ssl_ca_certs=str(servers.secrets / "ca" / "ca.pem"), protocol=2, driver_info=None,
    )  # fmt: skip


@dataclass
class Installation:
    """Servers, two devices of one job and one of the other, and queues that the aggregators have declared."""

    servers: SecuredServers
    devices: dict[str, tuple[str, str]]  # name -> URLs of broker and store

    def broker_url(self, who: str) -> str:
        """Return the URL of a device's or a service's login."""
        return self.devices[who][0] if who in self.devices else self.servers.url(who, "broker_url")

    def store_url(self, who: str) -> str:
        """Return the URL of a device's or a service's login."""
        return self.devices[who][1] if who in self.devices else self.servers.url(who, "store_url")

    def attempt(self, who: str, act: Callable[[Any], object]) -> tuple[int, str] | None:
        """Do something on a channel of its own; return code and text of the broker's refusal, None: it let us."""
        connection = amqp(self.servers, self.broker_url(who))
        try:
            channel = connection.channel()
            channel.confirm_delivery()
            act(channel)
            connection.process_data_events(0)
        except pika.exceptions.ChannelClosedByBroker as error:
            return error.reply_code, error.reply_text
        else:
            return None
        finally:
            if connection.is_open:
                connection.close()


@pytest.fixture(scope="module")
def installation(secured: SecuredServers, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Installation]:
    folder = tmp_path_factory.mktemp("devices")
    files = {name: enrolled(secured, folder, name, job) for name, job in DEVICES.items()}
    for home, job in (("aggregator", JOB), (f"aggregator.{OTHER}", OTHER)):
        source = RabbitSource(secured.url(home, "broker_url"), job, 8)
        source.link.wait_ready(20)
        source.close()
    yield Installation(secured, {name: urls_of(file) for name, file in files.items()})
