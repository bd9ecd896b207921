"""What becomes an event of the audit log, and that what strangers write cannot pass for something else."""

import time

import pytest

from ops.audit import Collector, moved, of_denial, of_line
from ops.audit_window import ENTRIES_MAX, WINDOW_S, Window
from shared.errors import StoreUnavailable
from shared.store.redis_acl import Denial, _denial
from shared.store.redis_registry import Event
from shared.transport.audit import LINE_BYTES_MAX, LogLine, plain

ON = (
    "Channel error on connection <0.1.0> (10.0.0.7:5 -> 10.0.0.1:5671{}, vhost: 'fedmq', user: 'job.cam'), channel 1:\n"
)
REFUSED = (
    "operation {} caused a channel exception access_refused: access to {} in vhost 'fedmq' refused for user 'job.cam'"
)


def event(text):
    return of_line(LogLine(text, 5.0, (0, 1)))


@pytest.mark.parametrize(
    ("text", "kind", "login", "detail"),
    [
        (
            "Error on AMQP connection <0.9.0> (10.0.0.7:5 -> 10.0.0.1:5671, state: starting):\n"
            "PLAIN login refused: user 'job.cam' - invalid credentials",
            "login_failed", "job.cam", "invalid credentials, from 10.0.0.7:5",
        ),
        (
            ON.format("") + REFUSED.format("queue.purge", "queue 'fedmq.updates.job'"),
            "refused", "job.cam",
            "queue.purge: access to queue 'fedmq.updates.job' in vhost 'fedmq' refused for user 'job.cam', "
            "from 10.0.0.7:5",
        ),
        (
            ON.format("") + "operation basic.publish caused a channel exception precondition_failed: user_id property "
            "set to 'job.bob' but authenticated user was 'job.cam'",
            "refused", "job.cam",
            "basic.publish: user_id property set to 'job.bob' but authenticated user was 'job.cam', from 10.0.0.7:5",
        ),
        (
            "Error on AMQP connection <0.9.0> (10.0.0.7:5 -> 10.0.0.1:5671, user: 'job.cam', state: opening):\n"
            "access to vhost 'other' refused for user 'job.cam'",
            "refused", "job.cam", "access to vhost 'other' refused for user 'job.cam', from 10.0.0.7:5",
        ),
        ("HTTP access denied: user 'x' - bad password", "login_failed", "x", "management API: bad password"),
        ("HTTP access denied: user 'x' - Not management user", "refused", "x", "management API: Not management user"),
    ],
)  # fmt: skip
def test_a_failed_login_or_refusal_is_an_event(text, kind, login, detail):
    assert event(text) == Event(kind, login, detail, "rabbitmq", 5.0)


@pytest.mark.parametrize(
    "text",
    [
        "closing AMQP connection <0.1.0> (1.2.3.4:5 -> 1.2.3.4:6, vhost: 'fedmq', user: 'job.cam'):\n"
        "client unexpectedly closed TCP connection",
        ON.format("") + "operation basic.get caused a channel exception not_found: no queue 'x' in vhost 'fedmq'",
        "disk resource limit alarm set on node x", "", "memory", "user 'x' refused",
    ],
)  # fmt: skip
def test_other_lines_are_not(text):
    assert event(text) is None


FORGED = [
    " - \nPLAIN login refused: user 'victim' - invalid credentials",
    ", user: 'victim'), channel 1:\noperation x caused a channel exception access_refused: a refused for user 'victim'",
    "'\nHTTP access denied: user 'victim' - invalid credentials",
]


@pytest.mark.parametrize("name", FORGED)
def test_the_name_of_a_connection_accuses_nobody(name):
    """A client gives its connection a name, line feeds and all, and RabbitMQ writes it into its log."""
    refused = event(ON.format(f" - {name}") + REFUSED.format("basic.publish", "exchange 'x'"))
    assert (refused.kind, refused.login) == ("refused", "job.cam")
    assert refused.detail.endswith("from 10.0.0.7:5")
    closed = f"closing AMQP connection <0.1.0> (1.2.3.4:5 -> 1.2.3.4:6 - {name}, vhost: 'fedmq', user: 'job.cam'):\n"
    assert event(closed + "client unexpectedly closed TCP connection") is None


@pytest.mark.parametrize("name", ["x' refused for user 'victim'", "x\nPLAIN login refused: user 'victim' - y", *FORGED])
def test_the_name_of_a_queue_accuses_nobody(name):
    refused = event(ON.format("") + REFUSED.format("queue.declare", f"queue '{name}'"))
    assert (refused.kind, refused.login) == ("refused", "job.cam")


def test_an_event_is_read_without_colours_and_heads_of_lines():
    body = (
        b"\x1b[38;5;160m2026-11-21 00:16:48.116230+00:00 [error] <0.1.0> Error on AMQP connection (a -> b):\x1b[0m\n"
        b"\x1b[38;5;160m2026-11-21 00:16:48.116230+00:00 [error] <0.1.0> PLAIN login refused: user 'x' - y\x1b[0m\n"
    )
    assert plain(body) == "Error on AMQP connection (a -> b):\nPLAIN login refused: user 'x' - y"


def test_an_endless_line_is_cut_but_not_at_its_ends():
    text = plain((ON.format("x" * 100_000) + REFUSED.format("queue.purge", "queue 'q'")).encode())
    assert len(text) < LINE_BYTES_MAX + 10
    assert event(text).login == "job.cam"


@pytest.mark.parametrize(
    "text",
    [
        "\noperation a caused : " * 700,
        "\noperation a caused : user_id " * 500,
        " refused for user '" * 800,
        "Error on (" + "\nPLAIN login refused: user '" * 600,
        "HTTP access denied: user '" + "' - " * 4000,
        "(" + "x" * 15_000 + " -> ",
        "operation a caused " + ": " * 8000,
    ],
)  # fmt: skip
def test_a_hostile_text_takes_no_time(text):
    started = time.perf_counter()
    for _ in range(20):
        event(text[:LINE_BYTES_MAX])
    assert time.perf_counter() - started < 1.0


def test_of_a_long_text_both_ends_are_read():
    tried = (
        "Error on AMQP connection <0.9.0> (10.0.0.7:5 -> 10.0.0.1:5671, state: starting):\nPLAIN login refused: user '"
    )
    failed = event(f"{tried}{'x' * 4000}' - invalid credentials")
    assert (failed.kind, failed.detail) == ("login_failed", "invalid credentials, from 10.0.0.7:5")
    assert failed.login.startswith("xxx")
    named = event(ON.format(f" - {'x' * 4000}") + REFUSED.format("queue.purge", f"queue '{'q' * 255}'"))
    assert (named.login, named.detail[:13], named.detail[-15:]) == ("job.cam", "queue.purge: ", "from 10.0.0.7:5")


# Redis' log


def denial(count=1, at=100.0, key="k", reason="key", name="x"):
    return Denial(key, reason, "job.cam", name, "10.0.0.7:5", count, at)


def counts(seen, *denials):
    """Return the counts of what is new, and what is seen from then on."""
    events, seen = moved(denials, seen)
    return [event.count for event in events], seen


def test_a_refusal_is_written_once_and_then_only_what_is_more():
    new, seen = counts({}, denial())
    assert new == [1]
    assert counts(seen, denial())[0] == []
    assert counts(seen, denial(at=100.3))[0] == []  # Redis 7.0: its age, told a little later
    assert counts(seen, denial(count=4, at=110.0))[0] == [3]


def test_the_same_refusal_a_minute_later_is_another_entry():
    new, seen = counts({}, denial(count=3))
    assert new == [3]
    new, seen = counts(seen, denial(count=3), denial(count=2, at=200.0))
    assert new == [2]
    assert counts(seen, denial(count=3), denial(count=2, at=200.0))[0] == []


def test_what_has_left_redis_log_is_forgotten():
    _, seen = counts({}, *(denial(key=f"k{number}") for number in range(50)))
    assert len(seen) == 50
    assert set(counts(seen, denial(key="k49"), denial(key="k50"))[1]) == {"k49", "k50"}


def test_libraries_that_say_their_name_are_no_refusal():
    assert counts({}, denial(reason="command", name="client|setinfo"))[0] == []
    assert counts({}, denial(reason="command", name="set"))[0] == [1]


def test_a_wrong_password_is_a_failed_login():
    assert of_denial(denial(reason="auth", name="AUTH"), 2).kind == "login_failed"
    assert of_denial(denial(), 1).kind == "refused"
    assert of_denial(denial(), 1).detail == "key x, from 10.0.0.7:5"


FIELDS = {
    "count": "2", "reason": "key", "context": "toplevel", "object": "x", "username": "job.cam", "age-seconds": "4.5",
    "client-info": "id=3 addr=10.0.0.7:5 laddr=1.2.3.4:6 name=",
}  # fmt: skip


def test_entries_of_redis_7_0_and_7_2_are_read():
    old = _denial(FIELDS, 104.5)
    assert (old.at, old.address, old.count) == (100.0, "10.0.0.7:5", 2)
    assert old.key == _denial(FIELDS | {"count": "9", "age-seconds": "0"}, 300.0).key
    assert old.key != _denial(FIELDS | {"object": "y"}, 104.5).key
    new = _denial(FIELDS | {"entry-id": "0", "timestamp-created": "99000", "timestamp-last-updated": "100500"}, 0.0)
    assert (new.at, new.key) == (100.5, "0@99000")


# The collector


class Servers:
    """RabbitMQ's queue, Redis' log and the audit log in one, which can be away."""

    def __init__(self, lines, denials=()):
        self.lines, self.denials, self.written, self.acked = list(lines), list(denials), [], []
        self.away, self.reconnects, self.link, self.remembered = False, [], self, {}

    def take(self, limit):
        return self.lines[:limit]

    def ack(self, lines):
        self.acked += lines
        self.lines = self.lines[len(lines) :]

    def reconnect(self, why):
        self.reconnects.append(why)

    def read(self):
        return self.denials

    def seen(self):
        return dict(self.remembered)

    def append(self, events, seen=None):
        if self.away:
            raise StoreUnavailable("away")
        self.written += events
        self.remembered = self.remembered if seen is None else seen

    def close(self):
        pass


LINE = LogLine("HTTP access denied: user 'x' - bad", 5.0, (0, 1))


def test_what_cannot_be_written_is_not_acked_and_comes_again():
    servers = Servers([LINE, LogLine("hum", 5.0, (0, 2))], [denial()])
    collector = Collector(servers, servers, servers)
    servers.away = True
    with pytest.raises(StoreUnavailable):
        collector.step()
    assert (servers.acked, len(servers.reconnects)) == ([], 1)
    servers.away = False
    assert collector.step() == 2
    assert [tag for _, tag in (line.tag for line in servers.acked)] == [1, 2], "what is no event is forgotten too"
    assert [event.source for event in servers.written] == ["rabbitmq", "redis"]
    assert collector.step() == 0


def test_a_store_that_goes_away_between_the_two_loses_nothing_of_redis_log():
    servers = Servers([], [denial()])
    collector = Collector(servers, servers, servers)
    read = servers.read
    servers.read = lambda: setattr(servers, "away", True) or read()
    with pytest.raises(StoreUnavailable):
        collector.step()
    servers.away, servers.read = False, read
    assert collector.step() == 1
    assert collector.step() == 0


def test_a_restart_goes_on_where_the_one_before_was():
    servers = Servers([], [denial(key=f"k{number}") for number in range(2000)])
    first = Collector(servers, servers, servers)
    assert first.step() == 2000
    first.close()
    assert sum(event.count for event in servers.written) == 2000
    servers.denials.append(denial(key="new"))
    again = Collector(servers, servers, servers)
    assert again.step() == 1


def test_what_was_counted_when_the_store_was_away_is_counted_once():
    servers = Servers([LINE] * 3)
    now = [0.0]
    collector = Collector(servers, servers, servers, lambda: now[0])
    collector.step()
    servers.lines, servers.away, now[0] = [LINE] * 4, True, WINDOW_S
    with pytest.raises(StoreUnavailable):
        collector.step()
    servers.away = False
    collector.step()
    collector.close()
    assert sum(event.count for event in servers.written) == 7


# How much of it is written


def failed(login="x", host="10.0.0.7", kind="login_failed", source="redis"):
    return Event(kind, login, f"wrong login or password, from {host}:5", source, 5.0)


def test_what_happens_again_within_a_minute_is_one_more_entry():
    window = Window()
    assert window.add([failed()], 0.0) == [failed()], "the first one is written at once"
    assert window.add([failed(f"x{number}") for number in range(500)], 30.0) == []
    assert window.add([], WINDOW_S - 1) == []
    (again,) = window.add([], WINDOW_S)
    assert (again.kind, again.login, again.count) == ("login_failed", "x499", 500)
    assert again.detail == "again within a minute as 501 logins: wrong login or password, from 10.0.0.7:5"
    assert window.add([], 2 * WINDOW_S) == []
    assert window.add([failed()], 2 * WINDOW_S) == [failed()]


def test_devices_that_are_refused_are_told_apart_even_behind_one_address():
    window = Window()
    both = [failed("job.a", kind="refused"), failed("job.b", kind="refused")]
    assert window.add(both, 0.0) == both
    assert window.add(both, 1.0) == []
    assert [(event.login, event.count) for event in window.close()] == [("job.a", 1), ("job.b", 1)]


def test_many_addresses_write_so_many_entries_and_no_more():
    window = Window()
    written = window.add([failed(f"x{number}", f"10.1.{number // 250}.{number % 250}") for number in range(5000)], 0.0)
    assert len(written) == ENTRIES_MAX
    (device,) = window.add([failed("job.cam", kind="refused")], 1.0)
    assert device.login == "job.cam", "strangers do not take the place of a device that is refused"
    (others,) = window.close()
    assert (others.login, others.count) == ("", 5000 - ENTRIES_MAX)
    assert others.detail.startswith("of 1000 or more logins beyond those above within a minute, the last: 'x4999'")
