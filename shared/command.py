"""What every command-line program shares: options from settings, logging, exit codes, a clean stop."""

import inspect
import logging
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, TypeVar

import typer
from pydantic.fields import FieldInfo

from shared.config import Settings, load
from shared.errors import FedMQError, SettingsError, TaskError, Unavailable
from shared.logs import JSON, is_json, log_to_stderr

DONE, FAILED, USAGE, UNREACHABLE, INTERRUPTED = 0, 1, 2, 3, 130

log = logging.getLogger("fedmq")

S = TypeVar("S", bound=Settings)


def settings_command(
    app: typer.Typer, name: str, kind: type[S], run: Callable[[S], None], help_text: str,
    check: Callable[[Callable[[], S]], int] | None = None,
) -> None:  # fmt: skip
    """Add a command whose options are the fields of its settings; an option given wins over everything.

    Args:
        app: the program.
        name: of the command.
        kind: its settings.
        run: called with the checked settings.
        help_text: shown by --help.
        check: called instead with a function that loads the settings, when --check is given; returns the exit code.
    """

    def command(**flags: Any) -> None:
        checks = flags.pop("check", False)
        if (flags.get("log_format") or os.environ.get("FEDMQ_LOG_FORMAT")) == JSON:
            log_to_stderr("info", JSON)  # also what is wrong with the settings
        with exit_codes():
            if check is not None and checks:
                raise typer.Exit(check(lambda: load(kind, flags)))
            run(load(kind, flags))

    config = typer.Option("--config", help="TOML file with settings, e.g. a device's; FEDMQ_CONFIG")
    parameters = [
        inspect.Parameter(
            "config", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[Path | None, config]
        )
    ]
    if check is not None:
        only = typer.Option("--check", help="look whether it could work here, say what is wrong, and end")
        keyword = inspect.Parameter.KEYWORD_ONLY
        parameters.append(inspect.Parameter("check", keyword, default=False, annotation=Annotated[bool, only]))
    parameters += [setting_option(field, info) for field, info in kind.model_fields.items()]
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    app.command(name, help=help_text)(command)


def setting_option(name: str, info: FieldInfo) -> inspect.Parameter:
    """Return the command-line option of one setting; what is not given is None."""
    option = "--" + name.replace("_", "-")
    is_bool = info.annotation is bool
    declaration = f"{option}/--no-{name.replace('_', '-')}" if is_bool else option
    unset = info.default_factory or info.default is None or info.default == ""
    hint = typer.Option(
        declaration, help=f"{info.description}{'' if unset else f' [default: {info.default}]'}", show_default=False
    )
    kind: Any = bool | None if is_bool else str | None
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind, hint])


@contextmanager
def exit_codes() -> Iterator[None]:
    """Turn the errors a user can mend into one message and the documented exit code."""
    try:
        yield
    except SettingsError as error:
        _leave(str(error), USAGE)
    except Unavailable as error:
        _leave(str(error), UNREACHABLE)
    except TaskError as error:
        _leave(str(error), FAILED, error.__cause__)  # the user's own code: they need the line
    except FedMQError as error:
        _leave(str(error), FAILED)
    except KeyboardInterrupt:
        _leave("interrupted", INTERRUPTED)


def _leave(message: str, code: int, cause: BaseException | None = None) -> None:
    if is_json():
        log.error("%s", message, exc_info=cause, extra={"exit_code": code})
    else:
        if cause is not None:
            traceback.print_exception(cause)
        print(f"fedmq: {message}", file=sys.stderr)
    raise typer.Exit(code)


def stop_on_signals(stop: threading.Event) -> None:
    """Set `stop` on the first SIGTERM or SIGINT; a second one ends the program at once."""

    def handle(number: int, _frame: FrameType | None) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        log.info("%s: finishing; once more to leave at once", signal.Signals(number).name)
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, handle)


def wait_for_servers(attempt: Callable[[], object], wait_s: float, stop: threading.Event) -> None:
    """Call `attempt` until it no longer raises `Unavailable`, for `wait_s` seconds.

    Raises:
        Unavailable: the last one, when the time is over.
    """
    from tenacity import (
        Retrying,
        retry_if_exception_type,
        sleep_using_event,
        stop_after_delay,
        stop_when_event_set,
        wait_random_exponential,
    )

    retrying = Retrying(
        retry=retry_if_exception_type(Unavailable),
        stop=stop_after_delay(wait_s) | stop_when_event_set(stop),
        wait=wait_random_exponential(multiplier=0.2, max=5),
        sleep=sleep_using_event(stop),
        before_sleep=lambda state: log.warning("%s; waiting", state.outcome and state.outcome.exception()),
        reraise=True,
    )
    try:
        retrying(attempt)
    except Unavailable:
        if stop.is_set():  # asked to end while waiting
            raise KeyboardInterrupt from None
        raise
