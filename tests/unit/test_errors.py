"""The tree of errors is the one its docstring draws; reasons are unique and documented."""

import inspect
import re

import pytest

import shared.errors
from shared.errors import (
    BrokerUnavailable,
    FedMQError,
    PublishRefused,
    PublishUnconfirmed,
    Reason,
    RejectedUpdate,
    StoreUnavailable,
    Unavailable,
)

SOURCE = inspect.getsource(shared.errors)
ERRORS = [c for c in vars(shared.errors).values() if inspect.isclass(c) and issubclass(c, FedMQError)]


@pytest.mark.parametrize("reason", Reason)
def test_every_reason_is_documented_beside_its_value(reason):
    line = re.search(rf'^    {reason.name} = "{reason.value}"  # (\w.{{10,}})$', SOURCE, re.MULTILINE)
    assert line, f"{reason.name} needs a comment"


def test_reasons_are_unique_label_values():
    values = [member.value for member in Reason.__members__.values()]
    assert len(values) == len(set(values)) == len(Reason)  # an alias would shrink the enum
    assert all(re.fullmatch(r"[a-z_]{1,32}", value) for value in values)


@pytest.mark.parametrize("error", ERRORS)
def test_every_error_stands_in_the_docstrings_tree_and_has_a_docstring(error):
    assert re.search(rf"\b{error.__name__}\b", shared.errors.__doc__)
    assert error.__doc__


def test_the_branches_tell_what_the_caller_must_do():
    for error in (BrokerUnavailable, StoreUnavailable, PublishUnconfirmed):
        assert issubclass(error, Unavailable)
    assert not issubclass(PublishRefused, Unavailable)
    assert not issubclass(RejectedUpdate, Unavailable)


def test_a_rejection_carries_reason_and_detail():
    error = RejectedUpdate(Reason.LAYOUT, "layout ab, the job's is cd")
    assert (error.reason, error.detail) == ("layout", "layout ab, the job's is cd")
    assert str(error) == "layout: layout ab, the job's is cd"
