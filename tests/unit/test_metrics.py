"""Metric names are a contract; outcomes are counted once, when they are durable."""

import pytest
from prometheus_client import generate_latest

from shared.metrics import NAMES, AggregatorMetrics, EvaluatorMetrics, WorkerMetrics
from tests.builders import JOB, FaultyStore, System, weights

KINDS = {"aggregator": AggregatorMetrics, "worker": WorkerMetrics, "evaluator": EvaluatorMetrics}


def exposed(metrics):
    """Return the names as a scrape shows them: counters end in _total."""
    lines = generate_latest(metrics.registry).decode().splitlines()
    return {line.split()[2] for line in lines if line.startswith("# TYPE")}


@pytest.mark.parametrize("program", KINDS)
def test_the_documented_names_are_the_exposed_ones(program):
    assert exposed(KINDS[program]()) == set(NAMES[program])


def test_no_label_names_a_client():
    for kind in KINDS.values():
        for metric in vars(kind()).values():
            assert "client" not in getattr(metric, "_labelnames", ())


def count(system, outcome):
    return system.metrics.updates.labels(JOB, outcome)._value.get()


def test_outcomes_are_counted_when_durable_not_before():
    system = System(buffer_size=10)
    update = system.publish(weights(0))
    system.send(update)
    system.drain()
    assert (count(system, "applied"), count(system, "duplicate")) == (0, 0)
    system.aggregator.finish()
    assert (count(system, "applied"), count(system, "duplicate")) == (1, 1)


def test_a_commit_that_is_repeated_counts_once():
    system = System(store=FaultyStore(), buffer_size=1)
    system.store.faults = ["before", "after", "before"]
    system.publish(weights(0))
    for _ in range(6):
        system.drain()
        system.clock.time_s += 60
    assert count(system, "applied") == 1
    assert system.metrics.staleness._sum.get() == 0


def test_gauges_follow_the_committed_state():
    system = System(buffer_size=2)
    for seed in range(3):
        system.publish(weights(seed))
    system.drain()
    system.aggregator.finish()
    assert system.metrics.version._value.get() == 1
    assert system.metrics.buffered._value.get() == 1


def test_latency_runs_from_the_device_to_the_durable_commit():
    system = System(buffer_size=10)
    system.clock.time_s = 100.0
    system.publish(weights(0), created_at=98.0)
    system.publish(weights(1), created_at=500.0)  # a device whose clock is ahead
    system.drain()
    system.clock.time_s = 105.0
    system.aggregator.finish()
    assert system.metrics.latency._sum.get() == 7.0
