"""How an aggregator comes to a version 0: given one, found one, or waiting for one."""

import threading

import numpy as np
import pytest

from aggregator.__main__ import start_job
from shared.clock import VirtualClock
from shared.errors import SettingsError, StoreUnavailable
from shared.store.inprocess import InProcessStore
from tests.builders import JOB, model_of, weights


class EventfulClock(VirtualClock):
    """A clock whose waits are the moments at which something happens."""

    def __init__(self, *events):
        super().__init__()
        self.events = list(events)

    def wait(self, stop, seconds):
        super().wait(stop, seconds)
        self.events.pop(0)()


def test_a_given_model_becomes_version_0():
    store = InProcessStore()
    assert start_job(store, model_of(weights(1)), JOB, VirtualClock(), threading.Event())
    assert store.head().version == 0
    np.testing.assert_array_equal(store.model(0).weights, weights(1))


def test_a_job_that_runs_keeps_its_own_model():
    store = InProcessStore()
    store.create(model_of(weights(1)), 0.0)
    assert start_job(store, model_of(weights(2)), JOB, VirtualClock(), threading.Event())
    np.testing.assert_array_equal(store.model(0).weights, weights(1))
    assert start_job(store, None, JOB, VirtualClock(), threading.Event())


def test_a_model_of_another_layout_is_refused():
    store = InProcessStore()
    store.create(model_of(weights(1)), 0.0)
    with pytest.raises(SettingsError, match="exists with another layout"):
        start_job(store, model_of(weights(1, 9)), JOB, VirtualClock(), threading.Event())


def test_without_a_model_it_waits_until_somebody_stores_one():
    store = InProcessStore()
    clock = EventfulClock(lambda: None, lambda: store.create(model_of(weights(1)), 0.0))
    assert start_job(store, None, JOB, clock, threading.Event())
    assert not clock.events


def test_it_stops_waiting_when_asked_to():
    stop = threading.Event()
    assert not start_job(InProcessStore(), None, JOB, EventfulClock(stop.set), stop)


def test_a_store_that_is_away_is_asked_again():
    store, answers = InProcessStore(), [StoreUnavailable("away"), StoreUnavailable("away")]
    original = store.create

    def create(model, now):
        if answers:
            raise answers.pop()
        return original(model, now)

    store.create = create
    assert start_job(store, model_of(weights(1)), JOB, EventfulClock(list, list), threading.Event())
    assert store.head().version == 0
