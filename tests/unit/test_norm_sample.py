"""Norms for the metrics: of applied updates alone, once durable, and never of so many that it costs something."""

import time

import numpy as np

from aggregator.norm_sample import NormSample
from tests.builders import JOB, System, update_of


class Slow:
    """A delta whose norm takes long."""

    asked = 0

    def squared_norm(self):
        self.asked += 1
        time.sleep(0.08)
        return 9.0


def test_a_norm_that_takes_long_is_measured_rarely():
    delta, sample = Slow(), NormSample()
    measured = [sample.of(delta) for _ in range(100)]
    assert measured[0] == [3.0]
    assert delta.asked == sum(len(norms) for norms in measured) == 1


def norms(system):
    metric = system.metrics.norm
    return metric._sum.get(), sum(bucket.get() for bucket in metric._buckets)


def test_the_norm_of_an_applied_update_is_seen_when_it_is_durable():
    system = System(buffer_size=10)
    system.publish(np.array([3, 4, 0, 0, 0, 0, 0], np.float32))
    system.drain()
    assert norms(system)[1] == 0
    system.aggregator.finish()
    assert norms(system) == (5.0, 1)


def test_refused_and_repeated_updates_have_no_norm():
    system = System(buffer_size=1, staleness_max=1)
    for _ in range(2):
        newest = system.publish(np.ones(7, np.float32))
        system.drain()
    system.send(newest)
    system.send(update_of(np.ones(7, np.float32), update_id="a/i/9", base_version=0))
    system.send_bytes(b"garbage")
    system.drain()
    system.aggregator.finish()
    assert norms(system)[1] == 2
    counted = {
        name: system.metrics.updates.labels(JOB, name)._value.get() for name in ("duplicate", "stale", "rejected")
    }
    assert counted == {"duplicate": 1, "stale": 1, "rejected": 1}


def test_who_commits_serves_and_who_sees_another_commit_stands_by():
    system = System(buffer_size=1)
    assert system.metrics.serving._value.get() == 0
    system.publish(np.ones(7, np.float32))
    system.drain()
    assert system.metrics.serving._value.get() == 1
    assert system.metrics.commits._value.get() == 1
    other = System(store=system.store, buffer_size=1)
    other.publish(np.ones(7, np.float32), update_id="b/i/0")
    other.drain()
    assert other.metrics.serving._value.get() == 1
    system.aggregator.step()
    assert system.metrics.serving._value.get() == 0
