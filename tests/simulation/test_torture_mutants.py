"""Whatever is broken on purpose is seen, by the checker it should be seen by, and becomes a short schedule."""

import json

import pytest
from typer.testing import CliRunner

from ops.cli import app
from ops.torture import command, schedule, simulator
from ops.torture.schedule import Schedule
from ops.torture.shrink import fails_as, shrink
from tests.simulation import mutants
from tests.simulation.mutants import CONDITIONS, MUTANTS

SEEDS_MAX = 400  # the rarest needs some hundred


def first_failure(seeds, **conditions):
    for seed in range(seeds):
        plan = schedule.draw(seed, **conditions)
        if (violation := simulator.run(plan).violation) is not None:
            return plan, violation
    raise AssertionError(f"{seeds} seeds and nobody saw it")


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.__name__)
def test_a_mutant_is_seen(mutant, monkeypatch):
    mutant(monkeypatch.setattr)
    _, violation = first_failure(SEEDS_MAX, **CONDITIONS.get(mutant, {}))
    assert violation.checker in MUTANTS[mutant], str(violation)


def test_every_checker_has_its_mutants():
    seen_by = {checker for checkers in MUTANTS.values() if len(checkers) == 1 for checker in checkers}
    assert seen_by == {"ledger", "oracle", "mass", "liveness"}
    assert len(MUTANTS) >= 12


@pytest.mark.parametrize("mutant", [mutants.no_checksum, mutants.the_head_moves_before_the_ids])
def test_a_failure_becomes_short(mutant, monkeypatch):
    with monkeypatch.context() as patch:
        mutant(patch.setattr)
        plan, violation = first_failure(SEEDS_MAX)
        fails = fails_as(violation.checker)
        short = shrink(plan, fails)
        assert fails(short)
        assert len(short.events) <= 8 < len(plan.events)
        for left_out in range(len(short.events)):  # nothing of it can be spared
            events = short.events[:left_out] + short.events[left_out + 1 :]
            assert not fails(Schedule(short.seed, short.job, events))
    assert not fails(short)  # it was the mutant


def test_shrinking_is_bounded(monkeypatch):
    calls = []
    shrink(schedule.draw(0), lambda plan: bool(calls.append(plan)), runs_max=10)
    assert len(calls) == 10


def test_the_command_says_how_to_repeat_it(monkeypatch, capsys, tmp_path):
    mutants.a_rejection_leaves_no_dead_letter(monkeypatch.setattr)
    with pytest.raises(command.TortureFailed, match=r"of 40 seeds failed; the first is \d+: ledger: .*dead letters"):
        command.many(0, 40, 20, 1, tmp_path / "short.json")
    printed = capsys.readouterr().out
    record = json.loads((tmp_path / "short.json").read_text())
    assert f"seed {record['seed']} (--events 20), commit {record['commit']}" in printed
    assert "dead letters" in record["found"]
    plan = Schedule.from_json((tmp_path / "short.json").read_text())
    assert simulator.run(plan).violation is not None
    with pytest.raises(command.TortureFailed, match=f"seed {record['seed']}: ledger"):
        command.one(record["seed"], 20, None)
    assert "aggregate {'aggregator'" in capsys.readouterr().out


def test_the_exit_code_says_whether_every_promise_was_kept(monkeypatch):
    arguments = ["torture", "--seeds", "30", "--first-seed", "7"]
    kept = CliRunner().invoke(app, arguments)
    assert kept.exit_code == 0
    assert "30 seeds" in kept.output
    assert "every promise kept" in " ".join(kept.output.split())
    mutants.a_rejection_leaves_no_dead_letter(monkeypatch.setattr)
    assert CliRunner().invoke(app, arguments).exit_code == 1
