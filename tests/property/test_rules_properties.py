"""What holds of every rule, through broker, loop and store; whoever is an exception stands here with the reason."""

from itertools import pairwise, permutations

import msgpack
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aggregator.rules import RULES
from shared.rules import RULES as SPECS
from tests.builders import NUM_PARAMS, System, weights

EVERY = sorted(RULES)
BUFFERED = sorted(name for name in EVERY if "buffer_size" in SPECS[name].uses)
OPTIMIZED = sorted(name for name in EVERY if "server_optimizer" in SPECS[name].uses)
NO_LR = ("fedasync", "area")  # moves to the worker's model; adds 1 / n of what is sent
ADAPTIVE = ("fadas",)  # its step is about server_lr, however long the delta
ORDERED = ("fedasync", "ace", "aced", "rescaled")  # each update a version; counts intervals in arrivals
EPSILON = "fadas(1,0.9,0.99,0.1)"


def settings_of(rule, **given):
    """Return settings for a rule: those given that mean something to it."""
    used = {name: value for name, value in given.items() if name in (*SPECS[rule].uses, "commit_interval_s")}
    return used | {"rule": EPSILON if rule == "fadas" else rule, "staleness_max": 0 if rule == "fedavg" else 100}


def send(system, updates):
    """Publish (client, delta, lag) one by one; each is trained from a version that can be pulled."""
    for client, delta, lag in updates:
        base = max(0, system.store.head().version - lag)
        system.publish(delta, update_id=f"{client}/i/{system.sequence}", base_version=base)
        system.drain()


def whole(seed):
    return np.random.default_rng(seed).integers(-100, 101, NUM_PARAMS).astype(np.float32)


def stream(rule, clients):
    """Return updates of some clients, most of them more than once, and stale where the rule takes that."""
    rng = np.random.default_rng(5)
    return [(c, whole(i), int(rng.integers(0, 4)) if rule != "fedavg" else 0) for i, c in enumerate(clients)]


FIRST = {"staleness": "constant", "clients": 1, "buffer_size": 1, "alpha": 1.0}


@pytest.mark.parametrize("rule", [name for name in EVERY if name not in ADAPTIVE])
def test_with_one_worker_that_never_waits_every_rule_is_plain_sgd(rule):
    """x <- x + server_lr Delta: what all of them come to without asynchrony."""
    lr = 1.0 if rule in NO_LR else 0.25
    system = System(weights(9), **settings_of(rule, server_lr=lr, **FIRST))
    expected = weights(9).astype(np.float64)
    for step in range(6):
        send(system, [("a", weights(step), 0)])
        expected += lr * weights(step)
    assert system.store.head().version == 6
    np.testing.assert_allclose(system.weights, expected, atol=1e-5)


@pytest.mark.parametrize("rule", [name for name in BUFFERED if name not in ADAPTIVE])
@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_equal_deltas_of_all_workers_are_taken_once(rule, size):
    """A mean, not a sum: n = K workers that agree move the model as one of them says, whatever K is."""
    lr = 1.0 if rule in NO_LR else 0.5
    system = System(**settings_of(rule, server_lr=lr, buffer_size=size, clients=size, staleness="constant"))
    send(system, [(client, whole(1), 0) for client in "abcde"[:size]])
    np.testing.assert_allclose(system.weights, lr * whole(1), rtol=1e-6)


@pytest.mark.parametrize("rule", [name for name in BUFFERED if name not in ORDERED])
def test_the_order_within_a_buffer_does_not_matter(rule):
    def final(order):
        system = System(**settings_of(rule, buffer_size=4, clients=4, weight_by_samples=True))
        for client in order:
            seed = ord(client)
            system.publish(whole(seed), update_id=f"{client}/i/0", num_samples=seed - 90, num_steps=seed % 5 + 1)
        system.drain()
        assert system.store.head().version == 1
        return system.weights

    expected = final("abcd")
    for order in permutations("abcd"):
        np.testing.assert_allclose(final(order), expected, rtol=1e-5, atol=1e-5)


def test_the_order_in_which_ringleaders_table_fills_does_not_matter():
    def final(order):
        system = System(rule="ringleader", clients=4)
        send(system, [(client, whole(ord(client)), 0) for client in order])
        return system.weights

    for order in permutations("abcd"):
        np.testing.assert_allclose(final(order), final("abcd"), rtol=1e-5)


@pytest.mark.parametrize("rule", [name for name in EVERY if name not in ADAPTIVE])
@pytest.mark.parametrize("factor", [0.25, 4.0, -1.0])
def test_rules_are_linear_to_the_last_bit(rule, factor):
    """Deltas times a power of two move the model by as much, exactly: nothing clips, normalises or rounds by size."""
    common = {"buffer_size": 3, "clients": 3, "server_lr": 0.3}
    systems = [System(**settings_of(rule, **common)) for _ in range(2)]
    for system, scale in zip(systems, (1.0, factor), strict=True):
        send(
            system,
            [(c, np.float32(scale) * weights(i), lag) for i, (c, _, lag) in enumerate(stream(rule, "abcabbacbcab"))],
        )
    assert systems[0].store.head().version >= 2
    np.testing.assert_array_equal(np.float32(factor) * systems[0].weights, systems[1].weights)


@pytest.mark.parametrize("rule", EVERY)
def test_zero_deltas_leave_a_model_alone(rule):
    """Whoever averages models (FedScale), or adds weights for deltas (FedML), does not."""
    system = System(weights(3), **settings_of(rule, buffer_size=2, clients=3, staleness="constant"))
    send(system, [(client, np.zeros(NUM_PARAMS, np.float32), 0) for client in "abcabcabc"])
    assert system.store.head().version >= 3
    np.testing.assert_allclose(system.weights, weights(3), atol=1e-6)


@pytest.mark.parametrize("rule", [name for name in EVERY if name != "fedasync"])
def test_a_delta_means_the_same_whatever_the_model_is_now(rule):
    """It is relative to what its worker started from, never to the current model (APPFL): only FedAsync looks back."""
    moves = []
    for start in (np.zeros(NUM_PARAMS, np.float32), 1000 * weights(8)):
        system = System(start, **settings_of(rule, buffer_size=2, clients=3))
        send(system, stream(rule, "abcabbcacbab"))
        moves.append(system.weights - start)
    np.testing.assert_allclose(moves[0], moves[1], atol=2e-3)


@pytest.mark.parametrize("rule", OPTIMIZED)
@pytest.mark.parametrize("optimizer", ["momentum(0.5)", "adagrad(0.1)", "adam(0.5,0.9,0.1)", "yogi(0.5,0.9,0.1)"])
def test_every_rule_takes_every_optimizer(rule, optimizer):
    system = System(**settings_of(rule, buffer_size=2, clients=3, server_optimizer=optimizer, server_lr=0.1))
    plain = System(**settings_of(rule, buffer_size=2, clients=3, server_lr=0.1))
    for each in (system, plain):
        send(each, stream(rule, "abcabcabc"))
    assert system.store.head().version == plain.store.head().version >= 2
    assert not np.allclose(system.weights, plain.weights, rtol=1e-3)


def everything_of(system):
    stored = system.store.load()
    arrays = {name: array.tobytes() for name, array in stored.arrays.items()}
    state = msgpack.unpackb(stored.state)
    state["totals"].pop("rejected", None)  # not counted where a kill comes between the dead letter and the commit
    return stored.head.version, stored.model.weights.tobytes(), arrays, state, dict(system.store._kept)


KILLS = st.lists(st.sampled_from([None, "step", "kill", "finish"]), min_size=14, max_size=14)


@pytest.mark.parametrize("rule", EVERY)
@pytest.mark.parametrize("codec", ["float32", "all | int8 | zstd"])
def test_kills_and_commits_change_no_bit(rule, codec):
    """The same updates make the same bytes, whatever was committed, lost and folded again on the way."""
    order = "aabcbacdabccdb"
    common = {"buffer_size": 3, "clients": 3}  # d takes somebody's place

    def played(events):
        system = System(weights(3), commit_interval_s=1e6, commit_age_max_s=1e7, **settings_of(rule, **common))
        for index, client in enumerate(order):
            system.publish(weights(index), update_id=f"{client}/i/{index}", base_version=0, codec=codec, seed=index)
            match events[index]:
                case "step":
                    system.step()
                case "kill":
                    system.restart()
                case "finish":
                    system.drain()
                    system.aggregator.finish()
        system.drain()
        system.aggregator.finish()
        return everything_of(system)

    expected = played([None] * len(order))

    @settings(max_examples=15)
    @given(KILLS)
    def holds(events):
        assert played(events) == expected

    holds()


@pytest.mark.parametrize("rule", EVERY)
def test_the_same_updates_make_the_same_bytes(rule):
    systems = [System(weights(3), **settings_of(rule, buffer_size=2, clients=3)) for _ in range(2)]
    for system in systems:
        send(system, stream(rule, "abcabbcacbabcc"))
    assert everything_of(systems[0]) == everything_of(systems[1])


@pytest.mark.parametrize("rule", BUFFERED)
def test_what_is_left_in_a_buffer_waits_for_the_next_start(rule):
    """FLSim applies fewer than K updates at an epoch's end with a full step; here they are neither lost nor applied."""
    common = {"buffer_size": 3, "clients": 3, "staleness": "constant"}
    stopped, unstopped = (System(**settings_of(rule, **common)) for _ in range(2))
    for system in (stopped, unstopped):
        send(system, [("a", whole(1), 0), ("b", whole(2), 0)])
    stopped.aggregator.finish()
    assert stopped.store.head().version == 0
    assert not stopped.weights.any()
    stopped.restart()
    for system in (stopped, unstopped):
        send(system, [("c", whole(3), 0)])
    assert stopped.store.head().version == 1
    np.testing.assert_array_equal(stopped.weights, unstopped.weights)


@pytest.mark.parametrize("rule", EVERY)
def test_a_fresh_update_has_no_staleness_and_full_weight_at_any_version(rule):
    """Weights are taken before the version moves, and are 1 at tau = 0 (FLSim: 1.41; NVFlare, FedML: 1/2)."""
    common = {"staleness": "polynomial(0.5)", "buffer_size": 1, "clients": 1, "alpha": 1.0}
    system = System(**settings_of(rule, **common))
    send(system, [("a", whole(step), 0) for step in range(5)])
    entries = [entry for commit in system.store.ledger for entry in commit["updates"]]
    assert [(entry["staleness"], entry["weight"]) for entry in entries] == [(0, 1.0)] * 5


@pytest.mark.parametrize("rule", [name for name in EVERY if "staleness" in SPECS[name].uses])
@pytest.mark.parametrize("staleness", ["polynomial(0.5)", "hinge(0.2,1)", "hinge(10,1)"])
def test_staleness_is_never_a_reason_to_count_more(rule, staleness):
    """hinge without its + 1 (flgo) does with a slope below 1."""
    system = System(**settings_of(rule, staleness=staleness, buffer_size=1, alpha=1.0))
    send(system, [("a", whole(step), step) for step in range(8)])
    found = [entry["weight"] for commit in system.store.ledger for entry in commit["updates"]]
    assert found[0] == 1.0
    assert all(0 < later <= earlier for earlier, later in pairwise(found))
    assert found[-1] < 0.5


@pytest.mark.parametrize("rule", [name for name in EVERY if "staleness" not in SPECS[name].uses and name != "fedavg"])
def test_rules_that_weigh_nobody_down_do_not(rule):
    system = System(**settings_of(rule, buffer_size=2, clients=3))
    send(system, stream(rule, "abcabbcacbabcc"))
    entries = [entry for commit in system.store.ledger for entry in commit["updates"]]
    assert max(entry["staleness"] for entry in entries) > 0
    assert {entry["weight"] for entry in entries} == {1.0}
