"""Imports point one way: aggregator -> shared <- worker, ops -> all; libraries stay behind their port."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MODULES = sorted(path for top in ("shared", "aggregator", "worker", "ops") for path in (ROOT / top).rglob("*.py"))
ADAPTERS = ("shared.store.redis", "shared.transport.rabbitmq", "shared.store.inprocess", "shared.transport.inprocess")


def imports(path):
    """Return every absolute module name a file imports, at its top or inside a function."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide where they lead"
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def tops(path):
    return {name.split(".")[0] for name in imports(path)}


def name_of(path):
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_imports_point_one_way(path):
    forbidden = {
        "shared": {"aggregator", "worker", "ops", "tests"},
        "aggregator": {"worker", "ops", "tests"},
        "worker": {"aggregator", "ops", "tests"},
        "ops": {"tests"},
    }[path.relative_to(ROOT).parts[0]]
    assert not tops(path) & forbidden


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_pika_stays_in_the_transport_and_redis_in_its_store(path):
    name = name_of(path)
    bare = name.startswith("ops/bench/")  # it measures the bare library as the baseline
    stranger = name.startswith("ops/docker/lab/")  # it tries what the servers must refuse
    assert "pika" not in tops(path) or name.startswith("shared/transport/") or bare or stranger
    assert "redis" not in tops(path) or name.startswith("shared/store/redis") or stranger


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_adapters_are_built_only_by_programs(path):
    if path.name == "__main__.py" or name_of(path) == "worker/check.py" or name_of(path).startswith("ops/"):
        return
    used = {adapter for adapter in ADAPTERS if adapter in imports(path)}
    own = name_of(path).removesuffix(".py").replace("/", ".")
    assert not {adapter for adapter in used if not own.startswith(adapter)}  # redis_backup is a part of redis


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_nothing_unpickles(path):
    assert not tops(path) & {"pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
    assert "torch.load(" not in path.read_text()


@pytest.mark.parametrize("path", [p for p in MODULES if p.parts[-2] != "tasks"], ids=name_of)
def test_torch_is_imported_only_where_it_is_used(path):
    """It is an extra: no module but a worked task may need it to be imported."""
    top_level = ast.parse(path.read_text()).body
    names = {alias.name.split(".")[0] for node in top_level if isinstance(node, ast.Import) for alias in node.names} | {
        (node.module or "").split(".")[0] for node in top_level if isinstance(node, ast.ImportFrom)
    }
    assert not names & {"torch", "sklearn", "matplotlib"}


def test_aggregator_and_numpy_tasks_run_with_torch_blocked():
    program = """
import sys
for name in ("torch", "sklearn", "matplotlib"):
    sys.modules[name] = None
import pkgutil, importlib, pathlib, tempfile
import aggregator, shared
for package in (aggregator, shared):
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        importlib.import_module(module.name)
import numpy as np
from tests.builders import System, add_one, device_of, model_of
from shared.model_image import ModelImage
system = System(np.zeros(7, np.float32), buffer_size=1)
build = lambda: {"w": np.zeros(7, np.float32)}
device = device_of(pathlib.Path(tempfile.mkdtemp()), system, add_one, build)
device.worker.step(); device.publisher.step(); system.drain()
assert system.weights.tolist() == [1] * 7
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
