"""Hostile messages of every codec: into admission, and through the loop. `fedmq bench fuzz-messages` throws more."""

import logging
import random
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from ops.bench.fuzz import LAYOUT, TENSORS
from ops.bench.fuzz_messages import SLOW_S, fuzz, repeat_command, steady
from ops.bench.hostile_messages import COMMITTED_VERSION, JOB, KINDS, MESSAGE_BYTES_MAX, hostile, sound
from shared.compression.registry import EXAMPLES
from shared.errors import Reason
from shared.messages import decode, split
from shared.model_image import ModelImage
from shared.transport.ports import Outgoing
from tests.builders import System

INPUTS = 20_000
NOT_OF_ADMISSION = {Reason.RULE, Reason.SURPLUS, Reason.SUSPICIOUS, Reason.INCOMPLETE}  # of rules, guards, assembly


def test_hostile_messages_are_refused_with_a_reason_or_fold_finitely():
    tally = fuzz(seed=0, first=0, inputs=INPUTS)
    assert tally.inputs == INPUTS == tally.admitted + tally.reasons.total()
    assert tally.admitted > INPUTS / 10  # the deep places are reached, or nothing was fuzzed
    assert set(tally.reasons) == set(Reason) - NOT_OF_ADMISSION
    assert set(tally.kinds) == set(KINDS)
    assert set(tally.codecs) == set(EXAMPLES)
    assert all(admitted < count for count, admitted in tally.kinds.values())
    assert tally.slowest[0][0] < SLOW_S, repeat_command(0, tally.slowest[0][1])
    assert steady(tally.resident), tally.resident


def test_a_message_is_a_function_of_seed_and_number():
    assert [hostile(3, number) for number in range(100)] == [hostile(3, number) for number in range(100)]
    assert hostile(3, 7) != hostile(4, 7)


# --- what the fuzzer must find --------------------------------------------------------------------------------------


def test_it_finds_a_refusal_that_prints_what_it_refuses_however_deep(monkeypatch):
    monkeypatch.setattr("shared.messages._counting", lambda _: None)
    monkeypatch.setattr("shared.messages._shown", lambda value: str(value)[:40])
    with pytest.raises(AssertionError, match=r"RecursionError.*fedmq bench fuzz-messages --seed 0 --first"):
        fuzz(seed=0, first=0, inputs=INPUTS)


def test_it_finds_a_reader_that_spends_memory_before_it_looks(monkeypatch):
    monkeypatch.setattr("shared.messages._counting", lambda _: None)
    monkeypatch.setattr("ops.bench.fuzz_messages.MEASURED", 1.0)
    with pytest.raises(AssertionError, match="bytes; fedmq bench fuzz-messages"):
        fuzz(seed=0, first=0, inputs=6000)


@pytest.mark.parametrize(
    ("name", "broken"),
    [
        ("shared.compression.quantizer.SCALE_MAX", np.inf),
        ("shared.compression.floats._finite", lambda _: True),
        ("shared.messages._scalars", lambda record, name: record.get(name)),
        ("shared.messages._numbers", lambda record, name: record.get(name) or {}),
        ("aggregator.admission.codec_of", lambda name: __import__("shared.compression").compression.parse(name)),
    ],
)
def test_it_finds_a_check_that_is_missing(monkeypatch, name, broken):
    monkeypatch.setattr(name, broken)
    with np.errstate(all="ignore"), pytest.raises(AssertionError, match="fedmq bench fuzz-messages --seed 0 --first"):
        fuzz(seed=0, first=0, inputs=INPUTS)


@pytest.mark.parametrize(
    ("resident", "as_it_was"), [([1e8] * 4, True), ([1e8, 1e8, 1e8, 1.08e8], True), ([1e8, 1e8, 1.1e8, 1.1e8], False)]
)
def test_growth_is_told_from_noise(resident, as_it_was):
    assert steady(resident) is as_it_was


# --- through the loop -------------------------------------------------------------------------------------------------

LOOPS = {
    "fedbuff": {"rule": "fedbuff"},
    "by samples": {"rule": "fedbuff", "weight_by_samples": True},
    "adam": {"rule": "fedbuff", "server_optimizer": "adam"},
    "momentum": {"rule": "fedbuff", "server_optimizer": "momentum"},
    "guards": {"rule": "fedbuff", "robust": "norm_median(3) | one_slot"},
    "median": {"rule": "fedbuff", "robust": "median"},
    "downlink": {"rule": "fedbuff", "downlink": "on"},
    "bfloat16": {"rule": "fedbuff", "snapshots": "bfloat16"},
    "fedasync": {"rule": "fedasync"},
    "fednova": {"rule": "fednova"},
    "rescaled": {"rule": "rescaled"},
    "ca2fl": {"rule": "ca2fl", "clients": 5},
}


@pytest.fixture(autouse=True)
def quiet(caplog):
    """A warning for each of ten thousand refusals is too much to read."""
    caplog.set_level(logging.ERROR)


def system_of(**settings):
    """Return a system at the version that the hostile messages take for the newest."""
    model = ModelImage.of({name: np.zeros(shape, np.float32) for name, shape, _ in TENSORS})
    assert model.layout == LAYOUT
    buffer = {} if settings["rule"] == "fedasync" else {"buffer_size": 5}
    system = System(model, job=JOB, message_bytes_max=MESSAGE_BYTES_MAX, versions_kept=10, **buffer, **settings)
    for number in range(100):
        if system.store.head().version == COMMITTED_VERSION:
            return system
        publish_sound(system, f"w{number % 5}/i/{number}")
        system.drain()
    raise AssertionError("it does not move")


def publish_sound(system, update_id):
    update = decode(sound("int8"), MESSAGE_BYTES_MAX)
    base_version = system.store.head().version
    system.send(replace(update, client=update_id.split("/")[0], update_id=update_id, base_version=base_version))


def send(system, message):
    """Publish a hostile message, with what stands beside it."""
    d = message.delivery
    outgoing = Outgoing(JOB, d.client, d.update_id, d.body, is_part=d.is_part, crc32=d.crc32)
    system.broker.sink().publish(outgoing, 1.0)


@pytest.mark.parametrize("name", LOOPS)
def test_each_hostile_message_has_one_outcome_and_the_model_stays_finite(name):
    system, inputs = system_of(**LOOPS[name]), 1500
    with np.errstate(over="raise", invalid="raise", divide="raise"):
        for number in range(inputs):
            send(system, hostile(2, number))
        system.drain()
        system.aggregator.finish()
    entries = [entry for commit in system.store.ledger for entry in commit["updates"]]
    outcomes = Counter(entry["outcome"] for entry in entries)
    assert set(outcomes) <= {"applied", "stale", "duplicate", "rejected"}
    assert outcomes["rejected"] > inputs / 3
    assert system.unacked == 0
    assert system.broker.depth(JOB) == 0
    assert np.isfinite(system.weights).all()
    assert all(np.isfinite(array).all() for array in system.aggregator.state.arrays.values())
    publish_sound(system, "good/i/0")
    system.drain()
    system.aggregator.finish()
    assert ("good/i/0", "applied") in system.outcomes(), "the loop is alive and takes good updates"


def parts_of(rng, body):
    """Return the messages an update travels as, whole or not: shuffled, one missing, some twice, one damaged."""
    parts = list(split(body, rng.choice((64, 100, 1000, 5000))))
    if len(parts) == 1:
        return "as they are", parts
    kind = rng.choice(("as they are", "shuffled", "one missing", "some twice", "one damaged"))
    if kind == "shuffled":
        rng.shuffle(parts)
    elif kind == "one missing":
        del parts[rng.randrange(len(parts))]
    elif kind == "some twice":
        parts += rng.choices(parts, k=3)
    elif kind == "one damaged":
        at = rng.randrange(len(parts))
        spoiled = bytearray(parts[at])
        spoiled[rng.randrange(len(spoiled))] ^= 1 << rng.randrange(8)
        parts[at] = bytes(spoiled)
    return kind, parts


def test_updates_in_parts_end_whole_or_refused_and_leave_nothing_behind():
    system, rng = system_of(rule="fedbuff", parts_age_max_s=60.0), random.Random(5)
    due, kinds, sent = Counter(), {}, 0
    for number in range(300):
        update_id = f"a/i/{number}"
        kind, parts = parts_of(rng, sound(rng.choice(EXAMPLES), number))
        kinds[update_id] = kind
        due[kind] += 1
        for part in parts:
            system.send_bytes(part, "a", update_id)
        sent += len(parts)
        system.drain()
    system.clock.time_s += 120.0  # the last one may wait for a part that never comes
    system.drain()
    system.aggregator.finish()
    applied = Counter(kinds.get(update_id) for update_id, outcome in system.outcomes() if outcome == "applied")
    assert {kind: applied[kind] for kind in ("as they are", "shuffled", "some twice")} == {
        kind: due[kind] for kind in ("as they are", "shuffled", "some twice")
    }
    assert not applied["one missing"]
    final = Counter(update_id for update_id, outcome in system.outcomes() if outcome in ("applied", "rejected"))
    assert {name: final[name] for name, kind in kinds.items() if kind != "one damaged" and final[name] != 1} == {}
    assert system.unacked == 0
    assert np.isfinite(system.weights).all()
    state = system.aggregator.state
    assert not state.partial
    assert not [name for name in state.kept.names if name.startswith("part:")]
    assert sent > 1000
