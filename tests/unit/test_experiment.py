"""What an experiment's file becomes, and what is refused in it, all at once and before anything runs."""

import re

import pytest

from ops.simulation.experiment import Variant, read
from shared.errors import SettingsError

BASE = '[base]\ntask = "digits"\nclients = 20\nupdates = 100\n'


@pytest.fixture
def given(tmp_path):
    def write(text, base=BASE, top=""):
        path = tmp_path / "trial.toml"
        path.write_text(f"{top}\n{base}\n{text}")
        return read(path)

    return write


def names(experiment):
    return [variant.name for variant in experiment.variants]


def test_without_variants_there_is_one_run_a_seed(given):
    experiment = given("", top="seeds = [3, 1]")
    assert [(run.variant.name, run.seed) for run in experiment.runs] == [("base", 3), ("base", 1)]
    assert [run.plan.fleet.seed for run in experiment.runs] == [3, 1]
    assert (experiment.title, experiment.text, experiment.seeds) == ("trial", "", (3, 1))


def test_a_grid_gives_every_combination_named_by_what_differs(given):
    experiment = given('[grid]\nserver_lr = [0.5, 1.0]\ncodec = ["none", "tiny"]\nbuffer_size = [5]')
    assert names(experiment) == [
        "server_lr=0.5, codec=none", "server_lr=0.5, codec=tiny",
        "server_lr=1.0, codec=none", "server_lr=1.0, codec=tiny",
    ]  # fmt: skip
    assert {run.plan.aggregator.buffer_size for run in experiment.runs} == {5}
    assert [run.plan.aggregator.server_lr for run in experiment.runs] == [0.5, 0.5, 1.0, 1.0]


def test_variants_are_crossed_with_the_grid_the_first_one_is_the_baseline(given):
    experiment = given('[grid]\nclients = [20, 30]\n[[variant]]\nname = "A,  b"\n[[variant]]\nrule = "fedasync"')
    assert names(experiment) == ["A, b, clients=20", "A, b, clients=30", "rule=fedasync, clients=20",
                                 "rule=fedasync, clients=30"]  # fmt: skip
    assert [run.plan.rule for run in experiment.runs] == ["fedbuff", "fedbuff", "fedasync", "fedasync"]
    assert [run.plan.fleet.clients for run in experiment.runs] == [20, 30, 20, 30]


def test_task_settings_are_single_options(given):
    text = (
        '[base.task_settings]\nlr = 0.1\nbatch = 8\n[grid.task_settings]\nepochs = [1, 2]\n[[variant]]\nname = "slow"\n'
    )
    experiment = given(text + 'task_settings = "lr=0.01"\n[[variant]]\nname = "fast"')
    assert names(experiment) == ["slow, epochs=1", "slow, epochs=2", "fast, epochs=1", "fast, epochs=2"]
    assert [run.plan.fleet.task_settings for run in experiment.runs] == [
        {"lr": lr, "batch": "8", "epochs": epochs} for lr in ("0.01", "0.1") for epochs in ("1", "2")
    ]


def test_a_variant_wins_over_the_base(given):
    experiment = given('[[variant]]\nname = "more"\nclients = 40')
    assert experiment.runs[0].plan.fleet.clients == 40


def test_files_are_looked_for_beside_the_experiments(given, tmp_path, monkeypatch):
    (tmp_path / "tasks").mkdir()
    task = "def build(): pass\ndef train(model, context): pass\ndef evaluate(model, context): pass\n"
    (tmp_path / "tasks/mine.py").write_text(task)
    (tmp_path / "trips.txt").write_text("10\n20\n")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    experiment = given("", base='[base]\ntask = "tasks/mine.py"\nspeed = "trace:trips.txt"\nupdates = 50')
    fleet = experiment.runs[0].plan.fleet
    assert fleet.task == str((tmp_path / "tasks/mine.py").resolve())
    assert fleet.speed == f"trace:{(tmp_path / 'trips.txt').resolve()}"


def test_folders_are_named_after_variant_and_seed(given):
    experiment = given(
        '[[variant]]\nname = "FedBuff, K = 10 (ünï)"\n[[variant]]\nname = "../../etc"', top="seeds = [7]"
    )
    assert [str(run.folder) for run in experiment.runs] == ["fedbuff-k-10-ünï/seed-7", "etc/seed-7"]


def test_long_names_make_short_folders_of_their_own():
    slugs = {Variant("x" * 200 + end, {}).slug for end in "ab"}
    assert len(slugs) == 2
    assert max(map(len, slugs)) <= 80


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("[gird]\nclients = [1]", r"\n  gird: no such option; did you mean grid\?"),
        ("[grid]\nclient = [1]", r"\[grid\] client: no such option; did you mean clients\?"),
        ("[[variant]]\nrule_ = 1", r"\[\[variant\]\] 1 rule_: no such option; did you mean rule\?"),
        ('[[variant]]\nname = "A"\nrul = 1', r"\[\[variant\]\] 'A' rul: no such option; did you mean rule\?"),
        ("[grid]\nclients = []", r"\[grid\] clients = \[\]: give a list"),
        ("[grid]\nclients = 5", r"\[grid\] clients = 5: give a list"),
        ("[grid]\nclients = [20, 20]", r"\[grid\] clients = \[20, 20\]: each value only once"),
        ("[grid]\nclients = [[20]]", r"each one a single value"),
        ("[grid]\nseed = [1, 2]", r"\[grid\] seed: stands at the top of the file, as seeds"),
        ("[grid]\nmetric = ['loss']", r"\[grid\] metric: belongs into \[base\]"),
        ("[[variant]]\ntarget = 0.5", r"target: belongs into \[base\]"),
        ("[grid]\nclients = [20, 30]\n[[variant]]\nclients = 40", r"\[\[variant\]\] 1 clients: is also in \[grid\]"),
        ("[variant]\nclients = 40", r"variant: write \[\[variant\]\]"),
        ("[[variant]]\nclients = [40, 50]", r"clients: one value, please; several to be tried belong into \[grid\]"),
        ("[[variant]]\nname = 5", r"name = 5: give a text"),
        ("[[variant]]\nname = ' '", r"name = ' ': give a text"),
        ("[[variant]]\nname = 'A'\n[[variant]]\nname = 'A'", r"2 variants are called 'A'"),
        ("[[variant]]\n[[variant]]", r"2 variants are called 'base'"),
        ("[[variant]]\nname = 'A b'\n[[variant]]\nname = 'a-b'", r"'A b', 'a-b' would share the folder a-b"),
        ("[[variant]]\nname = '***'", r"'\*\*\*' makes no name of a folder"),
        ("[[variant]]\nname = 'TensorBoard'", r"'TensorBoard' makes no name of a folder"),
        ("[base.task_settings]\nx = [1]", r"\[base\] task_settings.x: one value, please"),
        ("[[variant]]\ntask_settings = 'lr'", r"task_settings: 'lr' is not of the form a=1,b=2"),
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_named(given, text, part):
    with pytest.raises(SettingsError, match=r"trial.toml needs a change:(.|\n)*" + part):
        given(text)


@pytest.mark.parametrize(
    ("top", "part"),
    [
        ("seeds = []", r"seeds = \[\]: give a list of whole numbers"),
        ("seeds = 3", "seeds = 3: give a list"),
        ("seeds = [1.5]", "give a list of whole numbers"),
        ("seeds = [-1]", "give a list of whole numbers"),
        ("seeds = [true]", "give a list of whole numbers"),
        ("seeds = [1, 1]", "each only once"),
        ("title = 5", "title = 5: give a text"),
        ("text = ['a']", "give a text"),
        ("base = 5", r"\[base\]: this is a table"),
    ],
)
def test_what_makes_no_sense_at_the_top_is_named(given, top, part):
    with pytest.raises(SettingsError, match=part):
        given("", top=top, base="" if top.startswith("base") else BASE)


def test_all_problems_stand_in_one_message(given):
    with pytest.raises(SettingsError) as caught:
        given("[grid]\ncodecs = ['none']\n[[variant]]\nrol = 1", top="seeds = []\ntilte = 'x'")
    lines = str(caught.value).splitlines()
    assert len(lines) == 5
    assert [re.search(part, "\n".join(lines)) is not None for part in ("tilte", "seeds", "codecs", "rol")] == [True] * 4


def test_all_plans_are_checked_and_a_common_problem_is_told_once(given):
    text = (
        '[[variant]]\nname = "A"\n[[variant]]\nname = "B"\nrule = "fedprox"\n[[variant]]\nname = "C"\nrule = "fedprox"'
    )
    with pytest.raises(SettingsError) as caught:
        given(text, base=BASE + "dropout = 2\n", top="seeds = [1, 2, 3]")
    message = str(caught.value)
    assert message.count("dropout=2") == 1
    assert message.count("rule=fedprox") + message.count("RULE=fedprox") == 1
    assert "\n  B; C: " in message
    assert "\n  dropout=2" in message


def test_a_task_that_is_not_there_is_found_before_anything_runs(given, tmp_path):
    with pytest.raises(SettingsError, match=re.escape(str(tmp_path / "gone.py"))):
        given("", base='[base]\ntask = "gone.py"\nupdates = 100')


def test_a_file_that_is_no_toml_is_named_with_the_line(given, tmp_path):
    with pytest.raises(SettingsError, match=r"trial.toml: .*line 3"):
        given("", top="seeds = [1]", base="\nbase =")
    with pytest.raises(SettingsError, match=r"none.toml cannot be read: No such file"):
        read(tmp_path / "none.toml")
    (tmp_path / "bytes.toml").write_bytes(b'title = "\xff"')
    with pytest.raises(SettingsError, match=r"bytes.toml"):
        read(tmp_path / "bytes.toml")
