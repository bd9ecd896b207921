"""Admission: each reason has a message that earns it, and a broken message costs the others nothing."""

import itertools
import zlib
from dataclasses import replace

import numpy as np
import pytest

from aggregator.admission import Admission, admit, delta_of
from shared.compression.registry import EXAMPLES
from shared.errors import Reason, RejectedUpdate
from shared.messages import ENVELOPE_BYTES_MAX, encode
from tests.builders import JOB, System, delivery_of, model_of, packed, record_of, update_of, weights

LIMIT = 10**6
GOOD = update_of(weights(1), base_version=2)
NUMBERS = itertools.count()


def spoiled(**changes):
    """Return a valid message with some fields replaced; a new payload gets its checksum."""
    record = record_of(GOOD) | {"update_id": f"a/broken/{next(NUMBERS)}"} | changes
    if "payload" in changes and "checksum" not in changes:
        record["checksum"] = zlib.crc32(changes["payload"])
    return packed(record)


BROKEN = {
    Reason.TOO_LARGE: (bytes(LIMIT + 1), "1000001 bytes"),
    Reason.MALFORMED: (b"\xc1 not msgpack", "not a msgpack map"),
    Reason.FORMAT: (spoiled(format=2), "format 2"),
    Reason.JOB: (spoiled(job="other"), "'other'"),
    Reason.CLIENT: (spoiled(client="b", update_id="b/i/0"), "under the key of 'a'"),
    Reason.LAYOUT: (spoiled(layout="0" * 64), "layout '000000000000'"),
    Reason.BASE_VERSION: (spoiled(base_version=99), "base_version 99 was never published; newest is"),
    Reason.NUM_SAMPLES: (spoiled(num_samples=0), "num_samples must be a whole number from 1"),
    Reason.CHECKSUM: (spoiled(checksum=1), "the message says 1"),
    Reason.CODEC: (spoiled(codec={"name": "morse"}), "unknown codec 'morse'"),
    Reason.NOT_FINITE: (spoiled(payload=np.full(7, np.nan, "<f4").tobytes()), "NaN"),
}

OF_OTHERS = {Reason.RULE, Reason.SURPLUS, Reason.SUSPICIOUS, Reason.INCOMPLETE}  # of rules, guards, and of parts


def admission():
    return Admission(JOB, model_of(weights(1)).layout, LIMIT, LIMIT)


def reason_of(body, committed_version=3, **delivery):
    with pytest.raises(RejectedUpdate) as caught:
        delta_of(admit(delivery_of(body, **delivery), admission(), committed_version), admission())
    return caught.value


def test_a_sound_update_is_admitted_with_its_delta():
    update = admit(delivery_of(encode(GOOD)), admission(), 3)
    delta = delta_of(update, admission())
    total = np.zeros(7, np.float32)
    delta.add_into(total, 1.0)
    assert update == GOOD
    np.testing.assert_array_equal(total, weights(1))


def test_every_reason_is_reachable():
    assert set(BROKEN) == set(Reason) - OF_OTHERS


@pytest.mark.parametrize("reason", BROKEN)
def test_a_broken_message_is_rejected_with_its_reason_and_the_numbers(reason):
    body, part = BROKEN[reason]
    error = reason_of(body)
    assert error.reason == reason
    assert part in error.detail


def test_the_newest_committed_version_is_the_last_that_can_be_a_base():
    admit(delivery_of(encode(update_of(weights(1), base_version=3))), admission(), 3)
    assert reason_of(encode(update_of(weights(1), base_version=3)), 2).reason == Reason.BASE_VERSION


def test_the_login_the_broker_vouches_for_must_be_the_client():
    body = encode(GOOD)
    assert admit(delivery_of(body, user_id="a"), admission(), 3)
    assert admit(delivery_of(body, user_id=None), admission(), 3)
    error = reason_of(body, user_id="mallory")
    assert error.reason == Reason.CLIENT
    assert "logged in as 'mallory'" in error.detail


def test_the_routing_key_must_be_the_clients():
    assert reason_of(encode(GOOD), client="b").reason == Reason.CLIENT


def test_a_message_larger_than_its_codec_can_need_is_rejected_before_it_is_decoded():
    assert 28 + ENVELOPE_BYTES_MAX + 1000 < LIMIT
    assert reason_of(spoiled(extra=bytes(ENVELOPE_BYTES_MAX + 1000))).reason == Reason.TOO_LARGE


@pytest.mark.parametrize("name", [name for name in EXAMPLES if not name.startswith("all")])
def test_every_codec_passes_admission(name):
    update = update_of(weights(1), codec=name, base_version=0)
    delta = delta_of(admit(delivery_of(encode(update)), admission(), 0), admission())
    total = np.zeros(7, np.float32)
    delta.add_into(total, 1.0)
    assert np.abs(total - weights(1)).max() < 0.5


# --- through the loop ---------------------------------------------------------------------------------------


def broken_system():
    """Return a system at version 3 with every broken message between two sound ones."""
    system = System(buffer_size=1, message_bytes_max=LIMIT)
    for seed in range(3):
        system.publish(weights(seed))
        system.drain()
    system.publish(weights(10))
    for body, _ in BROKEN.values():
        system.send_bytes(body)
    system.publish(weights(11))
    return system


def test_broken_messages_stop_neither_the_loop_nor_their_neighbours():
    system = broken_system()
    system.drain()
    assert system.store.head().version == 5
    expected = sum(weights(seed).astype(np.float64) for seed in (0, 1, 2)) + sum(
        weights(seed).astype(np.float64) * (1 + tau) ** -0.5 for seed, tau in ((10, 0), (11, 1))
    )
    np.testing.assert_allclose(system.weights, expected, rtol=1e-5)
    assert system.unacked == 0


def test_dead_letters_carry_the_bytes_the_reason_and_the_detail():
    system = broken_system()
    system.drain()
    assert [(letter.body, letter.client, letter.reason) for letter in system.broker.dead] == [
        (body, "a", reason.value) for reason, (body, _) in BROKEN.items()
    ]
    for letter, (_, part) in zip(system.broker.dead, BROKEN.values(), strict=True):
        assert part in letter.detail


def test_each_rejection_is_counted_under_its_reason_and_noted_in_the_ledger():
    system = broken_system()
    system.drain()
    for reason in BROKEN:
        assert system.metrics.rejected.labels(JOB, reason.value)._value.get() == 1
    assert system.metrics.updates.labels(JOB, "rejected")._value.get() == len(BROKEN)
    assert system.metrics.updates.labels(JOB, "applied")._value.get() == 5
    assert sum(outcome == "rejected" for _, outcome in system.outcomes()) == len(BROKEN)
    assert system.store.clients["a"]["outcome"] == "applied"  # the last word is the last message's


def test_a_rejected_message_changes_no_weight():
    system = System(buffer_size=1, message_bytes_max=LIMIT)
    for body, _ in BROKEN.values():
        system.send_bytes(body)
    system.drain()
    system.aggregator.finish()
    assert system.store.head().version == 0
    assert not system.weights.any()
    assert system.store.load().applied == {}


def test_a_message_whose_crc32_is_sent_along_is_proven_as_a_whole():
    """A flipped bit of the envelope would else change the id, the base version or the weight unseen."""
    body = encode(GOOD)
    sound = replace(delivery_of(body), crc32=zlib.crc32(body))
    assert admit(sound, admission(), 3) == GOOD
    for place in range(len(body)):
        broken = body[:place] + bytes([body[place] ^ 4]) + body[place + 1 :]
        with pytest.raises(RejectedUpdate) as caught:
            admit(replace(sound, body=broken), admission(), 3)
        assert caught.value.reason == Reason.CHECKSUM


def test_a_message_under_another_messages_id_is_rejected():
    delivery = replace(delivery_of(encode(GOOD)), update_id="a/i/77")
    with pytest.raises(RejectedUpdate, match="message_id 'a/i/77', but update_id 'a/i/0'"):
        admit(delivery, admission(), 3)
