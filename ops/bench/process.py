"""What Linux tells of a process: memory, files, threads, processor time."""

import os
from pathlib import Path

TICKS = os.sysconf("SC_CLK_TCK")


def resident_bytes(pid: int | str, field: str = "VmRSS") -> float:
    """Return VmRSS (now) or VmHWM (peak) of a process.

    Args:
        pid: of the process, or `self`.
        field: which.
    """
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(field):
            return float(line.split()[1]) * 1024
    return float("nan")


def open_files(pid: int) -> int:
    """Return the number of its file descriptors."""
    return len(os.listdir(f"/proc/{pid}/fd"))  # noqa: PTH208 - nothing but their number


def threads(pid: int) -> int:
    """Return the number of its threads."""
    return len(os.listdir(f"/proc/{pid}/task"))  # noqa: PTH208


def processor_seconds(pid: int) -> float:
    """Return user and system time it has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


def load_average() -> float:
    """Return the machine's load over the last minute: how much else was going on."""
    return os.getloadavg()[0]


def descendants(pid: int) -> list[int]:
    """Return a process and all it started, and they."""
    found = [pid]
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in task.read_text().split():
            found += descendants(int(child))
    return found
