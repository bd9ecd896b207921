"""Every impossible combination is one message that names the option and what is allowed, before anything runs."""

import json

import pytest

from ops.simulation.plan import NOT_SIMULATED, fields, option_names, plain_plan, plan_of, share_settings
from shared.compression import PRESETS
from shared.config import AggregatorSettings
from shared.errors import SettingsError
from shared.rules import RULES

ENDED = {"updates": 100}
WRONG = [
    ({"updates": 0}, ["say how long to run: updates or hours"]),
    ({"cleints": 5}, ["cleints: no such option; did you mean clients?"]),
    ({"qqqqq": 5}, ["qqqqq: no such option; there are task, "]),
    ({"prefetch": 5}, ["prefetch: no such option"]),
    ({"clients": 0}, ["clients=0", "greater than or equal to 1"]),
    ({"clients": "many"}, ["clients=many", "integer"]),
    ({"hours": -1}, ["hours=-1"]),
    ({"hours": "inf"}, ["hours=inf", "finite"]),
    ({"rest_s": "nan"}, ["rest_s=nan"]),
    ({"seed": 2**32}, ["seed=4294967296", "less than 4294967296"]),
    ({"concurrency": 101}, ["concurrency=101 exceeds clients=100"]),
    ({"clients": 5, "buffer_size": 6}, ["buffer_size=6 exceeds clients=5"]),
    ({"rule": "fedavg", "concurrency": 5}, ["buffer_size=10 exceeds concurrency=5", "fedavg"]),
    ({"updates": 9}, ["updates=9 never fill one buffer_size=10"]),
    ({"rule": "ringleader"}, ["ringleader", "steps=1"]),
    ({"rule": "fedbuf"}, ["rule=fedbuf", "fedbuff", "did you mean fedbuff?"]),
    ({"rule": "fadas(delay=-1)"}, ["rule=fadas(delay=-1)", "delay", "a number in [0, "]),
    ({"rule": "fedasync", "buffer_size": 5}, ["BUFFER_SIZE means nothing", "fedasync"]),
    ({"rule": "fedbuff", "alpha": 0.5}, ["ALPHA means nothing", "fedbuff"]),
    ({"robust": "krum(attackers=5)"}, ["krum", "needs at least 13"]),
    ({"robust": "zeno"}, ["TRUSTED_CLIENT must be given for zeno"]),
    ({"robust": "zeno", "trusted_client": "client-7"}, ["trusted_client=client-7 is one of the devices"]),
    ({"trusted_client": "judge"}, ["TRUSTED_CLIENT=judge does nothing without zeno or aflguard"]),
    ({"codec": "auto"}, ["codec=auto", "choose none, safe, balanced, tiny"]),
    ({"codec": "int9"}, ["codec=int9", "int8"]),
    ({"speed": "fast"}, ["speed: fast: must be one of constant(seconds)"]),
    ({"speed": "trace:/no/such"}, ["speed: cannot read the trace /no/such"]),
    ({"persistent": False, "correlated": True}, ["speed: lognormal", "only where speeds are persistent"]),
    ({"availability": "sometimes"}, ["availability: must be one of always"]),
    ({"availability": "churn(2)"}, ["availability: churn: on is 2, must be a number in [0.001, 1]"]),
    ({"dropout": 1}, ["dropout=1", "less than 1"]),
    ({"up_mbps": "inf"}, ["network: up_mbps is inf"]),
    ({"attackers": 0.2, "attack": ""}, ["attackers=0.2 need an attack: sign_flip, noise, flood"]),
    ({"attack": "flip"}, ["attack=flip", "must be one of sign_flip(scale)"]),
    ({"stop_at_target": True}, ["stop_at_target needs a target"]),
    ({"task_settings": "steps"}, ["task_settings", "a=1,b=2"]),
    ({"staleness_max": -1}, ["staleness_max=-1"]),
    ({"rule": "fedavg", "staleness_max": 3}, ["STALENESS_MAX=3", "leave it at 0"]),
]  # fmt: skip


@pytest.mark.parametrize(("options", "parts"), WRONG, ids=[str(options) for options, _ in WRONG])
def test_what_is_wrong_is_named_with_what_is_allowed(options, parts):
    with pytest.raises(SettingsError) as caught:
        plan_of(ENDED | options)
    message = str(caught.value)
    assert all(part in message for part in parts), message
    assert "FEDMQ_" not in message.replace("FEDMQ_RULE", "")
    assert message.startswith("this simulation needs a change:")


def test_all_problems_stand_in_one_message():
    with pytest.raises(SettingsError) as caught:
        plan_of({"concurrency": 101, "cleints": 1, "speed": "fast", "codec": "int9"}, "mine.toml")
    assert str(caught.value).startswith("mine.toml needs a change:")
    assert len(str(caught.value).splitlines()) == 6


def test_what_is_not_given_does_not_come_from_the_environment(monkeypatch):
    monkeypatch.setenv("FEDMQ_BUFFER_SIZE", "3")
    monkeypatch.setenv("FEDMQ_SEED", "3")
    plan = plan_of(ENDED)
    assert plan.aggregator.buffer_size == AggregatorSettings.model_fields["buffer_size"].default
    assert plan.fleet.seed == 0


@pytest.mark.parametrize("rule", RULES)
def test_a_plan_survives_being_written_down(rule):
    given = ENDED | {"rule": rule, "task_settings": "steps=1,lr=0.5", "availability": "churn(0.5) & diurnal(8)"}
    plan = plan_of(given)
    again = plan_of(json.loads(json.dumps(plain_plan(plan, given=True))))
    assert again == plan
    assert plain_plan(again) == plain_plan(plan)


def test_only_what_means_something_to_the_rule_is_shown():
    assert "alpha" not in plain_plan(plan_of(ENDED))
    assert "buffer_size" not in plain_plan(plan_of(ENDED | {"rule": "fedasync"}))
    assert not NOT_SIMULATED & plain_plan(plan_of(ENDED)).keys()


def test_options_are_the_fleets_and_the_jobs():
    assert option_names()[0] == "task"
    assert {"rule", "codec", "clients", "seed"} <= set(option_names())
    assert not NOT_SIMULATED & set(option_names())
    assert all(field.description for field in fields().values())


def test_rules_that_count_their_workers_know_how_many_there_are():
    assert plan_of(ENDED | {"rule": "ca2fl", "clients": 37}).aggregator.clients == 37


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_but_auto_can_be_simulated(preset):
    assert plan_of(ENDED | {"codec": preset})


def test_rules_without_a_buffer_do_not_wait_for_one():
    assert plan_of({"rule": "fedasync", "updates": 1, "clients": 2})


@pytest.mark.parametrize("name", ["judge", "client-100", "client-07", "7", "client-", "server-7"])
def test_the_trusted_device_has_a_name_of_its_own(name):
    plan = plan_of(ENDED | {"robust": "zeno", "trusted_client": name})
    assert plan.trusted == 100
    assert plan.devices == 101


def test_every_device_knows_its_share():
    fleet = plan_of(ENDED | {"partition": "dirichlet(0.3)", "task_settings": "lr=1"}).fleet
    assert share_settings(fleet, 3) == {"lr": "1", "partition": "dirichlet(0.3)", "share": "3", "shares": "100"}
    assert share_settings(fleet, 100) == {"lr": "1", "partition": "iid", "share": "0", "shares": "100"}
    assert share_settings(plan_of(ENDED).fleet, 3) == {"share": "3", "shares": "100"}
