"""The connection to Redis: its timeouts, and redis-py's errors as ours."""

import contextlib
import inspect
import ssl
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import redis
from redis.backoff import ExponentialWithJitterBackoff
from redis.retry import Retry

from shared import keepalive, tls
from shared.errors import SettingsError, StoreUnavailable
from shared.urls import check_port, hide_password

NAMELESS: dict[str, Any] = (  # redis-py 7 and newer, or older
    {"driver_info": None}
    if "driver_info" in inspect.signature(redis.Redis.__init__).parameters
    else {"lib_name": None, "lib_version": None}
)
MEND = "check FEDMQ_STORE_URL; a device that was revoked, or whose file was made anew, needs the new file"
CONNECT_S_MAX = 2.5  # tried three times
READ_BYTES = 2**18  # redis-py reads the socket in pieces of this size; its 64 KiB default halves the pull rate


def connect(url: str, answer_s_max: float) -> Any:
    """Return a client that connects when it is first used.

    Raises:
        SettingsError: the URL is none.
    """
    try:
        if urlsplit(url).scheme not in ("redis", "rediss", "unix"):
            raise ValueError("expected redis://:password@host:6379/0")
        check_port(url)
        plain, files = tls.without_files(url)
        client = redis.Redis.from_url(
            plain, **_certificates(plain, files), socket_connect_timeout=CONNECT_S_MAX, socket_timeout=answer_s_max,
            socket_read_size=READ_BYTES, socket_keepalive=True,
            socket_keepalive_options=keepalive.numbered(),
            protocol=2,  # no client name, no PING, no library's name: a login that may only read has none of them
            **NAMELESS,
            retry=Retry(ExponentialWithJitterBackoff(cap=0.5, base=0.05), 2),
        )  # fmt: skip
        client.connection_pool.make_connection()  # connects to nothing, but an unknown ?option shows here
        return client
    except (ValueError, TypeError) as error:
        raise SettingsError(f"FEDMQ_STORE_URL {hide_password(url)!r} is no Redis URL: {error}") from error


def _certificates(url: str, files: dict[str, str]) -> dict[str, Any]:
    """Return redis-py's arguments for TLS; it trusts the system's authorities besides `ca_file`."""
    if urlsplit(url).scheme != "rediss":
        return {}
    tls.client_context(files)  # says which file is wrong; redis-py would only when it connects
    names = {"ca_file": "ssl_ca_certs", "cert_file": "ssl_certfile", "key_file": "ssl_keyfile"}
    return {names[name]: path for name, path in files.items()} | {"ssl_min_version": ssl.TLSVersion.TLSv1_2}


@contextlib.contextmanager
def translated(url: str) -> Iterator[None]:
    """Translate redis-py's errors once."""
    try:
        yield
    except (
        redis.AuthenticationError,
        redis.exceptions.AuthorizationError,
        redis.exceptions.NoPermissionError,
    ) as error:
        raise SettingsError(f"Redis at {hide_password(url)} refuses: {str(error).rstrip('.')}; {MEND}") from error
    except (redis.RedisError, OSError) as error:
        if "NOAUTH" in str(error) or "WRONGPASS" in str(error):
            raise SettingsError(f"Redis at {hide_password(url)} refuses: {str(error).rstrip('.')}; {MEND}") from error
        raise _unavailable(error, url) from error


def _unavailable(error: Exception, url: str) -> StoreUnavailable:
    """Say whether it cannot be reached at all, and what to do."""
    shown, mend = hide_password(url), tls.hint(error, url)
    if isinstance(error, redis.ConnectionError | redis.TimeoutError | OSError):
        cause = next((e for e in (error.__cause__, error.__context__) if isinstance(e, OSError) and e.strerror), error)
        reason = getattr(cause, "strerror", None) or str(error)
        return StoreUnavailable(f"cannot reach Redis at {shown} (FEDMQ_STORE_URL): {reason}{mend and '; ' + mend}")
    return StoreUnavailable(f"Redis at {shown}: {error}")
