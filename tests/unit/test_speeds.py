"""Seconds per trip: the distributions' moments, persistence, order, and that a draw depends on nothing before it."""

import math
import statistics

import numpy as np
import pytest

from ops.simulation.draws import stream, uniform
from ops.simulation.speeds import SPEEDS, Speeds

MANY = 20_000
MEANS_AND_VARIANCES = [
    ("constant(2)", 2.0, 0.0),
    ("half_normal(3)", 3 * math.sqrt(2 / math.pi), 9 * (1 - 2 / math.pi)),
    ("exponential(0.5)", 0.5, 0.25),
    ("lognormal(mean=2, sigma=0.6)", 2.0, 4 * (math.exp(0.36) - 1)),
    ("uniform(1, 4)", 2.5, 0.75),
]


def trips(spec, persistent=False, clients=1, number=MANY, **options):
    speeds = Speeds(spec, persistent, clients, 5, **options)
    return np.array([[speeds.seconds(client, trip) for trip in range(number)] for client in range(clients)])


@pytest.mark.parametrize(("spec", "mean", "variance"), MEANS_AND_VARIANCES)
def test_trips_drawn_anew_have_the_distributions_moments(spec, mean, variance):
    drawn = trips(spec)[0]
    assert drawn.min() > 0
    assert abs(drawn.mean() - mean) <= 4 * math.sqrt(variance / MANY)
    assert drawn.var() == pytest.approx(variance, rel=0.1)
    assert Speeds(spec, False, 3, 5).means() == pytest.approx([mean] * 3)


@pytest.mark.parametrize(("spec", "mean", "variance"), MEANS_AND_VARIANCES)
def test_the_clients_means_have_them_where_speeds_are_persistent(spec, mean, variance):
    means = Speeds(spec, True, MANY, 5).means()
    assert means.dtype == np.float64
    assert abs(means.mean() - mean) <= 4 * math.sqrt(variance / MANY) + 1e-3
    assert means.var() == pytest.approx(variance, rel=0.1)
    assert means.min() >= 0.01 * mean


def test_every_distribution_is_tested():
    assert {spec.partition("(")[0] for spec, *_ in MEANS_AND_VARIANCES} | {"classes"} == set(SPEEDS)


def test_trips_of_a_persistent_client_vary_around_its_mean():
    speeds = Speeds("lognormal", True, 50, 5, spread=0.2)
    for client, mean in enumerate(speeds.means()):
        relative = np.array([speeds.seconds(client, trip) for trip in range(2000)]) / mean
        assert relative.mean() == pytest.approx(1, abs=0.02)
        assert relative.std() == pytest.approx(0.2, rel=0.08)
    assert trips("lognormal", True, 3, 50, spread=0.0).std(axis=1) == pytest.approx([0, 0, 0], abs=1e-12)


def test_a_trip_takes_a_tenth_of_the_mean_at_least():
    drawn = trips("constant(10)", persistent=True, number=1000, spread=2.0)[0]
    assert drawn.min() == 1.0
    assert drawn.max() > 30


@pytest.mark.parametrize("persistent", [False, True])
def test_a_draw_depends_on_seed_client_and_trip_and_on_nothing_else(persistent):
    first, again, other = (Speeds("exponential", persistent, n, seed) for n, seed in ((7, 1), (90, 1), (7, 2)))
    for client, trip in ((6, 100), (0, 3), (6, 0)):  # in another order, beside other clients
        assert again.seconds(client, trip) == first.seconds(client, trip) != other.seconds(client, trip)
    assert len({first.seconds(client, trip) for client in range(7) for trip in range(50)}) == 350
    pairs = np.array([[first.seconds(0, t), first.seconds(1, t)] for t in range(4000)])
    assert abs(np.corrcoef(pairs.T)[0, 1]) < 0.06
    assert abs(np.corrcoef(pairs[1:, 0], pairs[:-1, 0])[0, 1]) < 0.06


def test_draws_are_uniform_and_never_zero_or_one():
    key = stream(0, "test", 0)
    draws = np.sort([uniform(key, count) for count in range(MANY)])
    assert 0 < draws[0] < draws[-1] < 1
    assert np.abs(draws - (np.arange(MANY) + 0.5) / MANY).max() < 1.63 / math.sqrt(MANY)  # Kolmogorov, one in a hundred
    edge = -key * pow(0x9E3779B97F4A7C15, -1, 2**64) % 2**64  # the state is 0, which the finalizer keeps
    assert uniform(key, edge) == 2.0**-53


def test_a_stream_is_splitmix64():
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]  # of 1234567
    assert [uniform(1234567, count) for count in (1, 2, 3, 4)] == [((x >> 12) + 0.5) / 2**52 for x in published]


def test_seeds_purposes_and_clients_have_streams_of_their_own():
    keys = {stream(seed, purpose, client) for seed in (0, 1, 11) for purpose in ("a", "b") for client in (0, 1, 10)}
    assert len(keys) == 18
    assert all(0 <= key < 2**64 for key in keys)


def test_classes_are_those_of_fadas():
    speeds = Speeds("classes(50, 80)", False, 300, 5)
    bounds = {1.5: (1, 2), 4.0: (3, 5), 65.0: (50, 80)}
    assert set(speeds.means()) == set(bounds)
    for client, mean in enumerate(speeds.means()):
        drawn = [speeds.seconds(client, trip) for trip in range(30)]
        assert bounds[mean][0] <= min(drawn) < max(drawn) <= bounds[mean][1]
    persistent = Speeds("classes", True, 300, 5).means()
    assert all(1 <= mean <= 2 or 3 <= mean <= 5 or 5 <= mean <= 8 for mean in persistent)
    assert len(set(persistent)) == 300


def test_the_classes_shares_are_dirichlet_3_2_1():
    shares = [
        [(means == mean).mean() for mean in (1.5, 4.0, 6.5)]
        for means in (Speeds("classes", False, 200, seed).means() for seed in range(200))
    ]
    np.testing.assert_allclose(np.mean(shares, axis=0), [1 / 2, 1 / 3, 1 / 6], atol=0.05)
    np.testing.assert_allclose(np.std(shares, axis=0), [(1 / 28) ** 0.5, (2 / 63) ** 0.5, (5 / 252) ** 0.5], atol=0.03)


def test_the_slowest_draws_go_to_those_named():
    free, ordered = (Speeds("lognormal", True, 50, 5, slowest_first=order) for order in (None, [7, 3, 41]))
    assert sorted(free.means()) == sorted(ordered.means())
    assert list(ordered.means()[[7, 3, 41]]) == sorted(free.means())[:-4:-1]
    rest = [client for client in range(50) if client not in (7, 3, 41)]
    assert not np.all(np.diff(ordered.means()[rest]) < 0)  # not in any order
    assert statistics.mean(ordered.seconds(7, t) for t in range(200)) == pytest.approx(ordered.means()[7], rel=0.03)


def test_an_order_of_all_clients_is_kept():
    order = np.random.default_rng(0).permutation(30)
    assert np.all(np.diff(Speeds("exponential", True, 30, 5, slowest_first=order).means()[order]) <= 0)
    assert np.all(np.diff(Speeds("classes", False, 30, 5, slowest_first=order).means()[order]) <= 0)
    speeds = Speeds("classes", False, 300, 5, slowest_first=[9])
    assert all(5 <= speeds.seconds(9, trip) <= 8 for trip in range(20))


def test_there_is_no_order_where_every_trip_is_drawn_anew():
    with pytest.raises(ValueError, match="only where speeds are persistent"):
        Speeds("half_normal", False, 3, 5, slowest_first=[1])
    Speeds("half_normal", False, 3, 5, slowest_first=[])


@pytest.fixture
def trace(tmp_path):
    def write(text):
        path = tmp_path / "trips.csv"
        path.write_text(text)
        return f"trace:{path}"

    return write


@pytest.mark.parametrize("heading", ["", "seconds\n"])
def test_a_trace_is_sampled(trace, heading):
    spec = trace(heading + "1\n2\n\n4\n8\n")
    drawn = trips(spec)[0]
    values, counts = np.unique(drawn, return_counts=True)
    assert list(values) == [1, 2, 4, 8]
    assert counts / MANY == pytest.approx([0.25] * 4, abs=0.02)
    assert list(Speeds(spec, False, 2, 5).means()) == [3.75, 3.75]
    assert set(Speeds(spec, True, 100, 5).means()) == {1, 2, 4, 8}


@pytest.mark.parametrize("heading", ["", "client,seconds\n"])
@pytest.mark.parametrize("persistent", [False, True])
def test_a_traces_clients_keep_their_own_trips(trace, heading, persistent):
    spec = trace(heading + "a, 1\nb,10\na,2\nb,30\n")
    drawn = trips(spec, persistent, clients=3, number=100)
    assert [set(row) for row in drawn] == [{1, 2}, {10, 30}, {1, 2}]
    speeds = Speeds(spec, persistent, 3, 5, slowest_first=[2])
    assert list(speeds.means()) == [1.5, 1.5, 20]
    assert {speeds.seconds(2, trip) for trip in range(50)} == {10, 30}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has no line"),
        ("seconds\n", "has no line"),
        ("1\nx\n", "line 2: 'x' is not seconds above 0"),
        ("1\n0\n", "line 2"),
        ("1\ninf\n", "line 2"),
        ("1\na,2\n", "line 2"),
        ("a,1\n2\n", "line 2: '2' is not client,seconds above 0"),
    ],
)
def test_a_broken_trace_is_told_by_its_line(trace, text, message):
    with pytest.raises(ValueError, match=message):
        Speeds(trace(text), False, 2, 5)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("gamma(2)", r"must be one of constant\(seconds\), .*, or trace:FILE"),
        ("exponential(0)", r"mean is 0, must be a number in \(0"),
        ("uniform(1)", "needs high"),
        ("uniform(3, 1)", "3 to 1 seconds"),
        ("classes(9, 8)", "9 to 8 seconds"),
        ("trace:/nowhere/at/all", "cannot read the trace /nowhere/at/all: No such file"),
    ],
)
def test_a_wrong_spec_is_refused(spec, message):
    with pytest.raises(ValueError, match=message):
        Speeds(spec, True, 2, 5)


@pytest.mark.parametrize(
    "options",
    [{"clients": 0}, {"spread": -0.1}, {"spread": math.nan}, {"slowest_first": [1, 1]}, {"slowest_first": [4]}],
)
def test_other_arguments_are_checked(options):
    with pytest.raises(ValueError, match=r"clients"):
        Speeds(**{"spec": "exponential", "persistent": True, "clients": 4, "seed": 5} | options)
