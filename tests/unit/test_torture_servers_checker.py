"""The checker of the torture of servers: a right run passes, and each way of being wrong is named.

Every mutant below is a bug that an aggregator, a broker or a store could have; the checker must catch each.
"""

import json
from dataclasses import replace

import numpy as np
import pytest

from ops.torture.server_account import Checker, Claims, Violation, read_trainings

K, LR, A, PARAMS = 2, 2.0, 0.5, 16
BASES = {0: 0, 1: 0, 2: 0, 3: 1, 4: 0, 5: 1}  # place -> base_version


def applied(place, update_id=None):
    return {"id": update_id or f"w/0/{place}", "outcome": "applied", "num_samples": place + 1}


def other(update_id, outcome):
    return {"id": update_id, "outcome": outcome}


def ledger():
    """Return a right run: six updates make three versions; one is stale, one rejected, one came twice."""
    return [
        {"revision": 1, "updates": [applied(0), applied(1), other("v/0/9", "rejected")]},
        {"revision": 2, "updates": [applied(2), other("w/0/6", "stale"), other("w/0/0", "duplicate")]},
        {"revision": 3, "updates": [applied(3), applied(4), applied(5)]},
    ]


def model(versions=3):
    """Return the weights after so many versions, by hand."""
    weights = np.zeros(PARAMS, np.float32)
    for index, place in enumerate(list(BASES)[: versions * K]):
        weights[place] = LR / K / np.sqrt(1 + index // K - BASES[place])
    return weights


def claims():
    made = {f"w/0/{i}" for i in range(7)} | {"v/0/9"}
    return Claims(made, set(made), {"v/0/9"}, {"w/0/3", "w/0/6"}, dict(BASES))


def judged(entries, claimed=None, version=3, weights=None):
    """Follow, judge and confirm."""
    checker = Checker(K, LR, A, PARAMS)
    checker.follow(entries)
    account = checker.judge(claimed or claims(), version, model(version) if weights is None else weights)
    checker.confirm(account)
    return account


def test_a_right_run_is_confirmed_and_counted():
    account = judged(ledger())
    counts = account.record()
    assert counts == {
        "attempted": 8, "confirmed": 8, "applied": 6, "refused": 1, "rejected": 1, "lost": 0, "duplicated": 0,
        "unexpected": 0, "recovered": 2, "repeated": 1, "version": 3,
    }  # fmt: skip


def test_an_earlier_version_is_judged_while_the_ledger_is_ahead_of_it():
    assert judged(ledger(), version=1).version == 1


def test_following_in_pieces_judges_the_same():
    checker = Checker(K, LR, A, PARAMS)
    for number, entry in enumerate(ledger(), 1):
        checker.follow([entry])
        if number == 1:
            checker.judge(replaced(made=set(checker.first)), 1, model(1))
    account = checker.judge(claims(), 3, model())
    checker.confirm(account)
    assert account == judged(ledger())


def replaced(**changes):
    return replace(claims(), **changes)


def without(update_id):
    return [entry | {"updates": [u for u in entry["updates"] if u["id"] != update_id]} for entry in ledger()]


def with_more(*updates):
    return [*ledger(), {"revision": 4, "updates": list(updates)}]


def changed(place, value):
    weights = model()
    weights[place] = value
    return weights


MUTANTS = {
    "an update has no outcome": ({"entries": without("w/0/6")}, "1 lost .w/0/6: no outcome"),
    "a rejection has no outcome": ({"entries": without("v/0/9")}, "1 lost .v/0/9: no outcome"),
    "applied in the ledger, not in the model": ({"weights": changed(4, 0)}, "1 lost .w/0/4: 0 in the model"),
    "applied twice in the ledger": ({"entries": with_more(applied(2))}, "1 duplicated .w/0/2: applied, and it was"),
    "applied twice in the model": ({"weights": changed(1, 2 * model()[1])}, "1 duplicated .w/0/1"),
    "applied after it was refused": (
        {"entries": with_more({"id": "w/0/6", "outcome": "applied", "num_samples": 7})},
        "1 duplicated .w/0/6: applied, and it was stale before",
    ),
    "weighed with staleness off by one": ({"weights": changed(2, 1 / np.sqrt(3))}, "1 unexpected .w/0/2"),
    "the model holds what nobody sent": ({"weights": changed(12, 1)}, "1 duplicated .place 12 of the model"),
    "the model holds no number": ({"weights": changed(5, np.nan)}, "1 unexpected .w/0/5"),
    "the ledger holds what nobody made": (
        {"entries": with_more(other("x/0/0", "stale"))}, "1 unexpected .x/0/0: nobody made it"
    ),
    "applied, and nobody trained it": (
        {"entries": ledger(), "claimed": replaced(places={k: v for k, v in BASES.items() if k != 3})},
        "1 unexpected .w/0/3: nobody trained it",
    ),
    "what is spoiled is applied": ({"claimed": replaced(spoiled={"v/0/9", "w/0/2"})}, "it was spoiled and is applied"),
    "what is good is rejected": ({"claimed": replaced(spoiled=set())}, "v/0/9: it was good and is rejected"),
    "a duplicate of what never had an outcome": (
        {"entries": with_more(other("w/0/7", "duplicate")), "claimed": replaced(made=claims().made | {"w/0/7"})},
        "1 lost .w/0/7: no outcome.; 1 unexpected .w/0/7: a duplicate of nothing",
    ),
    "a version without its updates": ({"entries": ledger()[:2]}, "version 3 takes 6 applied updates, the ledger holds"),
    "a revision is missing": ({"entries": [ledger()[0], ledger()[2]]}, "from revision 1 to 3"),
    "a revision was written anew": ({"entries": [*ledger()[:2], ledger()[1]]}, "from revision 2 to 2"),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTANTS)
def test_each_mutant_is_caught_and_named(name):
    given, message = MUTANTS[name]
    with pytest.raises(Violation, match=message):
        judged(**({"entries": ledger()} | given))


def test_a_violation_stays_one():
    checker = Checker(K, LR, A, PARAMS)
    checker.follow(with_more(applied(2)))
    for _ in range(2):
        with pytest.raises(Violation, match="duplicated"):
            checker.confirm(checker.judge(claims(), 3, model()))


def test_trainings_are_read_but_for_the_line_that_is_being_written(tmp_path):
    record = tmp_path / "w.trained"
    record.write_text(json.dumps({"place": 3, "base_version": 1}) + "\n" + '{"place": 4, "ba')
    assert read_trainings([record, tmp_path / "none"]) == {3: 1}
