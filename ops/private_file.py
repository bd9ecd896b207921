"""Files that hold secrets: of mode 0600 from their first byte on, whole or not there at all, also after a power cut."""

import contextlib
import fcntl
import glob
import json
import os
import stat
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

from shared.errors import SettingsError
from shared.sync import sync_folder

RANDOM_CHARS = 8  # that tempfile puts at the end of a name


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
            _sweep(path)
            self._descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)  # of mode 0600
        except OSError as error:
            raise SettingsError(f"{path} cannot be written: {error.strerror}") from error
        self._temporary = Path(name)
        try:
            _is_mine(self._descriptor)
            with os.fdopen(self._descriptor, "w", closefd=False) as file:
                file.write(text)
            os.fchmod(self._descriptor, mode)
            os.fsync(self._descriptor)
        except BaseException as error:
            self._give_up()
            if isinstance(error, OSError):
                raise SettingsError(f"{path} cannot be written: {error.strerror}") from error
            raise

    def __enter__(self) -> "PreparedFile":
        """Return itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Remove it, unless it has its name."""
        self._give_up()

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

    def _give_up(self) -> None:
        with contextlib.suppress(FileNotFoundError):
            self._temporary.unlink()
        os.close(self._descriptor)


def _is_mine(descriptor: int) -> bool:
    """Lock a file, for as long as it is open; tell whether nobody else had."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # also a file system without locks: there, leftovers stay
        return False
    return True


def _sweep(path: Path) -> None:
    """Remove what a program that was killed has left beside a file: nobody else would, and it holds a password."""
    for left in path.parent.glob(f".{glob.escape(path.name)}.{'[a-z0-9_]' * RANDOM_CHARS}"):
        with contextlib.suppress(OSError):  # gone meanwhile, or somebody else's
            descriptor = os.open(left, os.O_RDONLY | os.O_NOFOLLOW)
            try:
                if _is_mine(descriptor):
                    left.unlink()
            finally:
                os.close(descriptor)


def keep_private(path: Path, text: str, mode: int = 0o600) -> bool:
    """Write a file unless it holds that already; tell whether it was written."""
    if path.exists() and path.read_text() == text:
        keep_mode(path, mode)
        return False
    write_private(path, text, mode)
    return True


def keep_mode(path: Path, mode: int = 0o600) -> bool:
    """Give a file its mode back; tell whether it had another."""
    if stat.S_IMODE(path.stat().st_mode) == mode:
        return False
    path.chmod(mode)
    return True


def toml(settings: Mapping[str, str]) -> str:
    """Return settings as TOML; a text of several lines, as PEM has them, stands as it is."""
    lines = [
        f"{name} = '''\n{value}'''" if "\n" in value else f"{name} = {json.dumps(value)}"
        for name, value in settings.items()
    ]
    return "\n".join(lines) + "\n"
