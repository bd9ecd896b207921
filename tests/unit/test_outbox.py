"""The outbox: a finished update is on disk, under an id that is never used twice, until it is confirmed."""

import json
import os
import random
import stat
import threading

import pytest

from shared.errors import SettingsError
from worker.folder import Folder
from worker.outbox import Outbox


@pytest.fixture
def open_outbox(tmp_path):
    """Return a function that (re)opens the same outbox, as a restarted worker does."""
    opened = []

    def open_(**limits):
        for outbox in opened:
            outbox.close()
        limits = {"updates_max": 10, "bytes_max": 1000, "sync": False} | limits
        opened.append(Outbox(tmp_path / "job" / "a", "a", **limits))
        return opened[-1]

    return open_


def waiting(outbox):
    """Return (id, body) of everything that waits, emptying the outbox."""
    found = []
    while (oldest := outbox.oldest()) is not None:
        found.append((oldest.update_id, oldest.body()))
        outbox.remove(oldest)
    return found


@pytest.mark.parametrize("sync", [True, False])
def test_updates_survive_a_restart_in_order(open_outbox, sync):
    outbox = open_outbox(sync=sync)
    expected = []
    for body in (b"one", b"two", b"three"):
        expected.append((outbox.next_id(), body))
        outbox.put(body)
    again = open_outbox()
    assert len(again) == 3
    assert waiting(again) == expected
    assert len(again) == 0
    assert len(open_outbox()) == 0


def test_the_incarnation_stays_and_the_sequence_goes_on(open_outbox):
    outbox = open_outbox()
    assert outbox.next_id() == f"a/{outbox.incarnation}/0"
    outbox.put(b"x")
    outbox.remove(outbox.oldest())
    assert open_outbox().next_id() == f"a/{outbox.incarnation}/1"


def test_a_new_outbox_is_a_new_incarnation(tmp_path):
    ids = {Outbox(tmp_path / str(i), "a", 1, 1, sync=False).next_id() for i in range(20)}
    assert len(ids) == 20


def test_a_lost_state_file_makes_a_new_incarnation_and_keeps_the_updates(open_outbox, tmp_path):
    outbox = open_outbox()
    outbox.put(b"kept")
    (tmp_path / "job" / "a" / "outbox.json").unlink()
    again = open_outbox()
    assert again.incarnation != outbox.incarnation
    assert again.oldest().body() == b"kept"
    assert again.next_sequence == 1


def test_no_id_is_ever_given_twice_whatever_the_order_of_things(open_outbox):
    rng, outbox, given = random.Random(4), open_outbox(), []
    for _ in range(200):
        action = rng.choice(["put", "put", "remove", "restart"])
        if action == "put":
            given.append(outbox.next_id())
            outbox.put(b"x")
        elif action == "remove" and outbox.oldest():
            outbox.remove(outbox.oldest())
        elif action == "restart":
            outbox = open_outbox()
    assert len(given) == len(set(given)) > 50


def test_a_crash_between_number_and_file_skips_the_number(open_outbox, monkeypatch):
    outbox = open_outbox()
    outbox.put(b"one")
    original = Folder.write
    written = []

    def crash_at_second(self, name, *parts):
        written.append(name)
        if len(written) == 2:
            raise OSError("power cut")
        original(self, name, *parts)

    with monkeypatch.context() as patch:
        patch.setattr(Folder, "write", crash_at_second)
        with pytest.raises(OSError, match="power cut"):
            outbox.put(b"two")
    again = open_outbox()
    assert again.next_sequence == 2
    assert waiting(again) == [(f"a/{outbox.incarnation}/0", b"one")]


def test_a_half_written_file_is_swept_away(open_outbox, tmp_path):
    outbox = open_outbox()
    outbox.put(b"whole")
    (tmp_path / "job" / "a" / "000000000001.new").write_bytes(b"ha")
    (tmp_path / "job" / "a" / "outbox.new").write_bytes(b"{")
    again = open_outbox()
    assert list((tmp_path / "job" / "a").glob("*.new")) == []
    assert waiting(again) == [(f"a/{outbox.incarnation}/0", b"whole")]


def test_a_second_worker_is_kept_out_and_told_what_to_do(open_outbox, tmp_path):
    open_outbox()
    with pytest.raises(SettingsError, match=r"in use by another worker.*--client-id"):
        Outbox(tmp_path / "job" / "a", "a", 10, 1000)


def test_closing_lets_the_next_one_in(open_outbox):
    open_outbox().close()
    open_outbox()


@pytest.mark.parametrize("content", ["", "{", "null2", '{"next_sequence": "x"}'])
def test_a_damaged_state_file_is_named(open_outbox, tmp_path, content):
    open_outbox().close()
    (tmp_path / "job" / "a" / "outbox.json").write_text(content)
    with pytest.raises(SettingsError, match="outbox"):
        open_outbox()


def test_an_unusable_folder_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SettingsError, match="cannot be used"):
        Outbox(tmp_path / "file" / "a", "a", 10, 1000)


def test_full_by_number_and_by_bytes(open_outbox):
    outbox = open_outbox(updates_max=2, bytes_max=1000)
    outbox.put(b"x")
    assert not outbox.is_full()
    outbox.put(b"x")
    assert outbox.is_full()
    outbox.remove(outbox.oldest())
    assert not outbox.is_full()
    outbox.put(bytes(999))
    outbox = open_outbox(updates_max=10, bytes_max=1000)
    assert outbox.is_full()  # 1 + 999 bytes, known again after a restart
    assert not open_outbox(updates_max=10, bytes_max=1001).is_full()


def test_removing_twice_is_harmless(open_outbox):
    outbox = open_outbox()
    outbox.put(b"x")
    first = outbox.oldest()
    outbox.remove(first)
    outbox.remove(first)
    assert len(outbox) == 0


def test_the_state_file_is_plain_json(open_outbox, tmp_path):
    outbox = open_outbox()
    outbox.put(b"x")
    state = json.loads((tmp_path / "job" / "a" / "outbox.json").read_text())
    assert state == {"incarnation": outbox.incarnation, "next_sequence": 1}


# --- updates that carry a residual ----------------------------------------------------------------------------


def names(outbox, end):
    return sorted(int(path.name.split(".")[0]) for path in outbox.folder.path.glob(f"*{end}"))


def make(outbox, *bodies):
    """Put updates that carry a residual."""
    for body in bodies:
        outbox.release(outbox.stage(body))


def confirm_all(outbox):
    while (oldest := outbox.oldest()) is not None:
        outbox.confirm(oldest)


def test_a_staged_update_is_not_published_before_its_release(open_outbox):
    outbox = open_outbox()
    expected = outbox.next_id()
    sequence = outbox.stage(b"staged")
    outbox.put(b"later")
    assert outbox.oldest().body() == b"later"
    assert len(outbox) == 1
    outbox.release(sequence)
    assert (outbox.oldest().update_id, outbox.oldest().body()) == (expected, b"staged")
    assert len(outbox) == 2


def test_a_confirmed_update_is_kept_only_when_it_carries_a_residual(open_outbox):
    outbox = open_outbox()
    outbox.put(b"plain")
    make(outbox, b"carries")
    assert outbox.unsettled() == {f"a/{outbox.incarnation}/1": 1}
    assert outbox.sent() == []
    confirm_all(outbox)
    for box in (outbox, open_outbox()):  # which one is which is known again after a restart
        assert (len(box), box.sent(), box.sent_body(1)) == (0, [1], b"carries")
        assert box.unsettled() == {f"a/{outbox.incarnation}/1": 1}
    assert names(outbox, ".update") == []


def test_a_restart_before_the_confirm_keeps_apart_what_carries_a_residual(open_outbox):
    outbox = open_outbox()
    outbox.put(b"plain")
    make(outbox, b"carries")
    outbox = open_outbox()
    confirm_all(outbox)
    assert outbox.sent() == [1]


def test_sent_updates_do_not_fill_the_outbox(open_outbox):
    outbox = open_outbox(updates_max=2)
    make(outbox, b"x", b"x")
    assert outbox.is_full()
    confirm_all(outbox)
    assert not outbox.is_full()


def test_surplus_are_the_oldest_beyond_the_limits(open_outbox):
    outbox = open_outbox(updates_max=3)
    make(outbox, *[b"x"] * 5)
    assert outbox.surplus(()) == []
    confirm_all(outbox)
    assert outbox.surplus(()) == [0, 1]
    assert outbox.surplus([0]) == [1]
    assert outbox.surplus([3, 4]) == []
    assert open_outbox(bytes_max=2).surplus(()) == [0, 1, 2]
    assert open_outbox(bytes_max=0).surplus(()) == [0, 1, 2, 3, 4]


def test_forgotten_is_forgotten(open_outbox):
    outbox = open_outbox()
    make(outbox, b"x", b"y")
    confirm_all(outbox)
    outbox.forget([0, 7])
    assert outbox.sent() == [1]
    assert open_outbox().sent() == [1]


@pytest.mark.parametrize(("made", "released"), [(-1, []), (0, []), (1, [1]), (5, [1]), (None, [1])])
def test_recovery_follows_the_residual(open_outbox, made, released):
    outbox = open_outbox()
    outbox.put(b"x")
    outbox.stage(b"y")
    outbox = open_outbox()
    outbox.recover(made, [])
    assert names(outbox, ".staged") == []
    assert names(outbox, ".kept.update") == released
    assert outbox.next_sequence == max(2, (made or 0) + 1)


def test_recovery_removes_what_was_taken_back(open_outbox):
    outbox = open_outbox()
    make(outbox, b"x", b"y", b"z")
    confirm_all(outbox)
    outbox.recover(2, [0, 2])
    assert (outbox.sent(), names(outbox, ".sent")) == ([1], [1])


def test_confirming_twice_is_harmless(open_outbox):
    outbox = open_outbox()
    make(outbox, b"x")
    oldest = outbox.oldest()
    outbox.confirm(oldest)
    outbox.confirm(oldest)
    assert outbox.sent_body(0) == b"x"
    assert open_outbox().surplus(()) == []


def test_training_and_publishing_do_not_disturb_each_other(open_outbox):
    """The two threads of a worker, as fast as they can; everything is confirmed and forgotten once."""
    outbox = open_outbox(updates_max=1000)
    stop, failures = threading.Event(), []

    def publish():
        try:
            while not (stop.is_set() and outbox.oldest() is None):
                if (oldest := outbox.oldest()) is not None:
                    oldest.body()
                    outbox.confirm(oldest)
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=publish)
    thread.start()
    forgotten = []
    for number in range(300):
        if number % 3:
            make(outbox, b"x")
        else:
            outbox.put(b"x")
        gone = outbox.sent()[:2]
        assert set(gone) <= set(outbox.unsettled().values())
        outbox.forget(gone)
        forgotten += gone
    stop.set()
    thread.join(30)
    assert failures == []
    assert sorted([*forgotten, *outbox.sent()]) == [number for number in range(300) if number % 3]
    assert (len(outbox), outbox.is_full()) == (0, False)


@pytest.mark.parametrize("sync", [True, False])
def test_what_must_survive_a_power_cut_is_synced(tmp_path, monkeypatch, sync):
    """Files with their names, and the removal of what the residual took back; a confirm may be forgotten."""
    outbox, synced = Outbox(tmp_path / "a", "a", 10, 1000, sync=sync), []
    monkeypatch.setattr("os.fsync", lambda handle: synced.append("folder" if is_folder(handle) else "file"))
    sequence = outbox.stage(b"x")
    assert synced == ["file", "folder"] * 2 * sync  # outbox.json, then the update
    outbox.release(sequence)
    outbox.confirm(outbox.oldest())
    outbox.forget([])
    assert synced == ["file", "folder"] * 2 * sync
    outbox.forget([sequence], durable=True)
    assert synced[4:] == ["folder"] * sync


def is_folder(handle):
    return stat.S_ISDIR(os.fstat(handle).st_mode)
