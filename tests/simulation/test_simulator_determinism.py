"""The same plan, the same bytes: whole, in pieces, after kills, with a checkpoint at every event or at none."""

import contextlib
from functools import lru_cache

import pytest

from aggregator.rules import RULES
from ops.simulation import plan as plans
from ops.simulation import simulator as module
from ops.simulation.database import Database, Records
from ops.simulation.executor import InProcesses
from tests.simulation.runs import SMALL, TASK, After, Killed, begin, finish, interrupted, kill, small, whole

SCENARIOS = {
    "plain": {},
    "none": {"codec": "none"},
    "int8": {"codec": "int8 | zstd"},
    "tiny": {"codec": "tiny"},
    "feedback": {"codec": "ef | topk(0.2)"},
    "downlink": {"downlink": "on"},
    "downlink topk": {"downlink": "topk(0.2)", "codec": "ef | sign"},
    "bfloat16": {"snapshots": "bfloat16"},
    "dropout": {"dropout": 0.3},
    "churn": {"availability": "churn(0.4, 2)", "rest_s": 20},
    "diurnal": {"availability": "diurnal(6) & churn(0.7)", "updates": 40},
    "network": {"down_mbps": 0.001, "up_mbps": 0.001, "latency_ms": 100, "bandwidth_sigma": 1},
    "rests": {"rest_s": 100},
    "stale": {"staleness_max": 1, "buffer_size": 1, "codec": "ef | topk(0.2)"},
    "stale, many folded": {"staleness_max": 1, "buffer_size": 2, "codec": "tiny", "concurrency": 12},
    "attackers": {"attackers": 0.3, "attack": "sign_flip(2) & noise(1) & flood(5)"},
    "raises": {"task_settings": "raises=1+5,invalid=3"},
    "hours": {"updates": None, "hours": 0.3},
    "target": {"target": 0.5, "stop_at_target": True, "evaluations": 15},
    "correlated": {"correlated": True, "partition": ""},
    "anew": {"persistent": False, "speed": "half_normal(20)"},
    "momentum": {"server_optimizer": "momentum(0.5)"},
    "norm_median": {"robust": "norm_median(1.1, 10)", "attackers": 0.2},
    "throttle": {"robust": "throttle(1.5)"},
    "median": {"robust": "one_slot | median"},
    "zeno": {"robust": "zeno", "trusted_client": "judge", "attackers": 0.2},
    "rounds": {"rule": "fedavg"},
    "rounds over-selected": {"rule": "fedavg", "concurrency": 9, "codec": "ef | topk(0.2)"},
    "rounds, much amiss": {
        "rule": "fedavg", "concurrency": 9, "codec": "ef | topk(0.2)", "up_mbps": 0.0001, "down_mbps": 0.0005,
        "bandwidth_sigma": 2, "dropout": 0.2, "availability": "churn(0.7, 2)", "task_settings": "raises=2",
    },
    "rounds guarded": {"rule": "fedavg", "concurrency": 9, "robust": "aflguard(3)", "trusted_client": "judge"},
} | {f"rule {name}": {"rule": name, "task_settings": "steps=1"} for name in RULES}  # fmt: skip


@pytest.fixture(autouse=True)
def _as_if_longer(monkeypatch):
    """Bring on in small runs what long ones have: commits in the middle of a buffer. No checkpoint by the clock."""
    monkeypatch.setitem(plans.FIXED, "prefetch", 4)
    monkeypatch.setattr(module, "CHECKPOINT_S", 1e9)


@pytest.fixture(params=SCENARIOS)
def scenario(request):
    """Return the name of every kind of plan."""
    return request.param


@lru_cache
def expected(name):
    """Return what an uninterrupted run comes to."""
    return whole(small(SCENARIOS[name]))


def test_two_runs_are_one_and_another_seed_is_another(scenario):
    assert whole(small(SCENARIOS[scenario])) == expected(scenario)
    assert whole(small(SCENARIOS[scenario], seed=6)).sha256 != expected(scenario).sha256


def test_interrupted_and_gone_on_with(scenario, tmp_path):
    outcome, pieces = interrupted(small(SCENARIOS[scenario]), tmp_path / "run.sqlite", 7)
    assert outcome == expected(scenario)
    assert pieces > 2


def test_a_checkpoint_changes_nothing(scenario, monkeypatch):
    """One after each event here; none in the run it is compared with."""
    uninterrupted = expected(scenario)
    monkeypatch.setattr(module, "CHECKPOINT_S", 0.0)
    monkeypatch.setattr(module, "CHECKPOINT_SHARE", 1e12)
    assert whole(small(SCENARIOS[scenario])) == uninterrupted


@pytest.mark.parametrize("events", [2, 17])
def test_what_came_after_the_last_checkpoint_is_done_again(scenario, events, tmp_path):
    path, plan = tmp_path / "run.sqlite", small(SCENARIOS[scenario])
    for stop in (After(events), After(3, kill), After(9, kill)):
        database = Database(path)
        with pytest.raises((KeyboardInterrupt, Killed)):
            finish(begin(plan, database, stop))
        database.close()
    assert finish(begin(plan, Database(path))) == expected(scenario)


@pytest.mark.parametrize("name", ["plain", "tiny", "raises", "rounds, much amiss", "zeno"])
def test_two_processes_are_one(name):
    with contextlib.closing(InProcesses(TASK, 2, SMALL["seed"])) as executor:
        assert finish(begin(small(SCENARIOS[name]), executor=lambda _: executor)) == expected(name)


def test_interrupted_with_two_processes_and_gone_on_with_one(tmp_path):
    plan, path = small(SCENARIOS["rounds, much amiss"]), tmp_path / "run.sqlite"
    database = Database(path)
    with contextlib.closing(InProcesses(TASK, 2, SMALL["seed"])) as executor, pytest.raises(KeyboardInterrupt):
        finish(begin(plan, database, After(25), lambda _: executor))
    database.close()
    assert finish(begin(plan, Database(path))) == expected("rounds, much amiss")


@pytest.mark.parametrize("writes", range(4))
def test_killed_in_the_middle_of_a_checkpoint(writes, tmp_path, monkeypatch):
    """A checkpoint is there as a whole or not at all."""
    plan, path = small(codec="ef | topk(0.2)", staleness_max=1), tmp_path / "run.sqlite"
    uninterrupted, database = whole(plan), Database(path)
    with pytest.raises(KeyboardInterrupt):
        finish(begin(plan, database, After(30)))
    database.close()
    database = Database(path)
    simulator = begin(plan, database, After(30))
    set_item, left = Records.__setitem__, [writes]
    if writes == 3:
        monkeypatch.setattr(database, "commit", kill)
    else:

        def write(records, name, value):
            if name in ("simulation", "store", "plan"):
                left[0] -= 1
                if left[0] < 0:
                    raise Killed
            set_item(records, name, value)

        monkeypatch.setattr(Records, "__setitem__", write)
    with pytest.raises(Killed):
        finish(simulator)
    database.close()
    with monkeypatch.context() as plain:
        plain.setattr(Records, "__setitem__", set_item)
        assert finish(begin(plan, Database(path))) == uninterrupted
