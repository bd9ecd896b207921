"""FedBuff and FedAsync through broker, loop and store, against float64 formulas written here independently.

A scenario publishes updates trained from any version somebody could have pulled, redelivers some, lets the
aggregator work in pieces, kills it in between, and compares what is stored at the end with the formula.
"""

from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.messages import Update
from tests.builders import NUM_PARAMS, FaultyStore, System, weights

STALENESS = {
    "constant": lambda tau: 1.0,
    "polynomial(0.5)": lambda tau: 1.0 / np.sqrt(1.0 + tau),
    "polynomial(2)": lambda tau: 1.0 / (1.0 + tau) ** 2,
    "hinge(10,1)": lambda tau: 1.0 if tau <= 1 else 1.0 / (10.0 * (tau - 1) + 1.0),
}


@dataclass
class Oracle:
    """The state as the papers define it, in float64; it knows nothing of commits, codecs or floats of 32 bits."""

    weigh: str
    staleness_max: int
    versions: list[np.ndarray]
    outcomes: dict[str, str] = field(default_factory=dict)
    open: list[tuple[float, np.ndarray]] = field(default_factory=list)

    def receive(self, update: Update) -> None:
        tau = len(self.versions) - 1 - update.base_version
        if self.outcomes.get(update.update_id) == "applied":
            return
        if tau > self.staleness_max:
            self.outcomes[update.update_id] = "stale"
            return
        self.outcomes[update.update_id] = "applied"
        delta = np.frombuffer(update.payload, "<f4").astype(np.float64)
        self.apply(update, delta, STALENESS[self.weigh](tau))


@dataclass
class FedBuffOracle(Oracle):
    """x <- x + eta * sum_i s(tau_i) n_i Delta_i / sum_i n_i, every K updates; n_i = 1 unless by samples."""

    buffer_size: int = 1
    server_lr: float = 1.0
    by_samples: bool = False

    def apply(self, update, delta, weight):
        share = update.num_samples if self.by_samples else 1
        self.open.append((share, weight * delta))
        if len(self.open) == self.buffer_size:
            mean = sum(n * d for n, d in self.open) / sum(n for n, _ in self.open)
            self.versions.append(self.versions[-1] + self.server_lr * mean)
            self.open = []


@dataclass
class FedAsyncOracle(Oracle):
    """x <- (1 - a) x + a (x_base + Delta), a = alpha s(tau)."""

    alpha: float = 0.6

    def apply(self, update, delta, weight):
        a = self.alpha * weight
        self.versions.append((1 - a) * self.versions[-1] + a * (self.versions[update.base_version] + delta))


ACTIONS = st.one_of(
    st.tuples(st.just("publish"), st.integers(0, 6), st.integers(1, 40)),  # versions behind, samples
    st.tuples(st.just("publish"), st.integers(0, 1), st.integers(1, 40)),
    st.tuples(st.just("again"), st.integers(0, 10**6)),
    st.tuples(st.just("step")),
    st.tuples(st.just("wait"), st.sampled_from([0.3, 2.0, 40.0])),
    st.tuples(st.just("kill")),
    st.tuples(st.just("stop")),
)
SCENARIOS = st.lists(ACTIONS, min_size=15, max_size=60)  # hypothesis prefers short lists: mostly about 30
FAULTS = st.lists(st.sampled_from([None, None, "before", "after"]), max_size=12)
COMMON = {
    "staleness": st.sampled_from(sorted(STALENESS)),
    "staleness_max": st.sampled_from([0, 1, 2, 5, 100]),
    "commit_interval_s": st.sampled_from([0.0, 0.5]),
    "prefetch": st.sampled_from([1, 2, 8, 256]),
}


def play(system: System, oracle: Oracle, scenario) -> None:
    """Do what the scenario says, then let everything settle."""
    sent, visible = [], [0]
    for action, *details in scenario:
        match action:
            case "publish":
                lag, num_samples = details
                base = visible[max(0, len(visible) - 1 - lag)]
                sent.append(system.publish(weights(len(sent)), base_version=base, num_samples=num_samples))
                oracle.receive(sent[-1])
            case "again" if sent:
                system.send(sent[details[0] % len(sent)])
                oracle.receive(sent[details[0] % len(sent)])
            case "step":
                system.step()
            case "wait":
                system.clock.time_s += details[0]
                system.step()
            case "kill":
                system.restart()
            case "stop":
                system.aggregator.finish()
                system.restart()
        if system.store.head().version > visible[-1]:
            visible.append(system.store.head().version)
    for _ in range(15):  # commits that fail are tried again
        system.drain()
        system.clock.time_s += 60
    system.drain()


def check(system: System, oracle: Oracle) -> None:
    """Compare what is durable with the formula: version, weights, every outcome, the open buffer."""
    head, stored = system.store.head(), system.store.load()
    assert head.version == len(oracle.versions) - 1
    scale = max(1.0, max(np.abs(version).max() for version in oracle.versions))
    np.testing.assert_allclose(system.weights, oracle.versions[-1], rtol=0, atol=1e-5 * scale)
    applied = [name for name, outcome in system.outcomes() if outcome == "applied"]
    assert len(applied) == len(set(applied))
    stale = {name for name, outcome in system.outcomes() if outcome == "stale"}  # or applied and forgotten since
    assert dict.fromkeys(stale, "stale") | dict.fromkeys(applied, "applied") == oracle.outcomes
    for name, array in stored.arrays.items():
        expected = sum((share * delta for share, delta in oracle.open), np.zeros(NUM_PARAMS))
        np.testing.assert_allclose(array, expected, rtol=0, atol=1e-4, err_msg=name)
    assert bool(stored.arrays) == bool(oracle.open)
    assert system.unacked == 0
    assert all(name in stored.applied for name in applied if stored_base(system, name) >= floor(system))


def stored_base(system: System, name: str) -> int:
    return next(e["base_version"] for c in system.store.ledger for e in c["updates"] if e["id"] == name)


def floor(system: System) -> int:
    return system.store.head().version - system.settings.staleness_max


def fedbuff(start, store=None, **drawn):
    oracle = FedBuffOracle(
        drawn["staleness"], drawn["staleness_max"], [start.astype(np.float64)], {}, [], drawn["buffer_size"],
        drawn["server_lr"], drawn["weight_by_samples"],
    )  # fmt: skip
    return System(start, store, **drawn), oracle


def fedasync(start, store=None, **drawn):
    oracle = FedAsyncOracle(
        drawn["staleness"], drawn["staleness_max"], [start.astype(np.float64)], {}, [], drawn["alpha"]
    )  # fmt: skip
    return System(start, store, rule="fedasync", **drawn), oracle


FEDBUFF = st.fixed_dictionaries(
    COMMON
    | {
        "buffer_size": st.integers(1, 5),
        "server_lr": st.sampled_from([1.0, 0.3]),
        "weight_by_samples": st.booleans(),
    }
)
FEDASYNC = st.fixed_dictionaries(COMMON | {"alpha": st.sampled_from([0.1, 0.6, 1.0])})


@settings(max_examples=300)
@given(FEDBUFF, SCENARIOS)
def test_fedbuff_is_its_formula_whatever_happens_on_the_way(drawn, scenario):
    system, oracle = fedbuff(weights(99), **drawn)
    play(system, oracle, scenario)
    check(system, oracle)


@settings(max_examples=300)
@given(FEDASYNC, SCENARIOS)
def test_fedasync_is_its_formula_whatever_happens_on_the_way(drawn, scenario):
    system, oracle = fedasync(weights(99), **drawn)
    play(system, oracle, scenario)
    check(system, oracle)


@settings(max_examples=300)
@given(FEDBUFF, SCENARIOS, FAULTS)
def test_fedbuff_is_its_formula_although_commits_fail(drawn, scenario, faults):
    store = FaultyStore()
    store.faults = list(faults)
    system, oracle = fedbuff(weights(99), store, **drawn)
    play(system, oracle, scenario)
    check(system, oracle)


@settings(max_examples=300)
@given(FEDASYNC, SCENARIOS, FAULTS)
def test_fedasync_is_its_formula_although_commits_fail(drawn, scenario, faults):
    store = FaultyStore()
    store.faults = list(faults)
    system, oracle = fedasync(weights(99), store, **drawn)
    play(system, oracle, scenario)
    check(system, oracle)


def deltas(*values):
    return [np.full(NUM_PARAMS, value, np.float32) for value in values]


def test_fedbuff_divides_by_k_not_by_the_sum_of_weights():
    """Two fresh and two stale updates, tau 3: (1 + 1 + 1/2 + 1/2) * 1 / 4, not / 3 (FedScale) and not / 1 (FLSim)."""
    system = System(buffer_size=1, staleness="polynomial(0.5)")
    for delta in deltas(0, 0, 0):
        system.publish(delta)
        system.drain()
    system.restart(buffer_size=4)
    for delta, base in zip(deltas(1, 1, 1, 1), (3, 3, 0, 0), strict=True):
        system.publish(delta, base_version=base)
    system.drain()
    np.testing.assert_allclose(system.weights, 3 / 4, rtol=1e-6)


def test_fedbuff_by_samples_divides_by_the_number_of_samples():
    system = System(buffer_size=2, weight_by_samples=True, server_lr=0.5)
    for delta, num_samples in zip(deltas(1, 4), (10, 30), strict=True):
        system.publish(delta, num_samples=num_samples)
    system.drain()
    np.testing.assert_allclose(system.weights, 0.5 * (10 * 1 + 30 * 4) / 40, rtol=1e-6)


def test_fedbuff_ignores_samples_unless_told():
    system = System(buffer_size=2)
    for delta, num_samples in zip(deltas(1, 4), (10, 30), strict=True):
        system.publish(delta, num_samples=num_samples)
    system.drain()
    np.testing.assert_allclose(system.weights, 2.5, rtol=1e-6)


@pytest.mark.parametrize(("lag", "expected"), [(0, 10.0), (1, 10 / 2**0.5), (2, 10 / 3**0.5)])
def test_staleness_is_counted_before_the_version_moves(lag, expected):
    system = System(buffer_size=1, staleness="polynomial(0.5)")
    for delta in deltas(0, 0):
        system.publish(delta)
        system.drain()
    system.publish(deltas(10)[0], base_version=2 - lag)
    system.drain()
    np.testing.assert_allclose(system.weights, expected, rtol=1e-6)
    entry = system.store.ledger[-1]["updates"][0]
    assert (entry["staleness"], entry["version"]) == (lag, 2)


def test_the_updates_of_one_buffer_are_equally_fresh():
    """The version does not move within a buffer, so the last of K is as fresh as the first."""
    system = System(buffer_size=3)
    for delta in deltas(1, 1, 1):
        system.publish(delta)
    system.drain()
    assert [e["staleness"] for c in system.store.ledger for e in c["updates"]] == [0, 0, 0]


def test_fedasync_moves_towards_the_workers_own_model_not_along_its_delta():
    system = System(rule="fedasync", alpha=0.5, staleness="constant")
    system.publish(deltas(8)[0])  # x1 = 0.5 * 0 + 0.5 * 8 = 4
    system.drain()
    system.publish(deltas(2)[0], base_version=0)  # x2 = 0.5 * 4 + 0.5 * (0 + 2) = 3
    system.drain()
    np.testing.assert_allclose(system.weights, 3.0, rtol=1e-6)


def test_fedasync_does_not_compound_its_alpha():
    """Plato multiplies alpha by s(tau) for good; a fresh update after a stale one must count fully again."""
    system = System(rule="fedasync", alpha=0.5, staleness="polynomial(2)")
    for delta, base in zip(deltas(0, 0, 6), (0, 0, 2), strict=True):
        system.publish(delta, base_version=base)
        system.drain()
    np.testing.assert_allclose(system.weights, 3.0, rtol=1e-6)


@pytest.mark.parametrize("name", ["int8 | zstd", "int4", "float16"])
def test_a_compressed_delta_is_weighed_like_any_other(name):
    system = System(buffer_size=2, codec=name, staleness="polynomial(0.5)", server_lr=2.0)
    for _ in range(2):
        system.publish(deltas(7)[0], codec=name)
    system.drain()
    for _ in range(2):
        system.publish(deltas(7)[0], codec=name, base_version=0)
    system.drain()
    np.testing.assert_allclose(system.weights, 2 * 7 * (1 + 2**-0.5), rtol=2e-3)
