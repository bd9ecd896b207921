"""The table's numbers against ones worked out by hand, and what the page and the files say."""

import csv
import math
import re
import statistics
import sys

import pytest

from ops import report
from ops.history import History
from ops.simulation import tensorboard
from ops.simulation.comparison import Outcome, leave_behind, markdown, table_of
from ops.simulation.experiment import read
from ops.simulation.summary import numbers_of, spread, summarise
from ops.tensorboard import check as check_tensorboard
from shared.errors import SettingsError
from tests.results import history_of, result_of

UP = [0.1, 0.5, 0.8, 0.8, 0.8, 0.8, 0.8, 0.8, 0.8, 0.9, 0.9, 0.9]  # its last five are 0.8 from row 6 on
EVIL = "<script>alert('x')</script>"


def test_a_runs_costs_are_those_of_the_row_that_reached_the_target():
    numbers = numbers_of(result_of(history_of(UP, s=60, up=1000, down=500), target=0.8))
    assert numbers.costs == {"time_s": 360, "trips": 60, "bytes_sent": 60_000, "bytes_pulled": 30_000}
    assert numbers.final == pytest.approx(statistics.mean(UP[-10:]))


def test_without_a_target_they_are_those_of_the_whole_run():
    numbers = numbers_of(result_of(history_of(UP)))
    assert numbers.costs == {"time_s": 660, "trips": 110, "bytes_sent": 110_000, "bytes_pulled": 55_000}


def test_a_target_that_was_not_reached_costs_nothing_known():
    assert numbers_of(result_of(history_of(UP), target=0.95)).costs == {}


def test_shares_are_of_all_trips():
    history = history_of([0.1, 0.2, 0.3], staleness=3)  # 20 applied
    history.add_entries([{"outcome": "stale"}] * 4 + [{"outcome": "rejected"}] * 6)
    numbers = numbers_of(result_of(history, lost=7, aborted=2, failures={"a": 8, "b": 3}))
    assert (numbers.refused, numbers.rejected, numbers.lost) == (4 / 50, 6 / 50, 20 / 50)
    assert numbers.staleness == 3


def test_nothing_that_happened_divides_by_nothing():
    numbers = numbers_of(result_of(history_of([0.1])))
    assert (numbers.refused, numbers.rejected, numbers.lost, numbers.staleness) == (0, 0, 0, 0)


def test_a_spread_is_the_samples():
    assert spread([1.0, 2.0, 4.0]).sd == pytest.approx(statistics.stdev([1, 2, 4]))
    assert (spread([5.0]).mean, math.isnan(spread([5.0]).sd)) == (5.0, True)
    assert math.isnan(spread([]).mean)
    assert math.isnan(spread([math.nan, 1.0]).sd)


def runs_of(target=0.8):
    """Return two variants of two seeds; the second one takes half the time and a quarter of the bytes up."""
    baseline = [result_of(history_of(UP, s=s), target=target) for s in (60, 80)]
    return {"A": baseline, "B": [result_of(history_of(UP, s=s, up=250), target=target) for s in (30, 40)]}


def test_ratios_are_of_the_means_beside_the_first_variant():
    summaries = summarise(runs_of())
    a, b = summaries["A"], summaries["B"]
    assert (a.reached, a.runs, b.reached, b.runs) == (2, 2, 2, 2)
    assert a.costs["time_s"].mean == (360 + 480) / 2
    assert a.costs["time_s"].sd == pytest.approx(statistics.stdev([360, 480]))
    assert a.ratios == dict.fromkeys(a.costs, 1.0)
    assert b.ratios == {"time_s": 0.5, "trips": 1.0, "bytes_sent": 0.25, "bytes_pulled": 1.0}


def test_one_seed_that_never_got_there_leaves_no_mean_and_a_baseline_like_that_no_ratio():
    missed = result_of(history_of(UP[:5]), target=0.8)
    runs = runs_of()
    second = summarise({"A": runs["A"], "B": [*runs["B"], missed]})["B"]
    assert (second.reached, second.runs, second.costs, second.ratios) == (2, 3, {}, {})
    assert second.final.mean == pytest.approx(
        statistics.mean([statistics.mean(UP[-10:])] * 2 + [statistics.mean(UP[:5])])
    )
    without_base = summarise({"A": [*runs["A"], missed], "B": runs["B"]})["B"]
    assert without_base.costs["trips"].mean == 60
    assert without_base.ratios == {}


def test_a_variant_without_any_run_has_no_numbers():
    summary = summarise({"A": [], "B": runs_of()["B"]})
    assert (summary["A"].runs, summary["A"].costs, summary["B"].ratios) == (0, {}, {})
    assert math.isnan(summary["A"].final.mean)


@pytest.fixture
def experiment(tmp_path):
    (tmp_path / "trial.toml").write_text(
        f'title = "{EVIL}"\ntext = """\nOne {EVIL}.\n\nTwo."""\nseeds = [1, 2]\n[base]\ntask = "digits"\nclients = 4\n'
        "buffer_size = 2\nupdates = 1000\ntarget = 0.8\n[base.task_settings]\n"
        f'"{EVIL}" = "{EVIL}"\n[[variant]]\nname = "A | {EVIL} $b$"\n[[variant]]\nname = "B"\nserver_lr = 0.5\n'
    )
    return read(tmp_path / "trial.toml")


def outcomes_of(experiment, *failed):
    results = [result for results in runs_of().values() for result in results]
    return [
        Outcome(run, None, failed[0]) if failed and index == 3 else Outcome(run, result)
        for index, (run, result) in enumerate(zip(experiment.runs, results, strict=True))
    ]


def summaries_of(experiment):
    return dict(zip((variant.name for variant in experiment.variants), summarise(runs_of()).values(), strict=True))


def test_the_table_has_means_deviations_and_ratios(experiment):
    head, rows = table_of(experiment, summaries_of(experiment))
    assert head[:4] == ["variant", "reached 0.8", "virtual time, min", "trips"]
    second = [(cell.text, cell.note) for cell in rows[1]]
    assert second == [
        ("B", ""), ("2 of 2", ""), ("3.50 ± 0.71", "0.50 x"), ("60 ± 0", "1.00 x"), ("0.0150 ± 0.0000", "0.25 x"),
        ("0.0300 ± 0.0000", "1.00 x"), ("0.8300 ± 0.0000", ""), ("1.0 ± 0.0", ""), ("0.0 / 0.0 / 0.0", ""),
    ]  # fmt: skip


def test_the_markdown_table_keeps_its_columns_whatever_names_hold(experiment):
    text = markdown(experiment, summaries_of(experiment), outcomes_of(experiment, "line one\nline | two"))
    lines = text.splitlines()
    columns = {len(re.findall(r"(?<!\\)\|", line)) for line in lines[:4]}
    assert columns == {len(table_of(experiment, summaries_of(experiment))[0]) + 1}
    assert r"A \| &lt;script>" in lines[2]
    assert r"\$b\$" in lines[2]
    assert lines[-1] == "- B, seed 2 failed: line one line | two"


def test_the_page_holds_everything_and_no_markup_of_the_users(experiment, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    outcomes = outcomes_of(experiment, f"it raised {EVIL}")
    first = outcomes[0].result
    first.failures[EVIL] = 3
    leave_behind(experiment, outcomes, out)
    page = (out / "report.html").read_text()
    assert "<script" not in page
    assert page.count("&lt;script&gt;") >= 7  # title twice, text, table, failures, conditions, variants
    assert page.count("data:image/png;base64,") == page.count("<img") == 6
    assert not re.search(r"""(?:src|href)\s*=\s*["'](?!data:)""", page)
    for part in ("2 of 2", "1 of 1", "failed: it raised", "3 x", "<p>Two.</p>", "server_lr = 0.5", "seeds", "1, 2"):
        assert part in page, part
    assert {path.name for path in out.iterdir()} == {
        "report.html", "table.md", "results.csv", "curves.csv", "staleness.png", "contributions.png",
        *(f"accuracy_{along}.png" for along in ("time", "trips", "bytes_up", "bytes_down")),
    }  # fmt: skip


def test_the_files_have_a_row_a_run_and_a_row_an_evaluation(experiment, tmp_path):
    leave_behind(experiment, outcomes_of(experiment, "gone"), tmp_path)
    with (tmp_path / "results.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["seed"], row["target_time_s"], row["target_bytes_sent"]) for row in rows] == [
        ("1", "360", "60000"), ("2", "480", "60000"), ("1", "180", "15000"), ("2", "", ""),
    ]  # fmt: skip
    assert [row["error"] for row in rows] == ["", "", "", "gone"]
    with (tmp_path / "curves.csv").open(newline="") as file:
        curves = list(csv.DictReader(file))
    assert len(curves) == 3 * len(UP)
    assert [float(row["accuracy"]) for row in curves[: len(UP)]] == UP
    assert {"variant", "seed", "time_s", "trips", "updates", "bytes_sent", "bytes_pulled", "loss"} <= curves[0].keys()


def test_when_every_run_failed_there_is_still_a_page(experiment, tmp_path):
    leave_behind(experiment, [Outcome(run, None, "gone") for run in experiment.runs], tmp_path)
    assert "0 of 0" in (tmp_path / "report.html").read_text()
    assert not list(tmp_path.glob("*.png"))


# --- TensorBoard


def test_a_missing_tensorboard_is_told_with_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(SettingsError, match=r"pip install 'fedmq\[tensorboard\]'"):
        check_tensorboard("--tensorboard")


def test_event_files_hold_each_evaluation_once(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    result = result_of(history_of(UP))
    for _ in range(2):
        tensorboard.write(result, tmp_path)
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    scalars = events.Scalars("accuracy")
    assert [event.value for event in scalars] == pytest.approx(UP)
    assert [event.step for event in scalars] == [10 * i for i in range(len(UP))]
    assert [event.wall_time for event in scalars] == [60.0 * i for i in range(len(UP))]


# --- the page of one run


def saved(history, folder, **more):
    report.save(history, folder, f"Run {EVIL}", {f"a {EVIL}": EVIL}, **more)
    return (folder / "report.html").read_text()


def test_few_clients_are_listed_in_the_order_of_their_numbers(tmp_path):
    page = saved(history_of(UP, every=11, clients=11), tmp_path)
    assert re.findall(r"<td>client-(\d+)</td>", page) == [str(i) for i in range(11)]
    assert page.count("<img") == 1
    assert "<script" not in page


def test_many_clients_are_a_picture_and_a_sentence(tmp_path):
    page = saved(history_of(UP, clients=5), tmp_path, clients=1000, virtual=True)
    assert "1,000 clients: the busiest tenth made 100 % of the updates that were applied, 995 made none." in page
    assert not re.findall(r"<td>client-", page)
    assert page.count("<img") == 2
    assert "of virtual time" in page


def test_classes_are_shown_where_they_are_measured(tmp_path):
    page = saved(history_of(UP, metrics=lambda i: {f"accuracy_class_{c}": i / 12 for c in range(3)}), tmp_path)
    assert page.count("<img") == 2
    assert "Accuracy by class" in page


@pytest.mark.parametrize("virtual", [False, True])
def test_a_run_without_accuracy_or_updates_has_a_page(tmp_path, virtual):
    history = History(10)
    history.evaluated(0.0, 0, {"f1": 0.5})
    assert "nan" in saved(history, tmp_path, virtual=virtual)
