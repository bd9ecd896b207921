"""Logs as JSON: one object a line whatever happens, the wrong settings and the crash included."""

import json
import logging
import os
import subprocess
import sys
import threading
from datetime import UTC, datetime

import pytest

from shared.command import FAILED, USAGE
from shared.logs import JsonLines, log_to_stderr

PROGRAM = """
import threading, typer, warnings, logging
from shared.command import settings_command
from shared.config import WorkerSettings
from shared.errors import TaskError
from shared.logs import log_to_stderr

def run(settings):
    log_to_stderr(settings.log_level, settings.log_format, job=settings.job, client=settings.client_id)
    log = logging.getLogger("fedmq.worker")
    log.info("begun with %d of %s", 7, "two\\nlines \\u00e9 \\udc80")
    warnings.warn("old numpy")
    thread = threading.Thread(target=lambda: 1 / 0, name="aside")
    thread.start(); thread.join()
    if settings.seed == 1:
        raise RuntimeError("a bug")
    try:
        open("/no/such")
    except OSError as error:
        raise TaskError("train() raised") from error

app = typer.Typer(add_completion=False)
settings_command(app, "go", WorkerSettings, run, "Help.")
app()
"""


def run(*arguments, **variables):
    clean = {name: value for name, value in os.environ.items() if not name.startswith("FEDMQ_")}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *arguments], env=clean | variables, capture_output=True, text=True, check=False,
        timeout=60,
    )  # fmt: skip
    return done.returncode, done.stderr.splitlines()


def events_of(lines):
    events = [json.loads(line) for line in lines]
    for event in events:
        assert {"ts", "level", "logger", "message"} <= event.keys()
        at = datetime.fromisoformat(event["ts"])
        assert event["ts"].endswith("Z")
        assert abs((datetime.now(UTC) - at).total_seconds()) < 120
    return events


def test_every_line_is_an_object_that_names_job_and_client():
    code, lines = run("--log-format", "json", "--job", "j", "--client-id", "phone-1")
    events = events_of(lines)
    assert code == FAILED
    assert all((event["job"], event["client"]) == ("j", "phone-1") for event in events)
    assert events[0] | {"ts": ""} == {
        "ts": "", "level": "info", "logger": "fedmq.worker", "message": "begun with 7 of two\nlines é \udc80",
        "job": "j", "client": "phone-1",
    }  # fmt: skip
    assert any("old numpy" in event["message"] for event in events)
    [aside] = [event for event in events if "ZeroDivisionError" in event["message"]]
    assert aside["exc_info"].startswith("Traceback")
    assert (events[-1]["message"], events[-1]["exit_code"]) == ("train() raised", FAILED)
    assert "FileNotFoundError" in events[-1]["exc_info"]


def test_a_crash_is_an_event():
    code, lines = run("--seed", "1", FEDMQ_LOG_FORMAT="json")
    last = events_of(lines)[-1]
    assert code == 1
    assert (last["level"], last["message"]) == ("critical", "RuntimeError: a bug")
    assert 'raise RuntimeError("a bug")' in last["exc_info"] or "RuntimeError: a bug" in last["exc_info"]


@pytest.mark.parametrize(
    ("arguments", "variables"),
    [(["--log-format", "json", "--hours", "99"], {}), (["--hours", "99"], {"FEDMQ_LOG_FORMAT": "json"})],
)
def test_wrong_settings_are_one_event_too(arguments, variables):
    code, lines = run(*arguments, **variables)
    [event] = events_of(lines)
    assert code == USAGE
    assert "FEDMQ_HOURS=99" in event["message"]
    assert event["exit_code"] == USAGE


def test_text_stays_as_it_was():
    code, lines = run("--job", "j")
    assert code == FAILED
    assert " INFO    fedmq.worker: begun with 7 of two" in lines[0]
    assert lines[-1] == "fedmq: train() raised"
    assert any(line.startswith("FileNotFoundError") for line in lines)


def test_another_format_is_refused():
    code, lines = run("--log-format", "xml")
    assert code == USAGE
    assert any("FEDMQ_LOG_FORMAT=xml" in line for line in lines)


def test_what_json_cannot_write_is_written_as_text():
    record = logging.LogRecord("fedmq", logging.INFO, "", 0, "%s", (object(),), None)
    assert json.loads(JsonLines({"job": "j"}).format(record))["message"].startswith("<object")


def test_pikas_own_chatter_stays_out(capsys):
    before = sys.excepthook, threading.excepthook
    try:
        log_to_stderr("debug", "json", job="j")
        logging.getLogger("pika.adapters").error("socket closed")
        logging.getLogger("any.other").debug("here")  # a simulation before may have quietened "fedmq"
    finally:
        sys.excepthook, threading.excepthook = before
        log_to_stderr("warning")
    assert [json.loads(line)["message"] for line in capsys.readouterr().err.splitlines()] == ["here"]
