"""No mass is lost or doubled, over 500 seeds; and the checker would see it."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from shared.compression import Codec, Encoded
from shared.layout import Layout
from shared.store.inprocess import InProcessStore
from shared.vector import Vector
from tests.simulation import fleet
from worker import residual, residual_file
from worker.outbox import Outbox
from worker.residual import Residual

SEEDS, BATCH = 500, 25
MUTANT_SEEDS = 120  # the rarest needs a kill at one of two points

Patch = Callable[[Any, str, Any], None]


@pytest.mark.parametrize("first", range(0, SEEDS, BATCH))
def test_no_mass_is_lost(first, tmp_path, monkeypatch):
    for seed in range(first, first + BATCH):
        fleet.run(seed, tmp_path, monkeypatch)


def residual_only_in_memory(patch: Patch) -> None:
    write = residual_file.write
    patch(residual_file, "write", lambda folder, header, _: write(folder, replace(header, num_params=0), None))


def refused_mass_is_forgotten(patch: Patch) -> None:
    patch(Residual, "_take_back", lambda *_: True)


def refused_updates_stay_when_taken_back(patch: Patch) -> None:
    forget = Outbox.forget
    patch(Outbox, "forget", lambda self, gone, durable=False: forget(self, [] if durable else gone))


def a_crash_forgets_what_was_taken_back(patch: Patch) -> None:
    write = residual_file.write
    patch(residual_file, "write", lambda folder, header, vector: write(folder, replace(header, returned=[]), vector))


def residual_from_before_the_rounding(patch: Patch) -> None:
    def encode(codec: Codec, delta: Vector, e: Vector, layout: Layout, rng: np.random.Generator) -> Encoded:
        e += delta
        encoded = codec.encode(e, layout, rng)
        decoded = np.zeros_like(e)
        codec.decode(encoded.payload, encoded.params, layout).add_into(decoded, 1.0)
        e[decoded != 0] = 0
        return encoded

    patch(residual, "encode_with_feedback", encode)


def published_before_the_residual_is_on_disk(patch: Patch) -> None:
    stage, release = Outbox.stage, Outbox.release

    def stage_and_release(self: Outbox, body: bytes) -> int:
        sequence = stage(self, body)
        release(self, sequence)
        return sequence

    patch(Outbox, "stage", stage_and_release)
    patch(Outbox, "release", lambda *_: None)


def a_crash_drops_the_staged_update(patch: Patch) -> None:
    recover = Outbox.recover
    patch(Outbox, "recover", lambda self, made, returned: recover(self, -1, returned))


def a_crash_publishes_the_staged_update(patch: Patch) -> None:
    recover = Outbox.recover
    patch(Outbox, "recover", lambda self, made, returned: recover(self, None, returned))


def the_last_outcome_counts(patch: Patch) -> None:
    outcomes = InProcessStore.outcomes

    def newest(self: InProcessStore, client: str, after: int) -> Any:
        pairs, cursor = outcomes(self, client, after)
        return list(dict(pairs).items()), cursor

    patch(InProcessStore, "outcomes", newest)


def mass_grows_young_by_training(patch: Patch) -> None:
    patch(residual, "mean_version", lambda norm, mean, norm_joining, mean_joining: mean_joining)


def mass_grows_young_in_flight(patch: Patch) -> None:
    write = residual_file.write
    patch(residual_file, "write", lambda folder, header, vector: write(folder, replace(header, means={}), vector))
    put = Residual.put

    def put_and_forget(self: Residual, body: bytes) -> None:
        put(self, body)
        self._means = {}

    patch(Residual, "put", put_and_forget)


def a_late_update_comes_back_faded(patch: Patch) -> None:
    take_back = Residual._take_back

    def fade_first(self: Residual, sequence: int, layout: Layout, version: int, horizon: int) -> bool:
        self._means[sequence] = self._means.get(sequence, 0.0) - 3
        return take_back(self, sequence, layout, version, horizon)

    patch(Residual, "_take_back", fade_first)


@pytest.mark.parametrize(
    "mutate",
    [
        residual_only_in_memory,
        refused_mass_is_forgotten,
        refused_updates_stay_when_taken_back,
        a_crash_forgets_what_was_taken_back,
        residual_from_before_the_rounding,
        published_before_the_residual_is_on_disk,
        a_crash_drops_the_staged_update,
        a_crash_publishes_the_staged_update,
        the_last_outcome_counts,
        mass_grows_young_by_training,
        mass_grows_young_in_flight,
        a_late_update_comes_back_faded,
    ],
)
def test_the_checker_sees(mutate, tmp_path, monkeypatch):
    mutate(monkeypatch.setattr)
    with pytest.raises(AssertionError, match=r"seed \d+: w\d's (mass is off by|residual has the wrong age)"):
        for seed in range(MUTANT_SEEDS):
            fleet.run(seed, tmp_path, monkeypatch)
