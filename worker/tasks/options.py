"""The settings of the worked tasks, read and checked in one place.

A task states its own as a frozen dataclass whose defaults are its defaults; a field's name is the setting's.
"""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from typing import Any, TypeVar

from shared.choices import Number, parse
from shared.errors import SettingsError
from worker.tasks.partition import PARTITIONS, Indices, Labels, deal, share_of

WEIGHTS = ("none", "class")
BY_ID = -1  # the share follows from the client's id
_COUNT = Number(None, 1, 1_000_000, whole=True)
RANGES = {
    "share": Number(None, 0, 1_000_000, whole=True),
    "shares": _COUNT,
    "epochs": _COUNT,
    "steps": Number(None, 0, 1_000_000, whole=True),
    "batch": _COUNT,
    "lr": Number(None, 0, 1000, above=True),
    "momentum": Number(None, 0, 1, below=True),
    "proximal": Number(None, 0, 1000),
    "clip": Number(None, 0, 1e6),
    "samples": _COUNT,
    "seq": Number(None, 1, 1000, whole=True),
    "speakers": Number(None, 0, 1_000_000, whole=True),
    "characters": _COUNT,
}
SEED = 1  # of the dealing: all clients of a task must deal alike


@dataclass(frozen=True, slots=True)
class Data:
    """Which data a client has.

    Attributes:
        share: which share is this client's, counted round and round; by its id where not given.
        shares: how many there are.
        partition: how they are dealt, see `worker/tasks/partition.py`.
    """

    share: int = BY_ID
    shares: int = 10
    partition: str = "shards(3)"


@dataclass(frozen=True, slots=True)
class Training(Data):
    """How a client trains by SGD.

    Attributes:
        epochs: passes over its data.
        steps: exactly so many mini-batches instead; 0: by epochs.
        batch: examples a mini-batch.
        lr: learning rate.
        momentum: of SGD.
        proximal: FedProx' mu.
        clip: largest norm of a gradient; 0: any.
        weight: `class` weighs examples by one over how many of their class the client has; `none`: all alike.
    """

    epochs: int = 1
    steps: int = 0
    batch: int = 20
    lr: float = 0.05
    momentum: float = 0.0
    proximal: float = 0.0
    clip: float = 0.0
    weight: str = "none"


Options = TypeVar("Options", bound=Data)


def read(settings: Mapping[str, str], defaults: Options) -> Options:
    """Return the defaults with what the user set.

    Args:
        settings: of the task, name -> text.
        defaults: of the task; its fields are the settings there are.

    Raises:
        SettingsError: an unknown name, or a value that is not allowed; the message names both and what is.
    """
    options: Options = _read(tuple(sorted(settings.items())), defaults)
    return options


@lru_cache(maxsize=10_000)  # a fleet in one process asks for each client's at every trip
def _read(settings: tuple[tuple[str, str], ...], defaults: Options) -> Options:
    known = [field.name for field in fields(defaults)]
    given: dict[str, Any] = {}
    for name, text in settings:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            hint = f"did you mean {near[0]}? There are" if near else "there are"
            raise SettingsError(f"no task setting {name}; {hint} {', '.join(known)}")
        try:
            given[name] = _value(name, text.strip())
        except ValueError as error:
            raise SettingsError(f"task setting {name}={text}: {error}") from error
    return replace(defaults, **given)


def _value(name: str, text: str) -> str | int | float:
    if name == "partition":
        return str(parse(text, PARTITIONS))
    if name == "weight":
        if text not in WEIGHTS:
            raise ValueError(f"must be one of {', '.join(WEIGHTS)}")
        return text
    value = RANGES[name].read(text)
    return int(value) if RANGES[name].whole else value


def share_for(client: str, options: Data) -> int:
    """Return which share is a client's, in [0, shares)."""
    return share_of(client, {} if options.share == BY_ID else {"share": str(options.share)}, options.shares)


def dealt(labels: Labels, shares: int, partition: str, groups: Labels | None = None) -> list[Indices]:
    """Deal a task's data as its settings say; the task caches what this returns.

    Raises:
        SettingsError: it cannot be dealt so.
    """
    try:
        return deal(labels, shares, partition, SEED, groups)
    except ValueError as error:
        raise SettingsError(f"task setting partition={partition}: {error}") from error
