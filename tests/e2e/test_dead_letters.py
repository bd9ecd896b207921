"""`fedmq deadletters` as an operator types it: find out why, mend it, replay - and each update still counts once."""

import os
import pty
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pika
import pytest

from shared.command import DONE, FAILED, UNREACHABLE, USAGE
from shared.compression import parse
from shared.messages import Update, decode, encode
from shared.model_image import ModelImage
from shared.store.redis import RedisStore
from shared.transport.dead_letters import DeadLetters
from shared.transport.names import HEADER_DETAIL, HEADER_REASON, dead_queue, routing_key
from shared.transport.ports import Outgoing
from shared.transport.rabbitmq import RabbitSink, queue_depths
from tests.contract.brokers import plain_channel
from tests.contract.faults import wait_until as until
from tests.e2e.clients import aggregator_of
from tests.e2e.conftest import clean_environment
from tests.e2e.test_exactly_once import applied_ids

FEDMQ = Path(sys.executable).with_name("fedmq")
NUM_PARAMS = 500  # 2,000 bytes as float32: beyond a limit of 1,500
SUMS = {
    "buffer_size": "1", "server_lr": "1", "staleness": "constant", "staleness_max": "100000",
    "commit_interval_s": "0.02", "commit_age_max_s": "0.2",
}  # fmt: skip


@pytest.fixture
def environment(servers, job):
    return clean_environment(
        {"FEDMQ_STORE_URL": servers.redis.url, "FEDMQ_BROKER_URL": servers.rabbitmq.url, "FEDMQ_JOB": job}
    )


@pytest.fixture
def letters(environment, tmp_path):
    """Return a function that runs `fedmq deadletters ...` to its end."""

    def run(*arguments, code=DONE):
        done = subprocess.run(
            [FEDMQ, "deadletters", *map(str, arguments)], cwd=tmp_path, capture_output=True, text=True, timeout=60,
            check=False, env=environment, stdin=subprocess.DEVNULL,
        )  # fmt: skip
        assert "Traceback" not in done.stdout + done.stderr, done
        assert done.returncode == code, done
        return " ".join((done.stdout + done.stderr).replace("│", " ").split())

    return run


class Job:
    """A job whose update i adds 1 at position i."""

    def __init__(self, servers, job, processes, folder):
        self.servers, self.name, self.processes = servers, job, processes
        self.model = ModelImage.of({"w": np.zeros(NUM_PARAMS, np.float32)})
        self.file = folder / "v0.safetensors"
        self.model.save(self.file)
        self.store = RedisStore(servers.redis.url, job)
        self.aggregator, self.sink = None, RabbitSink(servers.rabbitmq.url, "tester")

    def start(self, **settings):
        before = self.store.job()
        self.aggregator = aggregator_of(
            self.processes, self.servers, self.name, init_model=self.file, **SUMS | settings
        )  # fmt: skip
        self.aggregator.wait_for_log("revision")
        until(lambda: before or self.store.job())

    def update(self, i, client="a", codec="float32", **changes):
        delta = np.zeros(NUM_PARAMS, np.float32)
        delta[i] = 1
        encoded = parse(codec).encode(delta, self.model.layout, np.random.default_rng(0))
        fields = {
            "job": self.name, "client": client, "update_id": f"{client}/i/{i}", "base_version": 0, "num_samples": 1,
            "num_steps": 1, "layout": self.model.layout.hash, "codec": {"name": codec, **encoded.params},
            "payload": encoded.payload, "metrics": {}, "train_seconds": 0.0, "created_at": time.time(),
        }  # fmt: skip
        return Update(**fields | changes)

    def publish(self, update):
        self.sink.publish(Outgoing(self.name, update.client, update.update_id, encode(update)), 10)

    @property
    def weights(self):
        return self.store.model(self.store.head().version).weights

    def dead(self):
        return queue_depths(self.servers.rabbitmq.url, self.name, 5)["dead"]

    def outcomes(self, outcome):
        return self.store.totals().get(outcome, 0)


@pytest.fixture
def training(servers, job, processes, tmp_path):
    made = Job(servers, job, processes, tmp_path)
    yield made
    made.sink.close()
    made.store.close()


def ones(*positions):
    vector = np.zeros(NUM_PARAMS, np.float32)
    vector[list(positions)] = 1
    return vector


def test_after_a_fix_what_was_rejected_is_replayed_and_counts_once(training, letters, tmp_path):
    training.start(message_bytes_max=1500)
    for i in range(20):
        training.publish(training.update(i, client="ab"[i % 2]))
    until(lambda: training.outcomes("rejected") == training.dead() == 20)

    told = letters("list", "--limit", "3")
    assert "the first 3 of 20" in told
    assert "20 letters: 20 too_large" in told
    assert re.search(r"1 too_large a a/i/0 float32 0 2,\d\d\d 20\d\d-\d\d-\d\d", told), told
    assert "10 letters: 10 too_large" in letters("list", "--client", "b")
    assert "no dead letters like that, of 20" in letters("list", "--reason", "codec")
    told = letters("show", "b/i/3", "--out", "body")
    assert decode((tmp_path / "body").read_bytes(), 10_000).update_id == "b/i/3"
    for part in (
        "too_large",
        "message_bytes_max is 1500",
        "Raise the limit",
        "replay possible",
        "2,000 bytes",
        "b/i/3",
    ):
        assert part in told, told
    assert "20 would be replayed" in letters("replay", "--all", "--dry-run")
    assert training.dead() == 20

    assert "20 replayed" in letters("replay", "--all"), "too early: nothing was mended"
    until(lambda: training.outcomes("rejected") + training.outcomes("duplicate") == 40)
    until(lambda: training.dead() == 20)
    assert np.array_equal(training.weights, ones())

    assert training.aggregator.terminate() == DONE
    training.start(message_bytes_max=2**20)
    with DeadLetters(training.servers.rabbitmq.url, training.name) as box:  # killed between confirm and ack, twice
        for letter in box.letters():
            box.send_again(letter)
            box.send_again(letter)
    until(lambda: training.outcomes("applied") == 20)
    assert training.dead() == 20
    assert "1 replayed" in letters("replay", "a/i/0")
    assert "19 replayed" in letters("replay", "--all")
    until(lambda: training.outcomes("duplicate") >= 40)
    assert training.dead() == 0
    assert sorted(applied_ids(training.store)) == sorted(f"{'ab'[i % 2]}/i/{i}" for i in range(20))
    assert np.array_equal(training.weights, ones(*range(20)))


def test_surplus_is_replayed_into_the_next_version(training, letters):
    training.start(robust="one_slot", buffer_size=2, server_lr=2)
    for i, client in enumerate("aab"):
        training.publish(training.update(i, client))
    until(lambda: training.dead() == 1 and training.outcomes("applied") == 2)
    assert "replay it when the next version is made" in letters("show", "1")
    assert "1 replayed" in letters("replay", "--reason", "surplus")
    training.publish(training.update(3, "b"))
    until(lambda: training.outcomes("applied") == 4)
    assert np.array_equal(training.weights, ones(0, 1, 2, 3))
    assert sorted(applied_ids(training.store)) == ["a/i/0", "a/i/1", "b/i/2", "b/i/3"]


def test_what_its_worker_sends_again_is_not_replayed(training, letters):
    training.start()
    training.publish(training.update(0, codec="ef | topk(0.01) | ternary | zstd", layout="0" * 16))
    training.publish(training.update(1, layout="0" * 16))
    until(lambda: training.dead() == 2)
    told = letters("replay", "--all")
    assert "1 not replayed: its codec keeps what was refused (ef)" in told
    assert "count it twice" in told
    assert "1 replayed" in told
    until(lambda: training.outcomes("rejected") + training.outcomes("duplicate") == 3)
    until(lambda: training.dead() == 2)
    assert "replay its codec keeps what was refused" in letters("show", "a/i/0")


def test_a_replay_that_is_killed_at_any_moment_costs_nothing_and_counts_nothing_twice(
    training, letters, environment, tmp_path
):
    count = 400
    training.start(message_bytes_max=1500)
    for i in range(count):
        training.publish(training.update(i))
    until(lambda: training.dead() == count, 60)
    assert training.aggregator.terminate() == DONE
    training.start()
    for delay_s in (0.0, 0.15, 0.4):
        process = subprocess.Popen(
            [FEDMQ, "deadletters", "replay", "--all"], cwd=tmp_path, env=environment, stdout=subprocess.DEVNULL
        )
        seen = training.outcomes("applied") + training.outcomes("duplicate")
        until(lambda seen=seen, process=process: process.poll() is not None
              or training.outcomes("applied") + training.outcomes("duplicate") > seen)  # fmt: skip
        time.sleep(delay_s)
        process.send_signal(signal.SIGKILL)
        process.wait()
        queued = training.servers.rabbitmq.url
        until(lambda queued=queued: queue_depths(queued, training.name, 5)["updates"] == 0)
    letters("replay", "--all")
    until(lambda: training.dead() == 0)
    until(lambda: training.outcomes("applied") == count)
    assert len(applied_ids(training.store)) == len(set(applied_ids(training.store))) == count
    assert np.array_equal(training.weights, ones(*range(count)))


# --- letters that nobody has to make an aggregator reject


@pytest.fixture
def box(servers, job):
    """Return a function that puts letters into a job's queue."""

    def put(count, reason="surplus", client="a", body=b"?" * 50, first=0, age_s=0.0):
        with plain_channel(servers.rabbitmq.url) as channel:
            channel.queue_declare(dead_queue(job), durable=True, arguments={"x-queue-type": "quorum"})
            channel.queue_bind(dead_queue(job), "amq.topic", routing_key(job, "*"))
            channel.confirm_delivery()
            for i in range(first, first + count):
                properties = pika.BasicProperties(
                    delivery_mode=2, message_id=f"{client}/i/{i}", timestamp=int(time.time() - age_s),
                    headers={HEADER_REASON: reason, HEADER_DETAIL: "[bold]why[/bold] \x1b[2J"},
                )  # fmt: skip
                channel.basic_publish("amq.topic", routing_key(job, client), body, properties)

    return put


def order(servers, job):
    with DeadLetters(servers.rabbitmq.url, job) as dead:
        return [letter.update_id for letter in dead.letters()]


def test_looking_changes_nothing_and_5000_letters_are_listed_at_once(letters, box, servers, job):
    box(5000)
    expected = [f"a/i/{i}" for i in range(5000)]
    started = time.monotonic()
    told = letters("list")
    took_s = time.monotonic() - started
    assert "5000 letters: 5000 surplus" in told
    assert took_s < 10, f"{took_s:.1f} s"
    letters("show", "77")
    letters("show", "a/i/4999")
    letters("replay", "--all", "--dry-run")
    letters("drop", "--all", code=USAGE)
    assert order(servers, job) == expected


def test_what_a_letter_says_is_shown_as_it_is_and_moves_no_cursor(letters, box):
    box(1, body=b"\x1b[2J" + bytes(100))
    for told in (letters("list"), letters("show", "1")):
        assert "[bold]why[/bold] \ufffd[2J" in told
        assert "\x1b[2J" not in told
    assert "first bytes 1b 5b 32 4a 00" in letters("show", "1")
    assert "104 bytes" in letters("show", "1")


def test_a_letter_is_one_line_in_a_narrow_terminal(box, environment, tmp_path):
    box(3, "not_finite", "phone-with-a-name")
    done = subprocess.run(
        [FEDMQ, "deadletters", "list"], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=True,
        env=environment | {"COLUMNS": "80"}, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    lines = [line for line in done.stdout.splitlines() if line.startswith("│")]
    assert len(lines) == 3
    for number, line in enumerate(lines):
        assert "not_finite" in line
        assert f"phone-with-a-name/i/{number}" in line
        assert len(line) <= 80


def test_letters_are_dropped_as_they_are_chosen(letters, box, servers, job):
    box(3, "codec", "a")
    box(3, "surplus", "b", age_s=8 * 86_400)
    box(3, "surplus", "c")
    assert "1 removed" in letters("drop", "a/i/1", "--yes")
    assert "1 removed" in letters("drop", "c/i/2", "--yes")
    assert "3 removed" in letters("drop", "--older-than", "7d", "--yes")
    assert "0 removed" in letters("drop", "--older-than", "7d", "--yes")
    assert order(servers, job) == ["a/i/0", "a/i/2", "c/i/0", "c/i/1"]
    assert "2 removed" in letters("drop", "--reason", "codec", "--client", "a", "--yes")
    assert "1 removed" in letters("drop", "2", "--yes")
    assert order(servers, job) == ["c/i/0"]
    assert "1 removed" in letters("drop", "--all", "--yes")
    assert f"job {job} has no dead letters" in letters("list")


def test_copies_of_one_letter_go_together(letters, box):
    """A crash may leave two copies of a dead letter, equal to the byte."""
    for _ in range(2):
        box(1, first=5)
    assert "2 would be replayed" in letters("replay", "a/i/5", "--dry-run")
    assert "2 letters are 'a/i/5': give the number" in letters("show", "a/i/5", "--out", "body", code=USAGE)
    assert "wrote the body" in letters("show", "2", "--out", "body")
    assert "1 removed" in letters("drop", "1", "--yes")
    assert "1 removed" in letters("drop", "a/i/5", "--yes")


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["drop"], ["say which letters to drop: ids, --all, --reason, --older-than or --client"]),
        (["drop", "--yes"], ["say which letters to drop"]),
        (["replay"], ["say which letters to replay: ids, --all, --reason or --client"]),
        (["drop", "--all"], ["this would remove 12 letters for good: say --yes"]),
        (["drop", "a/i/1", "--all", "--yes"], ["not both"]),
        (["drop", "--older-than", "soon", "--yes"], ["'soon' is no duration"]),
        (["list", "--reason", "surpluss"], ["--reason 'surpluss': must be one of"]),
        (["show", "a/i/1", "--out", "/nowhere/body"], ["cannot write /nowhere/body: No such file or directory"]),
        (["show", "a/i/"], ["'a/i/' begins 12 update ids: a/i/0, a/i/1, a/i/10"]),
        (["show", "13"], ["no letter is '13', of 12"]),
        (["replay", "b"], ["no letter is 'b', of 12"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) and value[0].islower() else None,
)
def test_mistakes_are_named(letters, box, servers, job, arguments, parts):
    box(12)
    told = letters(*arguments, code=USAGE)
    assert all(part in told for part in parts), told
    assert len(order(servers, job)) == 12


@pytest.mark.parametrize(("answer", "left"), [("y", 0), ("n", 3)])
def test_on_a_terminal_it_asks(box, servers, job, environment, tmp_path, answer, left):
    box(3)
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [FEDMQ, "deadletters", "drop", "--all"], cwd=tmp_path, env=environment, stdin=theirs, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )  # fmt: skip
    os.write(ours, f"{answer}\n".encode())
    told, _ = process.communicate(timeout=60)
    assert process.returncode == DONE, told
    assert f"remove 3 letters of job {job} for good?".encode() in told
    assert len(order(servers, job)) == left
    os.close(ours)
    os.close(theirs)


def test_servers_and_jobs_that_are_not_there_have_their_exit_codes(letters, environment, box):
    assert "no aggregator has run job" in letters("list", code=USAGE)
    wrong = environment["FEDMQ_BROKER_URL"].replace("fedmq:fedmq@", "fedmq:wrong@")
    assert "refuses this login" in letters("list", "--broker-url", wrong, code=USAGE)
    assert "cannot reach RabbitMQ" in letters("list", "--broker-url", "amqp://127.0.0.1:1", code=UNREACHABLE)
    box(2)
    assert "no queue takes updates" in letters("replay", "--all", code=FAILED)
    assert "2 letters" in letters("list")
