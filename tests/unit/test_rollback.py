"""Rolling back: an old version becomes the newest, exactly, and everything goes on from there."""

import msgpack
import numpy as np
import pytest

from aggregator.rules import RULES
from ops.history import History
from ops.rollback import ATTEMPTS_MAX, roll_back
from shared.errors import SettingsError, StoreUnavailable
from shared.messages import encode, split
from shared.metrics import WorkerMetrics
from shared.rules import RULES as SPECS
from shared.store.inprocess import InProcessStore
from tests.builders import JOB, NUM_PARAMS, FaultyStore, System, add_one, device_of, model_of, update_of, weights
from tests.rule_oracles import oracle_of
from worker.replica import Replica

GIVEN = {
    "buffer_size": 2, "clients": 3, "server_optimizer": "adam(0.8,0.95,0.1)", "staleness": "polynomial(0.5)",
    "server_lr": 0.5,
}  # fmt: skip
ROLLED = sorted(set(RULES) - {"area"})


def settings_of(rule):
    """Return settings that mean something to a rule."""
    return {"rule": rule, "versions_kept": 50} | {name: GIVEN[name] for name in SPECS[rule].uses if name in GIVEN}


def system_of(rule="fedbuff", **settings):
    return System(weights(99), **settings_of(rule) | settings)


def play(system, count, seed=0, told=lambda update: None):
    """Publish updates of three clients, one after the other, from the newest version."""
    for i in range(seed, seed + count):
        client = "abc"[i % 3]
        told(system.publish(weights(1000 + i), update_id=f"{client}/i/{i}", client=client))
        system.drain()


def settle(system):
    """Let everything open become durable."""
    system.drain()
    system.clock.time_s += 60
    system.drain()


def back(system, version, **options):
    return roll_back(system.store, version, JOB, system.clock.now, pause_s=0.0, **options)


def file_of(system, version):
    return system.store.model(version).data.tobytes()


def outcomes(system, after):
    return [(e["id"], e["outcome"]) for c in system.store.ledger for e in c["updates"] if c["revision"] > after]


@pytest.mark.parametrize("restart", [False, True], ids=["live", "restarted"])
@pytest.mark.parametrize("rule", ROLLED)
def test_the_weights_are_the_old_ones_and_the_next_versions_follow_from_them_alone(rule, restart):
    system = system_of(rule)
    play(system, 11)
    old = file_of(system, 1)
    newest = system.store.head().version
    assert newest > 2
    done = back(system, 1)
    assert (done.version, done.undone) == (newest + 1, newest)
    assert file_of(system, done.version) == old
    head = system.store.head()
    assert (head.version, head.revision, head.sha256) == (done.version, done.revision, system.store.model(1).sha256)
    if restart:
        system.restart()

    start = system.store.model(1).weights
    oracle = oracle_of(start, **system.settings.model_dump())
    oracle.versions = [start.astype(np.float64)] * (done.version + 1)
    play(system, 7, 100, oracle.receive)
    settle(system)
    stored = system.store.load()
    assert stored.head.version == len(oracle.versions) - 1 > done.version
    tolerance = 2e-3 if rule == "ringleader" else 1e-5
    np.testing.assert_allclose(system.weights, oracle.versions[-1], rtol=0, atol=tolerance)
    assert stored.arrays.keys() == oracle.arrays().keys()
    for name, array in oracle.arrays().items():
        np.testing.assert_allclose(stored.arrays[name], array, rtol=0, atol=10 * tolerance, err_msg=name)
    assert set(stored.kept) == set(system.store._kept) == oracle.kept()


def test_the_open_buffer_goes_and_the_ledger_says_whose_updates_were_in_it():
    system = system_of(buffer_size=3)
    system.clock.time_s = 1000.0
    play(system, 6)
    system.publish(weights(5), update_id="a/late/0", client="a")
    settle(system)
    before, totals = system.store.head().revision, msgpack.unpackb(system.store.load().state)["totals"]
    done = back(system, 0)
    assert done.discarded == 1
    [entry] = [c for c in system.store.ledger if c["revision"] > before]
    assert entry["revision"] == done.revision
    assert entry["updates"] == [
        {"id": "", "outcome": "rollback", "version": 3, "to": 0, "from": 2, "discarded": ["a/late/0"]}
    ]
    state = msgpack.unpackb(system.store.load().state)
    assert (state["buffer"], state["since"], state["floor"], state["totals"]) == ([], 0.0, 3, totals)
    assert state["arrays"] == [] and state["facts"] == {}
    assert system.store.meta[3] | {"discarded": "1", "rolled_back_to": "0", "updates": "0"} == system.store.meta[3]
    history = History(NUM_PARAMS)
    history.add_entries(e for c in system.store.ledger for e in c["updates"])
    assert history.trips == 7 and history.outcomes == {"applied": 7}


def test_updates_trained_before_it_are_refused_and_those_after_it_count():
    system = system_of(server_optimizer="sgd", staleness="constant", server_lr=1.0)
    play(system, 4)
    in_flight = [system.publish(weights(7), update_id=f"b/f/{i}", base_version=i, client="b") for i in range(3)]
    done = back(system, 1)
    settle(system)
    assert outcomes(system, done.revision) == [(u.update_id, "stale") for u in in_flight]
    assert system.store.head().version == done.version
    told = dict(system.store.outcomes("b", done.revision - 1)[0])
    assert told == {u.update_id: "stale" for u in in_flight}
    deltas = [weights(50 + i) for i in range(2)]
    for i, delta in enumerate(deltas):
        system.publish(delta, update_id=f"c/n/{i}", client="c")
    system.drain()
    np.testing.assert_allclose(system.weights, system.store.model(1).weights + sum(deltas) / 2, atol=1e-6)


def test_what_was_folded_but_not_committed_comes_again_and_is_acked_once_as_stale():
    system = system_of(buffer_size=3, server_optimizer="sgd")
    play(system, 6)
    system.publish(weights(5), update_id="a/late/0", client="a")
    system.drain()
    assert system.unacked == 1 and len(system.aggregator.state.buffer) == 1
    done = back(system, 1)
    assert done.discarded == 0  # it was in nobody's commit
    system.clock.time_s += 60
    system.drain()  # a conflict: everything comes again
    settle(system)
    assert outcomes(system, done.revision) == [("a/late/0", "stale")]
    assert system.unacked == 0


def test_an_applied_update_that_is_delivered_again_is_a_duplicate_not_a_refusal():
    system = system_of(server_optimizer="sgd")
    play(system, 4)
    again = update_of(weights(1001), update_id="b/i/1", base_version=0)
    done = back(system, 1)
    system.send(again)
    settle(system)
    assert outcomes(system, done.revision) == [("b/i/1", "duplicate")]


def test_the_mass_of_a_refused_update_comes_back_with_the_next_one(tmp_path):
    size = 6000
    system = System(np.zeros(size, np.float32), buffer_size=1, codec="ef | topk(0.01) | float16", versions_kept=9)
    device = device_of(tmp_path, system, add_one, lambda: {"w": np.zeros(size, np.float32)})
    for _ in range(2):
        device.worker.step()
        device.publisher.step()
        settle(system)
    device.worker.step()
    device.publisher.step()  # in the queue when somebody rolls back
    done = back(system, 1)
    settle(system)
    assert [outcome for _, outcome in outcomes(system, done.revision)] == ["stale"]
    assert device.worker.step() and device.worker._replica.version == done.version
    device.publisher.step()
    settle(system)
    assert system.store.head().version == done.version + 1
    arrived = system.store.model(2).weights.sum() + (system.weights - system.store.model(done.version).weights).sum()
    kept = device.worker._residual._vector.sum()
    # Four trainings of 1 a weight: what arrived and what the worker still has, the refused update's share included.
    np.testing.assert_allclose(arrived + kept, 4 * size, rtol=1e-3)


@pytest.mark.parametrize(
    "settings", [{"downlink": "on"}, {"downlink": "on", "snapshots": "bfloat16"}, {"snapshots": "bfloat16"}]
)
def test_workers_and_newcomers_find_their_way_through_the_downlink(settings):
    shape = (60, 100)
    zero = model_of(np.zeros(shape, np.float32))
    system = System(zero, buffer_size=1, versions_kept=9, **settings)
    rng = np.random.default_rng(0)

    def advance():
        system.publish(rng.standard_normal(6000).astype(np.float32), layout=zero.layout.hash)
        system.drain()

    follower, late = Replica(system.store, WorkerMetrics()), Replica(system.store, WorkerMetrics())
    late.pull(system.store.head())
    for _ in range(4):
        advance()
        follower.pull(system.store.head())
    done = back(system, 2)
    head = system.store.head()
    assert head.published == "" and system.store.published(-1).deltas == system.store.published(-1).snapshots == ()
    assert follower.differs(head)
    assert follower.pull(head).data.tobytes() == file_of(system, 2)
    for step in range(3):
        advance()
        head = system.store.head()
        assert head.version == done.version + step + 1 and head.published
        for replica in (follower, late, Replica(system.store, WorkerMetrics())):
            assert replica.pull(head).sha256 == head.published
    assert follower._metrics.mismatches._value.get() == late._metrics.mismatches._value.get() == 0


class Contested(InProcessStore):
    """A store in which somebody else commits between a load and a commit, so many times."""

    def __init__(self):
        super().__init__()
        self.rival, self.times = lambda: None, 0

    def commit(self, commit):
        if commit.token.startswith("rollback") and self.times:
            self.times -= 1
            self.rival()
        super().commit(commit)


def contested(times):
    system = System(weights(99), Contested(), **settings_of("fedbuff") | {"server_optimizer": "sgd"})
    play(system, 4)
    numbers = iter(range(200, 1000, 2))
    system.store.rival, system.store.times = lambda: play(system, 2, next(numbers)), times
    return system


def test_a_live_aggregator_that_commits_meanwhile_is_undone_too():
    system = contested(3)
    done = back(system, 1)
    assert (done.undone, done.version) == (5, 6)
    assert file_of(system, 6) == file_of(system, 1)
    ids = [e["id"] for c in system.store.ledger for e in c["updates"] if e["outcome"] == "applied"]
    assert len(ids) == len(set(ids)) == 4 + 6


def test_it_gives_up_when_it_never_gets_between():
    system = contested(ATTEMPTS_MAX)
    with pytest.raises(SettingsError, match=f"committed {ATTEMPTS_MAX} times"):
        back(system, 1)
    assert "rollback" not in {outcome for _, outcome in outcomes(system, 0)}


def test_two_at_once_are_two_versions_one_after_the_other():
    system = contested(1)
    system.store.rival = lambda: back(system, 0)
    done = back(system, 1)
    assert (done.undone, done.version) == (3, 4)
    assert file_of(system, 3) == file_of(system, 0) and file_of(system, 4) == file_of(system, 1)


@pytest.mark.parametrize("fault", ["before", "after"])
def test_a_lost_answer_is_said_and_the_store_is_whole(fault):
    system = System(weights(99), FaultyStore(), **settings_of("fedbuff"))
    play(system, 4)
    system.store.faults = [fault]
    with pytest.raises(StoreUnavailable):
        back(system, 1)
    assert system.store.head().version == (3 if fault == "after" else 2)
    system.drain()
    play(system, 2, 300)
    assert system.store.head().version == (4 if fault == "after" else 3)


@pytest.mark.parametrize(
    ("version", "said"),
    [(2, "version 2 is the newest of job 'job': there is nothing to undo; older ones that are stored: [0, 1]"),
     (7, "version 7 is not stored; stored are [0, 1, 2]")],
)  # fmt: skip
def test_versions_it_cannot_go_back_to(version, said):
    system = system_of()
    play(system, 4)
    head = system.store.head()
    with pytest.raises(SettingsError) as caught:
        back(system, version)
    assert said in str(caught.value)
    assert system.store.head() == head


def test_area_is_refused_because_its_workers_remember():
    system = system_of("area")
    play(system, 6)
    head = system.store.head()
    assert head.version > 1
    with pytest.raises(SettingsError, match=r"rule area.*fedmq models export FILE --version 1.*FEDMQ_INIT_MODEL"):
        back(system, 1)
    assert system.store.head() == head


def test_a_job_that_is_not_there():
    with pytest.raises(SettingsError, match="job 'none' has no model"):
        roll_back(InProcessStore(), 0, "none", lambda: 0.0)


def test_parts_under_way_stay_and_are_refused_when_they_are_complete():
    system = System(np.zeros(3000, np.float32), buffer_size=1, versions_kept=9, part_bytes=4096)
    for i in range(2):
        system.publish(weights(i, 3000), update_id=f"a/i/{i}")
        system.drain()
    update = update_of(weights(9, 3000), update_id="b/p/0", base_version=1)
    first, *rest = split(encode(update), 4096)
    system.send_bytes(first, "b", "b/p/0")
    settle(system)
    names = set(system.store._kept)
    assert names and system.unacked == 0
    done = back(system, 1)
    assert set(system.store._kept) == names
    for body in rest:
        system.send_bytes(body, "b", "b/p/0")
    settle(system)
    assert {outcome for name, outcome in outcomes(system, done.revision) if name == "b/p/0"} <= {"stale", "duplicate"}
    assert ("b/p/0", "stale") in outcomes(system, done.revision)
    assert set(system.store._kept) == set() and system.unacked == 0
    assert file_of(system, system.store.head().version) == file_of(system, 1)
