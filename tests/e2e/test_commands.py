"""The commands as a user meets them: what they print, their exit codes, and one clear message for each mistake."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from ops.servers import free_port, private_redis
from shared.command import DONE, FAILED, INTERRUPTED, UNREACHABLE, USAGE
from shared.config import AggregatorSettings, EvaluatorSettings, WorkerSettings
from shared.metrics import NAMES
from shared.model_image import ModelImage
from shared.store.redis import RedisStore
from shared.transport.rabbitmq import RabbitSource
from tests.contract.faults import silent_host, unreachable_host, wait_until
from tests.e2e.conftest import NUMPY_TASK, Processes, clean_environment

FEDMQ = Path(sys.executable).with_name("fedmq")
ANSWER_S_MAX = 20.0  # 10 s on an idle machine; these two cores are shared
LAST_LINE = re.compile(
    r"accuracy (\d\.\d{3}) after (\d+) versions, (\d+) updates, (\d+) bytes sent \((\d+\.\d) x smaller than float32\), "
    r"\d+ bytes pulled \(\d+\.\d x smaller\)"
)


@dataclass(frozen=True)
class Answer:
    """What a command said."""

    command: tuple[str, ...]
    code: int | None
    out: str
    err: str

    @property
    def text(self) -> str:
        """Return everything it said on one line, as if the terminal were wide enough."""
        return " ".join((self.out + self.err).split())


class Command:
    """`fedmq ...` with the FEDMQ_ variables given and no others."""

    def __init__(self, folder, *arguments, **variables):
        self.arguments = tuple(str(argument) for argument in arguments)
        given = {f"FEDMQ_{name.upper()}": str(value) for name, value in variables.items()}
        self.popen = subprocess.Popen(
            [FEDMQ, *self.arguments], cwd=folder, env=clean_environment(given), stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    def finish(self, timeout_s=ANSWER_S_MAX):
        """Wait for its end; the code is None if that takes too long."""
        code = None
        try:
            out, err = self.popen.communicate(timeout=timeout_s)
            code = self.popen.returncode
        except subprocess.TimeoutExpired:
            self.popen.kill()
            out, err = self.popen.communicate()
        return Answer(self.arguments, code, out, err)

    def answer(self, timeout_s=ANSWER_S_MAX):
        """Wait for its end, which must come in time."""
        answer = self.finish(timeout_s)
        assert answer.code is not None, f"not at an end after {timeout_s:g} s: {answer}"
        return answer


@pytest.fixture
def fedmq(tmp_path):
    """Return a function that runs a command to its end, in tmp_path."""
    return lambda *arguments, **variables: Command(tmp_path, *arguments, **variables).answer()


@pytest.fixture
def urls(servers, job):
    """Return the settings that lead to the suite's servers, and to a job of this test alone."""
    return {"broker_url": servers.rabbitmq.url, "store_url": servers.redis.url, "job": job}


def assert_refused(answer, code, *parts):
    """Check that a command ended with one message, its last words, that holds all `parts`."""
    assert answer.code == code, answer
    assert "Traceback" not in answer.out + answer.err, answer
    assert not answer.out, answer
    head, mark, message = ("\n" + answer.err).partition("\nfedmq: ")
    assert mark, answer
    assert "\nfedmq: " not in message, answer
    for part in parts:
        assert part in " ".join(message.split()), answer
    assert all(re.match(r"\d{4}-\d\d-\d\d .* (INFO|WARNING) ", line) for line in head.splitlines() if line), answer


# --- settings


def test_every_problem_of_the_settings_stands_in_one_message(fedmq, tmp_path):
    (tmp_path / "fedmq.toml").write_text('prefech = 3\ncommit_age_max_s = "soon"\n')
    answer = fedmq(
        "aggregator", "--job", "a b", config="fedmq.toml", bufer_size=3, codec="gzip", log_level="loud",
        metrics_port=70000, update_bytes_max=1,
    )  # fmt: skip
    assert_refused(
        answer, USAGE, "FEDMQ_BUFER_SIZE: no such setting; did you mean FEDMQ_BUFFER_SIZE?", "FEDMQ_JOB=a b",
        "fedmq.toml: prefech: no such setting; did you mean FEDMQ_PREFETCH?", "FEDMQ_COMMIT_AGE_MAX_S=soon",
        "FEDMQ_CODEC=gzip", "FEDMQ_LOG_LEVEL=loud", "FEDMQ_METRICS_PORT=70000", "FEDMQ_UPDATE_BYTES_MAX=1",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("variables", "parts"),
    [
        ({"alpha": "0.5"}, ["FEDMQ_ALPHA means nothing to FEDMQ_RULE=fedbuff; it belongs to rule fedasync"]),
        (
            {"rule": "fedasync", "server_lr": "1", "commit_interval_s": "60"},
            [
                "FEDMQ_SERVER_LR means nothing to FEDMQ_RULE=fedasync; it belongs to rule fedbuff",
                "FEDMQ_COMMIT_INTERVAL_S=60 exceeds FEDMQ_COMMIT_AGE_MAX_S=30",
            ],
        ),
        ({"rule": "fedsgd"}, ["FEDMQ_RULE=fedsgd", "must be one of fedbuff, fedasync"]),
    ],
    ids=["alpha with fedbuff", "two at once", "no such rule"],
)
def test_settings_that_contradict_each_other_are_refused(fedmq, variables, parts):
    assert_refused(fedmq("aggregator", **variables), USAGE, *parts)


@pytest.mark.parametrize(
    ("text", "part"),
    [(None, "is not there"), ("seed = 1\njob = \n", "line 2"), (b"job = '\xff'\n", "utf-8")],
    ids=["missing", "no value", "not utf-8"],
)
def test_a_settings_file_that_cannot_be_read_is_named(fedmq, tmp_path, text, part):
    if text is not None:
        (tmp_path / "my.toml").write_bytes(text if isinstance(text, bytes) else text.encode())
    assert_refused(fedmq("worker", config="my.toml"), USAGE, "FEDMQ_CONFIG my.toml", part)


def test_a_flag_wins_over_the_environment_and_that_over_the_file(fedmq, tmp_path):
    (tmp_path / "my.toml").write_text('task = "file.py"\nFEDMQ_JOB = "file"\n')
    assert_refused(fedmq("worker", config="my.toml"), USAGE, "no task 'file.py'")
    assert_refused(fedmq("worker", config="my.toml", task="env.py"), USAGE, "no task 'env.py'")
    assert_refused(fedmq("worker", "--task", "flag.py", config="my.toml", task="env.py"), USAGE, "no task 'flag.py'")


def test_task_settings_reach_the_task_from_the_environment(fedmq, tmp_path):
    (tmp_path / "mine.py").write_text("import os\nraise SystemExit(os.environ['FEDMQ_TASK_SETTINGS'])\n")
    answer = fedmq("worker", "--task", "mine.py", task_settings="lr=0.1,epochs=2")  # as the template says
    assert_refused(answer, USAGE, "task mine.py raises on import (line 2): SystemExit: lr=0.1,epochs=2")


@pytest.mark.parametrize(
    "arguments", [["nonsense"], ["worker", "--nonsense"], ["models", "init"], ["demo", "--updates", "x"]]
)
def test_wrong_usage_exits_with_2(fedmq, arguments):
    answer = fedmq(*arguments)
    assert answer.code == USAGE
    assert "Usage:" in answer.err
    assert "Traceback" not in answer.err


@pytest.mark.parametrize(
    ("module", "kind"),
    [("aggregator", AggregatorSettings), ("worker", WorkerSettings), ("evaluator", EvaluatorSettings)],
)
def test_help_lists_every_setting(module, kind, tmp_path):
    command = [FEDMQ, module, "--help"] if module == "evaluator" else [sys.executable, "-m", module, "--help"]
    environment = clean_environment({})
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True, timeout=20
    )
    listed = set(re.findall(r"--(?!no-)([a-z-]+)", done.stdout))
    assert listed - {"help", "config", "check"} == {name.replace("_", "-") for name in kind.model_fields}


# --- the task and the starting model


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        (None, ["no task 'mine.py': neither a file nor a built-in (digits, mnist, "]),
        ("def build():\n    pass\n", ["task mine.py lacks train()"]),
        ("import os\n\nos.no_such_thing\n", ["task mine.py raises on import (line 3): AttributeError"]),
        ("import os\ndef train(model, context)\n    pass\n", ["task mine.py raises on import (line 2): SyntaxError"]),
        ("import no_such_module\n", ["task mine.py raises on import (line 1): ModuleNotFoundError", "no_such_module"]),
    ],
    ids=["no file", "no train", "raises", "syntax", "module"],
)
def test_a_task_that_cannot_be_used_is_named(fedmq, tmp_path, text, parts):
    if text is not None:
        (tmp_path / "mine.py").write_text(text)
    assert_refused(fedmq("worker", "--task", "mine.py"), USAGE, *parts)


def test_without_a_task_a_program_says_what_to_give(fedmq, tmp_path):
    assert_refused(fedmq("worker"), USAGE, "no task: give --task my_task.py, or a built-in (digits, mnist, ")
    (tmp_path / "mine.py").write_text("def build(): pass\ndef train(model, context): pass\n")
    assert_refused(fedmq("evaluator", "--task", "mine.py"), USAGE, "task mine.py lacks evaluate()")


@pytest.mark.parametrize(
    ("data", "part"),
    [
        (None, "No such file"),
        (b"not a model", "as a safetensors file"),
        (safetensors.numpy.save({"w": np.array([1, np.nan], np.float32)}), "not finite"),
        (safetensors.numpy.save({"n": np.array([1], np.int64)}), "floating-point parameters"),
    ],
    ids=["missing", "not safetensors", "nan", "no floats"],
)
def test_a_starting_model_that_cannot_be_used_is_refused(fedmq, tmp_path, data, part):
    if data is not None:
        (tmp_path / "start.safetensors").write_bytes(data)
    assert_refused(fedmq("aggregator", init_model="start.safetensors"), USAGE, part)


def test_a_starting_model_of_another_layout_than_the_jobs_is_refused(fedmq, tmp_path, urls, servers, job):
    RedisStore(servers.redis.url, job).create(ModelImage.of({"w": np.zeros(3, np.float32)}), 0.0)
    ModelImage.of({"w": np.zeros(4, np.float32)}).save(tmp_path / "start.safetensors")
    assert_refused(
        fedmq("aggregator", init_model="start.safetensors", **urls), USAGE, f"job '{job}' exists with another layout"
    )


# --- the servers


GONE_BROKER, GONE_STORE = "amqp://u:hush@127.0.0.1:{closed}/fedmq", "redis://:hush@127.0.0.1:{closed}/0"
SILENT_STORE = "redis://:hush@127.0.0.1:{silent}"
MISTAKES = {  # name -> command, what is wrong, exit code, what it must say
    "aggregator: no broker": ("aggregator", {"broker_url": GONE_BROKER}, UNREACHABLE, "RabbitMQ at amqp://u:***@"),
    "worker: no broker": ("worker", {"broker_url": GONE_BROKER}, UNREACHABLE, "cannot reach RabbitMQ at amqp://u:***@"),
    "worker: broker drops packets": (
        "worker", {"broker_url": "amqp://127.0.0.1:{dropping}"}, UNREACHABLE, "cannot reach RabbitMQ at amqp://127.0.0.1",
    ),
    "worker: broker says nothing": (
        "worker", {"broker_url": "amqp://127.0.0.1:{silent}"}, UNREACHABLE, "RabbitMQ at amqp://127.0.0.1",
    ),
    "aggregator: no store": ("aggregator", {"store_url": GONE_STORE}, UNREACHABLE, "Redis at redis://:***@"),
    "worker: no store": ("worker", {"store_url": GONE_STORE}, UNREACHABLE, "Redis at redis://:***@"),
    "evaluator: no store": ("evaluator", {"store_url": GONE_STORE}, UNREACHABLE, "Redis at redis://:***@"),
    "status: no store": ("status", {"store_url": GONE_STORE}, UNREACHABLE, "Redis at redis://:***@"),
    "models list: no store": ("models list", {"store_url": GONE_STORE}, UNREACHABLE, "Redis at redis://:***@"),
    "models init: no store": ("models init {task}", {"store_url": GONE_STORE}, UNREACHABLE, "Redis at redis://:***@"),
    "status: store drops packets": (
        "status", {"store_url": "redis://127.0.0.1:{dropping}"}, UNREACHABLE, "Redis at redis://127.0.0.1",
    ),
    "aggregator: store says nothing": ("aggregator", {"store_url": SILENT_STORE}, UNREACHABLE, "Redis at redis://:***@"),
    "aggregator: wrong login": ("aggregator", {"broker_url": "{wrong_login}"}, USAGE, "refuses this login or password"),
    "worker: wrong login": ("worker", {"broker_url": "{wrong_login}"}, USAGE, "refuses this login or password"),
    "worker: no vhost": ("worker", {"broker_url": "{no_vhost}"}, USAGE, "refuses this virtual host"),
    "aggregator: wrong password": ("aggregator", {"store_url": "{wrong_password}"}, USAGE, "check FEDMQ_STORE_URL"),
    "evaluator: no password": ("evaluator", {"store_url": "{no_password}"}, USAGE, "check FEDMQ_STORE_URL"),
    "status: needless password": ("status", {"store_url": "{needless_password}"}, USAGE, "check FEDMQ_STORE_URL"),
    "aggregator: broker by http": ("aggregator", {"broker_url": "http://u:hush@host"}, USAGE, "FEDMQ_BROKER_URL"),
    "worker: store by http": ("worker", {"store_url": "http://u:hush@host"}, USAGE, "FEDMQ_STORE_URL"),
    "doctor: no scheme": ("doctor", {"store_url": "localhost:6379"}, USAGE, "FEDMQ_STORE_URL"),
    "worker: broker without bracket": ("worker", {"broker_url": "amqp://[::1"}, USAGE, "FEDMQ_BROKER_URL"),
    "status: store without bracket": ("status", {"store_url": "redis://[::1"}, USAGE, "FEDMQ_STORE_URL"),
    "status: no such option": ("status", {"store_url": "{store}?colour=red"}, USAGE, "FEDMQ_STORE_URL"),
}  # fmt: skip


@pytest.fixture(scope="module")
def addresses(servers, odd_redis, tmp_path_factory):
    """Yield the addresses, right and wrong, that the mistakes below are made of."""
    task = tmp_path_factory.mktemp("task") / "numpy_task.py"
    task.write_text(NUMPY_TASK)
    broker, store = servers.rabbitmq.url, servers.redis.url
    with silent_host() as silent, unreachable_host() as dropping:
        yield {
            "broker": broker, "store": store, "task": task,
            "closed": free_port(), "silent": silent, "dropping": dropping,
            "wrong_login": broker.replace("fedmq:fedmq@", "fedmq:hush@"), "no_password": odd_redis.url,
            "no_vhost": broker.removesuffix("fedmq") + "elsewhere",
            "wrong_password": odd_redis.url.replace("redis://", "redis://:hush@"),
            "needless_password": store.replace("redis://", "redis://:hush@"),
            "volatile": odd_redis.url.replace("redis://", "redis://:secret@"),
        }  # fmt: skip


def together(folder, commands, addresses):
    """Run commands, six at a time: most of them only wait; return name -> answer."""

    def run(name, command, variables):
        filled = {key: str(value).format_map(addresses) for key, value in variables.items()}
        arguments = command.format_map(addresses).split()
        return Command(folder, *arguments, **({"state_dir": folder / name.replace(" ", "-")} | filled)).finish()

    with ThreadPoolExecutor(6) as pool:
        futures = {name: pool.submit(run, name, *command) for name, command in commands.items()}
        return {name: future.result() for name, future in futures.items()}


@pytest.fixture(scope="module")
def mistakes(addresses, tmp_path_factory):
    """Make every mistake; return name -> answer."""
    right = {"broker_url": "{broker}", "store_url": "{store}", "task": "{task}", "job": "of-mistakes"}
    commands = {name: (command, right | wrong) for name, (command, wrong, _, _) in MISTAKES.items()}
    return together(tmp_path_factory.mktemp("mistakes"), commands, addresses)


@pytest.mark.parametrize("name", MISTAKES)
def test_a_server_that_cannot_be_used_is_named_at_once(mistakes, name):
    _, _, code, words = MISTAKES[name]
    assert_refused(mistakes[name], code, words)
    assert "hush" not in mistakes[name].err


@pytest.fixture(scope="module")
def odd_redis(tmp_path_factory):
    """Yield a Redis that wants the password `secret` and forgets everything when it stops."""
    server = private_redis(tmp_path_factory.mktemp("odd"), {"appendonly": "no"})
    server.start()
    RedisStore(server.url, "any")._redis.config_set("requirepass", "secret")
    yield server
    server.stop()


def test_a_redis_that_forgets_is_refused_unless_that_is_wanted(fedmq, servers, job, odd_redis, tmp_path, processes):
    volatile = {
        "broker_url": servers.rabbitmq.url,
        "store_url": odd_redis.url.replace("redis://", "redis://:secret@"),
        "job": job,
    }
    answer = fedmq("aggregator", **volatile)
    assert_refused(
        answer, USAGE, "may forget commits", "(append-only file: off)", "--appendfsync always", "FEDMQ_DURABLE=false"
    )
    assert "secret" not in answer.err
    aggregator = processes.start("aggregator", "--no-durable", **volatile)
    aggregator.wait_for_log(f"job {job} has no model yet")
    assert aggregator.terminate() == DONE


@pytest.mark.parametrize("program", ["aggregator", "worker", "evaluator"])
def test_a_metrics_port_that_is_taken_is_named(fedmq, urls, task, program):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        answer = fedmq(program, metrics_port=port, task=task, state_dir="state", **urls)
    assert_refused(answer, USAGE, f"FEDMQ_METRICS_PORT {port} cannot be used")


# --- a job that runs


@dataclass(frozen=True)
class RunningJob:
    """An aggregator, an evaluator, and a worker that sent 10 updates for buffers of 4: 2 versions, 2 updates wait."""

    urls: dict[str, str]
    task: Path
    ports: dict[str, int]


@pytest.fixture(scope="module")
def running(servers, tmp_path_factory):
    """Yield a running job, its settings from a file, the environment and a flag."""
    folder = tmp_path_factory.mktemp("running")
    task, config = folder / "numpy_task.py", folder / "fedmq.toml"
    task.write_text(NUMPY_TASK)
    config.write_text('buffer_size = 50\ncommit_age_max_s = 0.2\nFEDMQ_COMMIT_INTERVAL_S = 0\nstaleness = "constant"\n')
    urls = {"broker_url": servers.rabbitmq.url, "store_url": servers.redis.url, "job": "running-job"}
    ports = {program: free_port() for program in ("aggregator", "worker", "evaluator")}
    starter = Processes(folder)
    start = folder / "start.safetensors"
    ModelImage.of({"w": np.zeros((4, 3), np.float32), "steps": np.array([7], np.int64)}).save(start)
    try:
        starter.start(
            "aggregator", "--buffer-size", "4", buffer_size=3, config=config, init_model=start, codec="float32",
            metrics_port=ports["aggregator"], **urls,
        )  # fmt: skip
        starter.start("ops.cli", "evaluator", task=task, poll_s=0.1, metrics_port=ports["evaluator"], wait_s=20, **urls)
        starter.start(
            "worker", task=task, client_id="only-one", task_settings='{"trainings": "10"}', state_dir=folder / "state",
            metrics_port=ports["worker"], wait_s=20, **urls,
        )  # fmt: skip
        store = RedisStore(servers.redis.url, "running-job")
        shown = {  # counted after the commit, the evaluation, the confirm: the last things to happen
            "aggregator": '\nfedmq_buffer_updates{job="running-job"} 2.0\n',
            "evaluator": '\nfedmq_evaluated_version{job="running-job"} 2.0\n',
            "worker": 'fedmq_worker_published_total{job="running-job",outcome="confirmed"} 10.0\n',
        }  # fmt: skip
        wait_until(
            lambda: (
                store.totals().get("applied") == 10
                and all(line in page(ports[program], "/metrics")[1] for program, line in shown.items())
            ),
            60,
            lambda: "".join(log.read_text() for log in sorted(folder.glob("*.log"))),
        )
        yield RunningJob(urls, task, ports)
    finally:
        starter.end()


def page(port, path):
    """Return status and text of a page."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=5) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()
    except OSError as error:
        return 0, str(error)


CONTRACT = {  # design, section 5
    "aggregator": {
        "fedmq_updates_total": "counter", "fedmq_updates_rejected_total": "counter",
        "fedmq_update_staleness_versions": "histogram", "fedmq_update_bytes": "histogram",
        "fedmq_update_latency_seconds": "histogram", "fedmq_decode_seconds": "histogram",
        "fedmq_commit_seconds": "histogram", "fedmq_model_version": "gauge", "fedmq_buffer_updates": "gauge",
    },
    "worker": {
        "fedmq_worker_train_seconds": "histogram", "fedmq_worker_outbox_updates": "gauge",
        "fedmq_worker_model_version": "gauge", "fedmq_worker_published_total": "counter",
        "fedmq_worker_sent_bytes_total": "counter", "fedmq_worker_pulled_bytes_total": "counter",
    },
    "evaluator": {"fedmq_evaluation": "gauge"},
}  # fmt: skip
BEYOND = {
    "aggregator": {
        "fedmq_published_bytes_total": "counter", "fedmq_commits_total": "counter",
        "fedmq_store_failures_total": "counter", "fedmq_last_commit_timestamp_seconds": "gauge",
        "fedmq_model_parameters": "gauge", "fedmq_serving": "gauge", "fedmq_update_norm": "histogram",
    },
    "worker": {
        "fedmq_worker_task_failures_total": "counter", "fedmq_worker_pulls_total": "counter",
        "fedmq_worker_downlink_mismatches_total": "counter", "fedmq_worker_residual_norm": "gauge",
        "fedmq_worker_returned_total": "counter",
    },
    "evaluator": {"fedmq_evaluated_version": "gauge"},
}  # fmt: skip


@pytest.mark.parametrize("program", list(CONTRACT))
def test_metrics_have_the_names_of_the_contract(running, program):
    status, text = page(running.ports[program], "/metrics")
    assert status == 200
    assert dict(re.findall(r"^# TYPE (\S+) (\S+)$", text, re.M)) == CONTRACT[program] | BEYOND[program]
    assert set(NAMES[program]) == set(CONTRACT[program] | BEYOND[program])
    assert "only-one" not in text  # a client id in a label would be one series a device


def sample(text, line):
    """Return the value of a sample of the running job."""
    name, _, labels = line.partition("{")
    rest = "".join(sorted(label for label in labels.rstrip("}").split(",") if label and not label.startswith("job=")))
    line = f'{name}{{job="running-job"{"," + rest if rest else ""}}}'
    found = re.search(rf"^{re.escape(line)} (\S+)$", text, re.M)
    assert found, f"no {line} in:\n{text}"
    return float(found[1])


def test_metrics_count_what_happened(running):
    text = page(running.ports["aggregator"], "/metrics")[1]
    assert sample(text, 'fedmq_updates_total{job="running-job",outcome="applied"}') == 10
    assert sample(text, "fedmq_update_latency_seconds_count") == 10
    assert sample(text, "fedmq_update_bytes_count") == 10
    assert (sample(text, "fedmq_model_version"), sample(text, "fedmq_buffer_updates")) == (2, 2)
    text = page(running.ports["worker"], "/metrics")[1]
    assert sample(text, 'fedmq_worker_published_total{outcome="confirmed"}') == 10
    assert sample(text, "fedmq_worker_outbox_updates") == 0
    assert sample(text, "fedmq_worker_train_seconds_count") == 10
    assert sample(text, "fedmq_worker_sent_bytes_total") > 10 * 48 < sample(text, "fedmq_worker_pulled_bytes_total")
    text = page(running.ports["evaluator"], "/metrics")[1]
    assert sample(text, 'fedmq_evaluation{metric="accuracy"}') == 0.75
    assert sample(text, "fedmq_evaluated_version") == 2


@pytest.mark.parametrize("program", list(CONTRACT))
def test_healthz_says_well(running, program):
    status, text = page(running.ports[program], "/healthz")
    assert (status, json.loads(text)) == (200, {"ok": True, "problem": None})


def test_healthz_turns_to_200_once_the_job_can_run(fedmq, processes, urls, job, task):
    port = free_port()
    aggregator = processes.start("aggregator", metrics_port=port, **urls)
    aggregator.wait_for_log("has no model yet")
    status, text = page(port, "/healthz")
    assert (status, json.loads(text)["problem"]) == (503, f"waiting for version 0 of job '{job}'")
    assert fedmq("models", "init", task, **urls).code == DONE
    wait_until(lambda: page(port, "/healthz")[0] == 200, 20, lambda: str(page(port, "/healthz")))
    assert aggregator.terminate() == DONE


# --- status


def test_status_says_what_the_job_waits_for(fedmq, servers, urls, job, task):
    answer = fedmq("status", **urls)
    assert (answer.code, answer.err) == (DONE, "")
    assert f"job {job}: no model yet. Run `fedmq models init TASK --job {job}`" in answer.text
    assert fedmq("models", "init", task, **urls).code == DONE
    nobody = Command(task.parent, "status", **urls)
    no_broker = Command(task.parent, "status", **(urls | {"broker_url": f"amqp://127.0.0.1:{free_port()}"}))
    answer = nobody.answer()
    assert answer.code == DONE
    assert "no aggregator is connected; 0 updates wait: start `fedmq aggregator`" in answer.text
    answer = no_broker.answer()
    assert answer.code == DONE
    assert "the broker does not answer: cannot reach RabbitMQ" in answer.text
    assert "12 parameters" in answer.text


def test_status_of_a_running_job(fedmq, running):
    answer = fedmq("status", "--job", "running-job", **(running.urls | {"job": "another"}))  # the flag wins
    assert (answer.code, answer.err) == (DONE, "")
    for part in (
        "running-job 12 parameters", "version 2 made", "fedbuff, staleness constant", "up float32; down float32 models",
        "accuracy 0.75, loss 24 (version 2)", "10 applied", "versions on average", "0 waiting, 0 dead letters",
        "1 seen in the last minute, 1 ever", "buffer 2/4, ",
    ):  # fmt: skip
        assert part in answer.text, (part, answer)


# --- doctor


def lines_of(answer):
    """Return what doctor says of each check: name -> (`ok` or `wrong`, text)."""
    return {name: (word, text) for word, name, text in re.findall(r"^(ok|wrong) +(\S+) +(.*)$", answer.out, re.M)}


def test_doctor_finds_nothing_wrong_with_a_running_job(fedmq, running):
    answer = fedmq("doctor", "--task", running.task, **running.urls)
    assert (answer.code, answer.err) == (DONE, "")
    said = lines_of(answer)
    assert list(said) == ["broker", "queues", "store", "durability", "certificate", "clock", "job", "task"]
    assert {word for word, _ in said.values()} == {"ok"}
    assert said["queues"][1].startswith("1 aggregator(s), 0 updates waiting, 0 dead letters")
    assert said["job"][1] == "version 2, 12 parameters"
    assert "one training of 5 samples, 2 steps" in said["task"][1]


STORE_CHECKS = ("store", "durability", "clock", "job")
DIAGNOSES = {  # name -> what is wrong, and what doctor must say of each check that it touches
    "never started": ({"job": "unknown"}, {"queues": "has no queue yet", "job": "models init TASK --job unknown`"}),
    "no aggregator": ({"job": "left-alone"}, {"queues": "no aggregator of job 'left-alone' is", "job": "no model"}),
    "wrong login": ({"broker_url": "{wrong_login}"}, dict.fromkeys(("broker", "queues"), "refuses this login")),
    "no broker": ({"broker_url": GONE_BROKER}, dict.fromkeys(("broker", "queues"), "cannot reach RabbitMQ")),
    "no store": ({"store_url": GONE_STORE}, dict.fromkeys(STORE_CHECKS, "Redis at redis://:***@")),
    "no password": ({"store_url": "{no_password}"}, dict.fromkeys(STORE_CHECKS, "check FEDMQ_STORE_URL")),
    "forgets": ({"store_url": "{volatile}"}, {"durability": "--appendfsync always", "job": "no model"}),
    "other task": ({"task": "wide.py"}, {"task": "tensor 'w' is (4, 5) float32 here, (4, 3) float32 in the job"}),
    "broken task": ({"task": "broken.py"}, {"task": "raised ZeroDivisionError"}),
    "no task": ({"task": "none.py"}, {"task": "no task 'none.py'"}),
}


@pytest.fixture(scope="module")
def diagnoses(running, addresses, servers, tmp_path_factory):
    """Have doctor look at everything that can be wrong; return name -> answer."""
    folder = tmp_path_factory.mktemp("doctor")
    source = RabbitSource(servers.rabbitmq.url, "left-alone", 1)  # a queue that nobody serves
    source.link.wait_ready(10)
    source.close()
    (folder / "wide.py").write_text(NUMPY_TASK.replace("(4, 3)", "(4, 5)"))
    (folder / "broken.py").write_text(NUMPY_TASK.replace("time.sleep(float", "1 / 0 * (float"))
    commands = {name: ("doctor", running.urls | wrong) for name, (wrong, _) in DIAGNOSES.items()}
    return together(folder, commands, addresses)


@pytest.mark.parametrize("name", DIAGNOSES)
def test_doctor_says_how_to_mend_it(diagnoses, name):
    answer, expected = diagnoses[name], DIAGNOSES[name][1]
    assert answer.code == FAILED, answer
    said = lines_of(answer)
    assert {check for check, (word, _) in said.items() if word == "wrong"} == set(expected), answer
    for check, part in expected.items():
        assert part in said[check][1], answer
    assert not re.search("hush|secret", answer.out)
    assert not answer.err


# --- models


def test_a_model_is_made_listed_shown_and_exported(fedmq, servers, urls, job, tmp_path, task):
    answer = fedmq("models", "list", **urls)
    assert_refused(answer, USAGE, f"`fedmq models init TASK --job {job}` makes one")
    answer = fedmq("models", "init", task, **urls)
    assert (answer.code, answer.err) == (DONE, "")
    assert f"version 0 of job {job}: 12 parameters in 2 tensors" in answer.text
    assert_refused(
        fedmq("models", "init", task, **urls), USAGE, f"job '{job}' has a model already: choose another --job"
    )
    answer = fedmq("models", "list", **urls)
    assert answer.code == DONE
    sha256 = RedisStore(servers.redis.url, job).model(0).sha256
    assert re.search(rf"0\W+\d{{4}}-\d\d-\d\d .*{sha256[:12]}", answer.out)
    answer = fedmq("models", "show", **urls)
    assert answer.code == DONE
    assert f"sha256: {sha256}" in answer.text
    assert re.search(r"w\W+\(4, 3\)\W+float32\W+average\W+48", answer.out)
    assert re.search(r"steps\W+\(1,\)\W+int64\W+keep\W+8", answer.out)
    answer = fedmq("models", "export", "out/model.safetensors", "--version", "0", **urls)
    assert answer.code == DONE
    exported = safetensors.numpy.load_file(tmp_path / "out/model.safetensors")
    assert {name: (array.dtype, array.tolist()) for name, array in exported.items()} == {
        "w": (np.float32, np.zeros((4, 3)).tolist()), "steps": (np.int64, [7]),
    }  # fmt: skip
    assert_refused(
        fedmq("models", "export", "x.safetensors", "--version", "7", **urls),
        USAGE,
        "version '7' is not stored; stored are [0]",
    )
    assert_refused(fedmq("models", "show", "last", **urls), USAGE, "or say `newest`")


def test_the_newest_version_is_exported_while_the_job_runs(fedmq, running, tmp_path):
    answer = fedmq("models", "export", "new.safetensors", **running.urls)
    assert "wrote version 2 of job running-job to new.safetensors" in answer.text
    assert (safetensors.numpy.load_file(tmp_path / "new.safetensors")["w"] == 2).all()
    answer = fedmq("models", "list", **running.urls)
    assert len(re.findall(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d", answer.out)) == 3
    assert "accuracy 0.75, loss 24" in answer.text


def test_a_model_file_starts_a_job(fedmq, processes, servers, urls, job, task):
    answer = fedmq("models", "init", task, "--out", "start.safetensors")
    assert (answer.code, answer.err) == (DONE, "")
    assert "FEDMQ_INIT_MODEL=start.safetensors" in answer.text
    aggregator = processes.start("aggregator", init_model="start.safetensors", **urls)
    aggregator.wait_for_log(f"job {job} at version 0")
    assert RedisStore(servers.redis.url, job).model(0).tensors()["steps"].tolist() == [7]


def test_a_model_that_cannot_be_built_is_reported(fedmq, urls, tmp_path):
    (tmp_path / "raises.py").write_text("def build():\n    raise ValueError('no GPU')\n")
    answer = fedmq("models", "init", "raises.py", **urls)
    assert answer.code == FAILED
    assert re.search(r'raises.py", line 2, in build\n', answer.err)  # of the user's own code, they get the traceback
    assert answer.err.endswith("\nfedmq: build() of raises.py raised ValueError: no GPU\n")
    (tmp_path / "text.py").write_text("import numpy\ndef build():\n    return {'w': numpy.array(['a'])}\n")
    assert_refused(fedmq("models", "init", "text.py", **urls), USAGE, "tensor 'w' is <U1")
    (tmp_path / "none.py").write_text("def build():\n    pass\n")
    assert_refused(fedmq("models", "init", "none.py", **urls), FAILED, "build() of none.py returned NoneType")


def test_a_file_that_cannot_be_written_is_refused(fedmq, urls, tmp_path, task):
    (tmp_path / "file").write_text("")
    assert_refused(fedmq("models", "init", task, "--out", "."), USAGE, "cannot write .")
    assert_refused(fedmq("models", "init", task, "--out", "file/model"), USAGE, "cannot write file/model")
    fedmq("models", "init", task, **urls)
    assert_refused(fedmq("models", "export", ".", **urls), USAGE, "cannot write .")
    assert_refused(fedmq("worker", task=task, state_dir="file"), USAGE, "the outbox file/default/")


# --- init, demo


def test_the_template_runs_as_it_is(fedmq, tmp_path):
    answer = fedmq("init", "my_task.py")
    assert (answer.code, answer.out) == (DONE, "wrote my_task.py; try it with: fedmq demo --task my_task.py\n")
    answer = Command(tmp_path, "demo", "--task", "my_task.py", "--updates", "60").answer(120)
    assert answer.code == DONE, answer
    last = LAST_LINE.fullmatch(answer.out.splitlines()[-1])
    assert last, answer.out
    assert (last[2], last[3]) == ("6", "60")
    assert float(last[1]) > 0.8
    left = {path.name for path in (tmp_path / "runs/demo-my_task").iterdir()}
    assert left == {"report.html", "curves.png", "history.csv", "model.safetensors"}


def test_init_never_overwrites(fedmq, tmp_path):
    (tmp_path / "mine.py").write_text("mine")
    assert_refused(fedmq("init", "mine.py"), USAGE, "mine.py exists already: choose another name")
    assert (tmp_path / "mine.py").read_text() == "mine"
    assert_refused(fedmq("init", "none/mine.py"), USAGE, "cannot write none/mine.py: No such file or directory")


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--codec", "gzip"], "gzip"),
        (["--updates", "5"], "at least 1, 1, one buffer"),
        (["--seed", "-1"], "seed"),
        (["--updates", "0"], "at least 1, 1, one buffer"),
        (["--workers", "0"], "at least 1, 1, one buffer"),
        (["--task", "none.py"], "no task 'none.py'"),
        (
            ["--servers", "--task", "numpy_task.py", "--store-url", "redis://127.0.0.1"],
            "give both --broker-url and --store-url",
        ),
        (["--task", "numpy_task.py", "--updates", "10", "--out", "numpy_task.py"], "numpy_task.py"),
    ],
    ids=["codec", "few updates", "seed", "no updates", "no workers", "no task", "one url", "out is a file"],
)
def test_a_demo_that_cannot_run_says_why(fedmq, task, arguments, part):
    answer = fedmq("demo", *arguments)
    assert answer.code == USAGE, answer
    assert "Traceback" not in answer.err
    assert part in answer.err


@pytest.mark.parametrize(("library", "arguments"), [("torch", []), ("matplotlib", ["--task", "numpy_task.py"])])
def test_without_its_libraries_the_demo_says_what_to_install(fedmq, task, library, arguments, monkeypatch):
    (task.parent / f"{library}.py").write_text(
        f"raise ModuleNotFoundError('No module named {library}', name='{library}')"
    )
    monkeypatch.setenv("PYTHONPATH", str(task.parent), prepend=os.pathsep)
    answer = fedmq("demo", "--updates", "10", *arguments)
    assert answer.code == USAGE, answer
    assert "Traceback" not in answer.err
    assert library in answer.err
    assert "fedmq[demo]" in answer.err


# --- interrupted


@pytest.mark.parametrize("program", ["aggregator", "worker"])
def test_a_program_that_waits_for_its_servers_can_be_stopped(processes, task, program):
    closed = free_port()
    process = processes.start(
        program, wait_s=600, task=task, state_dir="state", store_url=f"redis://127.0.0.1:{closed}"
    )
    process.wait_for_log("; waiting")
    assert process.terminate(10) == INTERRUPTED
    assert "Traceback" not in process.log()


def test_ctrl_c_ends_the_demo_with_130(task, tmp_path):
    command = Command(tmp_path, "demo", "--task", task, "--updates", "1000000")
    line = command.popen.stdout.readline()
    assert "virtual time" in line or "numpy_task" in line
    time.sleep(0.3)  # well inside the run
    command.popen.send_signal(signal.SIGINT)
    answer = command.answer()
    assert (answer.code, answer.err) == (INTERRUPTED, "fedmq: interrupted\n")


def test_a_second_signal_ends_a_long_training_at_once(processes, servers, urls, job, task):
    RedisStore(servers.redis.url, job).create(
        ModelImage.of({"w": np.zeros((4, 3), np.float32), "steps": np.array([7], np.int64)}), 0.0
    )
    RedisStore(servers.redis.url, job).announce({"codec": "float32", "update_bytes_max": 1 << 20})
    worker = processes.start(
        "worker", task=task, task_settings='{"sleep_s": "600"}', log_level="debug", state_dir="state", **urls
    )
    worker.wait_for_log("pulled version 0")
    worker.popen.send_signal(signal.SIGINT)
    worker.wait_for_log("SIGINT: finishing; once more to leave at once")
    assert worker.popen.poll() is None  # the training goes on
    os.kill(worker.popen.pid, signal.SIGINT)
    assert worker.wait(10) == INTERRUPTED
    assert "Traceback" not in worker.log()
    assert "fedmq: interrupted" in worker.log()
