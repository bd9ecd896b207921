"""`fedmq devices` and `fedmq secrets`: the command line; what it does is in devices.py and secrets.py."""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from shared.command import exit_codes
from shared.config import OperatorSettings, load
from shared.errors import SettingsError
from shared.logs import log_to_stderr

if TYPE_CHECKING:
    from ops.devices import Devices, Standing
    from shared.store.redis_registry import Event

devices_app = typer.Typer(no_args_is_help=True, help="Identities of devices: each has a login and a file of its own.")
secrets_app = typer.Typer(no_args_is_help=True, help="Certificates, passwords and logins of an installation.")

CERTIFICATE_SOON_S = 30 * 86_400.0

Name = Annotated[str, typer.Argument(help="the device's name, which is its client id")]
Job = Annotated[str | None, typer.Option(help="its job; FEDMQ_JOB")]
Config = Annotated[Path | None, typer.Option("--config", help="the operator's settings; FEDMQ_CONFIG")]
Certificate = Annotated[
    bool, typer.Option("--certificate", help="also sign a certificate for it, for servers that ask for one")
]
Out = Annotated[Path | None, typer.Option(help="the device's file, which must not be there [default: NAME.toml]")]


@contextmanager
def _devices(config: Path | None, job: str | None) -> "Iterator[tuple[Devices, OperatorSettings]]":
    with exit_codes():
        _needs_cryptography()
        from ops.devices import Devices

        log_to_stderr("error")
        settings = load(OperatorSettings, {"config": config, "job": job})
        devices = Devices(settings)
        try:
            yield devices, settings
        finally:
            devices.close()


@devices_app.command("enroll")
def enroll(
    name: Name,
    job: Job = None,
    out: Out = None,
    certificate: Certificate = False,
    broker_host: Annotated[str | None, typer.Option(help="HOST:PORT of RabbitMQ, as the device reaches it")] = None,
    store_host: Annotated[str | None, typer.Option(help="HOST:PORT of Redis, as the device reaches it")] = None,
    config: Config = None,
) -> None:
    """Make a device's logins, and the one file that it needs."""
    with _devices(config, job) as (devices, settings):
        file = out or Path(f"{name}.toml")
        devices.enroll(settings.job, name, file, certificate, broker_host, store_host)
        print(f"{name} is enrolled in job {settings.job}; {file} is all it needs, and secret: move it there, then")
        print(f"    fedmq worker --config {file.name} --task my_task.py")


@devices_app.command("list")
def list_devices(
    job: Annotated[str | None, typer.Option(help="only those of this job")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="one object a line")] = False,
    config: Config = None,
) -> None:
    """List the devices of all jobs, and when each was last heard of."""
    with _devices(config, job) as (devices, _):
        rows = devices.known(job)
        if as_json:
            for record, client, alive in rows:
                print(json.dumps(record | {"seen": client and client.get("seen"), "still_let_in_by": alive}))
            return
        table = Table(box=None, pad_edge=False, header_style="dim")
        for title in ("name", "job", "enrolled", "last seen", "state"):
            table.add_column(title, no_wrap=title != "state")
        now = time.time()
        for record, client, alive in rows:
            table.add_row(*_row(record, client, alive, now))
        if rows:
            Console().print(table)
        else:
            print("no device is enrolled: `fedmq devices enroll NAME`")


@devices_app.command("show")
def show(name: Name, job: Job = None, config: Config = None) -> None:
    """Show everything known of a device: its logins, its connections, what it did, what it was refused."""
    with _devices(config, job) as (devices, settings):
        standing = devices.standing(settings.job, name)
        table = Table.grid(padding=(0, 3))
        for title, value in _facts(name, settings.job, standing):
            table.add_row(Text(title, style="dim"), Text(value))
        Console().print(table)


def _agreed(question: str) -> bool:
    try:
        return typer.confirm(question)
    except typer.Abort as error:  # the end of input
        raise SettingsError("nothing was revoked: nobody answered; say --yes") from error


@devices_app.command("revoke")
def revoke(
    name: Name,
    job: Job = None,
    yes: Annotated[bool, typer.Option("--yes", help="do not ask")] = False,
    config: Config = None,
) -> None:
    """Throw a device out: its logins end, its connections are closed at once."""
    with _devices(config, job) as (devices, settings):
        if not yes and not _agreed(f"revoke {name} of job {settings.job}? Its file will be of no use any more"):
            raise typer.Exit(1)
        ended = devices.revoke(settings.job, name)
        outcome = "is revoked, its connections are closed" if ended else "was revoked before"
        print(f"{name} of job {settings.job} {outcome}")


@devices_app.command("rotate")
def rotate(
    name: Name,
    out: Annotated[Path, typer.Option(help="the new file, which must not be there")],
    job: Job = None,
    certificate: Certificate = False,
    config: Config = None,
) -> None:
    """Give a device a new password, and a new certificate if it has one; the old ones end at once."""
    with _devices(config, job) as (devices, settings):
        devices.rotate(settings.job, name, out, certificate)
        print(f"{name} of job {settings.job} has a new password, in {out}; the old one is of no use any more")


@devices_app.command("log")
def show_log(
    since: Annotated[str, typer.Option(help="how far back: 90s, 30min, 12h, 7d")] = "7d",
    kind: Annotated[str | None, typer.Option(help="only enrolled, revoked, rotated, login_failed or refused")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="one object a line")] = False,
    config: Config = None,
) -> None:
    """Show the audit log: enrolments, revocations, failed logins, refusals."""
    with exit_codes():
        from dataclasses import asdict

        from ops.dead_letters import seconds_of
        from shared.store.redis_registry import AuditLog, Kind

        if kind is not None and kind not in list(Kind):
            raise SettingsError(f"--kind {kind!r}: must be one of {', '.join(Kind)}")
        log_to_stderr("error")
        audit = AuditLog(load(OperatorSettings, {"config": config}).store_url)
        try:
            for event in audit.read(time.time() - seconds_of(since)):
                if kind in (None, event.kind):
                    print(json.dumps(asdict(event)) if as_json else _line(event))
        finally:
            audit.close()


@secrets_app.command("make")
def make(
    folder: Annotated[Path, typer.Argument(help="where everything goes, a folder for each container")],
    job: Annotated[list[str], typer.Option(help="a job; may be repeated, and given later")],
    host: Annotated[
        list[str] | None, typer.Option(help="name or address that devices reach the servers by; may be repeated")
    ] = None,
    owner: Annotated[
        list[str] | None, typer.Option(help="FOLDER=UID or FOLDER=UID:GID that is to own a folder; may be repeated")
    ] = None,
    broker: Annotated[str, typer.Option(help="HOST:PORT at which services find RabbitMQ")] = "rabbitmq:5671",
    store: Annotated[str, typer.Option(help="HOST:PORT at which services find Redis")] = "redis:6379",
    admin: Annotated[
        str, typer.Option(help="HOST:PORT at which the operator finds RabbitMQ's management API")
    ] = "rabbitmq:15671",
    in_place: Annotated[
        bool, typer.Option("--in-place", help="settings name the files in FOLDER itself, not /run/fedmq")
    ] = False,
) -> None:
    """Make what is missing of an installation's secrets, and renew certificates that end within 30 days."""
    with exit_codes():
        _needs_cryptography()
        from ops import authority, certificates, secrets

        owners = dict(_owner(text) for text in owner or ())
        wanted = secrets.Wanted(folder, tuple(job), tuple(host or ()), owners, broker, store, admin, in_place)
        done = secrets.make(wanted, authority.utc_now())
        for line in done:
            print(line)
        made = sum(certificates.KEPT not in line for line in done)
        print(f"{folder}: {f'{made} things done; restart the services they belong to' if made else 'all there'}")


def _owner(text: str) -> tuple[str, tuple[int, int]]:
    name, equals, ids = text.partition("=")
    user, _, group = ids.partition(":")
    if not equals or not user.isdecimal() or not (group or user).isdecimal():
        raise SettingsError(f"--owner {text!r} is not of the form FOLDER=UID or FOLDER=UID:GID")
    return name, (int(user), int(group or user))


def _row(record: dict[str, Any], client: dict[str, Any] | None, alive: list[str], now: float) -> tuple[str, ...]:
    from ops.devices import shown

    seen = "never" if client is None else f"{shown(client['seen'])}"
    return record["client"], record["job"], shown(record["enrolled_at"]), seen, _state(record, now, alive)


def _state(record: dict[str, Any], now: float, alive: list[str]) -> str:
    from ops.devices import ENROLLING, REVOKED, shown

    if record["state"] == REVOKED:
        outlives = f", but {' and '.join(alive)} still {'lets' if len(alive) == 1 else 'let'} it in: revoke it again"
        return f"revoked {shown(record['revoked_at'])}{outlives if alive else ''}"
    if record["state"] == ENROLLING:
        return "enrolment broke off: enroll it again, or revoke it"
    ends = record.get("certificate_ends_at")
    if ends is not None and ends - now < CERTIFICATE_SOON_S:
        return f"certificate {'ended' if ends < now else 'ends'} {shown(ends)}: rotate it"
    return "enrolled"


def _facts(name: str, job: str, standing: "Standing") -> list[tuple[str, str]]:
    from ops.devices import shown

    record = standing.record or {}
    logins = {"RabbitMQ": standing.at_broker, "Redis": standing.at_store}
    have, lack = [[server for server, there in logins.items() if there is which] for which in (True, False)]
    facts = [
        ("device", f"{name} of job {job}"),
        ("state", _state(record, time.time(), have) if record else "not in the registry: revoke it, or enroll it anew"),
        ("login", f"{job}.{name}, at {' and '.join(have) or 'neither server'}"),
        ("connections", ", ".join(str(c.get("name")) for c in standing.connections) or "none at RabbitMQ"),
        ("last seen", shown(standing.client["seen"]) if standing.client else "never: no update of it was received"),
    ]
    if record.get("state") == "enrolled" and lack:
        facts.append(("problem", f"no login at {' and '.join(lack)}: rotate it, or revoke it"))
    for key, title in (("enrolled_at", "enrolled"), ("rotated_at", "rotated"), ("certificate_ends_at", "certificate")):
        if record.get(key):
            facts.append((title, ("ends " if title == "certificate" else "") + shown(record[key])))
    if "broker" in record:
        facts.append(("reaches", f"RabbitMQ at {record['broker']}, Redis at {record['store']}"))
    return facts + [("" if i else "audit log", _line(event)) for i, event in enumerate(standing.events)]


def _line(event: "Event") -> str:
    from ops.dead_letters import plain
    from ops.devices import shown

    times = f" ({event.count} times)" if event.count > 1 else ""
    return f"{shown(event.at)}  {event.kind:<12} {plain(event.login, 129)}  {plain(event.detail)}{times}"


def _needs_cryptography() -> None:
    try:
        import cryptography  # noqa: F401
    except ImportError as error:
        raise SettingsError("this needs the extra `admin`: pip install 'fedmq[admin]'") from error
