"""The evaluator's curves for TensorBoard."""

import sys

import numpy as np
import pytest

from ops.evaluator import Evaluator
from shared.clock import VirtualClock
from shared.config import EvaluatorSettings
from shared.errors import SettingsError
from shared.metrics import EvaluatorMetrics
from tests.builders import JOB, System
from worker.task import Task

TASK = """
import numpy as np


def build():
    return {"w": np.zeros(7, np.float32)}


def evaluate(model, context):
    return {"accuracy": 0.5 + context.version / 10, "loss": 1.0}
"""


def evaluator(tmp_path, system, **settings):
    (tmp_path / "task.py").write_text(TASK)
    task = Task.load(str(tmp_path / "task.py"), needs=("build", "evaluate"))
    given = EvaluatorSettings(job=JOB, **settings)
    return Evaluator(given, task, system.store, VirtualClock(), EvaluatorMetrics())


def test_every_evaluation_is_a_point_at_its_version(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    system = System(buffer_size=1)
    for _restart in range(2):
        evaluates = evaluator(tmp_path, system, tensorboard_dir=tmp_path / "curves")
        for _ in range(2):
            system.publish(np.ones(7, np.float32))
            system.drain()
            assert evaluates.step()
        evaluates.close()
    written = EventAccumulator(str(tmp_path / "curves"))
    written.Reload()
    points = [(event.step, round(event.value, 3)) for event in written.Scalars("accuracy")]
    assert points == [(1, 0.6), (2, 0.7), (3, 0.8), (4, 0.9)], "a restart goes on where it was"


def test_without_the_package_the_setting_is_refused_with_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(SettingsError, match=r"FEDMQ_TENSORBOARD_DIR: .*pip install 'fedmq\[tensorboard\]'"):
        evaluator(tmp_path, System(), tensorboard_dir=tmp_path / "curves")


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    pytest.importorskip("tensorboard")
    (tmp_path / "file").write_text("")
    with pytest.raises(SettingsError, match="FEDMQ_TENSORBOARD_DIR"):
        evaluator(tmp_path, System(), tensorboard_dir=tmp_path / "file" / "curves")


def test_without_the_setting_nothing_is_written(tmp_path):
    system = System(buffer_size=1)
    evaluates = evaluator(tmp_path, system)
    assert evaluates.step()
    evaluates.close()
    assert {path.name for path in tmp_path.iterdir()} <= {"task.py", "__pycache__"}
