"""`fedmq worker --check`: looks, on the device itself, at all that can be wrong, and says what to do.

Nothing is changed, and nothing sent: the check may run beside the worker, as whom the worker is to run.
`fedmq doctor` does some of it from anywhere.
"""

import os
import shlex
import shutil
import threading
import time
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from shared import supported
from shared.clock import SystemClock
from shared.command import DONE, FAILED, UNREACHABLE, USAGE
from shared.config import WorkerSettings
from shared.errors import DiskFull, FedMQError, SettingsError, Unavailable
from shared.hours import open_for, seconds_until_open
from shared.layout import Layout
from shared.logs import log_to_stderr
from shared.store.redis import RedisStore
from shared.transport.probe import check_may_publish
from shared.transport.rabbitmq import RabbitSink
from worker.fit import check_layout, check_size, payload_bytes_max
from worker.gate import COMMAND_S_MAX, span
from worker.memory import available_bytes, needed_bytes
from worker.reach import Server, connect, handshake, resolve, server_of
from worker.ready import ask
from worker.task import Task, read

CLOCK_S_MAX = 30.0  # created_at of a device whose clock is further off makes latencies meaningless
CONNECT_S = 6.0
UNSEEN = "; whether that is the job's model cannot be seen without the store"

Check = tuple[str, Callable[[], str]]  # its name, and what says that all is well or raises what is wrong
Group = Sequence[Check]  # each needs the one before: after the first that is wrong the rest says nothing new


def run(load: Callable[[], WorkerSettings]) -> int:
    """Print one line per check; return the exit code.

    Args:
        load: reads the settings.
    """
    log_to_stderr("critical")  # each finding has its line
    console = Console()
    try:
        settings = load()
    except SettingsError as error:
        return report([[("settings", partial(_raise, error))]], console)
    return report(_groups(settings), console)


def report(groups: Sequence[Group], console: Console) -> int:
    """Carry out checks and print a line for each; return the exit code of the first that is wrong."""
    code = DONE
    for group in groups:
        for name, check in group:
            try:
                console.print(f"[green]ok[/]    {name:<13}{escape(check())}", highlight=False, soft_wrap=True)
            except FedMQError as error:
                code = code or _code(error)
                console.print(f"[red]wrong[/] {name:<13}{escape(str(error))}", highlight=False, soft_wrap=True)
                break
    return code


def _code(error: FedMQError) -> int:
    if isinstance(error, SettingsError):
        return USAGE
    return UNREACHABLE if isinstance(error, Unavailable) else FAILED


def _raise(error: SettingsError) -> str:
    raise error


def _groups(settings: WorkerSettings) -> list[Group]:
    """Return all checks of a device, in the order in which one mends what is wrong."""
    store, layout = cache(lambda: RedisStore(settings.store_url, settings.job)), cache(lambda: _layout(settings))
    return [
        [("settings", lambda: f"job {settings.job}, client {settings.client_id}")],
        [
            *_way("broker", "FEDMQ_BROKER_URL", settings.broker_url),
            ("broker-login", lambda: broker(settings)),
            ("publish", lambda: _publish(settings)),
        ],
        [
            *_way("store", "FEDMQ_STORE_URL", settings.store_url),
            ("store-login", lambda: _store(store())),
            ("clock", lambda: clock(store())),
            ("job", lambda: job(store(), settings.job)),
        ],
        [("task", lambda: _task(settings, layout(), store)), ("memory", lambda: _memory(layout(), store))],
        [("folder", lambda: folder(settings))],
        [("hours", lambda: _hours(settings))],
        [("command", lambda: _command(settings))],
    ]


def _way(name: str, setting: str, url: str) -> list[Check]:
    """Return the checks of the way to a server."""
    steps = (("name", resolve), ("port", connect), ("tls", handshake))

    def take(step: Callable[[Server], str]) -> str:
        server = server_of(setting, url)
        return "a socket of this machine" if server is None else step(server)

    return [(f"{name}-{what}", partial(take, step)) for what, step in steps]


def broker(settings: WorkerSettings) -> str:
    """Log in to the broker; return its version."""
    sink = RabbitSink(settings.broker_url, settings.client_id)
    try:
        sink.link.wait_ready(CONNECT_S)
        return f"RabbitMQ {supported.check('RabbitMQ', sink.link.server_version())}"
    finally:
        sink.close()


def _publish(settings: WorkerSettings) -> str:
    check_may_publish(settings.broker_url, settings.job, settings.client_id, CONNECT_S)
    return f"may publish updates of {settings.client_id}"


def _store(store: RedisStore) -> str:
    store.head()
    return "may read the job"


def clock(store: RedisStore) -> str:
    """Compare this clock with the store's."""
    skew = time.time() - store.clock()
    if abs(skew) > CLOCK_S_MAX:
        here = time.strftime("%Y-%m-%d %H:%M", time.gmtime())
        raise FedMQError(
            f"this clock is {skew:+.0f} s off the store's, it says {here} UTC: set up NTP (chrony or systemd-timesyncd)"
        )
    return f"within {abs(skew) + 1:.0f} s of the store's"


def job(store: RedisStore, name: str) -> str:
    """Return where a job stands."""
    head = store.head()
    if head is None:
        raise FedMQError(
            f"job {name!r} has no model: `fedmq models init TASK --job {name}`, or, if it had one, `fedmq restore FILE`"
        )
    return f"version {head.version}, {head.num_params:,} parameters"


def _layout(settings: WorkerSettings) -> Layout:
    return read(Task.load(settings.task).build()).layout


def _task(settings: WorkerSettings, layout: Layout, store: Callable[[], RedisStore]) -> str:
    try:
        opened = store()
    except SettingsError:  # its own line says so
        return f"{_found(settings, layout)}{UNSEEN}"
    return fits(settings, layout, opened)


def _found(settings: WorkerSettings, layout: Layout) -> str:
    return f"{settings.task} builds {layout.num_params:,} parameters"


def fits(settings: WorkerSettings, layout: Layout, store: RedisStore) -> str:
    """Compare the layout of a task's model with the job's, where that can be read."""
    found = _found(settings, layout)
    try:
        head = store.head()
        announced = store.job() if head else {}
    except (Unavailable, SettingsError):
        return f"{found}{UNSEEN}"
    if head is None:
        return found
    check_layout(settings.task, settings.job, layout, store.layout())
    if announced:
        check_size(layout, announced)
    return f"{found}, as the job has them"


def _memory(layout: Layout, store: Callable[[], RedisStore]) -> str:
    try:
        codec = str(store().job().get("codec", "float32"))
    except (Unavailable, SettingsError):
        codec = "float32"
    needed, available = needed_bytes(layout, payload_bytes_max(layout, codec)), available_bytes()
    if available is None:
        return f"about {_mb(needed)} for the model; how much there is cannot be seen on this system"
    if available < needed:
        raise FedMQError(
            f"{_mb(available)} are available, and a worker of this model takes about {_mb(needed)} beside what the "
            "task's own training takes: end something else, or raise MemoryMax"
        )
    return f"{_mb(available)} available, about {_mb(needed)} taken beside the task's own training"


def folder(settings: WorkerSettings) -> str:
    """Look at the folder of the outbox, or where it will be; nothing is made: it would belong to whoever checks."""
    path = settings.state_dir.expanduser() / settings.job / settings.client_id
    here = next(place for place in (path, *path.parents) if place.exists())
    if not here.is_dir():
        raise SettingsError(f"{here} is no folder: FEDMQ_STATE_DIR needs one")
    if not os.access(here, os.W_OK | os.X_OK):
        owner = here.stat().st_uid
        raise SettingsError(
            f"{here} cannot be written by user {os.geteuid()}, it belongs to user {owner}: chown it, run as its owner, "
            "or choose another FEDMQ_STATE_DIR"
        )
    foreign = [file for file in _files(path) if file.stat().st_uid != os.geteuid()]
    if foreign and os.geteuid():
        raise SettingsError(f"{foreign[0]} belongs to user {foreign[0].stat().st_uid}: chown -R {os.geteuid()} {path}")
    free, least = shutil.disk_usage(here).free, settings.disk_free_min_bytes
    if free < least:
        raise DiskFull(
            f"{here} has {_mb(free)} free, FEDMQ_DISK_FREE_MIN_BYTES asks for {_mb(least)}: training would pause"
        )
    waiting = sum(file.name.endswith(".update") for file in _files(path))
    return f"{path}{'' if path.exists() else ' (to be made)'}: {_mb(free)} free, {waiting} updates waiting"


def _files(path: Path) -> list[Path]:
    return sorted(path.iterdir()) if path.is_dir() else []


def _hours(settings: WorkerSettings) -> str:
    local = SystemClock().local()
    if not settings.hours:
        return "always"
    if open_for(settings.hours, local):
        return f"{settings.hours}: open now, {local:%a %H:%M}"
    return f"{settings.hours}: closed now, {local:%a %H:%M}; opens in {span(seconds_until_open(settings.hours, local))}"


def _command(settings: WorkerSettings) -> str:
    if not settings.ready_command:
        return "none"
    answer = ask(shlex.split(settings.ready_command), COMMAND_S_MAX, threading.Event())
    if answer.failed:
        raise SettingsError(f"FEDMQ_READY_COMMAND: {answer.reason}: no training would ever begin")
    return f"says {'yes' if answer.ready else 'no, so training waits'}: {answer.reason}"


def _mb(size_bytes: int) -> str:
    return f"{size_bytes / 1e6:,.0f} MB"
