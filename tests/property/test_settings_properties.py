"""Settings of the form name(numbers): whatever is written, it is refused with a message or means one thing."""

import math

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from aggregator.robust import combiner_of, guards_of
from aggregator.staleness import parse_staleness
from shared.choices import parse, parse_pipeline
from shared.config import AggregatorSettings, load
from shared.errors import SettingsError
from shared.rules import COMBINERS, GUARDS, ROBUST, RULE_TABLE, SERVER_OPTIMIZERS, STALENESS

TABLES = [STALENESS, SERVER_OPTIMIZERS, RULE_TABLE, ROBUST]
NUMBERS = st.one_of(
    st.integers(-1, 10**6).map(str), st.floats(0, 1e6).map(lambda x: f"{x:.6f}"), st.floats().map(repr),
    st.sampled_from(["-1", "nan", "inf", "1e3", ".5", "5.", "+1", "1_0", "", "x", "٣", " 1 ", "0" * 40, "-0", "1e999"]),
)  # fmt: skip


@st.composite
def calls(draw, table):
    """Draw something like a call of the table."""
    name = draw(st.sampled_from([*table, "linear", "", "Median"]))
    keys = st.sampled_from([*table.get(name, {}), "", "x"]).map(lambda key: key and f"{key}=")
    numbers = draw(st.lists(st.builds(str.__add__, keys, NUMBERS), max_size=3))
    left, right = draw(st.sampled_from(["", " ", "\n"])), draw(st.sampled_from(["", "", " ", "\n", ")"]))
    return f"{left}{name}{draw(st.sampled_from(['', '({})', '({})', '({}']))}{right}".format(", ".join(numbers))


def pipelines(table):
    return st.lists(calls(table), max_size=4).map("|".join)


@given(st.data(), st.sampled_from(TABLES))
def test_any_text_is_a_choice_or_a_value_error_that_says_what_may_stand_there(data, table):
    text = data.draw(calls(table) | st.text(max_size=30))
    try:
        choice = parse(text, table)
    except ValueError as error:
        assert type(error) is ValueError
        assert 0 < len(str(error)) < 1000
        return
    assert list(choice.numbers) == list(table[choice.name])
    for name, number in table[choice.name].items():
        assert number.low <= choice[name] <= number.high
        assert math.isfinite(choice[name])
    assert parse(str(choice), table).name == choice.name


@given(st.text(alphabet="abmnor_(),=|. 0123456789-", max_size=40) | pipelines(ROBUST))
@example("|")
def test_any_pipeline_is_one_or_a_value_error(text):
    try:
        parse_pipeline(text, ROBUST)
    except ValueError as error:
        assert type(error) is ValueError


@settings(max_examples=200)
@given(
    pipelines(ROBUST) | st.text(max_size=20),
    st.sampled_from([*RULE_TABLE]),
    st.integers(1, 50),
    st.booleans(),
    st.sampled_from(["", "server", "a b"]),
)
def test_settings_of_the_defences_are_refused_or_can_be_built(robust, rule, buffer_size, by_samples, trusted):
    flags = {"rule": rule, "robust": robust, "buffer_size": buffer_size, "trusted_client": trusted, "clients": 100}
    flags |= {"weight_by_samples": True} if by_samples else {}
    try:
        checked = load(AggregatorSettings, flags)
    except SettingsError as error:
        assert "FEDMQ_" in str(error)
        return
    names = [stage.name for stage in parse_pipeline(robust, ROBUST)]
    assert (combiner_of(checked) is not None) == bool({*names} & {*COMBINERS})
    assert len(guards_of(checked)._guards) == sum(name in GUARDS for name in names)


@given(calls(STALENESS), st.integers(0, 10**5))
def test_every_accepted_staleness_weighs_between_nothing_and_one(text, tau):
    try:
        weigh = parse_staleness(text)
    except ValueError:
        with pytest.raises(ValueError, match=r"polynomial|hinge|constant"):
            AggregatorSettings(staleness=text)
        return
    assert AggregatorSettings(staleness=text).staleness == text
    assert weigh(0) == 1.0
    assert 0 <= weigh(tau) <= 1
    assert not math.isnan(weigh(tau))
