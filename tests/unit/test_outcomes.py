"""A worker can read what became of each of its updates, and of nobody else's."""

import numpy as np

from tests.builders import System, packed, record_of, update_of


def delta(value=1.0):
    return np.full(7, value, np.float32)


def settle(system):
    """Settle what is queued, and commit it."""
    system.drain()
    system.clock.time_s += 60
    system.drain()


def told(system, client="a"):
    return system.store.outcomes(client, 0)[0]


def test_every_outcome_reaches_its_client():
    system = System(buffer_size=1, staleness_max=1)
    first = system.publish(delta())
    system.drain()
    system.send(first)
    for _ in range(2):
        system.publish(delta(), update_id=f"b/i/{system.sequence}")
    system.drain()
    system.publish(delta(), base_version=0)
    spoiled = record_of(update_of(delta(), update_id="a/i/9")) | {"checksum": 1}
    system.send_bytes(packed(spoiled), "a", "a/i/9")
    settle(system)
    assert told(system) == [
        (first.update_id, "applied"), (first.update_id, "duplicate"), ("a/i/3", "stale"), ("a/i/9", "rejected"),
    ]  # fmt: skip
    assert told(system, "b") == [("b/i/1", "applied"), ("b/i/2", "applied")]


def test_outcomes_come_with_the_commit_and_not_before():
    system = System(buffer_size=1, commit_interval_s=10.0)
    system.publish(delta())
    system.drain()
    assert told(system) == []
    system.clock.time_s += 11
    system.drain()
    assert told(system) == [("a/i/0", "applied")]


def test_what_is_folded_again_after_a_crash_is_told_once():
    system = System(buffer_size=1, commit_interval_s=10.0)
    system.publish(delta())
    system.drain()
    system.restart()
    system.clock.time_s += 11
    system.drain()
    assert told(system) == [("a/i/0", "applied")]


def test_a_client_is_not_told_of_messages_sent_in_its_name():
    system = System(buffer_size=1)
    body = packed(record_of(update_of(delta(), update_id="b/i/5")))
    system.send_bytes(body, "a", "a/i/5")  # b's message under a's key
    system.send_bytes(b"rubbish", "a", "b/i/6")  # an id of b under a's key
    system.send_bytes(b"rubbish", "a", "a/i/not-a-number")
    system.send_bytes(b"rubbish", "a", "")
    settle(system)
    assert system.outcomes()[0][1] == "rejected"
    assert len(system.outcomes()) == 4
    assert told(system) == []
    assert told(system, "b") == []
