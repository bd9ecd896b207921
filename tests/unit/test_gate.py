"""Whether a training may begin: hours, the owner's command, the disk - and what the worker does and says meanwhile."""

import logging
import os
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from shared.config import WorkerSettings, load
from shared.errors import SettingsError
from shared.model_image import ModelImage
from tests.builders import System, add_one, device_of
from tests.contract.faults import wait_until
from worker.gate import LOOK_S, Gate
from worker.ready import OUTPUT_BYTES_MAX, ask

START = {"w": np.zeros((2, 3), np.float32)}
HOUR_S = 3600.0


def script(tmp_path, text):
    path = tmp_path / "hook"
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


def answer_of(tmp_path, text, timeout_s=10.0):
    return ask([script(tmp_path, text)], timeout_s, threading.Event())


# --- the command


def test_exit_code_0_is_a_yes_and_the_first_line_the_reason(tmp_path):
    answer = answer_of(tmp_path, "echo; echo '  mains power '; echo more")
    assert (answer.ready, answer.reason, answer.failed) == (True, "mains power", False)


def test_another_exit_code_is_a_no(tmp_path):
    answer = answer_of(tmp_path, "echo on battery >&2; exit 7")
    assert (answer.ready, answer.reason, answer.failed) == (False, "on battery", False)
    assert answer_of(tmp_path, "exit 7").reason.endswith("hook ended with 7")


def test_no_shell_reads_the_command(tmp_path):
    answer = ask(["/bin/echo", "$HOME; touch x", "a  b"], 10.0, threading.Event())
    assert (answer.ready, answer.reason) == (True, "$HOME; touch x a  b")


@pytest.mark.parametrize("command", ["/no/such/program", "/etc/passwd", "/tmp"])
def test_what_cannot_be_run_is_a_no_that_says_why(command):
    answer = ask([command], 10.0, threading.Event())
    assert (answer.ready, answer.failed) == (False, True)
    assert f"{command} cannot be run: " in answer.reason


def test_one_that_hangs_is_killed_with_all_it_started(tmp_path):
    before = time.monotonic()
    answer = answer_of(tmp_path, f"sleep 1000 & echo $! > {tmp_path}/pid; echo thinking; wait", timeout_s=0.5)
    assert time.monotonic() - before < 5
    assert (answer.ready, answer.failed) == (False, True)
    assert "took longer than 0.5 s: thinking" in answer.reason
    _gone(tmp_path)


def _gone(tmp_path):
    child = int((tmp_path / "pid").read_text())
    wait_until(lambda: not _alive(child), 5.0, lambda: f"process {child} lives on")


def _alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"


def test_one_that_writes_without_end_costs_no_memory_and_its_output_is_one_clean_line(tmp_path):
    answer = answer_of(tmp_path, "printf 'a\\033[31m%0500d' 7; exec yes", timeout_s=5.0)
    assert not answer.ready
    assert "\033" not in answer.reason
    assert len(answer.reason) < 400 < OUTPUT_BYTES_MAX


def test_one_that_leaves_something_behind_does_not_hold_us_up(tmp_path):
    before = time.monotonic()
    answer = answer_of(tmp_path, f"sleep 30 & echo $! > {tmp_path}/pid; echo yes")
    assert (answer.ready, answer.reason) == (True, "yes")
    assert time.monotonic() - before < 5
    _gone(tmp_path)


def test_what_it_leaves_in_the_background_ends_with_it(tmp_path):
    answer = answer_of(tmp_path, f"sleep 1000 >/dev/null 2>&1 & echo $! > {tmp_path}/pid; echo yes")
    assert (answer.ready, answer.reason) == (True, "yes")
    _gone(tmp_path)


def test_a_stop_ends_the_asking(tmp_path):
    stop = threading.Event()
    threading.Timer(0.3, stop.set).start()
    before = time.monotonic()
    assert not ask([script(tmp_path, "sleep 1000")], 60.0, stop).ready
    assert time.monotonic() - before < 5


def test_a_quotation_that_does_not_end_is_a_wrong_setting():
    with pytest.raises(SettingsError, match=r"FEDMQ_READY_COMMAND=.*No closing quotation"):
        load(WorkerSettings, {"ready_command": "sh -c 'exit 0"})


# --- the gate


class Outbox(SimpleNamespace):
    full, room = False, ""

    def is_full(self):
        return self.full

    def no_room(self):
        return self.room

    def __len__(self):
        return 3


def gate_of(clock, outbox=None, **settings):
    return Gate(WorkerSettings(**settings), outbox or Outbox(), clock)


def test_each_cause_has_its_reason_and_its_wait(tmp_path):
    clock, outbox, stop = System().clock, Outbox(), threading.Event()
    gate = gate_of(clock, outbox, hours="22-6", ready_command=script(tmp_path, "echo busy; exit 1"))
    clock.time_s = 12 * HOUR_S  # Thursday, 1 January 1970, in UTC
    outbox.full = True
    assert gate.pause(stop).cause == "outbox"
    outbox.full, outbox.room = False, "the disk has 7 bytes free"
    assert (gate.pause(stop).cause, gate.pause(stop).reason) == (
        "disk", "the disk has 7 bytes free: training pauses until there is room",
    )  # fmt: skip
    outbox.room = ""
    pause = gate.pause(stop)
    assert (pause.cause, pause.wait_s) == ("hours", LOOK_S)
    assert "Thu 12:00, outside FEDMQ_HOURS=22-6: training pauses for 10 h" in pause.reason
    clock.time_s = 22 * HOUR_S - 10
    assert gate.pause(stop).wait_s == 10.0
    clock.time_s = 23 * HOUR_S
    pause = gate.pause(stop)
    assert (pause.cause, pause.wait_s) == ("command", LOOK_S)
    assert "says no, training pauses: busy" in pause.reason


def test_the_commands_consent_is_for_one_training_and_for_a_minute(tmp_path):
    clock, stop = System().clock, threading.Event()
    gate = gate_of(clock, ready_command=script(tmp_path, f"echo x >> {tmp_path}/asked"))

    def asked():
        assert gate.pause(stop) is None
        return len((tmp_path / "asked").read_text().split())

    assert [asked(), asked(), asked()] == [1, 1, 1]  # nothing to train yet: not asked twice a second
    gate.used()
    assert asked() == 2
    clock.time_s += LOOK_S + 1
    assert asked() == 3


# --- the worker


class Stopping:
    """A clock that moves at once and ends the worker after some waits."""

    def __init__(self, clock, waits, after=lambda: None):
        self._clock, self.left, self.after = clock, waits, after
        self.now, self.monotonic, self.local = clock.now, clock.monotonic, clock.local

    def wait(self, stop, seconds):
        self._clock.wait(stop, seconds)
        self.left -= 1
        self.after()
        if self.left <= 0:
            stop.set()


def worker_of(tmp_path, system, waits, after=lambda: None, **settings):
    device = device_of(tmp_path, system, add_one, lambda: {k: v.copy() for k, v in START.items()}, **settings)
    device.worker._clock = device.worker._gate._clock = Stopping(system.clock, waits, after)
    return device


def test_no_training_begins_outside_the_hours_and_the_log_says_it_once(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    system = System(ModelImage.of(START))
    system.clock.time_s = 12 * HOUR_S
    pulled = []
    system.store.head = lambda head=system.store.head: (pulled.append(1), head())[1]
    device = worker_of(tmp_path, system, waits=9 * 60, hours="22-6")
    device.worker._loop()
    assert (device.worker.updates_made, pulled) == (0, [])
    assert caplog.text.count("outside FEDMQ_HOURS=22-6") == 1
    assert system.clock.time_s == 21 * HOUR_S


def test_training_begins_when_the_hours_do_and_ends_with_them(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    system = System(ModelImage.of(START))
    system.clock.time_s = 21.5 * HOUR_S
    trained = []

    def train(model, context):
        trained.append(system.clock.time_s / HOUR_S)
        system.clock.time_s += HOUR_S / 4
        return add_one(model, context)

    device = device_of(tmp_path, system, train, lambda: {k: v.copy() for k, v in START.items()}, hours="22-23")
    device.worker._clock = device.worker._gate._clock = Stopping(system.clock, 90)
    device.worker._loop()
    np.testing.assert_allclose(trained, [22, 22.25, 22.5, 22.75])
    assert caplog.text.count("training goes on") == 1
    assert caplog.text.count("training pauses") == 2


def test_outcomes_are_taken_up_while_no_training_may_begin(tmp_path):
    system = System(ModelImage.of(START), codec="ef | topk(0.25)", buffer_size=1)
    system.clock.time_s = 23 * HOUR_S
    device = worker_of(tmp_path, system, waits=3, hours="22-6")
    assert device.worker.step()
    assert device.worker.step()
    device.publisher.step()
    device.publisher.step()
    assert len(device.outbox.sent()) == 2
    system.drain()
    system.clock.time_s = 36 * HOUR_S
    device.worker._loop()
    assert device.outbox.sent() == []  # applied: the store said so


def test_a_refused_update_waits_for_the_next_training_to_come_back(tmp_path):
    system = System(ModelImage.of(START), codec="ef | topk(0.25)", buffer_size=1, staleness_max=0)
    system.clock.time_s = 23 * HOUR_S
    device = worker_of(tmp_path, system, waits=3, hours="22-6")
    device.worker.step()
    device.worker.step()  # of the same version: stale when the first is applied
    device.publisher.step()
    device.publisher.step()
    system.drain()
    system.clock.time_s += 40.0  # so that the refusal is committed
    system.drain()
    system.clock.time_s = 36 * HOUR_S
    device.worker._loop()
    assert device.outbox.sent() == [1]
    system.clock.time_s = 47 * HOUR_S
    device.worker.stop.clear()
    assert device.worker.step()
    assert device.metrics.returned._value.get() == 1
    assert device.outbox.sent() == []


def test_a_command_that_says_no_keeps_the_worker_waiting_and_is_named_once(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    hook = script(tmp_path, f"echo load $(wc -c < {tmp_path}/asked) is high; echo -n x >> {tmp_path}/asked; exit 1")
    (tmp_path / "asked").write_text("")
    system = System(ModelImage.of(START))
    device = worker_of(tmp_path, system, waits=4, ready_command=hook)
    device.worker._loop()
    assert device.worker.updates_made == 0
    assert (tmp_path / "asked").read_text() == "xxxx"
    assert caplog.text.count("FEDMQ_READY_COMMAND says no") == 1  # though its numbers change
    assert "load 0 is high" in caplog.text


def test_the_command_is_asked_before_each_training(tmp_path):
    hook = script(tmp_path, f"echo x >> {tmp_path}/asked; test $(wc -l < {tmp_path}/asked) -le 3")
    system = System(ModelImage.of(START))
    device = worker_of(tmp_path, system, waits=2, ready_command=hook)
    device.worker._loop()
    assert device.worker.updates_made == 3
    assert len((tmp_path / "asked").read_text().split()) == 5  # three trainings, and two noes
