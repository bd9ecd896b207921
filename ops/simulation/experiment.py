"""`experiment.toml`: variants of a simulation, each run with several seeds; all of it is checked before anything runs.

    seeds = [1, 2, 3]                # each variant is run with each
    [base]                           # what all have in common: options of `fedmq simulate`
    [grid]                           # every combination of the listed values
    [[variant]]                      # a named combination; each is crossed with the grid

Inside, options are flat: what stands under `task_settings` is called `task_settings.<name>`, so that a grid can vary it
and a variant can change one of several.
"""

import difflib
import hashlib
import itertools
import re
import tomllib
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ops.simulation.plan import Plan, option_names, path_of_task, plan_of
from ops.simulation.speeds import TRACE
from shared.config import parse_pairs
from shared.errors import SettingsError
from worker.task import BUILT_IN, Task

TOP = ("title", "text", "seeds", "base", "grid", "variant")
TASK = "task_settings"
OF_BASE = ("metric", "target")  # one picture and one table are about one of each
TAKEN = ("tensorboard",)  # folders beside those of the variants
SLUG_CHARS_MAX = 80

Options = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Variant:
    """One combination of options.

    Attributes:
        name: as the report calls it.
        options: flat, without those of the base.
    """

    name: str
    options: Options

    @property
    def slug(self) -> str:
        """Return its folder's name: letters of any script, digits and _ . + -."""
        plain = re.sub(r"[^\w.+-]+", "-", self.name.lower()).strip("-.")
        if len(plain) <= SLUG_CHARS_MAX:
            return plain
        return f"{plain[: SLUG_CHARS_MAX - 9]}-{hashlib.sha256(plain.encode()).hexdigest()[:8]}"


@dataclass(frozen=True, slots=True)
class Run:
    """One simulation of a comparison."""

    variant: Variant
    seed: int
    plan: Plan

    @property
    def folder(self) -> Path:
        """Return where it is kept, inside the comparison's folder."""
        return Path(self.variant.slug) / f"seed-{self.seed}"


@dataclass(frozen=True, slots=True)
class Experiment:
    """What is compared.

    Attributes:
        title: of the report.
        text: of the report, may be empty.
        seeds: at least one.
        base: flat options that all variants have.
        variants: at least one; the first is the baseline.
        runs: variant by variant, then by seed.
    """

    title: str
    text: str
    seeds: tuple[int, ...]
    base: Options
    variants: tuple[Variant, ...]
    runs: tuple[Run, ...]

    @property
    def metric(self) -> str:
        """What the target is about."""
        return self.runs[0].plan.fleet.metric

    @property
    def target(self) -> float:
        """The value to be reached; 0: none."""
        return self.runs[0].plan.fleet.target


def read(path: Path) -> Experiment:
    """Read and check an experiment.

    Raises:
        SettingsError: every problem found, one a line.
    """
    plain = _toml(path)
    problems = [f"{key}: {_no_such(key, TOP)}" for key in plain if key not in TOP]
    title, text = (_text(plain, key, problems) for key in ("title", "text"))
    seeds = _seeds(plain.get("seeds", [0]), problems)
    base = _single(_flat(plain.get("base", {}), "[base]", problems), "[base]", problems)
    grid = _lists(_flat(plain.get("grid", {}), "[grid]", problems, OF_BASE), problems)
    given = _given(plain.get("variant", []), grid, problems)
    _refuse(path, problems)
    variants = _crossed(given, grid, base)
    _refuse(path, _equal_names(variants))
    runs = _runs(variants, base, seeds, path.parent, problems)
    _refuse(path, problems or _task_problems(runs))
    return Experiment(title or path.stem, text, seeds, base, tuple(variants), tuple(runs))


def _toml(path: Path) -> Options:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SettingsError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:  # its message names line and column
        raise SettingsError(f"{path}: {error}") from error


def _refuse(path: Path, problems: Iterable[str]) -> None:
    if problems := list(problems):
        raise SettingsError("\n  ".join([f"{path} needs a change:", *problems]))


def _no_such(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(known), 1)
    return "no such option" + (f"; did you mean {near[0]}?" if near else f"; there are {', '.join(known)}")


def _text(plain: Options, key: str, problems: list[str]) -> str:
    value = plain.get(key, "")
    if not isinstance(value, str):
        problems.append(f'{key} = {value!r}: give a text, in "quotes"')
        return ""
    return value.strip()


def _seeds(value: Any, problems: list[str]) -> tuple[int, ...]:
    if not isinstance(value, list) or not value or any(type(seed) is not int or seed < 0 for seed in value):
        problems.append(f"seeds = {value!r}: give a list of whole numbers from 0 on, e.g. [1, 2, 3]")
        return (0,)
    if len(set(value)) < len(value):
        problems.append(f"seeds = {value!r}: each only once")
    return tuple(value)


# --- tables of options


def _flat(table: Any, where: str, problems: list[str], forbidden: tuple[str, ...] = ()) -> Options:
    """Return a table's options, those of the task as `task_settings.<name>`."""
    if not isinstance(table, dict):
        problems.append(f"{where}: this is a table; write {where} in a line of its own and the options under it")
        return {}
    known, flat = option_names(), Options()
    for key, value in table.items():
        if key == "seed":
            problems.append(f"{where} {key}: stands at the top of the file, as seeds = [...]")
        elif key in forbidden:
            problems.append(f"{where} {key}: belongs into [base], all runs are compared by the same")
        elif key == TASK:
            flat |= _task_settings(value, where, problems)
        elif key in known:
            flat[key] = value
        else:
            problems.append(f"{where} {key}: {_no_such(key, known)}")
    return flat


def _task_settings(value: Any, where: str, problems: list[str]) -> Options:
    try:
        pairs = value if isinstance(value, dict) else parse_pairs(value)
    except ValueError as error:
        problems.append(f"{where} {TASK}: {error}")
        return {}
    return {f"{TASK}.{name}": setting for name, setting in pairs.items()}


def _single(options: Options, where: str, problems: list[str]) -> Options:
    for key, value in options.items():
        if isinstance(value, list | dict):
            problems.append(f"{where} {key}: one value, please; several to be tried belong into [grid]")
    return options


def _lists(options: Options, problems: list[str]) -> Options:
    for key, values in options.items():
        if not isinstance(values, list) or not values:
            problems.append(f"[grid] {key} = {values!r}: give a list of the values to be tried")
        elif any(isinstance(value, list | dict) for value in values):
            problems.append(f"[grid] {key} = {values!r}: each one a single value")
        elif len({repr(value) for value in values}) < len(values):
            problems.append(f"[grid] {key} = {values!r}: each value only once")
    return options


# --- variants


def _given(tables: Any, grid: Options, problems: list[str]) -> list[Variant]:
    """Return the variants as they stand in the file; those without a name have an empty one."""
    if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
        problems.append("variant: write [[variant]], with two brackets, above each")
        return []
    variants = []
    for number, table in enumerate(tables, 1):
        name, rest = table.get("name", ""), {key: value for key, value in table.items() if key != "name"}
        if not isinstance(name, str) or ("name" in table and not name.strip()):
            problems.append(f"[[variant]] {number} name = {name!r}: give a text, in quotes, or none at all")
            name = ""
        where = f"[[variant]] {name!r}" if name else f"[[variant]] {number}"
        options = _single(_flat(rest, where, problems, OF_BASE), where, problems)
        problems += [f"{where} {key}: is also in [grid]; only one can say what it is" for key in options if key in grid]
        variants.append(Variant(" ".join(name.split()), options))
    return variants


def _crossed(given: list[Variant], grid: Options, base: Options) -> list[Variant]:
    """Cross the variants with the grid, and name those without a name by what differs between all."""
    points = [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]
    crossed = [(variant, point) for variant in given or [Variant("", {})] for point in points]
    every = [base | variant.options | point for variant, point in crossed]
    keys = dict.fromkeys([*(key for variant in given for key in variant.options), *grid])
    differing = [key for key in keys if len({repr(options.get(key)) for options in every}) > 1]
    named = []
    for variant, point in crossed:
        told = point if variant.name else variant.options | point
        parts = [variant.name] if variant.name else []
        parts += [f"{key.removeprefix(TASK + '.')}={told[key]}" for key in differing if key in told]
        named.append(Variant(", ".join(parts) or "base", variant.options | point))
    return named


def _equal_names(variants: list[Variant]) -> list[str]:
    names = Counter(variant.name for variant in variants)
    problems = [f"{count} variants are called {name!r}: give each a name" for name, count in names.items() if count > 1]
    slugs = defaultdict[str, set[str]](set)
    for variant in variants:
        slugs[variant.slug].add(variant.name)
        if not variant.slug or variant.slug in TAKEN:
            problems.append(f"{variant.name!r} makes no name of a folder: give another")
    for slug, same in slugs.items():
        if slug and len(same) > 1:
            problems.append(f"{', '.join(map(repr, sorted(same)))} would share the folder {slug}: name them otherwise")
    return problems


# --- plans


def _runs(
    variants: list[Variant], base: Options, seeds: tuple[int, ...], folder: Path, problems: list[str]
) -> list[Run]:
    """Build every plan; a problem that several have is told once."""
    found = defaultdict[str, dict[str, None]](dict)
    runs = []
    for variant in variants:
        given = _nested(base | variant.options, folder)
        for seed in seeds:
            try:
                runs.append(Run(variant, seed, plan_of(given | {"seed": seed})))
            except SettingsError as error:
                for line in str(error).split("\n  ")[1:]:
                    found[line][variant.name] = None
    for line, names in found.items():
        problems.append(line if len(names) == len(variants) else f"{'; '.join(names)}: {line}")
    return runs


def _nested(flat: Options, folder: Path) -> Options:
    """Return options as `plan_of` takes them; files are looked for beside the experiment's."""
    options = {key: value for key, value in flat.items() if not key.startswith(TASK + ".")}
    settings = {key.removeprefix(TASK + "."): value for key, value in flat.items() if key not in options}
    if settings:
        options[TASK] = settings
    task, speed = options.get("task"), options.get("speed")
    if isinstance(task, str) and task not in BUILT_IN and (task.endswith(".py") or (folder / task).is_file()):
        options["task"] = str((folder / Path(task).expanduser()).resolve())
    if isinstance(speed, str) and speed.startswith(TRACE):
        trace = Path(speed.removeprefix(TRACE).strip()).expanduser()
        options["speed"] = f"{TRACE}{(folder / trace).resolve()}"
    return options


def _task_problems(runs: Iterable[Run]) -> list[str]:
    problems = []
    for task in dict.fromkeys(path_of_task(run.plan.fleet.task) for run in runs):
        try:
            Task.load(task, needs=("build", "train", "evaluate"))
        except SettingsError as error:
            problems.append(str(error))
    return problems


def shown(options: Mapping[str, Any]) -> str:
    """Return options in one line."""
    return ", ".join(f"{key} = {value}" for key, value in options.items())
