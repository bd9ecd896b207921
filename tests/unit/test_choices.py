"""The one grammar of names with numbers."""

import pytest

from shared.choices import Choice, Number, parse, parse_pipeline, usage

TABLE = {
    "plain": {},
    "one": {"share": Number(None, 0, 1)},
    "two": {"slope": Number(None, 0), "threshold": Number(4, 0, 10, whole=True)},
    "open_ends": {"above": Number(0.5, 0, 1, above=True), "below": Number(0.5, 0, 1, below=True)},
}


@pytest.mark.parametrize(
    ("text", "name", "numbers"),
    [
        ("plain", "plain", {}),
        ("plain()", "plain", {}),
        ("  plain ( ) ", "plain", {}),
        ("one(0.5)", "one", {"share": 0.5}),
        ("one(share=0.5)", "one", {"share": 0.5}),
        (" one ( share = 5e-1 ) ", "one", {"share": 0.5}),
        ("one(0)", "one", {"share": 0}),
        ("one(1)", "one", {"share": 1}),
        ("two(10, 3)", "two", {"slope": 10, "threshold": 3}),
        ("two(10)", "two", {"slope": 10, "threshold": 4}),
        ("two(threshold=3, slope=10)", "two", {"slope": 10, "threshold": 3}),
        ("two(slope=10, 3)", "two", {"slope": 10, "threshold": 3}),
        ("two(10, threshold=1e1)", "two", {"slope": 10, "threshold": 10}),
        ("open_ends", "open_ends", {"above": 0.5, "below": 0.5}),
        ("open_ends(below=0)", "open_ends", {"above": 0.5, "below": 0}),
        ("open_ends(1)", "open_ends", {"above": 1, "below": 0.5}),
    ],
)
def test_numbers_may_be_given_in_order_or_by_name(text, name, numbers):
    choice = parse(text, TABLE)
    assert choice == Choice(name, numbers)
    assert list(choice.numbers) == list(TABLE[name])
    assert all(choice[key] == value for key, value in numbers.items())


@pytest.mark.parametrize(
    ("text", "hint"),
    [("plian", "did you mean plain?"), ("tow(1)", "did you mean two?"), ("Plain", "did you mean plain?"),
     ("", ""), ("xyzzy", ""), ("(1)", ""), ("one(0.5", ""), ("one 0.5", ""), ("one(0.5))", ""), ("one((0.5))", ""),
     ("one(0.5) two(1)", ""), ("one|plain", "")],
)  # fmt: skip
def test_what_is_no_name_of_the_table_is_answered_with_all_there_are(text, hint):
    with pytest.raises(ValueError, match=r"must be one of plain, one\(share\), two\(slope, threshold\)") as caught:
        parse(text, TABLE)
    assert hint in str(caught.value)
    assert ("did you mean" in str(caught.value)) <= bool(hint or "one" in text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("one(1.5)", r"one: share is 1.5, must be a number in \[0, 1\]"),
        ("one(-0.1)", r"one: share is -0.1, must be a number in \[0, 1\]"),
        ("one(nan)", "share is nan, must be"),
        ("one(inf)", "share is inf, must be"),
        ("one(x)", "share is 'x', must be a number"),
        ("one(share=)", "share is '', must be a number"),
        ("two(1, 2.5)", r"threshold is 2.5, must be a whole number in \[0, 10\]"),
        ("two(1e10)", r"slope is 1e10, must be a number in \[0, 1e\+09\]"),
        ("open_ends(0)", r"above is 0, must be a number in \(0, 1\]"),
        ("open_ends(0.5, 1)", r"below is 1, must be a number in \[0, 1\)"),
    ],
)
def test_a_number_out_of_range_is_named_with_its_range(text, message):
    with pytest.raises(ValueError, match=message):
        parse(text, TABLE)


@pytest.mark.parametrize(
    ("text", "part"),
    [("plain(1)", "1"), ("one(0.1, 0.2)", "0.2"), ("one(shear=0.1)", "shear=0.1"), ("one(=0.1)", "=0.1"),
     ("one(0.1, share=0.2)", "share=0.2"), ("one(share=0.1, share=0.1)", "share=0.1"),
     ("two(threshold=3, 4)", "4"), ("two(3, 4, 5)", "5"), ("two(1, 2, )", "")],
)  # fmt: skip
def test_a_number_too_many_or_given_twice_is_named(text, part):
    with pytest.raises(ValueError, match="is not of") as caught:
        parse(text, TABLE)
    assert str(caught.value) == f"{part!r} is not of {usage(text.partition('(')[0], TABLE)}"


@pytest.mark.parametrize("text", ["two(,1,2)", "two(1,,2)", "two(1,)", "one(,)", "one( , 0.5)"])
def test_a_number_left_out_between_commas_does_not_move_the_others(text):
    with pytest.raises(ValueError, match=r"''"):
        parse(text, TABLE)


@pytest.mark.parametrize(
    ("text", "missing"),
    [("one", r"one needs share \(a number in \[0, 1\]\)"), ("one()", "one needs share"),
     ("two(threshold=3)", r"two needs slope \(a number in \[0, 1e\+09\]\)")],
)  # fmt: skip
def test_a_missing_number_is_named_with_its_range(text, missing):
    with pytest.raises(ValueError, match=missing):
        parse(text, TABLE)


def test_a_pipeline_is_choices_in_order():
    stages = parse_pipeline(" two(1) |plain| one(0.5)", TABLE)
    assert [stage.name for stage in stages] == ["two", "plain", "one"]
    assert parse_pipeline("", TABLE) == parse_pipeline("  ", TABLE) == ()
    for text in ("|", "plain|", "|plain", "plain||plain"):
        with pytest.raises(ValueError, match="must be one of"):
            parse_pipeline(text, TABLE)


def test_a_choice_reads_as_it_would_be_written():
    assert str(parse("two(10)", TABLE)) == "two(slope=10, threshold=4)"
    assert str(parse("plain()", TABLE)) == "plain"
    assert parse(str(parse("two(10)", TABLE)), TABLE) == parse("two(10)", TABLE)
