"""The private authority: its certificates are what OpenSSL's strict rules ask for, and end when they should."""

import contextlib
import ssl
from datetime import timedelta

import pytest

from ops import authority
from shared.errors import SettingsError

NOW = authority.utc_now()
DAY = timedelta(days=1)


@pytest.fixture
def signer():
    return authority.make(NOW)[0]


def handshake(tmp_path, ca_pem, server, host, client=None, client_ca=None):
    """Shake hands in memory with the strictest checks there are; raises `ssl.SSLError` as a connection would."""
    files = {}
    for name, identity in (("server", server), ("client", client)):
        if identity is not None:
            files[name] = (tmp_path / f"{name}.pem", tmp_path / f"{name}.key")
            files[name][0].write_text(identity.certificate)
            files[name][1].write_text(identity.key)
    theirs = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    theirs.load_cert_chain(*files["server"])
    ours = ssl.create_default_context(cadata=ca_pem)
    ours.verify_flags |= ssl.VERIFY_X509_STRICT  # Python 3.13's default
    if client is not None:
        ours.load_cert_chain(*files["client"])
        theirs.verify_mode = ssl.CERT_REQUIRED
        theirs.load_verify_locations(cadata=client_ca)
    there, back = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = [ours.wrap_bio(back, there, server_hostname=host), theirs.wrap_bio(there, back, server_side=True)]
    for _ in range(4):
        for end in ends:
            with contextlib.suppress(ssl.SSLWantReadError):
                end.do_handshake()


@pytest.mark.parametrize("host", ["rabbitmq", "localhost", "127.0.0.1", "broker.fleet.example.org", "::1"])
def test_a_server_is_known_by_each_of_its_names(tmp_path, signer, host):
    server = signer.server("rabbitmq", ["rabbitmq", "localhost", "127.0.0.1", "broker.fleet.example.org", "::1"], NOW)
    handshake(tmp_path, signer.pem, server, host)


def test_another_name_or_another_authority_is_refused(tmp_path, signer):
    server = signer.server("rabbitmq", ["rabbitmq"], NOW)
    with pytest.raises(ssl.SSLCertVerificationError, match="Hostname mismatch"):
        handshake(tmp_path, signer.pem, server, "redis")
    with pytest.raises(ssl.SSLCertVerificationError, match="verify failed"):
        handshake(tmp_path, authority.make(NOW)[0].pem, server, "rabbitmq")


def test_a_device_with_a_certificate_is_let_in_and_cannot_pose_as_a_server(tmp_path, signer):
    server, device = signer.server("redis", ["redis"], NOW), signer.client("job-a.cam", NOW)
    handshake(tmp_path, signer.pem, server, "redis", device, signer.pem)
    with pytest.raises(ssl.SSLCertVerificationError, match=r"purpose|usage"):
        handshake(tmp_path, signer.pem, signer.client("redis", NOW), "redis")
    with pytest.raises(ssl.SSLError):
        handshake(tmp_path, signer.pem, server, "redis", server, signer.pem)  # a stolen server's key lets nobody in


def test_a_device_of_another_authority_is_refused(tmp_path, signer):
    stranger = authority.make(NOW)[0].client("job-a.cam", NOW)
    with pytest.raises(ssl.SSLCertVerificationError):
        handshake(tmp_path, signer.pem, signer.server("redis", ["redis"], NOW), "redis", stranger, signer.pem)


def test_the_longest_login_fits(tmp_path, signer):
    login = f"{'j' * 64}.{'c' * 64}"
    device = signer.client(login, NOW)
    assert authority.hosts_of(device.certificate) == {login}
    handshake(tmp_path, signer.pem, signer.server("redis", ["redis"], NOW), "redis", device, signer.pem)


@pytest.mark.parametrize("kind", ["server", "client"])
def test_certificates_live_a_year_and_the_authority_ten(signer, kind):
    identity = signer.server("x", ["x"], NOW) if kind == "server" else signer.client("x", NOW)
    assert abs(authority.ends_at(identity.certificate) - NOW - 365 * DAY) < DAY
    assert abs(authority.ends_at(signer.pem) - NOW - 3650 * DAY) < DAY


def test_no_certificate_outlives_its_authority(signer):
    late = NOW + 3640 * DAY
    assert authority.ends_at(signer.server("x", ["x"], late).certificate) == authority.ends_at(signer.pem)


def test_a_device_with_a_slow_clock_finds_it_valid_already(tmp_path, signer):
    certificate = signer.server("x", ["x"], NOW + timedelta(hours=12))  # made half a day ahead of this clock
    handshake(tmp_path, signer.pem, certificate, "x")


def test_due_thirty_days_before_the_end(signer):
    certificate = signer.server("x", ["x"], NOW).certificate
    assert not authority.due(certificate, NOW + 334 * DAY)
    assert authority.due(certificate, NOW + 336 * DAY)
    assert authority.due(certificate, NOW + 400 * DAY)


def test_an_authority_is_made_once_and_kept(tmp_path):
    first, what = authority.keep(tmp_path, NOW)
    second, again = authority.keep(tmp_path, NOW + 3000 * DAY)
    assert (what, again) == ("made", "kept")
    assert first.pem == second.pem
    assert (tmp_path / "ca.key").stat().st_mode & 0o777 == 0o600


def test_a_renewed_authority_is_good_for_old_and_new(tmp_path):
    """Devices hold the former certificate, servers still show what it signed: neither may break at the renewal."""
    old, _ = authority.keep(tmp_path, NOW - 3300 * DAY)
    signed_before = old.server("x", ["x"], NOW - 100 * DAY)
    new, what = authority.keep(tmp_path, NOW)
    assert what == "renewed"
    assert authority.ends_at(new.pem) - NOW > 3600 * DAY
    handshake(tmp_path, new.pem, signed_before, "x")
    handshake(tmp_path, old.pem, new.server("x", ["x"], NOW), "x")
    assert new.signed(signed_before.certificate)


def test_a_crash_between_key_and_certificate_is_mended(tmp_path):
    authority.keep(tmp_path, NOW)
    key = (tmp_path / "ca.key").read_text()
    (tmp_path / "ca.pem").unlink()
    _, what = authority.keep(tmp_path, NOW)
    assert what == "made"
    assert (tmp_path / "ca.key").read_text() == key
    authority.read(tmp_path)


def test_signed_knows_its_own(signer):
    assert signer.signed(signer.server("x", ["x"], NOW).certificate)
    assert not authority.make(NOW)[0].signed(signer.server("x", ["x"], NOW).certificate)
    assert not signer.signed("no PEM")


@pytest.mark.parametrize("host", ["a b", "https://x", "x:5671", "", "-x", "x" * 64, "a..b", "x\n", "ä"])
def test_what_is_no_host_is_refused(signer, host):
    with pytest.raises(SettingsError, match="neither a host name nor an address"):
        signer.server("x", [host], NOW)


def test_a_folder_that_holds_something_else_is_named(tmp_path):
    with pytest.raises(SettingsError, match=r"ca\.pem is no certificate"):
        authority.read(tmp_path)
    authority.keep(tmp_path, NOW)
    other = tmp_path / "other"
    other.mkdir()
    authority.keep(other, NOW)
    (tmp_path / "ca.key").write_text((other / "ca.key").read_text())
    with pytest.raises(SettingsError, match="do not go together"):
        authority.read(tmp_path)
    (tmp_path / "ca.key").write_text("nothing")
    with pytest.raises(SettingsError, match="no key"):
        authority.read(tmp_path)
