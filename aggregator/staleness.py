"""Staleness functions s(tau): how much an update trained on an old model still counts.

tau = version at apply - base_version, counted before the version moves: a fresh update has tau = 0 and s(0) = 1.
"""

from collections.abc import Callable

from shared.choices import parse
from shared.rules import STALENESS

StalenessWeight = Callable[[int], float]


def constant(staleness: int) -> float:
    """Weigh every update alike: s(tau) = 1.

    Args:
        staleness: tau, in versions, >= 0.

    Raises:
        ValueError: if it is negative.
    Source: Xie et al., arXiv:1903.03934, section 5.
    """
    if staleness < 0:
        raise ValueError(f"staleness {staleness} is negative")
    return 1.0


def polynomial(staleness: int, exponent: float) -> float:
    """Weigh down an update trained on an old model: s(tau) = (1 + tau)^-a.

    Args:
        staleness: tau = version at apply - base_version, in versions, >= 0.
        exponent: a >= 0; 0 turns weighting off, 0.5 is FedBuff's choice.

    Returns:
        Weight in (0, 1].

    Raises:
        ValueError: if either argument is negative.
    Source: Xie et al., arXiv:1903.03934, section 5; Nguyen et al., arXiv:2106.06639.
    """
    if staleness < 0 or exponent < 0:
        raise ValueError(f"staleness {staleness} and exponent {exponent} must not be negative")
    return float((1.0 + staleness) ** -exponent)


def hinge(staleness: int, slope: float, threshold: float) -> float:
    """Leave an update alone up to a threshold, then weigh it down: 1 / (a (tau - b) + 1) for tau > b.

    Args:
        staleness: tau, in versions, >= 0.
        slope: a >= 0.
        threshold: b >= 0, in versions.

    Returns:
        Weight in (0, 1].

    Raises:
        ValueError: if an argument is negative.
    Source: Xie et al., arXiv:1903.03934, section 5 (a = 10, b = 4 there).
    """
    if staleness < 0 or slope < 0 or threshold < 0:
        raise ValueError(f"staleness {staleness}, slope {slope} and threshold {threshold} must not be negative")
    return 1.0 if staleness <= threshold else 1.0 / (slope * (staleness - threshold) + 1.0)


FUNCTIONS: dict[str, Callable[..., float]] = {"constant": constant, "polynomial": polynomial, "hinge": hinge}


def parse_staleness(text: str) -> StalenessWeight:
    """Read `constant`, `polynomial(0.5)` or `hinge(10,4)`.

    Raises:
        ValueError: anything else, or parameters out of range.
    """
    choice = parse(text, STALENESS)
    function = FUNCTIONS[choice.name]
    return lambda staleness: function(staleness, **choice.numbers)
