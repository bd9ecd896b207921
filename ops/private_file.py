"""Files that hold secrets: of mode 0600 from their first byte on, whole or not there at all, also after a power cut."""

import contextlib
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

from shared.errors import SettingsError
from shared.sync import sync_folder


def write_private(path: Path, text: str, mode: int = 0o600) -> None:
    """Put a file in the place of the one that was there, if any; durable on return.

    Args:
        path: where; its folder exists.
        text: what.
        mode: of the file.

    Raises:
        SettingsError: the folder cannot be written to.
    """
    with PreparedFile(path, text, mode) as prepared:
        prepared.replace()


class PreparedFile:
    """A file that is on disk already, under another name: what is left to do can hardly fail.

    Args:
        path: what it is to be called.
        text: what it holds.
        mode: of the file.

    Raises:
        SettingsError: the folder cannot be written to.
    """

    def __init__(self, path: Path, text: str, mode: int = 0o600) -> None:
        self._path = path
        try:
            descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)  # of mode 0600
            self._temporary = Path(name)
            with os.fdopen(descriptor, "w") as file:
                file.write(text)
                file.flush()
                os.fchmod(descriptor, mode)
                os.fsync(descriptor)
        except OSError as error:
            raise SettingsError(f"{path} cannot be written: {error.strerror}") from error

    def __enter__(self) -> "PreparedFile":
        """Return itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Remove it, unless it has its name."""
        with contextlib.suppress(FileNotFoundError):
            self._temporary.unlink()

    def replace(self) -> None:
        """Give it its name, whatever had that before."""
        self._temporary.replace(self._path)
        sync_folder(self._path.parent)

    def place(self) -> None:
        """Give it its name, which nothing may have.

        Raises:
            SettingsError: something has.
        """
        try:
            os.link(self._temporary, self._path)
        except FileExistsError:
            raise SettingsError(f"{self._path} exists: move it away, or give another --out") from None
        except OSError:  # a file system without links: FAT of an SD card
            if self._path.exists():
                raise SettingsError(f"{self._path} exists: move it away, or give another --out") from None
            self._temporary.replace(self._path)
        sync_folder(self._path.parent)


def keep_private(path: Path, text: str, mode: int = 0o600) -> bool:
    """Write a file unless it holds that already; tell whether it was written."""
    if path.exists() and path.read_text() == text:
        return False
    write_private(path, text, mode)
    return True


def toml(settings: Mapping[str, str]) -> str:
    """Return settings as TOML; a text of several lines, as PEM has them, stands as it is."""
    lines = [
        f"{name} = '''\n{value}'''" if "\n" in value else f"{name} = {json.dumps(value)}"
        for name, value in settings.items()
    ]
    return "\n".join(lines) + "\n"
