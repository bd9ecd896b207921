"""FEDMQ_READY_COMMAND: a program of the device's owner that says whether a training may begin."""

import contextlib
import os
import selectors
import signal
import subprocess
import threading
import time
from dataclasses import dataclass

OUTPUT_BYTES_MAX = 4096  # more is not read
LINE_CHARS_MAX = 200
LOOK_S = 0.1  # how soon a stop is noticed


@dataclass(frozen=True, slots=True)
class Answer:
    """What the command says.

    Attributes:
        ready: it ended with 0.
        reason: the first line it wrote, else how it ended.
        failed: it did not end by itself, or could not be run: that is not its own word.
    """

    ready: bool
    reason: str
    failed: bool = False


def ask(command: list[str], timeout_s: float, stop: threading.Event) -> Answer:
    """Run a command, without a shell, and return its answer; whatever goes wrong with it is a no.

    It is killed when it takes too long, writes without end, or the worker is asked to stop; what it started, always.

    Args:
        command: program and arguments.
        timeout_s: longest it may take.
        stop: ends the waiting.
    """
    try:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
        )
    except (OSError, ValueError) as error:  # ValueError: a NUL in an argument
        return Answer(False, f"{command[0]} cannot be run: {getattr(error, 'strerror', None) or error}", failed=True)
    deadline = time.monotonic() + timeout_s
    try:
        written = _first_bytes(process, deadline, stop)
        while process.poll() is None and time.monotonic() < deadline and not stop.wait(LOOK_S / 10):
            pass
    finally:
        _end(process)
    line = next((line for line in written.decode(errors="replace").splitlines() if line.strip()), "")
    said = "".join(char for char in line.strip() if char.isprintable())[:LINE_CHARS_MAX]
    if stop.is_set():
        return Answer(False, "asked to stop")
    if process.returncode < 0:
        late = "took longer than" if time.monotonic() >= deadline else "was killed within"
        return Answer(False, f"{command[0]} {late} {timeout_s:g} s{': ' if said else ''}{said}", failed=True)
    return Answer(process.returncode == 0, said or f"{command[0]} ended with {process.returncode}")


def _first_bytes(process: "subprocess.Popen[bytes]", deadline: float, stop: threading.Event) -> bytes:
    """Read what it writes, up to a bound; then it finds its output closed."""
    assert process.stdout is not None, "a pipe"  # noqa: S101
    written = b""
    with process.stdout as pipe, selectors.DefaultSelector() as selector:
        selector.register(pipe, selectors.EVENT_READ)
        while len(written) < OUTPUT_BYTES_MAX and time.monotonic() < deadline and not stop.is_set():
            if selector.select(LOOK_S):
                piece = os.read(pipe.fileno(), OUTPUT_BYTES_MAX - len(written))
                if not piece:
                    break
                written += piece
            elif process.poll() is not None:  # something it left behind holds the pipe
                break
    return written


def _end(process: "subprocess.Popen[bytes]") -> None:
    """Kill it and what it started, if anything of it still runs; what it left in the background too."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
