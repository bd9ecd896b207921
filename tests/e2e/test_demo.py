"""`fedmq demo`, as the README shows it: embedded and on servers of its own."""

import csv
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import safetensors.numpy

from tests.e2e.conftest import clean_environment

LAST_LINE = re.compile(
    r"accuracy (\d\.\d{3}) after (\d+) versions, (\d+) updates, (\d+) bytes sent \((\d+\.\d) x smaller than float32\), "
    r"(\d+) bytes pulled \((\d+\.\d) x smaller\)"
)
FILES = {"report.html", "curves.png", "history.csv", "model.safetensors"}


@dataclass(frozen=True)
class Demo:
    """A demo that ended."""

    out: str
    folder: Path

    @property
    def last_line(self):
        """Return the numbers of the last line: accuracy, versions, updates, then bytes and ratio, up and down."""
        found = LAST_LINE.fullmatch(self.out.splitlines()[-1])
        assert found, self.out
        return tuple(float(number) for number in found.groups())

    @property
    def history(self):
        """Return the rows of history.csv."""
        with (self.folder / "history.csv").open(newline="") as file:
            return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]


def start(folder, *arguments):
    """Start `fedmq demo` in an empty folder."""
    folder.mkdir()
    return subprocess.Popen(
        [Path(sys.executable).with_name("fedmq"), "demo", *arguments], cwd=folder, env=clean_environment({}),
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def finished(process, folder):
    """Wait for a demo's end; return what it left in runs/demo."""
    try:
        out, err = process.communicate(timeout=200)
    finally:
        process.kill()
    assert (process.returncode, err) == (0, ""), out + err
    return Demo(out, folder / "runs/demo")


@pytest.fixture(scope="module")
def demos(tmp_path_factory):
    """Run three demos at once: the default one, and a small one twice."""
    folder = tmp_path_factory.mktemp("demos")
    arguments = {"default": [], "small": ["--updates", "200", "--workers", "4"]}
    arguments["again"] = [*arguments["small"], "--out", "runs/demo"]
    started = {name: start(folder / name, *given) for name, given in arguments.items()}
    return {name: finished(process, folder / name) for name, process in started.items()}


def assert_self_contained(report):
    """Check that a page needs neither the network nor a file beside it."""
    text = report.read_text()
    references = re.findall(r"""(?:src|href|action|data|poster)\s*=\s*["']?([^"'\s>]*)""", text)
    assert references
    assert all(reference.startswith("data:") for reference in references), [r[:80] for r in references]
    assert not re.search(r"https?://|url\(|@import|<script|<link|<iframe", text)


@pytest.mark.parametrize("name", ["model.safetensors", "history.csv", "curves.png"])
def test_the_same_seed_gives_the_same_bytes(demos, name):
    small, again = ((demos[run].folder / name).read_bytes() for run in ("small", "again"))
    assert small == again


def test_another_number_of_workers_gives_another_model(demos):
    assert (demos["small"].folder / "model.safetensors").read_bytes() != (
        demos["default"].folder / "model.safetensors"
    ).read_bytes()


def test_the_default_demo_learns_the_digits(demos):
    demo = demos["default"]
    accuracy, versions, updates, bytes_sent, ratio, _, ratio_down = demo.last_line
    assert accuracy >= 0.94
    assert (versions, updates) == (300, 3000)
    assert ratio > 15  # balanced
    assert ratio_down > 15  # pulls of deltas, 1 x without them
    assert ratio == pytest.approx(3000 * 4 * 9610 / bytes_sent, abs=0.06)


@pytest.mark.parametrize("name", ["default", "small"])
def test_the_history_agrees_with_the_last_line(demos, name):
    demo = demos[name]
    accuracy, versions, updates, bytes_sent, _, bytes_pulled, _ = demo.last_line
    rows = demo.history
    assert rows[0]["version"] == rows[0]["updates"] == rows[0]["bytes_sent"] == 0
    last = rows[-1]
    assert (last["version"], last["updates"], last["bytes_sent"]) == (versions, updates, bytes_sent)
    assert last["bytes_pulled"] == bytes_pulled > 0
    assert last["accuracy"] == pytest.approx(accuracy, abs=0.0006)
    for column in ("version", "updates", "bytes_sent", "time_s"):
        values = [row[column] for row in rows]
        assert values == sorted(values)
    assert len({row["version"] for row in rows}) == len(rows), "a version was evaluated twice"


@pytest.mark.parametrize("name", ["default", "small"])
def test_a_demo_leaves_its_four_files(demos, name):
    folder = demos[name].folder
    assert {path.name for path in folder.iterdir()} == FILES
    assert_self_contained(folder / "report.html")
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    shapes = {name: array.shape for name, array in safetensors.numpy.load_file(folder / "model.safetensors").items()}
    assert shapes == {"0.weight": (128, 64), "0.bias": (128,), "2.weight": (10, 128), "2.bias": (10,)}
    assert f"left in {Path('runs/demo')}/: report.html, curves.png, history.csv, model.safetensors" in demos[name].out


def test_the_demo_on_servers_accounts_for_every_update(tmp_path):
    folder = tmp_path / "run"
    demo = finished(start(folder, "--servers", "--updates", "150", "--workers", "3"), folder)
    account = re.search(r"published (\d+) = applied (\d+) \+ refused (\d+) \+ rejected (\d+)", demo.out)
    assert account, demo.out
    published, applied, refused, rejected = (int(number) for number in account.groups())
    assert published == applied + refused + rejected
    assert applied >= 150
    assert rejected == 0
    accuracy, versions, updates, _, ratio, _, ratio_down = demo.last_line
    assert (versions, updates) == (applied // 3, applied)  # a buffer of all three workers
    assert accuracy > 0.8
    assert ratio > 8
    assert ratio_down > 4
    assert {path.name for path in demo.folder.iterdir()} == FILES
    assert_self_contained(demo.folder / "report.html")
    report = (demo.folder / "report.html").read_text()
    contributed = [int(n) for n in re.findall(r"<td>worker-\d</td><td class=\"n\">(\d+)</td>", report)]
    assert len(contributed) == 3
    assert sum(contributed) == applied
