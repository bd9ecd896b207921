"""The logins of services as the servers read them at their start: definitions.json of RabbitMQ, users.acl of Redis."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ops import roles
from ops.passwords import is_rabbit_hash_of, rabbit_hash
from ops.private_file import keep_private, write_private
from shared.errors import SettingsError
from shared.store import redis_acl
from shared.transport.names import EXPORTER, OPERATOR, REDIS_EXPORTER, VHOST

DEFINITIONS = Path(__file__).parents[1] / "broker_config" / "definitions.json"
MIN_WORDS = 3  # of a login in users.acl
HASHING = "rabbit_password_hashing_sha256"


def write(folder: Path, passwords: Mapping[str, str], done: list[str]) -> None:
    """Leave both files with these logins and what they may do.

    Args:
        folder: with the folders `rabbitmq` and `redis`.
        passwords: login -> password.
        done: takes a line for each file that changed.

    Raises:
        SettingsError: a file that is there cannot be read.
    """
    _write_definitions(folder / "rabbitmq" / "definitions.json", passwords, done)
    _write_users(folder / "redis" / "users.acl", passwords, done)


def broker_role(login: str) -> roles.BrokerRole | None:
    """Return what a service may do at the broker; None: it has no login there."""
    if login == OPERATOR:
        return roles.operator()
    if login == EXPORTER:
        return roles.exporter()
    _, _, rest = login.partition("fedmq.aggregator.")
    return roles.aggregator(rest) if rest else None


def store_rules(login: str) -> list[str]:
    """Return what a service may do at the store."""
    if login == OPERATOR:
        return redis_acl.operator_rules()
    if login == EXPORTER:
        return redis_acl.exporter_rules()
    if login == REDIS_EXPORTER:
        return redis_acl.redis_exporter_rules()
    _, role, job = login.split(".")
    return redis_acl.aggregator_rules(job) if role == "aggregator" else redis_acl.evaluator_rules(job)


def _write_definitions(path: Path, passwords: Mapping[str, str], done: list[str]) -> None:
    """Write broker_config/definitions.json together with the logins; hashes that are right stay, salt and all."""
    there = _read(path).get("users", []) if path.exists() else []
    try:
        hashes = {user["name"]: user["password_hash"] for user in there}
    except (TypeError, KeyError) as error:
        raise SettingsError(f"{path}: a user without name or password_hash; remove the file to make it anew") from error
    users: list[dict[str, Any]] = []
    permissions: list[dict[str, str]] = []
    topics: list[dict[str, str]] = []
    for role in filter(None, map(broker_role, sorted(passwords))):
        known, password, allowed = hashes.get(role.login, ""), passwords[role.login], role.permission
        hashed = known if is_rabbit_hash_of(known, password) else rabbit_hash(password)
        who = {"user": role.login, "vhost": VHOST}
        users.append(
            {"name": role.login, "password_hash": hashed, "hashing_algorithm": HASHING, "tags": list(role.tags)}
        )
        permissions.append(
            who | {"configure": allowed.configure, "write": allowed.write, "read": allowed.read}
        )  # fmt: skip
        topics += [who | {"exchange": name, "write": t.write, "read": t.read} for name, t in role.topics.items()]
    logins = {"users": users, "permissions": permissions, "topic_permissions": topics}
    if keep_private(path, json.dumps(_read(DEFINITIONS) | logins, indent=2) + "\n"):
        done.append(f"rabbitmq/{path.name}: written, {len(users)} logins")


def _write_users(path: Path, passwords: Mapping[str, str], done: list[str]) -> None:
    """Leave users.acl with the logins; Redis writes it too, and its other logins - those of devices - stay.

    Redis writes rules in words of its own. So a note beside the file says which rules it was written from: while they
    are the same and no login is missing, what a running Redis has written is left alone.
    """
    ours = [redis_acl.DEFAULT_OFF]
    ours += [redis_acl.acl_line(login, passwords[login], store_rules(login)) for login in sorted(passwords)]
    text, note = "".join(f"{line}\n" for line in ours), path.with_name("services.sha256")
    digest = hashlib.sha256(text.encode()).hexdigest()
    there = _lines(path) if path.exists() else []
    known = {line.split()[1] for line in there}
    names = {line.split()[1] for line in ours}
    if names <= known and note.exists() and note.read_text() == digest:
        return
    others = [line for line in there if line.split()[1] not in names]
    write_private(path, text + "".join(f"{line}\n" for line in others))
    write_private(note, digest)
    done.append(f"redis/{path.name}: written, {len(ours)} logins of services, {len(others)} others")


def _lines(path: Path) -> list[str]:
    """Return the lines of users.acl, each of a login.

    Raises:
        SettingsError: one is not; Redis would not start with it.
    """
    lines = []
    for number, line in enumerate(path.read_text(errors="replace").splitlines(), 1):
        words = line.split()
        if words and (len(words) < MIN_WORDS or words[0] != "user"):
            raise SettingsError(
                f"{path}, line {number}: {line[:40]!r} is no login (user NAME RULES); restore the file from a backup, "
                "or take the line out: `fedmq devices rotate` gives a device that stood there a new login"
            )
        lines += [line] if words else []
    return lines


def _read(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, ValueError) as error:
        raise SettingsError(f"{path}: {error}") from error
