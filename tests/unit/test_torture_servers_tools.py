"""What the torture of servers is made of: the proxy, the record of the outboxes, who keeps programs running."""

import contextlib
import os
import signal
import socket
import sys
import threading
import time

import numpy as np
import pytest

from ops.torture import server_task
from ops.torture.proxy import Proxy
from ops.torture.server_faults import FAULTS, PAIRS, PROCESSES, schedule
from ops.torture.server_kept import Kept, Program, SmallDisk
from ops.torture.server_watch import OutboxWatch
from tests.contract.faults import wait_until
from worker.outbox import Outbox
from worker.task import Context


class Echo:
    """A server that sends everything back and knows how many connections of it are open."""

    def __init__(self):
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        self.open = 0
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self):
        with contextlib.suppress(OSError):
            while True:
                one, _ = self.listener.accept()
                self.open += 1
                threading.Thread(target=self._serve, args=(one,), daemon=True).start()

    def _serve(self, one):
        with contextlib.suppress(OSError), one:
            while piece := one.recv(2**16):
                one.sendall(piece)
        self.open -= 1


@pytest.fixture
def echo():
    server = Echo()
    yield server
    server.listener.close()


@pytest.fixture
def proxy(echo):
    one = Proxy(echo.port)
    yield one
    one.close()


def connect(proxy):
    client = socket.create_connection(("127.0.0.1", proxy.port), 5)
    client.settimeout(5)
    return client


def say(client, text=b"hello"):
    client.sendall(text)
    return client.recv(64)


def silent(client, text=b"hello"):
    """Tell whether nothing comes back for a while."""
    client.sendall(text)
    client.settimeout(0.3)
    try:
        return client.recv(64) == "never"
    except TimeoutError:
        return True
    finally:
        client.settimeout(5)


def test_the_proxy_passes_everything_until_told_otherwise(proxy):
    with connect(proxy) as client:
        assert say(client) == b"hello"
        wait_until(lambda: proxy.down_bytes == 5)  # counted after they were sent on


@pytest.mark.parametrize("reset", [True, False])
def test_a_cut_ends_connections_at_both_ends_and_refuses_new_ones_until_it_is_healed(proxy, echo, reset):
    with connect(proxy) as client:
        say(client)
        proxy.cut(reset)
        ends = pytest.raises(ConnectionResetError) if reset else contextlib.nullcontext(b"")
        with ends as expected:
            assert client.recv(1) == expected
    wait_until(lambda: echo.open == 0)
    with pytest.raises(OSError), connect(proxy) as client:  # it may be refused at any step
        assert say(client)
        raise ConnectionResetError
    proxy.heal()
    with connect(proxy) as client:
        assert say(client) == b"hello"


def test_a_drop_ends_connections_and_welcomes_new_ones(proxy, echo):
    with connect(proxy) as client:
        say(client)
        proxy.drop(reset=False)
        assert client.recv(1) == b""
    with connect(proxy) as client:
        assert say(client) == b"hello"


def test_a_slow_connection_waits_and_a_healed_one_does_not(proxy):
    with connect(proxy) as client:
        say(client)
        proxy.slow(0.15, 1e6)
        began = time.monotonic()
        assert say(client) == b"hello"
        assert time.monotonic() - began >= 0.3  # both ways
        proxy.heal()
        began = time.monotonic()
        assert say(client) == b"hello"
        assert time.monotonic() - began < 0.15


def test_a_stalled_connection_loses_nothing(proxy):
    with connect(proxy) as client:
        say(client)
        proxy.stall()
        assert silent(client, b"held")
        proxy.heal()
        assert client.recv(64) == b"held"


def test_a_half_open_connection_is_dead_for_ever_and_neither_end_hears_of_it(proxy, echo):
    with connect(proxy) as old:
        say(old)
        proxy.half_open()
        assert silent(old)
        with connect(proxy) as during:
            assert silent(during)
        proxy.heal()
        assert silent(old)
        with connect(proxy) as new:
            assert say(new) == b"hello"
    wait_until(lambda: echo.open == 1)  # the new one went; the old one's client did too, which nobody told the server
    time.sleep(0.2)
    assert echo.open == 1


def test_a_server_that_is_away_resets_connections(proxy, echo):
    echo.listener.shutdown(socket.SHUT_RDWR)
    echo.listener.close()
    with pytest.raises(OSError), connect(proxy) as client:
        assert say(client)
        raise ConnectionResetError


def test_the_watch_tells_what_was_made_and_what_was_confirmed(tmp_path):
    watch = OutboxWatch({"a": tmp_path / "a"})
    outbox = Outbox(tmp_path / "a", "a", 10, 2**20)
    names = [outbox.next_id()]
    outbox.put(b"one")
    names.append(outbox.next_id())
    outbox.put(b"two")
    wait_until(lambda: watch.seen().made == set(names))
    assert watch.seen().confirmed == set()
    assert watch.waiting() == 2
    outbox.confirm(outbox.oldest())
    wait_until(lambda: watch.seen().confirmed == {names[0]})
    assert watch.seen().made == set(names)
    assert watch.waiting() == 1
    outbox.close()
    watch.close()


def test_the_task_writes_down_each_place_and_never_uses_one_twice(tmp_path):
    model, settings = server_task.build(), {"record": str(tmp_path / "r"), "first": "1", "stride": "3", "sleep_s": "0"}
    results = [server_task.train(model, Context("a", version, 0, settings)) for version in (0, 0, 2)]
    assert [result.num_samples - 1 for result in results] == [1, 4, 7]
    assert np.flatnonzero(model["hits"]).tolist() == [1, 4, 7]
    lines = (tmp_path / "r").read_text().splitlines()
    assert lines[2] == '{"place": 7, "base_version": 2}'


def program(tmp_path, code):
    return Program("p", [sys.executable, "-c", code], dict(os.environ), tmp_path / "p.log")


def test_what_ends_by_itself_is_started_again_and_what_is_killed_is_held(tmp_path):
    unit = program(tmp_path, "print('up', flush=True); import time; time.sleep(0.2); raise SystemExit(3)")
    kept = Kept(unit, pause_s=0.05)
    try:
        kept.start()
        wait_until(lambda: kept.ended[:2] == [3, 3])
        kept.kill()
        lines, ended = (tmp_path / "p.log").read_text(), list(kept.ended)
        time.sleep(0.5)
        assert (tmp_path / "p.log").read_text() == lines
        assert kept.ended == ended, "a kill of ours is not an end of its own"
        kept.start()
        wait_until(lambda: len((tmp_path / "p.log").read_text()) > len(lines))
    finally:
        kept.close()
    assert unit.process.poll() is not None


def test_a_stopped_program_is_killed_in_the_end(tmp_path):
    kept = Kept(program(tmp_path, "import time; time.sleep(60)"))
    kept.start()
    kept.pause()
    kept.close()
    assert kept.unit.process.returncode == -signal.SIGKILL


def test_a_small_disk_is_full_and_then_empty(tmp_path):
    disk = SmallDisk(tmp_path / "disk", 2**22)
    assert disk.available, f"this suite needs the right to mount a tmpfs: {disk.problem}"
    try:
        disk.fill()
        with pytest.raises(OSError, match="No space"):
            (disk.folder / "file").write_bytes(b"x" * 4096)
        disk.empty()
        (disk.folder / "file").write_bytes(b"x" * 4096)
        disk.fill(left_bytes=2**20)
        assert 2**20 - 2**14 <= disk.free_bytes() <= 2**20
    finally:
        disk.close()
    assert not (tmp_path / "disk").is_mount()


def test_where_nothing_can_be_mounted_the_disk_says_so_and_is_never_filled(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    disk = SmallDisk(tmp_path / "disk", 2**22)
    assert not disk.available
    assert disk.problem
    with pytest.raises(AssertionError):
        disk.fill()


def test_every_kind_comes_once_in_the_first_round_and_pairs_come_later():
    drawn = schedule(FAULTS, 3 * len(FAULTS), np.random.default_rng(1))
    first, second = drawn[: len(FAULTS)], drawn[len(FAULTS) : 2 * len(FAULTS) + PAIRS]
    assert sorted(first) == sorted((name,) for name in FAULTS)
    pairs = [turn for turn in second if len(turn) == 2]
    assert len(pairs) == PAIRS
    assert all(one in PROCESSES and other in FAULTS and other not in PROCESSES for one, other in pairs)
    assert sorted(turn for turn in second if len(turn) == 1) == sorted(first)


def test_a_seed_decides_what_comes():
    drawn = [schedule(FAULTS, 40, np.random.default_rng(seed)) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
