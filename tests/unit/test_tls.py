"""Certificates in settings and URLs."""

import ssl
from pathlib import Path

import pytest

from shared import tls
from shared.config import EvaluatorSettings, WorkerSettings, load, use_file
from shared.errors import SettingsError
from shared.store.redis import RedisStore
from shared.transport.link import parameters
from shared.urls import hide_password

CA = "-----BEGIN CERTIFICATE-----\nnot one\n-----END CERTIFICATE-----\n"
BROKER, STORE = "amqps://j.a:pw%2F1@broker:443/fedmq?heartbeat=5", "rediss://j.a:pw@store:6379/0"


@pytest.fixture(autouse=True)
def no_environment(monkeypatch):
    for name in ("FEDMQ_CONFIG", "FEDMQ_TLS_CA", "FEDMQ_BROKER_URL", "FEDMQ_STORE_URL"):
        monkeypatch.delenv(name, raising=False)
    yield
    use_file(None)


def test_files_come_and_go_as_parameters_of_the_url():
    files = {"ca_file": "/a b/ca.pem", "cert_file": "/c"}
    url = tls.with_files(BROKER, files)
    assert tls.without_files(url) == (BROKER, files)
    assert hide_password(url) == "amqps://j.a:***@broker:443/fedmq?heartbeat=5"
    assert tls.with_files(url, {"ca_file": "/other"}) == url, "the URL's own wins"
    assert tls.with_files("redis://h/0", files) == "redis://h/0"
    with pytest.raises(ValueError, match="ca_file need TLS: write amqp"):
        tls.without_files("amqp://h/fedmq?ca_file=/x")


def test_pem_text_of_a_device_file_ends_up_as_files_of_both_urls(tmp_path):
    path = tmp_path / "phone.toml"
    path.write_text(
        f"job = 'j'\nclient_id = 'a'\nbroker_url = '{BROKER}'\nstore_url = '{STORE}'\ntls_ca = '''{CA}'''\n"
    )
    path.chmod(0o600)
    settings = load(WorkerSettings, {"config": path})
    for url in (settings.broker_url, settings.store_url):
        assert Path(tls.without_files(url)[1]["ca_file"]).read_text() == CA
    assert settings.client_id == "a"
    path.chmod(0o640)
    with pytest.raises(SettingsError, match=r"mode 0640.*chmod 600"):
        load(WorkerSettings, {"config": path})


def test_a_file_without_secrets_may_be_read_by_all(tmp_path):
    path = tmp_path / "job.toml"
    path.write_text("job = 'j'\nstore_url = 'redis://store:6379/0'\n")
    path.chmod(0o644)
    assert load(EvaluatorSettings, {"config": path}).job == "j"


def test_certificates_without_tls_are_refused(tmp_path):
    ca = tmp_path / "ca.pem"
    ca.write_text(CA)
    with pytest.raises(SettingsError, match=r"FEDMQ_STORE_URL=redis://:\*\*\*@h:6379/0: .* in the clear: write rediss"):
        load(EvaluatorSettings, {"store_url": "redis://:pw@h:6379/0", "tls_ca": str(ca)})
    assert load(EvaluatorSettings, {"store_url": STORE, "tls_ca": str(ca)}).store_url == f"{STORE}?ca_file={ca}"


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"tls_ca": "/no/such/ca.pem"}, "FEDMQ_TLS_CA: /no/such/ca.pem is no file"),
        ({"metrics_cert": CA}, "FEDMQ_METRICS_CERT and FEDMQ_METRICS_KEY go together"),
    ],
)
def test_what_is_wrong_with_certificates_is_said_at_start(flags, said):
    with pytest.raises(SettingsError, match=said):
        load(WorkerSettings, {"broker_url": BROKER, "store_url": STORE, **flags})


def test_a_file_that_holds_no_certificate_is_named(tmp_path):
    ca = tmp_path / "ca.pem"
    ca.write_text(CA)
    with pytest.raises(SettingsError, match=rf"ca_file {ca} holds no certificate"):
        parameters(f"{BROKER}&ca_file={ca}", "test")
    with pytest.raises(SettingsError, match=rf"ca_file {ca} holds no certificate"):
        RedisStore(f"{STORE}?ca_file={ca}", "j")
    with pytest.raises(SettingsError, match="ca_file /gone cannot be read: No such file"):
        RedisStore(f"{STORE}?ca_file=/gone", "j")


def test_the_servers_name_and_certificate_are_checked():
    given = parameters(BROKER, "test")
    assert given.ssl_options.server_hostname == "broker"
    context = given.ssl_options.context
    assert context.check_hostname
    assert context.verify_mode == ssl.CERT_REQUIRED
    assert context.minimum_version == ssl.TLSVersion.TLSv1_2
    assert (given.host, given.port, given.credentials.password, given.heartbeat) == ("broker", 443, "pw/1", 5)


@pytest.mark.parametrize(
    ("error", "mend"),
    [
        ("[SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed: certificate has expired (_ssl.c:1)", "clock"),
        ("certificate verify failed: certificate is not yet valid", "set up NTP"),
        ("certificate verify failed: self-signed certificate in certificate chain", "FEDMQ_TLS_CA"),
        ("certificate verify failed: Hostname mismatch, certificate is not valid for 'x'", "another host name"),
        ("[SSL: WRONG_VERSION_NUMBER] wrong version number", "no TLS on this port"),
        ("tlsv13 alert certificate required", "FEDMQ_TLS_CERT"),
        ("[SSL: SSLV3_ALERT_CERTIFICATE_EXPIRED] sslv3 alert certificate expired", "fedmq devices rotate"),
        ("EOF occurred in violation of protocol (_ssl.c:992)", "FEDMQ_TLS_CERT"),
    ],
)
def test_each_failed_handshake_has_its_mend(error, mend):
    assert mend in tls.hint(ssl.SSLError(1, error))


def test_a_plain_url_that_is_hung_up_on_may_need_tls():
    reset = ConnectionResetError(104, "Connection reset by peer")
    assert "write amqps://" in tls.hint(reset, "amqp://h:5671")
    assert "write rediss://" in tls.hint(reset, "redis://h")
    assert tls.hint(reset, "amqps://h") == ""


def test_other_errors_speak_for_themselves():
    assert tls.hint(ConnectionRefusedError(111, "Connection refused")) == ""
