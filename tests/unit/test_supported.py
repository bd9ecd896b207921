"""Versions of servers that are too old are refused by name, newer ones are used with a warning."""

import pytest

from shared.errors import SettingsError
from shared.supported import check


@pytest.mark.parametrize(
    ("server", "version"), [("RabbitMQ", "3.10.8"), ("RabbitMQ", "4.2.1"), ("Redis", "7.0.15"), ("Redis", "8.4.0")]
)
def test_the_versions_of_the_readme_pass_without_a_word(server, version, caplog):
    assert check(server, version) == version
    assert not caplog.records


@pytest.mark.parametrize(("server", "version"), [("RabbitMQ", "3.9.29"), ("RabbitMQ", "2.8.1"), ("Redis", "6.2.14")])
def test_an_old_one_is_refused_with_both_numbers(server, version):
    with pytest.raises(SettingsError, match=rf"{server} {version} is too old: FedMQ needs \d+\.\d+ to \d\.x"):
        check(server, version)


@pytest.mark.parametrize(("server", "version"), [("RabbitMQ", "5.0.0"), ("Redis", "10.1.0")])
def test_a_newer_one_is_used_with_a_warning(server, version, caplog):
    assert check(server, version) == version
    assert "newer than any" in caplog.text


def test_a_version_that_is_no_number_is_let_pass():
    assert check("RabbitMQ", "") == ""
    assert check("Redis", "unstable") == "unstable"
