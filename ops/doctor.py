"""`fedmq doctor`: checks everything a program needs, each ok or with the mend; on a device: `fedmq worker --check`."""

import time

from rich.console import Console

from ops.handshake import certificate_end
from shared.command import DONE, FAILED
from shared.config import WorkerSettings
from shared.errors import SettingsError
from shared.logs import log_to_stderr
from shared.store.redis import RedisStore
from shared.transport.rabbitmq import queue_depths
from worker.check import Group, broker, clock, fits, job, report
from worker.task import Context, Task, read

CONNECT_S = 6.0
SOON_DAYS = 21.0  # as the alert CertificateNearEnd


def examine(settings: WorkerSettings) -> int:
    """Print one line per check; return the exit code."""
    log_to_stderr("error", settings.log_format)  # each finding has its line
    store = RedisStore(settings.store_url, settings.job)
    groups: list[Group] = [
        [("broker", lambda: broker(settings))],
        [("queues", lambda: _queues(settings))],
        [("store", lambda: f"Redis {RedisStore(settings.store_url, settings.job, durable=False).check()}")],
        [("durability", lambda: _durability(settings))],
        [("certificate", lambda: _certificates(settings))],
        [("clock", lambda: clock(store))],
        [("job", lambda: job(store, settings.job))],
    ]
    if settings.task:
        groups.append([("task", lambda: _task(settings, store))])
    return FAILED if report(groups, Console()) != DONE else DONE


def _queues(settings: WorkerSettings) -> str:
    depths = queue_depths(settings.broker_url, settings.job, CONNECT_S)
    if depths["updates"] < 0:
        raise SettingsError(f"job {settings.job!r} has no queue yet: start its aggregator once")
    if depths["consumers"] == 0:
        raise SettingsError(f"no aggregator of job {settings.job!r} is connected; {depths['updates']} updates wait")
    return f"{depths['consumers']} aggregator(s), {depths['updates']} updates waiting, {depths['dead']} dead letters"


def _durability(settings: WorkerSettings) -> str:
    RedisStore(settings.store_url, settings.job).check()
    return "a commit is on disk before it is acknowledged"


def _certificates(settings: WorkerSettings) -> str:
    """Say when the servers' certificates end."""
    now, days = time.time(), {}
    for name, url in (("RabbitMQ", settings.broker_url), ("Redis", settings.store_url)):
        try:
            end = certificate_end(url, now)
        except (OSError, ValueError) as error:
            raise SettingsError(f"{name}'s certificate cannot be looked at: {error}") from error
        if end is not None:
            days[name] = (end - now) / 86_400
    soon = [f"{name}'s in {left:.0f} days" for name, left in days.items() if left < SOON_DAYS]
    if soon:
        raise SettingsError(
            f"certificates end soon: {', '.join(soon)}; then nobody can connect. `make renew`, or `fedmq secrets make` "
            "and restart the servers"
        )
    return ", ".join(f"{name}'s good for {left:.0f} days" for name, left in days.items()) or "none: without TLS"


def _task(settings: WorkerSettings, store: RedisStore) -> str:
    task = Task.load(settings.task)
    model = task.build()
    fits(settings, read(model).layout, store)
    started = time.perf_counter()
    result = task.train(model, Context(settings.client_id, 0, settings.seed, settings.task_settings))
    seconds = time.perf_counter() - started
    return f"{task.name}: one training of {result.num_samples} samples, {result.num_steps} steps took {seconds:.1f} s"
