"""The picture: error against size of our codecs and others on the real update."""

from pathlib import Path
from typing import Any

from ops.bench.peers_codecs import SHARES, Result
from ops.bench.recorded import Delta

RED, GREEN, BLUE, ORANGE, VIOLET, BROWN, GREY = (
    "#c1272d", "#0a7d4f", "#1f5fa8", "#c97a08", "#7b4ab5", "#8a5a2b", "#6b6b6b",
)  # fmt: skip
DRAWN = {  # codec -> (label, colour, offset of the label in points, its alignment)
    "int8": ("int8", BLUE, (9, -5), "left"),
    "int8 | zstd": ("safe: int8 | zstd", BLUE, (-2, -16), "center"),
    "int4": ("int4", BLUE, (8, 4), "left"),
    "int4 | zstd": ("int4 | zstd", BLUE, (-4, 8), "center"),
    "int2(nearest) | zstd": ("int2(nearest) | zstd", BLUE, (9, -3), "left"),
    "nf4": ("nf4", VIOLET, (7, 6), "left"),
    "nf4 | zstd": ("nf4 | zstd", VIOLET, (-6, 9), "center"),
    "rotate | eden(1)": ("eden(1)", ORANGE, (9, 0), "left"),
    "rotate | eden(2)": ("eden(2)", ORANGE, (9, -1), "left"),
    "rotate | eden(3)": ("eden(3)", ORANGE, (8, -11), "left"),
    "rotate | eden(4) | zstd": ("eden(4)", ORANGE, (-2, -15), "center"),
    "uniform(step=2) | pack | zstd": ("balanced: uniform(step=2)", RED, (-9, -12), "right"),
    "uniform(step=1) | pack | zstd": ("step=1", RED, (-9, -9), "right"),
    "uniform(step=4) | pack | zstd": ("step=4", RED, (-6, -14), "right"),
    "topk(0.018) | ternary | zstd": ("tiny: topk(0.018)", GREEN, (4, -18), "right"),
    "topk(0.05) | int4(nearest) | zstd": ("topk(0.05) | int4", GREEN, (-10, -13), "right"),
}
ZSTD = (("int8", "int8 | zstd"), ("int4", "int4 | zstd"), ("nf4", "nf4 | zstd"))
PEERS = {  # peer -> (label, offset in points)
    "SZ3, relative bound 0.1": ("SZ3 0.1", (7, 2)),
    "SZ3, relative bound 0.03": ("SZ3 0.03", (7, -2)),
    "SZ3, relative bound 0.01": ("SZ3 0.01", (7, -3)),
    "SZ3, relative bound 0.001": ("SZ3 0.001", (7, 3)),
    "ZFP, relative bound 0.1": ("ZFP 0.1", (6, -11)),
    "ZFP, relative bound 0.01": ("ZFP 0.01", (7, 1)),
    "blosc2, 1 bits of mantissa, bitshuffle, zstd": ("blosc2, 1 bit", (6, 5)),
    "blosc2, 4 bits of mantissa, bitshuffle, zstd": ("blosc2, 4 bits", (6, 4)),
    "bitsandbytes NF4": ("bitsandbytes NF4", (7, -9)),
    "bitsandbytes 8 bit": ("bitsandbytes 8 bit", (6, 5)),
}
NMSE = (5e-5, 1.3)  # drawn; the float types lie far below and to the right


def draw(delta: Delta, points: dict[str, tuple[float, float]], peers: list[Result], path: Path) -> None:
    """Draw bits per parameter against the error of one update, both logarithmic.

    Args:
        delta: on which.
        points: codec -> bits per parameter, NMSE.
        peers: other compressors.
        path: PNG to write.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 5.8), dpi=110)
    steps = [p for name, p in points.items() if name.startswith("uniform") and "| pack" in name and "stoch" not in name]
    shares = [points[f"topk({share:g}) | ternary | zstd"] for share in SHARES]
    for curve, colour in ((steps, RED), (shares, GREEN)):
        axes.plot(*zip(*sorted(curve), strict=True), "-", color=colour, lw=2.2, alpha=0.6, zorder=2)
    for plain, coded in ZSTD:
        axes.plot(*zip(points[plain], points[coded], strict=True), ":", color=DRAWN[plain][1], lw=1.5, zorder=2)
    for name, (label, colour, offset, side) in DRAWN.items():
        whole = name.endswith("zstd")
        axes.plot(*points[name], "o", ms=7.5, mew=1.6, color=colour, mfc=colour if whole else "white", zorder=4)
        _label(axes, label, points[name], offset, colour, 9.5, side)
    for peer in peers:
        if peer.name in PEERS:
            at = (32 / peer.ratio, peer.nmse)
            axes.plot(*at, "X", color=GREY, ms=6.5, mew=0, zorder=3)
            _label(axes, PEERS[peer.name][0], at, PEERS[peer.name][1], GREY, 8.5, "left")
    _frame(axes, f"Error against size: one {delta.name}, {delta.values.size / 1e6:.1f}M parameters")
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    pyplot.close(figure)


def _label(
    axes: Any, text: str, at: tuple[float, float], offset: tuple[int, int], colour: str, size: float, side: str
) -> None:
    axes.annotate(text, at, xytext=offset, textcoords="offset points", fontsize=size, color=colour, ha=side)


def _frame(axes: Any, title: str) -> None:
    axes.set(xscale="log", yscale="log", xlim=(0.03, 20), ylim=NMSE)
    axes.set_xlabel("bits per parameter (float32 has 32)")
    axes.set_ylabel("||x - decoded||² / ||x||²  (lower left is better)")
    ticks = [0.05, 0.1, 0.2, 0.5, 1, 2, 4, 8]
    axes.set_xticks(ticks, [f"{tick:g}\n{32 / tick:.0f}x" for tick in ticks])
    axes.set_xticks([], minor=True)
    axes.grid(True, color="#e6e6e6", lw=0.7)
    axes.set_title(title, fontsize=11, loc="left")
    notes = "filled: with zstd    open: without\nlines: uniform(step), topk(p) | ternary\ncrosses: other compressors"
    axes.text(0.02, 0.04, notes, transform=axes.transAxes, fontsize=9, color="#444444", linespacing=1.5)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
