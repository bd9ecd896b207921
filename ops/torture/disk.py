"""A worker's disk: files that outlive the process, of which a power cut may undo what was not made durable yet."""

from ops.torture.fate import Fate


class Disk:
    """The files of one worker, as `worker.folder.Files` wants them.

    A `write` is durable on return, and with it every change of names before; so is a durable `remove`. Any other
    rename and removal may be undone by a power cut, the latest first.

    Args:
        fate: of the process that uses it.
    """

    def __init__(self, fate: Fate) -> None:
        self._fate = fate
        self.files: dict[str, bytes] = {}
        self._undo: list[dict[str, bytes | None]] = []  # what each change of names replaced, None: nothing

    def names(self) -> list[str]:
        """Return the names of all files."""
        return list(self.files)

    def size(self, name: str) -> int:
        """Return the size of a file."""
        return len(self.read(name))

    def read(self, name: str) -> bytes:
        """Return a file."""
        try:
            return self.files[name]
        except KeyError:
            raise FileNotFoundError(name) from None

    def write(self, name: str, *parts: bytes | memoryview) -> None:
        """Replace a file."""
        self._fate.before(f"write {name}")
        self.files[name] = b"".join(parts)
        self._undo.clear()
        self._fate.after()

    def rename(self, old: str, new: str) -> None:
        """Rename a file."""
        self._fate.before(f"rename {old}")
        if old in self.files and old != new:
            self._undo.append({old: self.files[old], new: self.files.get(new)})
            self.files[new] = self.files.pop(old)
        self._fate.after()

    def remove(self, *names: str, durable: bool = False) -> None:
        """Remove files."""
        for name in names:
            self._fate.before(f"remove {name}")
            if name in self.files:
                self._undo.append({name: self.files.pop(name)})
        if names:
            if durable:
                self._undo.clear()
            self._fate.after()

    def close(self) -> None:
        """Nothing to close."""

    def wipe(self) -> None:
        """Become another disk, empty."""
        self.files.clear()
        self._undo.clear()

    def cut_power(self, kept: float) -> None:
        """Undo the latest changes of names that are not durable.

        Args:
            kept: share of them that survives.
        """
        while len(self._undo) > int(kept * (len(self._undo) + 1)):
            for name, data in self._undo.pop().items():
                if data is None:
                    self.files.pop(name, None)
                else:
                    self.files[name] = data
        self._undo.clear()
