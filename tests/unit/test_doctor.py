"""What doctor says of the servers' certificates."""

from types import SimpleNamespace

import pytest

import ops.doctor
from shared.errors import SettingsError

URLS = SimpleNamespace(broker_url="amqps://h", store_url="rediss://h")


@pytest.fixture
def ends(monkeypatch):
    """Set how many days each certificate is good for; None: no TLS."""

    def put(broker, store):
        days = {"amqps": broker, "rediss": store}

        def end(url, now):
            left = days[url.partition(":")[0]]
            return None if left is None else now + 86_400 * left

        monkeypatch.setattr(ops.doctor, "certificate_end", end)

    return put


@pytest.mark.parametrize(("broker", "store"), [(300, 10), (0, 300), (20.9, 20.9)])
def test_a_certificate_that_ends_soon_is_wrong_and_named(ends, broker, store):
    ends(broker, store)
    with pytest.raises(SettingsError, match="make renew") as told:
        ops.doctor._certificates(URLS)
    assert ("RabbitMQ's in" in str(told.value)) == (broker < 21)
    assert ("Redis's in" in str(told.value)) == (store < 21)


def test_good_ones_are_told_with_their_days(ends):
    ends(300, 22)
    assert ops.doctor._certificates(URLS) == "RabbitMQ's good for 300 days, Redis's good for 22 days"
    ends(None, None)
    assert ops.doctor._certificates(URLS) == "none: without TLS"
