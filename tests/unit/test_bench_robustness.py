"""What the benchmarks of robustness tell: growth from noise, a cost from a ratio, safety that is really off."""

import random
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest

from ops.bench.backlog import TENTHS, Backlog
from ops.bench.backlog import table as backlog_table
from ops.bench.end_to_end import Run
from ops.bench.load import Group, Load, _updates
from ops.bench.safety import Cost
from ops.bench.soak import BOUNDED, LIMITED, grown, kind_of, quarters
from ops.bench.updates import encoded_update, model_of
from shared.compression import decode as decode_payload
from shared.errors import Reason, RejectedUpdate
from shared.messages import decode


@pytest.mark.parametrize(
    ("key", "kind"),
    [
        ("fedmq:{bench}:ledger", "ledger"), ("fedmq:{bench}:model:12:0", "model"), ("fedmq:{b2}:meta:7", "meta"),
        ("fedmq:{bench}:outcomes:worker-3", "outcomes"), ("fedmq:{bench}:state:delta_sum:0", "state"),
        ("fedmq:{bench}:stage:0f:1", "stage"), ("other", "other"),
    ],
)  # fmt: skip
def test_keys_are_counted_by_kind(key, kind):
    assert kind_of(key) == kind


def test_quarters_leave_the_warm_up_out_and_take_medians():
    points = [(float(at), 1000.0 if at < 10 else at // 10) for at in range(50)] + [(11.5, 1e9)]
    assert quarters(points, 10.0, 50.0) == [1.0, 2.0, 3.0, 4.0]


@pytest.mark.parametrize(
    ("name", "values", "grew"),
    [
        ("aggregator, MB", [100, 101, 103, 105.9], False), ("aggregator, MB", [100, 101, 103, 106.1], True),
        ("aggregator, files", [9, 9, 12, 13], False), ("aggregator, files", [9, 9, 12, 14], True),
        ("aggregator, threads", [4, 4, 5, 5], False), ("aggregator, threads", [4, 4, 6, 6], True),
        ("Redis used_memory, MB", [5, 6, 7, 8], False),
    ],
)  # fmt: skip
def test_growth_beyond_five_per_cent_is_told(name, values, grew):
    assert grown(name, values) is grew
    assert (name in LIMITED) or not grew


def test_cost_is_the_median_of_pairs_not_of_sides():
    safe, bare = ([Run(rate, 0, 0, 0) for rate in rates] for rates in ((90.0, 10.0, 80.0), (100.0, 20.0, 100.0)))
    assert Cost(1, 1, safe, bare).share == pytest.approx(0.2)


def test_the_table_of_a_backlog_has_every_tenth():
    found = Backlog([float(n) for n in range(1, 11)], [1e-4] * 9 + [2e-4], [1e8] * 10)
    lines = backlog_table(1000, found, (0.5, 1.0))
    assert all(line.count("|") == TENTHS + 2 for line in lines if line.startswith("|"))
    assert "2.00 times the median" in lines[-1]


def test_the_load_has_every_outcome_in_the_shares_it_is_told():
    load = Load("", "", "bench", 200, "int8", 1, 3, 1.0, staleness_max=5, duplicates=0.2, stale=0.2, rejected=0.2)
    group = Group.__new__(Group)
    sent, group.sent, group._load, group._version = [], Counter(), load, 100
    group._updates, group._rng = _updates(load), random.Random(0)
    group._sink = type("Sink", (), {"publish": lambda _, message, __: sent.append(message)})()
    for sequence in range(500):
        group._send("worker-1", sequence)
    assert group.sent.total() == len(sent)
    assert all(60 < group.sent[name] < 140 for name in ("stale", "duplicate", "rejected"))
    assert len({message.update_id for message in sent}) == len(sent) - group.sent["duplicate"]
    versions = [decode(message.body, 10**6).base_version for message in sent]
    assert versions.count(100 - 5 - 10) == group.sent["stale"]


def test_an_update_cut_short_is_what_the_load_calls_rejected():
    body = encoded_update(model_of(200), 1)[1]
    update = decode(body, len(body))
    with pytest.raises(RejectedUpdate) as caught:
        decode_payload(update.codec, update.payload[:-1], model_of(200).layout)
    assert caught.value.reason == Reason.CODEC


OFF = """
from ops.bench.safety_off import take_out
take_out()
import dataclasses, json
import numpy as np
import aggregator.aggregator
from aggregator.account import Account
from shared.messages import decode
from shared.store.redis import RedisStore
from tests.builders import packed, System, record_of, update_of, weights
record = record_of(update_of(weights(1)))
record.pop("part", None)
assert decode(packed(record | {"checksum": 1}), 10**6).payload == record["payload"]
system = System(buffer_size=1)
for _ in range(2):
    system.publish(weights(1), update_id="a/i/0")
    system.drain()
system.aggregator.finish()
assert system.aggregator.state.applied == {}
np.testing.assert_allclose(system.weights, (1 + 1) * weights(1))
assert all("weight" not in entry for commit in system.store.ledger for entry in commit["updates"])
print("off")
"""


def test_the_run_without_safety_has_none():
    done = subprocess.run([sys.executable, "-c", OFF], capture_output=True, text=True, check=False)
    assert done.stdout == "off\n", done.stderr


def test_what_grows_to_a_bound_is_named():
    assert {"ledger", "meta", "refused", "outcomes"} <= set(BOUNDED)
    assert np.all([bool(bound) for bound in BOUNDED.values()])
