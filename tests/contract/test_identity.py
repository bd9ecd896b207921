"""What each login may do at the broker, asked of a real RabbitMQ as an installation has it: attempts are refused there.

Bare clients: nothing is left to our own code, which would not even try.
"""

import json
import logging
from urllib.parse import urlsplit

import pika
import pika.exceptions
import pytest

from ops import roles, server_logins
from ops.broker_admin import BrokerAdmin
from shared.errors import SettingsError
from shared.transport import names
from shared.transport.audit import AuditQueue
from shared.transport.rabbitmq import RabbitSource, queue_depths
from tests.contract.faults import wait_until
from tests.secured_fixture import DEVICE, DEVICES, JOB, NEIGHBOUR, OTHER, amqp, installation, secured

__all__ = ["installation", "secured"]

OWN_KEY = names.routing_key(JOB, DEVICE)
DEFINITIONS = json.loads(server_logins.DEFINITIONS.read_text())


def publish(exchange, key, **properties):
    return lambda channel: channel.basic_publish(
        exchange, key, b"x", pika.BasicProperties(**properties), mandatory=bool(exchange)
    )


def declare(name, **more):
    return lambda channel: channel.queue_declare(name, **more)


QUEUES = (names.queue(JOB), names.dead_queue(JOB), names.queue(OTHER), names.AUDIT_QUEUE)
EXCHANGES = (names.EXCHANGE, names.DEAD_EXCHANGE)

BROKER_ACTS = {
    "publish as another client": publish(names.EXCHANGE, names.routing_key(JOB, NEIGHBOUR)),
    "publish as the beginning of its name": publish(names.EXCHANGE, names.routing_key(JOB, DEVICE[:-1])),
    "publish with another case": publish(names.EXCHANGE, OWN_KEY.upper()),
    "publish for another job": publish(names.EXCHANGE, names.routing_key(OTHER, DEVICE)),
    "publish with more words": publish(names.EXCHANGE, f"{OWN_KEY}.x"),
    "publish with letters before": publish(names.EXCHANGE, f"x{OWN_KEY}"),
    "publish with words before": publish(names.EXCHANGE, f"x.{OWN_KEY}"),
    "publish with a line feed": publish(names.EXCHANGE, f"{OWN_KEY}\n"),
    "publish with no key": publish(names.EXCHANGE, ""),
    "publish to dead letters": publish(names.DEAD_EXCHANGE, OWN_KEY),
    "publish to a queue of the default exchange": publish("", names.queue(JOB)),
    "publish to amq.topic": publish("amq.topic", OWN_KEY),
    "publish to the log": publish(names.LOG_EXCHANGE, "error"),
    "purge": lambda channel: channel.queue_purge(names.queue(JOB)),
    "bind the queue": lambda channel: channel.queue_bind(names.queue(JOB), names.EXCHANGE, OWN_KEY),
    "unbind the queue": lambda channel: channel.queue_unbind(names.queue(JOB), names.EXCHANGE, f"update.{JOB}.*"),
    "bind an exchange": lambda channel: channel.exchange_bind(names.DEAD_EXCHANGE, names.EXCHANGE, OWN_KEY),
    "unbind an exchange": lambda channel: channel.exchange_unbind(names.DEAD_EXCHANGE, names.EXCHANGE, OWN_KEY),
    "declare a queue": declare("mine"),
    "declare a queue with no name": declare(""),
    "declare an exclusive queue": declare("", exclusive=True),
    "declare the job's queue": declare(names.queue(JOB), durable=True, arguments={"x-queue-type": "quorum"}),
    "declare an exchange": lambda channel: channel.exchange_declare("mine", "topic"),
    "declare the job's exchange": lambda channel: channel.exchange_declare(names.EXCHANGE, "topic", durable=True),
    "read a queue of an empty line": lambda channel: channel.basic_get("\n"),
    **{f"get {queue}": lambda channel, queue=queue: channel.basic_get(queue) for queue in QUEUES},
    **{
        f"consume {queue}": lambda channel, queue=queue: channel.basic_consume(queue, lambda *_: None)
        for queue in QUEUES
    },
    **{f"delete {queue}": lambda channel, queue=queue: channel.queue_delete(queue) for queue in QUEUES},
    **{f"delete {name}": lambda channel, name=name: channel.exchange_delete(name) for name in EXCHANGES},
}


@pytest.mark.parametrize("act", BROKER_ACTS)
def test_the_broker_refuses_a_device(installation, act):
    refused = installation.attempt(DEVICE, BROKER_ACTS[act])
    assert refused is not None, "it was let do so"
    assert refused[0] == 403, refused


@pytest.mark.parametrize("user_id", [names.device_login(JOB, NEIGHBOUR), DEVICE, names.OPERATOR, "guest"])
def test_the_broker_refuses_another_user_id(installation, user_id):
    code, text = installation.attempt(DEVICE, publish(names.EXCHANGE, OWN_KEY, user_id=user_id))
    assert (code, "user_id" in text) == (406, True)


def test_a_device_publishes_under_its_own_key(installation):
    own = publish(names.EXCHANGE, OWN_KEY, user_id=names.device_login(JOB, DEVICE))
    before = queue_depths(installation.broker_url("operator"), JOB, 10)["updates"]
    assert installation.attempt(DEVICE, own) is None
    wait_until(lambda: queue_depths(installation.broker_url("operator"), JOB, 10)["updates"] == before + 1)


API = ["overview", "users", "queues", "definitions", "connections", "permissions", f"users/{names.OPERATOR}", "whoami"]


@pytest.mark.parametrize("who", [DEVICE, "aggregator", "exporter"])
@pytest.mark.parametrize("path", API)
def test_the_management_api_lets_nobody_in_but_the_operator(installation, who, path):
    admin = urlsplit(installation.servers.url("operator", "broker_admin_url"))
    login = urlsplit(installation.broker_url(who))
    url = admin._replace(netloc=f"{login.username}:{login.password}@localhost:{admin.port}").geturl()
    with pytest.raises(SettingsError, match="refuses this login"):
        BrokerAdmin(url)._call("GET", path)


def test_guest_does_not_exist(installation):
    parts = urlsplit(installation.broker_url(DEVICE))
    for vhost in ("fedmq", "/"):
        with pytest.raises(pika.exceptions.ProbableAuthenticationError):
            amqp(installation.servers, parts._replace(netloc="guest:guest@localhost", path=vhost).geturl())


AGGREGATOR_ACTS = {
    "read another job's updates": lambda channel: channel.basic_get(names.queue(OTHER)),
    "read another job's dead letters": lambda channel: channel.basic_get(names.dead_queue(OTHER)),
    "purge another job's updates": lambda channel: channel.queue_purge(names.queue(OTHER)),
    "delete another job's queue": lambda channel: channel.queue_delete(names.queue(OTHER)),
    "declare another job's queue": declare(names.queue(OTHER), durable=True),
    "declare a queue of its own": declare("fedmq.updates.job-a.more"),
    "declare a queue that begins so": declare(f"x{names.queue(JOB)}"),
    "take another job's updates": lambda channel: channel.queue_bind(
        names.queue(JOB), names.EXCHANGE, f"update.{OTHER}.*"
    ),
    "take everybody's updates": lambda channel: channel.queue_bind(names.queue(JOB), names.EXCHANGE, "#"),
    "take everybody's dead letters": lambda channel: channel.queue_bind(
        names.dead_queue(JOB), names.DEAD_EXCHANGE, "#"
    ),
    "take the log": lambda channel: channel.queue_bind(names.queue(JOB), names.LOG_EXCHANGE, "error"),
    "make an update": publish(names.EXCHANGE, OWN_KEY),
    "bury for another job": publish(names.DEAD_EXCHANGE, names.routing_key(OTHER, DEVICE)),
    "publish to a queue": publish("", names.queue(JOB)),
    "delete an exchange": lambda channel: channel.exchange_delete(names.EXCHANGE),
    "declare an exchange": lambda channel: channel.exchange_declare("mine", "topic"),
    "read the audit queue": lambda channel: channel.basic_get(names.AUDIT_QUEUE),
}
EXPORTER_ACTS = {
    "take updates": lambda channel: channel.basic_get(names.queue(JOB)),
    "purge updates": lambda channel: channel.queue_purge(names.queue(JOB)),
    "make an update": publish(names.EXCHANGE, OWN_KEY),
    "bury": publish(names.DEAD_EXCHANGE, OWN_KEY),
    "forge the log": publish(names.LOG_EXCHANGE, "error"),
    "forge the log directly": publish("", names.AUDIT_QUEUE),
    "delete the audit queue": lambda channel: channel.queue_delete(names.AUDIT_QUEUE),
    "take updates for the log": lambda channel: channel.queue_bind(names.AUDIT_QUEUE, names.EXCHANGE, "#"),
    "take all of the log": lambda channel: channel.queue_bind(names.AUDIT_QUEUE, names.LOG_EXCHANGE, "#"),
    "declare": declare("mine"),
}


@pytest.mark.parametrize("act", AGGREGATOR_ACTS)
def test_the_broker_refuses_an_aggregator_what_is_not_its_jobs(installation, act, with_log):
    refused = installation.attempt("aggregator", AGGREGATOR_ACTS[act])
    assert refused is not None, "it was let do so"
    assert refused[0] == 403, refused


@pytest.mark.parametrize("act", EXPORTER_ACTS)
def test_the_broker_refuses_the_exporter(installation, act, with_log):
    refused = installation.attempt("exporter", EXPORTER_ACTS[act])
    assert refused is not None, "it was let do so"
    assert refused[0] == 403, refused


@pytest.fixture(scope="module")
def with_log(installation):
    """RabbitMQ makes its log's exchange some seconds after its start."""
    queue = AuditQueue(installation.broker_url("exporter"))
    queue.link.wait_ready(30)
    queue.close()


# One truth


def test_an_aggregator_with_its_own_login_finds_everything_as_it_wants_it(installation, caplog):
    caplog.set_level(logging.INFO, "fedmq")
    source = RabbitSource(installation.broker_url("aggregator"), JOB, 8)
    source.link.wait_ready(20)
    source.close()
    assert [record.getMessage() for record in caplog.records if "used as it is" in record.getMessage()] == []
    assert not [record for record in caplog.records if "granted" in record.getMessage()]


def test_what_the_aggregator_declares_is_what_definitions_name(servers, job):
    """On a server that knows no definitions: declared again as they say, nothing may differ."""
    source = RabbitSource(servers.rabbitmq.url, job, 8)
    source.link.wait_ready(20)
    source.close()
    connection = pika.BlockingConnection(pika.URLParameters(servers.rabbitmq.url))
    assert {exchange["name"] for exchange in DEFINITIONS["exchanges"]} == {names.EXCHANGE, names.DEAD_EXCHANGE}
    for exchange in DEFINITIONS["exchanges"]:
        assert exchange["vhost"] == names.VHOST
        connection.channel().exchange_declare(
            exchange["name"], exchange["type"], durable=exchange["durable"], auto_delete=exchange["auto_delete"],
            internal=exchange["internal"], arguments=exchange["arguments"],
        )  # fmt: skip
    connection.close()


def test_the_broker_has_what_definitions_and_roles_say(installation):
    found = BrokerAdmin(installation.servers.url("operator", "broker_admin_url")).definitions()
    for kind in ("exchanges", "vhosts"):
        wanted = {(item["name"], item.get("type"), item.get("durable")) for item in DEFINITIONS[kind]}
        assert {(item["name"], item.get("type"), item.get("durable")) for item in found[kind]} == wanted
    queues = {queue["name"]: queue["arguments"] for queue in found["queues"]}
    assert queues[names.AUDIT_QUEUE] == DEFINITIONS["queues"][0]["arguments"]
    assert DEFINITIONS["queues"][0]["name"] == names.AUDIT_QUEUE
    expected = [roles.operator(), roles.exporter(), *map(roles.aggregator, (JOB, OTHER))]
    expected += [roles.device(job, name) for name, job in DEVICES.items()]
    assert {user["name"] for user in found["users"]} == {role.login for role in expected}
    allowed = {
        item["user"]: roles.Permission(item["write"], item["read"], item["configure"]) for item in found["permissions"]
    }
    assert allowed == {role.login: role.permission for role in expected}
    topics = {(t["user"], t["exchange"]): roles.Permission(t["write"], t["read"]) for t in found["topic_permissions"]}
    assert topics == {(role.login, name): topic for role in expected for name, topic in role.topics.items()}
    tags = {user["name"]: tuple(user["tags"]) for user in found["users"]}
    assert tags == {role.login: role.tags for role in expected}
    assert not any("guest" in user["name"] for user in found["users"])
