"""What `fedmq models` makes of what it reads: who contributed, how versions differ, which files they become."""

import errno
import io
import json
import re

import numpy as np
import onnx
import onnx.reference
import pytest
import safetensors.numpy
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ops.models import diff, export, formats, watch
from ops.models.facts import evaluation_of, made_of
from ops.models.listing import lasting, metrics
from ops.models.lookup import check_tag, listed
from ops.models.tags import read_guard
from ops.rollback import roll_back
from shared.config import Settings
from shared.errors import SettingsError, StoreUnavailable, TaskError
from shared.model_image import ModelImage
from shared.store.ports import Head, StoredVersion
from tests.builders import JOB, System, weights
from worker.task import Task, read, write

# --- who contributed


def contributors(system):
    """Return version -> (parent, ids) of every version that was written."""
    ledger = system.store.ledger
    written = {commit["version"]: commit["revision"] for commit in reversed(ledger)}  # the first of each
    found = {}
    for version, revision in written.items():
        if version:
            parent, made = made_of([c for c in reversed(ledger) if c["revision"] <= revision], version)
            found[version] = (parent, None if made is None else [each.update_id for each in made])
    return found


@given(
    st.integers(1, 4), st.sampled_from([0.0, 5.0]),
    st.lists(st.tuples(st.integers(0, 2), st.booleans(), st.booleans()), min_size=1, max_size=25),
)  # fmt: skip
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_every_applied_update_is_in_one_version_and_the_rest_in_the_open_buffer(buffer_size, interval_s, script):
    """However commits fall: several versions in one, partly filled buffers in between, behind a version in its own."""
    system = System(buffer_size=buffer_size, commit_interval_s=interval_s, commit_age_max_s=6.0, versions_kept=99)
    ids = []
    for seed, (late, wait, drain) in enumerate(script):
        base = max(0, system.store.head().version - late)
        ids.append(system.publish(weights(seed), update_id=f"{'abc'[seed % 3]}/i/{seed}", base_version=base).update_id)
        if drain:
            system.drain()
        if wait:
            system.clock.time_s += 7.0
            system.drain()
    system.drain()
    system.aggregator.finish()
    found = contributors(system)
    version = system.store.head().version
    whole = [update_id for made in (found[v][1] for v in sorted(found)) for update_id in made]
    assert whole == ids[: buffer_size * version]
    for v, (parent, made) in found.items():
        assert parent == max([0, *(other for other in found if other < v)])
        assert len(made) == buffer_size * (v - parent)


def test_a_contribution_says_who_how_stale_and_how_much():
    system = System(buffer_size=2, staleness="polynomial(1)", versions_kept=99)
    for seed, (client, base) in enumerate([("a", 0), ("b", 0), ("a", 0), ("c", 1)]):
        system.publish(weights(seed), update_id=f"{client}/i/{seed}", base_version=base, num_samples=10 + seed)
        system.drain()
    _, made = made_of(reversed(system.store.ledger), 2)
    assert [(c.client, c.update_id, c.staleness, c.weight, c.num_samples) for c in made] == [
        ("a", "a/i/2", 1, 0.5, 12), ("c", "c/i/3", 0, 1.0, 13),
    ]  # fmt: skip


def test_a_rollback_has_no_contributors_and_the_next_version_only_its_own():
    system = System(buffer_size=2, versions_kept=99)
    for seed in range(5):
        system.publish(weights(seed), update_id=f"a/i/{seed}")
        system.drain()
    system.clock.time_s += 60
    system.drain()  # a/i/4 waits in the open buffer, and goes
    roll_back(system.store, 1, JOB, lambda: 0.0, 0.0)
    for seed in range(5, 7):
        system.publish(weights(seed), update_id=f"a/i/{seed}")
        system.drain()
    found = contributors(system)
    assert found[3] == (2, []), "what was buffered did not make it"
    assert found[4] == (3, ["a/i/5", "a/i/6"])


def test_a_ledger_that_does_not_reach_back_says_so():
    system = System(buffer_size=2, versions_kept=99)
    for seed in range(8):
        system.publish(weights(seed), update_id=f"a/i/{seed}")
        system.drain()
    ledger = list(reversed(system.store.ledger))
    assert made_of(ledger[:1], 4) == (None, None)
    assert made_of(ledger[:2], 4)[1] is None, "the rest of its updates may stand before"
    assert [c.update_id for c in made_of(ledger[:3], 4)[1]] == ["a/i/6", "a/i/7"]
    assert made_of([], 0) == (None, ())


# --- numbers and names


def test_metrics_of_a_class_come_behind_the_others():
    meta = {f"evaluation:{name}": "0.5" for name in ("accuracy_class_0", "accuracy", "loss", "accuracy_class_1", "f1")}
    found = evaluation_of(meta | {"updates": "3"})
    assert list(found) == ["accuracy", "f1", "loss", "accuracy_class_0", "accuracy_class_1"]
    assert metrics(found, 2) == "accuracy 0.5, f1 0.5, +3 more"
    assert metrics(found, 5).endswith("accuracy_class_1 0.5")
    assert metrics({}, 2) == ""


@pytest.mark.parametrize(
    ("seconds", "text"), [(-3, "0 s"), (0.4, "0 s"), (59, "59 s"), (61, "1 min"), (7200, "2 h"), (200_000, "2 d")]
)
def test_a_duration_is_short(seconds, text):
    assert lasting(seconds) == text


@pytest.mark.parametrize(
    ("text", "guard"),
    [
        ("accuracy>=0.94", ("accuracy", ">=", 0.94)),
        (" loss < 1e-1 ", ("loss", "<", 0.1)),
        ("a_b<=-2", ("a_b", "<=", -2)),
    ],
)
def test_a_guard_is_read(text, guard):
    assert read_guard(text) == guard


@pytest.mark.parametrize("text", ["", "accuracy", "accuracy=0.9", "accuracy>=", ">=0.9", "a>=b", "a>=0.9 b<=1"])
def test_what_is_no_guard_is_refused(text):
    with pytest.raises(SettingsError, match="say for example"):
        read_guard(text)


@pytest.mark.parametrize("name", ["a.b", "", "x" * 65, "ü", "17", "newest", "a b"])
def test_what_cannot_be_a_tag_is_refused(name):
    with pytest.raises(SettingsError, match=re.escape(repr(name))):
        check_tag(name)


def test_many_versions_in_a_message_are_cut_short():
    assert listed([1, 2]) == "[1, 2]"
    assert listed(range(500)) == "500, from 0 to 499; the newest are " + str(list(range(490, 500)))


# --- watching


class Watched:
    """A store whose looks go as told: a version, or no answer."""

    def __init__(self, *heads, tags=()):
        self.heads, self.tags, self.evaluated, self.newest = list(heads), list(tags), {}, 9
        self.failing = []  # reads of facts: how many of them find no server

    def head(self):
        version = self.heads.pop(0)
        if version is None:
            raise StoreUnavailable("Redis is away")
        self.newest = version
        return Head(version, version, "", "", 3, 1, 0.0)

    def versions(self):
        return [StoredVersion(version, 1000.0 + version) for version in range(self.newest + 1)]

    def meta(self, version):
        if self.failing and self.failing.pop(0):
            raise StoreUnavailable("Redis is away")
        return {"revision": "-1", "sha256": "abc", "updates": "2"} | self.evaluated.get(version, {})

    def tagged(self, name):
        return self.tags.pop(0)


def watch_of(monkeypatch, store, looks, **wanted):
    """Watch for so many looks; return what it ran the command for, and how long it rested."""
    ran, rests = [], []

    def rest(seconds):
        rests.append(seconds)
        if len([each for each in rests if each == 0.5]) == looks:
            raise KeyboardInterrupt

    monkeypatch.setattr(watch, "opened", lambda settings: store)
    monkeypatch.setattr(
        watch, "run", lambda execute, settings, version, tag, sha256: ran.append((version, tag, sha256))
    )
    monkeypatch.setattr(watch.time, "sleep", rest)
    with pytest.raises(KeyboardInterrupt):
        watch.command(Settings(job=JOB), wanted.get("tag"), "deploy", 0.5)
    return ran, rests


def told(capsys):
    """Return the printed lines without their times."""
    return [line[20:].partition(": made")[0] for line in capsys.readouterr().out.splitlines()]


def test_a_watcher_outlives_its_store_and_tells_when_a_job_was_set_back(monkeypatch, capsys):
    store = Watched(2, 2, 4, None, None, 4, 6, 3, 3, 4)
    ran, rests = watch_of(monkeypatch, store, 10)
    assert told(capsys) == [
        "version 2", "version 3", "version 4", "Redis is away; going on when it answers", "version 5", "version 6",
        "the job was set back from version 6 to version 3", "version 3", "version 4",
    ]  # fmt: skip
    assert ran == [(version, "", "abc") for version in (2, 4, 6, 3, 4)], "the newest of those that came together"
    assert rests.count(watch.RETRY_S) == 2


def test_a_watcher_of_a_tag_waits_for_it_and_follows_it_back(monkeypatch, capsys):
    store = Watched(tags=[None, None, 5, 5, 3, None, 3])
    ran, _ = watch_of(monkeypatch, store, 6, tag="production")
    assert told(capsys) == [
        f"job {JOB} has no tag production yet: waiting for it", "tag production is version 5",
        "tag production is version 3, it was version 5", "tag production was removed; it was version 3",
        "tag production is version 3",
    ]  # fmt: skip
    assert ran == [(version, "production", "abc") for version in (5, 3, 3)]


@pytest.mark.parametrize("lost", range(6))
def test_a_store_that_is_lost_at_any_read_costs_no_deployment(monkeypatch, capsys, lost):
    store = Watched(tags=[5, 5, 5, 7, 7, 7, 7])
    store.failing = [False] * lost + [True]
    ran, _ = watch_of(monkeypatch, store, 6, tag="production")
    assert [version for version, *_ in ran] == [5, 7]
    lines = told(capsys)
    assert lines.count("tag production is version 5") == 1
    assert lines.count("tag production is version 7, it was version 5") == 1


def test_an_evaluation_is_told_when_it_comes_and_once(monkeypatch, capsys):
    store = Watched(1, 1, 1, 1)
    inner = store.head

    def head():
        if len(store.heads) == 2:
            store.evaluated[1] = {"evaluation:accuracy": "0.5"}
        return inner()

    store.head = head
    watch_of(monkeypatch, store, 4)
    assert told(capsys) == ["version 1", "version 1: accuracy 0.5"]


# --- differences


def two():
    rng = np.random.default_rng(0)
    tensors = {
        "w": rng.standard_normal((50, 30), np.float32), "zero": np.zeros(4, np.float32),
        "half": rng.standard_normal(9).astype(np.float16), "steps": np.array([3, 2**60], np.int64),
    }  # fmt: skip
    other = {name: array.copy() for name, array in tensors.items()}
    other["w"][3] += 0.5
    other["zero"][1] = 2
    other["steps"][0] = 7
    return ModelImage.of(tensors), ModelImage.of(other)


def test_differences_are_those_of_float64(monkeypatch):
    monkeypatch.setattr(diff, "BLOCK", 7)
    a, b = two()
    found = {each.name: each for each in diff.compare(a, b)}
    assert list(found) == ["w", "zero", "half", "steps", diff.WHOLE]
    for name, each in found.items():
        x, y = ((m.weights if name == diff.WHOLE else m.tensors()[name]).astype(np.float64).reshape(-1) for m in (a, b))
        assert (each.elements, each.changed) == (x.size, np.count_nonzero(x != y))
        assert each.l2 == pytest.approx(np.linalg.norm(y - x))
        assert each.max_abs == np.abs(y - x).max()
        if name != "zero":
            assert each.relative == pytest.approx(np.linalg.norm(y - x) / np.linalg.norm(x))
            assert each.cosine == pytest.approx(x @ y / np.linalg.norm(x) / np.linalg.norm(y))
    assert np.isnan(found["zero"].relative) and np.isnan(found["zero"].cosine), "of nothing there is no share"
    assert (found["half"].l2, found["half"].cosine) == (0, pytest.approx(1))


# --- files


class Full(io.BytesIO):
    """A file on a disk without room."""

    def write(self, data):
        raise OSError(errno.ENOSPC, "No space left on device")


def write_as(suffix, image, task=None):
    file = io.BytesIO()
    formats.FORMATS[suffix](file, image, task)
    return file.getvalue()


def test_safetensors_are_the_bytes_of_the_store():
    image, _ = two()
    data = write_as(".safetensors", image)
    assert data == image.data.tobytes()
    assert set(safetensors.numpy.load(data)) == set(image.tensors())


def test_a_state_dict_is_of_plain_tensors():
    image, _ = two()
    state = torch.load(io.BytesIO(write_as(".pt", image)), weights_only=True)
    assert state.keys() == image.tensors().keys()
    for name, array in image.tensors().items():
        assert state[name].dtype == torch.from_numpy(np.array(array)).dtype
        np.testing.assert_array_equal(state[name].numpy(), array)


def test_npz_holds_the_same_arrays():
    image, _ = two()
    with np.load(io.BytesIO(write_as(".npz", image))) as arrays:
        assert set(arrays) == set(image.tensors())
        for name, array in image.tensors().items():
            np.testing.assert_array_equal(arrays[name], array)


@pytest.mark.parametrize("name", ["digits", "mnist", "shakespeare"])
def test_an_onnx_graph_gives_what_the_module_gives(name, capfd):
    task = Task.load(name, needs=("build", "example_input"))
    module, example = task.build(), task.example_input()
    image = read(module)
    image.weights[:] = np.random.default_rng(0).standard_normal(image.weights.size).astype(np.float32) * 0.2
    graph = onnx.load_from_string(write_as(".onnx", image, task))
    onnx.checker.check_model(graph)
    write(module, image)
    torch.manual_seed(1)
    rows = (5, *example.shape[1:])  # another number of rows than the example has
    inputs = torch.randn(rows) if example.is_floating_point() else torch.randint(0, 60, rows)
    expected = module.eval()(inputs).detach().numpy()
    [found] = onnx.reference.ReferenceEvaluator(graph).run(None, {graph.graph.input[0].name: inputs.numpy()})
    assert np.abs(expected).max() > 0.1
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * max(1.0, float(np.abs(expected).max())))
    assert capfd.readouterr() == ("", ""), "the exporter keeps quiet"


def task_of(tmp_path, text):
    (tmp_path / "mine.py").write_text("import numpy as np\nimport torch\n" + text)
    return Task.load(str(tmp_path / "mine.py"), needs=("build", "example_input"))


@pytest.mark.parametrize(
    ("text", "error", "words"),
    [
        ("def build(): return {'w': np.zeros(3)}\ndef example_input(): return torch.zeros(2, 3)\n", SettingsError,
         "builds arrays, not a torch module"),
        ("def build(): return torch.nn.Linear(3, 2)\ndef example_input(): return torch.zeros(2, 3)\n", SettingsError,
         "does not fit this job: tensor"),
        ("def build(): return torch.nn.Linear(64, 10)\ndef example_input(): return [1, 2]\n", TaskError,
         "must return a tensor or a tuple of them"),
        ("def build(): return torch.nn.Linear(64, 10)\ndef example_input(): return torch.zeros(2, 3)\n", TaskError,
         "cannot be exported as ONNX"),
        ("def build(): return torch.nn.Linear(64, 10)\ndef example_input(): return 1 / 0\n", TaskError,
         "raised ZeroDivisionError"),
    ],
    ids=["arrays", "other model", "no tensor", "wrong shape", "raises"],
)  # fmt: skip
def test_a_task_that_gives_no_graph_is_named(tmp_path, text, error, words):
    image = read(torch.nn.Linear(64, 10))
    with pytest.raises(error, match=words) as caught:
        write_as(".onnx", image, task_of(tmp_path, text))
    assert "\n" not in str(caught.value)


def test_a_module_with_two_inputs_is_exported(tmp_path):
    task = task_of(
        tmp_path,
        "class Two(torch.nn.Module):\n"
        "    def __init__(self):\n        super().__init__()\n        self.a = torch.nn.Linear(3, 2)\n"
        "    def forward(self, x, scale):\n        return self.a(x) * scale\n"
        "def build(): return Two()\n"
        "def example_input(): return torch.zeros(1, 3), torch.tensor(2.0)\n",
    )
    module = task.build()
    graph = onnx.load_from_string(write_as(".onnx", read(module), task))
    x = np.ones((1, 3), np.float32)
    names = [each.name for each in graph.graph.input]
    [found] = onnx.reference.ReferenceEvaluator(graph).run(None, dict(zip(names, (x, np.float32(3)), strict=True)))
    write(task.build(), read(module))
    np.testing.assert_allclose(
        found, 3 * (x @ module.a.weight.detach().numpy().T + module.a.bias.detach().numpy()), 1e-5
    )


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".npz"])
@pytest.mark.parametrize("there", [False, True])
def test_a_full_disk_leaves_nothing_and_what_was_there(tmp_path, monkeypatch, suffix, there):
    path, (image, _) = tmp_path / f"model{suffix}", two()
    if there:
        path.write_text("before")
    with pytest.raises(SettingsError, match=rf"cannot write .*model{suffix}: No space left on device"):
        export._write(path, lambda _: formats.FORMATS[suffix](Full(), image, None), force=True)
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == ([(path.name, "before")] if there else [])


def test_a_file_that_appears_meanwhile_is_not_written_over(tmp_path):
    path = tmp_path / "model.npz"
    with pytest.raises(SettingsError, match="exists"):
        export._write(path, lambda file: path.write_text("theirs"), force=False)
    assert [p.name for p in tmp_path.iterdir()] == ["model.npz"] and path.read_text() == "theirs"


def test_an_extra_that_is_missing_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "onnxscript", None)
    with pytest.raises(SettingsError, match=re.escape("this format needs onnxscript: pip install 'fedmq[onnx]'")):
        write_as(".onnx", two()[0], None)


def test_records_are_json():
    assert json.loads(json.dumps(diff._record(1, 2, diff.compare(*two()), [{"loss": 1.0}, {}])))["tensors"][1] == {
        "name": "zero", "elements": 4, "changed": 1, "l2": 2.0, "relative": None, "max_abs": 2.0, "cosine": None,
    }  # fmt: skip
