"""Loading a user's task: each way it can go wrong is one message that says where."""

import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import worker.tasks
from shared.errors import SettingsError, TaskError
from shared.model_image import ModelImage
from worker.task import BUILT_IN, Context, Task, TrainResult, read, write

GOOD = """
import numpy as np
from worker.task import TrainResult

def build():
    return {"w": np.zeros(3, np.float32)}

def train(model, context):
    model["w"] += 1
    return TrainResult(1, 1)
"""


@pytest.fixture(autouse=True)
def _restore_path(monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))


@pytest.fixture
def written(tmp_path):
    def write_task(text, name="my_task.py"):
        (tmp_path / name).write_text(text)
        return str(tmp_path / name)

    return write_task


def problem(name, **options):
    with pytest.raises(SettingsError) as caught:
        Task.load(name, **options)
    return str(caught.value)


def context():
    return Context("a", 0, 1)


def test_a_file_is_a_task(written):
    task = Task.load(written(GOOD))
    model = task.build()
    assert task.train(model, context()) == TrainResult(1, 1)
    assert model["w"].tolist() == [1, 1, 1]
    assert not task.can_evaluate


def test_two_tasks_of_the_same_file_name_are_two_tasks(written, tmp_path):
    first = Task.load(written(GOOD))
    (tmp_path / "other").mkdir()
    second = Task.load(written(GOOD.replace("+= 1", "+= 2"), "other/my_task.py"))
    models = first.build(), second.build()
    first.train(models[0], context())
    second.train(models[1], context())
    assert [model["w"][0] for model in models] == [1, 2]


def test_a_task_may_be_split_over_files(written):
    written("STEP = 5", "fedmq_test_part.py")
    task = Task.load(written("from fedmq_test_part import STEP\n" + GOOD.replace("+= 1", "+= STEP")))
    model = task.build()
    task.train(model, context())
    assert model["w"][0] == 5


@pytest.mark.parametrize("name", BUILT_IN)
def test_the_built_in_tasks_load_and_build(name):
    task = Task.load(name, needs=("build", "train", "evaluate"))
    num_params = read(task.build()).layout.num_params
    assert f"{num_params:,} parameters" in task._module.build.__doc__
    assert task.can_evaluate


def test_every_built_in_stands_in_the_folder_and_the_other_way_round():
    folder = Path(worker.tasks.__file__).parent
    tasks = {path.stem for path in folder.glob("*.py") if "def build(" in path.read_text()}
    assert tasks == set(BUILT_IN)


def test_no_task_at_all():
    assert "--task my_task.py" in problem("")
    assert ", ".join(BUILT_IN) in problem("")


@pytest.mark.parametrize("name", ["nothing.py", "nosuch", "/"])
def test_a_missing_file_is_named_beside_the_built_ins(name):
    assert f"no task {name!r}: neither a file nor a built-in ({', '.join(BUILT_IN)})" in problem(name)


def test_a_syntax_error_is_told_with_its_line(written):
    text = problem(written("x = 1\n\ndef evaluate(:\n"))
    assert "my_task.py raises on import (line 3): SyntaxError" in text


def test_an_exception_on_import_is_told_with_its_line(written):
    text = problem(written("x = 1\n\ny = x / 0\n"))
    assert "my_task.py raises on import (line 3): ZeroDivisionError: division by zero" in text


def test_an_exception_on_import_is_told_with_its_line_for_a_relative_path(written, tmp_path, monkeypatch):
    written("x = 1\n\ny = x / 0\n")
    monkeypatch.chdir(tmp_path)
    assert "task my_task.py raises on import (line 3): ZeroDivisionError" in problem("my_task.py")


def test_a_missing_package_is_told(written):
    assert "ModuleNotFoundError: No module named 'nosuchpackage'" in problem(written("import nosuchpackage"))


def test_a_task_that_exits_on_import_does_not_end_the_worker(written):
    assert "raises on import" in problem(written("import sys\nsys.exit(3)"))


def test_a_missing_function_is_named(written):
    assert "my_task.py lacks train();" in problem(written("def build(): ..."))
    assert "lacks build(), train();" in problem(written("build = 3"))
    assert "lacks evaluate();" in problem(written(GOOD), needs=("build", "evaluate"))


def test_a_file_that_is_no_python_is_refused(written):
    assert "not a Python file" in problem(written("hello", "task.txt"))


def task_of(**functions):
    return Task("t", SimpleNamespace(**functions))


@pytest.mark.parametrize("model", [None, 5, [np.zeros(3)], "model", np.zeros(3)])
def test_build_must_return_a_model(model):
    with pytest.raises(TaskError, match=r"build\(\) of t returned"):
        task_of(build=lambda: model).build()


@pytest.mark.parametrize("result", [None, 5, {"loss": 1}, (1, 1)])
def test_train_must_return_a_train_result(result):
    with pytest.raises(TaskError, match=r"train\(\) of t returned .*, not a TrainResult"):
        task_of(train=lambda model, context: result).train({}, context())


@pytest.mark.parametrize("metrics", [None, 5, {"loss": "low"}, {"loss": None}, {"loss": [1, 2]}])
def test_evaluate_must_return_numbers(metrics):
    with pytest.raises(TaskError, match=r"evaluate\(\) of t must return a dict of numbers"):
        task_of(evaluate=lambda model, context: metrics).evaluate({}, context())


def test_evaluate_takes_numbers_of_any_kind():
    metrics = {"a": np.float32(0.5), "b": 1, "c": torch.tensor(2.0)}
    assert task_of(evaluate=lambda m, c: metrics).evaluate({}, context()) == {"a": 0.5, "b": 1.0, "c": 2.0}


@pytest.mark.parametrize("function", ["build", "train", "evaluate"])
def test_whatever_a_task_raises_is_a_task_error(function):
    def raises(*_):
        raise LookupError("no such column")

    task = task_of(**{function: raises})
    with pytest.raises(TaskError, match=rf"{function}\(\) of t raised LookupError: no such column") as caught:
        getattr(task, function)(*(() if function == "build" else ({}, context())))
    assert isinstance(caught.value.__cause__, LookupError)


def test_write_then_read_gives_the_image_back_for_arrays_and_for_torch():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    image = read(model)
    image.weights[:] = np.arange(image.weights.size)
    image.tensors()["1.num_batches_tracked"][...] = 9
    write(model, image)
    assert read(model).sha256 == image.sha256
    arrays = {name: np.zeros_like(array) for name, array in image.tensors().items()}
    write(arrays, image)
    assert read(arrays).sha256 == image.sha256


def test_write_fills_the_models_own_tensors():
    array = np.zeros((2, 2), np.float32)
    write({"w": array}, ModelImage.of({"w": np.ones((2, 2), np.float32)}))
    assert array.sum() == 4
    linear = torch.nn.Linear(2, 1)
    weight = linear.weight
    write(linear, read(linear))
    assert linear.weight is weight


def test_a_task_without_torch_needs_none():
    image = read({"w": np.ones(3, np.float64), "n": np.arange(2)})
    assert [(t.name, t.dtype) for t in image.layout.tensors] == [("w", "float64"), ("n", "int64")]
