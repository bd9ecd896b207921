"""`python -m ops.bench.codecs`: every codec on a real local update and on noise; beside entropy, memory and peers.

One process, processor time, medians: what stands side by side was measured in one run. Set OMP_NUM_THREADS=1 and
OPENBLAS_NUM_THREADS=1 (a matrix product on two threads would count twice), and FEDMQ_DATA for a network trained on
MNIST. The tables go to `out`; `ops/bench/README.md` explains them.
"""

import math
from pathlib import Path
from typing import Annotated

import typer

from ops.bench import index_coding, zstd_levels
from ops.bench.main import _machine, count_of
from ops.bench.measuring import Row, copy_rate, errors, row
from ops.bench.peers_codecs import Result, absent, candidates, compare
from ops.bench.recorded import Delta, deltas
from shared.compression import PRESETS, parse
from shared.compression.registry import EXAMPLES

CODECS = tuple(dict.fromkeys([*PRESETS, *EXAMPLES]))
INT8_ENCODE, INT8_DECODE, TINY_ENCODE = 1.5, 5.0, 0.5  # GB/s of float32 to be reached
EXCESS, EXCESS_BITS = 0.03, 0.5  # over the entropy at most; for codecs with more bits than this
EDEN_NMSE = {1: 0.5708, 2: 0.1331, 3: 0.03578, 4: 0.009588}  # D / (1 - D), D the distortion of Lloyd-Max
EDEN_SHOWN = {1: "0.571", 2: "0.133", 3: "0.036", 4: "0.0096"}  # as it is published
EDEN_WITHIN, EDEN_DRAWS = 0.01, 10


def run(sizes: str, repeats: int, out: Path | None, picture: Path | None = None) -> None:
    """Measure and print; write the tables to `out` and the picture to `picture` if given.

    Args:
        sizes: of the models, comma separated: `1M,10M`.
        repeats: runs per time; the median is shown.
        out: Markdown file.
        picture: PNG of error against size, on the smallest model.

    Raises:
        SettingsError: a model size that is no number.
    """
    lines = [_machine(), ""]
    say(lines)
    measured: list[tuple[Delta, list[Row]]] = []
    counts = [count_of(size) for size in sizes.split(",")]
    for count in counts:
        for delta in deltas(count):
            rows = [row(name, delta, repeats) for name in CODECS]
            measured.append((delta, rows))
            section = codec_table(delta, rows, copy_rate(delta, repeats))
            say(section)
            lines += section
    smallest = min((delta for delta, _ in measured if delta.name.startswith("real")), key=lambda d: d.values.size)
    pairs = compare(smallest, repeats)
    sections = [
        targets(measured), eden([d for d, _ in measured]), peer_table(smallest, pairs), index_table(counts, repeats),
        *(zstd_table(delta, repeats) for delta in deltas(min(counts))),
    ]  # fmt: skip
    for section in sections:
        say(section)
    if picture is not None:
        from ops.bench.codecs_picture import draw

        draw(smallest, candidates(smallest), [theirs for theirs, _ in pairs], picture)
    if out is not None:
        out.write_text("\n".join([*lines[:2], *[line for part in sections for line in part], *lines[2:]]) + "\n")


def codec_table(delta: Delta, rows: list[Row], copy: float) -> list[str]:
    """Return one row per codec."""
    lines = [
        f"### {delta.name}, {delta.values.size:,} parameters",
        "",
        f"A bare memory copy: {copy:.1f} GB/s.",
        "",
        "| codec | bits / parameter | entropy + beside | excess | ratio | NMSE | bias | encode GB/s | of a copy "
        "| decode + add GB/s | of a copy |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for r in rows:
        entropy = "-" if math.isnan(r.entropy) else f"{r.entropy:.3f} + {r.beside:.3f}"
        lines.append(
            f"| `{_cell(r.codec)}` | {r.bits:.3f} | {entropy} | {_or_dash(r.excess, '+.1%')} | {r.ratio:.1f} "
            f"| {r.nmse:.3g} | {_or_dash(r.bias, '.4f')} | {r.encode:.2f} | {r.encode / copy:.0%} | {r.decode:.2f} "
            f"| {r.decode / copy:.0%} |"
        )
    return [*lines, ""]


def targets(measured: list[tuple[Delta, list[Row]]]) -> list[str]:
    """Return what was to be reached beside what was: the worst over vectors and sizes."""
    every = [(delta, r) for delta, rows in measured for r in rows]
    int8 = [(d, r) for d, r in every if r.codec == "int8"]
    tiny = [(r.encode, d) for d, r in every if r.codec == "tiny"]
    lines = [
        "## What was to be reached", "",
        "| what | limit | worst of all vectors | median | reached |", "|---|---:|---|---:|---|",
    ]  # fmt: skip
    for what, limit, found in (
        ("`int8` encode, GB/s", INT8_ENCODE, [(r.encode, d) for d, r in int8]),
        ("`int8` decode + add, GB/s", INT8_DECODE, [(r.decode, d) for d, r in int8]),
        ("`tiny` encode with error feedback, GB/s", TINY_ENCODE, tiny),
    ):
        worst, delta = min(found, key=lambda item: item[0])
        middle = sorted(value for value, _ in found)[len(found) // 2]
        lines.append(f"| {what} | >= {limit} | {worst:.2f} ({_short(delta)}) | {middle:.2f} | {_yes(worst >= limit)} |")
    coded = [
        (r.excess, r.codec, d) for d, r in every
        if r.entropy > EXCESS_BITS and parse(r.codec).zstd and not math.isnan(r.excess) and not parse(r.codec).plain
    ]  # fmt: skip
    worst, codec, delta = max(coded, key=lambda item: item[0])
    middle = sorted(excess for excess, _, _ in coded)[len(coded) // 2]
    lines.append(
        f"| coded size of quantized symbols over their entropy, above {EXCESS_BITS} bit | <= {EXCESS:.0%} "
        f"| {worst:+.1%} (`{_cell(codec)}`, {_short(delta)}) | {middle:+.1%} | {_yes(worst <= EXCESS)} |"
    )
    over = sorted({f"`{codec}` on {_short(d)} ({excess:+.1%})" for excess, codec, d in coded if excess > EXCESS})
    return [*lines, "", *([f"Over the limit of {EXCESS:.0%}: {', '.join(over)}."] if over else []), ""]


def eden(all_deltas: list[Delta]) -> list[str]:
    """Return EDEN's error beside what theory says, on every vector, none of its tensors set apart."""
    lines = [
        f"## The error of `all | rotate | eden(b)` beside theory (within {EDEN_WITHIN:.0%})", "",
        "| bits | published | theory | on each vector, mean of ten rotations | farthest | reached |",
        "|---:|---:|---:|---|---:|---|",
    ]  # fmt: skip
    for bits, theory in EDEN_NMSE.items():
        found = [errors(parse(f"all | rotate | eden({bits})"), delta, EDEN_DRAWS)[0] for delta in all_deltas]
        farthest = max(found, key=lambda nmse: abs(nmse / theory - 1)) / theory - 1
        shown = ", ".join(f"{nmse:.4g} ({_short(d)})" for d, nmse in zip(all_deltas, found, strict=True))
        reached = _yes(abs(farthest) <= EDEN_WITHIN)
        lines.append(f"| {bits} | {EDEN_SHOWN[bits]} | {theory} | {shown} | {farthest:+.2%} | {reached} |")
    return [*lines, ""]


def peer_table(delta: Delta, pairs: list[tuple[Result, Result | None]]) -> list[str]:
    """Return each peer's row and ours below it."""
    lines = [
        f"## Beside other compressors: {delta.name}, {delta.values.size:,} parameters", "",
        "Below each, our smallest pipeline of the same or a smaller error.", "",
        "| compressor | ratio | NMSE | RMS error / range | encode MB/s | decode MB/s (ours: + add) |",
        "|---|---:|---:|---:|---:|---:|",
    ]  # fmt: skip
    for theirs, ours in pairs:
        lines += [_result(theirs, ""), _result(ours, "-> ") if ours else "| -> none of so small an error | | | | | |"]
    if missing := absent():
        lines += ["", f"Not installed, so not measured: {', '.join(missing)}."]
    return [*lines, ""]


def index_table(counts: list[int], repeats: int) -> list[str]:
    """Return the codes of positions."""
    lines = [
        "## Positions of a sparse update, chosen at random", "",
        "| parameters | share | code | bits / position | entropy | excess | encode ns | decode ns |",
        "|---:|---:|---|---:|---:|---:|---:|---:|",
    ]  # fmt: skip
    for count in counts:
        lines += [
            f"| {count:,} | {r.share} | {r.name} | {r.bits:.2f} | {r.entropy:.2f} | {r.bits / r.entropy - 1:+.1%} "
            f"| {r.encode_ns:.1f} | {r.decode_ns:.1f} |"
            for r in index_coding.rows(count, repeats)
        ]
    return [*lines, ""]


def zstd_table(delta: Delta, repeats: int) -> list[str]:
    """Return sizes and speeds of our zstd settings and of its levels."""
    levels = " | ".join(f"level {level} (MB/s)" for level in zstd_levels.LEVELS)
    lines = [
        f"## zstd on packed symbols: {delta.name}, {delta.values.size:,} parameters, bits / parameter", "",
        f"| codec | without | ours (MB/s) | {levels} |", "|---|---:|---:|" + "---:|" * len(zstd_levels.LEVELS),
    ]  # fmt: skip
    for r in zstd_levels.rows(delta, repeats):
        pairs = " | ".join(f"{bits:.3f} ({rate:,.0f})" for bits, rate in zip(r.sizes[1:], r.rates, strict=True))
        lines.append(f"| `{_cell(r.codec)}` | {r.sizes[0]:.3f} | {pairs} |")
    return [*lines, ""]


def say(lines: list[str]) -> None:
    """Print at once: a run takes minutes."""
    print("\n".join(lines), flush=True)


def _result(r: Result, arrow: str) -> str:
    name = arrow + _cell(r.name)
    return f"| {name} | {r.ratio:.2f} | {r.nmse:.3g} | {r.rms:.2g} | {r.encode:,.0f} | {r.decode:,.0f} |"


def _cell(name: str) -> str:
    """Escape the bars of a codec's name: they would end the cell."""
    return name.replace("|", "\\|")


def _short(delta: Delta) -> str:
    return f"{delta.name.split(' ', maxsplit=1)[0]}, {delta.values.size / 1e6:.0f}M"


def _or_dash(number: float, form: str) -> str:
    return "-" if math.isnan(number) else format(number, form)


def _yes(reached: bool) -> str:
    return "yes" if reached else "**no**"


def main(
    params: Annotated[str, typer.Option(help="model sizes, comma separated")] = "1M,10M",
    repeats: Annotated[int, typer.Option(help="runs per time; the median is shown", min=1)] = 5,
    out: Annotated[Path | None, typer.Option(help="also write the tables to this Markdown file")] = None,
    picture: Annotated[Path | None, typer.Option(help="PNG of error against size")] = None,
) -> None:
    """Measure every codec's size, error and speed."""
    run(params, repeats, out, picture)


if __name__ == "__main__":
    typer.run(main)
