"""Every guard against its formula in float64, with states and arrivals made by hand."""

import math
import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aggregator.arrival import Arrival
from aggregator.robust import guards_of
from aggregator.robust.norms import NORMS, NORMS_MIN
from aggregator.state import Contribution, Kept, State
from shared.compression import decode
from shared.config import AggregatorSettings
from shared.errors import Reason, RejectedUpdate
from tests.builders import model_of, update_of, weights

VECTORS = st.lists(st.integers(-1000, 1000).map(lambda x: x / 64), min_size=3, max_size=3).map(
    lambda v: np.array(v, np.float32)
)
SCALES = st.sampled_from([1e-6, 1e-3, 1.0, 30.0, 1e6, 1e12])


def state_of(clients=(), num_params=3, **facts):
    """Return a state whose open buffer holds one update of each client named."""
    buffer = [Contribution(f"{client}/i/{place}", 0, 1.0, 1.0) for place, client in enumerate(clients)]
    return State(0, 4, 4, model_of(np.zeros(num_params, np.float32)), buffer=buffer, facts=facts)


def guards(robust, trusted=""):
    return guards_of(AggregatorSettings.model_construct(robust=robust, trusted_client=trusted))


def arrival_of(delta, client="a", codec="float32"):
    update = update_of(delta, codec, update_id=f"{client}/i/9")
    return Arrival(update, decode(update.codec, update.payload, model_of(delta).layout), 0, 1.0)


def weigh(robust, delta, state=None, client="a"):
    return guards(robust).weigh(state or state_of(), arrival_of(delta, client))


def trusting(robust, trusted_delta, state):
    """Return guards that have seen an update of the trusted client."""
    made, arrival = guards(robust, "server"), arrival_of(trusted_delta, "server")
    made.trust(state, arrival.update, arrival.delta)
    return made


def verdict(guarded, state, arrival):
    """Return the factor, None where it is rejected as suspicious."""
    try:
        return guarded.weigh(state, arrival)
    except RejectedUpdate as error:
        assert error.reason is Reason.SUSPICIOUS
        return None


# --- norms ------------------------------------------------------------------------------------------------------


@given(VECTORS, SCALES, st.sampled_from([1e-3, 1.0, 100.0]))
def test_norm_scales_down_to_its_limit_and_never_up(direction, scale, limit):
    delta = direction * np.float32(scale)
    norm = math.sqrt(sum(float(x) ** 2 for x in delta))
    factor = weigh(f"norm({limit})", delta)
    assert factor == pytest.approx(1.0 if norm <= limit else limit / norm, rel=1e-6)
    assert factor * norm <= limit * (1 + 1e-6) or factor == 1.0
    assert 0 < factor <= 1


@given(
    VECTORS, SCALES, st.lists(st.floats(0.01, 1000), max_size=30), st.sampled_from([1.1, 1.5, 2.0]), st.integers(10, 12)
)
def test_norm_median_scales_down_to_a_factor_of_the_median_of_the_window(direction, scale, norms, factor, window):
    state, delta = state_of(norms=norms[-window:]), direction * np.float32(scale)
    made = guards(f"norm_median({factor}, {window})")
    known, norm = sorted(norms[-window:]), math.sqrt(sum(float(x) ** 2 for x in delta))
    half = len(known) // 2
    limit = math.inf
    if len(known) >= 10:
        limit = factor * (known[half] if len(known) % 2 else (known[half - 1] + known[half]) / 2)
    arrival = arrival_of(delta)
    found = made.weigh(state, arrival)
    assert found == pytest.approx(min(1.0, limit / norm) if norm else 1.0, rel=1e-6)
    assert state.facts[NORMS] == norms[-window:]  # until it is applied
    made.applied(state, arrival)
    expected = norms[-window:] + ([min(norm, limit)] if norm else [])
    assert state.facts[NORMS] == pytest.approx(expected[-window:], rel=1e-6)


def test_there_is_no_bound_before_ten_norms_are_known_and_one_from_then_on():
    state, made = state_of(), guards("norm_median(2, 20)")
    for number in range(NORMS_MIN):
        arrival = arrival_of(np.array([3, 4, 0], np.float32))
        assert made.weigh(state, arrival_of(np.full(3, 1e15, np.float32))) == 1.0, number
        assert made.weigh(state, arrival) == 1.0
        made.applied(state, arrival)
    assert state.facts[NORMS] == [5.0] * 10
    assert made.weigh(state, arrival_of(np.array([0, 0, 1e15], np.float32))) == pytest.approx(10 / 1e15)


def test_what_is_not_applied_leaves_no_norm():
    state, made = state_of(), guards("norm_median | one_slot")
    made.weigh(state, arrival_of(weights(0, 3)))
    assert state.facts == {}


def test_an_attacker_raises_the_median_by_no_more_than_the_factor_in_half_a_window():
    state, made = state_of(norms=[1.0] * 100), guards("norm_median(2, 100)")
    huge = arrival_of(np.full(3, 1e15, np.float32))
    for _ in range(49):
        assert made.weigh(state, huge) * math.sqrt(3) * 1e15 == pytest.approx(2.0)
        made.applied(state, huge)
    assert sorted(state.facts[NORMS]) == pytest.approx([1.0] * 51 + [2.0] * 49)


def test_updates_of_nothing_do_not_shut_the_door():
    state, made = state_of(norms=[1.0] * 10), guards("norm_median(2, 10)")
    for _ in range(20):
        arrival = arrival_of(np.zeros(3, np.float32))
        assert made.weigh(state, arrival) == 1.0
        made.applied(state, arrival)
    assert state.facts[NORMS] == [1.0] * 10


def test_each_guard_sees_what_the_one_before_left():
    """Not 10/1000 * 2/1000: a huge update is as long as the smaller limit in the end, not shorter than a small one."""
    delta = np.array([0, 1000, 0], np.float32)
    state, made = state_of(norms=[1.0] * 10), guards("norm(10) | norm_median(2)")
    assert made.weigh(state, arrival_of(delta)) == pytest.approx(2 / 1000)
    assert weigh("norm(2) | norm(10)", delta) == pytest.approx(2 / 1000)
    made.applied(state, arrival_of(delta))
    assert state.facts[NORMS][-1] == pytest.approx(2.0)


@pytest.mark.parametrize(
    "codec", ["all | int8 | zstd", "all | topk(0.2) | float16", "all | rotate | eden(2)", "bfloat16"]
)
def test_the_norm_is_of_what_will_be_added(codec):
    delta = weights(1, 3000)
    arrival, total = arrival_of(delta, codec=codec), np.zeros(3000, np.float32)
    arrival.delta.add_into(total, 1.0)
    factor = guards("norm(0.5)").weigh(state_of(num_params=3000), arrival)
    assert factor * np.linalg.norm(total.astype(np.float64)) == pytest.approx(0.5, rel=1e-5)


# --- slots ------------------------------------------------------------------------------------------------------


def test_one_slot_takes_one_update_of_each_client():
    state = state_of(["a", "b", "ab", "longer"])
    for client in ("a", "b", "ab", "longer"):
        with pytest.raises(RejectedUpdate, match=f"client {client} has its one place") as caught:
            weigh("one_slot", weights(0, 3), state, client)
        assert caught.value.reason is Reason.SURPLUS
    for client in ("c", "A", "aa", "abc", "long", "er"):
        assert weigh("one_slot", weights(0, 3), state, client) == 1.0


@given(st.sampled_from([1.01, 1.1, 1.5, 2, 10, 1e6]), st.lists(st.sampled_from("abc"), max_size=30))
def test_throttle_weighs_the_c_th_repeat_q_to_the_minus_c(q, clients):
    expected = q ** -clients.count("a")
    if expected < 1e-3:
        with pytest.raises(RejectedUpdate, match=f"client a has {clients.count('a')} updates") as caught:
            weigh(f"throttle({q})", weights(0, 3), state_of(clients))
        assert caught.value.reason is Reason.SURPLUS
    else:
        assert weigh(f"throttle({q})", weights(0, 3), state_of(clients)) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("q", [1.01, 1.1, 1.5, 2.0, 1000.0])
def test_a_throttled_client_sends_a_bounded_number_whose_mass_is_bounded(q):
    factors: list[float] = []
    with pytest.raises(RejectedUpdate):
        while len(factors) < 10_000:
            factors.append(weigh(f"throttle({q})", weights(0, 3), state_of(["a"] * len(factors))))
    assert len(factors) == math.floor(math.log(1000) / math.log(q) + 1e-9) + 1
    assert sum(factors) <= 1 + 1 / (q - 1)


# --- trusted ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("robust", ["zeno", "aflguard"])
def test_before_the_trusted_client_has_sent_anything_every_update_is_suspicious(robust):
    with pytest.raises(RejectedUpdate, match="has not sent anything yet") as caught:
        guards(robust, "server").weigh(state_of(), arrival_of(weights(0, 3)))
    assert caught.value.reason is Reason.SUSPICIOUS


@given(VECTORS, VECTORS, SCALES, st.sampled_from([0.5, 1.0, 1.5, 3.0]))
def test_aflguard_is_its_formula(v, g, scale, limit):
    state = state_of()
    guarded = trusting(f"aflguard({limit})", v, state)
    g = (v + g * np.float32(scale)).astype(np.float32)
    distance = math.sqrt(sum((float(a) - float(b)) ** 2 for a, b in zip(v, g, strict=True)))
    allowed = limit * math.sqrt(sum(float(a) ** 2 for a in v))
    found = verdict(guarded, state, arrival_of(g))
    if abs(distance - allowed) > 1e-4 * allowed:
        assert found == (1.0 if distance <= allowed else None)


@given(VECTORS, VECTORS, SCALES, st.sampled_from([(0.002, 0.1, 1), (0.9, 0, 1), (0, 0.5, 2), (2, 0.1, 4), (0, 0, 1)]))
def test_zeno_is_its_formula(v, g, scale, parameters):
    rho, epsilon, rate = parameters
    state, g = state_of(), g * np.float32(scale)
    guarded = trusting(f"zeno({rho}, {epsilon}, {rate})", v, state)
    wide_v, wide_g = v.astype(np.float64), g.astype(np.float64)
    length, own = math.sqrt((wide_g**2).sum()), math.sqrt((wide_v**2).sum())
    found = verdict(guarded, state, arrival_of(g))
    if length == 0:
        assert found == 1.0
        return
    if own == 0:
        assert found is None
        return
    normalised = wide_g * own / length
    score = rate * (wide_v @ normalised) - rho * (normalised @ normalised) + rate * epsilon * own**2
    if abs(score) > 1e-4 * own**2:
        assert found == (pytest.approx(own / length, rel=1e-5) if score >= 0 else None)


def test_zeno_does_not_refuse_an_update_for_its_length():
    """The authors' code takes rho ||g||^2 before the normalisation (known mistake 18): a long honest g would fail."""
    v = np.array([1, 2, 2], np.float32)
    state = state_of()
    guarded = trusting("zeno(0.01, 0)", v, state)
    for length in (1e-9, 1.0, 1e3, 1e9, 1e15):
        assert guarded.weigh(state, arrival_of(v * np.float32(length))) == pytest.approx(1 / length, rel=1e-5)
        assert verdict(guarded, state, arrival_of(-v * np.float32(length))) is None


def test_what_the_guards_before_left_is_compared():
    v, g = np.array([1, 0, 0], np.float32), np.array([100, 0, 0], np.float32)
    state = state_of()
    assert verdict(trusting("aflguard(1.5)", v, state), state, arrival_of(g)) is None
    assert verdict(trusting("norm(2) | aflguard(1.5)", v, state), state, arrival_of(g)) == pytest.approx(0.02)
    assert trusting("norm(2) | zeno", v, state).weigh(state, arrival_of(g)) == pytest.approx(0.01)
    assert trusting("zeno | norm(0.5)", v, state).weigh(state, arrival_of(g)) == pytest.approx(0.005)


def test_a_refusal_says_the_numbers():
    state = state_of()
    guarded = trusting("aflguard(1.5)", np.array([3, 4, 0], np.float32), state)
    with pytest.raises(RejectedUpdate, match=r"distance from the trusted update is 10; 1.5 x 5 = 7.5 is allowed"):
        guarded.weigh(state, arrival_of(np.array([-3, -4, 0], np.float32)))
    guarded = trusting("zeno(0.3, 0.1, 2)", np.array([3, 4, 0], np.float32), state)
    with pytest.raises(RejectedUpdate, match=r"cosine with the trusted update is -1, at least 0.05 .* is 10, .* 5$"):
        guarded.weigh(state, arrival_of(np.array([-6, -8, 0], np.float32)))


def test_the_newest_trusted_update_counts_and_comes_back_from_the_store():
    stored: dict[str, bytes] = {}
    state = state_of()
    state.kept = Kept(stored.get)
    guarded = trusting("aflguard(1)", np.array([-1, 0, 0], np.float32), state)
    newest = arrival_of(np.array([1, 2, 0], np.float32), "server", "float16")
    guarded.trust(state, newest.update, newest.delta)
    stored |= {name: record for name, record in state.kept.changes.items() if record is not None}
    again = state_of(**state.facts)
    again.kept = Kept(stored.get, {"trusted"})
    for made, held in ((guarded, state), (guards("aflguard(1)", "server"), again)):
        assert made.weigh(held, arrival_of(np.array([1, 2, 0], np.float32))) == 1.0
        assert verdict(made, held, arrival_of(np.array([-1, 0, 0], np.float32))) is None


def test_a_state_that_went_back_has_the_trusted_update_it_had():
    """After a conflict the aggregator reloads: an update that was kept, but never committed, is not compared with."""
    before = state_of()
    guarded = trusting("aflguard(0.5)", np.array([1, 0, 0], np.float32), before)
    with pytest.raises(RejectedUpdate, match="has not sent anything yet"):
        guarded.weigh(state_of(), arrival_of(np.array([1, 0, 0], np.float32)))
    assert guarded.weigh(before, arrival_of(np.array([1, 0, 0], np.float32))) == 1.0


def test_no_vector_of_model_size_is_made_for_each_update():
    size = 1_000_000
    state, delta = state_of(num_params=size), weights(0, size)
    guarded, arrival = trusting("aflguard(2) | zeno", delta, state), arrival_of(delta, codec="int8")
    guarded.weigh(state, arrival)
    tracemalloc.start()
    try:
        for _ in range(3):
            guarded.weigh(state, arrival)
        assert tracemalloc.get_traced_memory()[1] < size  # a vector has 4 bytes a parameter
    finally:
        tracemalloc.stop()
