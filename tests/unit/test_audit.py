"""What becomes an event of the audit log, and that what strangers write cannot pass for something else."""

import pytest

from ops.audit import Collector, Seen, of_denial, of_line
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


# Redis' log


def denial(count=1, at=100.0, key="k", reason="key", name="x"):
    return Denial(key, reason, "job.cam", name, "10.0.0.7:5", count, at)


def moved(seen, *denials):
    """Return the counts of what is new, and note it."""
    fresh = seen.fresh(denials)
    for _, one in fresh:
        seen.note(one)
    return [event.count for event, _ in fresh]


def test_a_refusal_is_written_once_and_then_only_what_is_more():
    seen = Seen()
    assert moved(seen, denial()) == [1]
    assert moved(seen, denial()) == []
    assert moved(seen, denial(at=100.3)) == []  # Redis 7.0: its age, told a little later
    assert moved(seen, denial(count=4, at=110.0)) == [3]


def test_the_same_refusal_a_minute_later_is_another_entry():
    seen = Seen()
    assert moved(seen, denial(count=3)) == [3]
    assert moved(seen, denial(count=3), denial(count=2, at=200.0)) == [2]
    assert moved(seen, denial(count=3), denial(count=2, at=200.0)) == []


def test_what_stands_in_the_audit_log_is_not_written_again_after_a_restart():
    first = Seen()
    events = [event for event, _ in first.fresh([denial(), denial(key="l", count=5)])]
    assert moved(Seen.of(events), denial(), denial(key="l", count=5), denial(key="l2")) == [1]


def test_libraries_that_say_their_name_are_no_refusal():
    assert moved(Seen(), denial(reason="command", name="client|setinfo")) == []
    assert moved(Seen(), denial(reason="command", name="set")) == [1]


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
        self.away, self.reconnects, self.link = False, [], self

    def take(self, limit):
        return self.lines[:limit]

    def ack(self, lines):
        self.acked += lines
        self.lines = self.lines[len(lines) :]

    def reconnect(self, why):
        self.reconnects.append(why)

    def read(self):
        return self.denials

    def newest(self, count):
        return self.written[-count:]

    def append(self, events):
        if self.away:
            raise StoreUnavailable("away")
        self.written += events


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
