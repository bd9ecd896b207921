"""`fedmq secrets make`: whole at the first run, quiet at the second, and nothing secret where it need not be."""

import json
import stat
import tomllib
from datetime import timedelta
from pathlib import Path

import pytest

from ops import authority, secrets
from ops.passwords import is_rabbit_hash_of, new_password, rabbit_hash
from ops.private_file import PreparedFile, toml, write_private
from ops.secrets import Wanted, make
from shared.config import AggregatorSettings, OperatorSettings, load, use_file
from shared.errors import SettingsError
from shared.transport.names import OPERATOR, service_login

NOW = authority.utc_now()


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "secrets"


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def certificates(folder):
    """Return the names of all that the authority signed."""
    return {f"{path.parent.name}/{path.name}" for path in folder.rglob("*.pem") if path.name != "ca.pem"}


def settings_of(folder, home):
    return tomllib.loads((folder / home / "fedmq.toml").read_text())


def password_of(folder, home):
    return settings_of(folder, home)["store_url"].split(":")[2].split("@")[0]


def test_a_second_run_changes_nothing(folder):
    assert make(Wanted(folder, ("digits",), ("fleet.example.org",)), NOW)
    before = contents(folder)
    assert make(Wanted(folder, ("digits",), ("fleet.example.org",)), NOW) == []
    assert make(Wanted(folder, ("digits",)), NOW) == []  # a host that was given before stays
    assert contents(folder) == before


def test_what_is_missing_is_made_and_the_rest_kept(folder):
    make(Wanted(folder, ("digits",)), NOW)
    before = contents(folder)
    for name in ("redis/server.key", "grafana/admin_password", "rabbitmq/definitions.json"):
        (folder / name).unlink()
    done = make(Wanted(folder, ("digits",)), NOW)
    assert {line.split(":")[0] for line in done} == {
        "redis/server.pem", "grafana/admin_password", "rabbitmq/definitions.json",
    }  # fmt: skip
    changed = {str(name) for name, data in contents(folder).items() if before[name] != data}
    assert changed == {
        "redis/server.pem", "redis/server.key", "grafana/admin_password", "rabbitmq/definitions.json",
    }  # fmt: skip


def test_only_their_owner_can_read_secrets(folder):
    make(Wanted(folder, ("digits",)), NOW)
    for path in folder.rglob("*"):
        mode = stat.S_IMODE(path.stat().st_mode)
        public = path.suffix == ".pem" or path.name == "web.yml"
        assert mode == (0o700 if path.is_dir() else 0o644 if public else 0o600), path
        assert not public or b"PRIVATE KEY" not in path.read_bytes()


def test_each_service_has_a_password_of_its_own_and_servers_have_hashes(folder):
    make(Wanted(folder, ("digits",)), NOW)
    passwords = [password_of(folder, home) for home in ("operator", "exporter", "aggregator", "evaluator")]
    passwords += [next(iter(json.loads((folder / "redis-exporter/password.json").read_text()).values()))]
    passwords += [(folder / "grafana/admin_password").read_text()]
    assert len(set(passwords)) == 6
    assert all(len(password) == 32 for password in passwords)
    servers = (folder / "rabbitmq/definitions.json").read_text() + (folder / "redis/users.acl").read_text()
    assert not any(password in servers for password in passwords)
    assert not (folder / "rabbitmq/ca.key").exists()
    assert [path.parent.name for path in folder.rglob("ca.key")] == ["ca"]
    users = {user["name"]: user for user in json.loads((folder / "rabbitmq/definitions.json").read_text())["users"]}
    assert is_rabbit_hash_of(users[OPERATOR]["password_hash"], password_of(folder, "operator"))
    assert "guest" not in users


def test_certificates_are_renewed_a_month_before_their_end(folder):
    make(Wanted(folder, ("digits",)), NOW)
    assert make(Wanted(folder, ("digits",)), NOW + timedelta(days=330)) == []
    done = make(Wanted(folder, ("digits",)), NOW + timedelta(days=340))
    assert {line.split(":")[0] for line in done} == certificates(folder)
    assert all("renewed" in line for line in done)
    end = authority.ends_at((folder / "rabbitmq/server.pem").read_text())
    assert end - NOW > timedelta(days=700)


def test_a_new_host_comes_to_those_there_are(folder):
    make(Wanted(folder, ("digits",), ("a.example.org",)), NOW)
    done = make(Wanted(folder, ("digits",), ("10.0.0.5",)), NOW)
    assert all("more hosts" in line for line in done)
    rabbitmq = authority.hosts_of((folder / "rabbitmq/server.pem").read_text())
    assert rabbitmq == {"rabbitmq", "localhost", "127.0.0.1", "a.example.org", "broker.a.example.org", "10.0.0.5"}
    assert "store.a.example.org" in authority.hosts_of((folder / "redis/server.pem").read_text())


def test_another_authority_signs_everything_anew(folder):
    make(Wanted(folder, ("digits",)), NOW)
    for name in ("ca.pem", "ca.key"):
        (folder / "ca" / name).unlink()
    done = make(Wanted(folder, ("digits",)), NOW)
    assert {line.split(":")[0] for line in done if "another authority's" in line} == certificates(folder)
    assert (folder / "redis/ca.pem").read_text() == (folder / "ca/ca.pem").read_text()


def test_a_second_job_gets_folders_of_its_own_and_the_first_keeps_what_it_has(folder):
    make(Wanted(folder, ("digits",)), NOW)
    before = password_of(folder, "aggregator")
    make(Wanted(folder, ("words",)), NOW)
    assert password_of(folder, "aggregator") == before
    assert settings_of(folder, "aggregator")["job"] == "digits"
    assert settings_of(folder, "aggregator.words")["job"] == "words"
    lines = (folder / "redis/users.acl").read_text()
    logins = {line.split()[1] for line in lines.splitlines()}
    assert {service_login("aggregator", job) for job in ("digits", "words")} <= logins
    assert "~fedmq:{words}:*" in lines


def test_logins_that_redis_wrote_stay(folder):
    """Redis saves devices into the file, and everything else in words of its own."""
    make(Wanted(folder, ("digits",)), NOW)
    file = folder / "redis/users.acl"
    device = "user digits.cam on sanitize-payload #abc %R~fedmq:{digits}:head resetchannels -@all +get"
    file.write_text(file.read_text().replace("-@all +@connection", "resetchannels -@all +@connection") + device + "\n")
    saved = file.read_text()
    assert make(Wanted(folder, ("digits",)), NOW) == []
    assert file.read_text() == saved
    make(Wanted(folder, ("words",)), NOW)
    assert device in file.read_text()


def test_rules_of_a_newer_fedmq_replace_the_old_ones(folder, monkeypatch):
    make(Wanted(folder, ("digits",)), NOW)
    monkeypatch.setattr("shared.store.redis_acl.exporter_rules", lambda: ["%R~fedmq:*", "-@all", "+get"])
    assert make(Wanted(folder, ("digits",)), NOW) == ["redis/users.acl: written, 6 logins of services, 0 others"]
    assert "user fedmq-exporter" in (folder / "redis/users.acl").read_text()


def test_the_settings_are_ones_that_programs_take(folder, monkeypatch):
    make(Wanted(folder, ("digits",), in_place=True), NOW)
    monkeypatch.setattr("os.environ", {})
    for kind, home in ((AggregatorSettings, "aggregator"), (OperatorSettings, "operator")):
        settings = load(kind, {"config": folder / home / "fedmq.toml"})
        assert settings.job == "digits"
        assert f"ca_file={folder / home / 'ca.pem'}" in settings.broker_url
    assert f"ca_file={folder / 'operator/ca.pem'}" in settings.broker_admin_url
    use_file(Path("/dev/null"))


def test_settings_name_what_a_container_sees(folder):
    make(Wanted(folder, ("digits",)), NOW)
    assert settings_of(folder, "aggregator")["tls_ca"] == "/run/fedmq/ca.pem"
    assert settings_of(folder, "operator")["ca_dir"] == "/run/fedmq-ca"
    assert settings_of(folder, "operator")["broker_admin_url"].endswith("@rabbitmq:15671")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"jobs": ()}, "name the first job"),
        ({"jobs": ("a.b",)}, "--job 'a.b': must be of"),
        ({"hosts": ("https://x",)}, "'https://x' is neither a host name nor an address"),
        ({"owners": {"rabbit": (1, 1)}}, "there is no such folder; those are ca, rabbitmq"),
    ],
)
def test_what_was_told_wrongly_is_said(folder, change, says):
    with pytest.raises(SettingsError, match=says):
        make(Wanted(**({"folder": folder, "jobs": ("digits",)} | change)), NOW)


def test_files_that_are_none_of_ours_are_named(folder):
    make(Wanted(folder, ("digits",)), NOW)
    (folder / "exporter/fedmq.toml").write_text('store_url = "rediss://somebody:x@redis/0"\n')
    with pytest.raises(SettingsError, match=r"exporter/fedmq.toml: its store_url names no password of login 'fedmq-ex"):
        make(Wanted(folder, ("digits",)), NOW)
    (folder / "exporter/fedmq.toml").write_text("=")
    with pytest.raises(SettingsError, match=r"exporter/fedmq.toml: "):
        make(Wanted(folder, ("digits",)), NOW)


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SettingsError, match="Not a directory"):
        make(Wanted(tmp_path / "file" / "secrets", ("digits",)), NOW)


def test_owners_are_given_everything_in_their_folder(folder, monkeypatch):
    given = []
    monkeypatch.setattr(secrets.os, "chown", lambda path, user, group, **_: given.append((path, user, group)))
    make(Wanted(folder, ("digits",), owners={"redis": (999, 1000)}), NOW)
    inside = {folder / "redis", *(folder / "redis").rglob("*")}
    assert {path for path, _, _ in given} == inside
    assert {(user, group) for _, user, group in given} == {(999, 1000)}


# Passwords and files


def test_passwords_need_no_escaping_and_differ():
    many = {new_password() for _ in range(100)}
    assert len(many) == 100
    assert all(len(password) == 32 and password.replace("-", "").replace("_", "").isalnum() for password in many)


def test_the_hash_is_rabbitmqs_own():
    """From RabbitMQ's documentation of credentials: salt 908DC60A, password test12."""
    assert rabbit_hash("test12", bytes.fromhex("908DC60A")) == "kI3GCqW5JLMJa4iX1lo7X4D6XbYqlLgxIs30+P6tENUV2POR"
    assert is_rabbit_hash_of("kI3GCqW5JLMJa4iX1lo7X4D6XbYqlLgxIs30+P6tENUV2POR", "test12")
    for wrong in ("", "x", "kI3G", "äö", "AAAA" * 12):
        assert not is_rabbit_hash_of(wrong, "test12")


def test_a_private_file_is_private_from_its_first_byte(tmp_path):
    with PreparedFile(tmp_path / "f", "secret") as file:
        (hidden,) = tmp_path.iterdir()
        assert stat.S_IMODE(hidden.stat().st_mode) == 0o600
        file.place()
    assert [path.name for path in tmp_path.iterdir()] == ["f"]
    write_private(tmp_path / "f", "other")
    assert (tmp_path / "f").read_text() == "other"


def test_a_file_that_is_there_is_not_replaced(tmp_path):
    (tmp_path / "f").write_text("kept")
    with pytest.raises(SettingsError, match="exists"), PreparedFile(tmp_path / "f", "secret") as file:
        file.place()
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"f": "kept"}


def test_a_file_given_up_leaves_nothing(tmp_path):
    with pytest.raises(ZeroDivisionError), PreparedFile(tmp_path / "f", "secret"):
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("text", ["plain", 'quotes " and \\', "-----BEGIN X-----\nabc\n-----END X-----\n"])
def test_what_is_written_as_toml_is_read_as_it_was(text):
    assert tomllib.loads(toml({"a": text, "b": "x"})) == {"a": text, "b": "x"}
