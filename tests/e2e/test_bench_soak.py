"""A few seconds of `fedmq bench soak`: its load, what it looks at, and its account."""

from ops.bench import soak
from ops.bench.soak import LIMITED, quarters
from shared.store.redis_link import connect


def test_a_short_soak_sees_everything_and_its_account_is_exact(servers, tmp_path, monkeypatch):
    redis = connect(servers.redis.url, 10.0)
    redis.flushdb()
    monkeypatch.setattr(soak, "COUNT_S", 0.5)
    monkeypatch.setattr(soak, "LOOK_S", 0.25)
    monkeypatch.setattr(soak, "NUM_PARAMS", 1000)
    minutes = 0.12
    watch, warm_s, account = soak.soak(minutes, servers, tmp_path)
    assert account["sent"] == account["settled"]
    assert account["sent"]["applied"] > 50
    assert account["problems"] == []
    assert account["dead"] == account["sent"]["rejected"]
    assert set(LIMITED) <= set(watch.series)
    medians = {name: quarters(points, warm_s, warm_s + 60 * minutes) for name, points in watch.series.items()}
    assert all(value > 0 for name in LIMITED for value in medians[name])
    assert {"model", "ledger", "applied", "head"} <= set(watch.kinds)
    redis.flushdb()
