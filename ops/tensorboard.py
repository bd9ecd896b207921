"""TensorBoard's event files, for runs and for the evaluator; its package is an extra."""

from pathlib import Path
from typing import Any

from shared.errors import SettingsError

FLUSH_S = 10  # so old is what TensorBoard shows at most


def check(asked_by: str) -> None:
    """See to it that the package is there.

    Args:
        asked_by: the option or setting that wants it, for the message.

    Raises:
        SettingsError: it is not.
    """
    try:
        import torch.utils.tensorboard  # noqa: F401
    except ImportError as error:
        raise SettingsError(f"{asked_by}: {error}; pip install 'fedmq[tensorboard]'") from error


def writer(folder: Path, asked_by: str) -> Any:
    """Return a `SummaryWriter` that adds to a folder.

    Raises:
        SettingsError: the package is missing, or the folder cannot be written.
    """
    check(asked_by)
    from torch.utils.tensorboard import SummaryWriter

    try:
        folder.mkdir(parents=True, exist_ok=True)
        return SummaryWriter(str(folder), flush_secs=FLUSH_S)
    except OSError as error:
        raise SettingsError(f"{asked_by}={folder}: {error.strerror}") from error
