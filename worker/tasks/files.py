"""Where the worked tasks find their data."""

import os
from pathlib import Path

from shared.errors import SettingsError


def read_bytes(task: str, name: str) -> bytes:
    """Return a file of the folder FEDMQ_DATA.

    Args:
        task: which reads it, for the message.
        name: its path in that folder.

    Raises:
        SettingsError: FEDMQ_DATA is not set, or the file cannot be read.
    """
    folder = os.environ.get("FEDMQ_DATA")
    if not folder:
        raise SettingsError(
            f"the {task} task reads $FEDMQ_DATA/{name}: set FEDMQ_DATA to the folder that holds {Path(name).parts[0]}"
        )
    path = Path(folder) / name
    try:
        return path.read_bytes()
    except OSError as error:
        raise SettingsError(f"cannot read {path}: {error.strerror}") from error
