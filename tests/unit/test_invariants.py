"""The invariants of the design, by number, each as a promise. Number 8: test_admission.py; 9: test_outbox.py."""

import tracemalloc
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from aggregator.aggregator import Aggregator
from ops.simulation.database import Database
from ops.simulation.executor import InThisProcess
from ops.simulation.plan import plan_of
from ops.simulation.simulator import Simulator
from shared.config import AggregatorSettings
from shared.errors import SettingsError, StoreUnavailable
from shared.messages import encode
from shared.metrics import AggregatorMetrics
from shared.store.inprocess import InProcessStore
from shared.transport.inprocess import InProcessBroker
from shared.transport.ports import Outgoing
from tests.builders import JOB, FaultyStore, System, WindowedSource, model_of, update_of, weights, work
from worker.task import Task, TrainResult
from worker.training import Trainer


class CheckedSource:
    """A source that looks, at every ack, whether what is acked is durable."""

    def __init__(self, inner, store):
        self.inner, self.store, self.acked = inner, store, []

    def __getattr__(self, name):
        return getattr(self.inner, name)

    def ack(self, deliveries):
        durable = {entry["id"] for commit in self.store.ledger for entry in commit["updates"]}
        for delivery in deliveries:
            assert delivery.update_id in durable, f"{delivery.update_id} was acked before it was durable"
            self.acked.append(delivery.update_id)
        self.inner.ack(deliveries)


def settle(system):
    """Let every commit fall due, and every retry."""
    for _ in range(4):
        system.drain()
        system.clock.time_s += 60
    system.drain()


def applied(system):
    return [name for name, outcome in system.outcomes() if outcome == "applied"]


# --- 1. ack after durable -----------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{"buffer_size": 3}, {"rule": "fedasync"}, {"buffer_size": 3, "prefetch": 4}])
def test_1_what_is_acked_is_durable(settings):
    system = System(**settings)
    source = system.restart() and CheckedSource(system.source, system.store)
    system.aggregator._source = source
    sent = [system.publish(weights(seed)) for seed in range(10)]
    system.send(sent[0])
    system.drain()
    system.clock.time_s += 60
    system.drain()
    assert source.acked == [update.update_id for update in [*sent, sent[0]]]


def test_1_nothing_is_acked_while_its_commit_waits():
    system = System(buffer_size=10)
    system.publish(weights(0))
    system.drain()
    assert system.unacked == 1
    assert system.store.head().revision == 0


@pytest.mark.parametrize("fault", ["before", "after"])
def test_1_nothing_is_acked_when_a_commit_gets_no_answer(fault):
    system = System(store=FaultyStore(), buffer_size=1)
    system.store.faults = [fault]
    system.publish(weights(0))
    system.step()
    assert system.unacked == 1
    system.clock.time_s += 60
    system.drain()
    assert system.unacked == 0
    assert applied(system) == ["a/i/0"]


def test_1_a_kill_before_the_commit_loses_nothing():
    system = System(buffer_size=10)
    system.publish(weights(0))
    system.drain()
    system.restart()
    system.drain()
    system.aggregator.finish()
    assert applied(system) == ["a/i/0"]
    np.testing.assert_array_equal(system.store.load().arrays["delta_sum"], weights(0))


# --- 2. at most once ----------------------------------------------------------------------------------------


def sum_of(system, *seeds):
    np.testing.assert_allclose(system.weights, sum(weights(seed).astype(np.float64) for seed in seeds), atol=1e-6)


def test_2_a_duplicate_of_a_committed_update_changes_nothing():
    system = System(buffer_size=1, staleness="constant")
    update = system.publish(weights(0))
    system.drain()
    system.send(update)
    system.drain()
    system.aggregator.finish()
    assert system.outcomes() == [("a/i/0", "applied"), ("a/i/0", "duplicate")]
    sum_of(system, 0)


def test_2_a_duplicate_of_an_update_in_the_open_uncommitted_buffer_changes_nothing():
    system = System(buffer_size=3, server_lr=3.0)
    update = system.publish(weights(0))
    system.drain()
    assert system.store.head().revision == 0
    system.send(update)
    system.drain()
    for seed in (1, 2):
        system.publish(weights(seed))
    system.drain()
    assert system.store.head().version == 1
    sum_of(system, 0, 1, 2)


def test_2_two_copies_in_one_batch_count_once():
    system = System(buffer_size=2, server_lr=2.0)
    update = system.publish(weights(0))
    system.send(update)
    system.publish(weights(1))
    system.drain()
    assert system.outcomes() == [("a/i/0", "applied"), ("a/i/0", "duplicate"), ("a/i/1", "applied")]
    sum_of(system, 0, 1)


def test_2_a_duplicate_after_a_restart_changes_nothing():
    system = System(buffer_size=3, server_lr=3.0)
    update = system.publish(weights(0))
    system.drain()
    system.aggregator.finish()
    system.restart()
    system.send(update)
    for seed in (1, 2):
        system.publish(weights(seed))
    system.drain()
    sum_of(system, 0, 1, 2)


def test_2_the_applied_ids_are_part_of_the_commit_that_holds_their_effect():
    system = System(buffer_size=2)
    system.publish(weights(0))
    system.publish(weights(1))
    system.publish(weights(2))
    system.drain()
    system.aggregator.finish()
    assert system.store.load().applied == {"a/i/0": 0, "a/i/1": 0, "a/i/2": 0}


@pytest.mark.parametrize("staleness_max", [0, 1, 3])
def test_2_an_id_is_forgotten_only_when_a_delivery_that_old_is_refused(staleness_max):
    system = System(buffer_size=1, staleness="constant", staleness_max=staleness_max)
    sent = []
    for seed in range(8):
        sent.append(system.publish(weights(seed)))
        system.drain()
        for update in sent:
            system.send(update)
        system.drain()
        system.restart()
    sum_of(system, *range(8))
    assert len(applied(system)) == 8


def test_2_the_set_of_applied_ids_is_bounded_by_the_horizon():
    system = System(buffer_size=2, staleness_max=3)
    for seed in range(60):
        system.publish(weights(seed))
        system.drain()
        horizon = 2 * (3 + 2)
        assert len(system.aggregator.state.applied) <= horizon
        assert len(system.store.load().applied) <= horizon
    assert system.store.head().version == 30


def test_2_exactly_staleness_max_is_applied_and_one_more_is_refused():
    system = System(buffer_size=1, staleness_max=2, staleness="constant")
    for seed in range(3):
        system.publish(weights(seed))
        system.drain()
    system.publish(weights(3), base_version=1)  # tau = 2
    system.drain()
    system.publish(weights(4), base_version=1)  # tau = 3
    system.drain()
    system.aggregator.finish()
    assert system.outcomes()[-2:] == [("a/i/3", "applied"), ("a/i/4", "stale")]
    sum_of(system, 0, 1, 2, 3)
    assert system.unacked == 0
    assert not system.broker.dead  # an outcome, not an error
    assert system.store.clients["a"]["outcome"] == "stale"


# --- 3. one commit, one truth -------------------------------------------------------------------------------


def second_aggregator(system):
    """Return a second broker connection's worth: an aggregator of the same job and store, and its broker."""
    broker = InProcessBroker()
    rival = Aggregator(
        system.settings, broker.source(JOB), system.store, system.clock, AggregatorMetrics(), poll_s=0.0
    )  # fmt: skip
    return rival, broker


def send_to(broker, update):
    broker.sink().publish(Outgoing(JOB, update.client, update.update_id, encode(update)), 1.0)


def test_3_the_loser_reloads_and_folds_again():
    system = System(buffer_size=2, server_lr=2.0)
    rival, broker = second_aggregator(system)
    system.publish(weights(0))
    system.drain()  # folded, not committed
    for seed in (1, 2):
        send_to(broker, update_of(weights(seed), update_id=f"b/i/{seed}"))
    work(rival.step)
    assert system.store.head().version == 1
    system.publish(weights(3), base_version=0)
    system.drain()  # its commit conflicts: it reloads version 1 and folds both again, now staler
    assert system.store.head().version == 2
    assert applied(system) == ["b/i/1", "b/i/2", "a/i/0", "a/i/1"]
    expected = weights(1) + weights(2) + (weights(0) + weights(3)) / np.sqrt(2.0)
    np.testing.assert_allclose(system.weights, expected, atol=1e-5)
    assert system.unacked == 0


def test_3_the_same_update_at_two_aggregators_counts_once():
    system = System(buffer_size=2, server_lr=2.0)
    rival, broker = second_aggregator(system)
    update = system.publish(weights(0))
    system.drain()  # this one is cut off, and the broker delivers the same update to the other
    send_to(broker, update)
    send_to(broker, update_of(weights(1), update_id="b/i/1"))
    work(rival.step)
    settle(system)
    assert system.outcomes() == [("a/i/0", "applied"), ("b/i/1", "applied"), ("a/i/0", "duplicate")]
    sum_of(system, 0, 1)
    assert system.unacked == 0


def test_3_a_conflict_counts_no_outcome_twice():
    system = System(buffer_size=2)
    rival, broker = second_aggregator(system)
    system.publish(weights(0))
    system.drain()
    send_to(broker, update_of(weights(1), update_id="b/i/1"))
    send_to(broker, update_of(weights(2), update_id="b/i/2"))
    work(rival.step)
    system.publish(weights(3), base_version=0)
    system.drain()
    assert system.metrics.updates.labels(JOB, "applied")._value.get() == 2
    assert system.aggregator.state.totals == {"applied": 4}


def test_3_an_update_trained_from_a_rivals_version_is_not_rejected():
    """The loser may meet one before its own commit tells it that the store has moved on."""
    system = System(buffer_size=2)
    rival, broker = second_aggregator(system)
    system.publish(weights(0))
    system.drain()
    for seed in (1, 2):
        send_to(broker, update_of(weights(seed), update_id=f"b/i/{seed}"))
    work(rival.step)
    assert system.store.head().version == 1
    system.publish(weights(3), base_version=1)
    settle(system)
    assert [letter.detail for letter in system.broker.dead] == []
    assert applied(system) == ["b/i/1", "b/i/2", "a/i/0", "a/i/1"]


def test_3_a_standby_that_takes_over_starts_from_the_newest_state():
    system = System(buffer_size=1, staleness="constant")
    standby = Aggregator(
        system.settings, system.broker.source(JOB), system.store, system.clock, AggregatorMetrics(), poll_s=0.0
    )
    system.publish(weights(0))
    system.drain()
    system.source.close()
    system.publish(weights(1))
    standby.step()
    assert (system.store.head().version, system.store.head().revision) == (2, 2)
    sum_of(system, 0, 1)


def test_3_a_commit_moves_the_whole_state_at_once():
    system = System(buffer_size=2, staleness="constant")
    for seed in range(3):
        system.publish(weights(seed))
    system.drain()
    system.aggregator.finish()
    stored = system.store.load()
    assert (stored.head.revision, stored.head.version) == (2, 1)
    assert stored.model.sha256 == stored.head.sha256
    np.testing.assert_array_equal(stored.arrays["delta_sum"], weights(2))
    assert set(stored.applied) == {"a/i/0", "a/i/1", "a/i/2"}
    assert [c["revision"] for c in system.store.ledger] == [1, 2]
    assert system.restart().state.buffer[0].update_id == "a/i/2"


# --- store faults -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", ["before", "after"])
@pytest.mark.parametrize("more", [0, 1, 3])
@pytest.mark.parametrize("base", ["oldest", "newest"])
def test_updates_that_arrive_while_a_commit_is_in_doubt_are_neither_lost_nor_doubled(fault, more, base):
    """The answer of the first commit is lost; what is folded meanwhile is not in it, so must not be acked with it."""
    system = System(store=FaultyStore(), buffer_size=1, staleness="constant")
    system.store.faults = [fault]
    system.publish(weights(0))
    system.step()
    for seed in range(1, more + 1):
        system.publish(weights(seed), base_version=0 if base == "oldest" else system.store.head().version)
        system.step()
    settle(system)
    assert system.unacked == 0
    assert not system.broker.dead
    assert sorted(applied(system)) == [f"a/i/{seed}" for seed in range(more + 1)]
    assert set(system.store.load().applied) == set(applied(system))
    assert system.store.head().version == more + 1
    sum_of(system, *range(more + 1))


@pytest.mark.parametrize("fault", ["before", "after"])
def test_a_kill_after_a_commit_without_an_answer_neither_loses_nor_doubles(fault):
    system = System(store=FaultyStore(), buffer_size=1, staleness="constant")
    system.store.faults = [fault]
    system.publish(weights(0))
    system.step()
    system.restart()
    system.drain()
    system.aggregator.finish()
    assert applied(system) == ["a/i/0"]
    sum_of(system, 0)
    assert system.unacked == 0


def test_totals_do_not_count_failed_commits():
    system = System(store=FaultyStore(), buffer_size=1)
    system.store.faults = ["before", "before", "before"]
    system.publish(weights(0))
    for _ in range(5):
        system.step()
        system.clock.time_s += 60
    assert system.aggregator.state.totals == {"applied": 1}
    assert system.metrics.updates.labels(JOB, "applied")._value.get() == 1


@pytest.mark.parametrize("read", ["head", "model"])
def test_a_store_that_cannot_be_read_costs_only_time(read):
    system = System(store=FaultyStore(), rule="fedasync", staleness="constant")
    system.publish(weights(0))
    system.store.failing = (read,)
    with pytest.raises(StoreUnavailable):
        system.aggregator.step()
    system.store.failing = ()
    system.drain()
    assert applied(system) == ["a/i/0"]


def test_a_store_that_stays_away_shows_as_a_problem_until_it_answers():
    """`problem` is what /healthz tells; a commit that fails must not be forgotten at the next turn of the loop."""
    system = System(store=FaultyStore(), buffer_size=1)
    system.store.faults = ["before"] * 3
    seen = []

    class Watched:
        def __getattr__(self, name):
            return getattr(system.source, name)

        def receive(self, limit, wait_s):
            seen.append((len(system.store.faults), system.aggregator.problem))
            system.clock.time_s += 1
            if len(seen) > 50 or system.store.head().version:
                system.aggregator.stop.set()
            return system.source.receive(limit, wait_s)

    system.aggregator._source = Watched()
    system.publish(weights(0))
    system.aggregator.run()
    assert system.store.head().version == 1
    assert all(problem for left, problem in seen if left in (1, 2))
    assert system.aggregator.problem is None


# --- 4. a commit may leave the version unchanged ------------------------------------------------------------


def test_4_a_partial_buffer_is_durable_within_commit_age_max_s():
    system = System(buffer_size=10, commit_age_max_s=30.0)
    for seed in range(3):
        system.publish(weights(seed))
    system.drain()
    system.clock.time_s = 29.9
    system.drain()
    assert (system.store.head().revision, system.unacked) == (0, 3)
    system.clock.time_s = 30.0
    system.drain()
    assert (system.store.head().revision, system.store.head().version, system.unacked) == (1, 0, 0)
    assert len(system.restart().state.buffer) == 3


def test_4_the_age_counts_from_the_oldest_update_not_from_the_last():
    system = System(buffer_size=10, commit_age_max_s=30.0)
    for second in (0.0, 20.0, 30.0):
        system.clock.time_s = second
        system.publish(weights(int(second)))
        system.drain()
    assert (system.store.head().revision, system.unacked) == (1, 0)


@pytest.mark.parametrize("prefetch", [1, 2, 3, 5, 9])
@pytest.mark.parametrize("settings", [{}, {"commit_interval_s": 20.0}])
def test_4_a_window_smaller_than_the_buffer_does_not_stall_the_job(prefetch, settings):
    system = System(buffer_size=10, prefetch=prefetch, server_lr=10.0, staleness="constant", **settings)
    system.source.close()
    system.start(wrap=lambda source: WindowedSource(source, prefetch))
    for seed in range(20):
        system.publish(weights(seed))
    for _ in range(50):
        system.step()  # and the clock stands still
    system.aggregator.finish()
    assert system.store.head().version == 2
    sum_of(system, *range(20))


def test_4_a_commit_without_a_new_version_writes_no_model():
    system = System(buffer_size=10)
    commits = []
    original = system.store.commit
    system.store.commit = lambda commit: (commits.append(commit), original(commit))
    system.publish(weights(0))
    system.drain()
    system.aggregator.finish()
    assert [(commit.model, commit.version) for commit in commits] == [(None, 0)]
    assert list(commits[0].arrays) == ["delta_sum"]


def test_4_a_closed_buffer_is_not_written():
    system = System(buffer_size=2)
    commits = []
    original = system.store.commit
    system.store.commit = lambda commit: (commits.append(commit), original(commit))
    system.publish(weights(0))
    system.publish(weights(1))
    system.drain()
    assert [(list(commit.arrays), commit.version) for commit in commits] == [([], 1)]


def test_4_a_stale_refusal_is_acked_in_time_too():
    system = System(buffer_size=1, staleness_max=0, commit_age_max_s=30.0)
    system.publish(weights(0))
    system.drain()
    system.publish(weights(1), base_version=0)
    system.drain()
    assert system.unacked == 1
    system.clock.time_s += 30
    system.drain()
    assert system.unacked == 0


def test_4_waiting_for_deliveries_never_outlasts_a_commit_that_falls_due():
    system = System(buffer_size=10, commit_age_max_s=30.0)
    waits = []
    system.aggregator._poll_s = 100.0
    original = system.source.receive
    system.source.receive = lambda limit, wait_s: (waits.append(wait_s), original(limit, 0.0))[1]
    system.aggregator.step()
    system.publish(weights(0))
    system.aggregator.step()
    system.clock.time_s += 12
    system.aggregator.step()
    assert waits == [100.0, 100.0, 18.0]


def test_4_group_commit_writes_only_the_last_version():
    system = System(buffer_size=1, commit_interval_s=5.0, staleness="constant")
    system.clock.time_s = 1.0
    for seed in range(4):
        system.publish(weights(seed))
    system.drain()
    assert (system.store.head().version, system.aggregator.state.version) == (0, 4)
    system.clock.time_s = 5.0
    system.drain()
    assert system.store.head().version == 4
    assert system.store.load().versions == [0, 4]
    sum_of(system, 0, 1, 2, 3)


# --- 5. versions are immutable ------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["fedbuff", "fedasync"])
def test_5_a_version_never_changes_once_visible(rule):
    system = System(rule=rule, versions_kept=50, **({"buffer_size": 1} if rule == "fedbuff" else {}))
    seen = {0: system.store.head().sha256}
    for seed in range(12):
        system.publish(weights(seed))
        system.drain()
        head = system.store.head()
        assert system.store.model(head.version).sha256 == head.sha256
        seen[head.version] = head.sha256
        if seed % 4 == 3:
            system.restart()
    assert list(seen) == list(range(13))
    assert {version: system.store.model(version).sha256 for version in seen} == seen
    assert len(set(seen.values())) == 13


def test_5_what_a_reader_does_to_its_copy_stays_with_it():
    system = System(buffer_size=1)
    system.publish(weights(0))
    system.drain()
    mine = system.store.model(1)
    before = mine.sha256
    mine.weights[:] = 7
    assert system.store.model(1).sha256 == before
    system.store.load().model.weights[:] = 7
    assert system.store.model(1).sha256 == before


def test_5_old_versions_go_and_the_newest_stay():
    system = System(buffer_size=1, versions_kept=3)
    for seed in range(8):
        system.publish(weights(seed))
        system.drain()
    assert system.store.load().versions == [6, 7, 8]
    assert sorted(system.store.meta) == [6, 7, 8]


def test_5_fedasync_keeps_every_base_a_worker_may_still_have():
    system = System(rule="fedasync", versions_kept=1, staleness_max=4)
    for seed in range(9):
        system.publish(weights(seed))
        system.drain()
    assert system.store.load().versions == [5, 6, 7, 8, 9] or system.store.load().versions == [4, 5, 6, 7, 8, 9]
    system.publish(weights(9), base_version=5)
    system.drain()
    assert system.outcomes()[-1] == ("a/i/9", "applied")


# --- 7. deterministic ---------------------------------------------------------------------------------------


def run(seeds, codec, rule, restart_every, batch):
    """Return the model's hash after the same updates, delivered in other batches and to other incarnations."""
    settings = {"buffer_size": 3} if rule == "fedbuff" else {"rule": rule}
    system = System(weights(100, 700), codec=codec, versions_kept=100, **settings)
    for index, seed in enumerate(seeds):
        base = (index // 6) if rule == "fedbuff" else index // 2
        system.publish(weights(seed, 700), codec=codec, seed=seed, base_version=min(base, system.store.head().version))
        if index % batch == batch - 1:
            system.drain()
        if restart_every and index % restart_every == restart_every - 1:
            system.drain()
            system.restart()
    system.drain()
    system.aggregator.finish()
    return system.store.head().sha256


@pytest.mark.parametrize("rule", ["fedbuff", "fedasync"])
@pytest.mark.parametrize("codec", ["float32", "int8 | zstd", "int4"])
def test_7_the_same_deliveries_give_the_same_bytes(codec, rule):
    hashes = {run(range(21), codec, rule, restart_every, 1) for restart_every in (0, 0, 1, 4)}
    assert len(hashes) == 1
    assert run([*range(20), 77], codec, rule, 0, 1) not in hashes


def test_7_neither_batches_nor_restarts_nor_commits_change_a_bit():
    sha256 = set()
    for interval, restart in ((0.0, False), (3.0, False), (3.0, True)):
        system = System(weights(100), buffer_size=3, commit_interval_s=interval, versions_kept=100)
        for seed in range(17):
            system.publish(weights(seed), base_version=0)
            if seed % 5 == 4:
                system.drain()
                if restart:
                    system.restart()
        system.drain()
        system.aggregator.finish()
        sha256.add((system.store.head().version, system.store.head().sha256))
    assert len(sha256) == 1


def test_7_a_whole_run_repeats_bit_for_bit_with_its_seed():
    def build():
        return {"w": np.zeros(300, np.float32)}

    def train(model, context):
        model["w"] += np.random.default_rng(context.seed).standard_normal(300, np.float32)
        return TrainResult(1, 1)

    def run_once(seed):
        task = Task("t", SimpleNamespace(build=build, train=train, evaluate=lambda model, context: {"accuracy": 0.0}))
        plan = plan_of({"clients": 4, "updates": 40, "buffer_size": 3, "codec": "int4 | zstd", "seed": seed})
        trainer = Trainer(task)
        simulator = Simulator(plan, trainer, InThisProcess(trainer), Database(None))
        *_, history = simulator.run()
        return history.rows[-1].version, simulator.model().sha256, max(history.staleness)

    version, sha256, staleness_max = run_once(1)
    assert (version, staleness_max > 0) == (13, True)
    assert run_once(1)[1] == sha256
    assert run_once(2)[1] != sha256


# --- 10. memory is O(model) ---------------------------------------------------------------------------------


PARAMS = 2**20  # 4 MiB as float32


def peak_bytes(updates, clients, **settings):
    """Return the most memory the loop took while it worked a queue of so many updates of so many clients."""
    system = System(np.zeros(PARAMS, np.float32), codec="int8", prefetch=16, versions_kept=2, **settings)
    update = update_of(weights(0, PARAMS), codec="int8")
    for index in range(updates):
        client = f"c{index % clients}"
        system.send(replace(update, client=client, update_id=f"{client}/i/{index}"))
    tracemalloc.start()
    try:
        system.drain()
        system.aggregator.finish()
        assert system.unacked == 0
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    "settings", [{"buffer_size": 4}, {"buffer_size": 1000}, {"rule": "fedasync", "staleness_max": 4}]
)  # fmt: skip
def test_10_neither_queue_length_nor_number_of_workers_moves_the_peak(settings):
    small, large = peak_bytes(32, 1, **settings), peak_bytes(160, 160, **settings)
    assert large < small + PARAMS  # bytes: a quarter of a model


def test_10_the_bases_fedasync_holds_do_not_add_up():
    def peak(updates):
        system = System(np.zeros(PARAMS, np.float32), rule="fedasync", staleness_max=3, codec="int8", versions_kept=1)
        update = update_of(weights(0, PARAMS), codec="int8")
        tracemalloc.start()
        try:
            for index in range(updates):
                system.send(replace(update, update_id=f"a/i/{index}", base_version=index))
                system.drain()
            assert system.store.head().version == updates
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    assert peak(20) < peak(10) + PARAMS


# --- the rule of a job --------------------------------------------------------------------------------------


def test_an_open_buffer_of_another_rule_is_not_taken_over():
    system = System(buffer_size=3)
    system.publish(weights(0))
    system.drain()
    system.aggregator.finish()
    system.source.close()
    with pytest.raises(SettingsError, match="open buffer is of fedbuff"):
        Aggregator(
            AggregatorSettings(job=JOB, rule="fedasync"), system.broker.source(JOB), system.store, system.clock,
            AggregatorMetrics(),
        )  # fmt: skip


def test_a_smaller_buffer_size_takes_over_the_open_buffer():
    system = System(buffer_size=5, server_lr=3.0)
    for seed in range(2):
        system.publish(weights(seed))
    system.drain()
    system.aggregator.finish()
    system.restart(buffer_size=1)
    system.publish(weights(2))
    system.drain()
    assert system.store.head().version == 1
    sum_of(system, 0, 1, 2)


def test_a_job_without_a_model_is_refused():
    with pytest.raises(SettingsError, match="no model yet"):
        Aggregator(
            AggregatorSettings(job=JOB), InProcessBroker().source(JOB), InProcessStore(), System().clock,
            AggregatorMetrics(),
        )  # fmt: skip


@pytest.mark.parametrize("uncommitted", [False, True])
def test_a_job_that_vanished_from_the_store_is_waited_for(uncommitted):
    """Somebody restores it; what came before and meanwhile is applied once."""
    system = System(buffer_size=2, server_lr=2.0, staleness="constant")
    system.publish(weights(1))
    if uncommitted:
        system.drain()
    whole, system.aggregator._store = system.store, InProcessStore()
    system.publish(weights(2), base_version=0)
    for _ in range(3):
        with pytest.raises(StoreUnavailable, match="`fedmq restore FILE` brings a backup back"):
            system.aggregator.step()
    system.aggregator._store = whole
    system.drain()
    system.aggregator.finish()
    assert [outcome for _, outcome in system.outcomes()] == ["applied", "applied"]
    np.testing.assert_allclose(system.weights, weights(1) + weights(2), rtol=1e-6)
    assert system.unacked == 0


def test_the_start_state_is_the_given_model():
    system = System(model_of(weights(3)))
    np.testing.assert_array_equal(system.weights, weights(3))
    assert (system.store.head().version, system.store.head().revision) == (0, 0)


# --- settings that change between two starts ----------------------------------------------------------------


def test_2_raising_staleness_max_does_not_readmit_an_update_whose_id_was_forgotten():
    system = System(buffer_size=1, staleness="constant", staleness_max=1)
    update = system.publish(np.ones_like(weights(0)))
    system.drain()
    for _ in range(4):
        system.publish(np.zeros_like(weights(0)))
        system.drain()
    system.restart(staleness_max=100)
    system.send(update)
    system.drain()
    system.aggregator.finish()
    np.testing.assert_array_equal(system.weights, np.ones_like(weights(0)))


def test_an_open_buffer_is_not_continued_with_other_masses():
    system = System(buffer_size=2)
    system.publish(weights(0), num_samples=100)
    system.drain()
    system.aggregator.finish()
    with pytest.raises(SettingsError, match="fedbuff by samples"):
        system.restart(weight_by_samples=True)
    assert len(system.restart(weight_by_samples=False).state.buffer) == 1
