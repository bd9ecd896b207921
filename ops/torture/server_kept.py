"""Programs that are kept running, as an init system does; and a small disk of their own."""

import contextlib
import os
import shutil
import signal
import subprocess
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from shared.errors import Unavailable

LOOK_S = 0.05
STOP_S_MAX = 60.0


class Startable(Protocol):
    """A program: `ops.servers.PrivateServer` is one."""

    name: str
    process: "subprocess.Popen[bytes] | None"

    def start(self) -> None:
        """Start it; a server returns when it answers, or raises `Unavailable`."""

    def stop(self, signal_number: int = signal.SIGTERM) -> None:
        """End it and wait."""


@dataclass
class Program:
    """One `python -m ...` of ours.

    Attributes:
        name: of its log.
        command: what to run.
        environment: all of it.
        log_file: what it writes is appended there.
        process: the newest one.
    """

    name: str
    command: list[str]
    environment: dict[str, str]
    log_file: Path
    process: "subprocess.Popen[bytes] | None" = None

    def start(self) -> None:
        """Start it; it is up some time later."""
        with self.log_file.open("ab") as log:
            self.process = subprocess.Popen(
                self.command, env=self.environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                start_new_session=True,
            )  # fmt: skip

    def stop(self, signal_number: int = signal.SIGTERM) -> None:
        """Send a signal and wait for its end."""
        if self.process is None:
            return
        self.process.send_signal(signal_number)
        try:
            self.process.wait(STOP_S_MAX)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


@dataclass
class Kept:
    """A program that is started again whenever it ends, unless it is held.

    Attributes:
        unit: the program.
        pause_s: before it is started again.
        ended: exit codes it ended with by itself.
    """

    unit: Startable
    pause_s: float = 0.5
    ended: list[int] = field(default_factory=list)
    _held: bool = True
    _closing: threading.Event = field(default_factory=threading.Event)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self._thread = threading.Thread(target=self._keep, name=f"keep {self.unit.name}", daemon=True)
        self._thread.start()

    def start(self) -> None:
        """Start it, and keep it running; a server answers on return.

        Raises:
            Unavailable: it did not come up this time; it is tried again.
        """
        with self._lock:
            self._held = False
            if not self._running():
                self._begin()

    def kill(self) -> None:
        """End it at once and hold it, until `start`."""
        self.end(signal.SIGKILL)

    def end(self, signal_number: int = signal.SIGTERM) -> int:
        """End it by a signal and hold it; return the exit code."""
        with self._lock:
            self._held = True
            process = self.unit.process
            self.unit.stop(signal_number)
            return process.returncode if process is not None else 0

    def pause(self) -> None:
        """Let it stand still (SIGSTOP), if it runs."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Let it go on (SIGCONT), if it runs."""
        self._signal(signal.SIGCONT)

    def answers(self) -> bool:
        """Tell whether it runs and no start of it is under way."""
        if not self._lock.acquire(blocking=False):
            return False
        try:
            return self._running()
        finally:
            self._lock.release()

    def close(self) -> None:
        """End it for good."""
        self._closing.set()
        self._thread.join()
        with self._lock:
            self.unit.stop(signal.SIGKILL)

    def _signal(self, number: int) -> None:
        process = self.unit.process
        if process is not None:
            process.send_signal(number)  # nothing to a process that ended

    def _running(self) -> bool:
        return self.unit.process is not None and self.unit.process.poll() is None

    def _begin(self) -> None:
        if self.unit.process is not None:
            self.unit.stop(signal.SIGKILL)  # what a server that ended by itself left behind
        self.unit.start()

    def _keep(self) -> None:
        while not self._closing.wait(LOOK_S):
            if self._held or self._running():
                continue
            self._closing.wait(self.pause_s)
            with self._lock, contextlib.suppress(Unavailable):
                if not self._held and not self._running() and not self._closing.is_set():
                    if self.unit.process is not None:
                        self.ended.append(self.unit.process.returncode)
                    self._begin()


class SmallDisk:
    """A tmpfs of a few hundred megabytes, so that a full disk is ours alone.

    Args:
        folder: where it is mounted; made when missing.
        size_bytes: of the disk.

    Attributes:
        available: whether this system let us mount it; without, the folder is on the machine's own disk.
        problem: why not.
    """

    def __init__(self, folder: Path, size_bytes: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self._sudo = [] if os.geteuid() == 0 else ["sudo", "-n"]
        if folder.is_mount():  # by a run that was killed
            self._run("umount", str(folder))
        options = f"size={size_bytes},mode=0700,uid={os.getuid()},gid={os.getgid()}"
        self.problem = self._run("mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder))
        self.available = not self.problem

    @property
    def ballast(self) -> Path:
        """The file that fills the disk."""
        return self.folder / "ballast"

    def free_bytes(self) -> int:
        """Return what is left."""
        return shutil.disk_usage(self.folder).free

    def fill(self, left_bytes: int = 0) -> None:
        """Fill it, but for `left_bytes`, and keep it so however little is freed."""
        assert self.available, "never the machine's own disk"  # noqa: S101
        with self.ballast.open("ab") as ballast, contextlib.suppress(OSError):
            while (free := self.free_bytes()) > left_bytes:
                size = os.fstat(ballast.fileno()).st_size
                os.posix_fallocate(ballast.fileno(), size, min(free - left_bytes, 2**24))

    def empty(self) -> None:
        """Take the ballast away."""
        self.ballast.unlink(missing_ok=True)

    def close(self) -> None:
        """Unmount it; what was on it is gone."""
        if self.available:
            deadline = time.monotonic() + STOP_S_MAX
            while self._run("umount", str(self.folder)) and time.monotonic() < deadline:
                time.sleep(0.2)
            self.available = False

    def _run(self, *command: str) -> str:
        """Run a command; return what it said if it failed."""
        try:
            done = subprocess.run([*self._sudo, *command], capture_output=True, text=True, check=False)
        except OSError as error:
            return str(error)
        return done.stderr.strip() or f"exit code {done.returncode}" if done.returncode else ""
