"""`auto`: the rules of the choice, and a job whose worker makes it."""

import itertools
import re
from types import SimpleNamespace

import numpy as np
import pytest

from shared.compression import PRESETS, parse
from shared.compression.measure import Measurement
from shared.errors import SettingsError, TaskError
from shared.layout import Layout
from shared.messages import ENVELOPE_BYTES_MAX, decode
from shared.model_image import ModelImage
from shared.vector import NORM_MAX
from tests.builders import System, add_one, device_of
from worker import residual_file
from worker.auto import (
    CHOICES,
    NMSE_MAX,
    SIZE_SHARE_MAX,
    TIME_FREE_S,
    TIME_SHARE_MAX,
    UPDATES,
    AutoCodec,
    choose,
    time_share,
)
from worker.task import TrainResult

LAYOUT = Layout.of([("w", (50, 40), "float32"), ("b", (40,), "float32")])
SAFE, BALANCED, TINY = (parse(name).name for name in CHOICES)


def measured(payload_bytes=1000, nmse=0.0, encode_s=0.0, decode_s=0.0, times=3):
    return [Measurement(payload_bytes, 1.0, nmse, 0.0, encode_s, decode_s)] * times


def choice(train_s=(1.0, 1.0, 1.0), **seen):
    return choose({"safe": measured()} | seen, train_s)


# --- the rules


def test_the_smallest_that_serves_is_chosen():
    assert choice(balanced=measured(300), tiny=measured(100)) == "tiny"
    assert choice(balanced=measured(100), tiny=measured(300)) == "balanced"


def test_a_codec_that_leaves_most_of_an_update_unsent_does_not_serve():
    assert choice(balanced=measured(300, NMSE_MAX), tiny=measured(100, NMSE_MAX + 0.01)) == "balanced"
    assert choice(balanced=measured(300, 0.9), tiny=measured(100, 0.95)) == "safe"


def test_safe_stays_unless_another_is_clearly_smaller():
    limit = round(1000 * SIZE_SHARE_MAX)
    assert choice(balanced=measured(limit)) == "balanced"
    assert choice(balanced=measured(limit + 1)) == "safe"
    assert choice(balanced=measured(1000), tiny=measured(1000)) == "safe"  # only small tensors: all the same bytes


def test_a_codec_that_costs_much_of_the_training_does_not_serve():
    slow = TIME_SHARE_MAX * 2.0 + TIME_FREE_S
    trainings = (2.0, 2.0, 2.0)
    assert choice(trainings, tiny=measured(100, encode_s=0.6 * slow, decode_s=0.39 * slow)) == "tiny"
    assert choice(trainings, tiny=measured(100, encode_s=0.6 * slow, decode_s=0.41 * slow)) == "safe"


def test_a_time_that_nobody_notices_counts_nothing():
    trainings = (1e-6, 1e-6, 0.0)
    half = TIME_FREE_S / 2
    assert choice(trainings, tiny=measured(100, encode_s=half, decode_s=0.99 * half)) == "tiny"
    assert choice(trainings, tiny=measured(100, encode_s=half, decode_s=1.01 * half)) == "safe"


def test_one_pause_of_the_machine_decides_nothing():
    fast, pause = measured(100, encode_s=0.01, times=1), measured(100, encode_s=5.0, times=1)
    for order in itertools.permutations([fast, fast, pause]):
        assert choice(tiny=[*itertools.chain(*order)]) == "tiny"
    assert choice((1.0, 0.001, 1.0), tiny=fast * 3) == "tiny"
    assert choice((0.001, 1.0, 0.001), tiny=fast * 3) == "safe"


def test_one_odd_update_decides_nothing():
    assert choice(tiny=measured(100, 0.99, times=1) + measured(100, 0.1, times=2)) == "tiny"
    assert choice(tiny=measured(9000, 0.1, times=1) + measured(100, 0.1, times=2)) == "tiny"


def test_the_time_share_is_the_median_over_the_updates():
    costs = ((1, 1), (3, 1 + TIME_FREE_S), (0, 9))
    seen = [Measurement(1, 1, 0, 0, encode_s, decode_s) for encode_s, decode_s in costs]
    assert time_share(seen, (10.0, 10.0, 1.0)) == pytest.approx(0.4)
    assert time_share(measured(encode_s=0.1), (0.0, 0.0, 0.0)) > 1  # a clock too coarse: nothing to compare with


def test_a_codec_that_could_not_be_decoded_every_time_does_not_serve():
    assert choice(balanced=measured(300), tiny=measured(100, times=2)) == "balanced"
    assert choice(balanced=measured(300, times=0), tiny=measured(100, times=0)) == "safe"
    assert choice(safe=measured(times=2), tiny=measured(100)) == "safe"  # nothing to compare with


# --- the measuring


def test_a_delta_that_no_decoder_takes_raises_nothing(caplog):
    auto, good = AutoCodec(), np.random.default_rng(0).standard_normal(LAYOUT.num_params, np.float32)
    names = [auto.codec(delta, LAYOUT, 1e6, 1).name for delta in (good, good * 1e17, good, good)]
    assert names == [SAFE] * 4
    for name in CHOICES:
        assert f"codec auto: {name} does not serve this worker: " in caplog.text


def test_measuring_leaves_the_delta_alone():
    delta = np.random.default_rng(0).standard_normal(LAYOUT.num_params, np.float32)
    before, auto = delta.copy(), AutoCodec()
    for _ in range(UPDATES):
        auto.codec(delta, LAYOUT, 1.0, 1)
    np.testing.assert_array_equal(delta, before)


# --- a worker's job


def build():
    return {"w": np.zeros((50, 40), np.float32), "b": np.zeros(40, np.float32)}


def build_small():
    return {f"t{index}": np.zeros((20, 40), np.float32) for index in range(3)}


def dense(model, context):
    """Change everything alike: one element in a hundred holds too little of it."""
    rng = np.random.default_rng(context.seed)
    for array in model.values():
        array += rng.standard_normal(array.shape, np.float32)
    return TrainResult(1, 1)


def sparse(model, context):
    """Change one element in a hundred much: half of the energy."""
    dense(model, context)
    model["w"][::5, ::20] += 10
    return TrainResult(1, 1)


def run(folder, monkeypatch, train, build=build, train_s=100.0, trainings=UPDATES + 2):
    """Return the codec names that the messages of a job with codec `auto` bear, and its system; time is made up."""
    monkeypatch.setattr("worker.auto.TIME_FREE_S", 0.0)
    clock = SimpleNamespace(perf_counter=itertools.count(0.0, train_s).__next__)
    monkeypatch.setattr("worker.training.time", clock)
    system = System(ModelImage.of(build()), codec="auto", buffer_size=1, staleness="constant")
    device = device_of(folder, system, train, build)
    names = []
    for _ in range(trainings):
        assert device.worker.step()
        names.append(decode(device.outbox.oldest().body(), 10**6).codec["name"])
        device.publisher.step()
        system.drain()
    return names, system


@pytest.mark.parametrize(
    ("train", "changes", "chosen"),
    [
        (dense, {}, BALANCED),
        (sparse, {}, TINY),
        (dense, {"build": build_small}, SAFE),
        (sparse, {"train_s": 1e-6}, SAFE),
    ],
    ids=["dense", "sparse", "small tensors", "quick training"],
)
def test_the_first_updates_travel_as_safe_then_the_choice_stands(tmp_path, monkeypatch, train, changes, chosen):
    names, system = run(tmp_path, monkeypatch, train, **changes)
    assert names == [SAFE] * UPDATES + [chosen] * 2
    assert [outcome for _, outcome in system.outcomes()] == ["applied"] * len(names)
    assert system.store.head().version == len(names)
    assert bool(list(tmp_path.rglob(residual_file.NAME))) == (chosen != SAFE)  # written for a purpose, or not at all


def test_what_the_choice_leaves_out_arrives_later(tmp_path, monkeypatch):
    def train(model, context):
        model["w"] += np.arange(1, 2001, dtype=np.float32).reshape(50, 40) / 2000
        return TrainResult(1, 1)

    names, system = run(tmp_path, monkeypatch, train, trainings=40)
    assert names[-1] == BALANCED
    expected = 40 * np.arange(1, 2001) / 2000
    assert np.abs(system.weights[:2000] - expected).max() < 2  # at most about a step stays behind, not a share of 40


@pytest.mark.parametrize("codec", ["auto", "float32", "int8 | zstd", "ef | uniform(step=2) | pack | zstd"])
def test_one_exploding_training_is_reported_and_the_worker_goes_on(tmp_path, codec):
    calls = itertools.count()

    def train(model, context):
        if next(calls) == 1:
            model["w"] += 1e10  # of 2,000 weights: a norm of 4.5e11
        return add_one(model, context)

    system = System(ModelImage.of(build()), codec=codec, buffer_size=1, staleness="constant")
    device = device_of(tmp_path, system, train, build)
    assert device.worker.step()
    with pytest.raises(
        TaskError, match=re.escape(f"a delta of norm 4.472e+11, above {NORM_MAX:g}: the update is not sent")
    ):
        device.worker.step()
    assert len(device.outbox) == 1
    for _ in range(4):
        assert device.worker.step()


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_carries_the_largest_delta(tmp_path, name):
    def train(model, context):
        rng = np.random.default_rng(context.seed)
        change = rng.standard_normal(2000, np.float32)
        model["w"] += (change * np.float32(0.999 * NORM_MAX) / np.linalg.norm(change)).reshape(50, 40)
        return TrainResult(1, 1)

    system = System(ModelImage.of(build()), codec=name, buffer_size=1, staleness="constant")
    device = device_of(tmp_path, system, train, build)
    for _ in range(3):
        assert device.worker.step()
        device.publisher.step()
        system.drain()
    assert [outcome for _, outcome in system.outcomes()] == ["applied"] * 3


def test_a_job_that_takes_only_some_of_the_choices_is_refused_at_once(tmp_path):
    sizes = [parse(name).payload_bytes_max(LAYOUT) + ENVELOPE_BYTES_MAX for name in CHOICES]
    assert max(sizes) > sizes[0]  # else this tests nothing
    system = System(ModelImage.of(build()), codec="auto", update_bytes_max=max(sizes))
    assert device_of(tmp_path / "fits", system, dense, build).worker.step()
    system.start(update_bytes_max=sizes[0])
    with pytest.raises(SettingsError, match=f"as auto may take {max(sizes)} bytes"):
        device_of(tmp_path / "too large", system, dense, build).worker.step()
