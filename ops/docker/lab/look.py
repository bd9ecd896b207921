"""What check-in-lab.sh sees from inside, in a container of the operator's image: `look.py WHAT [ARGUMENT...]`."""

import http.client
import json
import pathlib
import re
import socket
import ssl
import sys
import time
import tomllib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import urlencode, urlsplit
from urllib.request import urlopen

CA_FILE = pathlib.Path("/run/fedmq/ca.pem")
CA: Any = ssl.create_default_context(cafile=str(CA_FILE)) if CA_FILE.exists() else None


def main(what: str, *rest: str) -> None:
    """Answer one question on standard output."""
    answer = globals()[what.replace("-", "_")](*rest)
    if answer is not None:
        print(answer)


def _settings() -> Any:
    from shared.config import Settings, load

    return load(Settings)


def _store() -> Any:
    from shared.store.redis import RedisStore

    settings = _settings()
    return RedisStore(settings.store_url, settings.job)


def version() -> int:
    """Return the newest version."""
    return int(_store().head().version)


def clients() -> str:
    """Return who has sent updates."""
    return " ".join(sorted(_store().status()["clients"]))


def totals() -> str:
    """Return the account's sums, and how long the queues are."""
    from shared.transport.rabbitmq import queue_depths

    settings = _settings()
    return f"{_store().status()['state']['totals']} {queue_depths(settings.broker_url, settings.job, 10)}"


def missing(made: str, kills: str) -> None:
    """Print the ids that the outboxes gave and the ledger does not hold."""
    outboxes, killed = json.loads(made), [json.loads(line) for line in kills.splitlines() if line]
    settled = {update["id"] for entry in _store().ledger() for update in entry["updates"]}
    for client, box in outboxes.items():
        # The number that was taken when its worker was killed: not a finished update. A kill comes within a few updates
        # of the look at the outboxes before it.
        cut = [kill[client]["next_sequence"] for kill in killed if client in kill]
        for sequence in range(box["next_sequence"]):
            update_id = f"{client}/{box['incarnation']}/{sequence}"
            if update_id not in settled:
                print("unfinished" if any(0 <= sequence - at < 8 for at in cut) else "lost", update_id)


def _ask_prometheus(query: str) -> Any:
    page = urlopen("https://prometheus:9090/api/v1/query?" + urlencode({"query": query}), timeout=10, context=CA)
    return json.load(page)["data"]["result"]


def prometheus(query: str) -> str:
    """Return what Prometheus answers, a line for each series."""
    shown = ("job", "instance", "exported_job", "metric", "queue", "outcome")
    lines = []
    for series in _ask_prometheus(query):
        labels = {name: value for name, value in series["metric"].items() if name in shown}
        lines.append(f"{series['value'][1]} {labels}")
    return "\n".join(lines)


def down() -> str:
    """Return the targets that are not up, and why."""
    page = urlopen("https://prometheus:9090/api/v1/targets", timeout=10, context=CA)
    targets = json.load(page)["data"]["activeTargets"]
    bad = [f"{t['scrapeUrl']}: {t['lastError'] or t['health']}" for t in targets if t["health"] != "up"]
    plain = [t["scrapeUrl"] for t in targets if not t["scrapeUrl"].startswith("https:")]
    return "\n".join([*bad, *plain, f"{len(targets)} targets"])


def panels(folder: str) -> None:
    """Print each panel's query that returns nothing, then how many there are."""
    asked = 0
    values = {"__rate_interval": "1m", "__interval": "15s", "__range": "30m", "job": "default", "datasource": "x"}
    for path in sorted(pathlib.Path(folder).glob("*.json")):
        for title, expression in _queries(json.loads(path.read_text())["panels"]):
            if "ALERTS{" in expression:  # empty as long as all is well
                continue
            query = re.sub(r"\$\{?(\w+)(:\w+)?\}?", lambda m: values.get(m[1], ".*"), expression)
            asked += 1
            try:
                found = bool(_ask_prometheus(query))
            except OSError as error:
                print(error, end=": ")
                found = False
            if not found:
                print(f"{path.stem} / {title}: nothing for {query}")
    print(f"{asked} queries")


def _queries(shown: Any) -> Iterator[tuple[str, str]]:
    for panel in shown:
        yield from _queries(panel.get("panels", []))
        for target in panel.get("targets", []):
            if "expr" in target:
                yield panel.get("title", ""), target["expr"]


def garbage() -> None:
    """Publish two updates that are none: they are rejected, and a panel has something to show."""
    import pika

    given = pika.URLParameters(_settings().broker_url.partition("?")[0])
    given.ssl_options = pika.SSLOptions(CA, "rabbitmq")
    connection = pika.BlockingConnection(given)
    channel = connection.channel()
    for _ in range(2):
        channel.basic_publish(
            "fedmq.updates", "update.default.worker-0", b"garbage", pika.BasicProperties(type="update")
        )
        connection.sleep(7)  # two scrapes: Prometheus must see it rise
    connection.close()


def serving() -> str:
    """Return the address of the aggregator that made the newest commit."""
    return " ".join(series["metric"]["instance"].split(":")[0] for series in _ask_prometheus("fedmq_serving == 1"))


def healthy(address: str) -> str:
    """Return what /healthz of one aggregator says."""
    connection = http.client.HTTPSConnection("aggregator", 9464, timeout=5, context=CA)
    raw = socket.create_connection((address, 9464), 5)
    connection.sock = CA.wrap_socket(raw, server_hostname="aggregator")
    connection.request("GET", "/healthz")
    return connection.getresponse().read().decode()


def watch_gap(seconds: str) -> str:
    """Look at the version for so long; return the longest time without a new one, and how many there were."""
    store, longest = _store(), 0.0
    end = time.monotonic() + float(seconds)
    first = newest = store.head().version
    changed = time.monotonic()
    while (now := time.monotonic()) < end:
        if (current := store.head().version) != newest:
            newest, changed, longest = current, now, max(longest, now - changed)
        time.sleep(0.1)
    return f"{max(longest, time.monotonic() - changed):.1f} {newest - first}"


def reach(*places: str) -> str:
    """Return for each HOST:PORT whether this container reaches it; all at once, as unknown names take long."""
    with ThreadPoolExecutor(len(places)) as pool:
        return "\n".join(pool.map(_reached, places))


def _reached(place: str) -> str:
    host, port = place.rsplit(":", 1)
    try:
        socket.create_connection((host, int(port)), 3).close()
    except OSError as error:
        return f"{place} {error.strerror or error}"
    return f"{place} open"


def plain() -> None:
    """Print what comes of an attempt without TLS, without a login, as guest."""
    for name, host, port, greeting in (
        ("amqp without TLS", "rabbitmq", 5671, b"AMQP\x00\x00\x09\x01"),
        ("redis without TLS", "redis", 6379, b"PING\r\n"),
    ):
        with socket.create_connection((host, port), 5) as plain_socket:
            plain_socket.sendall(greeting)
            plain_socket.settimeout(8)
            try:
                said = plain_socket.recv(64)
            except OSError as error:
                said = str(error).encode()
            accepted = said.startswith((b"\x01\x00\x00", b"+PONG", b"-NOAUTH"))
            print(f"{name}: {'ACCEPTED' if accepted else 'refused'} {said!r}")
    secured = CA.wrap_socket(socket.create_connection(("redis", 6379), 5), server_hostname="redis")
    secured.sendall(b"PING\r\n")
    print(f"redis without login: {secured.recv(64)!r}")
    secured.sendall(b"AUTH default fedmq\r\n")
    print(f"redis as default: {secured.recv(64)!r}")
    import pika

    for login in ("guest", "fedmq"):
        address = f"amqps://{login}:{login}@rabbitmq:5671/fedmq"
        given = pika.URLParameters(address)
        given.ssl_options = pika.SSLOptions(CA, "rabbitmq")
        try:
            pika.BlockingConnection(given)
            print(f"{login}: ACCEPTED")
        except Exception as error:
            print(f"{login}: refused, {type(error).__name__}")


def management(url_file: str) -> str:
    """Log in at RabbitMQ's management with the broker login of a device's file; return the status."""
    import base64

    url = urlsplit(tomllib.loads(pathlib.Path(url_file).read_text())["broker_url"])
    connection = http.client.HTTPSConnection("rabbitmq", 15671, timeout=10, context=CA)
    login = base64.b64encode(f"{url.username}:{url.password}".encode()).decode()
    connection.request("GET", "/api/overview", headers={"Authorization": f"Basic {login}"})
    return f"{connection.getresponse().status}"


def secrets(folder: str) -> None:
    """Print every secret of the installation: `NAME WHERE` with the secret itself on a line of its own after a tab."""
    for path in sorted(pathlib.Path(folder).rglob("*")):
        if not path.is_file() or path.is_symlink():
            continue
        text = path.read_text(errors="replace")
        found = re.findall(r"://[^/\s:]*:([^@/\s]+)@", text)
        if path.name == "password.json":
            found += list(json.loads(text).values())
        if path.name == "admin_password":
            found.append(text.strip())
        found += re.findall(r"PRIVATE KEY-----\n(\S+)", text)
        where = path.relative_to(folder).parts[0]
        for secret in dict.fromkeys(found):
            print(f"{where}\t{path.name}\t{secret}")


main(*sys.argv[1:])
