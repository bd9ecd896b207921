"""A full disk: no training begins, a finished update waits for room, and whatever fails in between nothing is lost."""

import errno
import json
import logging
import os
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from shared.compression import decode as decode_delta
from shared.errors import DiskFull, FedMQError, PublishRefused
from shared.messages import decode
from shared.model_image import ModelImage
from tests.builders import System, add_one, device_of
from worker import folder as folder_module
from worker import residual_file
from worker.folder import SMALL_BYTES, Folder
from worker.outbox import Outbox

START = {"w": np.zeros((40, 50), np.float32)}
BIG = bytes(SMALL_BYTES + 1)


class FullDisk:
    """Makes writes of matching files fail as a disk does, with part of the bytes written."""

    def __init__(self, monkeypatch):
        self.full = lambda name: False
        self.free = 10**12
        self.number = errno.ENOSPC
        real = os.fsync

        def fsync(handle):
            name = Path(f"/proc/self/fd/{handle}").readlink().name
            if self.full(name):
                raise OSError(self.number, os.strerror(self.number))
            real(handle)

        monkeypatch.setattr(folder_module.os, "fsync", fsync)
        monkeypatch.setattr(folder_module.shutil, "disk_usage", lambda path: SimpleNamespace(free=self.free))


@pytest.fixture
def disk(monkeypatch):
    return FullDisk(monkeypatch)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_write_without_room_leaves_the_old_file_and_nothing_half_written(tmp_path, disk, number):
    files = Folder(tmp_path, sync=True)
    files.write("a", b"old")
    disk.full, disk.number = lambda name: name.startswith("a"), number
    with pytest.raises(DiskFull, match=f"the disk of {tmp_path} is full"):
        files.write("a", b"new")
    assert files.read("a") == b"old"
    assert sorted(files.names()) == ["a", "lock"]
    disk.full = lambda name: False
    files.write("a", b"new")
    assert files.read("a") == b"new"


def test_another_fault_of_the_disk_is_not_called_full(tmp_path, disk):
    files = Folder(tmp_path, sync=True)
    disk.full, disk.number = lambda name: True, errno.EIO
    with pytest.raises(OSError, match="Input/output error"):
        files.write("a", b"new")


def test_what_is_to_stay_free_stays_free_of_all_but_small_files(tmp_path, disk):
    files = Folder(tmp_path, sync=True, free_min_bytes=10_000)
    disk.free = 10_000 + len(BIG)
    files.write("a", BIG)
    disk.free -= 1
    with pytest.raises(DiskFull, match=r"has 14,096 bytes free; 4,097 more .* FEDMQ_DISK_FREE_MIN_BYTES=10000"):
        files.write("a", BIG)
    files.write("outbox.json", bytes(SMALL_BYTES))


def test_the_room_one_more_training_takes_is_known_from_the_files_also_after_a_restart(tmp_path, disk):
    outbox = Outbox(tmp_path, "a", 10, 10**9, free_min_bytes=10_000)
    assert outbox.no_room() == ""
    outbox.put(bytes(50_000))
    disk.free = 109_999
    assert "100,000 more" in outbox.no_room()
    outbox.close()
    outbox = Outbox(tmp_path, "a", 10, 10**9, free_min_bytes=10_000)
    assert outbox.no_room()
    disk.free = 110_000
    assert outbox.no_room() == ""


def test_the_number_of_an_update_that_was_not_stored_is_used_for_it_again(tmp_path, disk):
    outbox = Outbox(tmp_path, "a", 10, 10**9)
    outbox.put(b"first")
    before = outbox.next_id()
    for name in ("0000", "outbox"):
        disk.full = lambda file, name=name: file.startswith(name)
        with pytest.raises(DiskFull):
            outbox.put(b"second")
        assert (outbox.next_id(), len(outbox)) == (before, 1)
    disk.full = lambda name: False
    outbox.put(b"second")
    assert [outbox.oldest().body(), len(outbox)] == [b"first", 2]
    outbox.close()
    again = Outbox(tmp_path, "a", 10, 10**9)
    assert len(again) == 2
    assert again.next_sequence == 2


def test_an_outbox_that_finds_no_room_to_begin_says_so_and_begins_later(tmp_path, disk):
    disk.full = lambda name: name.startswith("outbox")
    with pytest.raises(DiskFull):
        Outbox(tmp_path / "a", "a", 10, 10**9)
    disk.full = lambda name: False
    Outbox(tmp_path / "a", "a", 10, 10**9)  # nobody holds its lock


# --- the worker


class Waiting:
    """A clock that moves at once; `then` is what happens after so many waits."""

    def __init__(self, clock, **then):
        self._clock, self.then, self.waits = clock, then, 0
        self.now, self.monotonic, self.local = clock.now, clock.monotonic, clock.local

    def wait(self, stop, seconds):
        self._clock.wait(stop, seconds)
        self.waits += 1
        assert self.waits < 1000, "waits for ever"
        if (action := self.then.get(f"at_{self.waits}")) is not None:
            action(stop)


def build():
    return {name: array.copy() for name, array in START.items()}


def worker_of(tmp_path, system, clock, **settings):
    device = device_of(tmp_path, system, add_one, build, **settings)
    device.outbox.close()
    device.outbox.folder = Folder(device.outbox.folder.path, sync=True, free_min_bytes=1000)
    device.worker._clock = device.worker._gate._clock = clock
    return device


@pytest.mark.parametrize("codec", ["float32", "ef | topk(0.25)"])
@pytest.mark.parametrize("file", ["0000", "outbox", "residual"])
def test_a_finished_update_waits_for_room_and_is_sent_once(tmp_path, disk, caplog, codec, file):
    caplog.set_level(logging.INFO)
    system = System(ModelImage.of(START), codec=codec, staleness="constant")

    def room(stop):
        disk.full = lambda name: False

    def no_room(model, context):
        if context.version == 0 and not clock.waits:
            disk.full = lambda name: name.startswith(file)
        return add_one(model, context)

    clock = Waiting(system.clock, at_4=room)
    device = worker_of(tmp_path, system, clock, updates_max=3)
    device.worker._trainer.task._module.train = no_room
    device.worker._loop()
    assert device.worker.updates_made == 3
    if file != "residual" or codec != "float32":
        assert clock.waits >= 4
        assert caplog.text.count("a finished update waits for room") == 1
    total = np.zeros(2000, np.float32)
    ids = []
    while (waiting := device.outbox.oldest()) is not None:
        update = decode(waiting.body(), 10**6)
        decode_delta(update.codec, update.payload, ModelImage.of(START).layout).add_into(total, 1.0)
        ids.append(update.update_id)
        device.outbox.remove(waiting)
    assert ids == [f"a/{device.outbox.incarnation}/{number}" for number in range(3)]
    header, residual = residual_file.read(device.outbox.folder)
    np.testing.assert_allclose(total + (0 if residual is None else residual), np.full(2000, 3.0), rtol=1e-6)
    assert header.made in (-1, 2)


@pytest.mark.parametrize("file", ["0000", "residual"])
def test_a_process_that_ends_while_it_waits_for_room_leaves_no_half_of_an_update(tmp_path, disk, caplog, file):
    system = System(ModelImage.of(START), codec="ef | topk(0.25)", staleness="constant")
    clock = Waiting(system.clock, at_3=lambda stop: stop.set())
    device = worker_of(tmp_path, system, clock)
    assert device.worker.step()
    disk.full = lambda name: name.startswith(file)
    device.worker._loop()
    assert "what was trained last is lost" in caplog.text
    assert device.worker.updates_made == 1
    device.outbox.folder.close()
    disk.full = lambda name: False
    again = device_of(tmp_path, system, add_one, build)
    assert again.worker.step()
    assert len(again.outbox) == 2
    header, residual = residual_file.read(again.outbox.folder)
    total = residual.copy()
    while (waiting := again.outbox.oldest()) is not None:
        update = decode(waiting.body(), 10**6)
        decode_delta(update.codec, update.payload, ModelImage.of(START).layout).add_into(total, 1.0)
        again.outbox.remove(waiting)
    np.testing.assert_allclose(total, np.full(2000, 2.0), rtol=1e-6)
    assert header.made == 2  # the number of the one that never happened may be skipped


def test_no_training_begins_while_there_is_no_room_and_the_log_says_it_once(tmp_path, disk, caplog):
    caplog.set_level(logging.INFO)
    system = System(ModelImage.of(START))

    def room(stop):
        disk.free = 10**9

    device = worker_of(tmp_path, system, Waiting(system.clock, at_5=room), updates_max=2)
    device.worker.step()
    disk.free = 1000 + 7999
    device.worker._loop()
    assert device.worker.updates_made == 2
    assert caplog.text.count("training pauses until there is room") == 1
    assert caplog.text.count("training goes on") == 1


def test_a_disk_that_does_not_work_ends_the_worker_with_a_reason(tmp_path, disk):
    system = System(ModelImage.of(START))
    device = worker_of(tmp_path, system, Waiting(system.clock))
    disk.full, disk.number = lambda name: True, errno.EROFS
    with pytest.raises(FedMQError, match=r"cannot be written into FEDMQ_STATE_DIR: .*Read-only file system"):
        device.worker._loop()


def test_a_disk_that_does_not_read_does_not_end_the_publishing(tmp_path, disk, caplog):
    system = System(ModelImage.of(START))
    device = worker_of(tmp_path, system, Waiting(system.clock))
    device.worker.step()
    broken, stop = [OSError(errno.EIO, "Input/output error")] * 3, threading.Event()
    read = device.outbox.folder.read

    def reads(name):
        if broken:
            raise broken.pop()
        stop.set()
        return read(name)

    device.outbox.folder.read = reads
    device.publisher.run(stop)
    assert len(device.outbox) == 0
    assert caplog.text.count("Input/output error") == 1
    assert not isinstance(device.publisher.problem, PublishRefused)
    assert json.loads((device.outbox.folder.path / "outbox.json").read_text())["next_sequence"] == 1
