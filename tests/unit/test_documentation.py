"""The lists of the reference are compared with the code."""

import re
from pathlib import Path

import pytest
import typer.main

import ops.codecs
from ops.cli import app
from shared.command import DONE, FAILED, INTERRUPTED, UNREACHABLE, USAGE
from shared.compression import AUTO, PRESETS
from shared.compression.registry import STAGES
from shared.config import ALL_SETTINGS, OTHER_VARIABLES
from shared.errors import Reason
from shared.metrics import NAMES, AggregatorMetrics, EvaluatorMetrics, WorkerMetrics

ROOT = Path(__file__).parents[2]
GUIDES = ROOT / "ops" / "guides"
REFERENCE = (GUIDES / "reference.md").read_text()


def section(title):
    return re.search(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", REFERENCE, re.S | re.M)[1]


def anchors(text):
    """Return the anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_every_setting_is_documented_with_its_default_and_no_other():
    documented = dict(re.findall(r"^\| `(FEDMQ_\w+)` \| (.*?) \| ", section("Settings"), re.M))
    fields = {f"FEDMQ_{name.upper()}": field for s in ALL_SETTINGS for name, field in s.model_fields.items()}
    assert documented.keys() == fields.keys()
    for name, field in fields.items():
        if field.default_factory is None and field.default not in (None, ""):
            assert documented[name].replace("\\|", "|") == f"`{field.default}`", name
    assert set(re.findall(r"FEDMQ_\w+", REFERENCE)) >= OTHER_VARIABLES


def test_every_metric_is_documented_and_exists():
    documented = set(re.findall(r"^\| `(fedmq_\w+)", section("Metrics"), re.M))
    assert documented == {name for names in NAMES.values() for name in names}


@pytest.mark.parametrize(
    ("kind", "metrics"), [("aggregator", AggregatorMetrics), ("worker", WorkerMetrics), ("evaluator", EvaluatorMetrics)]
)
def test_the_registry_holds_exactly_the_named_metrics(kind, metrics):
    suffix = {"counter": "_total"}
    families = list(metrics().registry.collect())
    assert {f.name + suffix.get(f.type, "") for f in families} == set(NAMES[kind])


def test_every_reject_reason_is_documented():
    assert set(re.findall(r"^\| `(\w+)` \| ", section("Reasons of rejection"), re.M)) >= {str(r) for r in Reason}


def test_every_command_is_documented():
    text = section("Commands and exit codes")
    root = typer.main.get_command(app)
    for name, command in root.commands.items():
        assert name in text, name
        for sub in getattr(command, "commands", {}):
            assert sub in text, f"{name} {sub}"


def test_every_exit_code_is_documented():
    text = section("Commands and exit codes").replace("\n", " ")
    for code, meaning in (
        (DONE, "done"),
        (FAILED, "failed"),
        (USAGE, "wrong usage"),
        (UNREACHABLE, "a server"),
        (INTERRUPTED, "int"),
    ):
        assert f"{code} {meaning}" in text


def test_every_codec_is_documented():
    text = section("Compression, both ways")
    for name in (*STAGES, *PRESETS, AUTO):
        assert re.search(rf"\b{name}\b", text), name


def test_codecs_explains_every_stage():
    explained = set(re.findall(r"\w+", " ".join(ops.codecs.STAGES)))
    assert explained >= set(STAGES)


def test_architecture_names_every_module():
    text = (ROOT / "ARCHITECTURE.md").read_text()
    for package in ("shared", "aggregator", "worker", "ops"):
        for path in (ROOT / package).glob("*.py"):
            assert path.stem.strip("_") in text or path.stem in ("__init__", "__main__"), path


def test_relative_links_lead_somewhere():
    pages = [*ROOT.glob("*.md"), *(ROOT / "ops").rglob("*.md"), *(ROOT / "broker_config").glob("*.md")]
    assert len(pages) > 10
    for page in pages:
        for target, anchor in re.findall(r"\]\((?!http)([^)#\s]*)(?:#([^)\s]*))?\)", page.read_text()):
            path = page.parent / target if target else page
            assert path.exists(), f"{page}: {target}"
            if anchor:
                assert anchor in anchors(path.read_text()), f"{page}: {target}#{anchor}"
