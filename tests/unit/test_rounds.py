"""Rule fedavg: a worker takes part once a round, and no round waits for somebody who waits for it."""

from types import SimpleNamespace

import numpy as np
import pytest

from shared.errors import Reason
from shared.model_image import ModelImage
from shared.store.inprocess import InProcessStore
from shared.transport.ports import Outgoing
from tests.builders import NUM_PARAMS, FaultyStore, System, add_one, device_of, model_of
from worker.task import TrainResult
from worker.worker import ROUND_UPDATES_MAX

ZERO = np.zeros(NUM_PARAMS, np.float32)


class Rounds:
    """A job of rounds and its workers."""

    def __init__(self, folder, names, buffer_size, codec="float32"):
        self.folder, self.trainings = folder, []
        self.system = System(store=FaultyStore(), rule="fedavg", buffer_size=buffer_size, codec=codec)
        self.devices = {name: self._open(name) for name in names}

    def _open(self, name):
        def train(model, context):
            self.trainings.append((context.client, context.version))
            return add_one(model, context)

        return device_of(self.folder, self.system, train, lambda: {"w": ZERO.copy()}, client_id=name)

    def restart(self, name):
        """Start a worker again from its files."""
        self.devices[name].outbox.close()
        self.devices[name] = self._open(name)

    def step(self, name):
        """Let a worker look; tell whether it made an update."""
        return self.devices[name].worker.step()

    def publish(self, name, corrupt=False):
        """Publish what waits."""
        publisher = self.devices[name].publisher
        sink = publisher._sink
        if corrupt:
            publisher._sink = SimpleNamespace(
                publish=lambda message, timeout_s: sink.publish(spoilt(message), timeout_s)
            )
        while publisher.step():
            pass
        publisher._sink = sink

    def decide(self):
        """Let the aggregator decide on everything, durably."""
        self.system.drain()
        self.system.clock.time_s += 1000
        self.system.step()
        self.system.drain()

    def turn(self, name, corrupt=False):
        """Step, publish, decide; tell whether there was an update."""
        made = self.step(name)
        self.publish(name, corrupt)
        self.decide()
        return made

    @property
    def version(self):
        """The newest version."""
        return self.system.store.head().version

    def reasons(self):
        """Return why updates were rejected."""
        return [letter.reason for letter in self.system.broker.dead]

    def begin_anew(self, start=ZERO, seen=False):
        """Delete the job and begin it again; optionally the workers look in between."""
        store = self.system.store
        store.inner = InProcessStore()
        if seen:
            assert not any(self.step(name) for name in self.devices)
        store.inner.create(model_of(start), self.system.clock.now() + 1)
        self.system.restart()


def spoilt(message):
    place = message.body.index(b"checksum") + 10
    body = message.body[:place] + bytes([message.body[place] ^ 1]) + message.body[place + 1 :]
    return Outgoing(message.job, message.client, message.update_id, body)


@pytest.mark.parametrize("codec", ["float32", "ef | topk(0.25)"])
def test_a_worker_takes_part_once_a_round(tmp_path, codec):
    rounds = Rounds(tmp_path, "ab", 2, codec)
    for version in range(3):
        assert rounds.turn("a")
        for _ in range(3):
            assert rounds.devices["a"].worker.begin() is None
            assert not rounds.turn("a")
        assert rounds.turn("b")
        assert rounds.version == version + 1
    assert rounds.trainings == [(name, version) for version in range(3) for name in "ab"]
    assert rounds.reasons() == []
    if codec == "float32":
        np.testing.assert_allclose(rounds.system.weights, 3 * np.ones(NUM_PARAMS), rtol=1e-6)


def test_a_worker_that_waits_reads_each_outcome_once(tmp_path, monkeypatch):
    """And one that was refused trains again although a training in between came to nothing."""
    rounds = Rounds(tmp_path, "a", 3)
    inner, reads = InProcessStore.outcomes, []

    def noted(self, client, after):
        told, cursor = inner(self, client, after)
        reads.append((after, len(told)))
        return told, cursor

    monkeypatch.setattr(InProcessStore, "outcomes", noted)
    worker = rounds.devices["a"].worker
    assert rounds.turn("a", corrupt=True)
    assert worker.begin() is not None, "refused: it may train again"
    reads.clear()
    assert worker.begin() is not None, "and again, for nothing came of that"
    assert rounds.turn("a")
    after = rounds.system.store.head().revision
    reads.clear()
    for _ in range(3):
        assert not rounds.step("a")
    assert sum(count for _, count in reads) <= 2, "once for the round, once for the residual"
    assert reads[-1] == (after, 0)


@pytest.mark.parametrize("where", ["outbox", "queue", "open buffer", "committed"])
def test_it_waits_wherever_its_update_is(tmp_path, where):
    rounds = Rounds(tmp_path, "ab", 2)
    assert rounds.step("a")
    if where != "outbox":
        rounds.publish("a")
    if where in ("open buffer", "committed"):
        rounds.system.drain()
    if where == "committed":
        rounds.decide()
        assert rounds.system.outcomes()[0][1] == "applied"
    assert not rounds.step("a")
    assert rounds.trainings == [("a", 0)]


def test_a_buffered_rule_does_not_wait(tmp_path):
    rounds = Rounds(tmp_path, "a", 2)
    rounds.system.settings = type(rounds.system.settings)(
        job=rounds.system.settings.job, codec="float32", commit_interval_s=0.0, buffer_size=2
    )
    rounds.system.restart()
    assert rounds.turn("a")
    assert rounds.turn("a")
    assert rounds.version == 1


@pytest.mark.parametrize("codec", ["float32", "ef | topk(0.25)"])
def test_a_worker_whose_update_was_rejected_trains_again_in_the_same_round(tmp_path, codec):
    rounds = Rounds(tmp_path, "ab", 2, codec)
    assert rounds.turn("b")
    for _ in range(ROUND_UPDATES_MAX - 1):
        assert rounds.turn("a", corrupt=True)
        assert rounds.version == 0
    assert rounds.turn("a")
    assert rounds.version == 1
    assert rounds.reasons() == [Reason.CHECKSUM] * (ROUND_UPDATES_MAX - 1)
    assert rounds.trainings == [("b", 0)] + [("a", 0)] * ROUND_UPDATES_MAX


def test_somebody_elses_rejection_is_not_ours(tmp_path):
    rounds = Rounds(tmp_path, "abc", 3)
    assert rounds.turn("a")
    assert rounds.turn("b", corrupt=True)
    assert not rounds.turn("a")
    assert rounds.turn("b")
    assert rounds.turn("c")
    assert rounds.version == 1


def test_an_update_that_was_delivered_twice_does_not_make_its_worker_train_again(tmp_path):
    rounds = Rounds(tmp_path, "ab", 2)
    assert rounds.step("a")
    waiting = rounds.devices["a"].outbox.oldest()
    body, update_id = waiting.body(), waiting.update_id
    rounds.publish("a")
    rounds.system.send_bytes(body, "a", update_id)
    rounds.decide()
    assert [outcome for _, outcome in rounds.system.outcomes()] == ["applied", "duplicate"]
    assert not rounds.step("a")


def test_while_the_store_is_away_a_worker_that_took_part_does_not_train_again(tmp_path):
    rounds = Rounds(tmp_path, "ab", 2)
    assert rounds.turn("a")
    rounds.system.store.failing = ("head", "job", "model", "outcomes")
    with pytest.raises(Exception, match="away"):
        rounds.step("a")
    rounds.system.store.failing = ()
    assert not rounds.step("a")
    assert rounds.trainings == [("a", 0)]


def test_a_restarted_workers_second_update_is_surplus_and_the_round_completes(tmp_path):
    rounds = Rounds(tmp_path, "ab", 2)
    assert rounds.turn("a")
    rounds.restart("a")
    rounds.turn("a")  # it has no way to know, or has: both will do
    assert set(rounds.reasons()) <= {Reason.SURPLUS}
    assert rounds.version == 0
    assert rounds.turn("b")
    assert rounds.version == 1
    np.testing.assert_allclose(rounds.system.weights, np.ones(NUM_PARAMS))  # a counts once
    assert rounds.turn("a")
    assert rounds.turn("b")
    assert rounds.version == 2


def test_a_restarted_worker_does_not_train_for_the_round_over_and_over(tmp_path):
    """Its update is surplus, and the next is as well: it tries a few times, not for ever."""
    rounds = Rounds(tmp_path, "ab", 2)
    assert rounds.turn("a")
    rounds.restart("a")
    for _ in range(10):
        rounds.turn("a")
    assert len(rounds.trainings) <= 1 + ROUND_UPDATES_MAX
    assert len(rounds.reasons()) <= ROUND_UPDATES_MAX


@pytest.mark.parametrize("seen", [False, True])
@pytest.mark.parametrize("start", [ZERO, ZERO + 1], ids=["same weights", "other weights"])
@pytest.mark.parametrize("looked", [True, False])
def test_a_job_begun_anew_does_not_leave_the_worker_waiting(tmp_path, seen, start, looked):
    """Also when nobody saw that it was gone, and its first weights are the former's."""
    rounds = Rounds(tmp_path, "ab", 2)
    assert rounds.turn("a")
    assert rounds.system.store.head().revision == 1
    if looked:
        assert not rounds.turn("a")
    rounds.begin_anew(start, seen)
    for version in range(2):
        assert rounds.turn("a")
        assert rounds.turn("b")
        assert rounds.version == version + 1


def test_a_job_begun_anew_before_anything_was_committed_does_not_leave_the_worker_waiting(tmp_path):
    """Version 0, revision 0 and the same weights before and after; only what it was created at differs."""
    rounds = Rounds(tmp_path, "ab", 2)
    assert rounds.step("a")
    rounds.publish("a")
    rounds.system.source.receive(1, 0.0)
    rounds.system.source.ack([])
    rounds.system.source._unacked.clear()  # the queue is deleted with the job
    store = rounds.system.store
    store.inner = InProcessStore()
    store.inner.create(model_of(ZERO), 500.0)
    rounds.system.restart()
    assert rounds.turn("a")
    assert rounds.turn("b")
    assert rounds.version == 1


@pytest.mark.parametrize("codec", ["float32", "ef | topk(0.25)"])
def test_with_over_selection_the_late_one_is_refused_as_stale_and_takes_part_in_the_next_round(tmp_path, codec):
    rounds = Rounds(tmp_path, "abc", 2, codec)
    for version in range(3):
        late, *fast = [("c", "a", "b"), ("a", "b", "c"), ("b", "c", "a")][version]
        assert all(rounds.step(name) for name in (late, *fast))
        for name in fast:
            rounds.publish(name)
        rounds.decide()
        assert rounds.version == version + 1
        rounds.publish(late)
        rounds.decide()
        told = [outcome for update_id, outcome in rounds.system.outcomes() if update_id.startswith(f"{late}/")]
        assert told[-1] == "stale"
        assert rounds.version == version + 1
    assert [version for _, version in rounds.trainings] == [0] * 3 + [1] * 3 + [2] * 3
    assert rounds.reasons() == []


def test_an_update_that_came_late_for_its_round_does_not_bar_its_worker_from_the_next(tmp_path):
    rounds = Rounds(tmp_path, "abc", 2)
    assert rounds.step("c")
    assert rounds.turn("a")
    assert rounds.turn("b")
    assert rounds.step("c")  # before its first one is refused
    rounds.publish("c")
    rounds.decide()
    assert [outcome for update_id, outcome in rounds.system.outcomes() if update_id[0] == "c"] == ["stale", "applied"]
    assert not rounds.step("c")
    assert rounds.turn("a")
    assert rounds.version == 2


def test_a_model_of_several_tensors_is_the_mean_of_the_rounds_models(tmp_path):
    start = {"w": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.float32([1])}
    system = System(ModelImage.of(start), rule="fedavg", buffer_size=2)
    moves = {"a": 2.0, "b": 5.0}

    def train(model, context):
        for array in model.values():
            array += moves[context.client]
        return TrainResult(1, 1)

    for name in "ab":
        device = device_of(tmp_path, system, train, lambda: {k: a.copy() for k, a in start.items()}, client_id=name)
        assert device.worker.step()
        device.publisher.step()
    system.drain()
    np.testing.assert_allclose(system.weights, ModelImage.of(start).weights + 3.5)


def test_waiting_for_the_round_is_said_once_a_round(tmp_path, caplog):
    rounds = Rounds(tmp_path, "ab", 2)
    for version in (1, 2):
        assert rounds.turn("a")
        for _ in range(5):
            assert not rounds.step("a")
        assert caplog.text.count("waiting for the next") <= version
        assert rounds.turn("b")
