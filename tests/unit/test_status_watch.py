"""What `fedmq status --watch` adds: rates, curves, and evaluations that fit on a line."""

import math

import pytest

from ops.status import metrics_text
from ops.status_watch import CURVE, Trail, _curve, _moving, sparkline


def test_a_curve_has_its_lowest_and_highest_bar_and_ends_with_the_newest_value():
    assert sparkline([0.0, 0.5, 1.0]) == "▁▅█"
    assert sparkline([1.0, 0.0]) == "█▁"
    assert sparkline([3.0, 3.0]) == "▁▁"
    assert sparkline([]) == sparkline([math.nan]) == ""
    assert len(sparkline([float(n) for n in range(500)])) == CURVE


def test_rates_are_over_the_last_half_minute_not_over_the_whole_watch():
    trail = Trail()
    assert trail.rates(0.0, 0, {"applied": 0}) is None
    for second in range(1, 101):
        rates = trail.rates(float(second), second // 10, {"applied": 1000 if second > 60 else 0})
    assert rates is not None
    versions, updates = rates
    assert updates == {}, "what came 40 s ago is over"
    assert versions == pytest.approx(6.0, rel=0.15)


def test_after_a_rollback_the_rates_begin_anew():
    trail = Trail()
    trail.rates(0.0, 50, {"applied": 100})
    assert trail.rates(1.0, 20, {"applied": 100}) is None
    assert trail.rates(2.0, 21, {"applied": 102}) == (60.0, {"applied": 2.0})


def test_the_most_frequent_reasons_are_named_and_harmless_to_a_terminal():
    updates = ['{"outcome": "rejected", "reason": "layout"}'] * 3 + [
        '{"outcome": "rejected", "reason": "[red]\\u001b"}'
    ]
    facts = {"ledger": [{"updates": f"[{', '.join(updates)}]"}], "clients": {"a": {"seen": 90.0}}}
    rows = _moving({}, (6.0, {"applied": 2.0}), facts, 100.0)
    assert rows["rejected"].startswith("3 layout, 1 \\[red]\ufffd")
    assert rows["speed"] == "2 applied/s, 6 versions/min"
    assert rows["last heard"] == "10 s ago"


def test_a_job_without_evaluations_has_no_curve():
    assert _curve([]) == {}
    assert _curve([(1, {}), (2, {})]) == {}
    assert "accuracy 0.1 to 0.9" in _curve([(1, {"accuracy": 0.1}), (2, {"accuracy": 0.9})])["curve"]


def test_a_thousand_classes_are_one_number_more():
    classes = {f"accuracy_class_{n}": 0.5 for n in range(1000)}
    assert metrics_text(classes | {"accuracy": 0.25, "loss": 2.0}) == "accuracy 0.25, loss 2, +1000 more"
    assert metrics_text({"accuracy": 0.25}) == "accuracy 0.25"
    assert metrics_text(classes).endswith(", +996 more")
    assert "[red]" not in metrics_text({"[red]x": 1.0}).replace("\\[red]", "")
