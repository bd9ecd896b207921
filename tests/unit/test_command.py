"""Exit codes, options made from settings, waiting for servers."""

import os
import threading

import pytest
import typer
from typer.testing import CliRunner

from shared.command import DONE, FAILED, INTERRUPTED, UNREACHABLE, USAGE, exit_codes, settings_command, wait_for_servers
from shared.config import AggregatorSettings, WorkerSettings
from shared.errors import (
    BrokerUnavailable,
    PublishRefused,
    PublishUnconfirmed,
    SettingsError,
    StoreUnavailable,
    TaskError,
    VersionGone,
)


@pytest.fixture(autouse=True)
def _clean(monkeypatch):
    for name in list(os.environ):
        if name.upper().startswith("FEDMQ_"):
            monkeypatch.delenv(name)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (SettingsError("x"), USAGE), (BrokerUnavailable("x"), UNREACHABLE), (StoreUnavailable("x"), UNREACHABLE),
        (PublishUnconfirmed("x"), UNREACHABLE), (PublishRefused("x"), FAILED), (TaskError("x"), FAILED),
        (VersionGone("x"), FAILED), (KeyboardInterrupt(), INTERRUPTED),
    ],
)  # fmt: skip
def test_every_error_has_its_documented_exit_code(error, code, capsys):
    with pytest.raises(typer.Exit) as caught, exit_codes():
        raise error
    assert caught.value.exit_code == code
    assert capsys.readouterr().err.startswith("fedmq: ")


def test_the_exit_codes_are_those_of_the_contract():
    assert (DONE, FAILED, USAGE, UNREACHABLE, INTERRUPTED) == (0, 1, 2, 3, 130)


def test_a_mistake_in_the_program_is_not_hidden():
    with pytest.raises(ZeroDivisionError), exit_codes():
        1 / 0  # noqa: B018


def invoke(kind, *arguments, environment=None):
    app, seen = typer.Typer(), []
    settings_command(app, "go", kind, seen.append, "Help.")
    result = CliRunner(env=environment or {}).invoke(app, list(arguments))
    return result, (seen[0] if seen else None)


def test_an_option_wins_over_the_environment():
    _, settings = invoke(WorkerSettings, "--job", "flag", environment={"FEDMQ_JOB": "env", "FEDMQ_SEED": "4"})
    assert (settings.job, settings.seed) == ("flag", 4)


@pytest.mark.parametrize(("flag", "expected"), [("--weight-by-samples", True), ("--no-weight-by-samples", False)])
def test_a_boolean_setting_is_a_pair_of_flags(flag, expected):
    _, settings = invoke(AggregatorSettings, flag, environment={"FEDMQ_WEIGHT_BY_SAMPLES": str(not expected)})
    assert settings.weight_by_samples is expected


@pytest.mark.parametrize("kind", [AggregatorSettings, WorkerSettings])
def test_every_setting_is_an_option(kind):
    app = typer.Typer()
    settings_command(app, "go", kind, print, "Help.")
    names = {option for parameter in typer.main.get_command(app).params for option in parameter.opts}
    assert {"--" + name.replace("_", "-") for name in kind.model_fields} <= names


def test_wrong_settings_exit_with_2_and_say_all():
    result, settings = invoke(AggregatorSettings, "--buffer-size", "0", "--job", "a b")
    assert (result.exit_code, settings) == (USAGE, None)
    assert "FEDMQ_BUFFER_SIZE=0" in result.output
    assert "FEDMQ_JOB=a b" in result.output


def test_waiting_tries_again_until_the_server_answers():
    answers = [StoreUnavailable("no"), StoreUnavailable("no"), None]

    class Stop(threading.Event):
        def wait(self, timeout=None):
            return False

    def attempt():
        error = answers.pop(0)
        if error:
            raise error

    wait_for_servers(attempt, 60.0, Stop())
    assert not answers


def test_without_patience_the_first_failure_is_the_answer():
    calls = []

    def attempt():
        calls.append(1)
        raise StoreUnavailable("no")

    with pytest.raises(StoreUnavailable):
        wait_for_servers(attempt, 0.0, threading.Event())
    assert len(calls) == 1


def test_another_error_is_not_waited_out():
    def attempt():
        raise SettingsError("wrong password")

    with pytest.raises(SettingsError):
        wait_for_servers(attempt, 60.0, threading.Event())
