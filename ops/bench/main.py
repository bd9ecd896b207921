"""`fedmq bench`: runs every measurement and prints the tables the README shows."""

import os
import platform
import tempfile
from pathlib import Path

from ops.bench.end_to_end import Drain, drain
from ops.bench.fold import bare_float32_rate, bare_int8_rate, fold_rate
from ops.servers import PrivateServers
from shared.errors import SettingsError

PEERS = {  # updates/s of the best of Flower, APPFL and NVFLARE as they are tuned best, measured on such a machine
    100_000: 362.0,
    1_000_000: 87.0,
    10_000_000: 3.8,
}
FOLD_SHARE, DRAIN_SHARE, IDLE_BYTES, PEAK_MODELS, PEAK_BYTES = 0.40, 0.70, 120e6, 8, 150e6  # what is to be reached


def run(sizes: str, repeats: int, out: Path | None) -> None:
    """Measure and print; write the tables to `out` if given.

    Raises:
        SettingsError: a model size that is no number.
    """
    counts = [count_of(size) for size in sizes.split(",")]
    lines = [_machine(), "", *_folds(counts, repeats), ""]
    print("\n".join(lines), flush=True)
    with tempfile.TemporaryDirectory(prefix="fedmq-bench-") as folder, PrivateServers() as servers:
        drains = [drain(count, repeats, servers, Path(folder)) for count in counts]
    table = _drains(drains)
    print("\n".join(table))
    if out is not None:
        out.write_text("\n".join([*lines, *table]) + "\n")


def _folds(counts: list[int], repeats: int) -> list[str]:
    lines = [
        "Fold (decode + validate + add into the buffer), one thread, updates/s:",
        "",
        f"| parameters | int8 | bare `acc += scale*q` | share (>= {FOLD_SHARE:.0%}) "
        "| float32 | bare `acc += w*x` | share | `tiny` (1.8 % of the elements) |",
        "|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for count in counts:
        int8, bare8 = fold_rate(count, repeats), bare_int8_rate(count, repeats)
        f32, bare32 = fold_rate(count, repeats, "float32"), bare_float32_rate(count, repeats)
        tiny = fold_rate(count, repeats, "tiny")
        lines.append(
            f"| {count:,} | {int8:,.0f} | {bare8:,.0f} | {int8 / bare8:.0%} "
            f"| {f32:,.0f} | {bare32:,.0f} | {f32 / bare32:.0%} | {tiny:,.0f} |"
        )
    return lines


def _drains(drains: list[Drain]) -> list[str]:
    lines = [
        "End to end, int8: publish -> broker -> fold -> commit -> ack, backlog of one queue, updates/s:",
        "",
        f"| parameters | message | aggregator | plain pika consumer | share (>= {DRAIN_SHARE:.0%} at 1M) "
        "| our transport, ack only | best peer | publish + confirm, one worker | peak memory (limit) |",
        "|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for d in drains:
        limit = PEAK_MODELS * 4 * d.num_params + PEAK_BYTES
        lines.append(
            f"| {d.num_params:,} | {d.message_bytes / 1e6:.2f} MB | {d.aggregator:,.0f} | {d.bare_pika:,.0f} "
            f"| {d.ratio:.0%} | {d.bare_transport:,.0f} | {PEERS.get(d.num_params, float('nan')):,.1f} "
            f"| {d.publish:,.0f} | {d.peak_bytes / 1e6:.0f} MB ({limit / 1e6:.0f} MB) |"
        )
    idle = max(d.idle_bytes for d in drains)
    return [*lines, "", f"Aggregator before any model: {idle / 1e6:.0f} MB resident (limit {IDLE_BYTES / 1e6:.0f} MB)."]


def _machine() -> str:
    model = next(
        (line.split(":", 1)[1].strip() for line in _cpuinfo() if line.startswith("model name")), platform.processor()
    )
    return f"{os.cpu_count()} cores of {model or 'unknown'}, Python {platform.python_version()}, {platform.system()}."


def _cpuinfo() -> list[str]:
    try:
        return Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return []


def count_of(size: str) -> int:
    """Read a number of parameters such as 100k or 1M.

    Raises:
        SettingsError: it is none.
    """
    factor = {"k": 10**3, "m": 10**6}.get(size.strip()[-1:].lower(), 1)
    try:
        return int(float(size.strip().rstrip("kKmM")) * factor)
    except ValueError as error:
        raise SettingsError(f"--params {size!r}: give sizes like 100k,1M,10M") from error
