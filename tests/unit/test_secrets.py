"""`fedmq secrets make`: whole at the first run, quiet at the second, and nothing secret where it need not be."""

import contextlib
import errno
import json
import ssl
import stat
import subprocess
import sys
import tomllib
from datetime import timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import BestAvailableEncryption, Encoding, NoEncryption, PrivateFormat

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


# Certificates of somebody else


def acme(key=None, ca=True, name="Acme Root"):
    """Return an authority of somebody else's: its certificate as PEM, its key as PEM, and what signs with both."""
    key = key or rsa.generate_private_key(65537, 2048)
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    digest = None if isinstance(key, ed25519.Ed25519PrivateKey) else hashes.SHA256()
    certificate = (
        x509.CertificateBuilder().subject_name(subject).issuer_name(subject).public_key(key.public_key())
        .serial_number(1).not_valid_before(NOW - timedelta(days=1)).not_valid_after(NOW + timedelta(days=300))
        .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True).sign(key, digest)
    )  # fmt: skip
    return certificate.public_bytes(Encoding.PEM).decode(), pem_of(key), (certificate, key)


def pem_of(key, encryption=None):
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, encryption or NoEncryption()).decode()


def signed_by(root, *hosts, days=200):
    """Return a server's certificate and key as an operator's own authority makes them."""
    certificate, signing = root
    key = ec.generate_private_key(ec.SECP256R1())
    alternatives = x509.SubjectAlternativeName([x509.DNSName(host) for host in hosts])
    made = (
        x509.CertificateBuilder().subject_name(x509.Name([])).issuer_name(certificate.subject)
        .public_key(key.public_key()).serial_number(2).not_valid_before(NOW).not_valid_after(NOW + timedelta(days=days))
        .add_extension(alternatives, critical=True).sign(signing, hashes.SHA256())
    )  # fmt: skip
    return made.public_bytes(Encoding.PEM).decode(), pem_of(key)


def put_own(folder, root_pem, certificate, key, home="rabbitmq"):
    for name, text in (("ca.pem", root_pem), ("server.pem", certificate), ("server.key", key)):
        (folder / home / name).write_text(text)


def test_a_certificate_of_somebody_else_stays_and_everybody_comes_to_know_its_authority(folder):
    make(Wanted(folder, ("digits",)), NOW)
    ours = (folder / "ca/ca.pem").read_text()
    root_pem, _, root = acme()
    certificate, key = signed_by(root, "rabbitmq", "localhost", "fleet.example.org")
    put_own(folder, root_pem, certificate, key)
    done = make(Wanted(folder, ("digits",)), NOW)
    assert [line for line in done if "rabbitmq/" in line] == [
        f"rabbitmq/server.pem: not made by fedmq, kept, until {NOW + timedelta(days=200):%Y-%m-%d}; "
        "it lacks 127.0.0.1: who uses these names refuses it"
    ]
    assert (folder / "rabbitmq/server.pem").read_text() == certificate
    assert (folder / "rabbitmq/server.key").read_text() == key
    assert {path.parent.name for path in folder.rglob("ca.pem") if path.read_text() == ours + root_pem} == {
        path.parent.name for path in folder.rglob("ca.pem")
    } - {"ca"}
    before = contents(folder)
    assert make(Wanted(folder, ("digits",), ("more.example.org",)), NOW + timedelta(days=1))
    changed = {str(name) for name, data in contents(folder).items() if before[name] != data}
    assert "rabbitmq/server.pem" not in changed
    assert "redis/server.pem" in changed, "ours gets the new host"
    for name in ("server.pem", "server.key"):
        (folder / "rabbitmq" / name).unlink()
    make(Wanted(folder, ("digits",)), NOW)
    assert (folder / "operator/ca.pem").read_text() == ours, "who is gone is not trusted any more"


def test_of_a_certificate_of_somebody_else_is_said_what_is_wrong(folder):
    make(Wanted(folder, ("digits",)), NOW)
    _, _, root = acme()
    certificate, key = signed_by(root, "redis", "localhost", days=20)
    put_own(folder, (folder / "ca/ca.pem").read_text(), certificate, key, "redis")
    (said,) = make(Wanted(folder, ("digits",)), NOW)
    assert "which is soon: put its successor there; ca.pem beside it must hold the authority that signed it" in said
    (folder / "redis/server.key").write_text(signed_by(root, "redis")[1])
    with pytest.raises(SettingsError, match=r"redis/server.pem was not made by fedmq, and .*server.key is not its key"):
        make(Wanted(folder, ("digits",)), NOW)
    (folder / "redis/server.pem").write_text("no PEM")
    with pytest.raises(SettingsError, match=r"redis/server.pem: this is no PEM certificate.*; remove it to make it"):
        make(Wanted(folder, ("digits",)), NOW)


@pytest.mark.parametrize(
    "kind", [lambda: rsa.generate_private_key(65537, 2048), lambda: ec.generate_private_key(ec.SECP384R1()),
             ed25519.Ed25519PrivateKey.generate], ids=["rsa", "p384", "ed25519"],
)  # fmt: skip
@pytest.mark.parametrize("when", ["before", "after"])
def test_an_authority_of_somebody_else_signs_everything_and_is_never_renewed(folder, kind, when):
    if when == "after":
        make(Wanted(folder, ("digits",)), NOW)
    (folder / "ca").mkdir(parents=True, exist_ok=True)
    root_pem, key_pem, _ = acme(kind())
    (folder / "ca/ca.pem").write_text(root_pem)
    (folder / "ca/ca.key").write_text(key_pem)
    make(Wanted(folder, ("digits",)), NOW)
    assert (folder / "ca/ca.pem").read_text() == root_pem, "it ends within 400 days, but it is not ours to renew"
    assert (folder / "operator/ca.pem").read_text() == root_pem
    context = ssl.create_default_context(cafile=folder / "operator/ca.pem")
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(folder / "rabbitmq/server.pem", folder / "rabbitmq/server.key")
    shake_hands(context, server, "rabbitmq")
    assert make(Wanted(folder, ("digits",)), NOW) == []
    with pytest.raises(SettingsError, match="the authority's certificate ended 20"):
        make(Wanted(folder, ("digits",)), NOW + timedelta(days=301))


def shake_hands(ours, theirs, host):
    there, back = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = [ours.wrap_bio(back, there, server_hostname=host), theirs.wrap_bio(there, back, server_side=True)]
    for _ in range(4):
        for end in ends:
            with contextlib.suppress(ssl.SSLWantReadError):
                end.do_handshake()


def test_an_authority_that_cannot_sign_is_refused(folder):
    (folder / "ca").mkdir(parents=True)
    for ca, encryption, says in (
        (False, None, "not of an authority: it may not sign others"),
        (True, BestAvailableEncryption(b"x"), "ca.key is encrypted, and nobody is there to be asked: `openssl pkey"),
    ):
        root_pem, _, (_, key) = acme(ca=ca)
        (folder / "ca/ca.pem").write_text(root_pem)
        (folder / "ca/ca.key").write_text(pem_of(key, encryption))
        with pytest.raises(SettingsError, match=says):
            make(Wanted(folder, ("digits",)), NOW)


# What a crash or a backup leaves


def test_a_crash_between_a_key_and_its_certificate_is_mended(folder):
    make(Wanted(folder, ("digits",)), NOW)
    (folder / "redis/server.key").write_text((folder / "rabbitmq/server.key").read_text())
    (line,) = make(Wanted(folder, ("digits",)), NOW)
    assert line.startswith("redis/server.pem: made anew, its key was another one's")
    files = [(folder / "redis" / name).read_text() for name in ("server.pem", "server.key")]
    assert authority.go_together(*files)


def test_secrets_that_a_copy_left_open_are_closed(folder):
    make(Wanted(folder, ("digits",)), NOW)
    names = ("ca/ca.key", "redis/server.key", "operator/fedmq.toml", "redis-exporter/password.json")
    for name in names:
        (folder / name).chmod(0o644)
    done = make(Wanted(folder, ("digits",)), NOW)
    assert sorted(done) == sorted(f"{name}: only its owner can read it again" for name in names)
    assert {stat.S_IMODE((folder / name).stat().st_mode) for name in names} == {0o600}


def test_a_damaged_line_of_users_acl_is_named(folder):
    make(Wanted(folder, ("digits",)), NOW)
    file = folder / "redis/users.acl"
    file.write_text(file.read_text() + "\nuser\n")
    line = len(file.read_text().splitlines())
    with pytest.raises(SettingsError, match=rf"users.acl, line {line}: 'user' is no login"):
        make(Wanted(folder, ("digits",)), NOW)


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


@pytest.mark.parametrize("step", ["fchmod", "fsync"])
def test_a_file_that_cannot_be_written_leaves_nothing(tmp_path, monkeypatch, step):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(f"ops.private_file.os.{step}", full)
    with pytest.raises(SettingsError, match="f cannot be written: No space left on device"):
        write_private(tmp_path / "f", "secret")
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_program_left_goes_with_the_next_write(tmp_path):
    write = f"import os; from ops.private_file import *; PreparedFile(Path('{tmp_path}/f'), 'secret'); os._exit(9)"
    subprocess.run([sys.executable, "-c", write], check=False)
    (tmp_path / ".f.toml.12345678").write_text("another's")
    (tmp_path / ".f.old").write_text("not ours")
    assert len(list(tmp_path.iterdir())) == 3
    with PreparedFile(tmp_path / "f", "first") as at_work:
        write_private(tmp_path / "f", "second")
        at_work.replace()
    assert {path.name for path in tmp_path.iterdir()} == {"f", ".f.toml.12345678", ".f.old"}
    assert (tmp_path / "f").read_text() == "first", "somebody who is still writing is left alone"


@pytest.mark.parametrize("text", ["plain", 'quotes " and \\', "-----BEGIN X-----\nabc\n-----END X-----\n"])
def test_what_is_written_as_toml_is_read_as_it_was(text):
    assert tomllib.loads(toml({"a": text, "b": "x"})) == {"a": text, "b": "x"}
