"""Whatever the data and the form: every example at exactly one share, none empty, and the same again."""

import numpy as np
from hypothesis import assume, given
from hypothesis import strategies as st

from worker.tasks.partition import deal, label_counts, least_of

HOW = st.one_of(
    st.sampled_from(["iid", "consecutive", "groups", "shards(1)"]),
    st.floats(0.001, 100).map(lambda alpha: f"dirichlet({alpha:g})"),
    st.floats(0, 5).map(lambda sigma: f"quantity({sigma:g})"),
)


@st.composite
def deals(draw):
    """Labels, groups, and a number of shares that can be had of them."""
    examples = draw(st.integers(1, 300))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    labels = rng.integers(0, draw(st.integers(1, 12)), examples)
    groups = rng.integers(0, draw(st.integers(1, examples)), examples)
    return labels, groups, draw(st.integers(1, len(np.unique(groups))))


@given(deals(), HOW, st.integers(0, 2**32))
def test_shares_are_disjoint_together_all_none_empty_and_the_same_again(drawn, how, seed):
    labels, groups, shares = drawn
    parts = deal(labels, shares, how, seed, groups)
    assert len(parts) == shares
    assert sorted(np.concatenate(parts)) == list(range(len(labels)))
    assert min(map(len, parts)) >= (least_of(len(labels), shares) if "(" in how and "shards" not in how else 1)
    assert all(part.dtype == np.int64 for part in parts)
    again = deal(labels, shares, how, seed, groups)
    assert all(np.array_equal(a, b) for a, b in zip(parts, again, strict=True))
    assert label_counts(labels, parts, 12).sum(axis=0).tolist() == np.bincount(labels, minlength=12).tolist()


@given(deals())
def test_no_group_is_divided_and_no_share_could_be_relieved(drawn):
    """Of two shares the larger one is not larger by more than its smallest group, or a group went to the wrong one."""
    labels, groups, shares = drawn
    parts = deal(labels, shares, "groups", 1, groups)
    owners = [set(groups[part]) for part in parts]
    assert sum(map(len, owners)) == len(np.unique(groups))
    sizes = np.bincount(groups)
    for part, owned in zip(parts, owners, strict=True):
        assert len(part) - min(sizes[list(owned)]) <= min(map(len, parts))


@given(deals(), st.integers(1, 11), st.floats(0.01, 0.99))
def test_rare_classes_are_apart(drawn, classes, share):
    labels, _, shares = drawn
    names = np.unique(labels)
    assume(shares > 1 and classes < len(names))
    rare = np.isin(labels, names[-classes:])
    owners = min(shares - 1, max(1, round(share * shares)))
    assume(owners <= rare.sum() and shares - owners <= (~rare).sum())
    parts = deal(labels, shares, f"rare({classes}, {share})", 1)
    assert sorted(np.concatenate(parts)) == list(range(len(labels)))
    assert [bool(np.all(rare[part])) for part in parts] == [False] * (shares - owners) + [True] * owners
    assert not any(rare[part].any() for part in parts[: shares - owners])
    assert min(map(len, parts)) >= 1
