"""A comparison runs what is not there yet, keeps what is, and gives the same whatever runs at once."""

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
from typer.testing import CliRunner

from ops.cli import app
from ops.simulation.compare import compare
from ops.simulation.experiment import read
from shared.errors import SettingsError

TASK = """
import os
import numpy as np
from pathlib import Path
from worker.task import TrainResult

def build():
    return {"w": np.zeros(4, np.float32)}

def train(model, context):
    if context.settings.get("bad") == "raise" and context.version >= 2:
        raise KeyError("no such pixel")
    if context.settings.get("bad") == "die" and not Path(context.settings["spared"]).exists():
        os._exit(9)
    if "slow" in context.settings:
        import time
        time.sleep(float(context.settings["slow"]))
    model["w"] += np.random.default_rng(context.seed).normal(0.01, 0.01, 4).astype(np.float32)
    return TrainResult(num_samples=1, num_steps=1)

def evaluate(model, context):
    return {"accuracy": float(model["w"].mean()), "loss": 1.0}
"""
BASE = """
seeds = [1, 2]
[base]
task = "task.py"
clients = 6
buffer_size = 3
updates = 30
evaluations = 10
[[variant]]
name = "A"
[[variant]]
name = "B"
server_lr = 0.5
"""


@pytest.fixture(autouse=True)
def _signals():
    """The command waits for signals; what runs the tests goes on to have them as before."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def written(tmp_path):
    (tmp_path / "task.py").write_text(TASK)

    def write(more="", base=BASE):
        path = tmp_path / "trial.toml"
        path.write_text(base + more)
        return path

    return write


def files(folder):
    """Return each file of the runs with its content and when it was written; result.json holds this machine's times."""
    return {path.relative_to(folder): (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.glob("*/*/*")}


def ended(group, within_s=10):
    """Say whether the group's processes end, if only those that wait for another to be gone."""
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        processes = [p for p in psutil.process_iter(["status"]) if p.info["status"] != psutil.STATUS_ZOMBIE]
        if not any(group_of(process) == group for process in processes):
            return True
        time.sleep(0.1)
    return False


def group_of(process):
    try:
        return os.getpgid(process.pid)
    except ProcessLookupError:
        return None


def test_the_results_are_the_same_with_one_process_and_with_two(written, tmp_path):
    experiment = read(written())
    one, two = (compare(experiment, tmp_path / str(n), n) for n in (1, 2))
    assert [outcome.error for outcome in one + two] == [""] * 8
    assert [outcome.run.folder for outcome in one] == [run.folder for run in experiment.runs]
    assert [o.result.sha256 for o in one] == [o.result.sha256 for o in two]
    assert [o.result.history.dump() for o in one] == [o.result.history.dump() for o in two]
    assert len({o.result.sha256 for o in one}) == 4


def test_what_is_finished_is_not_touched_and_the_rest_is_run(written, tmp_path):
    experiment = read(written())
    out, shown = tmp_path / "out", []
    first = compare(experiment, out)
    before = files(out)
    missing = out / experiment.runs[2].folder
    (missing / "result.json").unlink()
    second = compare(experiment, out, show=shown.append)
    kept = {path for path in before if not missing.samefile(out / path.parent)}
    assert {path: files(out)[path] for path in kept} == {path: before[path] for path in kept}
    assert (missing / "result.json").exists()
    assert [o.result.sha256 for o in first] == [o.result.sha256 for o in second]
    assert shown[-1].run is experiment.runs[2]


def test_runs_of_another_experiment_are_refused_before_anything_runs(written, tmp_path):
    compare(read(written()), tmp_path / "out")
    before = files(tmp_path / "out")
    changed = read(written('[[variant]]\nname = "C"\n', BASE.replace("updates = 30", "updates = 40")))
    with pytest.raises(SettingsError) as caught:
        compare(changed, tmp_path / "out")
    assert str(caught.value).count("updates=30, not 40") == 4
    assert files(tmp_path / "out") == before


@pytest.mark.parametrize("processes", [1, 2])
def test_a_run_that_fails_is_told_and_the_others_go_on(written, tmp_path, processes):
    path = written('[[variant]]\nname = "bad"\ntask_settings = "bad=raise"\n')
    done = CliRunner().invoke(
        app, ["simulate", "compare", str(path), "--out", str(tmp_path / "out"), "--processes", str(processes)]
    )
    assert done.exit_code == 1, done.output
    assert "2 of 6 runs failed" in done.output
    table = (tmp_path / "out/table.md").read_text()
    assert table.count("failed: ") == 2
    assert "no such pixel" in table
    assert "| A | 2 |" in table
    assert "| bad | 0 |" in table
    assert "no such pixel" in (tmp_path / "out/bad/seed-1/log.txt").read_text()


def test_a_process_that_dies_takes_no_other_run_with_it(written, tmp_path):
    spared = tmp_path / "spared"
    settings = f'[[variant]]\nname = "bad"\ntask_settings = {{bad = "die", spared = "{spared}"}}\n'
    experiment = read(written(settings))
    outcomes = compare(experiment, tmp_path / "out", 2)
    assert [bool(outcome.error) for outcome in outcomes] == [False] * 4 + [True] * 2
    assert "exit code 9" in outcomes[-1].error
    spared.touch()
    again = compare(experiment, tmp_path / "out", 2)
    assert [outcome.error for outcome in again] == [""] * 6


def test_one_run_that_is_left_has_all_processes(written, tmp_path, monkeypatch):
    given = []
    monkeypatch.setattr(
        "ops.simulation.compare.attempt", lambda run, folder, processes, stop: given.append(processes) or "no"
    )
    compare(read(written(base=BASE.replace("[1, 2]", "[1]").split("[[variant]]", maxsplit=1)[0])), tmp_path, 5)
    assert given == [5]


def test_an_interrupted_comparison_leaves_no_process_and_goes_on(written, tmp_path):
    path = written("", BASE.replace('task = "task.py"', 'task = "task.py"\ntask_settings = "slow=0.05"'))
    command = [sys.executable, "-m", "ops.cli", "simulate", "compare", str(path), "--out", str(tmp_path / "out")]
    running = subprocess.Popen(
        [*command, "--processes", "2"], stderr=subprocess.PIPE, start_new_session=True, text=True
    )
    try:
        deadline = time.monotonic() + 120
        while not list((tmp_path / "out").glob("*/*/simulation.sqlite")) and time.monotonic() < deadline:
            time.sleep(0.1)
        running.send_signal(signal.SIGINT)
        _, errors = running.communicate(timeout=60)
        assert running.returncode == 130, errors
        assert "interrupted" in errors
        assert ended(running.pid)
    finally:
        running.kill()
    assert not (tmp_path / "out/report.html").exists()
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    fresh = compare(read(path), tmp_path / "fresh", 2)
    resumed = compare(read(path), tmp_path / "out")
    assert [o.result.sha256 for o in fresh] == [o.result.sha256 for o in resumed]


def test_wrong_settings_end_with_2(written):
    done = CliRunner().invoke(app, ["simulate", "compare", str(written("[grid]\nclient = [1]\n"))])
    assert done.exit_code == 2, done.output
    assert "did you mean clients?" in done.output
