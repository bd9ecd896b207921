"""Settings: flag, then environment, then TOML file, then default; every problem in one message."""

import os

import pytest

from shared.config import (
    ALL_SETTINGS,
    OTHER_VARIABLES,
    AggregatorSettings,
    EvaluatorSettings,
    WorkerSettings,
    load,
    parse_pairs,
)
from shared.errors import SettingsError


@pytest.fixture(autouse=True)
def clean(monkeypatch):
    for name in list(os.environ):
        if name.upper().startswith("FEDMQ_"):
            monkeypatch.delenv(name)


@pytest.fixture
def toml(tmp_path, monkeypatch):
    """Return a function that writes the TOML file and names it in FEDMQ_CONFIG."""

    def write(text):
        path = tmp_path / "fedmq.toml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        monkeypatch.setenv("FEDMQ_CONFIG", str(path))
        return path

    return write


def problems(kind=AggregatorSettings, flags=None):
    with pytest.raises(SettingsError) as caught:
        load(kind, flags)
    return str(caught.value)


def test_each_source_wins_over_the_next(toml, monkeypatch):
    assert load(WorkerSettings).job == "default"
    toml('job = "toml"')
    assert load(WorkerSettings).job == "toml"
    monkeypatch.setenv("FEDMQ_JOB", "env")
    assert load(WorkerSettings).job == "env"
    assert load(WorkerSettings, {"job": "flag"}).job == "flag"


def test_sources_are_mixed_setting_by_setting(toml, monkeypatch):
    toml('job = "t"\nclient_id = "t"\nseed = 3')
    monkeypatch.setenv("FEDMQ_CLIENT_ID", "e")
    settings = load(WorkerSettings, {"seed": "4"})
    assert (settings.job, settings.client_id, settings.seed, settings.updates_max) == ("t", "e", 4, 0)


def test_a_flag_that_was_not_given_hides_nothing(monkeypatch):
    monkeypatch.setenv("FEDMQ_JOB", "env")
    assert load(WorkerSettings, {"job": None}).job == "env"


@pytest.mark.parametrize("key", ["job", "FEDMQ_JOB"])
def test_toml_takes_plain_and_prefixed_names(toml, key):
    toml(f'{key} = "x"')
    assert load(AggregatorSettings).job == "x"


def test_an_empty_variable_counts_as_not_given(toml, monkeypatch):
    toml('job = "toml"')
    monkeypatch.setenv("FEDMQ_JOB", "")
    monkeypatch.setenv("FEDMQ_BUFFER_SIZE", "")
    settings = load(AggregatorSettings)
    assert (settings.job, settings.buffer_size) == ("toml", 10)
    assert "buffer_size" not in settings.model_fields_set


def test_an_empty_variable_contradicts_no_rule(monkeypatch):
    monkeypatch.setenv("FEDMQ_RULE", "fedasync")
    monkeypatch.setenv("FEDMQ_BUFFER_SIZE", "")
    assert load(AggregatorSettings).rule == "fedasync"


@pytest.mark.parametrize(
    ("variable", "meant"),
    [("FEDMQ_BUFER_SIZE", "FEDMQ_BUFFER_SIZE"), ("FEDMQ_JOBS", "FEDMQ_JOB"), ("FEDMQ_SERVERLR", "FEDMQ_SERVER_LR")],
)
def test_an_unknown_variable_is_named_with_a_suggestion(monkeypatch, variable, meant):
    monkeypatch.setenv(variable, "5")
    assert f"{variable}: no such setting; did you mean {meant}?" in problems()


def test_an_unknown_name_far_from_all_others_gets_no_suggestion(monkeypatch):
    monkeypatch.setenv("FEDMQ_XYZZY", "1")
    assert "FEDMQ_XYZZY: no such setting" in problems()
    assert "did you mean" not in problems()


def test_the_value_of_an_unknown_variable_is_not_repeated(monkeypatch):
    monkeypatch.setenv("FEDMQ_BROKER_PASSWORD", "s3cret")
    assert "FEDMQ_BROKER_PASSWORD" in problems()
    assert "s3cret" not in problems()


def test_an_unknown_name_in_the_file_is_named_with_the_file(toml):
    path = toml('jop = "x"')
    assert f"{path}: jop: no such setting; did you mean FEDMQ_JOB?" in problems()


@pytest.mark.parametrize("kind", ALL_SETTINGS)
def test_settings_of_the_other_programs_may_stand_in_the_same_file(toml, kind):
    toml('job = "x"\nclient_id = "w"\nbuffer_size = 3\ntask = "digits"\npoll_s = 1')
    assert load(kind).job == "x"


@pytest.mark.parametrize("name", sorted(OTHER_VARIABLES))
def test_variables_read_elsewhere_are_no_mistake(monkeypatch, name, tmp_path):
    path = tmp_path / "empty.toml"
    path.touch()
    monkeypatch.setenv(name, str(path))
    load(AggregatorSettings)


def test_every_problem_stands_in_one_message(toml, monkeypatch):
    toml("server_lr = -1\nprefetsch = 3")
    monkeypatch.setenv("FEDMQ_BUFFER_SIZE", "many")
    monkeypatch.setenv("FEDMQ_JBO", "x")
    text = problems(flags={"job": "a b", "codec": "int9", "staleness": "linear", "log_level": "loud"})
    for part in (
        "prefetsch", "FEDMQ_JBO:", "FEDMQ_JOB=a b", "FEDMQ_BUFFER_SIZE=many", "FEDMQ_SERVER_LR=-1",
        "unknown codec 'int9'", "FEDMQ_STALENESS=linear", "FEDMQ_LOG_LEVEL=loud",
    ):  # fmt: skip
        assert part in text
    assert len(text.splitlines()) == 9


def test_an_unknown_rule_is_reported_beside_other_problems():
    text = problems(flags={"rule": "fedsomething", "staleness_max": "-1"})
    assert "fedsomething" in text
    assert "FEDMQ_STALENESS_MAX=-1" in text


def test_an_unknown_rule_is_refused():
    assert "FEDMQ_RULE=fedavg" in problems(flags={"rule": "fedavg"})


@pytest.mark.parametrize(
    ("rule", "name", "value"),
    [("fedasync", "buffer_size", 10), ("fedasync", "server_lr", 1.0), ("fedasync", "weight_by_samples", False),
     ("fedbuff", "alpha", 0.6)],
)  # fmt: skip
def test_a_setting_of_another_rule_is_refused_even_at_its_default(rule, name, value):
    text = problems(flags={"rule": rule, name: value})
    assert f"FEDMQ_{name.upper()}" in text
    assert f"FEDMQ_RULE={rule}" in text


def test_contradictions_stand_together():
    text = problems(flags={"rule": "fedasync", "buffer_size": 3, "commit_interval_s": 31, "commit_age_max_s": 30})
    assert "FEDMQ_BUFFER_SIZE belongs to rule fedbuff" in text
    assert "FEDMQ_COMMIT_INTERVAL_S=31 exceeds FEDMQ_COMMIT_AGE_MAX_S=30" in text


@pytest.mark.parametrize(
    ("name", "bad"),
    [
        ("prefetch", "0"), ("prefetch", "65536"), ("commit_interval_s", "-1"), ("commit_age_max_s", "0"),
        ("buffer_size", "0"), ("buffer_size", "1.5"), ("server_lr", "0"), ("server_lr", "nan"), ("staleness_max", "-1"),
        ("update_bytes_max", "1023"), ("versions_kept", "0"), ("metrics_port", "65536"), ("job", ""), ("job", "a/b"),
        ("job", "x" * 65), ("wait_s", "-1"), ("durable", "perhaps"),
    ],
)  # fmt: skip
def test_values_out_of_range_are_refused_by_name(name, bad):
    assert f"FEDMQ_{name.upper()}" in problems(flags={name: bad})


def test_an_infinite_server_lr_is_refused():
    assert "FEDMQ_SERVER_LR" in problems(flags={"server_lr": "inf"})


@pytest.mark.parametrize(("alpha", "fits"), [("0", False), ("1", True), ("1.01", False), ("nan", False)])
def test_alpha_is_a_share(alpha, fits):
    flags = {"rule": "fedasync", "alpha": alpha}
    if fits:
        assert load(AggregatorSettings, flags).alpha == 1
    else:
        assert f"FEDMQ_ALPHA={alpha}" in problems(flags=flags)


def test_a_missing_or_broken_file_is_named(toml, monkeypatch, tmp_path):
    monkeypatch.setenv("FEDMQ_CONFIG", str(tmp_path / "none.toml"))
    assert "none.toml" in problems()
    assert "fedmq.toml" in (toml("job = "), problems())[1]


def test_a_file_that_is_not_utf8_is_named(toml):
    toml(b'job = "\xff"')
    assert "fedmq.toml" in problems()


def test_the_codec_is_kept_under_its_canonical_name():
    assert load(AggregatorSettings, {"codec": "int8(stochastic)|zstd"}).codec == "int8 | zstd"


def test_settings_cannot_be_changed_afterwards():
    with pytest.raises(ValueError, match="frozen"):
        load(AggregatorSettings).job = "other"


@pytest.mark.parametrize("kind", [WorkerSettings, EvaluatorSettings])
@pytest.mark.parametrize("text", ["lr=0.1, epochs=2", '{"lr": 0.1, "epochs": 2}'])
def test_task_settings_may_come_as_a_flag(kind, text):
    assert load(kind, {"task_settings": text}).task_settings == {"lr": "0.1", "epochs": "2"}


@pytest.mark.parametrize("kind", [WorkerSettings, EvaluatorSettings])
@pytest.mark.parametrize("text", ["lr=0.1, epochs=2", '{"lr": 0.1, "epochs": 2}', '{"lr": "0.1", "epochs": "2"}'])
def test_task_settings_may_come_from_the_environment(kind, text, monkeypatch):
    monkeypatch.setenv("FEDMQ_TASK_SETTINGS", text)
    assert load(kind).task_settings == {"lr": "0.1", "epochs": "2"}


@pytest.mark.parametrize("text", ['task_settings = "lr=0.1,epochs=2"', '[task_settings]\nlr = "0.1"\nepochs = "2"'])
def test_task_settings_may_come_from_the_file(toml, text):
    toml(text)
    assert load(WorkerSettings).task_settings == {"lr": "0.1", "epochs": "2"}


@pytest.mark.parametrize("text", ["lr", "lr=1,epochs", "{lr=1", "[1]"])
def test_task_settings_that_are_no_pairs_are_named(text):
    assert "FEDMQ_TASK_SETTINGS" in problems(WorkerSettings, {"task_settings": text})


def test_parse_pairs_trims_and_splits_at_the_first_equals_sign():
    assert parse_pairs(" a = 1 ,b==, ") == {"a": "1", "b": "="}
    assert parse_pairs("") == {}


def test_the_default_client_id_is_a_valid_id():
    assert WorkerSettings().client_id


def test_every_setting_is_described():
    for kind in ALL_SETTINGS:
        assert all(field.description for field in kind.model_fields.values())
