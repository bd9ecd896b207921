"""What both adapters ask of a server's URL: a sound port, and a form without its password."""

import re
from urllib.parse import urlsplit

PORTS = {"amqp": 5672, "amqps": 5671, "redis": 6379, "rediss": 6379}  # of a URL that names none


def check_port(url: str) -> None:
    """Raise `ValueError` without quoting what stands for the port: it may be the first half of a password."""
    try:
        _ = urlsplit(url).port
    except ValueError:
        raise ValueError("the port is no number; write / # ? @ in a password as %2F %23 %3F %40") from None


def hide_password(url: str) -> str:
    """Return the URL as it may appear in a message."""
    head, at, tail = url.rpartition("@")
    scheme, slashes, login = head.partition("://")
    shown = f"{scheme}{slashes}{login.split(':')[0]}:***{at}{tail}" if at else url
    shown = re.sub(r"(?<=[?&])(?:ca_file|cert_file|key_file)=[^&]*&?", "", shown).rstrip("?&")
    return re.sub(r"([?&]password=)[^&]*", r"\1***", shown)
