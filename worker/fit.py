"""Whether a task's model is the job's, and its updates no larger than the job takes."""

from collections.abc import Mapping
from typing import Any

from shared.compression import AUTO, parse
from shared.errors import SettingsError
from shared.layout import Layout, difference
from shared.messages import ENVELOPE_BYTES_MAX
from worker.auto import CHOICES


def check_layout(task: str, job: str, mine: Layout, theirs: Layout) -> None:
    """Compare a task's model with the job's; a difference cannot be mended by waiting.

    Raises:
        SettingsError: they differ; the message names the tensor.
    """
    if mine.hash != theirs.hash:
        raise SettingsError(f"task {task} does not fit job {job!r}: {difference(mine, theirs)}")


def payload_bytes_max(layout: Layout, codec: str) -> int:
    """Return the largest payload that a job's codec, or `auto`, makes of this model."""
    return max(parse(each).payload_bytes_max(layout) for each in (CHOICES if codec == AUTO else (codec,)))


def check_size(layout: Layout, job: Mapping[str, Any]) -> None:
    """Compare the largest update with what the job takes.

    Args:
        layout: of the model.
        job: what the job announced.

    Raises:
        SettingsError: an update may be too large.
    """
    limit, name = int(job["update_bytes_max"]), job["codec"]
    size = payload_bytes_max(layout, name) + ENVELOPE_BYTES_MAX
    if size > limit:
        raise SettingsError(
            f"an update of {layout.num_params} parameters as {name} may take {size} bytes, the job's "
            f"update_bytes_max is {limit}: choose a smaller FEDMQ_CODEC for the job, or raise "
            "FEDMQ_UPDATE_BYTES_MAX"
        )
