"""Staleness functions against their formulas; see algorithms.md section 8 for how others get them wrong."""

import math
from itertools import pairwise

import pytest

from aggregator.staleness import constant, hinge, parse_staleness, polynomial

TAUS = range(60)


@pytest.mark.parametrize("tau", TAUS)
def test_constant_is_one(tau):
    assert constant(tau) == 1.0


@pytest.mark.parametrize("a", [0, 0.25, 0.5, 1, 2.5])
@pytest.mark.parametrize("tau", TAUS)
def test_polynomial_is_one_plus_tau_to_the_minus_a(tau, a):
    assert polynomial(tau, a) == pytest.approx(math.exp(-a * math.log(1 + tau)), rel=1e-14)


def test_polynomial_half_is_fedbuffs_inverse_square_root():
    assert [polynomial(tau, 0.5) for tau in (0, 3, 8, 99)] == pytest.approx([1, 1 / 2, 1 / 3, 1 / 10])


@pytest.mark.parametrize(("a", "b"), [(10, 4), (0.5, 0), (0, 3), (4, 2.5), (1, 100)])
@pytest.mark.parametrize("tau", TAUS)
def test_hinge_is_flat_to_b_then_falls(tau, a, b):
    assert hinge(tau, a, b) == pytest.approx(1.0 if tau <= b else 1.0 / (1.0 + a * (tau - b)), rel=1e-14)


def test_hinge_at_its_corner():
    assert [hinge(tau, 10, 4) for tau in (0, 3, 4, 5, 6)] == pytest.approx([1, 1, 1, 1 / 11, 1 / 21])


@pytest.mark.parametrize("text", ["constant", "polynomial(0.5)", "polynomial(3)", "hinge(10,4)", "hinge(0.5,0)"])
def test_a_fresh_update_counts_fully_and_none_counts_more(text):
    weigh = parse_staleness(text)
    found = [weigh(tau) for tau in TAUS]
    assert found[0] == 1.0
    assert all(0 < later <= earlier <= 1 for earlier, later in pairwise(found))


@pytest.mark.parametrize(
    "call",
    [
        lambda: constant(-1), lambda: polynomial(-1, 0.5), lambda: polynomial(1, -0.5), lambda: hinge(-1, 1, 1),
        lambda: hinge(1, -1, 1), lambda: hinge(1, 1, -1), lambda: parse_staleness("polynomial(0.5)")(-1),
    ],
)  # fmt: skip
def test_negative_arguments_raise(call):
    with pytest.raises(ValueError, match="negative"):
        call()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("constant", constant), ("polynomial(0.5)", lambda tau: polynomial(tau, 0.5)),
        ("polynomial( 2 )", lambda tau: polynomial(tau, 2)), ("hinge(10,4)", lambda tau: hinge(tau, 10, 4)),
        ("hinge( 0.5 , 6 )", lambda tau: hinge(tau, 0.5, 6)),
    ],
)  # fmt: skip
def test_parse_staleness_reads_what_the_contract_names(text, expected):
    assert [parse_staleness(text)(tau) for tau in TAUS] == [expected(tau) for tau in TAUS]


@pytest.mark.parametrize(
    "text",
    [
        "", "linear", "constant(1)", "polynomial", "polynomial()", "polynomial(a)", "polynomial(-1)", "polynomial(1,2)",
        "hinge(1)", "hinge(1,2,3)", "hinge(1,-2)", "polynomial(0.5", "polynomial 0.5", "polynomial(0.5) x", "(0.5)",
    ],
)  # fmt: skip
def test_parse_staleness_refuses_the_rest_and_says_what_it_takes(text):
    with pytest.raises(ValueError, match=r"must be one of constant, polynomial\(exponent\), hinge\(slope, threshold\)|"
                       r"is not of|: \w+ is .*, must be a number in|needs"):  # fmt: skip
        parse_staleness(text)
