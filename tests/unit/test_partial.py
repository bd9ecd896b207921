"""Updates in parts: applied whole or not at all, once, within bounds; whatever comes twice, late or never."""

import dataclasses

import numpy as np
import pytest

from aggregator.partial import PREFIX
from shared.compression.registry import EXAMPLES
from shared.config import AggregatorSettings
from shared.errors import PublishRefused, Reason, RejectedUpdate, StoreUnavailable
from shared.messages import PART_BYTES_MIN, Part, decode, encode, split
from shared.store.inprocess import InProcessStore
from shared.transport.ports import Outgoing
from tests.builders import JOB, System, packed, record_of, update_of, weights

N = 400  # parameters: 1600 bytes of float32, in parts of 500 bytes four


def system_of(**settings):
    return System(np.zeros(N, np.float32), **{"buffer_size": 1, "staleness": "constant"} | settings)


def parts_of(system, seed=0, client="a", number=0, part_bytes=500, **changes):
    update = update_of(weights(seed, N), update_id=f"{client}/i/{number}", **changes)
    return update, list(split(encode(update), part_bytes))


def send(system, update, bodies):
    for body in bodies:
        system.broker.sink().publish(Outgoing(update.job, update.client, update.update_id, body, True), 1.0)


def test_the_parts_of_an_update_carry_its_envelope_and_make_its_payload():
    update = update_of(weights(0, N))
    bodies = list(split(encode(update), 500))
    parts = [decode(body, 10**6) for body in bodies]
    assert [part.part for part in parts] == [Part(i, 4, 1600) for i in range(4)]
    assert b"".join(part.payload for part in parts) == update.payload
    for part in parts:
        assert dataclasses.replace(part, payload=b"", part=None) == dataclasses.replace(update, payload=b"")


def test_an_update_that_fits_is_one_message():
    body = encode(update_of(weights(0, N)))
    assert list(split(body, len(body))) == [body]
    assert list(split(body, 1600)) == [body]  # the envelope alone is no reason to cut


@pytest.mark.parametrize("name", [name for name in EXAMPLES if not name.startswith("all")])
def test_an_update_in_parts_changes_the_model_as_a_whole_one_does(name):
    whole, parted = system_of(codec=name), system_of(codec=name)
    update, bodies = parts_of(parted, codec=name, part_bytes=PART_BYTES_MIN)
    whole.send(update)
    send(parted, update, bodies)
    for system in (whole, parted):
        system.drain()
        system.aggregator.finish()
        assert system.outcomes() == [("a/i/0", "applied")]
        assert system.unacked == 0
    np.testing.assert_array_equal(parted.weights, whole.weights)
    assert np.any(parted.weights)


def test_parts_are_acked_once_durable_and_another_aggregator_goes_on():
    system = system_of(commit_age_max_s=0.001, commit_interval_s=0.0)
    update, bodies = parts_of(system)
    send(system, update, bodies[:3])
    system.drain()
    system.clock.time_s += 1
    system.drain()
    system.aggregator.finish()
    assert system.unacked == 0
    assert system.store.head().revision > 0
    system.restart()
    assert list(system.aggregator.state.partial) == ["a"]
    send(system, update, bodies[3:])
    system.drain()
    system.aggregator.finish()
    assert system.outcomes() == [("a/i/0", "applied")]
    np.testing.assert_array_equal(system.weights, weights(0, N))
    assert not system.aggregator.state.partial
    assert not [name for name in system.aggregator.state.kept.names if name.startswith(PREFIX)]
    assert not system.store._kept


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (3, 2, 1, 0), (0, 0, 1, 2, 1, 3), (2, 0, 3, 1)])
def test_parts_may_come_twice_and_in_any_order(order):
    system = system_of()
    update, bodies = parts_of(system)
    send(system, update, [bodies[index] for index in order])
    system.drain()
    system.aggregator.finish()
    np.testing.assert_array_equal(system.weights, weights(0, N))
    send(system, update, bodies)  # all once more, as after a lost confirm
    system.drain()
    system.aggregator.finish()
    assert {outcome for _, outcome in system.outcomes()[1:]} == {"duplicate"}
    np.testing.assert_array_equal(system.weights, weights(0, N))
    assert not system.aggregator.state.partial
    assert system.unacked == 0


def test_clients_parts_may_alternate():
    system = system_of(buffer_size=2)
    ours, theirs = parts_of(system, 1, "a"), parts_of(system, 2, "b")
    for mine, other in zip(ours[1], theirs[1], strict=True):
        send(system, ours[0], [mine])
        send(system, theirs[0], [other])
    system.drain()
    system.aggregator.finish()
    np.testing.assert_allclose(system.weights, (weights(1, N) + weights(2, N)) / 2, rtol=1e-6)


def test_an_update_that_is_cut_anew_begins_anew():
    system = system_of()
    update, bodies = parts_of(system)
    _, others = parts_of(system, part_bytes=700)
    send(system, update, [*bodies[:3], *others])
    system.drain()
    system.aggregator.finish()
    assert system.outcomes() == [("a/i/0", "applied")]
    np.testing.assert_array_equal(system.weights, weights(0, N))


def test_a_newer_update_of_the_client_gives_up_the_one_before_by_name():
    system = system_of()
    first, begun = parts_of(system, 1, number=0)
    second, bodies = parts_of(system, 2, number=1)
    send(system, first, begun[:2])
    send(system, second, bodies)
    send(system, first, begun)  # too late
    system.drain()
    system.aggregator.finish()
    outcomes = dict(reversed(system.outcomes()))  # the first of each
    assert outcomes == {"a/i/0": "rejected", "a/i/1": "applied"}
    entry = next(e for commit in system.store.ledger for e in commit["updates"] if e["outcome"] == "rejected")
    assert entry["reason"] == "incomplete"
    assert "2 of 4 parts are here" in entry["detail"]
    np.testing.assert_array_equal(system.weights, weights(2, N))
    told, _ = system.store.outcomes("a", 0)
    assert ("a/i/0", "rejected") in told


def test_an_abandoned_update_expires_and_its_parts_with_it():
    system = system_of(parts_age_max_s=100.0, commit_age_max_s=10.0, commit_interval_s=0.0)
    update, bodies = parts_of(system)
    send(system, update, bodies[:2])
    system.drain()
    system.clock.time_s += 99
    system.drain()
    assert system.aggregator.state.partial
    system.clock.time_s += 2
    system.drain()
    system.clock.time_s += 11
    system.drain()
    assert system.outcomes() == [("a/i/0", "rejected")]
    assert not system.aggregator.state.partial
    assert not system.store._kept
    send(system, update, bodies)
    system.drain()
    system.aggregator.finish()
    assert not np.any(system.weights)  # its client was told that it is rejected: that is final


def test_a_restart_and_a_backlog_make_nothing_look_abandoned():
    system = system_of(parts_age_max_s=100.0)
    update, bodies = parts_of(system)
    send(system, update, bodies[:2])
    system.drain()
    system.aggregator.finish()
    system.clock.time_s += 10_000  # nobody served the queue for hours
    system.restart()
    send(system, update, bodies[2:])
    system.drain()
    system.aggregator.finish()
    assert system.outcomes() == [("a/i/0", "applied")]


def test_there_is_room_for_so_many_bytes_and_who_has_begun_may_finish():
    system = system_of(parts_bytes_max=4000, buffer_size=1)
    updates = [parts_of(system, seed, client) for seed, client in enumerate("abc")]
    for update, bodies in updates:
        send(system, update, bodies[:2])
    for update, bodies in updates:
        send(system, update, bodies[2:])
    system.drain()
    system.aggregator.finish()
    first = dict(reversed(system.outcomes()))
    assert first == {"a/i/0": "applied", "b/i/0": "applied", "c/i/0": "rejected"}
    detail = next(e["detail"] for c in system.store.ledger for e in c["updates"] if e["outcome"] == "rejected")
    assert "no room for an update of 1600 bytes" in detail
    assert "parts_bytes_max is 4000" in detail
    assert system.broker.dead[0].reason == "incomplete"


def test_a_stale_update_is_refused_at_its_first_part_and_nothing_is_kept():
    system = system_of(staleness_max=0)
    update, bodies = parts_of(system)
    send(system, update, bodies[:2])
    system.drain()
    system.publish(weights(9, N), update_id="b/i/0")
    system.drain()
    send(system, update, bodies[2:])
    system.drain()
    system.aggregator.finish()
    assert dict(reversed(system.outcomes())) == {"b/i/0": "applied", "a/i/0": "stale"}
    assert not system.aggregator.state.partial
    assert not system.store._kept


@pytest.mark.parametrize(
    ("changes", "reason", "words"),
    [
        ({"part": 4}, Reason.MALFORMED, "part must be a whole number from 0 to 3"),
        ({"parts": 1}, Reason.MALFORMED, "parts must be"),
        ({"parts": 2**40}, Reason.MALFORMED, "parts must be"),
        ({"payload_bytes": 0}, Reason.MALFORMED, "payload_bytes must be"),
        ({"payload_bytes": 300}, Reason.MALFORMED, "500 of 300 bytes"),
        ({"payload_bytes": 10**9}, Reason.TOO_LARGE, "1000000000 bytes; float32 needs at most"),
        ({"payload_bytes": True}, Reason.MALFORMED, "payload_bytes must be"),
        ({"part": None}, Reason.MALFORMED, "part must be"),
        ({"checksum": 1}, Reason.CHECKSUM, "the message says 1"),
        ({"base_version": 7}, Reason.BASE_VERSION, "never published"),
    ],
)
def test_a_part_that_lies_is_rejected_by_name(changes, reason, words):
    system = system_of()
    update, bodies = parts_of(system)
    record = record_of(decode(bodies[0], 10**6)) | {"part": 0, "parts": 4, "payload_bytes": 1600} | changes
    system.send_bytes(packed(record), "a", update.update_id)
    system.drain()
    system.aggregator.finish()
    assert system.broker.dead[0].reason == reason
    assert words in system.broker.dead[0].detail
    assert system.unacked == 0
    assert not system.aggregator.state.partial


def test_parts_that_make_another_size_than_announced_are_rejected():
    system = system_of()
    update, bodies = parts_of(system)
    short = [decode(body, 10**6) for body in bodies]
    short[3] = dataclasses.replace(short[3], payload=short[3].payload[:-4])
    send(system, update, [encode(part) for part in short])
    system.drain()
    assert "4 of 4 parts have 1596 bytes, they announce 1600" in system.broker.dead[0].detail
    assert not system.aggregator.state.partial


def test_the_limit_of_a_whole_update_is_told_at_its_first_part():
    system = system_of(update_bytes_max=1024)
    update, bodies = parts_of(system)
    send(system, update, bodies[:1])
    system.drain()
    assert system.broker.dead[0].reason == "too_large"
    assert "update_bytes_max is 1024" in system.broker.dead[0].detail


def test_a_store_that_fails_while_the_whole_is_read_costs_no_part():
    """FedAsync reads a base version from the store when the last part is here; the first answer is an error."""
    store = AwayOnce()
    system = System(np.zeros(N, np.float32), store=store, rule="fedasync", staleness="constant")
    update, bodies = parts_of(system)
    send(system, update, bodies[:3])
    system.drain()
    system.aggregator.finish()
    store.away = True
    send(system, update, bodies[3:])
    system.drain()
    system.step()
    system.drain()
    system.aggregator.finish()
    assert not store.away, "it did strike"
    assert system.outcomes() == [("a/i/0", "applied")]
    np.testing.assert_allclose(system.weights, 0.6 * weights(0, N), rtol=1e-5)


class AwayOnce(InProcessStore):
    """A store that does not answer one read of a record, or of a model."""

    away = False

    def model(self, version):
        self._strike()
        return super().model(version)

    def kept(self, name):
        self._strike()
        return super().kept(name)

    def _strike(self):
        if self.away:
            self.away = False
            raise StoreUnavailable("away")


def test_the_parts_a_state_keeps_survive_another_rule():
    system = System(np.zeros(N, np.float32), buffer_size=2, rule="ca2fl", clients=3)
    system.publish(weights(8, N), update_id="b/i/0")
    update, bodies = parts_of(system)
    send(system, update, bodies[:2])
    system.drain()
    system.aggregator.finish()
    system.publish(weights(9, N), update_id="c/i/0")  # closes the buffer, as another rule needs
    system.drain()
    system.aggregator.finish()
    assert len(system.store._kept) > 2, "what the rule keeps of its clients, beside the parts"
    system.source.close()
    system.settings = AggregatorSettings(job=JOB, codec="float32", buffer_size=1)
    system.start()
    assert len(system.aggregator.state.kept.names) == 2
    send(system, update, bodies[2:])
    system.drain()
    system.aggregator.finish()
    assert system.outcomes()[-1] == ("a/i/0", "applied")
    assert not system.store._kept


def test_a_commit_that_only_holds_parts_writes_no_vector_of_model_size():
    system = system_of(buffer_size=5)
    system.publish(weights(3, N), update_id="b/i/0")
    system.drain()
    system.aggregator.finish()
    written = []
    commit = system.store.commit
    system.store.commit = lambda one: (written.append((dict(one.arrays), list(one.arrays_unchanged))), commit(one))
    update, bodies = parts_of(system)
    send(system, update, bodies[:3])
    system.drain()
    system.aggregator.finish()
    assert [list(arrays) for arrays, _ in written] == [[]]
    assert written[0][1], "the open buffer's sum stays as it is stored"
    system.restart()
    np.testing.assert_array_equal(system.aggregator.state.arrays[written[0][1][0]], weights(3, N))


def test_a_rejected_message_bounds_what_a_flooder_can_hold():
    with pytest.raises(RejectedUpdate, match="part"):
        decode(packed(record_of(update_of(weights(0, N))) | {"part": 0, "parts": 2**17, "payload_bytes": 2**30}), 10**6)
    with pytest.raises(PublishRefused):
        System().broker.sink().publish(Outgoing("nobody", "a", "a/i/0", b"", True), 1.0)
