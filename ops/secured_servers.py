"""A private RabbitMQ and Redis as compose runs them: `fedmq secrets make`, only TLS, the project's own configuration.

For tests: what they find out holds for the very files in broker_config/, in which only addresses and folders change.
"""

import contextlib
import re
import shutil
import socket
import ssl
import tempfile
import tomllib
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from ops import authority, secrets
from ops.servers import PrivateServer, find_program, free_port, private_rabbitmq, stop_port_mapper
from shared.tls import with_files

CONFIG = Path(__file__).parents[1] / "broker_config"
OPERATOR_FILES = ("ca.pem", "client.pem", "client.key")


@dataclass
class SecuredServer(PrivateServer):
    """One server process that speaks TLS alone.

    Attributes:
        certificates: folder of the operator's, which the server may ask for.
        also: another port that has to answer.
    """

    certificates: Path = Path()
    also: int = 0

    def _answers(self) -> bool:
        greeting = b"PING\r\n" if self.name == "redis" else b"AMQP\x00\x00\x09\x01"
        answer = b"-NOAUTH" if self.name == "redis" else b"\x01"
        with contextlib.suppress(OSError):
            if self.also:
                socket.create_connection(("127.0.0.1", self.also), 1).close()
            ca, certificate, key = (str(self.certificates / name) for name in OPERATOR_FILES)
            context = ssl.create_default_context(cafile=ca)
            context.load_cert_chain(certificate, key)
            bare = socket.create_connection(("127.0.0.1", self.port), 1)
            with bare, context.wrap_socket(bare, server_hostname="localhost") as probe:
                probe.sendall(greeting)
                return probe.recv(16).startswith(answer)
        return False


class SecuredServers:
    """A RabbitMQ and a Redis for as long as the `with` block lasts.

    Args:
        jobs: those that get a login for their aggregator and evaluator.
        mutual: refuse whoever shows no certificate of their own.
        hosts: further names that the servers' certificates are good for.

    Attributes:
        secrets: the folder that `fedmq secrets make` filled.
        admin_port: of the management API.
    """

    def __init__(self, jobs: tuple[str, ...] = ("job-a", "job-b"), mutual: bool = False, hosts: tuple[str, ...] = ()):
        self.folder = Path(tempfile.mkdtemp(prefix="fedmq-"))
        self.secrets = self.folder / "secrets"
        store_port, self.admin_port, self.prometheus_port = free_port(), free_port(), free_port()
        self.rabbitmq = self._rabbitmq(mutual)
        self.redis = self._redis(mutual, store_port)
        self._wanted = secrets.Wanted(
            self.secrets, jobs, hosts, broker=f"localhost:{self.rabbitmq.port}", store=f"localhost:{store_port}",
            admin=f"localhost:{self.admin_port}", in_place=True,
        )  # fmt: skip
        secrets.make(self._wanted, authority.utc_now())

    def __enter__(self) -> "SecuredServers":
        """Start both."""
        try:
            self.redis.start()
            self.rabbitmq.start()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop both and remove their folder."""
        self.rabbitmq.stop()
        self.redis.stop()
        stop_port_mapper(self.rabbitmq)
        shutil.rmtree(self.folder, ignore_errors=True)

    def settings(self, home: str) -> dict[str, str]:
        """Return the settings of a service, as `fedmq secrets make` wrote them."""
        return {
            name: str(value) for name, value in tomllib.loads((self.secrets / home / "fedmq.toml").read_text()).items()
        }

    def url(self, home: str, name: str) -> str:
        """Return one of a service's URLs with the certificates it needs."""
        given = self.settings(home)
        files = {f"{kind}_file": given[f"tls_{kind}"] for kind in ("ca", "cert", "key")}
        return with_files(given[name], files)

    def _rabbitmq(self, mutual: bool) -> PrivateServer:
        """Describe the broker: the private node's names and places, broker_config's settings."""
        plain = private_rabbitmq(self.folder / "rabbitmq")
        text = (CONFIG / "rabbitmq.conf").read_text().replace("/run/fedmq", str(self.secrets / "rabbitmq"))
        changes = {
            "listeners.ssl.default": ("listeners.ssl.1", f"127.0.0.1:{plain.port}"),
            "management.ssl.port": ("management.ssl.ip = 127.0.0.1\nmanagement.ssl.port", str(self.admin_port)),
            "prometheus.ssl.port": ("prometheus.ssl.ip = 127.0.0.1\nprometheus.ssl.port", str(self.prometheus_port)),
            "ssl_options.fail_if_no_peer_cert": ("ssl_options.fail_if_no_peer_cert", str(mutual).lower()),
            "disk_free_limit.absolute": ("disk_free_limit.absolute", "50MB"),
        }
        (plain.folder / "rabbitmq.conf").write_text(_changed(text, changes, " = "))
        (plain.folder / "enabled_plugins").write_text((CONFIG / "enabled_plugins").read_text())
        return SecuredServer(
            "rabbitmq", f"amqps://localhost:{plain.port}/fedmq", plain.port, plain.folder, plain.command,
            plain.environment, certificates=self.secrets / "operator", also=self.admin_port,
        )  # fmt: skip

    def _redis(self, mutual: bool, port: int) -> PrivateServer:
        folder = self.folder / "redis"
        folder.mkdir()
        text = (CONFIG / "redis.conf").read_text().replace("/run/fedmq", str(self.secrets / "redis"))
        changes = {
            "bind": ("bind", "127.0.0.1"),
            "tls-port": ("tls-port", str(port)),
            "dir": ("dir", str(folder)),
            "tls-auth-clients": ("tls-auth-clients", "yes" if mutual else "optional"),
        }
        (folder / "redis.conf").write_text(_changed(text, changes, " "))
        command = [find_program("redis-server"), str(folder / "redis.conf")]
        return SecuredServer(
            "redis", f"rediss://localhost:{port}/0", port, folder, command, certificates=self.secrets / "operator"
        )


def _changed(text: str, changes: dict[str, tuple[str, str]], equals: str) -> str:
    """Return a configuration with other values; each of the settings must be there, once."""
    for name, (new_name, value) in changes.items():
        text, count = re.subn(rf"^{re.escape(name)}{equals}.*$", f"{new_name}{equals}{value}", text, flags=re.M)
        if count != 1:
            raise AssertionError(f"broker_config has {name!r} {count} times, not once")
    return text
