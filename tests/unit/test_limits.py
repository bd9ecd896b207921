"""The page of limits says what the code does: every number in it is the constant's or the setting's own."""

import importlib
import re
from pathlib import Path

import pytest

from shared.config import ALL_SETTINGS

PAGE = Path(__file__).parents[2] / "ops" / "guides" / "limits.md"
UNITS = {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "hours": 3600, "days": 86_400}
NUMBER = re.compile(r"([0-9][0-9,]*)(?: (KiB|MiB|GiB|hours|days))?")
SETTINGS = {name: info for kind in ALL_SETTINGS for name, info in kind.model_fields.items()}

ROWS = [
    tuple(cell.strip() for cell in line.strip("|\n").split("|"))
    for line in PAGE.read_text().splitlines()
    if line.startswith("|") and not line.startswith(("|---", "| what"))
]


def numbers(cell):
    """Return the numbers of a cell in base units."""
    return [int(number.replace(",", "")) * UNITS.get(unit, 1) for number, unit in NUMBER.findall(cell)]


def names(cell):
    return re.findall(r"`([^`]+)`", cell)


def value(name):
    """Return the value of a setting's default or of a constant."""
    if name.startswith("FEDMQ_"):
        return int(SETTINGS[name.removeprefix("FEDMQ_").lower()].default)
    module, _, constant = name.rpartition(".")
    found = getattr(importlib.import_module(module), constant)
    return 64 if constant == "ID" and found.pattern.endswith("{1,64}") else found


def test_the_page_has_its_rows():
    assert len(ROWS) > 25
    assert all(len(row) == 4 for row in ROWS)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0])
def test_every_number_is_that_of_the_code(row):
    _, limit, named, beyond = row
    assert beyond
    given, named_values = numbers(limit), [value(name) for name in names(named)]
    if given and named_values:
        assert set(named_values) <= set(given), f"the code says {named_values}, the page {limit}"


def test_every_setting_that_bounds_something_stands_there():
    bounds = {f"FEDMQ_{name.upper()}" for name in SETTINGS if "_max" in name}
    listed = {name for row in ROWS for name in names(row[2])}
    elsewhere = {"FEDMQ_COMMIT_AGE_MAX_S", "FEDMQ_UPDATES_MAX"}  # a promise, and when a worker stops
    assert bounds - elsewhere <= listed
