"""Codec strings: what parses, how it is spelled out, and what is refused with a reason that names the stage."""

import numpy as np
import pytest

from shared.compression import PRESETS, codec_of, downlink_codec, parse
from shared.compression.presets import DOWNLINK_ON
from shared.errors import Reason, RejectedUpdate, SettingsError


@pytest.mark.parametrize(
    ("written", "canonical"),
    [
        ("int8|zstd", "int8 | zstd"),
        ("  int8(stochastic)  ", "int8"),
        ("int4(rounding=nearest)", "int4(nearest)"),
        ("uniform(2)", "uniform(step=2)"),
        ("uniform( 2.0 , nearest )|pack", "uniform(step=2) | pack"),
        ("uniform(rounding=stochastic, step=1)", "uniform(step=1, stochastic)"),
        ("uniform(step=0.12345678)", "uniform(step=0.123457)"),
        ("ternary(nearest)", "ternary"),
        ("topk(1e-3)", "topk(0.001) | float32"),
        ("topk(share=.1) | sign", "topk(0.1) | ternary"),
        ("randomk(0.1)|int8", "randomk(0.1) | int8"),
        ("all | float32", "float32"),
        ("all|int8", "all | int8"),
        ("rotate|eden(bits=2)", "rotate | eden(2)"),
        ("ef|topk(0.01)|rotate|eden(2)|zstd", "ef | topk(0.01) | rotate | eden(2) | zstd"),
        ("none", "float32"),
        (" safe ", "int8 | zstd"),
        ("balanced", "ef | uniform(step=2) | pack | zstd"),
        ("tiny", "ef | topk(0.018) | ternary | zstd"),
    ],
)
def test_a_codec_is_spelled_out(written, canonical):
    assert parse(written).name == canonical
    assert parse(canonical) == parse(written)


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_parse_and_only_those_that_say_so_keep_a_residual(preset):
    codec = parse(preset)
    assert codec.feedback == ("error feedback" in PRESETS[preset].description)
    assert codec.contraction or not codec.feedback
    assert codec.unbiased or codec.feedback  # nobody picks a codec from the list under which training stalls


REFUSED = [
    # what is written, what the reason says
    ("sign", "sign is biased"),
    ("sign | zstd", "write ef"),
    ("rotate | sign", "sign is biased"),
    ("ef | randomk(0.1)", "randomk(0.1) is unbiased"),
    ("ef | randomk(0.1) | int8", "randomk(0.1) is unbiased"),
    ("ef | qsgd(4)", "qsgd(4) is unbiased"),
    ("ef | qsgd(4) | pack | zstd", "qsgd(4)"),
    ("ef | ternary(stochastic)", "ternary(stochastic) is unbiased"),
    ("ef | int2", "int2 is unbiased"),
    ("ef | topk(0.1) | int2", "int2 is unbiased"),
    ("ef | uniform(step=2, stochastic)", "uniform(step=2, stochastic) is unbiased"),
    ("ef | float32", "float32 leaves no error"),
    ("eden(2)", "put rotate in front"),
    ("topk(0.1) | eden(2)", "put rotate in front"),
    ("rotate | float32", "rotate gains nothing in front of float32"),
    ("rotate | bfloat16", "in front of bfloat16"),
    ("topk(0.1) | rotate | float16", "in front of float16"),
    ("int4 | pack", "int4 fills its bytes"),
    ("ternary | pack", "ternary fills its bytes"),
    ("topk(0.1) | pack", "float32 fills its bytes"),
    ("int8 | int8", "makes no sense at 'int8'"),
    ("int8 | nf4 | zstd", "makes no sense at 'nf4'"),
    ("topk(0.1) | topk(0.1)", "makes no sense at 'topk'"),
    ("topk(0.1) | randomk(0.1) | int8", "makes no sense at 'randomk'"),
    ("zstd | int8", "makes no sense at 'zstd'"),
    ("int8 | zstd | zstd", "makes no sense at 'zstd'"),
    ("uniform(step=1) | zstd | pack", "makes no sense at 'pack'"),
    ("int8 | ef", "makes no sense at 'ef'"),
    ("all | ef | int8", "makes no sense at 'ef'"),
    ("rotate | topk(0.1) | int8", "makes no sense at 'topk'"),
    ("rotate", "makes no sense at 'its end'"),
    ("zstd", "makes no sense at 'zstd'"),
    ("ef | all", "makes no sense at 'its end'"),
    ("ef() | int8", "makes no sense at 'ef'"),
    ("int8 | zstd(3)", "makes no sense at 'zstd'"),
    ("int9", "'int9' is no stage"),
    ("int8 |", "'' is no stage"),
    ("| zstd", "'' is no stage"),
    ("", "'' is no stage"),
    ("int8 zstd", "'int8 zstd' is no stage"),
    ("INT8", "'INT8' is no stage"),
    ("int8((nearest))", "is no stage"),
    ("ef | safe", "'safe' is no stage"),
    ("auto", "'auto' is no stage"),
    ("float32(2)", "float32 does not know option 1=2"),
    ("int8(fast)", "int8(rounding) rounds"),
    ("int8()", "int8(rounding) rounds"),
    ("int8(speed=nearest)", "does not know speed=nearest"),
    ("int8(nearest, stochastic)", "does not know option 2"),
    ("uniform", "uniform(step, rounding) needs a number from 0.05 to 32, got none"),
    ("uniform(step=0.01)", "from 0.05 to 32, got 0.01"),
    ("uniform(step=33)", "got 33"),
    ("uniform(step=nan)", "got nan"),
    ("uniform(step=inf)", "got inf"),
    ("uniform(step=-1)", "got -1"),
    ("uniform(step=1e5)", "got 1e5"),
    ("uniform(step=e5)", "uniform(step, rounding)"),
    ("uniform(stochastic, step=1)", "uniform is given step twice"),
    ("uniform(step=1, step=2)", "given step twice"),
    ("topk", "topk(share) needs a number"),
    ("topk(0)", "got 0"),
    ("topk(1)", "from 1e-06 to 0.25, got 1"),
    ("topk(e5)", "needs a number from 1e-06"),
    ("uniform(step=0.3, stochastic)", "from 0.5 to 32, got 0.3"),
    ("randomk(0.1) | sign", "zeros of a random selection"),
    ("topk(0.1, share=0.2)", "topk is given share twice"),
    ("topk(0.1, 0.2)", "topk(share) does not know option 2=0.2"),
    ("randomk(0)", "randomk(share)"),
    ("qsgd", "qsgd(levels) needs a whole number from 1 to 127"),
    ("qsgd(0)", "got 0"),
    ("qsgd(128)", "got 128"),
    ("qsgd(1.5)", "got 1.5"),
    ("qsgd(\u0664)", "qsgd"),  # a digit, but not one of ours
    ("rotate | eden(5)", "eden(bits) needs a whole number from 1 to 4, got 5"),
    ("rotate | eden", "eden(bits)"),
    ("int8" + " " * 200, "204 characters; at most 200"),
    ("x" * 10**5, "100000 characters"),
]


@pytest.mark.parametrize(("name", "reason"), REFUSED, ids=[name[:40] for name, _ in REFUSED])
def test_nonsense_is_refused_on_both_sides_with_a_reason(name, reason):
    with pytest.raises(SettingsError) as settings_error:
        parse(name)
    assert reason in str(settings_error.value)
    with pytest.raises(RejectedUpdate) as rejected:
        codec_of(name)
    assert rejected.value.reason == Reason.CODEC
    assert len(rejected.value.detail) <= 500


@pytest.mark.parametrize("name", [None, 3, 1.5, np.nan, True, b"int8", ["int8"], {"name": "int8"}])
def test_a_name_that_is_no_string_is_refused(name):
    with pytest.raises(RejectedUpdate, match=type(name).__name__) as caught:
        codec_of(name)
    assert caught.value.reason == Reason.CODEC


@pytest.mark.parametrize(
    "name", ["ef | int8", "ef | int4", "ef | uniform(step=1, stochastic)", "ef | rotate | eden(2)"]
)
def test_unbiased_codecs_that_contract_may_be_fed_back(name):
    assert parse(name).feedback


def test_ternary_after_a_selection_leaves_zeros_out():
    assert parse("topk(0.1) | ternary").quantizer.bytes_max(800, 1) == 4 + 100  # a bit each
    assert parse("ternary").quantizer.bytes_max(800, 1) > 160  # five to a byte


# --- downlink ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("setting", "name"),
    [
        ("on", DOWNLINK_ON),
        (" on ", DOWNLINK_ON),
        ("balanced", "uniform(step=2) | pack | zstd"),  # the hidden state is the feedback
        ("tiny", "topk(0.018) | ternary | zstd"),
        ("safe", "int8 | zstd"),
        ("none", "float32"),
        ("ef|int8", "int8"),
        ("sign", "sign"),  # fed back, so it may
        ("nf4 | zstd", "nf4 | zstd"),
    ],
)
def test_downlink_codecs(setting, name):
    codec = downlink_codec(setting)
    assert codec.name == name
    assert codec.exact
    assert codec.contraction
    assert not codec.feedback


def test_the_downlink_can_be_off():
    assert downlink_codec("off") is None
    assert downlink_codec(" off ") is None


@pytest.mark.parametrize(
    ("setting", "reason"),
    [
        ("rotate | eden(2)", "without rotate"),
        ("rotate | int4", "without rotate"),
        ("randomk(0.1)", "randomk(0.1)"),
        ("qsgd(4)", "qsgd(4)"),
        ("int2", "int2"),
        ("uniform(step=4, stochastic)", "uniform(step=4, stochastic)"),
        ("yes", "'yes' is no stage"),
        ("", "'' is no stage"),
    ],
)
def test_downlink_codecs_that_drift_or_differ_between_machines_are_refused(setting, reason):
    with pytest.raises(SettingsError) as caught:
        downlink_codec(setting)
    assert reason in str(caught.value)
