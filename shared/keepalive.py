"""How soon a connection whose other end vanished without a word is given up, by TCP's own means.

A host that lost its power, a cable, a firewall that forgot: nobody closes such a connection, and the kernel would
resend for a quarter of an hour. A server that is there but answers nothing is another matter: for that there are the
heartbeat of AMQP and the time-outs of Redis.
"""

import socket

OPTIONS = {
    "TCP_KEEPIDLE": 10,  # seconds of silence before the first probe
    "TCP_KEEPINTVL": 4,  # seconds between probes
    "TCP_KEEPCNT": 3,  # probes without an answer
    "TCP_USER_TIMEOUT": 20_000,  # milliseconds that sent bytes may stay unacknowledged
}


def supported() -> dict[str, int]:
    """Return the options this system knows, by name."""
    return {name: value for name, value in OPTIONS.items() if hasattr(socket, name)}


def numbered() -> dict[int, int]:
    """Return the options this system knows, by their number, as `setsockopt` takes them."""
    return {getattr(socket, name): value for name, value in supported().items()}
