"""Where a device is told to find the servers."""

import pytest

from ops.devices import _address
from shared.errors import SettingsError

URL = "rediss://fedmq-operator:secret@store.example.org/0"


@pytest.mark.parametrize(
    ("given", "url", "address"),
    [
        (None, URL, "store.example.org:6379"),
        (None, "amqps://o:p@[::1]:99/fedmq", "[::1]:99"),
        ("fleet.example.org", URL, "fleet.example.org:6379"),
        ("10.0.0.5:443", URL, "10.0.0.5:443"),
        ("[2001:db8::1]", URL, "[2001:db8::1]:6379"),
        ("[2001:db8::1]:443", URL, "[2001:db8::1]:443"),
    ],
)
def test_an_address_is_host_and_port(given, url, address):
    assert _address(given, url) == address


@pytest.mark.parametrize(
    "given",
    [
        "a:\u0661\u0662",
        "a:\u00b2",
        "a:0",
        "a:65536",
        "a:" + "9" * 5000,
        "[]:1",
        "[x]:1",
        "[1.2.3.4]:1",
        "::1:5",
        "a b",
        "",
    ],
)
def test_what_is_no_address_is_refused(given):
    with pytest.raises(SettingsError, match="is not of the form HOST:PORT"):
        _address(given, URL)


@pytest.mark.parametrize("url", ["unix:///run/redis.sock", "http://o:secret@h/", "rediss://"])
def test_an_url_that_is_of_no_use_to_a_device_is_said_without_its_password(url):
    with pytest.raises(SettingsError, match="is no URL that a device could use") as caught:
        _address(None, url)
    assert "secret" not in str(caught.value)
