"""Every promise is kept under every fault, and a run depends on its seed alone."""

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from ops.torture import command, schedule, simulator
from ops.torture.account import Totals
from ops.torture.faults import CALM, NAMES, STRIKES, Faults
from ops.torture.jobs import JOBS, Job, _job, aggregator_settings
from ops.torture.schedule import AGGREGATOR_CALLS, EVALUATOR_CALLS, WORKER_CALLS, Schedule

SEEDS, BATCH = 1500, 100
REGRESSIONS = sorted((Path(__file__).parent / "regressions").glob("*.json"))

CALLS = {"aggregator": AGGREGATOR_CALLS, "w": WORKER_CALLS, "evaluator": EVALUATOR_CALLS}


@pytest.fixture(scope="module")
def totals() -> tuple[Totals, Counter[str]]:
    """What all seeds came to."""
    found, deaths = Totals(), Counter()
    for seed in range(SEEDS):
        outcome = simulator.run(schedule.draw(seed))
        found.count(seed, outcome)
        deaths += outcome.deaths
    return found, deaths


def test_every_promise_is_kept(totals):
    found, _ = totals
    assert not found.failed, f"replay with `fedmq torture --seed {found.failed[0][0]}`: {found.failed}"
    for word in ("lost", "duplicated", "unexpected"):
        assert found.updates[word] == 0
    assert found.updates["applied"] > 3 * SEEDS  # and not because nothing happens
    assert min(found.updates[word] for word in ("refused", "rejected", "recovered", "gone")) > SEEDS / 20


def test_every_update_is_in_the_account_once(totals):
    """Also one that was rejected, and applied when its dead letter was sent once more."""
    updates = totals[0].updates
    assert totals[0].struck["letter_replayed"] > 0
    assert updates["made"] == sum(updates[word] for word in ("applied", "refused", "rejected", "gone"))


def test_every_fault_strikes(totals):
    found, _ = totals
    assert set(found.struck) <= set(NAMES)
    rare = {name: found.struck[name] for name in NAMES if found.struck[name] < SEEDS / 40}
    assert not rare


@pytest.fixture(scope="module")
def deaths() -> Counter[str]:
    """Where processes died that die often: of two jobs that between them use every call."""
    often = Faults(
        aggregator_killed=0.5, aggregator_paused=0.4, channel_closed=0.3, worker_killed=0.3, evaluator_killed=0.4,
        commit_confirm_lost=0.1, corrupt=0.2,
    )  # fmt: skip
    common = {"prefetch": 2, "commit_interval_s": 0.0, "commit_age_max_s": 2.0, "versions_kept": 2, "staleness_max": 4}
    small = {"rule": "fedasync", "codec": "int8", "alpha": 0.6, "staleness": "constant"}
    caching = {"rule": "ca2fl", "codec": "ef | sign", "clients": 2, "buffer_size": 2, "downlink": "int8"}
    found: Counter[str] = Counter()
    for settings, seeds in (small, range(150)), (caching, range(250)):
        for seed in seeds:
            plan = schedule.draw(seed, 40, often, Job(common | settings, 2, (3, 5)))
            outcome = simulator.run(plan)
            assert outcome.violation is None, f"{plan.json()}: {outcome.violation}"
            found += outcome.deaths
    return found


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("process", CALLS)
def test_processes_die_before_and_after_every_call(deaths, process, when):
    assert [call for call in CALLS[process] if not deaths[f"{process} {when} {call}"]] == []


def test_aggregators_die_in_commits(totals):
    _, deaths = totals
    assert deaths["aggregator in commit"] > SEEDS / 20


@pytest.mark.parametrize("path", REGRESSIONS, ids=lambda path: path.stem)
def test_what_once_failed_does_not_fail_again(path):
    outcome = simulator.run(Schedule.from_json(path.read_text()))
    assert outcome.violation is None


def test_a_seed_is_a_run_line_by_line():
    for seed in range(30):
        once, again = (simulator.run(schedule.draw(seed), verbose=True) for _ in range(2))
        assert once.trace == again.trace
        assert (once.account, once.struck) == (again.account, again.struck)
    assert simulator.run(schedule.draw(0), verbose=True).trace != once.trace


def test_a_seed_is_the_same_run_in_another_process():
    script = (
        "from ops.torture import schedule, simulator\n"
        "for seed in range(100, 110): print(*simulator.run(schedule.draw(seed), verbose=True).trace, sep='\\n')"
    )
    here = [line for seed in range(100, 110) for line in simulator.run(schedule.draw(seed), verbose=True).trace]
    environment = os.environ | {"PYTHONHASHSEED": "7"}
    there = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, env=environment
    ).stdout  # fmt: skip
    assert there.splitlines() == here


def test_a_schedule_survives_its_file():
    for seed in range(20):
        drawn = schedule.draw(seed)
        again = Schedule.from_json(drawn.json(found="nothing"))
        assert again == drawn


def test_without_faults_nothing_is_refused_but_what_is_stale():
    assert all(getattr(CALM, name) == 0 for name in NAMES)
    for seed in range(40):
        outcome = simulator.run(schedule.draw(seed, chances=CALM))
        assert outcome.violation is None
        assert not outcome.struck
        account = outcome.account
        assert account.made == account.confirmed == account.applied + account.refused + account.rejected
        assert account.recovered == account.gone == 0


@pytest.mark.parametrize("name", NAMES)
def test_a_fault_alone_is_survived(name):
    needed = {"corrupt": 0.4} if name == "letter_replayed" else {}
    struck: Counter[str] = Counter()
    for seed in range(25):
        outcome = simulator.run(schedule.draw(seed, chances=Faults(**needed | {name: 0.4})))
        assert outcome.violation is None, f"seed {seed}: {outcome.violation}"
        struck += outcome.struck
    assert set(struck) == {name, *needed}


def test_every_fault_has_an_action_to_strike():
    assert {name for names in STRIKES.values() for name in names} == set(NAMES)


def test_every_job_is_a_sound_one():
    jobs = [_job(number) for number in range(JOBS)]
    settings = [aggregator_settings(job) for job in jobs]
    assert {s.rule for s in settings} == {"fedbuff", "fedasync", "fedavg", "ace", "ca2fl"}
    assert {s.downlink for s in settings} == {"off", "int8"}
    assert sum(s.part_bytes == 64 for s in settings) > JOBS / 10
    assert {s.robust for s in settings} == {"", "norm(2.5)", "one_slot"}
    assert any(job.shape == (25, 40) for job in jobs)


def test_processes_change_nothing(capsys):
    accounts = []
    for processes in (1, 2):
        command.many(0, 120, 20, processes, None)
        lines = capsys.readouterr().out.splitlines()
        accounts.append([line for line in lines if "seeds/s" not in line])
    assert accounts[0] == accounts[1]
