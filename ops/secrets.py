"""`fedmq secrets make`: certificates, passwords and logins of an installation, a folder for each of its containers.

Every run leaves the same: it makes what is missing, keeps what is there, and makes those of its own certificates anew
(certificates.py) that end soon, that another authority signed or that lack a host. A service's password stands in its
own settings alone; the servers get hashes. Logins of devices are not made here: they are in RabbitMQ's database and in
users.acl, where they stay.
"""

import json
import os
import tomllib
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from ops import authority, certificates, server_logins
from ops.certificates import CLIENTS, FOLDERS, SCRAPED
from ops.passwords import new_password
from ops.private_file import keep_mode, keep_private, toml, write_private
from shared.errors import SettingsError
from shared.messages import ID
from shared.transport.names import EXPORTER, OPERATOR, REDIS_EXPORTER, VHOST, service_login

MOUNTED = Path("/run/fedmq")  # where each container sees its folder
MOUNTED_CA = Path("/run/fedmq-ca")  # where the operator's sees the authority's
SETTINGS = "fedmq.toml"
SECRET = ("*.key", "*.toml", "password.json", "admin_password")  # only their owner may read them
PER_JOB = ("aggregator", "evaluator")

Homes = dict[tuple[str, str], str]  # (role, job) -> folder


@dataclass(frozen=True, slots=True)
class Wanted:
    """What `fedmq secrets make` was told.

    Attributes:
        folder: where everything goes.
        jobs: those that get an aggregator and an evaluator.
        hosts: names and addresses that devices reach the servers by.
        owners: folder -> user and group that own it; needs root.
        broker, store, admin: HOST:PORT that services find the servers at.
        in_place: settings name the files in `folder` itself, for services that run without containers.
    """

    folder: Path
    jobs: tuple[str, ...]
    hosts: tuple[str, ...] = ()
    owners: dict[str, tuple[int, int]] = field(default_factory=dict)
    broker: str = "rabbitmq:5671"
    store: str = "redis:6379"
    admin: str = "rabbitmq:15671"
    in_place: bool = False


def make(wanted: Wanted, now: datetime) -> list[str]:
    """Make what is missing; return a line for each thing that was made or renewed.

    Raises:
        SettingsError: a job or host is none, a file cannot be written, or one that is there is none of ours.
    """
    if not wanted.jobs:
        raise SettingsError("name the first job: --job JOB")
    if bad := [job for job in wanted.jobs if not ID.fullmatch(job)]:
        raise SettingsError(f"--job {bad[0]!r}: must be of {ID.pattern}")
    if unknown := [name for name in wanted.owners if name not in FOLDERS]:
        raise SettingsError(f"--owner {unknown[0]}=...: there is no such folder; those are {', '.join(FOLDERS)}")
    done: list[str] = []
    try:
        homes = _homes(wanted)
        for name in ("", *FOLDERS, *homes.values(), "worker/devices"):
            (wanted.folder / name).mkdir(mode=0o700 if name else 0o755, parents=True, exist_ok=True)
        signer, what = authority.keep(wanted.folder / "ca", now)
        if what != "kept":
            done.append(f"ca/{authority.CA_FILE}: {what}, until {authority.ends_at(signer.pem):%Y-%m-%d}")
        passwords = _services(wanted, homes, done)
        certificates.keep(wanted.folder, list(homes.values()), wanted.hosts, signer, now, done)
        server_logins.write(wanted.folder, passwords, done)
        _others(wanted, done)
        _guard(wanted.folder, [*FOLDERS, *homes.values()], done)
        for name, (user, group) in wanted.owners.items():
            _give(wanted.folder / name, user, group)
    except OSError as error:
        raise SettingsError(f"{error.filename or wanted.folder}: {error.strerror}") from error
    return done


def _homes(wanted: Wanted) -> Homes:
    """Return the folders of the jobs that are there or wanted; the first job's have the plain names."""
    homes: Homes = {}
    for role in PER_JOB:
        for path in sorted(wanted.folder.glob(f"{role}*/{SETTINGS}")):
            homes[role, str(_read(path).get("job"))] = path.parent.name
        for job in wanted.jobs:
            plain = role not in homes.values()
            homes.setdefault((role, job), role if plain else f"{role}.{job}")
    return homes


def _services(wanted: Wanted, homes: Homes, done: list[str]) -> dict[str, str]:
    """Write the settings of each service that has none; return login -> password."""
    services: list[tuple[str, str, tuple[str, ...], dict[str, str]]] = [
        (OPERATOR, "operator", ("broker_url", "store_url", "broker_admin_url"), {"job": wanted.jobs[0]}),
        (EXPORTER, "exporter", ("broker_url", "store_url"), {}),
    ]
    for (role, job), home in homes.items():
        urls = ("broker_url", "store_url") if role == "aggregator" else ("store_url",)
        services.append((service_login(role, job), home, urls, {"job": job}))
    passwords: dict[str, str] = {}
    for login, home, needed, settings in services:
        path = wanted.folder / home / SETTINGS
        if not path.exists():
            known = _urls(wanted, login, new_password())
            write_private(path, toml(settings | {name: known[name] for name in needed} | _files(wanted, home)))
            done.append(f"{home}/{SETTINGS}: made, login {login}")
        passwords[login] = _password(path, login)
    passwords[REDIS_EXPORTER] = _redis_exporter(wanted, done)
    return passwords


def _redis_exporter(wanted: Wanted, done: list[str]) -> str:
    """Write the password of Prometheus' exporter of Redis in its own form, unless it is there; return it."""
    path = wanted.folder / "redis-exporter" / "password.json"
    if not path.exists():
        password = new_password()
        named = {f"rediss://{REDIS_EXPORTER}@{wanted.store}": password, f"rediss://{wanted.store}": password}
        write_private(path, json.dumps(named, indent=2) + "\n")
        done.append(f"redis-exporter/{path.name}: made, login {REDIS_EXPORTER}")
    try:
        return str(next(iter(json.loads(path.read_text()).values())))
    except (ValueError, AttributeError, StopIteration) as error:
        raise SettingsError(f"{path} holds no password; remove the file to make it anew") from error


def _urls(wanted: Wanted, login: str, password: str) -> dict[str, str]:
    return {
        "broker_url": f"amqps://{login}:{password}@{wanted.broker}/{VHOST}",
        "store_url": f"rediss://{login}:{password}@{wanted.store}/0",
        "broker_admin_url": f"https://{login}:{password}@{wanted.admin}",
    }


def _files(wanted: Wanted, home: str) -> dict[str, str]:
    """Return the settings that name certificates, where the service sees them."""
    seen = (wanted.folder / home).resolve() if wanted.in_place else MOUNTED
    role = home.partition(".")[0]
    names = {"tls_ca": authority.CA_FILE}
    if role in CLIENTS:
        names |= {"tls_cert": "client.pem", "tls_key": "client.key"}
    if role in SCRAPED:
        names |= {"metrics_cert": "metrics.pem", "metrics_key": "metrics.key"}
    paths = {name: str(seen / file) for name, file in names.items()}
    if role == "operator":
        paths["ca_dir"] = str((wanted.folder / "ca").resolve() if wanted.in_place else MOUNTED_CA)
    return paths


def _others(wanted: Wanted, done: list[str]) -> None:
    """Write what programs that are not ours want in a form of their own."""
    web = "tls_server_config:\n  cert_file: server.pem\n  key_file: server.key\n  min_version: TLS12\n"
    keep_private(wanted.folder / "prometheus" / "web.yml", web, 0o644)
    grafana = wanted.folder / "grafana" / "admin_password"
    if not grafana.exists():
        write_private(grafana, new_password())
        done.append("grafana/admin_password: made")


def _password(path: Path, login: str) -> str:
    """Return the password in the settings of a service."""
    parts = urlsplit(str(_read(path).get("store_url", "")))
    if parts.username != login or not parts.password:
        raise SettingsError(f"{path}: its store_url names no password of login {login!r}; remove it to make it anew")
    return parts.password


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text())
    except ValueError as error:
        raise SettingsError(f"{path}: {error}") from error


def _guard(folder: Path, homes: list[str], done: list[str]) -> None:
    """Let only their owner read secrets, as a copy or a backup may have left them open."""
    for path in (path for home in dict.fromkeys(homes) for what in SECRET for path in (folder / home).rglob(what)):
        if keep_mode(path):
            done.append(f"{path.relative_to(folder)}: only its owner can read it again")


def _give(path: Path, user: int, group: int) -> None:
    """Make a folder and what it holds somebody's."""
    for one in (path, *path.rglob("*")):
        os.chown(one, user, group, follow_symlinks=False)
