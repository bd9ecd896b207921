"""The settings' check of FEDMQ_STALENESS and the aggregator's parser of it must agree."""

import math

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from aggregator.staleness import parse_staleness
from shared.config import STALENESS, AggregatorSettings

NUMBERS = st.one_of(
    st.integers(0, 10**6).map(str), st.floats(0, 1e6).map(lambda x: f"{x:.6f}"), st.floats(0, 1e30).map(repr),
    st.sampled_from(["-1", "nan", "inf", "1e3", ".5", "5.", "+1", "1_0", "", "x", "٣", " 1 ", "0" * 40, "-0"]),
)  # fmt: skip
FORMS = st.builds(
    lambda name, numbers, left, right: f"{left}{name}{numbers}{right}",
    st.sampled_from(["constant", "polynomial", "hinge", "Constant", "linear", ""]),
    st.lists(NUMBERS, max_size=3).map(lambda n: f"({','.join(n)})") | st.just(""),
    st.sampled_from(["", " ", "\n"]),
    st.sampled_from(["", " ", "\n", ")"]),
)
TEXTS = FORMS | st.text(max_size=12) | st.from_regex(STALENESS)


def parses(text):
    try:
        weigh = parse_staleness(text)
    except ValueError:
        return False
    assert weigh(0) == 1.0
    return True


@given(st.from_regex(STALENESS, fullmatch=True))
def test_what_the_settings_accept_the_aggregator_can_read(text):
    assert parses(text)
    assert AggregatorSettings(staleness=text).staleness == text


@given(TEXTS)
@example("constant()")
@example(" constant")
@example("polynomial(1e-3)")
@example("polynomial(.5)")
@example("polynomial(nan)")
@example("polynomial (1)")
@example("hinge(,10,4)")
def test_the_settings_refuse_exactly_what_the_aggregator_cannot_read(text):
    assert bool(STALENESS.fullmatch(text)) == parses(text)


@given(st.from_regex(STALENESS, fullmatch=True), st.integers(0, 10**5))
def test_every_accepted_function_weighs_between_nothing_and_one(text, tau):
    weight = parse_staleness(text)(tau)
    assert 0 <= weight <= 1
    assert not math.isnan(weight)


@pytest.mark.parametrize("text", ["polynomial(-1)", "hinge(1)", "linear"])
def test_settings_refuse_at_start(text):
    with pytest.raises(ValueError, match=r"polynomial\(a\)"):
        AggregatorSettings(staleness=text)
