"""Label shards: every example at exactly one worker, few classes each."""

import numpy as np
import pytest

from worker.tasks.partition import label_shards, share_of

LABELS = np.random.default_rng(0).integers(0, 10, 1003)


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


def test_the_seed_deals():
    one, again, other = (label_shards(LABELS, 10, 2, seed=seed) for seed in (1, 1, 2))
    assert all(np.array_equal(a, b) for a, b in zip(one, again, strict=True))
    assert not all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


def test_a_share_is_chosen_or_follows_from_the_id():
    assert share_of("w", {"share": "13"}, 10) == 3
    assert share_of("w", {}, 10) == share_of("w", {}, 10)
    assert {share_of(f"w{i}", {}, 5) for i in range(60)} == set(range(5))
