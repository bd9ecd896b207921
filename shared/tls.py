"""TLS to RabbitMQ and Redis: certificates travel as parameters of the URLs, so every place that takes a URL has them.

    amqps://login:password@host:5671/fedmq?ca_file=/etc/fedmq/ca.pem&cert_file=...&key_file=...

`load` of shared/config.py puts them there from FEDMQ_TLS_CA, FEDMQ_TLS_CERT and FEDMQ_TLS_KEY. Without a `ca_file` the
system's authorities are trusted. The server's name is always checked.
"""

import os
import ssl
import tempfile
import time
from pathlib import Path
from urllib.parse import parse_qsl, quote, urlencode, urlsplit, urlunsplit

SCHEMES = ("amqps", "rediss", "https")
PARAMETERS = ("ca_file", "cert_file", "key_file")
PEM = "-----BEGIN "

_kept: list[tempfile.TemporaryDirectory[str]] = []  # removed when the program ends


def with_files(url: str, files: dict[str, str]) -> str:
    """Return a TLS URL with the names of certificate files, unless it names its own; others as they are.

    Args:
        url: of a server.
        files: some of `ca_file`, `cert_file`, `key_file`.
    """
    if url.partition("://")[0] not in SCHEMES:
        return url
    parts = urlsplit(url)
    given = parse_qsl(parts.query, keep_blank_values=True)
    added = [(name, path) for name, path in files.items() if name not in dict(given)]
    return urlunsplit(parts._replace(query=urlencode(given + added, quote_via=quote, safe="/"))) if added else url


def without_files(url: str) -> tuple[str, dict[str, str]]:
    """Return the URL without the names of certificate files, and those.

    Raises:
        ValueError: a URL without TLS names some: what it is to protect would travel in the clear.
    """
    parts = urlsplit(url)
    given = parse_qsl(parts.query, keep_blank_values=True)
    files = {name: value for name, value in given if name in PARAMETERS}
    if not files:
        return url, {}
    if parts.scheme not in SCHEMES:
        raise ValueError(f"{', '.join(files)} need TLS: write {parts.scheme}s://")
    rest = [(name, value) for name, value in given if name not in PARAMETERS]
    return urlunsplit(parts._replace(query=urlencode(rest, quote_via=quote, safe="/"))), files


def client_context(files: dict[str, str]) -> ssl.SSLContext:
    """Return what a client wraps its socket with: TLS 1.2 or newer, the server's name and certificate checked.

    Args:
        files: what `without_files` returned.

    Raises:
        ValueError: a file is missing, not readable or holds no such thing; the message names it.
    """
    for name, path in files.items():
        try:
            with Path(path).open("rb"):
                pass
        except OSError as error:
            raise ValueError(f"{name} {path} cannot be read: {error.strerror}") from error
    try:
        context = ssl.create_default_context(cafile=files.get("ca_file"))
    except (ssl.SSLError, OSError) as error:
        raise ValueError(f"ca_file {files['ca_file']} holds no certificate: {error}") from error
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    if "cert_file" in files:
        try:
            context.load_cert_chain(files["cert_file"], files.get("key_file"))
        except (ssl.SSLError, OSError) as error:
            raise ValueError(f"cert_file and key_file do not go together, or are none: {error}") from error
    elif "key_file" in files:
        raise ValueError("key_file without cert_file: give both")
    return context


def as_file(text: str, name: str) -> str:
    """Return the path of a file: `text` itself, or, where it is PEM text, a private file that holds it.

    On Linux that file is in memory alone and ends with the program, however it ends.

    Raises:
        ValueError: there is no such file.
    """
    if PEM not in text:
        path = Path(text).expanduser()
        if not path.is_file():
            raise ValueError(f"{path} is no file; give a PEM file or its text")
        return str(path)
    if hasattr(os, "memfd_create") and Path("/proc/self/fd").is_dir():
        handle = os.memfd_create(f"fedmq-{name}")
        with os.fdopen(os.dup(handle), "w") as memory:
            memory.write(text)
        return f"/proc/self/fd/{handle}"
    folder = tempfile.TemporaryDirectory(prefix="fedmq-")  # of mode 0700
    _kept.append(folder)
    path = Path(folder.name) / f"{name}.pem"
    path.write_text(text)
    return str(path)


def hint(error: BaseException, url: str = "") -> str:
    """Return what to do about a failed handshake; "" where the error is none or speaks for itself.

    Args:
        error: what the socket said.
        url: of the server, where it is known whether it was spoken to over TLS.
    """
    text = str(error).lower()
    hints = {
        "hostname mismatch": "its certificate is for another host name: use the name it was made for, or make it anew "
        "with this one",
        "ip address mismatch": "its certificate does not name this address: use the host name it was made for",
        "certificate has expired": "its certificate has expired, or this machine's clock is wrong: it is "
        f"{time.strftime('%Y-%m-%d %H:%M', time.gmtime())} UTC here",
        "not yet valid": "its certificate is not valid yet, so this machine's clock is wrong: it says "
        f"{time.strftime('%Y-%m-%d %H:%M', time.gmtime())} UTC; set up NTP",
        "certificate verify failed": "its certificate is not signed by the authority in FEDMQ_TLS_CA",
        "wrong version number": "it speaks no TLS on this port: check the port, or write amqp:// or redis://",
        "alert certificate expired": "our client certificate has expired: `fedmq devices rotate` makes another",
        "eof occurred": "it hung up in the handshake: perhaps it asks for a certificate of ours, FEDMQ_TLS_CERT",
        "certificate required": "it asks for a client certificate: FEDMQ_TLS_CERT and FEDMQ_TLS_KEY",
        "unknown ca": "it does not accept our client certificate's authority: check FEDMQ_TLS_CERT",
    }
    scheme = url.partition("://")[0]
    if scheme in ("amqp", "redis"):
        hints["reset by peer"] = f"if it speaks TLS alone, write {scheme}s:// and its port for that"
    return next((mend for sign, mend in hints.items() if sign in text), "")
