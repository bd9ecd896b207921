"""`fedmq simulate` as a user runs it: what it leaves behind, what it says of wrong input, kills and goes on."""

import csv
import json
import logging
import signal
import subprocess
import sys
import time

import pytest
from typer.testing import CliRunner

from ops.cli import app
from ops.simulation import run as module
from ops.simulation.plan import plan_of
from ops.simulation.run import CHECKPOINT, last_line, simulate, stored_result
from shared.errors import FedMQError, SettingsError
from shared.model_image import ModelImage
from tests.simulation.runs import SMALL

OPTIONS = [f"--{name.replace('_', '-')}={value}" for name, value in SMALL.items()]
LONG = [*OPTIONS, "--updates=400", "--task-settings=sleep=0.01"]
PROGRAM = """
from pathlib import Path
import ops.simulation.simulator as s
s.CHECKPOINT_S, s.CHECKPOINT_SHARE = 0.2, 0.5
checkpoint = s.Simulator.checkpoint
def noted(self):
    checkpoint(self)
    Path({marker!r}).touch()
s.Simulator.checkpoint = noted
from ops.cli import app
if __name__ == "__main__":
    app()
"""


def fedmq(*arguments):
    """Run the command in this process."""
    return CliRunner().invoke(app, ["simulate", *map(str, arguments)])


@pytest.fixture(autouse=True)
def _signals():
    """The command takes the signals of its process."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def start(out, *arguments):
    """Run it in a process of its own, with many checkpoints."""
    script, marker = out.with_suffix(".py"), out.with_suffix(".noted")
    marker.unlink(missing_ok=True)
    script.write_text(PROGRAM.format(marker=str(marker)))
    command = [sys.executable, str(script), "simulate", f"--out={out}", *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def committed(out, process):
    """Wait for its first checkpoint."""
    deadline = time.monotonic() + 60
    while not out.with_suffix(".noted").exists():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_what_it_leaves_behind(tmp_path):
    out = tmp_path / "run"
    result = fedmq(*OPTIONS, f"--out={out}", "--target=0.3")
    assert result.exit_code == 0, result.output
    files = {path.name for path in out.iterdir()}
    assert files >= {"history.csv", "report.html", "model.safetensors", "result.json"}
    assert not any(name.startswith(CHECKPOINT) for name in files)
    with (out / "history.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert int(rows[-1]["updates"]) == 60
    stored = stored_result(out)
    assert ModelImage.from_file(out / "model.safetensors").sha256 == stored.sha256
    assert result.output.splitlines()[-1] == last_line(stored)
    assert "accuracy 0.3 after" in last_line(stored)


def test_a_finished_run_is_shown_again_and_not_run_again(tmp_path, monkeypatch):
    out = tmp_path / "run"
    first = fedmq(*OPTIONS, f"--out={out}")
    monkeypatch.setattr(module, "Simulator", None)
    again = fedmq(*OPTIONS, f"--out={out}")
    assert again.exit_code == 0
    assert again.output.splitlines()[-1] == first.output.splitlines()[-1]


@pytest.mark.parametrize("processes", [1, 2])
def test_the_number_of_processes_makes_no_difference(tmp_path, processes):
    results = [simulate(plan_of(SMALL), tmp_path / str(count), count) for count in (1, processes)]
    assert results[0].sha256 == results[1].sha256
    assert results[0].history == results[1].history


WRONG = [
    (["--updates=0"], "say how long to run: updates or hours"),
    (["--rule=fedbuf"], "did you mean fedbuff?"),
    (["--buffer-size=13"], "buffer_size=13 exceeds clients=12"),
    (["--robust=krum(3)"], "needs at least 9"),
    (["--codec=auto"], "codec=auto"),
    (["--task=nothing.py"], "no task 'nothing.py': neither a file nor a built-in"),
    (["--task-settings=steps"], "task_settings"),
    (["--speed=trace:nothing"], "cannot read the trace nothing"),
    (["--update-bytes-max=1024", "--task=digits"], "update_bytes_max is 1024"),
    (["--partition=shards(2)", "--clients=100000", "--task=digits"], "100,000 shares"),
]


@pytest.mark.parametrize(("options", "message"), WRONG, ids=[" ".join(options) for options, _ in WRONG])
def test_what_is_impossible_is_one_message_and_exit_code_2(options, message, tmp_path):
    result = fedmq(*OPTIONS, f"--out={tmp_path / 'run'}", *options)
    assert result.exit_code == 2, result.output
    assert message in result.output
    assert "Traceback" not in result.output


def test_an_unknown_option_is_named(tmp_path):
    result = fedmq(*OPTIONS, f"--out={tmp_path / 'run'}", "--cleints=7")
    assert result.exit_code == 2
    assert "No such option: --cleints" in result.output.replace("\n", " ")


def test_a_task_that_cannot_be_evaluated(tmp_path):
    task = tmp_path / "blind.py"
    task.write_text("def build(): return {}\ndef train(model, context): return None\n")
    result = fedmq(*OPTIONS, f"--out={tmp_path / 'run'}", f"--task={task}")
    assert result.exit_code == 2
    assert "blind.py lacks evaluate()" in result.output.replace("\n", "")


def test_a_task_that_always_raises_ends_with_its_line(tmp_path):
    result = fedmq(*OPTIONS, f"--out={tmp_path / 'run'}", "--task-settings=raises=all")
    assert result.exit_code == 1
    assert "trainings all raised, after 0 updates: mend the task" in result.output


def test_another_simulation_in_the_folder_is_left_alone(tmp_path):
    out = tmp_path / "run"
    assert fedmq(*OPTIONS, f"--out={out}").exit_code == 0
    before = (out / "result.json").read_bytes()
    result = fedmq(*OPTIONS, f"--out={out}", "--seed=6")
    assert result.exit_code == 2
    assert "holds another simulation (seed=5, not 6): give another --out" in result.output.replace("\n", " ")
    assert (out / "result.json").read_bytes() == before


@pytest.mark.parametrize("how", ["a file", "a broken database", "a broken result"])
def test_a_folder_that_cannot_be_used(tmp_path, how):
    out = tmp_path / "run"
    if how == "a file":
        out.write_text("mine")
    else:
        out.mkdir()
        (out / (CHECKPOINT if "database" in how else "result.json")).write_text("not what it should be " * 50)
    result = fedmq(*OPTIONS, f"--out={out}")
    assert result.exit_code == 2, result.output
    assert str(out) in result.output.replace("\n", "")
    assert "Traceback" not in result.output


def test_a_full_disk_is_said_to_be_one(tmp_path, monkeypatch):
    def full(simulator):
        simulator._database.connection.execute("PRAGMA max_page_count = 1")
        simulator.checkpoint()

    with pytest.raises(FedMQError, match="cannot be used: database or disk is full"):
        simulate(plan_of(SMALL | {"evaluations": 1}), tmp_path / "run", show=full)


@pytest.mark.parametrize(("number", "processes"), [(signal.SIGINT, 1), (signal.SIGTERM, 2)])
def test_asked_to_stop_it_leaves_a_checkpoint_and_goes_on_from_it(tmp_path, number, processes):
    out = tmp_path / "run"
    expected = simulate(plan_of(SMALL | {"updates": 400, "task_settings": "sleep=0.01"}), tmp_path / "whole")
    process = start(out, *LONG, f"--processes={processes}")
    committed(out, process)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert errors.splitlines()[-1] == "fedmq: interrupted"
    assert "Traceback" not in errors
    with pytest.raises(SettingsError, match="holds another simulation"):
        simulate(plan_of(SMALL | {"updates": 500}), out)
    result = fedmq(*LONG, f"--out={out}")
    assert result.exit_code == 0, result.output
    assert "going on after" in result.output
    assert stored_result(out).sha256 == expected.sha256
    assert stored_result(out).history == expected.history


@pytest.mark.parametrize("codec", ["tiny", "none"])
def test_killed_again_and_again_it_comes_to_the_same_weights(tmp_path, codec):
    options = {"updates": 400, "task_settings": "sleep=0.01", "codec": codec}
    expected = simulate(plan_of(SMALL | options), tmp_path / "whole")
    out = tmp_path / "run"
    for _ in range(3):
        process = start(out, *LONG, f"--codec={codec}")
        committed(out, process)
        time.sleep(0.3)
        process.kill()
        process.communicate()
    result = simulate(plan_of(SMALL | options), out)
    assert result.sha256 == expected.sha256
    assert result.history == expected.history
    assert result.failures == expected.failures


def test_two_runs_do_not_share_a_folder(tmp_path):
    out = tmp_path / "run"
    process = start(out, *LONG)
    committed(out, process)
    result = fedmq(*LONG, f"--out={out}")
    process.kill()
    process.communicate()
    assert result.exit_code == 2
    assert "another simulation is running there" in result.output.replace("\n", " ")


def test_refusals_do_not_flood_the_screen(tmp_path, caplog):
    plan = plan_of(SMALL | {"robust": "aflguard(0.001)", "trusted_client": "judge"})
    result = simulate(plan, tmp_path)
    assert result.history.outcomes["rejected"] > 30
    assert [record for record in caplog.records if record.name.startswith("fedmq")] == []
    assert logging.getLogger("fedmq.aggregator").level == logging.NOTSET


def test_the_result_survives_being_written_down(tmp_path):
    result = simulate(plan_of(SMALL | {"task_settings": "raises=3", "dropout": 0.2}), tmp_path)
    assert stored_result(tmp_path) == result
    assert json.loads((tmp_path / "result.json").read_text())["failures"] == result.failures != {}
    assert result.lost > 0
