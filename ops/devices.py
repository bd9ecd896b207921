"""`fedmq devices`: an identity for each device - a login at RabbitMQ and one at Redis, in one file - and its end.

What happens where it breaks off. *Enrol*: the file is on disk under another name, then the record says `enrolling`, the
logins are made, the file gets its name, the record says `enrolled`. Broken off before the file has its name, nobody
knows the password: enrol again, or revoke. After that the device works; enrolling it again, with another --out, gives
it another password. *Rotate*: the same, and a rotation broken off is mended by another. *Revoke*: both servers are
asked, also when one does not answer or has no such login; the record says `revoked` only when both have none.

Two at once: a record is written only in the place of the one that was read. Who revokes begins anew, who enrols or
rotates and finds the device revoked meanwhile takes its logins back. A login that outlives its record all the same, as
somebody was killed right there, is shown by `list` and `show`.
"""

import difflib
import getpass
import ipaddress
import logging
import os
import secrets
import socket
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from ops import authority, roles
from ops.broker_admin import SETTING, BrokerAdmin
from ops.passwords import new_password
from ops.private_file import PreparedFile, toml
from shared import tls
from shared.config import OperatorSettings
from shared.errors import FedMQError, SettingsError, Unavailable
from shared.messages import ID
from shared.store.redis_acl import RedisLogins, device_rules
from shared.store.redis_registry import AuditLog, Changed, DeviceRegistry, Event, Kind
from shared.transport.names import device_login
from shared.urls import PORTS, hide_password

ENROLLING, ENROLLED, REVOKED = "enrolling", "enrolled", "revoked"
PORT_MAX = 65535
ATTEMPTS_MAX = 10  # to revoke a device that somebody else is changing

log = logging.getLogger(__name__)

Record = dict[str, Any]
Server = BrokerAdmin | RedisLogins


@dataclass(frozen=True, slots=True)
class Standing:
    """What is known of a device.

    Attributes:
        record: of the registry, None when it was never enrolled.
        at_broker, at_store: whether there is a login.
        connections: of its login at the broker.
        client: what the job's aggregator knows of it.
        events: its newest in the audit log.
    """

    record: Record | None
    at_broker: bool
    at_store: bool
    connections: list[dict[str, Any]]
    client: dict[str, Any] | None
    events: list[Event]


class Devices:
    """Enrols, shows and revokes devices of one installation.

    Args:
        settings: the operator's.

    Raises:
        SettingsError: a URL is missing or wrong.
    """

    def __init__(self, settings: OperatorSettings) -> None:
        if not settings.broker_admin_url:
            raise SettingsError(f"{SETTING} is not set: https://fedmq-operator:password@HOST:15671")
        self._settings = settings
        self._broker = BrokerAdmin(settings.broker_admin_url)
        self._store = RedisLogins(settings.store_url)
        self._registry = DeviceRegistry(settings.store_url)
        self._audit = AuditLog(settings.store_url)
        self._servers: dict[str, Server] = {"RabbitMQ": self._broker, "Redis": self._store}

    def enroll(
        self, job: str, name: str, out: Path, certificate: bool, broker_host: str | None, store_host: str | None
    ) -> None:
        """Make a device's logins and its file.

        Args:
            job: the job it trains for.
            name: its client id.
            out: the file, which must not be there.
            certificate: sign one for it, for servers that ask for one.
            broker_host: HOST:PORT that the device will use; by default that of the operator's own URL.
            store_host: the same of Redis.

        Raises:
            SettingsError: it is enrolled already, the name is none, the file is there or cannot be written.
            Unavailable: a server does not answer; enrol again later.
        """
        login = _login(job, name)
        before = self._registry.get(login)
        if before is not None and before["state"] == ENROLLED:
            raise SettingsError(
                f"{name} is enrolled in job {job} since {shown(before['enrolled_at'])}: `fedmq devices rotate {name}` "
                f"makes a new file for it, `fedmq devices revoke {name}` throws it out"
            )
        record: Record = {
            "job": job, "client": name, "enrolled_at": time.time(),
            "broker": _address(broker_host, self._settings.broker_url),
            "store": _address(store_host, self._settings.store_url),
        }  # fmt: skip
        self._issue(login, before, record, out, certificate)
        self._note(Kind.ENROLLED, login, f"file {out.name}")

    def rotate(self, job: str, name: str, out: Path, certificate: bool) -> None:
        """Give a device another password and a new file, and close the connections of the old one.

        Args:
            job: its job.
            name: its client id.
            out: the new file, which must not be there.
            certificate: sign one for it; one that had one gets another in any case.

        Raises:
            SettingsError: it is not enrolled, the file is there or cannot be written.
            Unavailable: a server does not answer; rotate again later.
        """
        login = _login(job, name)
        before = self._registry.get(login)
        if before is None or before["state"] == REVOKED:
            raise SettingsError(
                f"{name} is not enrolled in job {job}: `fedmq devices enroll {name}`{self._near(login)}"
            )
        record = {key: before[key] for key in ("job", "client", "enrolled_at", "broker", "store")}
        record["rotated_at"] = time.time()
        self._issue(login, before, record, out, certificate or "certificate_ends_at" in before)
        self._note(Kind.ROTATED, login, f"file {out.name}")

    def revoke(self, job: str, name: str) -> bool:
        """End a device's logins and close its connections; tell whether there was anything left to end.

        Raises:
            SettingsError: there never was such a device.
            Unavailable: a server does not answer; the other one was asked. Revoke again.
        """
        login = _login(job, name)
        gone = dict.fromkeys(self._servers, False)
        for attempt in range(1, ATTEMPTS_MAX + 1):
            before = self._registry_or_none(login)
            self._delete(login, name, gone)
            if before is None and not any(gone.values()):
                raise SettingsError(f"there is no device {name} of job {job}{self._near(login)}")
            if before is not None and before["state"] == REVOKED and not any(gone.values()):
                return False
            known = before or {"job": job, "client": name, "enrolled_at": None}
            try:
                self._registry.put(login, before, known | {"state": REVOKED, "revoked_at": time.time()})
                break
            except Changed:  # its logins may have been made anew
                if attempt == ATTEMPTS_MAX:
                    raise
        self._note(Kind.REVOKED, login, "" if all(gone.values()) else "half of it was gone already")
        return True

    def known(self, job: str | None) -> list[tuple[Record, dict[str, Any] | None, list[str]]]:
        """Return the record of every device, of one job or of all.

        Returns:
            Records, each with what its job's aggregator knows of it, and the servers that let it in though it is
            revoked; of a server that does not answer, none.
        """
        records = {login: one for login, one in self._registry.all().items() if job in (None, one["job"])}
        clients = {job: self._registry.clients(job) for job in {str(record["job"]) for record in records.values()}}
        revoked = {login for login, record in records.items() if record["state"] == REVOKED}
        alive = {name: self._alive(server, revoked) for name, server in self._servers.items()}
        return [
            (record, clients[record["job"]].get(record["client"]), [name for name in alive if login in alive[name]])
            for login, record in records.items()
        ]

    def standing(self, job: str, name: str) -> Standing:
        """Return everything that is known of a device.

        Raises:
            SettingsError: there never was such a device.
        """
        login = _login(job, name)
        record, at_broker = self._registry.get(login), self._broker.exists(login)
        at_store = login in self._store.names()
        if record is None and not at_broker and not at_store:
            raise SettingsError(f"there is no device {name} of job {job}{self._near(login)}")
        events = [event for event in self._audit.newest(10_000) if event.login == login]
        client = self._registry.clients(job).get(name)
        return Standing(record, at_broker, at_store, self._broker.connections(login), client, events[-10:])

    def close(self) -> None:
        """Close the connections."""
        self._store.close()
        self._registry.close()
        self._audit.close()

    def _issue(self, login: str, before: Record | None, record: Record, out: Path, certificate: bool) -> None:
        """Write the file, make the logins, and the record at the end."""
        if out.exists():
            raise SettingsError(f"{out} exists: move it away, or give another --out")
        self._broker.check()
        self._store.check()
        password = new_password()
        identity = self._sign(login) if certificate else None
        if identity is not None:
            record["certificate_ends_at"] = authority.ends_at(identity.certificate).timestamp()
        with PreparedFile(out, self._file(record, login, password, identity)) as file:
            begun = record | {"state": ENROLLING, "token": secrets.token_hex(8)}
            if before is not None and before["state"] == ENROLLED:  # a rotation
                begun["state"] = ENROLLED
            self._registry.put(login, before, begun)
            self._broker.put(roles.device(record["job"], record["client"]), password)
            self._store.put(login, password, device_rules(record["job"], record["client"]))
            for server in self._servers.values():  # of the password before, also when nobody writes what comes next
                server.close_connections(login)
            file.place()
            try:
                self._registry.put(login, begun, record | {"state": ENROLLED})
            except Changed:
                out.unlink()
                self._take_back(login)
                raise

    def _take_back(self, login: str) -> None:
        """End the logins just made if the device was revoked meanwhile; else somebody else's password is in force."""
        record = self._registry.get(login)
        if record is not None and record["state"] != REVOKED:
            return
        self._delete(login, login.partition(".")[2], dict.fromkeys(self._servers, False))
        raise SettingsError(f"{login} was revoked meanwhile: it has no login")

    def _delete(self, login: str, name: str, gone: dict[str, bool]) -> None:
        """End a device's logins at both servers, note which had one.

        Raises:
            FedMQError: a server could not be asked; the other one was.
        """
        problems: list[FedMQError] = []
        for title, server in self._servers.items():
            try:
                gone[title] |= server.delete(login)
            except (Unavailable, SettingsError) as error:
                problems.append(type(error)(f"{title} may still let {name} in: {error}; revoke it again"))
        if problems:
            raise type(problems[0])("; ".join(str(problem) for problem in problems))

    def _alive(self, server: Server, logins: set[str]) -> set[str]:
        """Return which of these a server lets in; none when it does not answer."""
        try:
            return logins & server.names() if logins else set()
        except (Unavailable, SettingsError) as error:
            log.warning("not shown is who of the revoked is still let in: %s", error)
            return set()

    def _sign(self, login: str) -> authority.Identity:
        if not self._settings.ca_dir:
            raise SettingsError("FEDMQ_CA_DIR is not set: the folder of the authority that signs certificates")
        return authority.read(Path(self._settings.ca_dir).expanduser()).client(login, authority.utc_now())

    def _file(self, record: Record, login: str, password: str, identity: authority.Identity | None) -> str:
        """Return all that a device needs, as TOML."""
        broker, store = urlsplit(self._settings.broker_url), urlsplit(self._settings.store_url)
        settings = {
            "job": record["job"],
            "client_id": record["client"],
            "broker_url": f"{broker.scheme}://{login}:{password}@{record['broker']}{broker.path}",
            "store_url": f"{store.scheme}://{login}:{password}@{record['store']}{store.path}",
        }
        if ca := self._authority():
            settings["tls_ca"] = ca
        if identity is not None:
            settings |= {"tls_cert": identity.certificate, "tls_key": identity.key}
        made = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
        head = f"# Device {record['client']} of job {record['job']}, made {made}: a password, for this device alone.\n"
        return f"{head}# fedmq worker --config {record['client']}.toml --task my_task.py\n{toml(settings)}"

    def _authority(self) -> str:
        """Return the certificate by which a device knows the servers: the one by which we do; "" for the system's."""
        given = self._settings.tls_ca
        if given and tls.PEM in given:
            return given.strip() + "\n"
        path = given or tls.without_files(self._settings.broker_url)[1].get("ca_file", "")
        try:
            return Path(path).expanduser().read_text().strip() + "\n" if path else ""
        except OSError as error:
            raise SettingsError(f"FEDMQ_TLS_CA {path}: {error.strerror}") from error

    def _registry_or_none(self, login: str) -> Record | None:
        """Return a record if Redis answers: who is to be thrown out is thrown out of RabbitMQ in any case."""
        try:
            return self._registry.get(login)
        except Unavailable:
            return None

    def _near(self, login: str) -> str:
        """Say which devices have a similar name."""
        known = self._registry.all().items()
        names = [name for name, record in known if name != login and record["state"] == ENROLLED]
        near = difflib.get_close_matches(login, names, 3, 0.7)
        return f"; did you mean {', '.join(near)}?" if near else ""

    def _note(self, kind: Kind, login: str, detail: str) -> None:
        who = f"by {_user()}@{socket.gethostname()}"
        self._audit.append([Event(kind, login, f"{detail}, {who}" if detail else who, "operator", time.time())])


def shown(at: float | None) -> str:
    """Return unix seconds as people read them, UTC."""
    return "?" if at is None else datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%d %H:%M")


def _login(job: str, name: str) -> str:
    if not ID.fullmatch(name):
        raise SettingsError(f"{name!r} is no name of a device: it must be of {ID.pattern}")
    return device_login(job, name)


def _address(given: str | None, url: str) -> str:
    """Return HOST:PORT that a device is to use.

    Raises:
        SettingsError: what was given is none, or the operator's URL is of another kind.
    """
    parts = urlsplit(url)
    if parts.scheme not in PORTS or not parts.hostname:
        raise SettingsError(f"{hide_password(url)!r} is no URL that a device could use: amqps://... or rediss://...")
    usual = PORTS[parts.scheme]
    if given is None:
        known = f"[{parts.hostname}]" if ":" in (parts.hostname or "") else parts.hostname
        return f"{known}:{parts.port or usual}"
    host, colon, port = given.rpartition(":") if not given.endswith("]") else ("", "", "")
    host, port = (host, port) if colon else (given, str(usual))
    is_number = port.isascii() and port.isdecimal() and len(port) <= len(str(PORT_MAX))
    if not (_is_ipv6(host) or authority.is_host(host)) or not is_number or not 0 < int(port) <= PORT_MAX:
        raise SettingsError(f"{given!r} is not of the form HOST:PORT")
    return f"{host}:{port}"


def _is_ipv6(host: str) -> bool:
    """Tell whether a text is an address in brackets."""
    try:
        ipaddress.IPv6Address(host.removeprefix("[").removesuffix("]"))
    except ValueError:
        return False
    return host.startswith("[") and host.endswith("]")


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user has no name
        return str(os.getuid())
