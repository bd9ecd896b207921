"""docker-compose.yml, .env.example and the scripts beside them agree; that all of it runs is for check-in-lab.sh."""

import re
import subprocess
from pathlib import Path

import pytest
from pydantic import TypeAdapter

from shared.config import AggregatorSettings, Settings

ROOT = Path(__file__).parents[2]
COMPOSE = (ROOT / "docker-compose.yml").read_text()
EXAMPLE = dict(re.findall(r"^#([A-Z0-9_]+)=(.*)$", (ROOT / ".env.example").read_text(), re.M))
START = ROOT / "ops" / "docker" / "start"
# Of the machine rather than of the job: paths, and what only another Redis would need.
NOT_PASSED = {"init_model", "record_dir", "record_bytes_max", "durable", "store_replicas"}
JOB_SETTINGS = sorted(set(AggregatorSettings.model_fields) - set(Settings.model_fields) - NOT_PASSED)


@pytest.mark.parametrize("name", JOB_SETTINGS)
def test_every_setting_of_a_job_reaches_the_aggregator(name):
    assert re.search(rf"^  FEDMQ_{name.upper()}:$", COMPOSE, re.M)


@pytest.mark.parametrize("name", JOB_SETTINGS)
def test_the_example_shows_the_settings_own_default(name):
    field = AggregatorSettings.model_fields[name]
    assert TypeAdapter(field.annotation).validate_strings(EXAMPLE[f"FEDMQ_{name.upper()}"]) == field.default


def test_everything_that_can_be_set_is_in_the_example_with_the_same_default():
    used = dict(re.findall(r"\$\{([A-Z0-9_]+):-([^}]*)\}", COMPOSE))
    passed = set(re.findall(r"^  (FEDMQ_\w+):$", COMPOSE, re.M))
    assert set(used) | passed == set(EXAMPLE)
    shown = EXAMPLE | {"HOSTS": used["HOSTS"]}  # the example shows what it looks like
    assert {name: shown[name] for name in used} == used


def test_a_variable_has_one_default_everywhere():
    pairs = set(re.findall(r"\$\{([A-Z0-9_]+):-([^}]*)\}", COMPOSE))
    assert len(pairs) == len({name for name, _ in pairs} | {"HOSTS, of the operator"})


def test_nothing_is_published_beyond_this_machine_by_default():
    published = re.findall(r'ports: \["([^"]+)"\]', COMPOSE)
    assert len(published) == len(re.findall(r"^    ports:", COMPOSE, re.M)) == 5
    assert all(port.startswith(("${BIND:-127.0.0.1}:", "127.0.0.1:")) for port in published)


def start(*arguments):
    return subprocess.run(["sh", str(START), *arguments], capture_output=True, text=True, check=False)


def test_start_runs_the_program_once_everything_is_there(tmp_path):
    file = tmp_path / "server.pem"
    file.write_text("x")
    done = start(str(file), f"{tmp_path}/", "--", "echo", "a b", "c")
    assert (done.returncode, done.stdout, done.stderr) == (0, "a b c\n", "")
    assert [path.name for path in tmp_path.iterdir()] == ["server.pem"]


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda path: None, "is missing"),
        (lambda path: path.mkdir(), "is no file"),
        (lambda path: path.write_text(""), "is empty"),
    ],
)
def test_start_names_what_is_wrong_with_a_file_in_its_first_line(tmp_path, make, said):
    path = tmp_path / "server.pem"
    make(path)
    done = start(str(path), "--", "echo", "never")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines()[0].startswith(f"fedmq: {path} {said}")


def test_start_names_a_folder_that_is_not_there(tmp_path):
    done = start(f"{tmp_path}/data/", "--", "echo", "never")
    assert (done.returncode, done.stdout) == (2, "")
    assert f"{tmp_path}/data/ is no folder" in done.stderr
