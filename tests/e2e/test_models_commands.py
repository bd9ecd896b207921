"""`fedmq models` as it is typed: what it prints, also in 80 columns, what it leaves, one message for each mistake."""

import json
import re
import resource
import signal
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import onnx
import onnx.reference
import pytest
import safetensors.numpy
import torch

from shared.command import DONE, FAILED, INTERRUPTED, UNREACHABLE, USAGE
from shared.model_image import ModelImage
from shared.store.redis import RedisStore
from shared.store.redis_versions import RedisVersions
from tests.contract.faults import wait_until
from tests.contract.stores import commit_of, state_of
from tests.e2e.conftest import clean_environment
from tests.e2e.test_commands import FEDMQ, Command, assert_refused, fedmq, urls

__all__ = ["fedmq", "urls"]

STATE = state_of(buffer=[], since=0.0, floor=0, totals={}, partial={}, facts_of="fedbuff", facts={}, rule="fedbuff")
METRICS = {"accuracy": 0.75, "loss": 2.0, "accuracy_class_0": 1.0}


def image_of(value):
    return ModelImage.of({"w": np.full((4, 3), value, np.float32), "steps": np.array([7], np.int64)})


def entry_of(client, sequence, met, staleness=0):
    return {
        "id": f"{client}/i/{sequence}", "outcome": "applied", "base_version": met - staleness, "staleness": staleness,
        "weight": 1 / (1 + staleness), "version": met, "num_samples": 10 * (sequence + 1), "bytes": 100,
    }  # fmt: skip


@pytest.fixture
def made(servers, job):
    """Make a job with versions 0 to 5, two updates each; return its store."""
    store = RedisVersions(servers.redis.url, job)
    store.create(image_of(0), time.time() - 8 * 86_400)
    for version in range(1, 6):
        told = [entry_of("cam-1", version, version - 1), entry_of("cam-2", version, version - 1, min(1, version - 1))]
        age_s = (6 - version) * 86_400  # a day between two
        store.commit(
            commit_of(
                version - 1, version, image_of(version), ledger=json.dumps(told), now=time.time() - age_s, state=STATE
            )
        )  # fmt: skip
    store.record_evaluation(4, METRICS)
    store.record_evaluation(5, METRICS | {"accuracy": 0.5})
    store.announce({
        "rule": "fedbuff", "codec": "int8 | zstd", "buffer_size": 2, "staleness_max": 10, "staleness": "constant",
    })  # fmt: skip
    yield store
    store.close()


def versions(store):
    return [entry.version for entry in store.versions()]


def refusals(folder, commands, variables):
    """Run commands, four at a time; return their answers in order."""
    with ThreadPoolExecutor(4) as pool:
        return list(pool.map(lambda words: Command(folder, "models", *words, **variables).finish(60), commands))


# --- looking


def test_a_list_fits_80_columns_with_a_line_for_each_version(fedmq, urls, made, monkeypatch):
    for name, version in (("production", 2), ("canary", 5)):
        made.tag(name, version, time.time())
    monkeypatch.setenv("COLUMNS", "80")
    environment = clean_environment({f"FEDMQ_{k.upper()}": v for k, v in urls.items()}) | {"COLUMNS": "80"}
    done = subprocess.run([FEDMQ, "models", "list"], capture_output=True, text=True, env=environment, check=True)
    lines = [line.rstrip() for line in done.stdout.splitlines()]
    assert max(map(len, lines)) <= 80, done.stdout
    sha256 = made.model(2).sha256
    assert re.fullmatch(rf" +2  4 d +2 by 2   0.5/1  +production  {sha256[:7]}", lines[-4]), done.stdout
    assert re.fullmatch(r" +4  2 d +2 by 2   0.5/1  accuracy 0.75, \+2 more +\w{7}", lines[-2]), done.stdout
    assert re.fullmatch(r" +5  1 d +2 by 2   0.5/1  accuracy 0.5, \+2 more +canary +\w{7}", lines[-1]), done.stdout
    assert len(lines) == 3 + 6


def test_list_and_show_say_all_in_json(fedmq, urls, made):
    made.tag("production", 5, time.time())
    answer = fedmq("models", "list", "--json", **urls)
    assert (answer.code, answer.err) == (DONE, "")
    found = json.loads(answer.out)
    assert [each["version"] for each in found] == [0, 1, 2, 3, 4, 5]
    assert found[5] == {
        "version": 5, "created_at": pytest.approx(time.time() - 86_400, abs=600), "updates": 2, "contributors": 2,
        "staleness_mean": 0.5, "staleness_max": 1, "evaluation": METRICS | {"accuracy": 0.5},
        "tags": ["production"], "sha256": made.model(5).sha256,
    }  # fmt: skip
    assert (found[0]["updates"], found[0]["contributors"], found[0]["staleness_mean"]) == (0, 0, None)
    whole = json.loads(fedmq("models", "show", "production", "--json", **urls).out)
    assert whole.items() >= found[5].items()
    assert (whole["parent"], whole["revision"], whole["rule"], whole["codec"]) == (4, 5, "fedbuff", "int8 | zstd")
    assert whole["contributions"][1] == {
        "client": "cam-2", "update_id": "cam-2/i/5", "staleness": 1, "weight": 0.5, "num_samples": 60,
    }  # fmt: skip
    assert whole["tensors"][0] == {"name": "w", "shape": [4, 3], "dtype": "float32", "policy": "average"}


def test_show_says_who_contributed(fedmq, urls, made):
    answer = fedmq("models", "show", "4", **urls)
    assert (answer.code, answer.err) == (DONE, "")
    for line in (
        "version: 4", "made from: version 3", "updates: 2 of 2 clients", "staleness: 0.5 on average, at most 1",
        "evaluation: accuracy 0.75, loss 2, accuracy_class_0 1", f"sha256: {made.model(4).sha256}",
    ):  # fmt: skip
        assert line in answer.out
    assert re.search(r"cam-2 +│ i/4 +│ +1 +│ +0.5 +│ +50 ", answer.out), answer.out


def test_a_difference_is_shown_tensor_by_tensor(fedmq, urls, made):
    made.tag("production", 4, time.time())
    answer = fedmq("models", "diff", "production", "newest", **urls)
    assert (answer.code, answer.err) == (DONE, "")
    assert "version 5 against version 4" in answer.text
    assert re.search(r"│ w +│ +100 % │ +3.464 │ +0.25 │ +1 │ +1 │", answer.out), answer.out
    assert re.search(r"│ steps +│ +0 % │ +0 │ +0 │ +0 │ +1 │", answer.out), answer.out
    assert re.search(r"│ accuracy +│ +0.75 │ +0.5 │ +-0.25 │", answer.out), answer.out
    found = json.loads(fedmq("models", "diff", "0", "5", "--json", **urls).out)
    assert (found["a"], found["b"], found["all"]["l2"]) == (0, 5, pytest.approx(5 * 12**0.5))
    assert found["tensors"][0]["relative"] is None
    assert found["evaluation"] == {"a": {}, "b": METRICS | {"accuracy": 0.5}}


# --- tags


def test_a_version_is_tagged_promoted_and_untagged(fedmq, urls, made, job):
    def said(*words, code=DONE):
        answer = fedmq("models", *words, **urls)
        assert answer.code == code, answer
        return answer.text

    assert f"job {job} has no tags: `fedmq models tag NAME VERSION --job {job}` sets one" in said("tag")
    assert f"tag production of job {job} is version 3 now; it was not set before" in said("tag", "production", "3")
    assert "tag canary" in said("tag", "canary", "newest")
    refused = said("promote", "canary", "production", "--if-metric", "accuracy>=0.94", code=FAILED)
    assert "accuracy of version 5 is 0.5, not >= 0.94: nothing was promoted" in refused
    assert made.tagged("production") == 3
    assert "is version 5 now; it was version 3 before" in said(
        "promote", "canary", "production", "--if-metric", "loss<=2"
    )
    assert "is version 5 already" in said("promote", "canary", "production")
    assert "is version 4 now; it was version 5 before" in said("tag", "canary", "4")
    assert re.search(r"canary │ 4 │ [\d-]+ [\d:]+, \d+ s ago │ 5 ", said("tag"))
    assert "tag canary of job" in said("tag", "canary", "--delete")
    history = said("tag", "--history")
    assert re.search(r"production │ 3 │ │ .* canary │ 5 │ │ .* production │ 5 │ 3 │ .* canary │ removed │ 4 │", history)
    changes = json.loads(said("tag", "--history", "--json"))
    assert [(each["tag"], each["version"], each["previous"]) for each in changes] == [
        ("production", 3, None), ("canary", 5, None), ("production", 5, 3), ("canary", 4, 5), ("canary", None, 4),
    ]  # fmt: skip
    assert [(each["tag"], each["version"]) for each in json.loads(said("tag", "--json"))] == [("production", 5)]


def test_a_backup_brings_tags_back_and_a_rollback_goes_to_one(fedmq, urls, made, job, servers, tmp_path):
    made.tag("production", 2, 100.0)
    made.tag("production", 3, 200.0)
    assert fedmq("backup", "job.fedmq", **urls).code == DONE
    made.untag("production", 300.0)
    assert fedmq("restore", "job.fedmq", "--job", f"{job}-2", store_url=urls["store_url"]).code == DONE
    other = RedisVersions(servers.redis.url, f"{job}-2")
    assert other.tagged("production") == 3
    assert [(change.at, change.version) for change in other.tag_changes()] == [(100.0, 2), (200.0, 3)]
    assert other.drop([2, 3]) == [2], "it protects there as well"
    answer = fedmq("models", "rollback", "production", **(urls | {"job": f"{job}-2"}))
    assert answer.code == DONE and "has the weights of 3" in answer.text
    assert np.all(other.model(6).weights == 3)
    other.close()


# --- dropping


def test_versions_are_pruned_by_count_age_and_tag(fedmq, urls, made):
    made.tag("production", 1, time.time())
    answer = fedmq("models", "prune", "--keep", "2", "--older-than", "3.5d", "--dry-run", **urls)
    assert (answer.code, answer.err) == (DONE, "")
    assert "tagged, so they stay: 1 (production)" in answer.text
    assert "would drop 2 versions: [0, 2]" in answer.text
    assert versions(made) == [0, 1, 2, 3, 4, 5]
    assert_refused_after(fedmq("models", "prune", "--keep", "3", **urls), "would drop 2 versions for good", "say --yes")
    assert versions(made) == [0, 1, 2, 3, 4, 5]
    answer = fedmq("models", "prune", "--keep", "3", "--yes", **urls)
    assert (answer.code, answer.err) == (DONE, "")
    assert "dropped 2 versions: [0, 2]" in answer.text
    assert versions(made) == [1, 3, 4, 5]
    assert "nothing may go" in fedmq("models", "prune", "--keep", "3", "--yes", **urls).text
    assert fedmq("models", "prune", "--older-than", "0s", "--yes", **urls).code == DONE
    assert versions(made) == [1, 5], "never the newest, never what has a tag"


def assert_refused_after(answer, *parts):
    """Check that a command said what it saw, and then why it does nothing."""
    assert answer.code == USAGE, answer
    assert answer.err.count("fedmq: ") == 1 and "Traceback" not in answer.err, answer
    for part in parts:
        assert part in answer.text, answer


def test_fedasync_works_on_while_its_versions_are_pruned(fedmq, processes, urls, job, task, servers):
    """What updates were trained from within staleness_max stays, and the aggregator notices nothing."""
    store = RedisVersions(servers.redis.url, job)
    assert fedmq("models", "init", task, **urls).code == DONE
    aggregator = processes.start(
        "aggregator", rule="fedasync", staleness_max=4, versions_kept=50, commit_interval_s=0.05, **urls
    )
    worker = processes.start(
        "worker", task=task, client_id="w", state_dir="state", task_settings="sleep_s=0.05", **urls
    )
    for _ in range(3):
        seen = store.head().version
        wait_until(lambda seen=seen: store.head().version >= seen + 8, 60, aggregator.log)
        answer = fedmq("models", "prune", "--keep", "1", "--yes", **urls)
        assert answer.code == DONE, answer
        newest = int(re.search(r"the newest is (\d+)", answer.text)[1])
        bound = re.search(r"rule needs them, so they stay: \[(.*?)\]", answer.text)[1].split(", ")
        assert set(range(newest - 4, newest)) >= {int(version) for version in bound} > set()
        assert min(versions(store)) >= newest - 4
    seen = store.head().version
    wait_until(lambda: store.head().version >= seen + 4, 60, aggregator.log)
    assert store.totals().keys() == {"applied"}, store.totals()
    assert worker.popen.poll() is None and aggregator.terminate() == DONE
    store.close()


def test_the_aggregator_keeps_a_tagged_version_as_long_as_it_is(fedmq, processes, urls, job, task, servers):
    store = RedisVersions(servers.redis.url, job)
    assert fedmq("models", "init", task, **urls).code == DONE
    aggregator = processes.start(
        "aggregator", buffer_size=1, staleness="constant", versions_kept=2, commit_interval_s=0, **urls
    )
    processes.start("worker", task=task, client_id="w", state_dir="state", task_settings="sleep_s=0.05", **urls)
    wait_until(lambda: store.head().version >= 2, 60, aggregator.log)
    assert fedmq("models", "tag", "production", "newest", **urls).code == DONE
    tagged = store.tagged("production")
    wait_until(lambda: store.head().version >= tagged + 6, 60, aggregator.log)
    found = versions(store)
    assert found[0] == tagged and len(found) == 3
    assert np.all(store.model(tagged).weights == tagged)
    assert fedmq("models", "tag", "production", "--delete", **urls).code == DONE
    wait_until(lambda: tagged not in versions(store), 60, aggregator.log)
    store.close()


# --- files


def test_a_version_becomes_each_kind_of_file(fedmq, urls, made, tmp_path):
    (tmp_path / "mine.py").write_text(
        "import torch\n\nclass Mine(torch.nn.Module):\n    def __init__(self):\n        super().__init__()\n"
        "        self.w = torch.nn.Parameter(torch.zeros(4, 3))\n"
        "        self.register_buffer('steps', torch.tensor([7]))\n"
        "    def forward(self, x):\n        return x @ self.w.T\n\n"
        "def build():\n    return Mine()\n\ndef example_input():\n    return torch.zeros(2, 3)\n"
    )
    made.tag("production", 5, time.time())
    sha256 = made.model(5).sha256
    for name, words in (("m.safetensors", ["--with-metadata"]), ("deep/m.pt", []), ("m.npz", []),
                        ("m.onnx", ["--task", "mine.py"])):  # fmt: skip
        answer = fedmq("models", "export", name, "--version", "production", *words, **urls)
        assert (answer.code, answer.err) == (DONE, ""), answer
        assert f"to {name}: {(tmp_path / name).stat().st_size:,} bytes, sha256 " in answer.text
    assert (tmp_path / "m.safetensors").read_bytes() == made.model(5).data.tobytes()
    assert np.all(safetensors.numpy.load_file(tmp_path / "m.safetensors")["w"] == 5)
    told = json.loads((tmp_path / "m.safetensors.json").read_text())
    assert (told["sha256"], told["file_sha256"], told["version"], told["tags"]) == (sha256, sha256, 5, ["production"])
    assert told["evaluation"]["accuracy"] == 0.5
    state = torch.load(tmp_path / "deep/m.pt", weights_only=True)
    assert state["w"].tolist() == np.full((4, 3), 5).tolist() and state["steps"].tolist() == [7]
    with np.load(tmp_path / "m.npz") as arrays:
        assert np.all(arrays["w"] == 5)
    graph = onnx.load(tmp_path / "m.onnx")
    x = np.random.default_rng(0).standard_normal((7, 3)).astype(np.float32)
    [found] = onnx.reference.ReferenceEvaluator(graph).run(None, {graph.graph.input[0].name: x})
    np.testing.assert_allclose(found, x @ np.full((3, 4), 5, np.float32), rtol=0, atol=1e-5)

    assert_refused(
        fedmq("models", "export", "m.npz", **urls), USAGE, "m.npz exists: choose another name, or say --force"
    )
    assert fedmq("models", "export", "m.npz", "--version", "1", "--force", **urls).code == DONE
    with np.load(tmp_path / "m.npz") as arrays:
        assert np.all(arrays["w"] == 1)
    left = {
        str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file() and "pycache" not in str(path)
    }
    assert left == {"m.safetensors", "m.safetensors.json", "deep/m.pt", "m.npz", "m.onnx", "mine.py"}


@pytest.mark.parametrize("suffix", ["safetensors", "pt", "npz"])
def test_a_disk_without_room_is_named_and_nothing_is_left(urls, job, servers, tmp_path, suffix):
    store = RedisStore(servers.redis.url, job)
    store.create(ModelImage.of({"w": np.zeros(300_000, np.float32)}), time.time())
    store.close()

    def small_disk():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, 500_000))

    done = subprocess.run(
        [FEDMQ, "models", "export", f"m.{suffix}"], cwd=tmp_path, capture_output=True, text=True, preexec_fn=small_disk,
        env=clean_environment({f"FEDMQ_{k.upper()}": v for k, v in urls.items()}), timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == USAGE, done
    assert re.fullmatch(rf"fedmq: cannot write m\.{suffix}: .*\n", done.stderr), done
    assert list(tmp_path.iterdir()) == []


# --- init


def test_init_if_missing_leaves_a_model_of_the_same_layout(fedmq, urls, job, task, tmp_path, servers):
    assert "version 0 of job" in fedmq("models", "init", task, "--if-missing", **urls).text
    before = RedisStore(servers.redis.url, job).head()
    answer = fedmq("models", "init", task, "--if-missing", **urls)
    assert (answer.code, answer.err) == (DONE, "")
    assert f"job {job} is at version 0 already: 12 parameters" in answer.text
    assert RedisStore(servers.redis.url, job).head() == before
    (tmp_path / "wide.py").write_text(task.read_text().replace("(4, 3)", "(4, 5)"))
    assert_refused(
        fedmq("models", "init", "wide.py", "--if-missing", **urls), USAGE,
        f"job '{job}' has a model of another layout: tensor 'w' is (4, 5) float32 here, (4, 3) float32 in the job",
    )  # fmt: skip


# --- watching


def test_a_watcher_tells_of_each_version_and_deploys_the_tagged_one(made, urls, tmp_path, job):
    words = ["models", "watch", "--poll-s", "0.05"]
    script = 'echo "$FEDMQ_JOB $FEDMQ_TAG $FEDMQ_VERSION $FEDMQ_SHA256" >> deployed; test "$FEDMQ_VERSION" != 2'
    every, tagged = Started(tmp_path, *words, **urls), None
    made.tag("production", 1, time.time())
    tagged = Started(tmp_path, *words, "--tag", "production", "--exec", script, **urls)
    every.wait_for("version 5: made ")
    assert "accuracy 0.5, loss 2, +1 more" in every.said()
    deployed = tmp_path / "deployed"
    wait_until(lambda: deployed.exists() and len(deployed.read_text().splitlines()) == 1, 30, tagged.said)
    tagged.wait_for("version 1: the command is done")

    told = [entry_of("cam-1", 9, 5)]
    made.commit(commit_of(5, 6, image_of(6), ledger=json.dumps(told), now=time.time()))
    every.wait_for("version 6: made ")
    assert re.search(r"version 6: made [\d: -]+; 1 updates of 1 clients; staleness 0, at most 0\n", every.said())
    made.record_evaluation(6, {"accuracy": 0.875})
    every.wait_for("version 6: accuracy 0.875\n")
    made.tag("production", 2, time.time())
    tagged.wait_for("tag production is version 2, it was version 1")
    tagged.wait_for("version 2: the command FAILED with exit code 1")
    made.untag("production", time.time())
    tagged.wait_for("tag production was removed; it was version 2")
    assert deployed.read_text().splitlines() == [
        f"{job} production {version} {made.model(version).sha256}" for version in (1, 2)
    ]
    for watcher in (every, tagged):
        answer = watcher.interrupt()
        assert answer.code == INTERRUPTED and answer.err.endswith("fedmq: interrupted\n"), answer
        assert "Traceback" not in answer.err


def test_a_command_of_a_watcher_may_be_one_of_fedmqs(made, urls, tmp_path):
    made.tag("production", 3, time.time())
    script = f"{FEDMQ} models export now.safetensors --force --version $FEDMQ_VERSION"
    here = {"store_url": urls["store_url"]}
    watcher = Started(
        tmp_path, "models", "watch", "--job", urls["job"], "--tag", "production", "--exec", script, "--poll-s", "0.05",
        **here,
    )  # fmt: skip
    watcher.wait_for("version 3: the command is done")
    assert np.all(safetensors.numpy.load_file(tmp_path / "now.safetensors")["w"] == 3)
    assert watcher.interrupt().code == INTERRUPTED


class Started(Command):
    """A command that goes on; its output is a file."""

    def __init__(self, folder, *arguments, **variables):
        self.arguments = tuple(map(str, arguments))
        given = {f"FEDMQ_{name.upper()}": str(value) for name, value in variables.items()}
        self._out = folder / f"out-{time.monotonic_ns()}"
        self.popen = subprocess.Popen(
            [FEDMQ, *self.arguments], cwd=folder, env=clean_environment(given), stdin=subprocess.DEVNULL,
            stdout=self._out.open("w"), stderr=subprocess.PIPE, text=True, start_new_session=True,
        )  # fmt: skip

    def said(self):
        return self._out.read_text()

    def wait_for(self, text):
        wait_until(lambda: text in self.said(), 30, self.said)

    def interrupt(self):
        self.popen.send_signal(signal.SIGINT)
        return self.answer()


# --- mistakes


def test_each_mistake_is_one_clear_message(made, urls, tmp_path, job):
    made.tag("production", 4, time.time())
    (tmp_path / "plain.py").write_text("def build():\n    pass\n")
    stored = "stored are [0, 1, 2, 3, 4, 5]"
    mistakes = {
        ("show", "17"): f"version '17' is not stored; {stored}, or say `newest`",
        ("show", "prod"): f"version 'prod' is no number and no tag (tags: production); {stored}",
        ("diff", "4", "17"): "version '17' is not stored",
        ("diff", "canary", "4"): "version 'canary' is no number and no tag",
        ("tag", "best", "17"): "version '17' is not stored",
        ("tag", "a.b", "4"): "tag 'a.b': must be of [A-Za-z0-9_-]{1,64}",
        ("tag", "17", "4"): "tag '17' would be taken for a version",
        ("tag", "best"): "say `tag NAME VERSION`, `tag NAME --delete`",
        ("tag", "best", "--delete"): f"job '{job}' has no tag 'best'; its tags are production",
        ("tag", "--delete"): "--delete: say which tag",
        ("promote", "canary", "production"): f"job '{job}' has no tag 'canary'; its tags are production",
        ("promote", "production", "production"): "are the same tag",
        ("promote", "production", "best", "--if-metric", "good"): "--if-metric 'good': say for example",
        ("export", "m.h5"): "no format '.h5'; the suffix must be one of .safetensors, .pt",
        ("export", "m.pt", "--version", "17"): "version '17' is not stored",
        ("export", "m.onnx"): "no task: give --task my_task.py",
        ("export", "m.onnx", "--task", "none.py"): "no task 'none.py'",
        ("export", "m.onnx", "--task", "plain.py"): "task plain.py lacks example_input()",
        ("export", "."): "cannot write .: it is a folder",
        ("export", "plain.py/m.pt"): "cannot write plain.py/m.pt: ",
        ("prune",): "say which versions may go: --keep 3, --older-than 7d, or both",
        ("prune", "--older-than", "week"): "'week' is no duration: say for example 90s",
        ("watch", "--tag", "a.b"): "tag 'a.b': must be of",
        ("list", "--job", "nobody"): "job 'nobody' has no model in this store",
        ("tag", "best", "4", "--job", "nobody"): "job 'nobody' has no model in this store",
        ("watch", "--job", "nobody"): "job 'nobody' has no model in this store",
    }
    for words, answer in zip(mistakes, refusals(tmp_path, mistakes, urls), strict=True):
        assert_refused(answer, USAGE, mistakes[words])
    away = {"store_url": "redis://127.0.0.1:1/0"}
    for answer in refusals(tmp_path, [("tag", "best", "4"), ("watch",), ("prune", "--keep", "1")], urls | away):
        assert_refused(answer, UNREACHABLE, "Redis")
    [answer] = refusals(tmp_path, [("promote", "production", "best", "--if-metric", "f1>0")], urls)
    assert_refused(answer, FAILED, "version 4 has no 'f1', so nothing was promoted: its metrics are accuracy, loss")
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "__pycache__") == ["plain.py"]
    assert made.tag_changes()[-1].name == "production"
