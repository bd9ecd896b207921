"""Settings of the form `name(0.5)` or `name(slope=10, threshold=4)`: what is known, read and checked in one place.

A table says which names there are and which numbers each takes; who builds the thing itself looks it up by name.
"""

import difflib
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

_CALL = re.compile(r"\s*([a-z0-9_]+)\s*(?:\(([^()]*)\))?\s*")


@dataclass(frozen=True, slots=True)
class Number:
    """A parameter.

    Attributes:
        default: its value where none is given; None: it must be given.
        low, high: its range, both included.
        whole: whether it is a whole number.
        above: `low` itself is not allowed.
        below: `high` itself is not allowed.
    """

    default: float | None
    low: float = 0.0
    high: float = 1e9
    whole: bool = False
    above: bool = False
    below: bool = False

    def range(self) -> str:
        """Say what is allowed, e.g. `a number in (0, 1]`."""
        kind = "a whole number" if self.whole else "a number"
        return f"{kind} in {'(' if self.above else '['}{self.low:g}, {self.high:g}{')' if self.below else ']'}"

    def read(self, text: str) -> float:
        """Return the number.

        Raises:
            ValueError: it is none, or out of range; the message says what is allowed.
        """
        try:
            value = float(text)
        except ValueError as error:
            raise ValueError(f"{text!r}, must be {self.range()}") from error
        outside = not self.low <= value <= self.high or (self.above and value == self.low)
        if not math.isfinite(value) or outside or (self.below and value == self.high):
            raise ValueError(f"{text}, must be {self.range()}")
        if self.whole and value != int(value):
            raise ValueError(f"{text}, must be {self.range()}")
        return value


Table = Mapping[str, Mapping[str, Number]]  # name -> its parameters in the order they may be given without a name


@dataclass(frozen=True, slots=True)
class Choice:
    """What was chosen.

    Attributes:
        name: one of the table's.
        numbers: every parameter, in the table's order.
    """

    name: str
    numbers: Mapping[str, float]

    def __getitem__(self, parameter: str) -> float:
        return self.numbers[parameter]

    def __str__(self) -> str:
        given = ", ".join(f"{key}={value:g}" for key, value in self.numbers.items())
        return f"{self.name}({given})" if given else self.name


def parse(text: str, table: Table) -> Choice:
    """Read one choice.

    Args:
        text: `name`, `name(1, 2)` or `name(a=1, b=2)`.
        table: what there is.

    Raises:
        ValueError: anything else; the message names what is allowed.
    """
    match = _CALL.fullmatch(text)
    if match is None or match[1] not in table:
        near = difflib.get_close_matches(match[1] if match else text.strip(), table, 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ValueError(f"must be one of {', '.join(usage(name, table) for name in table)}{hint}")
    parameters = table[match[1]]
    given: dict[str, float] = {}
    inside = (match[2] or "").strip()
    for position, part in enumerate(part.strip() for part in inside.split(",") if inside):
        key, equals, value = (piece.strip() for piece in part.partition("="))
        names = list(parameters)
        name = key if equals else names[position] if position < len(names) else ""
        if name not in parameters or name in given:
            raise ValueError(f"{part!r} is not of {usage(match[1], table)}")
        try:
            given[name] = parameters[name].read(value if equals else key)
        except ValueError as error:
            raise ValueError(f"{match[1]}: {name} is {error}") from error
    missing = [name for name, number in parameters.items() if number.default is None and name not in given]
    if missing:
        raise ValueError(f"{match[1]} needs {', '.join(f'{m} ({parameters[m].range()})' for m in missing)}")
    defaults = {name: number.default for name, number in parameters.items() if number.default is not None}
    return Choice(match[1], {name: given.get(name, defaults.get(name, 0.0)) for name in parameters})


def parse_pipeline(text: str, table: Table) -> tuple[Choice, ...]:
    """Read choices joined by `|`; an empty text is none."""
    return tuple(parse(part, table) for part in text.split("|")) if text.strip() else ()


def usage(name: str, table: Table) -> str:
    """Say how a choice is written: `hinge(slope, threshold)`."""
    parameters = table[name]
    return f"{name}({', '.join(parameters)})" if parameters else name
