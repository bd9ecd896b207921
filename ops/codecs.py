"""`fedmq codecs`: what there is, and what each does to one local training of the user's own task."""

import math
from pathlib import Path

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from shared.compression import AUTO, PRESETS, parse
from shared.compression.measure import Measurement, measure
from shared.compression.presets import AUTO_DESCRIPTION
from shared.compression.tensors import SMALL, parts_of
from shared.config import parse_pairs
from shared.errors import SettingsError
from shared.layout import Layout
from shared.vector import NORM_MAX, Vector, squared_norm
from worker.task import Context, Task, read

STAGES = {
    "ef": "keep what was not sent and add it to the next update (error feedback)",
    "all": "no exceptions: small and 1-D tensors go through the stages too",
    "topk(p)": "only the share p of largest elements; positions Rice-coded",
    "randomk(p)": "a random share p, scaled up; unbiased",
    "rotate": "a random rotation, so that any update looks Gaussian",
    "float32, bfloat16, float16": "each element by itself",
    "int8, int4, int2": "blocks of 256 with a scale; stochastic rounding, or (nearest)",
    "nf4": "four bits on normal quantiles, blocks of 64",
    "uniform(step=s)": "multiples of s RMS of each tensor, nearest, or (step=s, stochastic)",
    "ternary": "minus, zero or plus one magnitude per tensor; or (stochastic)",
    "sign": "one bit and a mean magnitude; only with ef",
    "qsgd(s)": "s levels of each tensor's norm, stochastic",
    "eden(b)": "b = 1 to 4 bits for rotated values; unbiased",
    "pack": "several small numbers to a byte; after uniform and qsgd",
    "zstd": "entropy coding of the result",
}
TRIED = (
    "float16", "int8", "int4 | zstd", "nf4 | zstd", "uniform(step=1) | pack | zstd", "uniform(step=4) | pack | zstd",
    "rotate | eden(1)", "rotate | eden(2)", "ef | sign", "ternary | zstd", "topk(0.1) | int8 | zstd",
    "topk(0.05) | ternary",
)  # fmt: skip
NMSE_DRAWN = 1e-6  # plain floats would squeeze the others together


def show() -> None:
    """Print presets and stages."""
    console = Console()
    presets = Table(box=SIMPLE)
    for column in ("preset", "stages", "what for"):
        presets.add_column(column)
    for name, preset in PRESETS.items():
        presets.add_row(name, preset.pipeline, preset.description)
    presets.add_row(AUTO, "", AUTO_DESCRIPTION)
    console.print(presets)
    stages = Table(box=SIMPLE)
    stages.add_column("stage")
    stages.add_column("what it does")
    for name, text in STAGES.items():
        stages.add_row(name, text)
    console.print(stages)
    console.print(
        "order: \\[ef |] \\[all |] \\[topk(p) or randomk(p) |] \\[rotate |] one quantizer \\[| pack] \\[| zstd]\n"
        "Tensors of one dimension or fewer than 1,000 elements travel as float16 unless all stands in front.\n"
        "Try them on your task: fedmq codecs try my_task.py"
    )


def try_task(task_name: str, task_settings: str, extra: list[str], seed: int, out: Path) -> None:
    """Run one local training through every preset and some more codecs; print a table, draw a picture.

    Args:
        task_name: built-in name or file.
        task_settings: the task's own, as a=1,b=2 or JSON.
        extra: further codecs to try.
        seed: of the training and of every codec.
        out: PNG to write.

    Raises:
        SettingsError: an unknown codec, settings that cannot be read, an unusable task, or a picture that cannot be
            written.
        TaskError: the task raised.
    """
    if AUTO in (name.strip() for name in extra):
        raise SettingsError(
            f"--codec {AUTO}: it is each worker's own choice among the presets, made from its first updates, and "
            "cannot be tried by itself; the presets are in the table anyway"
        )
    codecs = {name: parse(name) for name in (*PRESETS, *TRIED, *extra)}
    try:
        settings = parse_pairs(task_settings)
    except ValueError as error:
        raise SettingsError(f"--task-settings {task_settings}: {error}") from error
    delta, layout, metrics = _one_training(Task.load(task_name), settings, seed)
    print(
        f"{task_name}: one local training, {layout.num_params:,} parameters, {4 * layout.num_params:,} bytes as float32"
        + (f"; {', '.join(f'{name} {value:.4g}' for name, value in metrics.items())}" if metrics else "")
    )
    rows = {name: measure(codec, delta, layout, seed) for name, codec in codecs.items()}
    _print_table(rows)
    small = parts_of(layout, whole=False).small.size
    if 2 * small > layout.num_params:
        print(
            f"{small:,} of {layout.num_params:,} parameters travel as float16 whatever the stages: tensors of one "
            f"dimension or fewer than {SMALL:,} elements. `all | ...` would include them: --codec 'all | int8 | zstd'"
        )
    print(
        "NMSE and bias are those of one update; with ef the rest follows with the next ones.\n"
        "Every message adds about 400 bytes. For a job: FEDMQ_CODEC=tiny, or the stages."
    )
    drawn = {name: row for name, row in rows.items() if row.nmse >= NMSE_DRAWN}
    if drawn:
        _draw(drawn, layout, task_name, out)
        print(f"picture: {out}")
    else:
        print(f"no picture: the NMSE of every codec is below {NMSE_DRAWN:g}")


def _print_table(rows: dict[str, Measurement]) -> None:
    table = Table(box=SIMPLE, padding=(0, 1, 0, 0), pad_edge=False)
    for column in ("codec", "bytes", "ratio", "NMSE", "bias", "enc ms", "dec ms"):
        table.add_column(column, justify="left" if column == "codec" else "right", no_wrap=True)
    for name, row in sorted(rows.items(), key=lambda item: -item[1].payload_bytes):
        label = f"[bold]{name}[/bold]" if name in PRESETS else parse(name).name
        table.add_row(
            label, f"{row.payload_bytes:,}", f"{row.ratio:.1f}x", f"{row.nmse:.4f}", f"{row.bias:.3f}",
            f"{1e3 * row.encode_s:.2f}", f"{1e3 * row.decode_s:.2f}",
        )  # fmt: skip
    Console().print(table)


def _one_training(task: Task, settings: dict[str, str], seed: int) -> tuple[Vector, Layout, dict[str, float]]:
    model = task.build()
    before = read(model)
    result = task.train(model, Context("codecs", 0, seed, settings))
    delta = read(model).weights - before.weights
    norm = math.sqrt(squared_norm(delta))
    if not 0 < norm <= NORM_MAX:  # nor NaN
        raise SettingsError(
            f"the training of {task.name} changed the weights by a norm of {norm:.4g}: it must be above 0, finite and "
            f"at most {NORM_MAX:g}"
        )
    return delta, before.layout, dict(result.metrics)


def _draw(rows: dict[str, Measurement], layout: Layout, title: str, out: Path) -> None:
    try:
        import matplotlib
    except ModuleNotFoundError as error:
        raise SettingsError("the picture needs matplotlib: pip install 'fedmq[demo]'") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(10, 5.5), dpi=110)
    drawn = sorted((row.payload_bytes, row.nmse, name) for name, row in rows.items())
    for number, (size, nmse, name) in enumerate(drawn, 1):
        color = "#c0392b" if name in PRESETS else "#2c6e9c"
        axes.scatter(size, nmse, s=150, color=color, zorder=3, label=f"{number:2d}  {name}")
        axes.annotate(str(number), (size, nmse), color="white", fontsize=7, ha="center", va="center", zorder=4)
    legend = axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize=9, handlelength=1)
    for text, (_, _, name) in zip(legend.get_texts(), drawn, strict=True):
        text.set_fontweight("bold" if name in PRESETS else "normal")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("bytes of one update")
    axes.set_ylabel("error of one update: ||x - decoded||² / ||x||²")
    axes.set_title(f"{title}: {layout.num_params:,} parameters; lower left is better", fontsize=11)
    axes.grid(alpha=0.3, which="both")
    figure.tight_layout()
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(out)
    except OSError as error:
        raise SettingsError(f"cannot write {out}: {error.strerror}") from error
    pyplot.close(figure)
