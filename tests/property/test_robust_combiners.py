"""Every combiner against a formula in float64 that shares no code with it, and what f attackers can do at most."""

import tracemalloc
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aggregator.robust import blocks, combiner_of
from aggregator.robust.clipping import CENTER
from aggregator.robust.krum import krum_scores, squared_distances
from aggregator.state import State
from shared.config import AggregatorSettings
from tests.builders import model_of, weights

FINITE = st.floats(-100, 100, width=32, allow_subnormal=False)
HUGE = st.sampled_from([1e18, -1e18, 3e9, -3e9, 1e-3, 0.0])
SHARES = st.sampled_from([0.0, 0.1, 0.2, 0.29, 0.3, 0.34, 0.4, 0.49])


def state_of(num_params, version=0, **arrays):
    return State(0, version, 0, model_of(np.zeros(num_params, np.float32)), arrays)


def combine(robust, rows, version=0, center=None):
    """Return what the settings' combiner makes of a copy of the rows, in float64."""
    combiner = combiner_of(AggregatorSettings.model_construct(robust=robust))
    arrays = {name: np.full(rows.shape[1], first, np.float32) for name, first in combiner.arrays.items()}
    state = state_of(rows.shape[1], version, **arrays | ({CENTER: center} if center is not None else {}))
    result = combiner.combine(state, rows.copy())
    assert result.dtype == np.float32
    assert not any(np.shares_memory(result, array) for array in state.arrays.values()), "a rule may step along it"
    assert result.shape == rows.shape[1:]
    return result.astype(np.float64)


@st.composite
def matrices(draw, least=1, most=12, columns=6):
    count, width = draw(st.integers(least, most)), draw(st.integers(1, columns))
    if draw(st.booleans()):  # ties, and rows that are the same
        values = draw(st.lists(st.integers(-2, 2), min_size=count * width, max_size=count * width))
    else:
        values = draw(st.lists(FINITE, min_size=count * width, max_size=count * width))
    return np.array(values, np.float32).reshape(count, width)


@pytest.fixture(params=[blocks.BLOCK_ELEMENTS, 1], ids=["one block", "a column each"])
def blocked(request, monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK_ELEMENTS", request.param)
    monkeypatch.setattr(blocks, "COLUMNS_MIN", 1)


several = pytest.mark.usefixtures("blocked")


# --- formulas ---------------------------------------------------------------------------------------------------


def by_coordinate(rows, choose):
    return np.array([choose(sorted(float(x) for x in column)) for column in rows.T])


def median_of(column):
    half = len(column) // 2
    return column[half] if len(column) % 2 else (column[half - 1] + column[half]) / 2


def krum_order(rows, attackers):
    """Return the rows' indices by score, from distances taken one by one."""
    wide = rows.astype(np.float64)
    scores = []
    for own in range(len(wide)):
        others = sorted(float(((wide[own] - wide[other]) ** 2).sum()) for other in range(len(wide)) if other != own)
        scores.append(sum(others[: len(wide) - attackers - 2]))
    return scores


def clipped(rows, center, radius, iterations):
    v = center.astype(np.float64)
    for _ in range(iterations):
        step = np.zeros_like(v)
        for row in rows.astype(np.float64):
            length = np.sqrt(((row - v) ** 2).sum())
            step += (row - v) * (1.0 if length <= radius else radius / length)
        v = v + step / len(rows)
    return v


def close(found, expected, rows):
    scale = max(1e-6, float(np.abs(rows).max()))
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6 * scale)


@several
@given(rows=matrices())
def test_median(rows):
    close(combine("median", rows), by_coordinate(rows, median_of), rows)


@several
@given(rows=matrices(), share=SHARES)
def test_trimmed_mean(rows, share):
    cut = min(round(share * 100) * len(rows) // 100, (len(rows) - 1) // 2)
    expected = by_coordinate(rows, lambda c: sum(c[cut : len(c) - cut]) / (len(c) - 2 * cut))
    close(combine(f"trimmed_mean({share})", rows), expected, rows)


@several
@given(data=st.data())
def test_krum_takes_the_row_with_the_least_score(data):
    attackers = data.draw(st.integers(1, 3))
    rows = data.draw(matrices(2 * attackers + 3, 12))
    scores = krum_order(rows, attackers)
    found = combine(f"krum({attackers})", rows)
    chosen = [index for index, row in enumerate(rows) if np.array_equal(row, found)]
    assert chosen
    assert min(scores[index] for index in chosen) <= min(scores) + 1e-9 * float((rows.astype(float) ** 2).sum())


@several
@given(data=st.data())
def test_multi_krum_is_the_mean_of_the_rows_with_the_least_scores(data):
    attackers = data.draw(st.integers(1, 3))
    rows = data.draw(matrices(2 * attackers + 3, 12))
    most = len(rows) - attackers - 2
    chosen = data.draw(st.integers(0, most))
    scores = krum_order(rows, attackers)
    found = combine(f"multi_krum({attackers}, {chosen})", rows)
    least, slack = sorted(scores)[: chosen or most], 1e-9 * float((rows.astype(float) ** 2).sum())
    possible = [  # of rows with the same score any may be taken
        rows[list(those)].astype(float).mean(axis=0)
        for those in combinations(range(len(rows)), chosen or most)
        if sum(scores[index] for index in those) <= sum(least) + slack
    ]
    assert any(np.allclose(found, mean, rtol=0, atol=1e-5 * max(1, np.abs(rows).max())) for mean in possible)


@several
@given(
    rows=matrices(), radius=st.sampled_from([0.1, 1.0, 30.0, 1e6]), iterations=st.integers(1, 4), seed=st.integers(0, 9)
)
def test_centered_clipping(rows, radius, iterations, seed):
    center = weights(seed, rows.shape[1])
    expected = clipped(rows, center, radius, iterations)
    close(combine(f"centered_clipping({radius}, {iterations})", rows, center=center), expected, np.append(rows, 10))
    close(center, expected, np.append(rows, 10))


@several
@given(rows=matrices(), size=st.integers(2, 5), version=st.integers(0, 2**40))
def test_bucketing_is_a_combiner_of_the_means_of_a_shuffle_drawn_from_the_version(rows, size, version):
    order = np.random.default_rng(version).permutation(len(rows))
    means = [rows[order[at : at + size]].astype(float).mean(axis=0) for at in range(0, len(rows), size)]
    found = combine(f"bucketing({size}) | median", rows, version)
    close(found, by_coordinate(np.array(means), median_of), rows)


@pytest.mark.parametrize(
    "robust", ["median", "trimmed_mean(0.2)", "krum(1)", "multi_krum(1)", "centered_clipping(1, 2)"]
)
def test_columns_are_covered_once_whatever_the_number_of_blocks(robust, monkeypatch):
    rows = np.random.default_rng(0).standard_normal((7, 1003)).astype(np.float32)
    expected = combine(robust, rows)
    monkeypatch.setattr(blocks, "BLOCK_ELEMENTS", 7 * 100)
    close(combine(robust, rows), expected, rows)


# --- order ------------------------------------------------------------------------------------------------------

COMBINERS = ["median", "trimmed_mean(0.2)", "krum(2)", "multi_krum(2)", "multi_krum(2, 3)", "centered_clipping(1, 2)"]


@pytest.mark.parametrize("robust", COMBINERS)
@given(seed=st.integers(0, 10**6))
def test_the_order_of_arrival_does_not_matter(robust, seed):
    rng = np.random.default_rng(seed)
    rows = rng.standard_normal((9, 5)).astype(np.float32)
    close(combine(robust, rows[rng.permutation(9)]), combine(robust, rows), rows)


def test_of_equal_scores_the_lower_index_wins():
    rows = np.array([[9, 9], [0, 1], [0, 0], [1, 0], [1, 1]], np.float32)
    assert combine("krum(1)", rows).tolist() == [0, 1]
    assert combine("multi_krum(1)", rows).tolist() == [0, 0.5]
    assert combine("krum(1)", rows[[4, 3, 2, 1, 0]]).tolist() == [1, 1]


def test_the_same_rows_give_the_same_bytes():
    rows = np.random.default_rng(3).standard_normal((9, 10_000)).astype(np.float32)
    for robust in (*COMBINERS, "bucketing(2) | median"):
        assert combine(robust, rows, 5).tobytes() == combine(robust, rows, 5).tobytes(), robust
    assert combine("bucketing(2) | median", rows, 5).tobytes() != combine("bucketing(2) | median", rows, 6).tobytes()


@pytest.mark.parametrize("robust", ["median", "trimmed_mean(0.2)", "krum(1)", "centered_clipping(1, 2)"])
def test_combining_allocates_nothing_of_model_size(robust):
    rows = np.zeros((9, 2_000_000), np.float32)
    combiner = combiner_of(AggregatorSettings.model_construct(robust=robust))
    state = state_of(rows.shape[1], **{name: np.zeros(rows.shape[1], np.float32) for name in combiner.arrays})
    tracemalloc.start()
    try:
        combiner.combine(state, rows)
        assert tracemalloc.get_traced_memory()[1] < 6 * 2**20  # a row has 8
    finally:
        tracemalloc.stop()


# --- breakdown --------------------------------------------------------------------------------------------------


@st.composite
def attacked(draw):
    """Draw honest rows, and as many attackers as K >= 2 f + 3 allows, anywhere and arbitrarily large."""
    attackers = draw(st.integers(1, 3))
    honest = draw(matrices(attackers + 3, attackers + 6, 4))
    width = honest.shape[1]
    values = draw(st.lists(HUGE, min_size=attackers * width, max_size=attackers * width))
    rows = np.concatenate([honest, np.array(values, np.float32).reshape(attackers, width)])
    order = draw(st.permutations(range(len(rows))))
    return attackers, honest, rows[list(order)]


@given(attacked())
def test_attackers_leave_every_median_within_the_range_of_the_honest(drawn):
    _, honest, rows = drawn
    found = combine("median", rows)
    assert (found >= honest.min(axis=0)).all()
    assert (found <= honest.max(axis=0)).all()


@given(attacked())
def test_attackers_leave_every_trimmed_mean_within_the_range_of_the_honest(drawn):
    attackers, honest, rows = drawn
    found = combine(f"trimmed_mean({attackers / len(rows)})", rows)
    assert (found >= honest.min(axis=0)).all()
    assert (found <= honest.max(axis=0)).all()


def spread_of(honest):
    """Return the largest distance that two rows within the range of the honest can have."""
    return float(np.linalg.norm(honest.max(axis=0).astype(float) - honest.min(axis=0)))


@given(attacked())
def test_krum_takes_an_honest_row_or_one_among_them(drawn):
    """An honest score is at most (K - f - 2) spread^2, and every score holds a distance to an honest row."""
    attackers, honest, rows = drawn
    found = combine(f"krum({attackers})", rows)
    nearest = np.linalg.norm(honest - found, axis=1).min()
    assert nearest <= np.sqrt(len(rows)) * spread_of(honest) + 1e-3


@given(attacked(), st.sampled_from([1e6, 1e12, 1e18]))
def test_krum_takes_an_honest_row_when_attackers_are_far_away(drawn, far):
    attackers, honest, _ = drawn
    liars = np.full((attackers, honest.shape[1]), far, np.float32)
    found = combine(f"krum({attackers})", np.concatenate([liars, honest]))
    assert any(np.array_equal(row, found) for row in honest)


@given(attacked())
def test_multi_krum_averages_what_lies_among_the_honest(drawn):
    attackers, honest, rows = drawn
    found = combine(f"multi_krum({attackers})", rows)
    distance = np.linalg.norm(found - honest.mean(axis=0, dtype=float))
    assert distance <= (np.sqrt(len(rows)) + 1) * spread_of(honest) + 1e-3


@given(attacked(), st.sampled_from([0.5, 10.0]), st.integers(1, 3))
def test_one_row_moves_the_clipped_center_by_a_radius_over_k_an_iteration(drawn, radius, iterations):
    _, honest, rows = drawn
    robust = f"centered_clipping({radius}, {iterations})"
    for lie in (rows[0], np.full(rows.shape[1], 1e18, np.float32), np.full(rows.shape[1], -1e18, np.float32)):
        others = np.concatenate([honest, lie[None]])
        start = weights(0, rows.shape[1])
        center = start.copy()
        combine(robust, others, center=center)
        absent = start.copy()  # the same without a say: its row lies where the center is
        for _ in range(iterations):
            combine(f"centered_clipping({radius})", np.concatenate([honest, absent[None]]), center=absent)
        moved = np.linalg.norm(center.astype(float) - absent)
        bound = radius * iterations / len(others)
        assert moved <= bound * (1 + 1e-5) + 1e-5 * max(1, np.abs(honest).max())


@given(seed=st.integers(0, 10**6), radius=st.sampled_from([0.5, 10.0]))
def test_the_clipped_center_moves_by_at_most_a_radius_an_iteration(seed, radius):
    rows = (np.random.default_rng(seed).standard_normal((5, 4)) * 1e6).astype(np.float32)
    center = np.zeros(4, np.float32)
    combine(f"centered_clipping({radius}, 3)", rows, center=center)
    assert np.linalg.norm(center) <= 3 * radius * (1 + 1e-5)


def test_bucketing_lets_an_attacker_spoil_one_bucket():
    rows = np.ones((10, 3), np.float32)
    rows[7] = 1e18
    for version in range(20):
        assert combine("bucketing(2) | median", rows, version).tolist() == [1, 1, 1]
        assert combine("bucketing(3) | trimmed_mean(0.25)", rows, version).tolist() == [1, 1, 1]


def test_trimming_is_of_each_coordinate_not_of_clients_by_their_samples():
    """FedML drops whole clients, those with most and with fewest samples (known mistake 11)."""
    rows = np.array([[100, 2], [3, 100], [-100, 4], [5, -100], [4, 3]], np.float32)
    assert combine("trimmed_mean(0.2)", rows).tolist() == [4, 3]


def test_distances_do_not_vanish_beside_large_common_values():
    rows = np.full((7, 3), 1e4, np.float32) + np.array([[0], [1], [2], [0.5], [1.5], [900], [901]], np.float32)
    distances = squared_distances(rows)
    assert distances[0, 3] == pytest.approx(3 * 0.25, rel=1e-6)
    assert np.isinf(np.diagonal(distances)).all()
    assert krum_scores(distances, 2)[1] == pytest.approx(3 * (0.25 + 0.25 + 1), rel=1e-6)
