"""`fedmq models diff`: how far two versions lie apart, tensor by tensor."""

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ops.models.facts import evaluation_of
from ops.models.lookup import image_of, number_of, opened
from shared.config import Settings
from shared.model_image import ModelImage

BLOCK = 2**18  # elements compared at once, in float64: memory stays that of two models
WHOLE = "(all weights)"


@dataclass(frozen=True, slots=True)
class Difference:
    """How tensor b differs from tensor a.

    Attributes:
        name: of the tensor.
        elements: how many.
        changed: how many of them differ.
        l2: ||b - a||.
        relative: ||b - a|| / ||a||; NaN where a is 0.
        max_abs: the largest |b - a|.
        cosine: <a, b> / (||a|| ||b||); NaN where one of them is 0.
    """

    name: str
    elements: int
    changed: int
    l2: float
    relative: float
    max_abs: float
    cosine: float


def command(settings: Settings, first: str, second: str, as_json: bool) -> None:
    """Compare two versions: their tensors, the whole, and their evaluations.

    Args:
        settings: job and store.
        first: a version, a tag, or newest.
        second: what is compared with it.
        as_json: one JSON object instead of tables.
    """
    store = opened(settings)
    a, b = number_of(store, first), number_of(store, second)
    found = compare(image_of(store, a), image_of(store, b))
    evaluations = [evaluation_of(store.meta(version)) for version in (a, b)]
    if as_json:
        print(json.dumps(_record(a, b, found, evaluations), indent=2))
        return
    console = Console()
    table = Table(title=f"job {settings.job}, version {b} against version {a}", title_justify="left")
    for column in ("tensor", "changed", "L2", "relative", "max abs", "cosine"):
        table.add_column(column, justify="left" if column == "tensor" else "right", overflow="fold")
    for each in found:
        share = 100 * each.changed / max(1, each.elements)
        numbers = (
            f"{share:.3g} %",
            _shown(each.l2),
            _shown(each.relative),
            _shown(each.max_abs),
            _shown(each.cosine, 6),
        )
        table.add_row(Text(each.name), *numbers, style="bold" if each.name == WHOLE else "")
    console.print(table)
    if any(evaluations):
        console.print(_metrics(a, b, *evaluations))
    else:
        print(f"neither version {a} nor version {b} has been evaluated")


def compare(a: ModelImage, b: ModelImage) -> list[Difference]:
    """Return how each tensor of b differs from that of a, then of all averaged weights together."""
    kept = {spec.name for spec in a.layout.kept}
    ours, theirs = a.tensors(), b.tensors()
    found = [_difference(name, ours[name], theirs[name]) for name in ours]
    whole = _difference(WHOLE, a.weights, b.weights)
    return [*(each for each in found if each.name not in kept), *(each for each in found if each.name in kept), whole]


def _difference(name: str, a: npt.NDArray[np.generic], b: npt.NDArray[np.generic]) -> Difference:
    """Compare in blocks, in float64."""
    squares = np.zeros(4)  # of b - a, of a, of b; and <a, b>
    changed, max_abs = 0, 0.0
    for x, y in _blocks(a.reshape(-1), b.reshape(-1)):
        step = y - x
        squares += (step @ step, x @ x, y @ y, x @ y)
        changed += int(np.count_nonzero(step))
        max_abs = max(max_abs, float(np.abs(step).max(initial=0.0)))
    l2, norm_a, norm_b = np.sqrt(squares[:3]).tolist()
    cosine = min(1.0, max(-1.0, squares[3] / (norm_a * norm_b))) if norm_a and norm_b else math.nan
    return Difference(name, a.size, changed, l2, l2 / norm_a if norm_a else math.nan, max_abs, float(cosine))


def _blocks(
    a: npt.NDArray[np.generic], b: npt.NDArray[np.generic]
) -> Iterator[tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]]:
    for start in range(0, a.size, BLOCK):
        yield a[start : start + BLOCK].astype(np.float64), b[start : start + BLOCK].astype(np.float64)


def _record(a: int, b: int, found: list[Difference], evaluations: list[dict[str, float]]) -> dict[str, object]:
    """Return all of it in JSON's types; what is not defined is null."""
    tensors = [{name: _or_null(value) for name, value in asdict(each).items()} for each in found]
    numbers = dict(zip("ab", evaluations, strict=True))
    return {"a": a, "b": b, "tensors": tensors[:-1], "all": tensors[-1], "evaluation": numbers}


def _or_null(value: object) -> object:
    return None if isinstance(value, float) and math.isnan(value) else value


def _metrics(a: int, b: int, first: dict[str, float], second: dict[str, float]) -> Table:
    table = Table(title="evaluation", title_justify="left")
    for column in ("metric", f"version {a}", f"version {b}", "change"):
        table.add_column(column, justify="left" if column == "metric" else "right", overflow="fold")
    for name in first | second:
        x, y = first.get(name, math.nan), second.get(name, math.nan)
        change = "-" if math.isnan(y - x) else f"{y - x:+.4g}"
        table.add_row(Text(name), _shown(x), _shown(y), change)
    return table


def _shown(value: float, digits: int = 4) -> str:
    return "-" if math.isnan(value) else f"{value:.{digits}g}"
