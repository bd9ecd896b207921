"""Real faults: a frozen server, a cut connection, a host that is not there; and waiting for what follows."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from ops.servers import PrivateServer, find_program


def wait_until(
    condition: Callable[[], Any], timeout_s: float = 15.0, problem: Callable[[], str] = lambda: "it never came true"
) -> Any:
    """Return the condition's value once it is true; fail with `problem()` after `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    while True:
        value = condition()
        if value:
            return value
        assert time.monotonic() < deadline, f"after {timeout_s:g} s: {problem()}"
        time.sleep(0.02)


def rabbitmqctl(server: PrivateServer, *arguments: str) -> str:
    """Run `rabbitmqctl` against a private node; return what it printed."""
    command = [find_program("rabbitmqctl"), "--quiet", "-n", server.environment["RABBITMQ_NODENAME"], *arguments]
    done = subprocess.run(command, env=os.environ | server.environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{arguments}: {done.stdout}{done.stderr}"
    return done.stdout


def listed(server: PrivateServer, what: str, *columns: str, vhost: str | None = None) -> list[dict[str, Any]]:
    """Return the rows of a `rabbitmqctl list_...` command."""
    place = ["-p", vhost] if vhost else []
    rows: list[dict[str, Any]] = json.loads(
        rabbitmqctl(server, f"list_{what}", *place, *columns, "--formatter", "json")
    )
    return rows


@contextlib.contextmanager
def frozen(server: PrivateServer) -> Iterator[None]:
    """Let a server hold its connections and answer nothing, as a hung machine would."""
    assert server.process is not None
    os.killpg(server.process.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.killpg(server.process.pid, signal.SIGCONT)


@contextlib.contextmanager
def silent_host() -> Iterator[int]:
    """Yield the port of a host that takes connections and says nothing."""
    with socket.create_server(("127.0.0.1", 0), backlog=16) as listener:
        yield listener.getsockname()[1]


@contextlib.contextmanager
def unreachable_host() -> Iterator[int]:
    """Yield a port that drops packets: its queue of connections is full and nobody takes one."""
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=0))
        for _ in range(4):
            filler = stack.enter_context(socket.socket())
            filler.setblocking(False)
            filler.connect_ex(listener.getsockname())
        yield listener.getsockname()[1]


class Proxy:
    """Stands between a client and a server, and cuts the connection at a chosen request.

    Attributes:
        port: where clients connect.
        cut_request: requests with these bytes are dropped, and the connection with them.
        cut_answer: requests with these bytes reach the server, but its answer is dropped with the connection.
        cuts_left: how often to do so.
    """

    def __init__(self, server_port: int) -> None:
        self.cut_request: bytes | None = None
        self.cut_answer: bytes | None = None
        self.cuts_left = 0
        self._server_port = server_port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        """Take no more connections."""
        self._listener.shutdown(socket.SHUT_RDWR)  # wakes the thread that accepts
        self._listener.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                try:
                    server = socket.create_connection(("127.0.0.1", self._server_port))
                except OSError:
                    client.close()
                    continue
                dropping = threading.Event()
                threading.Thread(target=self._requests, args=(client, server, dropping), daemon=True).start()
                threading.Thread(target=self._answers, args=(client, server, dropping), daemon=True).start()

    def _requests(self, client: socket.socket, server: socket.socket, dropping: threading.Event) -> None:
        with contextlib.suppress(OSError):
            while request := client.recv(2**18):
                if self._cut(self.cut_request, request):
                    break
                if self._cut(self.cut_answer, request):
                    dropping.set()
                server.sendall(request)
        _shut(client, server)

    def _answers(self, client: socket.socket, server: socket.socket, dropping: threading.Event) -> None:
        with contextlib.suppress(OSError):
            while answer := server.recv(2**18):
                if dropping.is_set():
                    break
                client.sendall(answer)
        _shut(client, server)

    def _cut(self, pattern: bytes | None, request: bytes) -> bool:
        if pattern is None or self.cuts_left == 0 or pattern not in request:
            return False
        self.cuts_left -= 1
        return True


def _shut(*sockets: socket.socket) -> None:
    for one in sockets:
        with contextlib.suppress(OSError):
            one.shutdown(socket.SHUT_RDWR)
        one.close()
