"""The numbers behind the pictures, and that every picture can be drawn of whatever there is."""

import io
import warnings

import numpy as np
import pytest
from PIL import Image

from ops import charts
from ops.simulation import pictures
from ops.simulation.curves import band, course, smoothed
from tests.results import history_of, result_of


def test_the_smoothed_value_is_the_mean_of_those_until_then():
    assert smoothed([1, 2, 3, 4, 5, 6], 3).tolist() == [1, 1.5, 2, 3, 4, 5]
    assert smoothed([2.5], 5).tolist() == [2.5]
    assert smoothed([], 5).tolist() == []


def test_a_course_leaves_out_evaluations_without_the_metric():
    history = history_of([0.1, 0.2, 0.3, 0.4], metrics=lambda i: {"f1": i / 10} if i != 1 else {})
    x, y = course(history, "bytes_sent", "f1", 2)
    assert x.tolist() == [0, 20_000, 30_000]
    np.testing.assert_allclose(y, [0, 0.1, 0.25])
    assert [len(part) for part in course(history, "trips", "nothing", 2)] == [0, 0]


def test_a_band_interpolates_on_the_common_range():
    first = np.array([0.0, 2.0, 4.0]), np.array([0.0, 2.0, 4.0])
    second = np.array([1.0, 3.0]), np.array([3.0, 7.0])
    line = band([first, second])
    assert (line.x[0], line.x[-1]) == (1, 3)
    np.testing.assert_allclose(line.low, line.x)
    np.testing.assert_allclose(line.high, 2 * line.x + 1)
    np.testing.assert_allclose(line.mean, 1.5 * line.x + 0.5)


def test_a_logarithmic_band_begins_above_zero_and_has_equal_ratios():
    line = band([(np.array([0.0, 1.0, 100.0]), np.array([9.0, 1.0, 100.0]))], logarithmic=True)
    assert line.x[0] == pytest.approx(1)
    np.testing.assert_allclose(line.x[1:] / line.x[:-1], line.x[1] / line.x[0])
    np.testing.assert_allclose(line.mean, line.x)


@pytest.mark.parametrize(
    "courses",
    [[], [(np.zeros(0), np.zeros(0))], [(np.array([0.0, 1.0]), np.ones(2)), (np.array([2.0, 3.0]), np.ones(2))]],
    ids=["no run", "nothing measured", "nothing in common"],
)
def test_there_is_no_band_of_nothing(courses):
    assert band(courses) is None


def test_contributions_count_those_who_made_none():
    curve = charts.contribution({"a": 3, "b": 1}, clients=4)
    assert curve.tolist() == [0, 0, 0, 0.25, 1]
    assert charts.gini(curve) == pytest.approx(0.625)
    assert charts.gini(charts.contribution(dict.fromkeys("abcd", 7), 4)) == pytest.approx(0)
    assert charts.contribution({}, 2).tolist() == [0, 0, 0]


def test_classes_are_in_the_order_of_their_numbers():
    metrics = ["accuracy", "loss", *(f"accuracy_class_{c}" for c in ("10", "9", "b", "a", "0"))]
    assert charts.classes_of(metrics) == ["0", "9", "10", "a", "b"]


@pytest.mark.parametrize(
    ("longest_s", "unit"),
    [(0, ("s", 1)), (180, ("s", 1)), (7200, ("min", 60)), (86400, ("h", 3600)), (1e6, ("days", 86400))],
)
def test_times_have_a_unit_that_suits_them(longest_s, unit):
    assert charts.time_unit(longest_s) == unit


def test_names_are_drawn_as_they_are():
    assert charts.label("a $x$") == r"a \$x\$"
    assert charts.label("word " * 8).count("\n") == 1
    assert len({tuple(charts.line_style(i).values()) for i in range(32)}) == 32


def size_of(png):
    return Image.open(io.BytesIO(png)).size


def drawn(runs, **more):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return pictures.draw(runs, **{"metric": "accuracy", "target": 0.0} | more)


RISING = [0.1, 0.4, 0.6, 0.7, 0.8, 0.85, 0.9]


@pytest.mark.parametrize("target", [0.0, 0.8])
def test_every_picture_can_be_drawn(target):
    histories = [history_of(RISING, s=s, up=up) for s, up in ((60, 1000), (50, 1000), (600, 10), (60, 1000))]
    runs = {
        "a": [result_of(h) for h in histories[:2]],
        "_b $": [result_of(histories[2])],
        "none": [],
        "d": [result_of(histories[3])],
    }
    shown = drawn(runs, target=target)
    assert sorted(shown) == [
        "accuracy_bytes_down.png", "accuracy_bytes_up.png", "accuracy_time.png", "accuracy_trips.png",
        "contributions.png", "staleness.png",
    ]  # fmt: skip
    assert all(size_of(png)[0] > 1000 for _, png in shown.values())


def test_classes_are_drawn_where_they_are_measured():
    history = history_of(RISING, metrics=lambda i: {"accuracy_class_0": i / 10, "accuracy_class_1": 0.5})
    assert "classes.png" in drawn({"a": [result_of(history)], "b": [result_of(history_of(RISING))], "none": []})


@pytest.mark.parametrize(
    ("values", "metric"),
    [([0.5], "accuracy"), ([0.5, 0.5], "loss"), ([0.0] * 6, "accuracy"), ([float("nan")] * 3, "accuracy"),
     ([0.1, 0.9, 0.999], "loss"), ([0.1, 0.2], "f1 <score>")],
    ids=["one", "flat", "zero", "not a number", "falling", "never measured"],
)  # fmt: skip
def test_poor_runs_are_drawn_too(values, metric):
    drawn({"a": [result_of(history_of(values))]}, metric=metric)


def test_a_run_in_which_nothing_was_applied_is_drawn():
    history = history_of([0.1])
    assert history.staleness == []
    drawn({"a": [result_of(history)], "b": [result_of(history_of(RISING))]})


def test_a_legend_of_many_names_makes_a_higher_picture():
    result = result_of(history_of(RISING))
    few, many = (drawn({f"a variant {i}": [result] for i in range(n)}) for n in (3, 30))
    for name in ("accuracy_time.png", "contributions.png"):
        assert size_of(many[name][1])[1] > 1.3 * size_of(few[name][1])[1]
