"""The lines of `fedmq status`."""

import pytest

from ops.status import _down
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
