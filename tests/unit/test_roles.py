"""The table of broker permissions: its patterns fit exactly the names they are to fit."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ops import roles, server_logins
from shared.store import redis_acl
from shared.transport import names

IDS = st.from_regex(r"[A-Za-z0-9_-]{1,12}", fullmatch=True)
KEYS = st.one_of(
    st.builds(names.routing_key, IDS, IDS), st.text(max_size=20), st.sampled_from(["#", "*", "update.#", "update.*.*"])
)


def fits(pattern, name):
    """Tell what RabbitMQ would: it searches."""
    return re.search(pattern.replace(r"\z", r"\Z"), name) is not None  # Python calls the very end \Z


@given(IDS, IDS, KEYS)
def test_a_device_publishes_under_its_own_key_alone(job, client, key):
    own = names.routing_key(job, client)
    pattern = roles.device(job, client).topics[names.EXCHANGE].write
    assert fits(pattern, own)
    assert fits(pattern, key) == (key == own)
    assert not any(fits(pattern, near) for near in (f"x{own}", f"x.{own}", f"{own}x", f"{own}.x", f"{own}\n", own[:-1]))


@given(IDS, IDS)
def test_a_device_touches_one_exchange_and_nothing_else(job, client):
    allowed = roles.device(job, client).permission
    objects = [
        names.DEAD_EXCHANGE, names.LOG_EXCHANGE, names.AUDIT_QUEUE, names.queue(job), names.dead_queue(job),
        "amq.default", "amq.topic", "\n", f"{names.EXCHANGE}\n", f"x{names.EXCHANGE}", "fedmqxupdates", "amq.gen-x",
    ]  # fmt: skip
    assert fits(allowed.write, names.EXCHANGE)
    assert not any(fits(allowed.write, name) for name in objects)
    assert not any(fits(p, name) for p in (allowed.read, allowed.configure) for name in [*objects, names.EXCHANGE])


@given(IDS, IDS)
def test_an_aggregator_has_its_jobs_queues_and_no_others(job, other):
    role = roles.aggregator(job)
    for of in (names.queue, names.dead_queue):
        assert fits(role.permission.configure, of(job))
        assert fits(role.permission.configure, of(other)) == (job == other)
        assert fits(role.permission.read, of(other)) == (job == other)
        assert not fits(role.permission.configure, of(job) + ".more")
        assert not fits(role.permission.read, of(job) + "\n")
    assert not fits(role.permission.configure, names.EXCHANGE)
    assert not fits(role.permission.configure, names.DEAD_EXCHANGE)
    assert not fits(role.permission.write, names.EXCHANGE)
    key = names.routing_key(other, "x")
    assert fits(role.topics[names.EXCHANGE].read, key) == (job == other)
    assert fits(role.topics[names.DEAD_EXCHANGE].write, key) == (job == other)
    assert not fits(role.topics[names.EXCHANGE].write, names.routing_key(job, "x"))
    assert not fits(role.topics[names.EXCHANGE].read, "#")


def test_only_the_operator_has_a_tag():
    others = [roles.device("j", "c"), roles.aggregator("j"), roles.exporter()]
    assert [role.tags for role in others] == [(), (), ()]
    assert roles.operator().tags == ("administrator",)


@given(IDS, IDS, IDS, IDS)
def test_no_two_identities_share_a_login(job, client, other_job, other_client):
    if (job, client) != (other_job, other_client):
        assert names.device_login(job, client) != names.device_login(other_job, other_client)
    services = [names.service_login(role, other_job) for role in ("aggregator", "evaluator")]
    fixed = [names.OPERATOR, names.EXPORTER, names.REDIS_EXPORTER, "default", "guest"]
    assert names.device_login(job, client) not in [*services, *fixed]


@given(IDS)
def test_each_service_finds_its_rules_by_its_login(job):
    assert server_logins.broker_role(names.service_login("aggregator", job)) == roles.aggregator(job)
    assert server_logins.broker_role(names.service_login("evaluator", job)) is None
    assert server_logins.store_rules(names.service_login("aggregator", job)) == redis_acl.aggregator_rules(job)
    assert server_logins.store_rules(names.service_login("evaluator", job)) == redis_acl.evaluator_rules(job)


@pytest.mark.parametrize(
    "rules",
    [redis_acl.device_rules("j", "c"), redis_acl.aggregator_rules("j"), redis_acl.evaluator_rules("j"),
     redis_acl.exporter_rules(), redis_acl.redis_exporter_rules()],
)  # fmt: skip
def test_everything_not_named_is_refused(rules):
    """Patterns are only of FedMQ's own keys, and `-@all` comes before everything that is allowed."""
    assert all(rule.startswith(("~fedmq:", "%R~fedmq:")) for rule in rules[: rules.index("-@all")])
    assert {rule for rule in rules if rule.startswith("+@")} <= {"+@connection"}
    assert not any(rule[0] in "~%&" or rule in ("allkeys", "allcommands") for rule in rules[rules.index("-@all") :])
    assert not any(name in rule for rule in rules for name in ("waitaof", "setinfo"))  # Redis 7.0 knows neither


def test_a_password_stands_nowhere_in_a_line_of_users():
    line = redis_acl.acl_line("j.c", "very secret", redis_acl.device_rules("j", "c"))
    assert "secret" not in line
    assert line.startswith("user j.c on #")
    assert "fedmq:{j}:outcomes:c" in line
