"""Parts of `fedmq worker --check` that need no server: lines and exit codes, memory, the way to a server."""

import io

import numpy as np
import pytest
from rich.console import Console

from shared.command import DONE, FAILED, UNREACHABLE, USAGE
from shared.errors import DiskFull, FedMQError, SettingsError, StoreUnavailable, TaskError
from shared.model_image import ModelImage
from worker.check import report
from worker.fit import payload_bytes_max
from worker.memory import BASE_BYTES, available_bytes, needed_bytes
from worker.reach import Server, connect, handshake, resolve, server_of


def told(groups):
    out = io.StringIO()
    code = report(groups, Console(file=out, width=60))
    return code, out.getvalue().splitlines()


def well(text="fine"):
    return lambda: text


def wrong(error):
    def check():
        raise error

    return check


def test_after_the_first_that_is_wrong_the_rest_of_its_group_is_left_out():
    code, lines = told(
        [[("a", well("one [red]")), ("b", wrong(StoreUnavailable("away [Errno 2]"))), ("c", well())], [("d", well())]]
    )
    assert code == UNREACHABLE
    assert lines == [
        "ok    a            one [red]", "wrong b            away [Errno 2]", "ok    d            fine",
    ]  # fmt: skip


def test_a_long_line_stays_one():

    assert len(told([[("a", wrong(FedMQError("x " * 200)))]])[1]) == 1


@pytest.mark.parametrize(
    ("errors", "code"),
    [
        ([], DONE), ([SettingsError("x")], USAGE), ([StoreUnavailable("x")], UNREACHABLE), ([TaskError("x")], FAILED),
        ([DiskFull("x")], FAILED), ([StoreUnavailable("x"), SettingsError("y")], UNREACHABLE),
        ([FedMQError("x"), SettingsError("y")], FAILED),
    ],
)  # fmt: skip
def test_the_exit_code_is_that_of_the_first_that_is_wrong(errors, code):
    assert told([[("first", well())], *([("check", wrong(error))] for error in errors)])[0] == code


def test_a_mistake_in_the_program_is_not_hidden():
    with pytest.raises(ZeroDivisionError):
        told([[("a", lambda: 1 / 0)]])


# --- memory


def files(root, **named):
    for name, text in named.items():
        path = root / name.replace("__", "/").replace("_dot_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


MEMINFO = "MemTotal:  8000 kB\nMemFree:  100 kB\nMemAvailable:    4000 kB\n"


def test_what_is_available_is_what_the_machine_and_every_limit_around_leave(tmp_path):
    assert available_bytes(tmp_path) is None
    files(tmp_path, proc__meminfo=MEMINFO)
    assert available_bytes(tmp_path) == 4000 * 1024
    group = "sys__fs__cgroup__system_dot_slice__w"
    files(
        tmp_path,
        proc__self__cgroup="0::/system.slice/w\n",
        **{f"{group}__memory_dot_max": "max\n", f"{group}__memory_dot_current": "5"},
    )
    assert available_bytes(tmp_path) == 4000 * 1024
    slice_ = "sys__fs__cgroup__system_dot_slice"
    files(tmp_path, **{f"{slice_}__memory_dot_max": "3000000\n", f"{slice_}__memory_dot_current": "1000000\n"})
    assert available_bytes(tmp_path) == 2_000_000
    files(tmp_path, **{f"{group}__memory_dot_max": "1000\n", f"{group}__memory_dot_current": "2000\n"})
    assert available_bytes(tmp_path) == 0


def test_in_a_container_the_limit_is_at_the_top(tmp_path):
    files(
        tmp_path,
        proc__meminfo=MEMINFO,
        proc__self__cgroup="0::/\n",
        sys__fs__cgroup__memory_dot_max="700",
        sys__fs__cgroup__memory_dot_current="100",
    )
    assert available_bytes(tmp_path) == 600


def test_the_model_and_its_updates_are_counted_as_measured():
    layout = ModelImage.of({"w": np.zeros((5000, 2000), np.float32)}).layout
    as_float32, as_balanced = (
        needed_bytes(layout, payload_bytes_max(layout, codec)) for codec in ("float32", "balanced")
    )
    assert 0.9 * 436e6 <= as_float32 <= 1.3 * 436e6  # measured: 425,808 KiB
    assert 0.9 * 258e6 <= as_balanced <= 1.5 * 258e6  # measured: 251,988 KiB
    assert needed_bytes(ModelImage.of({"w": np.zeros(1, np.float32)}).layout, 4) < BASE_BYTES + 100


# --- the way to a server


@pytest.mark.parametrize(
    ("url", "host", "port", "secured"),
    [
        ("amqp://a:b@broker/fedmq", "broker", 5672, False), ("amqps://a:b@broker", "broker", 5671, True),
        ("redis://:b@store:7/0", "store", 7, False), ("rediss://a:b@[::1]/0", "::1", 6379, True),
        ("amqps://a:b@broker:443/fedmq?ca_file=/x", "broker", 443, True),
    ],
)  # fmt: skip
def test_a_url_leads_somewhere(url, host, port, secured):
    server = server_of("FEDMQ_BROKER_URL", url)
    assert (server.host, server.port, server.files is not None) == (host, port, secured)


def test_a_socket_of_this_machine_is_no_network():
    assert server_of("FEDMQ_STORE_URL", "unix:///run/redis.sock") is None


@pytest.mark.parametrize("url", ["http://x", "broker:5672", "", "amqp://a:sec/ret@host"])
def test_what_is_no_url_is_not_quoted(url):
    with pytest.raises(SettingsError, match="FEDMQ_BROKER_URL is no URL of a server") as caught:
        server_of("FEDMQ_BROKER_URL", url)
    assert "sec/ret" not in str(caught.value)


def test_without_tls_it_says_so_and_an_address_needs_no_name():
    server = Server("FEDMQ_STORE_URL", "127.0.0.1", 1, None)
    assert "anybody on the way can read the password" in handshake(server)
    assert resolve(server) == "127.0.0.1 is an address"
    with pytest.raises(StoreUnavailable, match="nothing listens there"):
        connect(server)
