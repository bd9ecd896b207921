"""The settings of the worked tasks: what is read, and what is refused with its name, its value and what is allowed."""

from dataclasses import dataclass, fields, replace

import numpy as np
import pytest

from shared.errors import SettingsError
from worker.tasks import digits, mnist, mushrooms, shakespeare
from worker.tasks.options import RANGES, Data, Training, dealt, read, share_for

DEFAULTS = Training()
TASKS = {"digits": digits, "mnist": mnist, "shakespeare": shakespeare, "mushrooms": mushrooms}


def refused(settings, defaults=DEFAULTS):
    with pytest.raises(SettingsError) as caught:
        read(settings, defaults)
    return str(caught.value)


def test_nothing_set_is_the_defaults():
    assert read({}, DEFAULTS) == DEFAULTS


def test_everything_is_read():
    settings = {
        "share": "3", "shares": "20", "partition": " dirichlet(0.1)", "epochs": "4", "steps": "7", "batch": "8",
        "lr": "0.5", "momentum": "0.9", "proximal": "0.01", "clip": "2", "weight": "class",
    }  # fmt: skip
    assert settings.keys() == {field.name for field in fields(Training)}
    assert read(settings, DEFAULTS) == Training(
        3, 20, "dirichlet(alpha=0.1)", 4, 7, 8, 0.5, 0.9, 0.01, 2.0, "class"
    )  # fmt: skip


def test_whole_numbers_are_int_and_others_float():
    options = read(dict.fromkeys(("share", "shares", "epochs", "steps", "batch", "lr", "clip"), "1"), DEFAULTS)
    assert [type(v) for v in (options.share, options.shares, options.batch, options.steps)] == [int] * 4
    assert [type(v) for v in (options.lr, options.clip)] == [float] * 2


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("lr", "0", "a number in (0, 1000]"),
        ("lr", "fast", "a number in (0, 1000]"),
        ("lr", "nan", "a number in (0, 1000]"),
        ("momentum", "1", "a number in [0, 1)"),
        ("epochs", "0", "a whole number in [1, 1e+06]"),
        ("steps", "-1", "a whole number in [0, 1e+06]"),
        ("batch", "1.5", "a whole number in [1, 1e+06]"),
        ("share", "-1", "a whole number in [0, 1e+06]"),
        ("weight", "all", "must be one of none, class"),
        ("partition", "even", "must be one of iid, consecutive, dirichlet(alpha)"),
        ("partition", "dirichlet(0)", "alpha is 0, must be a number in [0.001, 1e+06]"),
    ],
)
def test_what_is_not_allowed_is_told_with_name_value_and_range(name, value, allowed):
    text = refused({name: value})
    assert f"task setting {name}={value}: " in text
    assert allowed in text


def test_an_unknown_setting_is_told_with_those_there_are():
    assert refused({"epoch": "3"}).startswith("no task setting epoch; did you mean epochs? There are share, shares,")
    assert "no task setting zzz; there are share, shares, partition" in refused({"zzz": "3"})
    assert "no task setting samples;" in refused({"samples": "3"})
    assert read({"samples": "3"}, mnist.DEFAULTS).samples == 3


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_every_setting_of_a_task_can_be_given_and_its_default_is_allowed(task):
    for field in fields(task.DEFAULTS):
        value = getattr(task.DEFAULTS, field.name)
        if field.name != "share":
            read({field.name: str(value)}, task.DEFAULTS)
        assert field.name in RANGES or field.name in ("partition", "weight")
    assert {"share", "shares"} <= {field.name for field in fields(task.DEFAULTS)}  # what every fleet sets


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_a_tasks_own_settings_are_documented(task):
    common = {field.name for field in fields(Training)}
    for field in fields(task.DEFAULTS):
        if field.name not in common or task is mushrooms:
            assert f"`{field.name}`" in task.__doc__


@dataclass(frozen=True, slots=True)
class _Own(Data):
    lr: float = 3.0


def test_a_task_may_leave_settings_out():
    assert read({"lr": "4"}, _Own()) == replace(_Own(), lr=4.0)
    assert "no task setting batch" in refused({"batch": "4"}, _Own())


def test_the_share_is_chosen_or_follows_from_the_id():
    assert share_for("w", Data(share=13)) == 3
    assert share_for("w", Data(share=0)) == 0
    assert {share_for(f"w{i}", Data()) for i in range(100)} == set(range(10))


def test_data_that_cannot_be_dealt_are_a_settings_error():
    with pytest.raises(SettingsError, match=r"task setting partition=shards\(3\): 4 shares of 3 shards .* 9 examples"):
        dealt(np.zeros(9, np.int64), 4, "shards(3)")
    with pytest.raises(SettingsError, match="20 shares of 9 examples"):
        dealt(np.zeros(9, np.int64), 20, "iid")
