"""The certificates of an installation: each container's folder has its own, and `ca.pem`, by which it knows the others.

Only what was made here is ever made anew. A certificate that somebody else has put into a folder stays as it is, key
and all; the authorities in the `ca.pem` beside it go into every `ca.pem`, after ours, so that all know each other.
"""

import ipaddress
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from ops import authority
from ops.authority import Authority
from ops.private_file import keep_private, write_private
from shared.errors import SettingsError

SERVERS = ("rabbitmq", "redis", "prometheus", "grafana", "redis-exporter")  # each has server.pem, server.key
SCRAPED = ("aggregator", "evaluator", "worker", "exporter")  # each has metrics.pem, metrics.key
CLIENTS = (  # each has client.pem, client.key
    "aggregator", "evaluator", "exporter", "operator", "redis-exporter", "redis",
)  # fmt: skip
FOLDERS = ("ca", *dict.fromkeys((*SERVERS, *SCRAPED, *CLIENTS)))
KEPT = "not made by fedmq, kept"  # in the line of output that says so


@dataclass(frozen=True, slots=True)
class Place:
    """Where a certificate and its key belong.

    Attributes:
        folder: of a container.
        name: of the files, without .pem and .key.
        hosts: names and addresses that clients reach it by; none: it is a client's.
    """

    folder: Path
    name: str
    hosts: list[str]

    @property
    def certificate(self) -> Path:
        """Return its file."""
        return self.folder / f"{self.name}.pem"

    @property
    def key(self) -> Path:
        """Return the file of its key."""
        return self.folder / f"{self.name}.key"

    @property
    def shown(self) -> str:
        """Return what people call it."""
        return f"{self.folder.name}/{self.certificate.name}"


def keep(
    folder: Path, homes: Sequence[str], hosts: Iterable[str], signer: Authority, now: datetime, done: list[str]
) -> None:
    """Leave every folder with the certificates that it needs, good for another month at least.

    Args:
        folder: of the folders.
        homes: folders of jobs' services, beside `FOLDERS`.
        hosts: names and addresses that devices reach the servers by.
        signer: signs those that are missing.
        now: UTC.
        done: takes a line for each that was made, and for each that is not ours.

    Raises:
        SettingsError: a file is none, or one that is not ours lacks its key.
    """
    places = _places(folder, homes, list(hosts))
    theirs = [place for place in places if place.certificate.exists() and not _is_ours(place)]
    for place in theirs:
        done.append(_look(place, now))
    trusted = dict.fromkeys(one for place in theirs for one in _trusted(place.folder))
    others = [one for one in trusted if one not in signer.pem and not authority.made_here(one)]
    for home in dict.fromkeys((*FOLDERS[1:], *homes)):
        keep_private(folder / home / authority.CA_FILE, signer.pem + "".join(others), 0o644)
    for place in places:
        if place not in theirs:
            _sign(place, signer, now, done)


def _places(folder: Path, homes: Sequence[str], hosts: list[str]) -> list[Place]:
    places = []
    for home in dict.fromkeys((*SERVERS, *SCRAPED, *CLIENTS, *homes)):
        role, here = home.partition(".")[0], [home, "localhost", "127.0.0.1"]
        if role in SERVERS:
            places.append(Place(folder / home, "server", [*here, *_reached(role, hosts)]))
        if role in SCRAPED:
            places.append(Place(folder / home, "metrics", here))
        if role in CLIENTS:
            places.append(Place(folder / home, "client", []))
    return places


def _reached(role: str, hosts: list[str]) -> list[str]:
    """Return the names devices may use: each host, and with `broker.` or `store.` before it, for both on port 443."""
    prefix = {"rabbitmq": "broker", "redis": "store"}.get(role)
    return hosts + [f"{prefix}.{host}" for host in hosts if prefix and not _is_address(host)]


def _is_ours(place: Place) -> bool:
    try:
        return authority.made_here(place.certificate.read_text(errors="replace"))
    except SettingsError as error:
        raise SettingsError(f"{place.certificate}: {error}; remove it to make it anew") from error


def _look(place: Place, now: datetime) -> str:
    """Return what there is to say of a certificate that is not ours."""
    text = place.certificate.read_text()
    if not place.key.exists() or not authority.go_together(text, place.key.read_text(errors="replace")):
        raise SettingsError(
            f"{place.certificate} was not made by fedmq, and {place.key} is not its key: put the right one there, not "
            "encrypted, or remove the certificate to have one made"
        )
    lacking = [host for host in place.hosts if host not in authority.hosts_of(text)]
    says = f"{place.shown}: {KEPT}, until {authority.ends_at(text):%Y-%m-%d}"
    if authority.due(text, now):
        says += ", which is soon: put its successor there"
    if all(authority.made_here(one) for one in _trusted(place.folder)):
        says += f"; {authority.CA_FILE} beside it must hold the authority that signed it"
    return says + (f"; it lacks {', '.join(lacking)}: who uses these names refuses it" if lacking else "")


def _trusted(folder: Path) -> list[str]:
    """Return the certificates in the `ca.pem` of a folder, each as PEM."""
    path = folder / authority.CA_FILE
    try:
        return authority.certificates_of(path.read_text(errors="replace")) if path.exists() else []
    except SettingsError as error:
        raise SettingsError(f"{path}: {error}; put there the certificate of the authority that signed yours") from error


def _sign(place: Place, signer: Authority, now: datetime, done: list[str]) -> None:
    """Sign a certificate unless a good one is there."""
    why, hosts = "made", place.hosts
    if place.certificate.exists() and place.key.exists():
        text = place.certificate.read_text()
        if not authority.go_together(text, place.key.read_text(errors="replace")):
            why = "made anew, its key was another one's"  # a crash between the two files
        elif authority.due(text, now):
            why = "renewed"
        elif not signer.signed(text):
            why = "made anew, it was another authority's"
        elif not set(hosts) <= authority.hosts_of(text):
            why = "made anew, with more hosts"
        else:
            return
        if hosts:  # those of earlier runs stay
            hosts = [*hosts, *sorted(authority.hosts_of(text))]
    name = place.folder.name
    identity = signer.server(name, hosts, now) if hosts else signer.client(name, now)
    write_private(place.key, identity.key)
    write_private(place.certificate, identity.certificate, 0o644)
    done.append(f"{place.shown}: {why}, until {authority.ends_at(identity.certificate):%Y-%m-%d}")


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True
