"""A task that raises in one client: reported with its traceback and counted, the rest go on. In all: an end."""

import pytest

from ops.simulation import simulator as module
from shared.errors import FedMQError
from tests.simulation.runs import small, whole


def test_who_raises_is_counted_and_reported_once_with_the_line(caplog):
    run = whole(small(task_settings="raises=1+5,invalid=3", updates=150)).simulator
    assert (
        set(run.failures)
        == {
            "train() of pulling.py raised ValueError: share 1 has no data",
            "train() of pulling.py raised ValueError: share 5 has no data",
            "train() of pulling.py reports 8 samples and 2 steps: both must be positive",
        }
        or len(run.failures) == 3
    )
    messages = [record.getMessage() for record in caplog.records if record.name == "fedmq.simulation"]
    assert len(messages) == 3
    first = next(message for message in messages if "share 1 has no data" in message)
    assert first.startswith("client-1: ")
    assert 'raise ValueError(f"share {share} has no data")' in first
    assert all(count > 5 for count in run.failures.values())
    assert run.history.outcomes == {"applied": 150}
    assert set(run.history.by_client) == {f"client-{i}" for i in range(12) if i not in (1, 3, 5)}


@pytest.mark.parametrize("more", [{}, {"updates": None, "hours": 1e6}, {"rule": "fedavg"}])
def test_when_all_raise_it_ends(more, monkeypatch):
    monkeypatch.setattr(module, "FAILED_IN_A_ROW_MAX", 30)
    with pytest.raises(FedMQError, match=r"the last 30 trainings all raised, after 0 updates: .*share . has no data"):
        whole(small({"task_settings": "raises=all"} | more))


def test_a_success_in_between_is_no_end(monkeypatch):
    monkeypatch.setattr(module, "FAILED_IN_A_ROW_MAX", 60)
    raising = "+".join(str(share) for share in range(11))
    run = whole(small(task_settings=f"raises={raising}", updates=20)).simulator
    assert run.history.outcomes == {"applied": 20}
    assert sum(run.failures.values()) > 60


def test_many_different_messages_are_counted_together(monkeypatch, caplog):
    monkeypatch.setattr(module, "MESSAGES_MAX", 2)
    run = whole(small(task_settings="raises=0+1+2+3+4+5", updates=60)).simulator
    assert len(run.failures) == 3
    assert run.failures[module.OTHER_MESSAGES] > 3
    assert len([record for record in caplog.records if record.name == "fedmq.simulation"]) == 2


def test_a_round_nobody_can_end_is_said_to_be_one():
    guarded = {"robust": "aflguard(0.001)", "trusted_client": "judge"}
    plan = small(guarded, rule="fedavg", clients=6, concurrency=6, buffer_size=6)
    with pytest.raises(FedMQError, match=r"nothing can happen after .* 6 that took part in the round, .* 6 rejected"):
        whole(plan)


def test_a_client_that_raised_starts_again_from_what_it_had():
    """Error feedback: what a failed training would have sent is not in the residual; mass is as before."""
    plan = small(codec="ef | topk(0.2)", task_settings="raises=1", updates=80)
    run = whole(plan).simulator
    assert "residual" not in " ".join(run._folders.folder(1).names())
    assert any("residual" in name for name in run._folders.folder(0).names())
