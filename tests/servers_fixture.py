"""The suite's own RabbitMQ and Redis: a folder's conftest imports `servers`, and gets a pair of its own.

They start on free ports when a test first asks for them and are stopped at the end, whatever happened. A server
that is not installed is an error, never a skip.
"""

from collections.abc import Iterator

import pytest

from ops.servers import PrivateServers

__all__ = ["servers"]


@pytest.fixture(scope="session")
def servers() -> Iterator[PrivateServers]:
    """Yield a running RabbitMQ and Redis; a test that stops or bends them starts its own instead."""
    with PrivateServers() as running:
        yield running
