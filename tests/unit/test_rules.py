"""The rules one by one: what is in the registry, what they refuse, what they remember and forget, what they cost."""

import logging
import math
import tracemalloc
from dataclasses import replace

import msgpack
import numpy as np
import pytest
from pydantic import ValidationError

from aggregator.arrival import Arrival
from aggregator.record import read_record
from aggregator.rules import RULES, rule_of
from aggregator.rules.fednova import effective_steps
from aggregator.rules.memory import SHORT, SHORTENED, SPARE_BYTES
from aggregator.state import Kept, State
from shared.compression import decode, parse
from shared.config import AggregatorSettings
from shared.errors import Reason, RejectedUpdate, StoreUnavailable
from shared.layout import Layout
from shared.model_image import ModelImage
from shared.rules import AVERAGING
from shared.rules import RULES as SPECS
from shared.vector import BLOCK_ELEMENTS
from tests.builders import JOB, NUM_PARAMS, System, model_of, update_of, weights
from tests.rule_oracles import oracle_of

REMEMBERING = ("ca2fl", "ace", "aced", "ringleader")


def settings_of(rule, **given):
    used = {name: value for name, value in given.items() if name in SPECS[rule.partition("(")[0]].uses}
    if rule != "fedavg":
        used["staleness_max"] = 100
    return AggregatorSettings(job=JOB, rule=rule, **used)


def built(rule, **given):
    """Return a rule for three clients and buffers of two, unless told otherwise."""
    return rule_of(settings_of(rule, **{"clients": 3, "buffer_size": 2, "staleness": "constant"} | given))


def state_of(rule, start=None, stored=None):
    """Return a state at version 0 whose records are read from `stored`."""
    start = np.zeros(NUM_PARAMS, np.float32) if start is None else start
    arrays = {name: np.zeros(start.size, np.float32) for name in rule.sums}
    arrays |= {name: np.full(start.size, first, np.float32) for name, first in rule.arrays.items()}
    stored = {} if stored is None else stored
    return State(0, 0, 0, model_of(start), arrays, kept=Kept(stored.get, set(stored)))


def arrival_of(state, delta, client="a", codec="float32", weight=1.0, base_version=None, **changes):
    base = state.version if base_version is None else base_version
    update = update_of(delta, codec, update_id=f"{client}/i/0", base_version=base, **changes)
    decoded = decode(update.codec, update.payload, state.model.layout)
    return Arrival(update, decoded, state.version - base, weight, state.weights.copy())


def take(rule, state, delta, client="a", **changes):
    """Fold and advance, as the loop does."""
    factor = rule.fold(state, arrival_of(state, delta, client, **changes))
    rule.advance(state)
    return factor


def of(value):
    return np.full(NUM_PARAMS, value, np.float32)


# --- the registry -------------------------------------------------------------------------------------------


def test_every_rule_of_the_table_is_built_under_its_name_and_no_other():
    assert RULES.keys() == SPECS.keys()
    for name in RULES:
        rule = built(name)
        assert rule.name == name
        assert rule.buffer_kind.startswith(name)


@pytest.mark.parametrize("rule", sorted(RULES))
def test_only_fedasync_needs_bases_and_only_area_the_start(rule):
    needs = built(rule).needs
    assert (needs.base, needs.start) == (rule == "fedasync", rule == "area")


@pytest.mark.parametrize("rule", sorted(RULES))
def test_arrays_and_sums_do_not_overlap_and_the_optimizers_are_among_them(rule):
    optimizer = "adam" if "server_optimizer" in SPECS[rule].uses else None
    one = built(rule, server_optimizer="adam")
    assert not set(one.sums) & set(one.arrays)
    assert optimizer is None or {"adam_m", "adam_v"} <= set(one.arrays)


def test_open_buffers_that_do_not_mix_are_of_different_kinds():
    kinds = [built(rule).buffer_kind for rule in RULES]
    kinds += [built(rule, weight_by_samples=True).buffer_kind for rule in ("fedbuff", "fedavg", "fednova")]
    averaging = ["fednova(5)" if rule == "fednova" else rule for rule in AVERAGING]
    kinds += [built(rule, robust="median", buffer_size=3).buffer_kind for rule in averaging]
    kinds += [built(rule).buffer_kind for rule in ("fednova(0,0.9)", "fednova(0,0.5)", "fednova(0,0,0.1)")]
    assert len(kinds) == len(set(kinds))


def test_an_open_buffer_goes_on_although_the_step_changes():
    """Server lr, optimizer and tau_eff come in at the flush."""
    assert built("fednova(3)").buffer_kind == built("fednova").buffer_kind
    assert built("fedbuff", server_optimizer="adam", buffer_size=9).buffer_kind == built("fedbuff").buffer_kind


def test_fednova_takes_momentum_or_a_proximal_term():
    with pytest.raises(ValidationError, match=r"FEDMQ_RULE=fednova.steps=0, momentum=0.9, proximal=0.1.*leave one out"):
        built("fednova(0, 0.9, 0.1)")


def test_fednova_behind_a_defence_does_not_take_the_clients_word_for_their_steps():
    with pytest.raises(ValidationError, match=r"give the steps, e.g. fednova\(steps=10\)"):
        built("fednova", robust="norm(1)")
    assert built("fednova(10)", robust="norm(1)")


@pytest.mark.parametrize(
    "rule",
    [
        "fednova(momentum=1)", "fednova(proximal=1)", "fednova(-1)", "rescaled(0)", "rescaled(1,0.5)", "fadas(-1)",
        "fadas(epsilon=0)", "fadas(beta1=1)", "aced(1.5)", "aced(-1)",
    ],
)  # fmt: skip
def test_impossible_parameters_are_refused_with_the_range(rule):
    with pytest.raises(ValueError, match=r"must be a (whole )?number in "):
        settings_of(rule, clients=3)


def test_the_job_tells_what_its_arithmetic_is():
    system = System(rule="rescaled", robust="norm(3) | one_slot", server_optimizer="yogi", clients=12)
    told = system.store.job()
    assert told["server_optimizer"] == "yogi"
    assert told["robust"] == "norm(3) | one_slot"
    assert told["clients"] == 12
    assert told["trusted_client"] == ""


def publish(system, *values):
    for value in values:
        system.publish(of(value))
        system.drain()


def test_a_job_that_comes_back_to_an_optimizer_starts_it_afresh():
    system = System(buffer_size=1, server_optimizer="adam", server_lr=0.1)
    publish(system, 5, 5, 5)
    system.restart(server_optimizer="sgd")
    publish(system, 1)
    assert not system.store.load().arrays
    before = system.weights.copy()
    system.restart(server_optimizer="adam")
    publish(system, 1)
    fresh = System(before, buffer_size=1, server_optimizer="adam", server_lr=0.1)
    publish(fresh, 1)
    np.testing.assert_array_equal(system.weights, fresh.weights)


@pytest.mark.parametrize("rule", REMEMBERING)
def test_a_job_that_changes_its_rule_forgets_what_the_old_one_kept(rule):
    size = {"buffer_size": 1} if rule == "ca2fl" else {}
    system = System(rule=rule, clients=2, **size)
    for client in "ab":  # a version: no buffer is open, also not ringleader's table
        system.publish(of(1), update_id=f"{client}/i/0")
        system.drain()
    system.aggregator.finish()
    assert system.store._kept
    system.settings = settings_of("fedbuff", buffer_size=1)
    system.restart()
    publish(system, 3)
    system.aggregator.finish()
    assert system.store._kept == {}
    assert msgpack.unpackb(system.store.load().state)["facts"] == {}


# --- what a failed read or a refusal leaves behind ------------------------------------------------------------


def everything_in(state):
    arrays = {name: array.tobytes() for name, array in state.arrays.items()}
    return (
        state.version, state.weights.tobytes(), arrays, msgpack.packb(state.facts), list(state.buffer),
        sorted(state.kept.names), dict(state.kept.changes),
    )  # fmt: skip


class Away:
    """A store that answers, until it does not."""

    def __init__(self):
        self.records, self.away = {}, False

    def get(self, name):
        if self.away:
            raise StoreUnavailable("the store is away")
        return self.records.get(name)


@pytest.mark.parametrize("rule", [*REMEMBERING, "fedbuff"])
def test_a_fold_that_cannot_read_changes_nothing_and_can_be_repeated(rule):
    robust = {"robust": "median", "buffer_size": 3} if rule == "fedbuff" else {}
    one, store = built(rule, **robust), Away()
    state, undisturbed = state_of(one), state_of(one)
    state.kept = Kept(store.get)
    for step, client in enumerate("abcabdcbdaabc"):
        for each in (undisturbed, state):
            arrival = arrival_of(each, weights(step), client, base_version=max(0, each.version - 2))
            if each is state:
                store.away, before = True, everything_in(state)
                try:
                    one.fold(state, arrival)
                except StoreUnavailable:
                    state.facts = state.facts or msgpack.unpackb(before[3])
                    assert without_empty(everything_in(state)) == without_empty(before)
                    store.away = False
                    one.fold(state, arrival)
                store.away = True
                one.advance(state)  # must not read
                store.records |= {name: record for name, record in state.kept.changes.items() if record is not None}
                state.kept.committed()
            else:
                one.fold(each, arrival)
                one.advance(each)
        np.testing.assert_array_equal(state.weights, undisturbed.weights)
    assert msgpack.packb(state.facts) == msgpack.packb(undisturbed.facts)
    assert state.kept.names == undisturbed.kept.names


def without_empty(everything):
    """Leave out tables that were only laid out."""
    version, model, arrays, facts, *rest = everything
    return version, model, arrays, {k: v for k, v in msgpack.unpackb(facts).items() if v}, rest


def test_fedavg_takes_one_update_of_each_client_into_a_round():
    rule = built("fedavg")
    state = state_of(rule)
    take(rule, state, of(1))
    before = everything_in(state)
    with pytest.raises(RejectedUpdate, match="a is in the round of version 0 already, with 1 of 2") as error:
        take(rule, state, of(2))
    assert error.value.reason is Reason.SURPLUS
    assert everything_in(state) == before
    take(rule, state, of(3), "b")
    assert state.version == 1
    np.testing.assert_allclose(state.weights, 2)


def test_a_client_whose_name_begins_like_anothers_is_another():
    for first, second in (("a", "ab"), ("ab", "a")):
        rule = built("fedavg")
        state = state_of(rule)
        take(rule, state, of(1), first)
        take(rule, state, of(3), second)
        assert state.version == 1


def test_ringleader_takes_gradients_only():
    rule = built("ringleader")
    state = state_of(rule)
    with pytest.raises(RejectedUpdate, match=r"5 local steps; .*one step.*another rule") as error:
        take(rule, state, of(1), num_steps=5)
    assert error.value.reason is Reason.RULE
    assert not state.buffer
    assert not state.kept.names


def test_fedasync_never_goes_beyond_the_workers_own_model():
    """A guard may scale an update up."""
    rule = built("fedasync")
    state = state_of(rule)
    assert take(rule, state, of(4), weight=5.0) == 1.0
    np.testing.assert_allclose(state.weights, 4)


# --- FedNova's steps ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_steps", [1, 2, 3, 10, 500])
@pytest.mark.parametrize(("momentum", "proximal"), [(0, 0), (0.5, 0), (0.9, 0), (0.9999, 0), (0, 0.1), (0, 0.999)])
def test_effective_steps_are_those_of_a_loop(num_steps, momentum, proximal):
    """Local training on a constant gradient of 1, at lr 1, counted step by step."""
    velocity = moved = 0.0
    for _ in range(num_steps):
        velocity = momentum * velocity + 1
        moved = (1 - proximal) * moved + velocity
    assert effective_steps(num_steps, momentum, proximal) == pytest.approx(moved, rel=1e-6)


@pytest.mark.parametrize("proximal", [1e-12, 1e-6, 1 - 1e-12])
def test_effective_steps_hold_at_the_ends_of_the_proximal_term(proximal):
    assert effective_steps(1, 0, proximal) == pytest.approx(1)
    assert 1 <= effective_steps(1000, 0, proximal) <= 1000


def test_the_largest_numbers_of_steps_are_finite():
    for parameters in ((0, 0), (0.9999, 0), (0, 1e-9)):
        assert 1 <= effective_steps(10**9, *parameters) < math.inf


# --- Rescaled's intervals -------------------------------------------------------------------------------------


def test_rescaled_gives_fast_and_slow_workers_the_same_say():
    """a sends three times as often as b and c: over many versions their weights add up to the same."""
    rule = built("rescaled", buffer_size=1)
    state, sums = state_of(rule), dict.fromkeys("abc", 0.0)
    for step, client in enumerate("abaca" * 60):
        factor = take(rule, state, of(1), client)
        sums[client] += factor if step >= 50 else 0
    assert sums["b"] == pytest.approx(sums["c"], rel=0.02)  # the mean moves a little within a turn
    assert sums["a"] == pytest.approx(sums["b"], rel=0.02)


def test_rescaled_knows_no_interval_of_a_client_it_saw_once():
    rule = built("rescaled", buffer_size=1)
    state = state_of(rule)
    assert [take(rule, state, of(1), client) for client in "aab"] == [1.0, 1.0, 1.0]


def test_rescaled_bounds_its_weights_both_ways():
    rule = built("rescaled(1, 1.2)", buffer_size=1)
    state = state_of(rule)
    found = {take(rule, state, of(1), client) for client in "abaaaaaaaabaaaab"}
    assert max(found) == 1.2
    assert min(found) == pytest.approx(1 / 1.2)


@pytest.mark.parametrize(("clients", "entries"), [(3, 3), (0, 10_000)])
def test_rescaled_remembers_a_bounded_number_of_clients(clients, entries):
    rule = built("rescaled", clients=clients, buffer_size=1)
    state, count = state_of(rule), entries + 20
    for client in range(count):
        take(rule, state, of(0), f"c{client}")
    table = state.facts["rescaled"]["clients"]
    assert list(table) == [f"c{client}" for client in range(count - entries, count)]


# --- what is remembered of every worker -----------------------------------------------------------------------


SHAPE = (100, 60)  # one matrix, so that int8 is int8
LARGE = ModelImage.of({"w": np.zeros(SHAPE, np.float32)})


def matrix(seed, size=1.0):
    return weights(seed, LARGE.layout.num_params) * np.float32(size)


def large_arrival(image, delta, client, codec):
    encoded = parse(codec).encode(delta, image.layout, np.random.default_rng(0))
    update = update_of(of(0), update_id=f"{client}/i/0")
    update = replace(update, codec={"name": codec, **encoded.params}, payload=encoded.payload)
    return Arrival(update, decode(update.codec, update.payload, image.layout), 0, 1.0, image.weights.copy())


def large_state(rule, image=LARGE):
    image = ModelImage.of({"w": np.zeros(image.layout.tensors[0].shape, np.float32)})
    arrays = {name: np.zeros(image.layout.num_params, np.float32) for name in rule.sums}
    arrays |= {name: np.full(image.layout.num_params, first, np.float32) for name, first in rule.arrays.items()}
    return State(0, 0, 0, image, arrays)


def large_take(rule, state, delta, client, codec="float32"):
    arrival = large_arrival(state.model, delta, client, codec)
    rule.fold(state, replace(arrival, update=replace(arrival.update, base_version=state.version)))
    rule.advance(state)
    return arrival.delta


def inflated(delta):
    vector = np.zeros(LARGE.layout.num_params, np.float32)
    delta.add_into(vector, 1.0)
    return vector


def head_of(record):
    return msgpack.unpackb(record[4 : 4 + int.from_bytes(record[:4], "little")])


@pytest.mark.parametrize("codec", ["int8", "int8 | zstd", "int4", "topk(0.1) | int8", "nf4 | zstd"])
def test_a_short_update_is_remembered_as_it_came(codec):
    rule = built("ace", clients=1)
    state = large_state(rule)
    sent = large_take(rule, state, matrix(1), "a", codec)
    np.testing.assert_array_equal(state.arrays["latest_sum"], inflated(sent))
    assert head_of(state.kept.get("client:a"))["codec"]["name"] == codec


@pytest.mark.parametrize("codec", ["float32", "float16", "bfloat16", "float32 | zstd"])
def test_a_long_update_is_remembered_in_int8_and_added_as_remembered(codec):
    rule = built("ace", clients=1)
    state = large_state(rule)
    large_take(rule, state, matrix(1), "a", codec)
    record = state.kept.get("client:a")
    assert head_of(record)["codec"]["name"] == SHORTENED.name
    assert len(record) <= LARGE.layout.num_params + SPARE_BYTES
    remembered = inflated(read_record(record, LARGE.layout))
    np.testing.assert_array_equal(state.arrays["latest_sum"], remembered)
    assert np.abs(remembered - matrix(1)).max() <= np.abs(matrix(1)).max() / 127 * 0.51 + 0.005


def test_an_update_of_int8_is_never_written_anew_however_large_the_model():
    layout = Layout.of([("w", (10_000, 10_000), "float32")])
    assert parse("int8 | zstd").payload_bytes_max(layout) <= SHORT.payload_bytes_max(layout) + SPARE_BYTES
    assert SHORT.payload_bytes_max(layout) < 1.02 * layout.num_params


@pytest.mark.parametrize("rule", REMEMBERING)
def test_a_thousand_long_updates_leave_no_drift(rule):
    """What is subtracted is what was added: after clients have gone to zero again, nothing is left but rounding."""
    one = built(rule, clients=2, buffer_size=1)
    state = large_state(one)
    for step in range(300):
        large_take(one, state, matrix(step, 100), "ab"[step % 2])
    for client in "abab" if rule == "ringleader" else "ab":
        large_take(one, state, matrix(0, 0), client)
    for name in {"ringleader_0", "ringleader_1", "latest_sum", "ca2fl_cached"} & state.arrays.keys():
        assert np.abs(state.arrays[name]).max() < 100 * 4 * 300 * 2**-24 * 4


@pytest.mark.parametrize("rule", REMEMBERING)
def test_float32_updates_stay_within_int8s_error_of_the_formula(rule):
    """Each delta, and each mean of a version, is off by half a step at most; ca2fl takes three of them into account."""
    common = {"rule": rule, "clients": 3} | ({"buffer_size": 1} if rule == "ca2fl" else {})
    system, oracle = System(LARGE, **common), oracle_of(LARGE.weights, **common)
    for step, client in enumerate("abcacbcababc"):
        delta = matrix(step)
        update = system.publish(delta, update_id=f"{client}/i/{step}", layout=LARGE.layout.hash)
        system.drain()
        oracle.receive(update)
    assert system.store.head().version == len(oracle.versions) - 1 >= 3
    error = np.abs(system.weights - oracle.versions[-1]).max()
    half_step = max(np.abs(matrix(step)).max() for step in range(12)) / 127 / 2
    assert 0 < error < 3 * half_step * len(oracle.versions)


def test_a_further_client_takes_the_place_of_the_one_longest_unheard(caplog):
    rule = built("ace", clients=2)
    state = state_of(rule)
    with caplog.at_level(logging.WARNING):
        for client, value in (("a", 1), ("b", 2), ("a", 3), ("c", 4)):  # b is the one longest unheard
            take(rule, state, of(value), client)
        np.testing.assert_allclose(state.arrays["latest_sum"], 3 + 4)
        assert state.kept.names == {"client:a", "client:c"}
        take(rule, state, of(5), "b")
    np.testing.assert_allclose(state.arrays["latest_sum"], 4 + 5)
    [record] = caplog.records
    assert "more workers than FEDMQ_CLIENTS=2: c takes the place of b" in record.message


@pytest.mark.parametrize("rule", ["ca2fl", "ace", "aced", "ringleader"])
def test_fewer_clients_than_before_are_made_room_for(rule):
    """FEDMQ_CLIENTS was lowered: with the next update those longest unheard leave, and so does their mass."""
    many, few = built(rule, clients=4, buffer_size=1), built(rule, clients=2, buffer_size=1)
    state = state_of(many)
    for client, value in zip("abc", (1, 2, 4), strict=True):
        take(many, state, of(value), client)
    take(few, state, of(8), "c")
    left = {name.partition(":")[2] for name in state.kept.names}
    assert left <= {"b", "c"}
    for name, array in state.arrays.items():
        if name in ("latest_sum", "ca2fl_cached"):
            np.testing.assert_allclose(array, 2 + 8, err_msg=name)


def test_a_record_the_store_lost_counts_as_zero_and_is_told(caplog):
    rule = built("ace")
    state = state_of(rule)
    take(rule, state, of(1))
    state.kept.committed()
    with caplog.at_level(logging.ERROR):
        take(rule, state, of(2))
    assert "record client:a is not stored" in caplog.text
    np.testing.assert_allclose(state.arrays["latest_sum"], 1 + 2)


def test_aced_drops_what_expires_and_steps_on_with_the_rest():
    rule = built("aced(2)", clients=4)
    state = state_of(rule)
    take(rule, state, of(8), "a")  # base 0; the step is 8
    take(rule, state, of(2), "b")  # of a and b: 5
    take(rule, state, of(2), "b")  # a is 2 old: 5
    np.testing.assert_allclose(state.weights, 18)
    take(rule, state, of(2), "b")  # a is 3 old, gone: 2
    np.testing.assert_allclose(state.weights, 20)
    assert state.kept.names == {"client:b"}


def test_aced_takes_nothing_of_a_client_whose_latest_is_too_old():
    rule = built("aced(2)", clients=4)
    state = state_of(rule)
    for _ in range(4):
        take(rule, state, of(1), "b")
    take(rule, state, of(1), "a", base_version=3)
    before = state.weights.copy()
    assert take(rule, state, of(100), "a", base_version=0) == 0.0  # older than the one it sent before
    np.testing.assert_allclose(state.weights - before, 1)  # of b alone
    assert state.kept.names == {"client:b"}


def test_aced_of_nobody_makes_a_version_without_a_step():
    rule = built("aced(1)", clients=4, server_optimizer="momentum(0.5)")
    state = state_of(rule)
    take(rule, state, of(1e8), "a")
    take(rule, state, of(0.1), "b")  # lost in the sum of both: taking them off again would leave -0.1
    state.version = 10
    before = state.weights.copy()
    take(rule, state, of(1), "c", base_version=0)
    np.testing.assert_array_equal(state.weights, before)
    assert state.version == 11
    assert not state.arrays["latest_sum"].any()


def test_aceds_default_lasts_two_turns_of_all_workers():
    assert built("aced", clients=7).staleness == 14
    assert built("aced(3)", clients=7).staleness == 3


# --- Ringleader -----------------------------------------------------------------------------------------------


def test_ringleaders_round_is_one_version_for_each_worker():
    rule = built("ringleader", clients=3, server_lr=1.0)
    state = state_of(rule)
    moves = []
    for client, value in (
        ("a", 3), ("a", 9), ("b", 3), ("c", 9),  # phase 1: a's mean is 6; then (6 + 3 + 9) / 3 = 6, c's version
        ("c", 30),                               # an extra of c, for the next round
        ("a", 0),                                # a's mean is 4: (4 + 3 + 9) / 3
        ("a", 60),                               # an extra of a
        ("b", 9),                                # b's mean is 6: (4 + 6 + 9) / 3; the round ends
        ("b", 3),                                # completes the next table: (60 + 3 + 30) / 3 = 31
    ):  # fmt: skip
        before = state.weights.copy()
        take(rule, state, of(value), client)
        moves.append(float((state.weights - before)[0]))
    assert moves == pytest.approx([0, 0, 0, 6, 0, 16 / 3, 0, 19 / 3, 31], rel=1e-3)
    assert state.version == 4


def test_a_ringleader_round_ends_although_a_worker_is_replaced():
    rule = built("ringleader", clients=2)
    state = state_of(rule)
    for client in "aba":
        take(rule, state, of(1), client)
    assert state.version == 2  # a and b have theirs: the round is over
    for client in "bb":
        take(rule, state, of(1), client)  # a is gone
    assert state.version == 2
    take(rule, state, of(5), "c")  # completes the table with b
    assert state.version == 3
    take(rule, state, of(1), "d")  # takes the place of b, which has not had its version
    assert state.version == 4
    assert state.facts["ringleader"]["here"] == {}


def test_a_ringleader_of_fewer_clients_forgets_the_others_in_both_tables():
    many, few = built("ringleader", clients=3), built("ringleader", clients=1)
    state = state_of(many)
    for client in "abcc":  # c has its version, and an entry in the next table
        take(many, state, of(1), client)
    before = state.weights.copy()
    take(few, state, of(3), "a")
    np.testing.assert_allclose(state.weights - before, 2)  # a's mean of 1 and 3, alone
    assert state.version == 2
    assert not state.kept.names
    assert not any(array.any() for array in state.arrays.values())


def test_a_ringleader_round_ends_when_all_who_were_to_come_had_to_leave():
    """FEDMQ_CLIENTS was lowered to those that have had their version: else all of theirs would be extras for ever."""
    many, few = built("ringleader", clients=3), built("ringleader", clients=1)
    state = state_of(many)
    for client in "abc":
        take(many, state, of(1), client)
    for version in (2, 3):
        before = state.weights.copy()
        take(few, state, of(5), "c")
        assert state.version == version
        np.testing.assert_allclose(state.weights - before, 5)


# --- what it costs --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", sorted(RULES))
@pytest.mark.parametrize("codec", ["int8 | zstd", "topk(0.01) | int8"])
def test_no_update_costs_a_temporary_of_model_size(rule, codec):
    """Rules that remember handle payloads, of a byte a parameter: a record, and what zstd unpacks of it."""
    one = built(rule, clients=2, buffer_size=2)
    state = large_state(one, ModelImage.of({"w": np.zeros((BLOCK_ELEMENTS // 8, 256), np.float32)}))
    delta = weights(0, state.weights.size)
    arrivals = {client: large_arrival(state.model, delta, client, codec) for client in "ab"}
    peaks = []
    for turn in range(8):
        tracemalloc.start()
        one.fold(state, arrivals["ab"[turn % 2]])
        one.advance(state)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    payload = len(arrivals["a"].update.payload)
    payloads = 3.5 if rule == "aced" else 2.5 if rule in REMEMBERING else 0  # one more to read where another expires
    assert min(peaks[4:]) < delta.nbytes / 8 + payloads * payload
    if rule != "ringleader":  # which writes a mean anew at times
        assert max(peaks[4:]) < delta.nbytes / 8 + payloads * payload
