"""`fedmq models init`: the first version of a job."""

import time
from pathlib import Path

from shared.config import EvaluatorSettings
from shared.errors import SettingsError
from shared.layout import difference
from shared.logs import log_to_stderr
from shared.store.redis import RedisStore
from worker.task import Task, read


def init(settings: EvaluatorSettings, out: Path | None, if_missing: bool) -> None:
    """Build a task's model and store it as version 0, or write it to a file.

    Args:
        settings: job, store and task.
        out: write a safetensors file instead.
        if_missing: a job that has a model of the same layout is left as it is.

    Raises:
        SettingsError: the job has a model already, or the task is unusable.
    """
    log_to_stderr(settings.log_level, settings.log_format)
    image = read(Task.load(settings.task, needs=("build",)).build())
    size = f"{image.layout.num_params:,} parameters in {len(image.layout.tensors)} tensors"
    if out is not None:
        image.save(out)
        print(f"wrote {out}: {size}; start a job from it with FEDMQ_INIT_MODEL={out}")
        return
    store = RedisStore(settings.store_url, settings.job)
    if store.create(image, time.time()):
        print(f"version 0 of job {settings.job}: {size}, layout {image.layout.hash[:12]}")
        return
    head = store.head()
    if not if_missing or head is None:
        raise SettingsError(f"job {settings.job!r} has a model already: choose another --job")
    if head.layout != image.layout.hash:
        raise SettingsError(
            f"job {settings.job!r} has a model of another layout: {difference(image.layout, store.layout())}; choose "
            "another --job"
        )
    print(f"job {settings.job} is at version {head.version} already: {size}, layout {head.layout[:12]}")
