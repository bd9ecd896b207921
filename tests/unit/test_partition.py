"""Deals: what each form promises, closed forms of their sizes, and errors with the numbers."""

import numpy as np
import pytest

from worker.tasks.partition import PARTITIONS, deal, label_counts, label_shards, least_of, share_of

LABELS = np.random.default_rng(0).integers(0, 10, 1003)
MANY = np.repeat(np.arange(10), 6000)


@pytest.mark.parametrize(("shares", "shards_each"), [(1, 1), (7, 3), (10, 2), (50, 1)])
def test_shares_are_disjoint_together_all_and_about_equal(shares, shards_each):
    parts = label_shards(LABELS, shares, shards_each, seed=1)
    assert len(parts) == shares
    assert sorted(np.concatenate(parts)) == list(range(1003))
    assert max(map(len, parts)) - min(map(len, parts)) <= shards_each


def test_each_share_sees_few_classes():
    parts = label_shards(LABELS, 10, 2, seed=1)
    assert max(len(set(LABELS[part])) for part in parts) <= 4  # two shards, each over at most one border
    assert len(set(LABELS)) == 10


@pytest.mark.parametrize("how", ["iid", "dirichlet", "shards", "quantity", "rare"])
def test_the_seed_deals(how):
    one, again, other = (deal(LABELS, 10, how, seed) for seed in (1, 1, 2))
    assert all(np.array_equal(a, b) for a, b in zip(one, again, strict=True))
    assert not all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


def test_shards_are_label_shards():
    for part, expected in zip(deal(LABELS, 7, "shards(3)", 4), label_shards(LABELS, 7, 3, 4), strict=True):
        np.testing.assert_array_equal(part, expected)


def test_consecutive_keeps_the_order():
    for part, expected in zip(deal(LABELS, 7, "consecutive", 1), np.array_split(np.arange(1003), 7), strict=True):
        np.testing.assert_array_equal(part, expected)


def test_iid_shares_have_equal_sizes_and_the_same_mix():
    counts = label_counts(MANY, deal(MANY, 20, "iid", 1), 10)
    assert set(counts.sum(axis=1)) == {3000}
    assert counts.min() > 240  # of 300 expected, standard deviation 16
    assert not np.all(counts == 300)


@pytest.mark.parametrize("alpha", [0.1, 1.0, 10.0])
def test_a_class_is_spread_as_dirichlet_says(alpha):
    """A share's part of a class has mean 1 / n and variance (n - 1) / (n^2 (n alpha + 1))."""
    n = 10
    spread = np.concatenate(
        [label_counts(MANY, deal(MANY, n, f"dirichlet({alpha})", seed), 10).ravel() / 6000 for seed in range(40)]
    )
    assert spread.mean() == pytest.approx(1 / n)
    assert spread.var() == pytest.approx((n - 1) / (n * n * (n * alpha + 1)), rel=0.12)


def test_classes_are_spread_independently():
    counts = label_counts(MANY, deal(MANY, 500, "dirichlet(0.3)", 1), 10)
    correlations = np.corrcoef(counts.T)
    assert np.abs(correlations - np.eye(10)).max() < 0.2
    assert counts.min() == 0


@pytest.mark.parametrize(
    ("examples", "shares", "least"), [(60_000, 100, 10), (60_000, 2000, 7), (1003, 100, 2), (10, 10, 1), (39, 10, 1)]
)
def test_every_share_of_an_uneven_deal_gets_the_least(examples, shares, least):
    assert least_of(examples, shares) == least
    labels = np.arange(examples) % 10
    for how in ("dirichlet(0.001)", "dirichlet(0.1)", "quantity(5)"):
        parts = deal(labels, shares, how, 3)
        assert min(map(len, parts)) >= least, how
        assert sum(map(len, parts)) == examples


def test_a_draw_that_starves_nobody_is_kept_as_it_is():
    parts = deal(MANY, 10, "dirichlet(1)", 3)
    rng = np.random.default_rng(3)
    [rng.permutation(6000) for _ in range(10)]
    expected = np.floor(np.cumsum(rng.dirichlet([1] * 10, 10), axis=1) * 6000)
    expected[:, -1] = 6000
    np.testing.assert_array_equal(label_counts(MANY, parts, 10).T, np.diff(expected, prepend=0, axis=1))


def test_log_normal_sizes():
    sizes = np.array([len(part) for part in deal(MANY, 1000, "quantity(0.8)", 1)]) - least_of(60_000, 1000)
    assert np.log(sizes).std() == pytest.approx(0.8, rel=0.08)
    assert {len(part) for part in deal(MANY, 100, "quantity(0)", 1)} <= {599, 600, 601}
    counts = label_counts(MANY, deal(MANY, 10, "quantity(1)", 1), 10)
    mix = counts / counts.sum(axis=1, keepdims=True)
    assert np.abs(mix - 0.1).max() < 0.05


def test_as_many_shares_as_groups_is_one_each_the_largest_first():
    groups = np.repeat([7, 3, 9, 4], [5, 20, 1, 10])
    parts = deal(np.zeros(36, np.int64), 4, "groups", 1, groups)
    assert [set(groups[part]) for part in parts] == [{3}, {4}, {7}, {9}]
    parts = deal(np.zeros(36, np.int64), 2, "groups", 1, groups)
    assert [set(groups[part]) for part in parts] == [{3}, {4, 7, 9}]


def test_many_groups_make_shares_of_about_equal_size():
    groups = np.random.default_rng(0).zipf(1.5, 5000) % 300
    sizes = [len(part) for part in deal(np.zeros(5000, np.int64), 3, "groups", 1, groups)]
    assert max(sizes) - min(sizes) <= 1 or max(sizes) == np.bincount(groups).max()


def test_rare_classes_live_at_the_last_shares_alone():
    counts = label_counts(MANY, deal(MANY, 20, "rare(classes=3, share=0.25)", 1), 10)
    assert counts[:15, 7:].sum() == 0
    assert counts[15:, :7].sum() == 0
    assert set(counts[:15].sum(axis=1)) == {2800}
    assert set(counts[15:].sum(axis=1)) == {3600}
    assert counts[:15, :7].min() > 300
    assert counts[15:, 7:].min() > 1000


@pytest.mark.parametrize(("share", "owners"), [(0.01, 1), (0.2, 2), (0.99, 9)])
def test_some_shares_have_rare_classes_and_some_have_not(share, owners):
    counts = label_counts(LABELS, deal(LABELS, 10, f"rare(2, {share})", 1), 10)
    assert list(counts[:, 8:].sum(axis=1) > 0) == [False] * (10 - owners) + [True] * owners


def test_counts_are_of_each_share_and_class():
    counts = label_counts(np.array([2, 0, 2, 1]), [np.array([0, 2]), np.array([3]), np.array([1])], 4)
    assert counts.dtype == np.int64
    assert counts.tolist() == [[0, 0, 2, 0], [0, 1, 0, 0], [1, 0, 0, 0]]


@pytest.mark.parametrize(
    ("shares", "how", "message"),
    [
        (0, "iid", "0 shares of 1,003 examples"),
        (1004, "iid", "1,004 shares of 1,003 examples"),
        (400, "shards(3)", "400 shares of 3 shards need more than the 1,003 examples"),
        (5, "groups", "no writers or speakers"),
        (1, "rare", "2 rare of 10 classes among 1 shares"),
        (5, "rare(10)", "10 rare of 10 classes among 5 shares"),
        (1000, "rare(1, 0.5)", "500 shares of .* examples"),
        (5, "even", "must be one of iid, consecutive, dirichlet"),
        (5, "dirichlet(0)", r"alpha is 0, must be a number in \[0.001"),
        (5, "shards(1.5)", "each is 1.5, must be a whole number"),
    ],
)
def test_what_cannot_be_dealt_is_refused_with_the_numbers(shares, how, message):
    with pytest.raises(ValueError, match=message):
        deal(LABELS, shares, how, 1)


def test_groups_are_not_divided():
    with pytest.raises(ValueError, match="5 shares of 3 groups: a group is not divided"):
        deal(np.zeros(30, np.int64), 5, "groups", 1, np.arange(30) % 3)
    with pytest.raises(ValueError, match="no writers"):
        deal(np.zeros(30, np.int64), 5, "groups", 1, np.arange(29))


def test_the_forms_are_those_the_module_explains():
    import worker.tasks.partition as module

    explained = [line.split("(")[0].split()[0] for line in module.__doc__.splitlines() if line.startswith("    ")]
    assert explained == list(PARTITIONS)


def test_a_share_is_chosen_or_follows_from_the_id():
    assert share_of("w", {"share": "13"}, 10) == 3
    assert share_of("w", {}, 10) == share_of("w", {}, 10)
    assert {share_of(f"w{i}", {}, 5) for i in range(60)} == set(range(5))
