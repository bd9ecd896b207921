"""How much memory a worker takes for a model, and how much there is."""

from pathlib import Path

from shared.layout import Layout

COPIES = 5  # of the weights: the task's model, the pulled ones, those after, the delta, the residual
PAYLOAD_COPIES = 4  # of an update: made, written, read to be published, and cut into parts
BASE_BYTES = 75_000_000  # the interpreter with numpy and the rest of the base install


def needed_bytes(layout: Layout, payload_bytes: int) -> int:
    """Return about what a worker takes, beside the gradients and data of the task's own training.

    Measured with 10 million parameters: 252 MB as `balanced`, 426 MB as float32.

    Args:
        layout: of the model.
        payload_bytes: of its largest update.
    """
    return BASE_BYTES + COPIES * (4 * layout.num_params + layout.kept_bytes) + PAYLOAD_COPIES * payload_bytes


def available_bytes(root: Path = Path("/")) -> int | None:
    """Return what this machine, or the container's limit, has left; None where that cannot be seen.

    Args:
        root: where /proc and /sys are.
    """
    found = [*_of_machine(root), *_of_group(root)]
    return min(found) if found else None


def _of_machine(root: Path) -> list[int]:
    try:
        lines = (root / "proc/meminfo").read_text().splitlines()
    except OSError:
        return []
    return [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]


def _of_group(root: Path) -> list[int]:
    """Return what the limits of this control group and those around it leave: a container's, a service's."""
    found: list[int] = []
    top = root / "sys/fs/cgroup"
    try:
        own = (root / "proc/self/cgroup").read_text().rpartition("0::/")[2].strip()  # "" inside a container
    except OSError:
        own = ""
    groups = [top / own, *(parent for parent in (top / own).parents if parent.is_relative_to(top))]
    for group in groups:
        try:
            limit, used = (group / "memory.max").read_text().strip(), int((group / "memory.current").read_text())
            found += [] if limit == "max" else [max(0, int(limit) - used)]
        except (OSError, ValueError):
            continue
    return found
