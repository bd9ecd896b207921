"""A simulated client: what it fetches is counted, what it trains from is right, between trips it is its folder."""

import numpy as np
import pytest

from ops.simulation.clients import Clients, SharedWeights, StoreAsOf
from ops.simulation.database import Database, Folders
from shared.published import carry_out, plan
from tests.builders import JOB, NUM_PARAMS, System, model_of, update_of, weights
from worker.task import Task, TrainResult
from worker.training import Trainer


class Module:
    """A task."""

    @staticmethod
    def build():
        return {"w": np.zeros(NUM_PARAMS, np.float32)}

    @staticmethod
    def train(model, context):
        model["w"] += 1
        return TrainResult(1, 1)


@pytest.fixture(params=["off", "on", "bfloat16"])
def system(request):
    how = {"snapshots": "bfloat16"} if request.param == "bfloat16" else {"downlink": request.param}
    return System(weights(1), buffer_size=1, **how)


def clients_of(system, folders=None, held=None):
    return Clients(
        system.store, system.broker.sink(), folders or Folders(Database(None)), Trainer(Task("test", Module)),
        system.clock, JOB, 7, lambda number: f"client-{number}", lambda number: {"share": str(number)},
        {} if held is None else held,
    )  # fmt: skip


def move(system, versions=1):
    for _ in range(versions):
        system.publish(weights(system.store.head().version + 5))
        system.drain()


def visible(system):
    """Return what a worker without any weights pulls."""
    head = system.store.head()
    if not head.published:
        return system.store.model(head.version).weights
    return carry_out(plan(system.store.published(-1), head.version, -1), system.store, None).weights


def trip(clients, number):
    """Set out, return what it starts from and what it fetched, and come back."""
    client = clients.set_out(number)
    training = client.worker.begin()
    clients.pulled(number)
    clients.come_back(number)
    return training, client.replica.fetched_bytes


def test_it_trains_from_what_is_published(system):
    clients = clients_of(system)
    for _ in range(4):
        training, fetched = trip(clients, 0)
        np.testing.assert_array_equal(training.base.weights, visible(system))
        assert training.context.version == system.store.head().version
        assert fetched > 0
        move(system, 2)


def test_who_holds_the_version_fetches_nothing_and_trains_from_it(system):
    clients = clients_of(system)
    move(system)
    assert trip(clients, 0)[1] > 0
    move(system)
    assert trip(clients, 0)[1] > 0
    training, fetched = trip(clients, 0)
    assert fetched == 0
    np.testing.assert_array_equal(training.base.weights, visible(system))


def test_it_does_so_also_when_nobody_has_pulled_since_a_resume(system):
    held = {}
    move(system)
    trip(clients_of(system, held=held), 0)
    training, fetched = trip(clients_of(system, held=held), 0)
    assert fetched == 0
    np.testing.assert_array_equal(training.base.weights, visible(system))


class Large(Module):
    """A task for whose model a delta is smaller than a snapshot."""

    @staticmethod
    def build():
        return {"w": np.zeros(5000, np.float32)}


@pytest.fixture
def large():
    """Return a job and its clients."""
    system = System(weights(1, 5000), buffer_size=1, downlink="on")
    clients = clients_of(system)
    clients._trainer = Trainer(Task("test", Large))
    clients._shared = SharedWeights(system.store, clients._trainer)
    return system, clients


def test_deltas_are_counted_from_the_version_it_holds(large):
    system, clients = large
    first = trip(clients, 0)[1]
    system.publish(weights(3, 5000) * 0.01)
    system.drain()
    behind = trip(clients, 0)[1]
    newcomer = trip(clients, 1)[1]
    assert behind == system.store.published(0).deltas[-1].size_bytes
    assert newcomer >= first > behind


def test_weights_under_training_are_not_changed_by_the_next_pull(large):
    system, clients = large
    training, _ = trip(clients, 0)
    before = training.base.weights.copy()
    system.publish(weights(3, 5000) * 0.01)
    system.drain()
    trip(clients, 0)
    np.testing.assert_array_equal(training.base.weights, before)


def test_between_trips_there_is_only_the_folder(system):
    folders = Folders(Database(None))
    clients = clients_of(system, folders)
    client = clients.set_out(0)
    training = client.worker.begin()
    client.worker.finish(training, clients._trainer.train(training), lambda: 0.0)
    clients.trained(0)
    assert clients._out == {}
    again = clients_of(system, folders)  # as after a resume
    assert again.publish(0)
    assert system.broker.depth(JOB) == 1
    assert not again.publish(0)


def test_ids_and_seeds_do_not_depend_on_the_run(system):
    one, other = (clients_of(system).set_out(3) for _ in range(2))
    assert one.outbox.next_id() == other.outbox.next_id() == "client-3/simulated/0"
    assert one.worker.begin().context.seed == other.worker.begin().context.seed
    assert one.worker.begin().context.settings == {"share": "3"}
    assert clients_of(system).set_out(4).worker.begin().context.seed != one.worker.begin().context.seed


def test_a_store_as_of_a_revision_does_not_know_what_came_later():
    system = System(buffer_size=1)
    for sequence in range(3):
        system.send(update_of(weights(1), update_id=f"a/i/{sequence}"))
        system.drain()
    past = StoreAsOf(system.store, 2)
    assert past.outcomes("a", 0) == ([("a/i/0", "applied"), ("a/i/1", "applied")], 2)
    assert past.outcomes("a", 1) == ([("a/i/1", "applied")], 2)
    assert past.outcomes("a", 2) == ([], 2)
    assert past.head() == system.store.head()
    assert past.layout() == model_of(weights(1)).layout
