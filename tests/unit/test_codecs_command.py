"""`fedmq codecs` and `fedmq codecs try`: tables, the picture, and one clear message for each mistake."""

import os
import re
import warnings

import pytest
from typer.testing import CliRunner

from ops.cli import app
from ops.codecs import STAGES, TRIED
from ops.template import write
from shared.command import DONE, FAILED, USAGE
from shared.compression import AUTO, PRESETS, parse

TASK = """
import numpy as np

from worker.task import TrainResult


def build():
    return {"w": np.zeros((50, 40), np.float32), "b": np.zeros(40, np.float32)}


def train(model, context):
    rng = np.random.default_rng(context.seed)
    for name in model:
        model[name] += rng.standard_normal(model[name].shape, np.float32) * float(context.settings.get("scale", "1"))
    return TrainResult(5, 2, {"loss": 0.5})
"""
SMALL_TASK = TASK.replace("(50, 40)", "(20, 40)")
MIXED_TASK = TASK.replace("np.zeros(40,", "np.zeros(2001,")


@pytest.fixture(autouse=True)
def _clean(monkeypatch, tmp_path):
    for name in list(os.environ):
        if name.upper().startswith("FEDMQ_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.chdir(tmp_path)


def fedmq(*arguments):
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # matplotlib's, of a legend without entries
        return CliRunner().invoke(app, [str(argument) for argument in arguments])


def tried(path, text, *arguments):
    path.write_text(text)
    return fedmq("codecs", "try", path.name, *arguments)


def rows_of(result):
    """Return the table: codec -> its cells."""
    found = re.findall(
        r"^ *(\S.*?) {2,}([\d,]+) +([\d.]+)x +([\d.]+) +(\S+) +([\d.]+) +([\d.]+) *$", result.output, re.M
    )
    return {name: cells for name, *cells in found}


def test_codecs_lists_presets_and_stages():
    result = fedmq("codecs")
    assert result.exit_code == DONE, result.output
    for name, preset in PRESETS.items():
        assert re.search(rf"^ *{name} +{re.escape(preset.pipeline)} ", result.output, re.M), name
    for name in (AUTO, *STAGES):
        assert re.search(rf"^ *{re.escape(name)} ", result.output, re.M), name
    assert "order: [ef |] [all |] [topk(p) or randomk(p) |] [rotate |] one quantizer [| pack] [| zstd]" in result.output


def test_try_measures_every_codec_and_draws(tmp_path):
    result = tried(tmp_path / "mine.py", TASK, "--codec", "all | int2", "--codec", "bfloat16")
    assert result.exit_code == DONE, result.output
    assert result.output.startswith("mine.py: one local training, 2,040 parameters, 8,160 bytes as float32; loss 0.5\n")
    rows = rows_of(result)
    assert set(rows) == {*PRESETS, *(parse(name).name for name in (*TRIED, "all | int2", "bfloat16"))}
    sizes = [int(cells[0].replace(",", "")) for cells in rows.values()]
    assert sizes == sorted(sizes, reverse=True)
    assert rows["none"][:4] == ["8,160", "1.0", "0.0000", "0.000"]
    assert rows["bfloat16"][:3] == ["4,080", "2.0", "0.0000"]
    assert 0.01 < float(rows["balanced"][2]) < float(rows["tiny"][2]) < 1
    assert "travel as float16" not in result.output
    assert result.output.endswith("picture: runs/codecs.png\n")
    assert (tmp_path / "runs/codecs.png").read_bytes().startswith(b"\x89PNG")


def test_task_settings_and_the_picture_are_where_they_were_told_to(tmp_path):
    result = tried(tmp_path / "mine.py", TASK, "--task-settings", "scale=1e-3", "--out", "a/b.png", "--seed", 3)
    assert result.exit_code == DONE, result.output
    assert (tmp_path / "a/b.png").is_file()
    assert not (tmp_path / "runs").exists()
    assert result.output.endswith("picture: a/b.png\n")
    assert rows_of(result)["safe"] != rows_of(tried(tmp_path / "mine.py", TASK))["safe"]


def test_a_model_of_small_tensors_is_told_what_would_compress_it(tmp_path):
    result = tried(tmp_path / "mine.py", SMALL_TASK)
    assert result.exit_code == DONE, result.output
    line = "840 of 840 parameters travel as float16 whatever the stages: tensors of one dimension or fewer than 1,000"
    assert len([text for text in result.output.splitlines() if text.startswith(line) and "`all | ...`" in text]) == 1
    assert "no picture: " in result.output
    assert not (tmp_path / "runs").exists()


def test_the_advice_helps(tmp_path):
    result = tried(tmp_path / "mine.py", SMALL_TASK, "--codec", "all | int8 | zstd")
    sizes = {name: int(cells[0].replace(",", "")) for name, cells in rows_of(result).items()}
    assert sizes["all | int8 | zstd"] < 0.7 * sizes["safe"]
    assert (tmp_path / "runs/codecs.png").is_file()


def test_a_model_of_mostly_small_tensors_is_told_so_too(tmp_path):
    result = tried(tmp_path / "mine.py", MIXED_TASK)
    assert "2,001 of 4,001 parameters travel as float16" in result.output
    assert result.output.endswith("picture: runs/codecs.png\n")


def test_the_template_is_compressed(tmp_path):
    pytest.importorskip("torch")
    write(tmp_path / "mine.py")
    result = fedmq("codecs", "try", "mine.py")
    assert result.exit_code == DONE, result.output
    assert "travel as float16" not in result.output
    ratios = {name: float(cells[1]) for name, cells in rows_of(result).items()}
    assert ratios["tiny"] > ratios["balanced"] > 2 * ratios["safe"] > 6


@pytest.mark.parametrize(
    ("text", "arguments", "code", "parts"),
    [
        (TASK, ["--task-settings", "foo"], USAGE, ["--task-settings foo: 'foo' is not of the form a=1,b=2"]),
        (TASK, ["--task-settings", '{"a"'], USAGE, ['--task-settings {"a": ']),
        (
            TASK,
            ["--codec", "auto"],
            USAGE,
            ["--codec auto: it is each worker's own choice", "cannot be tried by itself"],
        ),
        (TASK, ["--codec", "gzip"], USAGE, ["unknown codec 'gzip'"]),
        (TASK, ["--out", "mine.py/x.png"], USAGE, ["cannot write mine.py/x.png"]),
        (TASK, ["--task-settings", "scale=0"], USAGE, ["the training of mine.py changed the weights by a norm of 0"]),
        (TASK, ["--task-settings", "scale=nan"], USAGE, ["changed the weights by a norm of nan"]),
        (TASK, ["--task-settings", "scale=1e10"], USAGE, ["changed the weights by a norm of 4", "at most 1e+11"]),
        (TASK.replace("rng =", "rng = 1 / 0 #"), [], FAILED, ["train() of mine.py raised ZeroDivisionError"]),
        ("x = 1", [], USAGE, ["task mine.py lacks build()"]),
    ],
    ids=["settings", "JSON", "auto", "codec", "out", "nothing", "nan", "explodes", "raises", "no task"],
)
def test_what_cannot_be_tried_is_said_in_one_line(tmp_path, text, arguments, code, parts):
    result = tried(tmp_path / "mine.py", text, *arguments)
    assert result.exit_code == code, result.output
    assert isinstance(result.exception, SystemExit)
    last = result.output.splitlines()[-1]
    assert last.startswith("fedmq: "), result.output
    for part in parts:
        assert part in last
