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
from shared.rules import RULES, trimmed_rows


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
    text = problems(flags={"rule": "fedbuf"})
    assert "FEDMQ_RULE=fedbuf: must be one of " in text
    assert text.endswith("did you mean fedbuff?")
    assert all(rule in text for rule in RULES)


@pytest.mark.parametrize(
    ("rule", "name", "value"),
    [("fedasync", "buffer_size", 10), ("fedasync", "server_lr", 1.0), ("fedasync", "weight_by_samples", False),
     ("fedasync", "server_optimizer", "sgd"), ("fedbuff", "alpha", 0.6), ("fedbuff", "clients", 0),
     ("fadas", "staleness", "polynomial(0.5)"), ("ace", "buffer_size", 10), ("area", "robust", "")],
)  # fmt: skip
def test_a_setting_of_another_rule_is_refused_even_at_its_default(rule, name, value):
    takers = ", ".join(other for other, spec in RULES.items() if name in spec.uses)
    needed = {"clients": 10} if "clients" in RULES[rule].uses else {}
    assert problems(flags={"rule": rule, name: value} | needed) == (
        "these settings need a change:\n"
        f"  FEDMQ_{name.upper()} means nothing to FEDMQ_RULE={rule}; it belongs to rule {takers}"
    )


def test_contradictions_stand_together():
    text = problems(flags={"rule": "fedasync", "buffer_size": 3, "commit_interval_s": 31, "commit_age_max_s": 30})
    assert "FEDMQ_BUFFER_SIZE means nothing to FEDMQ_RULE=fedasync" in text
    assert "FEDMQ_COMMIT_INTERVAL_S=31 exceeds FEDMQ_COMMIT_AGE_MAX_S=30" in text


@pytest.mark.parametrize(
    ("flags", "server_lr"),
    [
        ({}, 1.0), ({"server_optimizer": "adam"}, 0.01), ({"server_optimizer": " yogi(0.9, 0.99)"}, 0.01),
        ({"rule": "fadas(delay=2)"}, 0.01), ({"server_optimizer": "momentum"}, 1.0),
        ({"server_optimizer": "adam", "server_lr": 1.0}, 1.0),
    ],
)  # fmt: skip
def test_the_default_server_lr_is_that_of_the_optimizer(flags, server_lr):
    assert load(AggregatorSettings, flags).server_lr == server_lr


def test_an_optimizer_that_the_rule_does_not_take_is_one_problem_not_two():
    text = problems(flags={"rule": "fedasync", "server_optimizer": "adam"})
    assert "FEDMQ_SERVER_OPTIMIZER means nothing" in text
    assert "FEDMQ_SERVER_LR" not in text


def test_rounds_take_no_stale_updates():
    assert load(AggregatorSettings, {"rule": "fedavg"}).staleness_max == 0
    assert "FEDMQ_STALENESS_MAX=3: rule fedavg" in problems(flags={"rule": "fedavg", "staleness_max": 3})


@pytest.mark.parametrize("rule", [rule for rule, spec in RULES.items() if "clients" in spec.uses])
def test_rules_that_keep_something_of_every_worker_need_their_number(rule):
    if rule != "rescaled":
        assert f"FEDMQ_RULE={rule} keeps something" in problems(flags={"rule": rule})
    assert load(AggregatorSettings, {"rule": rule, "clients": 10}).clients == 10
    if "buffer_size" in RULES[rule].uses:
        text = problems(flags={"rule": rule, "clients": 10, "buffer_size": 11})
        assert "FEDMQ_BUFFER_SIZE=11 exceeds FEDMQ_CLIENTS=10" in text


# --- defences ---------------------------------------------------------------------------------------------------

ORDER = (
    ": first guards (norm, norm_median, zeno, aflguard, one_slot), then throttle unless there is one_slot, then "
    "bucketing, then one of median, trimmed_mean, krum, multi_krum, centered_clipping, each at most once"
)


@pytest.mark.parametrize(
    ("robust", "rest"),
    [
        ("", {}), ("norm(1)", {}), ("norm(10) | norm_median | one_slot | bucketing(2) | trimmed_mean(0.2)", {}),
        ("norm_median(1.5, window=10)", {"rule": "fedasync"}), ("one_slot | norm_median | trimmed_mean(0.3)", {}),
        ("throttle(1.1)", {}), ("one_slot", {"rule": "fadas"}),
        ("zeno | aflguard | one_slot", {"trusted_client": "server"}), ("median", {"buffer_size": 3}),
        ("aflguard(2)", {"trusted_client": "s", "rule": "fedasync"}), ("krum(3)", {"buffer_size": 9}),
        ("bucketing(2)|krum(1)", {"buffer_size": 9}), ("multi_krum(2, 6)", {}), ("multi_krum(3)", {"buffer_size": 9}),
        ("trimmed_mean(0.1)", {}), ("trimmed_mean(0.34)", {"buffer_size": 3}), ("norm(1)", {}),
        ("centered_clipping(10)", {"buffer_size": 1}), ("norm(1)", {"rule": "ace", "clients": 5}),
    ],
)  # fmt: skip
def test_defences_that_go_together(robust, rest):
    assert load(AggregatorSettings, {"robust": robust, **rest}).robust == robust


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        ({"robust": "median | norm(1)"}, "FEDMQ_ROBUST=median | norm" + ORDER),
        ({"robust": "bucketing | one_slot | median"}, "FEDMQ_ROBUST=bucketing | one_slot | median" + ORDER),
        ({"robust": "throttle | norm(1)"}, "FEDMQ_ROBUST=throttle | norm" + ORDER),
        ({"robust": "one_slot | throttle"}, "FEDMQ_ROBUST=one_slot | throttle" + ORDER),
        ({"robust": "norm(1) | norm(2)"}, "FEDMQ_ROBUST=norm | norm" + ORDER),
        ({"robust": "median | krum(1)"}, "FEDMQ_ROBUST=median | krum" + ORDER),
        ({"robust": "median | median"}, "FEDMQ_ROBUST=median | median" + ORDER),
        (
            {"robust": "norm(1) | bucketing"},
            "FEDMQ_ROBUST: bucketing prepares for one of median, trimmed_mean, krum, multi_krum, centered_clipping: "
            "add one behind it",
        ),
        (
            {"robust": "throttle | krum(1)"},
            "FEDMQ_ROBUST: throttle lets a client into the buffer several times, krum takes every update for another "
            "client's: use one_slot instead of throttle",
        ),
        (
            {"robust": "median", "rule": "fedasync"},
            "FEDMQ_ROBUST: median goes with the mean of a buffer, and rule fedasync takes none: choose FEDMQ_RULE from "
            "fedbuff, fedavg, fednova, rescaled, fadas",
        ),
        (
            {"robust": "one_slot | centered_clipping(1)", "rule": "ca2fl", "clients": 20},
            "FEDMQ_ROBUST: one_slot, centered_clipping go with the mean of a buffer, and rule ca2fl takes none: choose "
            "FEDMQ_RULE from fedbuff, fedavg, fednova, rescaled, fadas",
        ),
        (
            {"robust": "zeno", "rule": "fedasync", "trusted_client": "s"},
            "FEDMQ_ROBUST: zeno scales an update, fedasync mixes whole models: use aflguard, or another FEDMQ_RULE",
        ),
        (
            {"robust": "median", "weight_by_samples": True},
            "FEDMQ_WEIGHT_BY_SAMPLES=true: median bounds what a lie can do, and a client itself says how many samples "
            "it has; leave it at false",
        ),
        (
            {"robust": "zeno | aflguard"},
            "FEDMQ_TRUSTED_CLIENT must be given for zeno and aflguard: the id of a worker that trains on the server's "
            "own data",
        ),
        (
            {"robust": "norm(1)", "trusted_client": "s"},
            "FEDMQ_TRUSTED_CLIENT=s does nothing without zeno or aflguard in FEDMQ_ROBUST; its updates would not be "
            "used",
        ),
        (
            {"rule": "area", "clients": 10, "trusted_client": "s"},
            "FEDMQ_TRUSTED_CLIENT=s: rule area takes no FEDMQ_ROBUST to use it",
        ),
        (
            {"robust": "krum(4)"},
            "FEDMQ_ROBUST=krum(attackers=4) needs at least 11 updates to choose from, there are 10: raise "
            "FEDMQ_BUFFER_SIZE to 11",
        ),
        (
            {"robust": "bucketing(3) | multi_krum(2)"},
            "FEDMQ_ROBUST=multi_krum(attackers=2, chosen=0) needs at least 7 buckets to choose from, there are 4 in "
            "buckets of 3: raise FEDMQ_BUFFER_SIZE to 19",
        ),
        (
            {"robust": "median", "buffer_size": 2},
            "FEDMQ_ROBUST=median needs at least 3 updates to choose from, there are 2: raise FEDMQ_BUFFER_SIZE to 3",
        ),
        (
            {"robust": "trimmed_mean(0.09)"},
            "FEDMQ_ROBUST=trimmed_mean(share=0.09) trims none of 10: share must be in [0.1, 0.5) to trim one on each "
            "side",
        ),
        (
            {"robust": "bucketing(3) | trimmed_mean(0.2)"},
            "FEDMQ_ROBUST=trimmed_mean(share=0.2) trims none of 4: share must be in [0.25, 0.5) to trim one on each "
            "side",
        ),
        (
            {"robust": "multi_krum(2, 7)"},
            "FEDMQ_ROBUST=multi_krum(attackers=2, chosen=7): chosen must be in [1, 10 - attackers - 2 = 6], or 0 for 6",
        ),
    ],
)
def test_defences_that_do_not_go_together_are_one_message(flags, problem):
    assert problems(flags=flags) == f"these settings need a change:\n  {problem}"


def test_the_buffer_size_that_a_message_asks_for_is_enough():
    for robust, buffer_size in (("krum(4)", 11), ("bucketing(3) | krum(2)", 19), ("median", 3)):
        load(AggregatorSettings, {"robust": robust, "buffer_size": buffer_size})
        assert f"raise FEDMQ_BUFFER_SIZE to {buffer_size}" in problems(
            flags={"robust": robust, "buffer_size": buffer_size - 1}
        )


@pytest.mark.parametrize("rows", [3, 7, 10, 29, 1000, 99_999])
def test_the_share_that_a_message_asks_for_trims_one_on_each_side(rows):
    text = problems(flags={"robust": "trimmed_mean(0)", "buffer_size": rows})
    share = float(text.split("share must be in [")[1].split(",")[0])
    assert trimmed_rows(share, rows) >= 1
    load(AggregatorSettings, {"robust": f"trimmed_mean({share})", "buffer_size": rows})


@pytest.mark.parametrize(
    ("robust", "message"),
    [
        ("norm", "norm needs limit (a number in (0, 1e+11])"), ("norm(0)", "norm: limit is 0, must be"),
        ("norm_median(2, 9)", "window is 9, must be a whole number in [10, 10000]"), ("krum", "krum needs attackers"),
        ("throttle(1)", "throttle: q is 1, must be a number in [1.01, 1e+06]"), ("krum(1.5)", "attackers is 1.5"),
        ("trimmed_mean(0.5)", "share is 0.5, must be a number in [0, 0.5)"), ("meadian", "did you mean median?"),
        ("bucketing(1) | median", "size is 1, must be"), ("centered_clipping", "needs radius"), ("|", "must be one of"),
    ],
)  # fmt: skip
def test_a_defence_that_is_none_is_one_message(robust, message):
    text = problems(flags={"robust": robust})
    assert text.startswith(f"these settings need a change:\n  FEDMQ_ROBUST={robust}: ")
    assert message in text
    assert len(text.splitlines()) == 2


@pytest.mark.parametrize("client", ["a b", "a/b", "x" * 65])
def test_the_trusted_client_is_an_id(client):
    assert f"FEDMQ_TRUSTED_CLIENT={client}: must be of" in problems(flags={"trusted_client": client, "robust": "zeno"})


@pytest.mark.parametrize(
    ("share", "rows", "trimmed"),
    [(0.29, 100, 29), (0.3, 10, 3), (0.2, 10, 2), (0.1, 10, 1), (0.2, 4, 0), (0.25, 4, 1), (0.49, 3, 1), (0, 10, 0),
     (0.5 - 1e-12, 4, 1), (0.5 - 1e-12, 100_000, 49_999), (1 / 3, 3, 1)],
)  # fmt: skip
def test_rows_trimmed_are_the_floor_of_the_share_and_leave_one(share, rows, trimmed):
    assert trimmed_rows(share, rows) == trimmed


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
    assert "none.toml is not there: name another one" in problems()
    monkeypatch.setenv("FEDMQ_CONFIG", "/run/fedmq-none/fedmq.toml")
    assert "`docker compose up -d secrets` makes it" in problems()
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
