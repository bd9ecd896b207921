"""Rule area: the server's weights are the mean of what the workers' files say it has of them, whatever fails.

    w = w_0 + (1 / n) * sum_i (y_mem_i - w_0 - what of worker i is under way)

y_mem is read from the residual files, what is under way from the updates' own bytes and the ledger's outcomes.
"""

import contextlib
from dataclasses import replace

import numpy as np
import pytest

import worker.training
from shared.compression import decode as decode_delta
from shared.config import AggregatorSettings
from shared.errors import Reason, TaskError
from shared.messages import decode, encode
from shared.model_image import ModelImage
from shared.transport.ports import Outgoing
from tests.builders import JOB, System, device_of
from tests.simulation.mass import REFUSED, first_outcomes, numbers_on_disk, residual_on_disk
from worker import residual_file
from worker.residual import Residual
from worker.task import TrainResult

RNG = np.random.default_rng(7)
START = {
    "w": RNG.standard_normal((32, 40)).astype(np.float32),  # codecs take smaller tensors for biases
    "b": RNG.standard_normal(9).astype(np.float32),
}
IMAGE = ModelImage.of(START)
EF = "ef | topk(0.1) | ternary | zstd"
CODECS = ("float32", "int8", EF)
NAMES = ("a", "b", "c")
LAYOUT_OFF = "0" * 64


class Killed(BaseException):
    """The process is gone."""


class Sink:
    """A broker's sink that spoils messages as it is told."""

    def __init__(self, system):
        self.inner, self.spoil = system.broker.sink(), lambda body: body

    def publish(self, message, timeout_s):
        """Publish, spoilt or not."""
        self.inner.publish(
            Outgoing(message.job, message.client, message.update_id, self.spoil(message.body)), timeout_s
        )


def corrupt(body):
    """Spoil the checksum: the message is malformed or its payload does not fit."""
    place = body.index(b"checksum") + 10
    return body[:place] + bytes([body[place] ^ 1]) + body[place + 1 :]


def of_another_layout(body):
    """Say another layout."""
    return encode(replace(decode(body, 10**6), layout=LAYOUT_OFF))


class Job:
    """Workers of one job, and what each of them trained and sent."""

    def __init__(self, folder, codec="float32", names=NAMES, seed=0, **settings):
        self.folder, self.names, self.rng = folder, names, np.random.default_rng(seed)
        settings = {"rule": "area", "clients": len(names), "buffer_size": 1, "staleness_max": 100} | settings
        settings = {name: value for name, value in settings.items() if value is not None}
        self.system = System(IMAGE, codec=codec, **settings)
        self.sinks = {name: Sink(self.system) for name in names}
        self.devices = {name: self._open(name) for name in names}
        self.trained = {}  # name -> weights after the last training
        self.made = {}  # update_id -> what it decodes to
        self.scale = 1.0

    def _open(self, name):
        return device_of(
            self.folder, self.system, self._task, lambda: {k: a.copy() for k, a in START.items()},
            sink=self.sinks[name], client_id=name,
        )  # fmt: skip

    def _task(self, model, context):
        for array in model.values():
            array += (self.scale * self.rng.standard_normal(array.shape)).astype(np.float32)
        self.trained[context.client] = IMAGE.layout.flatten(model)
        return TrainResult(1, 1)

    def restart(self, name):
        """Start a worker again from its files."""
        self.devices[name].outbox.close()
        self.devices[name] = self._open(name)

    def train(self, name):
        """Train once; return what the new update decodes to."""
        outbox = self.devices[name].outbox
        update_id, number = outbox.next_id(), outbox.next_sequence
        assert self.devices[name].worker.step()
        [path] = (self.folder / name).glob(f"*{number}*.update")
        update = decode(path.read_bytes(), 10**6)
        total = np.zeros(IMAGE.layout.num_params, np.float32)
        decode_delta(update.codec, update.payload, IMAGE.layout).add_into(total, 1.0)
        self.made[update_id] = total.astype(np.float64)
        return total

    def publish(self, name, spoil=None):
        """Publish all that waits."""
        if spoil is not None:
            self.sinks[name].spoil = spoil
        while self.devices[name].publisher.step():
            pass
        self.sinks[name].spoil = lambda body: body

    def decide(self):
        """Let the aggregator decide on everything, durably."""
        self.system.drain()
        self.system.clock.time_s += 1000
        self.system.step()
        self.system.drain()

    def turn(self, name, spoil=None):
        """Train, publish, decide."""
        sent = self.train(name)
        self.publish(name, spoil)
        self.decide()
        return sent

    def memory(self, name):
        """Return y_mem as the worker's file has it; the start where there is no file."""
        path = self.folder / name / "residual"
        if not path.exists():
            return IMAGE.weights.astype(np.float64)
        assert residual_file.parse(path.read_bytes())[0].kind == "memory"
        return -residual_on_disk(self.folder / name, IMAGE.layout.num_params)[1]

    def under_way(self, name):
        """Return what the memory holds and the weights do not: undecided, in the open buffer, or not taken back yet."""
        outcomes = first_outcomes(self.system.store.ledger)
        buffered = {entry.update_id for entry in self.system.aggregator.state.buffer}
        here, total = numbers_on_disk(self.folder / name), np.zeros(IMAGE.layout.num_params)
        for update_id, decoded in self.made.items():
            if update_id.split("/")[0] != name:
                continue
            outcome, on_disk = outcomes.get(update_id), int(update_id.rsplit("/", 1)[1]) in here
            if outcome is None or (outcome in REFUSED and on_disk) or update_id in buffered:
                total += decoded
        return total

    def check(self):
        """Compare the server's weights with the workers' memories."""
        w_0 = IMAGE.weights.astype(np.float64)
        parts = [self.memory(name) - w_0 - self.under_way(name) for name in self.names]
        expected = w_0 + sum(parts) / len(self.names)
        size = 1 + max(np.abs(part).max() for part in parts) + np.abs(self.system.weights).max()
        np.testing.assert_allclose(self.system.weights, expected, atol=2e-6 * size)

    def outcomes(self):
        """Return how often each outcome came."""
        told = list(first_outcomes(self.system.store.ledger).values())
        return {outcome: told.count(outcome) for outcome in set(told)}


@contextlib.contextmanager
def killed_before_put():
    """Kill the worker when its update is encoded and not in the outbox yet."""

    def put(self, body):
        raise Killed

    with pytest.MonkeyPatch.context() as patch, contextlib.suppress(Killed):
        patch.setattr(Residual, "put", put)
        yield


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("buffer_size", [1, 2])
@pytest.mark.parametrize("seed", range(4))
def test_the_weights_are_the_mean_of_the_memories_whatever_fails(tmp_path, codec, buffer_size, seed):
    job = Job(tmp_path, codec, seed=seed, buffer_size=buffer_size, staleness_max=0)
    for _ in range(40):
        name, what = str(job.rng.choice(NAMES)), int(job.rng.integers(0, 8))
        if what <= 2:
            job.train(name)
        elif what == 3:
            job.publish(name, corrupt)
        elif what == 4:
            job.publish(name, of_another_layout)
        elif what == 5:
            job.restart(name)
        elif what == 6:
            with killed_before_put():
                job.devices[name].worker.step()
            job.restart(name)
        else:
            job.publish(name)
        if job.rng.random() < 0.7:
            job.decide()
            job.check()
    for name in NAMES:
        job.turn(name)  # publishes what waits, too
    for _ in range(2):
        for name in NAMES:
            job.turn(name)
            job.check()
    assert {"applied", "stale", "rejected"} <= set(job.outcomes())


@pytest.mark.parametrize("codec", CODECS)
def test_the_weights_are_the_mean_of_the_memories_with_nothing_under_way(tmp_path, codec):
    job = Job(tmp_path, codec)
    for _ in range(4):
        for name in NAMES:
            job.turn(name)
    memories = [job.memory(name) for name in NAMES]
    np.testing.assert_allclose(job.system.weights, np.mean(memories, axis=0), atol=1e-5)


def test_without_compression_the_weights_are_the_mean_of_everybodys_last_model_however_often_one_sends(tmp_path):
    job = Job(tmp_path)
    for name in "abccccbc":
        job.turn(name)
    np.testing.assert_allclose(job.system.weights, np.mean(list(job.trained.values()), axis=0), atol=1e-5)


def test_a_worker_that_never_reports_counts_as_version_0(tmp_path):
    job = Job(tmp_path)
    for name in "abab":
        job.turn(name)
    models = [job.trained["a"], job.trained["b"], IMAGE.weights]
    np.testing.assert_allclose(job.system.weights, np.mean(models, axis=0), atol=1e-5)


def test_updates_sent_ahead_of_any_answer_are_differences_to_each_other(tmp_path):
    """Three trainings from version 0 while the broker was away: together they are the last one's model, not thrice."""
    job = Job(tmp_path)
    sent = [job.train("a") for _ in range(3)]
    np.testing.assert_allclose(IMAGE.weights + sum(sent), job.trained["a"], atol=1e-5)
    job.publish("a")
    job.decide()
    job.check()
    np.testing.assert_allclose(job.system.weights, IMAGE.weights + sum(sent) / 3, atol=1e-5)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize(
    ("spoil", "outcome"), [(corrupt, "rejected"), (of_another_layout, "rejected"), (None, "stale")]
)
def test_a_refused_update_leaves_the_memory_again(tmp_path, codec, spoil, outcome):
    job = Job(tmp_path, codec, staleness_max=0)
    first = job.train("a")
    if spoil is None:
        job.turn("b")
    job.publish("a", spoil)
    job.decide()
    assert job.outcomes()[outcome] == 1
    job.check()
    np.testing.assert_allclose(job.memory("a"), IMAGE.weights + first, atol=1e-5)
    second = job.train("a")
    np.testing.assert_allclose(job.memory("a"), IMAGE.weights + second, atol=1e-5)  # as if the first had not been
    assert job.devices["a"].metrics.returned._value.get() == 1
    job.publish("a")
    job.decide()
    job.check()


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("restart", [False, True])
def test_a_kill_between_encode_and_put_changes_nothing(tmp_path, codec, restart):
    job = Job(tmp_path, codec)
    job.turn("a")
    before, size = job.memory("a"), len(job.devices["a"].outbox)
    with killed_before_put():
        job.devices["a"].worker.step()
    np.testing.assert_array_equal(job.memory("a"), before)
    assert len(job.devices["a"].outbox) == size
    if restart:
        job.restart("a")
    sent = job.turn("a")
    np.testing.assert_allclose(job.memory("a"), before + sent, atol=1e-5)
    job.check()


def test_a_restart_changes_nothing(tmp_path):
    steady, restarted = Job(tmp_path / "x", EF), Job(tmp_path / "y", EF)
    for name in "abcacba":
        np.testing.assert_array_equal(steady.turn(name), restarted.turn(name))
        restarted.restart(name)
    np.testing.assert_array_equal(steady.system.weights, restarted.system.weights)


@pytest.mark.parametrize("refused", [False, True])
def test_a_memory_does_not_fade_however_old(tmp_path, refused):
    """A residual of a job with staleness_max 0 would be halved with every version; also what comes back is whole."""
    job = Job(tmp_path, EF, staleness_max=0)
    job.turn("a")
    old = job.memory("a")
    if refused:
        job.train("a")
    for _ in range(60):
        job.turn("b")
    if refused:
        job.publish("a")
        job.decide()
        assert job.outcomes()["stale"] == 1
    sent = job.train("a")
    np.testing.assert_allclose(job.memory("a"), old + sent, atol=1e-5)
    job.publish("a")
    job.decide()
    job.check()


@pytest.mark.parametrize("codec", ["float32", "float16", "int8"])
def test_a_codec_without_feedback_keeps_the_memory_and_mends_its_own_rounding(tmp_path, codec):
    """What one update rounds off is in the next difference: the memory is never further off than one rounding."""
    job = Job(tmp_path, codec)
    job.turn("a")
    off = np.abs(job.memory("a") - job.trained["a"]).max()
    assert off <= 0.05
    for _ in range(20):
        job.turn("a")
        assert np.abs(job.memory("a") - job.trained["a"]).max() <= 0.05
    job.check()


def test_a_codec_that_changes_under_way_goes_on_with_the_same_memory(tmp_path):
    job = Job(tmp_path, EF)
    for codec in ("float32", "int8", EF, "float32"):
        for name in "abc":
            job.turn(name)
        job.system.restart(codec=codec)
        job.check()


# --- a rule that changes -------------------------------------------------------------------------------------


def change_rule(job, **settings):
    """Start the aggregator with other settings, and make a version so that the workers look."""
    job.system.settings = AggregatorSettings(
        **{"job": JOB, "codec": EF, "commit_interval_s": 0.0, "buffer_size": 1} | settings
    )
    job.system.restart()
    job.system.publish(np.zeros(IMAGE.layout.num_params, np.float32), layout=IMAGE.layout.hash, update_id="z/i/0")
    job.decide()


def spoil_below(number):
    """Return what corrupts updates with a lower number."""

    def spoil(body):
        return corrupt(body) if int(decode(body, 10**6).update_id.rsplit("/", 1)[1]) < number else body

    return spoil


@pytest.mark.parametrize("when", ["told before", "told later"])
@pytest.mark.parametrize("restart", [False, True])
@pytest.mark.parametrize("last", [EF, "float32"])  # with float32 there is no residual left, but updates that carry one
def test_a_memory_begins_anew_when_the_rule_changes_to_area(tmp_path, monkeypatch, when, restart, last):
    """At version 0, where alone it may; none of the former rule's updates enters the memory when it is refused."""
    job = Job(tmp_path, EF, rule="fedbuff", clients=None)
    job.train("a")
    if when == "told before":
        job.publish("a", corrupt)
        job.decide()
        assert job.outcomes() == {"rejected": 1}
    if last != EF:
        job.system.restart(codec=last)
        job.restart("a")  # it looks
        with monkeypatch.context() as patch:
            patch.setattr(job.system.store, "outcomes", lambda client, after: ([], after))
            job.train("a")
        assert residual_file.parse((job.folder / "a" / "residual").read_bytes())[1] is None
    change_rule(job, rule="area", clients=3)
    if restart:
        job.restart("a")
    former = job.devices["a"].outbox.next_sequence
    total = job.system.store.model(0).weights + job.train("a")
    np.testing.assert_allclose(job.memory("a"), total, atol=1e-5)
    job.publish("a", spoil_below(former))
    job.decide()
    assert job.outcomes() == {"rejected": former, "applied": 2}
    for _ in range(2):
        total = total + job.train("a")
        np.testing.assert_allclose(job.memory("a"), total, atol=1e-5)
        assert job.devices["a"].metrics.returned._value.get() == 0
        job.restart("a")
    assert {int(path.stem) for path in (job.folder / "a").glob("*.sent")} <= {former}


@pytest.mark.parametrize("when", ["told before", "told later"])
@pytest.mark.parametrize("restart", [False, True])
def test_a_residual_begins_anew_when_the_rule_changes_from_area(tmp_path, when, restart):
    job = Job(tmp_path, EF)
    job.turn("b")
    job.train("a")
    if when == "told before":
        job.publish("a", corrupt)
        job.decide()
    change_rule(job, rule="fedbuff")
    if restart:
        job.restart("a")
    base, former = job.system.weights.astype(np.float64), job.devices["a"].outbox.next_sequence
    left = -job.train("a") + job.trained["a"] - base
    for _ in range(2):
        np.testing.assert_allclose(residual_on_disk(job.folder / "a", left.size)[1], left, atol=1e-5)
        assert job.devices["a"].metrics.returned._value.get() == 0
        job.publish("a", spoil_below(former))
        job.decide()
        base = job.system.weights.astype(np.float64)
        left = left - job.train("a") + job.trained["a"] - base
    assert job.outcomes()["rejected"] == 1


@pytest.mark.parametrize(("before", "after"), [("fedbuff", "area"), ("area", "fedbuff")])
def test_a_running_worker_notices_that_the_rule_changed_though_no_version_was_made(tmp_path, before, after):
    job = Job(tmp_path, "float32", rule=before, clients=3 if before == "area" else None)
    job.train("a")
    job.publish("a", corrupt)
    job.decide()
    job.system.settings = AggregatorSettings(
        **{"job": JOB, "codec": "float32", "commit_interval_s": 0.0, "buffer_size": 1, "rule": after}
        | ({"clients": 3} if after == "area" else {})
    )
    job.system.restart()
    job.train("a")
    path = job.folder / "a" / "residual"
    kind = residual_file.parse(path.read_bytes())[0].kind if path.exists() else "residual"
    assert kind == ("memory" if after == "area" else "residual")


# --- a delta too large ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("codec", CODECS)
def test_a_delta_beyond_the_limit_is_a_task_error_and_leaves_the_memory(tmp_path, codec, monkeypatch):
    job = Job(tmp_path, codec)
    job.turn("a")
    before, number = job.memory("a"), job.devices["a"].outbox.next_sequence
    job.scale = 1e30
    for limit in (1e11, np.inf):  # the trainer's own check, and with it out of the way the codec's
        monkeypatch.setattr(worker.training, "NORM_MAX", limit)
        for _ in range(2):
            with pytest.raises(TaskError):
                job.devices["a"].worker.step()
        np.testing.assert_array_equal(job.memory("a"), before)
        assert job.devices["a"].outbox.next_sequence == number
    job.scale = 1.0
    sent = job.turn("a")
    np.testing.assert_allclose(job.memory("a"), before + sent, atol=1e-5)
    job.check()


def test_the_reasons_the_sinks_provoke_are_the_ones_meant(tmp_path):
    job = Job(tmp_path)
    job.turn("a", corrupt)
    job.turn("a", of_another_layout)
    assert [letter.reason for letter in job.system.broker.dead] == [Reason.CHECKSUM, Reason.LAYOUT]
