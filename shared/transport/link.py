"""One AMQP connection owned by one thread, which reopens it for ever with jittered back-off.

pika is not thread-safe, and heartbeats stop while the owning thread does something else: so this thread does
nothing else, and other threads hand work over with `call`. Hours of training cost no heartbeat.
"""

import contextlib
import logging
import random
import struct
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

import pika
import pika.adapters.select_connection
import pika.adapters.utils.io_services_utils as pika_io
import pika.channel
import pika.data
import pika.exceptions
from tenacity import Retrying, sleep_using_event, stop_when_event_set, wait_random_exponential

from shared import keepalive, tls
from shared.errors import BrokerUnavailable, FedMQError, SettingsError
from shared.transport.names import VHOST
from shared.urls import check_port, hide_password

log = logging.getLogger("fedmq.broker")

HEARTBEAT_S = 15  # a peer that hangs is noticed within two of these, on either side
SOCKET_TIMEOUT_S = 5  # TCP connect; the handshake may take twice as long
BACKOFF_S_MAX = 15.0
GOODBYE_S = 1.0  # for the broker to hear that a failed connection is closed

Channel = Any  # pika.channel.Channel; pika ships no type marker
Step = Callable[..., Any]  # a channel method that takes `callback=`

# pika reads 4 KiB a time and appends it to what it has of a 128 KiB frame: at 1 MB a message that copying
# costs half the throughput. Reading in large pieces is a private constant of its transport; were it renamed,
# only speed would be lost (ops/bench shows how much).
READ_BYTES = 2**18
TRICKLE_BYTES = 2**14
pika_io._AsyncTransportBase._MAX_RECV_BYTES = READ_BYTES
pika_io._AsyncTransportBase._MAX_CONSUME_BYTES = 4 * READ_BYTES

_read_table = pika.data.decode_table


def _table(encoded: bytes, offset: int) -> tuple[dict[str, Any], int]:
    """Read a table of headers; of one that pika cannot read nothing is kept.

    A date beyond Python's, or tables nested a thousand deep, would end the connection, and again with each delivery
    of the same message: one message would stop a job for good.
    """
    try:
        table: tuple[dict[str, Any], int] = _read_table(encoded, offset)
    except Exception as error:  # OverflowError, ValueError, RecursionError, struct.error, ...
        log.warning("headers of a message cannot be read: %s", type(error).__name__)
        return {}, offset + 4 + int(struct.unpack_from(">I", encoded, offset)[0])
    return table


pika.data.decode_table = _table


def parameters(url: str, name: str) -> Any:
    """Parse an AMQP URL; the virtual host is `fedmq` unless the URL names one.

    Raises:
        SettingsError: not an amqp:// or amqps:// URL.
    """
    try:
        parts = urlsplit(url)
        if parts.scheme not in ("amqp", "amqps") or not parts.hostname:
            raise ValueError("expected amqp://login:password@host:5672/fedmq")
        check_port(url)
        plain, files = tls.without_files(url)
        parsed = pika.URLParameters(plain)
        if parts.scheme == "amqps":
            parsed.ssl_options = pika.SSLOptions(tls.client_context(files), parts.hostname)
    except (ValueError, TypeError, AttributeError) as error:
        raise SettingsError(f"FEDMQ_BROKER_URL {hide_password(url)!r} is no AMQP URL: {error}") from error
    if not parts.path.strip("/"):
        parsed.virtual_host = VHOST
    if "heartbeat" not in parts.query:
        parsed.heartbeat = HEARTBEAT_S
    parsed.connection_attempts = 1
    parsed.tcp_options = keepalive.supported()
    parsed.socket_timeout = SOCKET_TIMEOUT_S
    parsed.stack_timeout = 2 * SOCKET_TIMEOUT_S - 1
    parsed.client_properties = {"connection_name": name, "product": "fedmq"}
    return parsed


class Link:
    """The connection and its thread.

    Args:
        url: AMQP URL.
        name: shown in the broker's list of connections.
        prepare: called on the owner thread with each new channel; returns the setup steps to run in order.
        on_down: called on the owner thread, with the reason, after a connection was lost.
        before_poll: called on the owner thread before each wait for the network; may block for under a second.
        backoff_s_max: longest wait between two attempts to connect; a fleet needs a longer one than a single program.
    """

    def __init__(
        self,
        url: str,
        name: str,
        prepare: Callable[[Channel], list[Step]],
        on_down: Callable[[Exception], None],
        before_poll: Callable[[], None] = lambda: None,
        backoff_s_max: float = BACKOFF_S_MAX,
    ) -> None:
        self.url = url
        self.problem: FedMQError = BrokerUnavailable(f"RabbitMQ at {hide_password(url)} has not answered yet")
        self.blocked: str | None = None  # why the broker accepts no publishes at the moment
        self.ready = threading.Event()
        self._parameters = parameters(url, name)
        self._prepare, self._on_down, self._before_poll = prepare, on_down, before_poll
        self._backoff_s_max = backoff_s_max
        self._closing = threading.Event()
        self._lock = threading.Lock()
        self._loop: Any = None
        self._connection: Any = None
        self._failure: Exception | None = None
        self._lost = False  # the log says that there is no connection
        self._thread = threading.Thread(target=self._run, name=f"amqp {name}", daemon=True)
        self._thread.start()

    def wait_ready(self, timeout_s: float) -> None:
        """Return when the connection is up.

        Raises:
            BrokerUnavailable: it is not within `timeout_s`; the message says why.
            SettingsError: the broker is there but refuses us; waiting would not help.
        """
        deadline = time.monotonic() + timeout_s
        while not self.ready.wait(0.05):
            if time.monotonic() >= deadline or isinstance(self.problem, SettingsError):
                raise self.problem

    def call(self, function: Callable[[], None]) -> bool:
        """Run `function` soon on the owner thread; False when there is no connection now."""
        with self._lock:
            if not self.ready.is_set():
                return False
            self._loop.add_callback_threadsafe(function)
            return True

    def read_slowly(self, slowly: bool) -> None:
        """Read a trickle, which keeps the heartbeats alive, or at full speed; owner thread only."""
        transport = getattr(self._connection, "_transport", None)
        if transport is not None:
            transport._MAX_RECV_BYTES = TRICKLE_BYTES if slowly else READ_BYTES
            transport._MAX_CONSUME_BYTES = TRICKLE_BYTES if slowly else 4 * READ_BYTES

    def reconnect(self, why: str) -> None:
        """Drop the connection and open a new one."""
        self.call(lambda: self._fail(BrokerUnavailable(why)))

    def close(self) -> None:
        """Close the connection and end the thread."""
        self._closing.set()
        with self._lock:
            if self._loop is not None:
                self._loop.add_callback_threadsafe(self._end)
        self._thread.join(SOCKET_TIMEOUT_S)

    def server_version(self) -> str:
        """Return the broker's version, e.g. `3.10.8`."""
        properties = (self._connection and self._connection.server_properties) or {}
        version = properties.get("version", "")
        return version.decode() if isinstance(version, bytes) else str(version)

    def _run(self) -> None:
        while not self._closing.is_set():
            retrying = Retrying(
                wait=wait_random_exponential(multiplier=0.25, max=self._backoff_s_max),
                sleep=sleep_using_event(self._closing),
                stop=stop_when_event_set(self._closing),
                before_sleep=self._say_when_again,
                retry_error_callback=lambda _state: None,
            )  # fmt: skip
            retrying(self._connect_and_serve)
            self._closing.wait(random.uniform(0.05, 0.5))  # noqa: S311 - spreads a fleet that lost its broker

    def _say_when_again(self, state: Any) -> None:
        self._lost = True
        log.warning("%s; trying again in %.1f s", self.problem, state.next_action.sleep)

    def _connect_and_serve(self) -> None:
        """Serve one connection until it ends; raise if it never became ready."""
        self._failure, self.blocked = None, None
        loop = pika.adapters.select_connection.IOLoop()
        with self._lock:
            if self._closing.is_set():
                loop.close()
                return
            self._loop = loop
        self._connection = pika.SelectConnection(
            self._parameters,
            on_open_callback=self._on_open,
            on_open_error_callback=lambda _connection, error: self._fail(explain(error, self.url)),
            on_close_callback=lambda _connection, error: self._fail(explain(error, self.url)),
            custom_ioloop=loop,
        )
        loop.activate_poller()
        try:
            while self._failure is None:
                self._before_poll()
                loop.poll()
                loop.process_timeouts()
        except ValueError as error:  # pika's own, when a connection is reset while it is being opened
            self._failure = BrokerUnavailable(
                f"RabbitMQ at {hide_password(self.url)} broke the connection off: {error}"
            )
        except Exception as error:
            log.exception("the connection's thread failed; reconnecting")
            self._failure = BrokerUnavailable(f"{type(error).__name__}: {error}")
        finally:
            with self._lock:
                was_ready = self.ready.is_set()
                self.ready.clear()
                self._loop = None
            self._abandon(loop)
        failure = self._failure or BrokerUnavailable("closed")
        self.problem = failure if isinstance(failure, FedMQError) else BrokerUnavailable(str(failure))
        self._on_down(self.problem)
        if not was_ready:
            raise self.problem
        if not self._closing.is_set():
            self._lost = True
            log.warning("lost the broker: %s; reconnecting", self.problem)

    def _abandon(self, loop: Any) -> None:
        """Close the socket of a connection that failed, giving the broker a moment to hear of it."""
        deadline = time.monotonic() + GOODBYE_S
        try:
            self._close_connection()
            while not self._connection.is_closed and time.monotonic() < deadline:
                loop.call_later(0.05, lambda: None)  # poll() returns by then at the latest
                loop.poll()
                loop.process_timeouts()
        except Exception as error:  # a half-open connection may fail in any way while it is thrown away
            log.debug("while closing: %s", error)
        transport = getattr(self._connection, "_transport", None)
        with contextlib.suppress(Exception):
            if transport is not None:
                transport.abort()
                loop.process_timeouts()
        with contextlib.suppress(Exception):
            loop.deactivate_poller()
        loop.close()

    def _close_connection(self) -> None:
        if self._connection is not None and not (self._connection.is_closed or self._connection.is_closing):
            self._connection.close()

    def _end(self) -> None:
        """Leave an open connection by a handshake; do not wait for one that is still on its way."""
        if self.ready.is_set():
            self._close_connection()
        else:
            self._fail(BrokerUnavailable("closed"))

    def _fail(self, error: Exception) -> None:
        self._failure = self._failure or error

    def _on_open(self, connection: Any) -> None:
        connection.add_on_connection_blocked_callback(self._on_blocked)
        connection.add_on_connection_unblocked_callback(self._on_unblocked)
        connection.channel(on_open_callback=self._on_channel)

    def _on_blocked(self, _connection: Any, frame: Any) -> None:
        reason = frame.method.reason
        self.blocked = reason.decode() if isinstance(reason, bytes) else str(reason)
        log.warning("the broker accepts no publishes: %s", self.blocked)

    def _on_unblocked(self, _connection: Any, _frame: Any) -> None:
        self.blocked = None
        log.info("the broker accepts publishes again")

    def _on_channel(self, channel: Channel) -> None:
        channel.add_on_close_callback(lambda _channel, error: self._fail(explain(error, self.url)))
        steps = deque(self._prepare(channel))

        def next_step(_frame: Any = None) -> None:
            if steps:
                steps.popleft()(callback=next_step)
            else:
                with self._lock:
                    self.ready.set()
                if self._lost:
                    log.info("RabbitMQ at %s answers again", hide_password(self.url))
                self._lost = False

        next_step()


def explain(error: Exception, url: str) -> FedMQError:
    """Translate pika's error once, into what the user can do about it."""
    shown = hide_password(url)
    if isinstance(error, pika.exceptions.ProbableAuthenticationError):
        return SettingsError(
            f"RabbitMQ at {shown} refuses this login or password: check FEDMQ_BROKER_URL; a device that was revoked, "
            "or whose file was made anew, needs the new file"
        )
    if isinstance(error, pika.exceptions.ProbableAccessDeniedError):
        return SettingsError(
            f"RabbitMQ at {shown} refuses this virtual host: it must exist (`rabbitmqctl add_vhost {VHOST}`) and the "
            f"login needs permissions on it (`rabbitmqctl set_permissions -p {VHOST} LOGIN '.*' '.*' '.*'`)"
        )
    code, text = getattr(error, "reply_code", None), getattr(error, "reply_text", "")
    if isinstance(code, int) and text:
        if code in (403, 530):
            return SettingsError(f"RabbitMQ at {shown} refuses: {code} {text}")
        return BrokerUnavailable(f"RabbitMQ at {shown}: {code} {text}")
    cause = _root_cause(error)
    mend = tls.hint(cause, url)
    return BrokerUnavailable(
        f"cannot reach RabbitMQ at {shown}: {str(cause) or type(cause).__name__}{mend and '; ' + mend}"
    )


def _root_cause(error: Any) -> Exception:
    """Dig the operating system's own error out of pika's nested ones."""
    while True:
        nested = getattr(error, "exceptions", None) or [getattr(error, "exception", None)]
        inner = nested[-1] or (error.args[0] if error.args and isinstance(error.args[0], Exception) else None)
        if not isinstance(inner, Exception):
            return error  # type: ignore[no-any-return]
        error = inner
