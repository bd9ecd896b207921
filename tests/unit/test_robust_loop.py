"""Defences in the real loop: what they remember survives, what is refused leaves no trace, what one client can do."""

import numpy as np
import pytest

from aggregator.robust import COMBINERS, GUARDS
from shared.errors import Reason, StoreUnavailable
from shared.rules import COMBINERS as NAMED_COMBINERS
from shared.rules import GUARDS as NAMED_GUARDS
from tests.builders import NUM_PARAMS, FaultyStore, System, update_of, weights


def one(value):
    return np.full(NUM_PARAMS, value, np.float32)


def send(system, delta, client, **changes):
    """Publish an update of a client under a fresh id, and step until it is settled."""
    update = system.publish(delta, update_id=f"{client}/i/{system.sequence}", **changes)
    system.drain()
    return update


def reasons(system):
    return [letter.reason for letter in system.broker.dead]


def entries(system):
    return [entry for commit in system.store.ledger for entry in commit["updates"]]


def test_the_tables_name_what_can_be_built():
    assert set(GUARDS) == set(NAMED_GUARDS)
    assert set(COMBINERS) == set(NAMED_COMBINERS)


# --- norms ------------------------------------------------------------------------------------------------------


def test_the_median_of_norms_survives_a_restart():
    system = System(buffer_size=1, staleness="constant", robust="norm_median(2, 10)")
    for _ in range(12):
        send(system, one(1), "a")
    np.testing.assert_allclose(system.weights, 12, rtol=1e-6)
    system.restart()
    send(system, one(-1e6), "b")
    np.testing.assert_allclose(system.weights, 10, rtol=1e-5)
    assert len(system.aggregator.state.facts["norms"]) == 10
    assert system.aggregator.state.facts["norms"][-1] == pytest.approx(2 * NUM_PARAMS**0.5, rel=1e-5)


def test_a_norm_whose_commit_was_lost_is_not_remembered_twice():
    store = FaultyStore()
    system = System(store=store, buffer_size=1, staleness="constant", robust="norm_median(2, 10)")
    for fault in (None, "after", "before", "after", None):
        store.faults = [fault]
        send(system, one(1), "a")
        system.drain()
    system.restart()
    assert len(system.aggregator.state.facts["norms"]) == 5


def test_what_is_refused_leaves_no_norm():
    """Else a client that floods would own the window with updates that cost it nothing."""
    system = System(buffer_size=3, robust="norm_median(2, 10) | one_slot")
    for _ in range(20):
        send(system, one(1e-3), "flood")
    for client in ("b", "c"):
        send(system, one(1), client)
    assert len(system.aggregator.state.facts["norms"]) == 3
    assert reasons(system) == [Reason.SURPLUS] * 19


def test_what_the_rule_refuses_leaves_no_norm():
    system = System(rule="fedavg", buffer_size=3, robust="norm_median(2, 10)")
    for _ in range(5):
        send(system, one(1), "a")
    assert reasons(system) == [Reason.SURPLUS] * 4
    assert len(system.aggregator.state.facts["norms"]) == 1


def test_staleness_and_guards_both_weigh():
    system = System(buffer_size=1, staleness="polynomial(1)", robust="norm(7)")
    send(system, one(0), "a")
    send(system, one(100), "a", base_version=0)
    np.testing.assert_allclose(system.weights, 7 / NUM_PARAMS**0.5 / 2, rtol=1e-5)
    assert entries(system)[-1]["weight"] == pytest.approx(7 / (100 * NUM_PARAMS**0.5) / 2, rel=1e-5)


# --- flooding ---------------------------------------------------------------------------------------------------


def flooded(robust, buffer_size, floods):
    """Return what one client that sends 1, while K - 1 others send 0, makes of the weights; and the system."""
    system = System(buffer_size=buffer_size, staleness="constant", robust=robust)
    for _ in range(floods):
        send(system, one(1), "flood")
    for index in range(buffer_size):
        if system.store.head().version == 0:
            send(system, one(0), f"honest{index}")
    assert system.store.head().version == 1
    return float(system.weights[0]), system


def test_without_a_guard_a_fast_client_is_the_buffer():
    assert flooded("", 10, 10)[0] == 1.0


def test_with_one_slot_a_client_has_at_most_a_kth_of_the_mass():
    share, system = flooded("one_slot", 10, 50)
    assert share == pytest.approx(1 / 10, rel=1e-6)
    assert reasons(system) == [Reason.SURPLUS] * 49
    assert system.aggregator.state.totals == {"applied": 10} | {"rejected": 49}
    share, _ = flooded("one_slot | median", 5, 50)
    assert share == 0.0


@pytest.mark.parametrize("q", [1.1, 1.5, 2.0, 10.0])
def test_with_throttle_a_client_has_a_bounded_mass_and_does_not_fill_the_buffer(q):
    share, system = flooded(f"throttle({q})", 10, 200)
    taken = 200 - len(reasons(system))
    assert share <= (1 + 1 / (q - 1)) / 10
    assert share == pytest.approx(sum(q**-c for c in range(taken)) / 10, rel=1e-5)
    assert set(reasons(system)) == {Reason.SURPLUS}
    assert sum(entry["outcome"] == "applied" and entry["id"].startswith("honest") for entry in entries(system)) == 9


def test_the_place_is_free_again_in_the_next_buffer_also_after_a_restart():
    system = System(buffer_size=2, robust="one_slot", commit_age_max_s=1)
    send(system, one(1), "a")
    system.clock.time_s += 2
    system.drain()
    system.restart()
    send(system, one(1), "a")
    assert reasons(system) == [Reason.SURPLUS]
    send(system, one(1), "b")
    send(system, one(1), "a")
    assert reasons(system) == [Reason.SURPLUS]
    assert len(system.aggregator.state.buffer) == 1


def test_a_worker_is_told_of_its_surplus_so_that_it_takes_the_mass_back():
    system = System(buffer_size=2, robust="one_slot")
    for client in ("a", "a", "b"):
        send(system, one(1), client)
    told, _ = system.store.outcomes("a", 0)
    assert [outcome for _, outcome in told] == ["applied", "rejected"]


# --- a trusted client -------------------------------------------------------------------------------------------


def trusting(robust="aflguard(0.5)", **changes):
    return System(**{"buffer_size": 2, "staleness": "constant", "robust": robust, "trusted_client": "server"} | changes)


def test_before_the_trusted_client_has_sent_anything_all_others_are_refused():
    system = trusting()
    send(system, one(1), "a")
    assert reasons(system) == [Reason.SUSPICIOUS]
    assert "has not sent anything yet" in system.broker.dead[0].detail
    send(system, one(1), "server")
    send(system, one(1), "a")
    assert len(system.broker.dead) == 1


@pytest.mark.parametrize("rule", ["fedbuff", "fedasync", "fedavg", "fadas", "rescaled", "fednova(1)"])
def test_updates_of_the_trusted_client_are_applied_kept_and_never_folded(rule):
    system = trusting(rule=rule) if rule in ("fedbuff", "fednova(1)", "rescaled") else System(
        rule=rule, robust="aflguard(0.5)", trusted_client="server", **({} if rule == "fedasync" else {"buffer_size": 2})
    )  # fmt: skip
    system.clock.time_s += 5
    for _ in range(5):
        update = send(system, one(1), "server")
    state = system.aggregator.state
    assert (state.version, state.buffer, state.buffer_since) == (0, [], 0.0)
    system.send(update)
    system.drain()
    system.aggregator.finish()
    assert [entry["weight"] for entry in entries(system)] == [0.0] * 6
    assert [outcome for _, outcome in system.outcomes()] == ["applied"] * 5 + ["duplicate"]
    assert np.all(system.weights == 0)
    assert update.update_id in system.store.load().applied
    assert (system.unacked, reasons(system)) == (0, [])


def test_an_open_buffer_is_not_disturbed_by_the_trusted_client():
    system = trusting(buffer_size=3)
    send(system, one(1), "server")
    system.clock.time_s += 5
    send(system, one(1), "a")
    since = system.aggregator.state.buffer_since
    system.clock.time_s += 5
    send(system, one(1.1), "server")
    assert system.aggregator.state.buffer_since == since > 0
    send(system, one(1), "b")
    assert system.store.head().version == 0
    send(system, one(1), "c")
    np.testing.assert_allclose(system.weights, 1.0)


def test_the_trusted_update_survives_a_restart_and_the_newest_counts():
    system = trusting()
    for value in (-5, 1):
        send(system, one(value), "server")
    system.aggregator.finish()
    system.restart()
    send(system, one(-5), "a")
    send(system, one(1.2), "b")
    assert reasons(system) == [Reason.SUSPICIOUS]
    assert [c.update_id.split("/")[0] for c in system.aggregator.state.buffer] == ["b"]
    assert system.aggregator.state.kept.names == {"trusted"}


def test_a_trusted_update_that_was_not_committed_is_not_compared_with_after_a_restart():
    system = trusting()
    send(system, one(1), "server")
    system.restart()  # killed before the commit: the broker delivers it again
    assert system.aggregator.state.facts == {}
    system.drain()
    send(system, one(1), "a")
    assert reasons(system) == []


def test_a_trusted_update_that_is_too_stale_is_refused_like_any_other():
    system = trusting(buffer_size=1, staleness_max=0)
    send(system, one(1), "server")
    send(system, one(1), "a")
    send(system, one(-1), "server", base_version=0)
    send(system, one(1), "a")
    assert system.store.head().version == 2
    assert [outcome for _, outcome in system.outcomes()][:4] == ["applied", "applied", "stale", "applied"]


def test_the_store_being_away_refuses_nobody(monkeypatch):
    system = trusting()
    send(system, one(1), "server")
    system.aggregator.finish()
    system.restart()

    def away(name):
        raise StoreUnavailable(f"kept {name}")

    with monkeypatch.context() as patched:
        patched.setattr(system.aggregator.state.kept, "_read", away)
        system.publish(one(1), update_id="a/i/0")
        assert not system.step()
    assert (reasons(system), system.aggregator.state.buffer, system.unacked) == ([], [], 1)
    system.drain()
    assert len(system.aggregator.state.buffer) == 1
    assert reasons(system) == []


def test_zeno_gives_what_points_the_right_way_the_trusted_length():
    system = trusting("zeno", buffer_size=1)
    send(system, one(2), "server")
    send(system, one(1e6), "a")
    np.testing.assert_allclose(system.weights, 2.0, rtol=1e-5)
    send(system, one(-1e-3), "b")
    assert reasons(system) == [Reason.SUSPICIOUS]
    assert system.store.head().version == 1


# --- combiners --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("robust", "expected"),
    [("median", 3.0), ("trimmed_mean(0.2)", 3.0), ("krum(1)", 3.0), ("multi_krum(1, 1)", 3.0)],
)
def test_a_version_is_what_the_combiner_makes_of_the_buffer(robust, expected):
    system = System(buffer_size=5, staleness="constant", robust=f"one_slot | {robust}", server_lr=0.5)
    for index, value in enumerate((1e15, 2.9, 3.0, 3.1, -2.0)):
        send(system, one(value), f"c{index}")
    np.testing.assert_allclose(system.weights, 0.5 * expected, rtol=1e-5)


def test_the_center_survives_a_restart():
    runs = []
    for restarts in (False, True):
        system = System(buffer_size=3, staleness="constant", robust="one_slot | centered_clipping(0.5)")
        for _round in range(4):
            for client in "abc":
                send(system, weights(ord(client)), client)
            if restarts:
                system.restart()
        runs.append(system.weights.tobytes())
        assert np.linalg.norm(system.store.load().arrays["center"]) > 0.5
    assert runs[0] == runs[1]


def test_the_center_begins_anew_with_another_rule():
    system = System(buffer_size=3, robust="centered_clipping(0.5)")
    for client in "abc":
        send(system, one(1), client)
    assert system.aggregator.state.arrays["center"].any()
    system.restart(rule="fadas")
    assert not system.aggregator.state.arrays["center"].any()


def test_bucketing_gives_the_same_bytes_after_a_crash():
    runs = []
    for restarts in (False, True):
        system = System(buffer_size=6, staleness="constant", robust="bucketing(2) | median", commit_age_max_s=1)
        for number in range(12):
            send(system, weights(number), f"c{number % 6}")
            if restarts:
                system.clock.time_s += 2
                system.drain()
                system.restart()
        assert system.store.head().version == 2
        runs.append(system.weights.tobytes())
    assert runs[0] == runs[1]


def test_a_liar_among_honest_workers_does_not_stop_the_training():
    """Four pull the weights to 1, one pushes them away a million times as hard."""
    for robust in ("median", "trimmed_mean(0.2)", "krum(1)", "centered_clipping(2, 3)", "norm(1)"):
        rng = np.random.default_rng(0)
        system = System(
            buffer_size=5,
            staleness="constant",
            robust=f"{robust} | one_slot" if robust == "norm(1)" else f"one_slot | {robust}",
        )
        for _ in range(60):
            for client in rng.permutation(5):
                honest = (one(1) - system.weights) * np.float32(0.5)
                send(system, honest if client else one(-1e6), f"c{client}")
        worst = 1.5 if robust == "norm(1)" else 0.7  # a bound on the norm alone leaves him a pull
        assert np.abs(system.weights - 1).max() < worst, robust


def test_an_update_is_the_same_bytes_whoever_looks():
    """The decoded delta is not changed by a guard: what is folded is what was sent."""
    system = System(buffer_size=1, staleness="constant", robust="norm(1e9) | norm_median")
    delta = weights(5)
    system.send(update_of(delta, update_id="a/i/0"))
    system.drain()
    assert system.weights.tobytes() == delta.tobytes()
