"""`fedmq devices`: an identity for each device - a login at RabbitMQ and one at Redis, in one file - and its end.

What happens where it breaks off. *Enrol*: the file is on disk under another name, then the record says `enrolling`, the
logins are made, the file gets its name, the record says `enrolled`. Broken off before the file has its name, nobody
knows the password: enrol again, or revoke. After that the device works; enrolling it again, with another --out, gives
it another password. *Rotate*: the same, and a rotation broken off is mended by another. *Revoke*: both servers are
asked, also when one does not answer or has no such login; the record says `revoked` only when both have none.
"""

import difflib
import getpass
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
from shared.store.redis_registry import AuditLog, DeviceRegistry, Event, Kind
from shared.transport.names import device_login

ENROLLING, ENROLLED, REVOKED = "enrolling", "enrolled", "revoked"
PORTS = {"amqp": 5672, "amqps": 5671, "redis": 6379, "rediss": 6379}
PORT_MAX = 65535

Record = dict[str, Any]


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
        self._broker.close_connections(login)
        self._store.close_connections(login)
        self._note(Kind.ROTATED, login, f"file {out.name}")

    def revoke(self, job: str, name: str) -> bool:
        """End a device's logins and close its connections; tell whether there was anything left to end.

        Raises:
            SettingsError: there never was such a device.
            Unavailable: a server does not answer; the other one was asked. Revoke again.
        """
        login = _login(job, name)
        before = self._registry_or_none(login)
        ended: list[bool] = []
        problems: list[FedMQError] = []
        for server, delete in (("RabbitMQ", self._broker.delete), ("Redis", self._store.delete)):
            try:
                ended.append(delete(login))
            except (Unavailable, SettingsError) as error:
                problems.append(type(error)(f"{server} may still let {name} in: {error}; revoke it again"))
        if problems:
            raise type(problems[0])("; ".join(str(problem) for problem in problems))
        if before is None and not any(ended):
            raise SettingsError(f"there is no device {name} of job {job}{self._near(login)}")
        if before is not None and before["state"] == REVOKED and not any(ended):
            return False
        known = before or {"job": job, "client": name, "enrolled_at": None}
        self._registry.put(login, before, known | {"state": REVOKED, "revoked_at": time.time()})
        self._note(Kind.REVOKED, login, "" if all(ended) else "half of it was gone already")
        return True

    def known(self, job: str | None) -> list[tuple[Record, dict[str, Any] | None]]:
        """Return the record of every device, of one job or of all, and what its job's aggregator knows of it."""
        records = [record for record in self._registry.all().values() if job in (None, record["job"])]
        clients = {job: self._registry.clients(job) for job in {str(record["job"]) for record in records}}
        return [(record, clients[record["job"]].get(record["client"])) for record in records]

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
            file.place()
            try:
                self._registry.put(login, begun, record | {"state": ENROLLED})
            except SettingsError:  # somebody else's password is in force
                out.unlink()
                raise

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
        SettingsError: what was given is none.
    """
    parts = urlsplit(url)
    usual = PORTS[parts.scheme]
    if given is None:
        known = f"[{parts.hostname}]" if ":" in (parts.hostname or "") else parts.hostname
        return f"{known}:{parts.port or usual}"
    host, colon, port = given.rpartition(":") if not given.endswith("]") else ("", "", "")
    host, port = (host, port) if colon else (given, str(usual))
    is_address = host.startswith("[") and host.endswith("]")  # IPv6
    if not (is_address or authority.is_host(host)) or not port.isdecimal() or not 0 < int(port) <= PORT_MAX:
        raise SettingsError(f"{given!r} is not of the form HOST:PORT")
    return f"{host}:{port}"


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user has no name
        return str(os.getuid())
