"""The suite's own RabbitMQ and Redis: a folder's conftest imports `servers`, and gets a pair of its own.

They start on free ports when a test first asks for them and are stopped at the end, whatever happened, a SIGTERM
included. A server that is not installed is an error, never a skip.
"""

import signal
from collections.abc import Iterator

import pytest

from ops.servers import PrivateServers

__all__ = ["servers"]


@pytest.fixture(scope="session")
def servers() -> Iterator[PrivateServers]:
    """Yield a running RabbitMQ and Redis; a test that stops or bends them starts its own instead."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: pytest tears its fixtures down
    try:
        with PrivateServers() as running:
            yield running
    finally:
        signal.signal(signal.SIGTERM, before)
