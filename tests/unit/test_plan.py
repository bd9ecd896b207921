"""What a demo refuses to run, in the words of the settings."""

import os
import re

import pytest

from ops.plan import plan, simulation
from shared.errors import SettingsError


@pytest.fixture(autouse=True)
def _clean(monkeypatch, tmp_path):
    for name in list(os.environ):
        if name.upper().startswith("FEDMQ_"):
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)


def planned(**changes):
    given = {
        "task": "digits", "updates": None, "workers": 10, "codec": "balanced", "downlink": None, "buffer_size": 10,
        "seed": 0, "out": None,
    }  # fmt: skip
    return plan(**given | changes)


@pytest.mark.parametrize(("codec", "downlink"), [("balanced", "on"), ("auto", "on"), ("none", "off")])
def test_the_downlink_is_on_unless_nothing_is_compressed(codec, downlink):
    assert planned(codec=codec).downlink == downlink
    assert planned(codec=codec, downlink="int4(nearest)").downlink == "int4(nearest)"


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"downlink": "auto"}, "--downlink: .*'auto'"),
        ({"downlink": "rotate | eden(2)"}, "--downlink: .*a rotation's sums differ between machines"),
        ({"downlink": "gzip"}, "--downlink: .*'gzip' is no stage"),
        ({"codec": "gzip"}, "'gzip' is no stage"),
        ({"buffer_size": 200_000, "updates": 300_000}, r"\n  buffer_size=200000: Input should be less"),
        ({"workers": 0}, "--workers 0"),
    ],
    ids=["auto", "rotation", "no codec", "codec", "buffer", "workers"],
)
def test_what_cannot_run_is_refused_in_plain_words(changes, part):
    with pytest.raises(SettingsError, match=part) as caught:
        planned(**changes)
    message = str(caught.value)
    assert not re.search("http|pydantic|validation error|input_type", message), message


def test_settings_of_the_environment_change_nothing(monkeypatch):
    monkeypatch.setenv("FEDMQ_STALENESS", "constant")
    assert simulation(planned()).aggregator.staleness == "polynomial(0.5)"
