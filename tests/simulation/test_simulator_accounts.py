"""What goes in comes out once, and time passes as the models of speed, network and availability say."""

import gc
import math
from collections import Counter

import numpy as np
import pytest

from ops.simulation import simulator as module
from ops.simulation.availability import Availability
from ops.simulation.database import Database
from ops.simulation.simulator import TRAINED, Simulator
from shared.model_image import ModelImage
from tests.simulation.runs import After, begin, finish, small, whole
from tests.simulation.test_simulator_determinism import SCENARIOS
from worker.worker import Worker

CONSTANT = {"speed": "constant(60)", "persistent": False}


@pytest.mark.parametrize("name", SCENARIOS)
def test_nothing_is_lost_or_counted_twice(name):
    plan = small(SCENARIOS[name])
    run = whole(plan).simulator
    outcomes, counts = run.history.outcomes, run.counts
    assert set(outcomes) <= {"applied", "stale", "rejected"}
    assert outcomes.total() == counts.published
    failed = sum(run.failures.values())
    assert run.trips == counts.published + counts.lost + counts.aborted + failed + run.in_flight
    devices = Counter(run._idle) + Counter(run._resting)
    devices += Counter(f.client for f in run._flights.values() if f.client != plan.trusted)
    assert max(devices.values()) == 1
    if not plan.fleet.rest_s:
        assert sorted(devices) == list(range(12))
    assert len(run._flights) - run._beside <= plan.fleet.in_flight
    assert set(run._submitted) <= set(run._flights)
    assert run._beside == sum(flight.beside for flight in run._flights.values())


@pytest.mark.parametrize(("concurrency", "buffer_size"), [(1, 1), (6, 4), (6, 3), (5, 7), (12, 1), (11, 3)])
def test_mean_staleness_is_concurrency_over_buffer_size(concurrency, buffer_size):
    """Trips of equal length come back in the order they left.

    The trip that leaves after publication i is publication i + M. So it leaves from version floor(i / K) and meets
    version floor((i + M - 1) / K), and the mean of the difference over i is (M - 1) / K: the M devices at work, the
    one that publishes left out, over the buffer.
    """
    plan = small(CONSTANT, concurrency=concurrency, buffer_size=buffer_size, updates=12 * concurrency * buffer_size)
    history = whole(plan).simulator.history
    left = range(1, plan.fleet.updates - concurrency + 1)
    steady = [(i + concurrency - 1) // buffer_size - i // buffer_size for i in left]
    assert history.staleness == [j // buffer_size for j in range(concurrency)] + steady
    cycle = steady[: len(steady) // buffer_size * buffer_size]
    assert np.mean(cycle) == pytest.approx((concurrency - 1) / buffer_size, abs=1e-12)


@pytest.mark.parametrize("updates", [1, 6, 7, 60])
def test_the_end_comes_when_the_last_trip_is_over(updates):
    run = whole(small(CONSTANT, updates=updates, buffer_size=1))
    assert run.time_s == 60 * math.ceil(updates / 6)


def test_the_end_comes_at_the_hour():
    run = whole(small(CONSTANT, updates=None, hours=0.21, buffer_size=1))
    assert run.time_s == 0.21 * 3600
    assert run.counts["published"] == 6 * math.floor(0.21 * 60)


def test_whichever_is_over_first():
    assert whole(small(CONSTANT, hours=0.1)).time_s == 0.1 * 3600
    assert whole(small(CONSTANT, hours=100)).counts["published"] == 60


def test_bytes_take_time():
    plan = small(
        CONSTANT, concurrency=1, updates=2, buffer_size=1, down_mbps=0.002, up_mbps=0.001, latency_ms=500, codec="none"
    )  # fmt: skip
    run = whole(plan).simulator
    model = run.model().data.size
    assert run.history.pulls == 2
    assert run.history.bytes_pulled == 2 * model
    latency_s = 4 * 0.5
    expected = latency_s + 2 * 60 + 2 * model * 8 / 2000 + run.history.bytes_sent * 8 / 1000
    assert run.clock.time_s == pytest.approx(expected, rel=1e-12)


def test_who_holds_the_newest_version_fetches_nothing():
    run = whole(small(CONSTANT, clients=1, concurrency=1, buffer_size=1, updates=3)).simulator
    assert run.history.pulls == 3
    run = whole(small(CONSTANT, clients=6, concurrency=6, buffer_size=6, updates=12)).simulator
    assert run.trips == 6 + 11  # the last update is the end
    assert run.history.pulls == 6 + 6  # the first five that came back left again before there was another version


def test_deltas_are_fetched_where_there_are():
    off, on = (whole(small(downlink=how)).simulator.history for how in ("off", "on"))
    assert 0 < on.bytes_pulled < off.bytes_pulled
    assert on.pulls == off.pulls


def test_the_share_of_trips_that_is_lost():
    run = whole(small(dropout=0.4, updates=600)).simulator
    done = run.trips - run.in_flight
    assert run.counts.lost == pytest.approx(0.4 * done, abs=4 * math.sqrt(done * 0.24))


@pytest.mark.parametrize("how", ["churn(0.4, 2)", "diurnal(6)", "diurnal(12) & churn(0.5)"])
def test_nobody_sets_out_or_publishes_while_away(how, monkeypatch):
    plan = small(availability=how, updates=150)
    patterns = Availability(how, 0, 12, plan.fleet.seed)
    begun, sent = [], []
    start, publish = Simulator._start, Simulator._publish

    def starting(self, client):
        begun.append((client, self.clock.time_s))
        start(self, client)

    def publishing(self, number):
        sent.append((self._flights[number].client, self.clock.time_s))
        publish(self, number)

    monkeypatch.setattr(Simulator, "_start", starting)
    monkeypatch.setattr(Simulator, "_publish", publishing)
    whole(plan)
    assert len(sent) == 150
    assert all(patterns.available(*who_when) for who_when in begun + sent)
    assert len({client for client, _ in begun}) >= 5


def test_idle_devices_are_woken_when_the_first_of_them_is_back():
    """One device that is there a third of the time works whenever it is: no night is slept through."""
    plan = small(CONSTANT, clients=1, concurrency=1, availability="diurnal(8)", updates=4 * 480 + 100, buffer_size=1)
    assert whole(plan).time_s < 5 * 86400
    plan = small(plan.fleet.model_dump(), rest_s=1800, updates=100, buffer_size=1)  # it wakes at night, and sleeps on
    assert whole(plan).time_s < 10 * 86400


def test_a_device_rests_between_two_trips():
    plan = small(CONSTANT, clients=1, concurrency=1, updates=400, buffer_size=1, rest_s=30)
    run = whole(plan)
    assert run.time_s == pytest.approx(400 * 60 + 399 * 30, abs=4 * 30 * math.sqrt(400))


def test_correlated_means_that_the_last_shares_are_slow():
    speeds = begin(small(correlated=True))._speeds.means()
    assert list(speeds) == sorted(speeds)


def test_attackers_send_something_else_and_hurry():
    fair = whole(small(updates=100)).simulator
    flipped = whole(small(updates=100, attackers=0.3, attack="sign_flip(3)")).simulator
    assert flipped.history.by_client == fair.history.by_client  # they look like everybody else
    assert flipped.history.rows[-1].loss > 2 * fair.history.rows[-1].loss
    flooded = whole(small(CONSTANT, attackers=0.1, attack="flood(10)", clients=10, concurrency=10, updates=200))
    by_client = flooded.simulator.history.by_client
    assert len(flooded.simulator._attackers) == 1
    name = f"client-{next(iter(flooded.simulator._attackers))}"
    assert by_client[name] == pytest.approx(10 * 200 / 19, abs=10)


def test_only_attackers_attack(monkeypatch):
    spoiled = []
    monkeypatch.setattr(module, "spoil", lambda delta, attack, seed: spoiled.append(seed))
    run = whole(small(attackers=0.25, updates=120))
    trips = sum(run.simulator._trips[client] for client in run.simulator._attackers)
    assert trips - 6 <= len(spoiled) <= trips
    assert run.sha256 == whole(small(updates=120)).sha256


def test_each_round_sees_as_many_devices_as_there_are_places():
    spread = {"speed": "uniform(60, 61)", "persistent": False}
    run = whole(small(spread, rule="fedavg", clients=12, concurrency=9, buffer_size=4, updates=40)).simulator
    assert 10 * 60 < run.clock.time_s < 10 * 61
    assert run.trips == 10 * 9  # the trips of the last round are aborted with it
    assert run.counts.aborted == 10 * 5
    assert run.history.staleness == [0] * 40


def test_a_device_takes_part_in_a_round_once():
    plan = small(CONSTANT, rule="fedavg", clients=12, concurrency=12, buffer_size=12, updates=120)
    run = whole(plan).simulator
    assert set(run.history.by_client.values()) == {10}


def test_what_is_on_its_way_when_the_round_ends_is_refused_and_its_sender_takes_part_again():
    plan = small(
        CONSTANT, rule="fedavg", clients=9, concurrency=9, buffer_size=3, updates=90, up_mbps=0.001, bandwidth_sigma=1
    )  # fmt: skip
    run = whole(plan).simulator
    assert run.history.outcomes["stale"] > 5
    assert run.history.outcomes["applied"] > 30
    assert run.aggregator.state.version == run.history.outcomes["applied"] // 3


def test_lost_devices_come_back_into_the_round():
    """As many devices as places: without that, the first loss would stop the run."""
    plan = small(CONSTANT, rule="fedavg", clients=6, concurrency=6, buffer_size=6, updates=60, dropout=0.3)
    run = whole(plan).simulator
    assert run.counts.lost > 5
    assert run.history.outcomes == {"applied": 60}


def test_an_aborted_trip_leaves_nothing_in_the_outbox(monkeypatch):
    run = begin(small(rule="fedavg", concurrency=9, codec="ef | topk(0.2)"))
    act = Simulator._act

    def checking(self, kind, client, number):
        if kind == TRAINED and number in self._flights:
            folder = self._folders.folder(client)
            assert not [name for name in folder.names() if name.endswith(".update")]
        act(self, kind, client, number)
        self.checkpoint()

    monkeypatch.setattr(Simulator, "_act", checking)
    finish(run)
    assert run.counts.aborted > 10


def test_trainings_of_a_round_are_queued_again_after_a_resume(tmp_path):
    plan, path = small(rule="fedavg", concurrency=9), tmp_path / "run.sqlite"
    first = begin(plan, Database(path), After(2))
    with pytest.raises(KeyboardInterrupt):
        finish(first)
    first._database.close()
    resumed = begin(plan, Database(path))
    pending = {number for number, flight in resumed._flights.items() if flight.training is not None}
    assert len(pending) > 5
    assert {number for _, number in resumed._waiting} | set(resumed._submitted) == pending


def test_the_trusted_device_is_beside_the_others(monkeypatch):
    plan = small(CONSTANT, robust="zeno", trusted_client="judge", updates=120, attackers=0.3, attack="sign_flip(5)")
    settings = []
    set_out = Simulator._set_out

    def noting(self, client, revision=None):
        training, fetched = set_out(self, client, revision)
        settings.append((training.context.client, dict(training.context.settings), self.clock.time_s))
        return training, fetched

    monkeypatch.setattr(Simulator, "_set_out", noting)
    run = whole(plan).simulator
    own = [entry for entry in settings if entry[0] == "judge"]
    assert own[0][2] == 0
    assert min(time_s for client, _, time_s in settings if client != "judge") == 60  # it goes first
    assert [time_s for _, _, time_s in own] == [60 * i for i in range(len(own))]
    assert own[0][1] == {"partition": "iid", "share": "0", "shares": "12"}
    assert 12 not in run._attackers
    trips = Counter(client for client, _, _ in settings)
    assert trips["judge"] == pytest.approx((sum(trips.values()) - trips["judge"]) / 6, abs=2)
    assert run.history.outcomes["rejected"] > 10
    attacked = [f"client-{client}" for client in run._attackers]
    assert sum(run.history.by_client[name] for name in attacked) < 0.05 * run.history.outcomes["applied"]


def test_an_idle_device_holds_no_model():
    gc.collect()
    before = sum(isinstance(thing, ModelImage) for thing in gc.get_objects())
    run = whole(small(clients=2000, concurrency=50, updates=1500, codec="ef | topk(0.2)", versions_kept=2)).simulator
    gc.collect()
    things = gc.get_objects()
    assert sum(isinstance(thing, ModelImage) for thing in things) - before <= 4
    assert sum(isinstance(thing, Worker) for thing in things) <= 50
    assert len(run._clients.held) > 900
    assert len(run._clients._senders) <= 50
    assert len(run._broker.dead) == 0


def test_refused_updates_are_not_kept():
    run = whole(small(robust="aflguard(0.001)", trusted_client="judge", updates=100)).simulator
    assert run.history.outcomes["rejected"] > 70
    assert not run._broker.dead
    assert not run._sink.noted


def test_a_missing_metric_is_named():
    with pytest.raises(Exception, match=r"metric=f1: evaluate.* returns loss, accuracy"):
        whole(small(target=0.5, metric="f1"))


def test_the_target_is_a_mean_of_five_evaluations():
    slow = {"task_settings": "lr=0.02", "target": 0.57, "evaluations": 60, "updates": 240}
    run = whole(small(slow, stop_at_target=True)).simulator
    values = [row.accuracy for row in run.history.rows]
    row = run.target_row()
    assert row == len(values) - 1
    assert sum(values[-5:]) / 5 >= 0.57 > sum(values[-6:-1]) / 5
    assert run.published < 240
    on = whole(small(slow)).simulator
    assert on.target_row() == row
    assert on.published == 240


def test_evaluations_are_spread_over_the_run():
    run = whole(small(updates=120, buffer_size=1, evaluations=10)).simulator
    assert [row.version for row in run.history.rows] == [12 * i for i in range(11)]
    assert run.progress() == 1.0
