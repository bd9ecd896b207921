"""The way to a server, step by step: its name, its port, its certificate. Each says what is wrong with the next."""

import socket
import ssl
from dataclasses import dataclass
from urllib.parse import urlsplit

from shared import tls
from shared.errors import BrokerUnavailable, SettingsError, StoreUnavailable, Unavailable
from shared.urls import PORTS, check_port

CONNECT_S = 6.0


@dataclass(frozen=True, slots=True)
class Server:
    """Where a server is.

    Attributes:
        setting: that names it.
        host: name or address.
        port: TCP port.
        files: certificate files; None without TLS.
    """

    setting: str
    host: str
    port: int
    files: dict[str, str] | None


def server_of(setting: str, url: str) -> Server | None:
    """Return where a URL leads, None where that is no network.

    Raises:
        SettingsError: it is no URL of a server.
    """
    try:
        check_port(url)
        plain, files = tls.without_files(url)
        parts = urlsplit(plain)
        if parts.scheme == "unix":
            return None
        port = parts.port or PORTS[parts.scheme]
    except (ValueError, KeyError) as error:
        raise SettingsError(f"{setting} is no URL of a server: {error}") from error
    return Server(setting, parts.hostname or "", port, files if parts.scheme in tls.SCHEMES else None)


def resolve(server: Server) -> str:
    """Look its name up; return its addresses.

    Raises:
        Unavailable: it has none.
    """
    try:
        found = socket.getaddrinfo(server.host, server.port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise _away(server)(
            f"{server.host!r} has no address here ({reason}): check {server.setting}, and this device's network and DNS"
        ) from error
    addresses = list(dict.fromkeys(str(address[0]) for *_, address in found))
    return f"{server.host} is an address" if addresses == [server.host] else f"{server.host} is {', '.join(addresses)}"


def connect(server: Server) -> str:
    """Open a TCP connection.

    Raises:
        Unavailable: nothing answers.
    """
    with _connected(server):
        return f"{server.host} answers on port {server.port}"


def handshake(server: Server) -> str:
    """Greet it over TLS; return until when its certificate is good.

    Raises:
        Unavailable: it does not speak TLS, or cannot prove who it is; the message says what to do.
        SettingsError: our own certificate files are wrong.
    """
    if server.files is None:
        return f"none: {server.setting} is without TLS, so anybody on the way can read the password"
    try:
        context = tls.client_context(server.files)
    except ValueError as error:
        raise SettingsError(f"{server.setting}: {error}") from error
    try:
        with _connected(server) as bare, context.wrap_socket(bare, server_hostname=server.host) as wrapped:
            certificate, version = wrapped.getpeercert() or {}, wrapped.version()
    except OSError as error:  # also ssl.SSLError
        mend = "it may speak no TLS on this port" if isinstance(error, TimeoutError) else tls.hint(error)
        raise _away(server)(
            f"no TLS with {server.host}:{server.port}: {_reason(error)}{mend and '; ' + mend}"
        ) from error
    return f"{version}, its certificate is good until {certificate.get('notAfter')}"


def _connected(server: Server) -> socket.socket:
    try:
        return socket.create_connection((server.host, server.port), CONNECT_S)
    except OSError as error:
        mend = {
            ConnectionRefusedError: "nothing listens there: check the port, and that the server runs",
            TimeoutError: "a firewall may swallow it: ask for AMQP on port 443 if this network allows nothing else",
        }.get(type(error), "check this device's network")
        raise _away(server)(
            f"{server.host}:{server.port} ({server.setting}) cannot be reached: {_reason(error)}; {mend}"
        ) from error


def _reason(error: OSError) -> str:
    if isinstance(error, ssl.SSLCertVerificationError):
        return error.verify_message
    return str(error.strerror or error)


def _away(server: Server) -> type[Unavailable]:
    return StoreUnavailable if "STORE" in server.setting else BrokerUnavailable
