"""The lines of `fedmq status`."""

import pytest

from aggregator.partial import Partial
from ops.status import _down, _parts
from shared.compression.presets import DOWNLINK_ON


@pytest.mark.parametrize(
    ("spec", "text"),
    [
        ({}, "float32 models"),
        ({"downlink": "off", "snapshots": "bfloat16"}, "bfloat16 models"),
        ({"downlink": "on"}, f"{DOWNLINK_ON} deltas, or float32 models"),
        ({"downlink": "nf4", "snapshots": "bfloat16"}, "nf4 deltas, or bfloat16 models"),
    ],
)
def test_what_workers_pull_is_said_with_its_codec(spec, text):
    assert _down(spec) == text


def test_updates_under_way_in_parts_are_shown_with_how_far_they_are():
    record = Partial("phone/i/7", "hash", 10, 1600, {0: 160, 1: 160, 2: 160}).record()
    assert _parts({"partial": {"phone": record}}) == [("in parts", "1 updates under way: phone 3/10")]
    many = {f"c{n}": record for n in range(7)}
    [(_, text)] = _parts({"partial": many})
    assert text.startswith("7 updates under way: c0 3/10, ")
    assert text.endswith(", ...")
    assert _parts({}) == _parts({"partial": {}}) == []
