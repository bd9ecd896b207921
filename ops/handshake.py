"""When a server's certificate ends, as a client sees it."""

import contextlib
import socket
import ssl
from urllib.parse import urlsplit

from shared import tls
from shared.urls import PORTS

ANSWER_S_MAX = 5.0
EXPIRED = 10  # X509_V_ERR_CERT_HAS_EXPIRED


def certificate_end(url: str, now: float) -> float | None:
    """Return the unix seconds at which the certificate behind a TLS URL ends; None without TLS.

    Of one that has ended already the handshake tells no more than that: its end is then `now`. The host name is not
    looked at: that is for those who send something there.

    Args:
        url: of the server; its authority as the parameter `ca_file`.
        now: unix seconds.

    Raises:
        OSError: it cannot be reached, or its certificate is not of that authority.
        ValueError: a file of the URL is none.
    """
    parts = urlsplit(url)
    if parts.scheme not in tls.SCHEMES:
        return None
    context = tls.client_context(tls.without_files(url)[1])
    context.check_hostname = False
    address = (parts.hostname or "localhost", parts.port or PORTS[parts.scheme])
    try:
        with (
            socket.create_connection(address, ANSWER_S_MAX) as plain,
            context.wrap_socket(plain, server_hostname=address[0]) as secured,
        ):
            certificate = secured.getpeercert() or {}
            with contextlib.suppress(OSError):  # a farewell: without one RabbitMQ waits, and logs a handshake_timeout
                secured.unwrap()
    except ssl.SSLCertVerificationError as error:
        if error.verify_code == EXPIRED:
            return now
        raise
    return float(ssl.cert_time_to_seconds(str(certificate["notAfter"])))
