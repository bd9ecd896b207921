"""What is received is kept, on disk before it is acked; what a crash or a bad disk leaves can still be read."""

import errno
import os

import numpy as np
import pytest

from aggregator import recorder
from aggregator.recorder import FRAME, MARK, SUFFIX, Recorder, read, read_again
from shared.errors import SettingsError, Unavailable
from shared.messages import encode
from shared.transport.inprocess import InProcessBroker
from shared.transport.ports import Outgoing
from tests.builders import JOB, System, update_of, weights


@pytest.fixture
def broker():
    return InProcessBroker()


@pytest.fixture
def record(broker, tmp_path):
    """Return a function that starts a recorder of a source of its own."""

    def start(bytes_max=2**24, segment_bytes=2**20):
        return Recorder(broker.source(JOB), tmp_path, JOB, bytes_max, segment_bytes)

    return start


def publish(broker, *bodies):
    for index, body in enumerate(bodies):
        broker.sink().publish(Outgoing(JOB, "a", f"a/i/{index}", body), 1.0)


def segments(tmp_path):
    return sorted((tmp_path / JOB).glob(f"*{SUFFIX}"))


def bodies(tmp_path):
    return [record.body for record in read(tmp_path, JOB)]


def test_every_delivery_is_kept_as_it_came(broker, record, tmp_path):
    source, sent = record(), [b"one", b"", MARK * 3, os.urandom(5000)]
    publish(broker, *sent)
    assert [delivery.body for delivery in source.receive(10, 0.0)] == sent
    found = list(read(tmp_path, JOB))
    assert [record.body for record in found] == sent
    assert [record.update_id for record in found] == [f"a/i/{i}" for i in range(4)]
    assert {(record.client, record.user_id, record.damage) for record in found} == {("a", None, "")}
    assert [read_again(tmp_path, JOB, record.place) for record in found] == sent


def test_nothing_is_acked_before_its_record_is_on_disk(broker, record, monkeypatch):
    events, source = [], record()
    sync, ack = os.fsync, source._inner.ack
    monkeypatch.setattr(recorder.os, "fsync", lambda handle: (events.append("sync"), sync(handle)))
    monkeypatch.setattr(source._inner, "ack", lambda deliveries: (events.append("ack"), ack(deliveries)))
    publish(broker, b"one", b"two")
    deliveries = source.receive(2, 0.0)
    events.clear()  # the folder's
    source.ack(deliveries)
    assert events == ["sync", "ack"]
    source.ack([])
    assert events == ["sync", "ack", "ack"], "nothing was written since"


def test_a_sync_that_fails_acks_nothing_and_has_everything_delivered_and_written_again(
    broker, record, monkeypatch, tmp_path
):
    source = record()
    publish(broker, b"one", b"two")
    deliveries = source.receive(2, 0.0)

    def broken(_handle):
        raise OSError(errno.EIO, "the disk")

    with monkeypatch.context() as patched:
        patched.setattr(recorder.os, "fsync", broken)
        source.ack(deliveries)
    again = source.receive(2, 0.0)
    assert [delivery.body for delivery in again] == [b"one", b"two"]
    assert len(segments(tmp_path)) == 2, "what a disk has failed to write once must not be trusted later"
    source.ack(again)
    assert source._inner._unacked == {}
    assert bodies(tmp_path) == [b"one", b"two"] * 2


def test_a_full_disk_holds_updates_back_and_loses_none(broker, record, monkeypatch, tmp_path):
    source = record()
    publish(broker, b"one", b"two", b"three")
    source.receive(1, 0.0)
    real, room = source._file.write, [9]

    class Full:
        def __getattr__(self, name):
            return getattr(real.__self__, name)

        def write(self, piece):
            if room[0] == 0:
                raise OSError(errno.ENOSPC, "No space left on device")
            taken = real(piece[: room[0]])
            room[0] = max(0, room[0] - taken)
            return taken

    whole, source._file = source._file, Full()
    for _ in range(3):
        with pytest.raises(Unavailable, match=r"FEDMQ_RECORD_DIR\): No space left"):
            source.receive(2, 0.0)
    source._file = whole
    assert [delivery.body for delivery in source.receive(5, 0.0)] == [b"two", b"three"]
    assert bodies(tmp_path) == [b"one", b"two", b"three"], "a torn record was left in the middle"


def test_segments_are_ended_at_their_size_and_the_oldest_go(broker, record, tmp_path):
    source = record(bytes_max=40_000, segment_bytes=2**20)  # a quarter of the limit: 10,000
    sent = [bytes([i]) * 3000 for i in range(40)]
    for body in sent:
        publish(broker, body)
        source.ack(source.receive(1, 0.0))
        sizes = [path.stat().st_size for path in segments(tmp_path)]
        assert sum(sizes) <= 40_000
        assert max(sizes) <= 10_000
    assert bodies(tmp_path) == sent[-len(bodies(tmp_path)) :]
    assert len(bodies(tmp_path)) >= 9


def test_a_record_larger_than_a_segment_has_one_to_itself(broker, record, tmp_path):
    source = record(bytes_max=8000)
    publish(broker, b"small", b"x" * 3000, b"small")
    source.ack(source.receive(3, 0.0))
    assert b"x" * 3000 in bodies(tmp_path)


def test_two_recorders_in_one_folder_write_files_of_their_own(broker, tmp_path):
    first, second = (Recorder(InProcessBroker().source(JOB), tmp_path, JOB, 2**24) for _ in range(2))
    for source, body in ((first, b"one"), (second, b"two"), (first, b"three")):
        source._inner._broker.sink().publish(Outgoing(JOB, "a", "a/i/0", body), 1.0)
        source.ack(source.receive(1, 0.0))
    assert sorted(bodies(tmp_path)) == [b"one", b"three", b"two"]
    assert len(segments(tmp_path)) == 2


def test_a_new_recorder_begins_a_new_segment_behind_the_others(broker, record, tmp_path):
    for body in (b"one", b"two", b"three"):
        source = record()
        publish(broker, body)
        source.ack(source.receive(1, 0.0))
        source.close()
    assert bodies(tmp_path) == [b"one", b"two", b"three"]


def test_a_recorder_that_receives_nothing_writes_nothing(record, tmp_path):
    source = record()
    assert source.receive(1, 0.0) == []
    source.close()
    assert segments(tmp_path) == []


@pytest.fixture
def three(broker, record, tmp_path):
    """Return a segment of three records, its bytes, and where each begins."""
    source = record()
    publish(broker, b"one" * 50, b"two" * 50, b"three" * 50)
    source.ack(source.receive(3, 0.0))
    source.close()
    (path,) = segments(tmp_path)
    data = path.read_bytes()
    starts = [i for i in range(len(data)) if data[i : i + 4] == MARK]
    return path, data, starts


def test_a_torn_tail_costs_the_torn_record_alone(three, tmp_path):
    path, data, starts = three
    for end in range(starts[2], len(data)):
        path.write_bytes(data[:end])
        found = list(read(tmp_path, JOB))
        assert [record.body[:3] for record in found if not record.damage] == [b"one", b"two"], end


def test_a_flipped_byte_anywhere_costs_one_record_and_is_seen(three, tmp_path):
    path, data, starts = three
    for place in range(starts[0], len(data)):
        spoiled = bytearray(data)
        spoiled[place] ^= 0x55
        path.write_bytes(spoiled)
        found = list(read(tmp_path, JOB))
        sound = [record.body[:3] for record in found if not record.damage]
        hit = sum(start <= place for start in starts) - 1
        assert sound == [name for i, name in enumerate([b"one", b"two", b"thr"]) if i != hit], place
        in_body = place >= starts[hit] + FRAME.size + 20
        if in_body:
            assert [record.update_id for record in found if record.damage] == [f"a/i/{hit}"], place


def test_a_place_that_changed_since_is_refused(three, tmp_path):
    path, data, starts = three
    place = f"{path.name}@{starts[1]}"
    assert read_again(tmp_path, JOB, place) == b"two" * 50
    path.write_bytes(data[: starts[1] + 40] + b"?" + data[starts[1] + 41 :])
    with pytest.raises(SettingsError, match="has changed"):
        read_again(tmp_path, JOB, place)
    path.write_bytes(data[: starts[1] + 5])
    with pytest.raises(SettingsError, match="cannot be read"):
        read_again(tmp_path, JOB, place)


def test_no_records_are_an_error_that_names_the_folder(tmp_path):
    with pytest.raises(SettingsError, match=str(tmp_path)):
        list(read(tmp_path, JOB))


def test_a_folder_that_cannot_be_made_is_a_setting_to_change(tmp_path):
    (tmp_path / JOB).write_text("a file")
    with pytest.raises(SettingsError, match="FEDMQ_RECORD_DIR"):
        Recorder(InProcessBroker().source(JOB), tmp_path, JOB, 2**24)


def test_an_aggregator_behind_it_counts_as_without(tmp_path):
    """Also when a sync fails after a commit: what comes again is a duplicate."""
    system = System(buffer_size=2, staleness="constant")
    system.source.close()
    system.start(lambda source: Recorder(source, tmp_path, JOB, 2**24))
    for seed in range(4):
        system.publish(weights(seed))
    system.step()
    system.source._sync = lambda: (_ for _ in ()).throw(OSError(errno.EIO, "the disk"))
    system.step()  # makes version 1, commits, and cannot ack
    del system.source._sync
    for _ in range(3):
        system.drain()
        system.clock.time_s += 60
    assert sorted(system.outcomes()) == [
        ("a/i/0", "applied"), ("a/i/0", "duplicate"), ("a/i/1", "applied"), ("a/i/1", "duplicate"),
        ("a/i/2", "applied"), ("a/i/3", "applied"),
    ]  # fmt: skip
    np.testing.assert_allclose(system.weights, sum(weights(i) for i in range(4)) / 2, atol=1e-6)
    assert system.source._inner._unacked == {}


def test_rejected_updates_are_kept_too(tmp_path):
    system = System()
    system.source.close()
    system.start(lambda source: Recorder(source, tmp_path, JOB, 2**24))
    system.send_bytes(b"nonsense")
    system.send_bytes(encode(update_of(weights(1))))
    system.drain()
    assert [len(record.body) > 8 for record in read(tmp_path, JOB)] == [False, True]
    assert len(system.broker.dead) == 1
