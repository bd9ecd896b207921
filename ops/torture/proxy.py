"""A TCP proxy that can be told to fail: cut, slow, stalled, half-open.

Source: the idea is toxiproxy's, github.com/Shopify/toxiproxy.
"""

import contextlib
import socket
import struct
import threading
import time
from dataclasses import dataclass, field

CHUNK_BYTES = 2**18
RESET = struct.pack("ii", 1, 0)  # SO_LINGER of no time: closing sends RST, as a machine that was restarted does
CONNECT_S_MAX = 5.0


@dataclass(eq=False)
class _Connection:
    """Both halves of a connection through the proxy."""

    client: socket.socket
    server: socket.socket | None = None
    half_open: bool = False
    lock: threading.Lock = field(default_factory=threading.Lock)

    def close(self, reset: bool = False) -> None:
        """Close both ends."""
        with self.lock:
            for one in (self.client, self.server):
                if one is not None:
                    _close(one, reset)


class Proxy:
    """Stands between programs and one server; passes every byte until it is told otherwise. Thread-safe.

    Args:
        server_port: where the server listens, on this machine.

    Attributes:
        port: where programs connect.
    """

    def __init__(self, server_port: int) -> None:
        self._server_port = server_port
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.port = int(self._listener.getsockname()[1])
        self._connections: set[_Connection] = set()
        self._lock = threading.Lock()
        self._flowing = threading.Event()
        self._flowing.set()
        self._refusing = self._swallowing = False
        self._latency_s, self._bytes_per_s = 0.0, 0.0
        self._down_bytes = 0
        threading.Thread(target=self._accept, name=f"proxy {self.port}", daemon=True).start()

    @property
    def down_bytes(self) -> int:
        """How many bytes the server has sent through it."""
        return self._down_bytes

    def cut(self, reset: bool) -> None:
        """Close every connection and take no new one until `heal`.

        Args:
            reset: by RST, not by FIN.
        """
        self._refusing = True
        self.drop(reset)

    def drop(self, reset: bool) -> None:
        """Close every connection; new ones are welcome."""
        for connection in self._present():
            connection.close(reset)

    def slow(self, latency_s: float, bytes_per_s: float) -> None:
        """Let every piece of data wait, and pass so many bytes a second per connection and direction."""
        self._latency_s, self._bytes_per_s = latency_s, bytes_per_s

    def stall(self) -> None:
        """Hold every byte, in both directions, until `heal`; then they go on, as TCP does after a short partition."""
        self._flowing.clear()

    def half_open(self) -> None:
        """Swallow every byte of the present connections for ever, and tell neither end; until `heal` of new ones too.

        An end that closes such a connection is not heard by the other: a router has forgotten it.
        """
        self._swallowing = True
        for connection in self._present():
            connection.half_open = True

    def heal(self) -> None:
        """Serve new connections, and present ones that are not half-open, as if nothing had been."""
        self._refusing = self._swallowing = False
        self._latency_s = self._bytes_per_s = 0.0
        self._flowing.set()

    def close(self) -> None:
        """Close everything."""
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # wakes the thread that accepts
        self._listener.close()
        self.heal()
        self.drop(reset=False)

    def _present(self) -> list[_Connection]:
        with self._lock:
            return list(self._connections)

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                if self._refusing:
                    _close(client, reset=True)
                    continue
                connection = _Connection(client, half_open=self._swallowing)
                with self._lock:
                    self._connections.add(connection)
                threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: _Connection) -> None:
        """Pass what the client sends; another thread passes the answers."""
        if connection.half_open:  # made while nothing passes: there never was a server
            self._pump(connection, connection.client, None)
            connection.close()
        else:
            try:
                connection.server = socket.create_connection(("127.0.0.1", self._server_port), CONNECT_S_MAX)
            except OSError:
                connection.close(reset=True)
                self._forget(connection)
                return
            connection.server.settimeout(None)
            for one in (connection.client, connection.server):
                one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            answers = threading.Thread(
                target=self._one_way, args=(connection, connection.server, connection.client), daemon=True
            )
            answers.start()
            self._one_way(connection, connection.client, connection.server)
            answers.join()
            connection.close()
        self._forget(connection)

    def _forget(self, connection: _Connection) -> None:
        with self._lock:
            self._connections.discard(connection)

    def _one_way(self, connection: _Connection, source: socket.socket, sink: socket.socket) -> None:
        """Pass data until one end closes; then close the other, unless that end could not hear of it."""
        self._pump(connection, source, sink)
        if connection.half_open:
            _close(source, reset=False)
        else:
            connection.close()

    def _pump(self, connection: _Connection, source: socket.socket, sink: socket.socket | None) -> None:
        with contextlib.suppress(OSError):
            while chunk := source.recv(CHUNK_BYTES):
                self._flowing.wait()
                if connection.half_open or sink is None:
                    continue
                if self._latency_s:
                    time.sleep(self._latency_s + len(chunk) / self._bytes_per_s)
                sink.sendall(chunk)
                if source is connection.server:
                    self._down_bytes += len(chunk)
            self._flowing.wait()  # nor does the end of a connection pass a partition


def _close(one: socket.socket, reset: bool) -> None:
    with contextlib.suppress(OSError):
        if reset:
            one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        else:
            one.shutdown(socket.SHUT_RDWR)
    with contextlib.suppress(OSError):
        if reset:
            one.shutdown(socket.SHUT_RD)  # wakes a thread of ours that reads it
        one.close()
