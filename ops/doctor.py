"""`fedmq doctor`: checks everything a program needs, each ok or with the mend."""

import time
from collections.abc import Callable

from rich.console import Console

from shared.command import FAILED, log_to_stderr
from shared.config import WorkerSettings
from shared.errors import FedMQError, SettingsError
from shared.layout import difference
from shared.store.redis import RedisStore
from shared.transport.rabbitmq import RabbitSink, queue_depths
from worker.task import Context, Task, read

CLOCK_S_MAX = 30.0  # created_at of a device whose clock is further off makes latencies meaningless
CONNECT_S = 6.0


def examine(settings: WorkerSettings) -> int:
    """Print one line per check; return the exit code."""
    log_to_stderr("error")  # each finding has its line
    store = RedisStore(settings.store_url, settings.job)
    checks: list[tuple[str, Callable[[], str]]] = [
        ("broker", lambda: _broker(settings)),
        ("queues", lambda: _queues(settings)),
        ("store", lambda: f"Redis {RedisStore(settings.store_url, settings.job, durable=False).check()}"),
        ("durability", lambda: _durability(settings)),
        ("clock", lambda: _clock(store)),
        ("job", lambda: _job(store, settings.job)),
    ]
    if settings.task:
        checks.append(("task", lambda: _task(settings, store)))
    console, failed = Console(), 0
    for name, check in checks:
        try:
            console.print(f"[green]ok[/]    {name:<11}{check()}", highlight=False)
        except FedMQError as error:
            failed += 1
            console.print(f"[red]wrong[/] {name:<11}{error}", highlight=False, soft_wrap=True)
    return FAILED if failed else 0


def _broker(settings: WorkerSettings) -> str:
    sink = RabbitSink(settings.broker_url, settings.client_id)
    try:
        sink.link.wait_ready(CONNECT_S)
        return f"RabbitMQ {sink.link.server_version()}"
    finally:
        sink.close()


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


def _clock(store: RedisStore) -> str:
    skew = time.time() - store.clock()
    if abs(skew) > CLOCK_S_MAX:
        raise SettingsError(f"this clock is {skew:+.0f} s off the store's: set up NTP (chrony or systemd-timesyncd)")
    return f"within {abs(skew) + 1:.0f} s of the store's"


def _job(store: RedisStore, job: str) -> str:
    head = store.head()
    if head is None:
        raise SettingsError(
            f"job {job!r} has no model: `fedmq models init TASK --job {job}`, or, if it had one, `fedmq restore FILE`"
        )
    return f"version {head.version}, {head.num_params:,} parameters"


def _task(settings: WorkerSettings, store: RedisStore) -> str:
    task = Task.load(settings.task)
    model = task.build()
    image = read(model)
    if store.head() is not None and store.layout().hash != image.layout.hash:
        raise SettingsError(f"task {task.name} does not fit the job: {difference(image.layout, store.layout())}")
    started = time.perf_counter()
    result = task.train(model, Context(settings.client_id, 0, settings.seed, settings.task_settings))
    seconds = time.perf_counter() - started
    return f"{task.name}: one training of {result.num_samples} samples, {result.num_steps} steps took {seconds:.1f} s"
