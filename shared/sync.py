"""Making names survive a power cut."""

import os
from pathlib import Path


def sync_folder(folder: Path) -> None:
    """Return when the files that were made, renamed or removed in a folder are so on disk.

    Raises:
        OSError: it cannot be opened or synced.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
