"""A private RabbitMQ and Redis, on free ports, in a temporary folder, stopped by pid.

Used by `fedmq demo --servers`, the tests and the benchmarks. They never touch servers that already run.
"""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

from shared.errors import SettingsError, Unavailable
from shared.transport.names import VHOST

START_S_MAX = 90.0  # Erlang on a busy Raspberry Pi takes its time
STOP_S_MAX = 15.0
MAPPER_S_MAX = 5.0  # for the port mapper to hear that its node is gone
_PLACES = "/usr/lib/rabbitmq/bin:/usr/local/sbin:/opt/homebrew/sbin:/opt/homebrew/opt/rabbitmq/sbin:/usr/sbin"

REDIS_OPTIONS = {"appendonly": "yes", "appendfsync": "always", "save": "", "daemonize": "no"}


def free_port() -> int:
    """Return a TCP port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def find_program(name: str) -> str:
    """Return the path of a server program.

    Raises:
        SettingsError: it is not installed; the message says how to install it.
    """
    # Debian's /usr/sbin/rabbitmq-server is a wrapper that changes user and folder: the real script comes first.
    path = shutil.which(name, path=f"{_PLACES}:{os.environ.get('PATH', '')}")
    if path is None:
        raise SettingsError(
            f"{name} is not installed: run `make servers`, or install the packages of RabbitMQ and Redis"
        )
    return path


@dataclass
class PrivateServer:
    """One server process of ours and the folder it lives in."""

    name: str
    url: str
    port: int
    folder: Path
    command: list[str]
    environment: dict[str, str] = field(default_factory=dict)
    process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it and wait until it answers.

        Raises:
            Unavailable: it ended or did not answer in time; the message ends with its own log.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        log = (self.folder / "log.txt").open("ab")
        with log:
            self.process = subprocess.Popen(
                self.command, cwd=self.folder, env=os.environ | self.environment, stdin=subprocess.DEVNULL,
                stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
        deadline = time.monotonic() + START_S_MAX
        while not self._answers():
            if self.process.poll() is not None or time.monotonic() > deadline:
                tail = (self.folder / "log.txt").read_text(errors="replace")[-1500:]
                self.stop()
                raise Unavailable(f"the private {self.name} did not start; its log ends:\n{tail}")
            time.sleep(0.05)

    def stop(self, signal_number: int = signal.SIGTERM) -> None:
        """End it and everything it started."""
        if self.process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal_number)
        try:
            self.process.wait(STOP_S_MAX)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        self.process = None

    def kill(self) -> None:
        """End it at once, as a crash would."""
        self.stop(signal.SIGKILL)

    def _answers(self) -> bool:
        greeting, start = (b"PING\r\n", b"+PONG") if self.name == "redis" else (b"AMQP\x00\x00\x09\x01", b"\x01")
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1) as probe:
            probe.sendall(greeting)
            return probe.recv(16).startswith(start)
        return False


def private_redis(folder: Path, options: dict[str, str] | None = None) -> PrivateServer:
    """Describe a Redis that makes every write durable before it answers."""
    port = free_port()
    arguments = [
        part for name, value in (REDIS_OPTIONS | (options or {})).items() for part in (f"--{name}", value)
    ]  # fmt: skip
    command = [
        find_program("redis-server"),
        "--port",
        str(port),
        "--bind",
        "127.0.0.1",
        "--dir",
        str(folder),
        *arguments,
    ]
    return PrivateServer("redis", f"redis://127.0.0.1:{port}/0", port, folder, command)


def private_rabbitmq(folder: Path, settings: str = "") -> PrivateServer:
    """Describe a RabbitMQ node of its own name, cookie and port mapper, with login `fedmq`."""
    port, distribution, mapper = free_port(), free_port(), free_port()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "rabbitmq.conf").write_text(
        f"listeners.tcp.1 = 127.0.0.1:{port}\ndefault_vhost = {VHOST}\ndefault_user = fedmq\ndefault_pass = fedmq\n"
        f"disk_free_limit.absolute = 50MB\nlog.console = true\nlog.console.level = warning\n"
        f"log.file = false\n{settings}"
    )
    (folder / "enabled_plugins").write_text("[].")
    environment = {
        "HOME": str(folder),  # the Erlang cookie is made here
        "RABBITMQ_NODENAME": f"fedmq{port}@localhost",
        "RABBITMQ_CONFIG_FILE": str(folder / "rabbitmq.conf"),
        "RABBITMQ_CONF_ENV_FILE": str(folder / "none"),
        "RABBITMQ_ENABLED_PLUGINS_FILE": str(folder / "enabled_plugins"),
        "RABBITMQ_MNESIA_BASE": str(folder / "data"),
        "RABBITMQ_LOG_BASE": str(folder / "log"),
        "RABBITMQ_PID_FILE": str(folder / "pid"),
        "RABBITMQ_DIST_PORT": str(distribution),
        "ERL_EPMD_PORT": str(mapper),
        "ERL_EPMD_ADDRESS": "127.0.0.1",
        "ERL_MAX_PORTS": "4096",
    }
    url = f"amqp://fedmq:fedmq@127.0.0.1:{port}/{VHOST}"
    return PrivateServer("rabbitmq", url, port, folder, [find_program("rabbitmq-server")], environment)


class PrivateServers:
    """A RabbitMQ and a Redis for as long as the `with` block lasts."""

    def __init__(self, folder: Path | None = None) -> None:
        self._temporary = tempfile.mkdtemp(prefix="fedmq-") if folder is None else None
        self.folder = folder or Path(str(self._temporary))
        self.redis = private_redis(self.folder / "redis")
        self.rabbitmq = private_rabbitmq(self.folder / "rabbitmq")

    def __enter__(self) -> "PrivateServers":
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
        if self._temporary:
            shutil.rmtree(self._temporary, ignore_errors=True)


def stop_port_mapper(rabbitmq: PrivateServer) -> None:
    """End the Erlang port mapper that the node started beside itself; it listens on a port of its own.

    It refuses while it knows of a node, and hears of a killed one a moment later.
    """
    epmd = shutil.which("epmd")
    deadline = time.monotonic() + MAPPER_S_MAX
    while epmd and time.monotonic() < deadline:
        done = subprocess.run([epmd, "-kill"], env=os.environ | rabbitmq.environment, capture_output=True, check=False)
        if b"living nodes" not in done.stdout + done.stderr:
            return
        time.sleep(0.1)


@contextlib.contextmanager
def servers_or_urls(broker_url: str | None, store_url: str | None) -> Iterator[tuple[str, str]]:
    """Yield the URLs given, or those of private servers; both or neither must be given.

    Raises:
        SettingsError: only one URL is given.
    """
    if bool(broker_url) != bool(store_url):
        raise SettingsError("give both --broker-url and --store-url, or neither for private servers")
    if broker_url and store_url:
        yield broker_url, store_url
        return
    with PrivateServers() as servers:
        yield servers.rabbitmq.url, servers.redis.url
