"""The worker's step over an in-process store, with tasks of plain arrays and one of torch."""

import numpy as np
import pytest
import safetensors.torch
import torch

from shared.compression import decode as decode_delta
from shared.errors import SettingsError, StoreUnavailable, TaskError, VersionGone
from shared.layout import Layout
from shared.messages import decode
from shared.model_image import ModelImage
from shared.store.inprocess import InProcessStore
from tests.builders import JOB, FaultyStore, System, add_one, device_of
from worker.task import TrainResult, read


def build():
    return {"w": np.zeros((2, 3), np.float32), "count": np.array(7, np.int64), "b": np.zeros((), np.float64)}


START = {"w": np.arange(6, dtype=np.float32).reshape(2, 3), "count": np.array(41, np.int64), "b": np.array(0.5)}


@pytest.fixture
def system():
    return System(ModelImage.of(START), buffer_size=1, staleness="constant")


def sent(device):
    """Return the decoded updates that wait, oldest first, with their deltas."""
    found = []
    while (waiting := device.outbox.oldest()) is not None:
        update = decode(waiting.body(), 10**6)
        delta = np.zeros(7, np.float32)
        decode_delta(update.codec, update.payload, ModelImage.of(START).layout).add_into(delta, 1.0)
        found.append((update, delta))
        device.outbox.remove(waiting)
    return found


def test_one_step_sends_what_the_training_changed(tmp_path, system):
    system.clock.time_s = 12.0
    device = device_of(tmp_path, system, add_one, build)
    assert device.worker.step()
    [(update, delta)] = sent(device)
    assert delta.tolist() == [1] * 7
    assert (update.job, update.client, update.base_version) == (JOB, "a", 0)
    assert update.update_id == f"a/{device.outbox.incarnation}/0"
    assert (update.num_samples, update.num_steps, update.metrics) == (3, 2, {"loss": 0.25})
    assert update.layout == system.store.head().layout
    assert update.codec == {"name": "float32"}
    assert (update.created_at, update.train_seconds >= 0) == (12.0, True)


def test_the_training_starts_from_the_pulled_weights_every_time(tmp_path, system):
    seen = []

    def train(model, context):
        seen.append({name: array.copy() for name, array in model.items()})
        model["count"] += 1
        return add_one(model, context)

    device = device_of(tmp_path, system, train, build)
    device.worker.step()
    device.worker.step()
    for model in seen:
        for name, array in START.items():
            np.testing.assert_array_equal(model[name], array)
    assert [delta.tolist() for _, delta in sent(device)] == [[1] * 7] * 2


def test_an_update_makes_the_round_trip(tmp_path, system):
    device = device_of(tmp_path, system, add_one, build)
    for version in (1, 2, 3):
        device.worker.step()
        device.publisher.step()
        system.drain()
        assert system.store.head().version == version
    np.testing.assert_allclose(system.weights, [3, 4, 5, 6, 7, 8, 3.5])
    assert system.store.model(3).tensors()["count"] == 41
    assert [e["staleness"] for c in system.store.ledger for e in c["updates"]] == [0, 0, 0]


def test_a_model_is_pulled_only_when_it_is_newer(tmp_path, system):
    pulled = []
    original = system.store.model
    system.store.model = lambda version: (pulled.append(version), original(version))[1]
    device = device_of(tmp_path, system, add_one, build)
    for _ in range(3):
        device.worker.step()
    assert pulled == [0]
    size = device.metrics.pulled_bytes._value.get()
    device.publisher.step()
    system.drain()
    pulled.clear()
    device.worker.step()
    device.worker.step()
    assert pulled == [1]
    assert device.metrics.pulled_bytes._value.get() == 2 * size
    assert [update.base_version for update, _ in sent(device)] == [0, 0, 1, 1]


def test_the_base_version_is_the_one_trained_from_not_the_newest(tmp_path, system):
    def train(model, context):
        system.publish(np.ones(7, np.float32), update_id="b/i/0", layout=system.store.head().layout)
        system.drain()
        return add_one(model, context)

    device = device_of(tmp_path, system, train, build)
    device.worker.step()
    assert system.store.head().version == 1
    [(update, delta)] = sent(device)
    assert (update.base_version, delta.tolist()) == (0, [1] * 7)


def test_a_job_that_started_anew_is_pulled_although_its_version_is_older(tmp_path, system):
    device = device_of(tmp_path, system, add_one, build)
    device.worker.step()
    device.publisher.step()
    system.drain()
    device.worker.step()
    fresh = InProcessStore()
    fresh.create(ModelImage.of(START), 0.0)
    fresh.announce(system.aggregator.describe())
    device.worker._store = fresh
    device.worker.step()
    assert [update.base_version for update, _ in sent(device)] == [1, 0]


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e30])
def test_weights_that_are_not_finite_are_never_sent(tmp_path, system, value):
    def train(model, context):
        model["w"][1, 1] = value
        return add_one(model, context)

    device = device_of(tmp_path, system, train, build)
    with pytest.raises(TaskError, match="not finite"):
        device.worker.step()
    assert len(device.outbox) == 0
    assert device.outbox.next_sequence == 0


def test_metrics_that_are_not_finite_are_left_out(tmp_path, system):
    def train(model, context):
        return TrainResult(1, 1, {"loss": float("nan"), "good": 1.0, "bad": float("inf")})

    device = device_of(tmp_path, system, train, build)
    device.worker.step()
    assert sent(device)[0][0].metrics == {"good": 1.0}


def test_a_task_that_raises_costs_one_training(tmp_path, system):
    turns = iter([True, False])

    def train(model, context):
        model["w"] += 1000
        if next(turns):
            raise ZeroDivisionError("no data today")
        model["w"] -= 1000
        return add_one(model, context)

    device = device_of(tmp_path, system, train, build)
    with pytest.raises(TaskError, match=r"train\(\) of test raised ZeroDivisionError: no data today"):
        device.worker.step()
    assert len(device.outbox) == 0
    assert device.worker.step()
    # the half-trained weights of the first turn are gone: 1000 was added to the pulled ones, not to those
    [(_, delta)] = sent(device)
    assert delta.tolist() == [1] * 7


@pytest.mark.parametrize(
    "result",
    [
        None, {"num_samples": 1}, 5, TrainResult(0, 1), TrainResult(1, 0), TrainResult(-1, 1),
        TrainResult(10**9 + 1, 1), TrainResult(1.5, 1), TrainResult("many", 1), TrainResult(1, 1, None),
        TrainResult(1, 1, {"loss": "low"}), TrainResult(1, 1, {7: 1.0}), TrainResult(1, 1, {"x" * 65: 1.0}),
        TrainResult(1, 1, {str(i): 1.0 for i in range(65)}),
    ],
    ids=lambda result: repr(result)[:60],
)  # fmt: skip
def test_a_result_that_cannot_be_used_neither_crashes_the_worker_nor_is_sent(tmp_path, system, result):
    device = device_of(tmp_path, system, lambda model, context: result, build)
    try:
        device.worker.step()
    except TaskError:
        assert len(device.outbox) == 0
    else:
        decode(device.outbox.oldest().body(), 10**6)


@pytest.mark.parametrize(
    "result",
    [
        TrainResult(np.int64(3), np.int32(2), {"loss": np.float32(0.25)}),
        TrainResult(3, 2, {"loss": np.float64(0.25)}),
        TrainResult(3, 2, {"loss": np.array(0.25, np.float32)}),
        TrainResult(3, 2, {"loss": torch.tensor(0.25)}),
    ],
    ids=["numpy scalars", "float64", "array", "torch tensor"],
)
def test_numbers_may_be_numpys_or_torchs(tmp_path, system, result):
    device = device_of(tmp_path, system, lambda model, context: result, build)
    device.worker.step()
    [(update, _)] = sent(device)
    assert (update.num_samples, update.num_steps, update.metrics) == (3, 2, {"loss": 0.25})


def test_a_training_that_changes_the_models_shape_is_a_task_error(tmp_path, system):
    def train(model, context):
        model["w"] = np.zeros((5, 5), np.float32)
        return TrainResult(1, 1)

    with pytest.raises(TaskError):
        device_of(tmp_path, system, train, build).worker.step()


@pytest.mark.parametrize(
    ("mine", "named"),
    [
        (lambda: build() | {"extra": np.zeros(2, np.float32)}, r"tensor 'extra' \(2,\) float32 of this task's model"),
        (lambda: {k: v for k, v in build().items() if k != "b"}, r"tensor 'b' \(\) float64 of the job is missing"),
        (lambda: build() | {"w": np.zeros((3, 2), np.float32)}, r"tensor 'w' is \(3, 2\) float32 here, \(2, 3\)"),
        (lambda: build() | {"count": np.array(1, np.int32)}, r"tensor 'count' is \(\) int32 here, \(\) int64"),
    ],
)
def test_a_model_of_another_layout_is_refused_by_its_tensor(tmp_path, system, mine, named):
    device = device_of(tmp_path, system, add_one, mine)
    for _ in range(2):  # and again, for who goes on in spite of it
        with pytest.raises(SettingsError, match=rf"task test does not fit job 'job': {named}"):
            device.worker.step()
    assert len(device.outbox) == 0


def test_an_update_that_could_be_too_large_is_refused_before_training(tmp_path):
    system = System(ModelImage.of({"w": np.zeros(10**5, np.float32)}), update_bytes_max=10**5)

    def train(model, context):
        raise AssertionError("trained in vain")

    device = device_of(tmp_path, system, train, lambda: {"w": np.zeros(10**5, np.float32)})
    with pytest.raises(SettingsError, match=r"100000 parameters as float32 may take 465536 bytes.*100000.*FEDMQ_CODEC"):
        device.worker.step()


def test_a_worker_waits_for_a_job_that_has_no_model(tmp_path, system):
    device = device_of(tmp_path, system, add_one, build, store=InProcessStore())
    assert not device.worker.step()
    assert len(device.outbox) == 0


def test_a_worker_waits_for_a_job_that_no_aggregator_has_announced(tmp_path, system):
    """`fedmq models init` stores version 0 before any aggregator runs."""
    store = InProcessStore()
    store.create(ModelImage.of(START), 0.0)
    device = device_of(tmp_path, system, add_one, build, store=store)
    assert not device.worker.step()
    store.announce(system.aggregator.describe())
    assert device.worker.step()


def test_a_version_that_was_replaced_during_the_pull_is_looked_up_again(tmp_path, system):
    device = device_of(tmp_path, system, add_one, build)
    original = system.store.model

    def gone(version):
        system.store.model = original
        raise VersionGone("replaced")

    system.store.model = gone
    assert not device.worker.step()
    assert device.worker.step()


def test_without_a_store_training_goes_on_from_the_weights_at_hand(tmp_path):
    system = System(ModelImage.of(START), store=FaultyStore())
    device = device_of(tmp_path, system, add_one, build)
    device.worker.step()
    system.store.failing = ("head", "model", "job")
    assert device.worker.step()
    assert [(u.base_version, d.tolist()) for u, d in sent(device)] == [(0, [1] * 7)] * 2


def test_without_a_store_at_the_start_the_step_says_so(tmp_path):
    system = System(ModelImage.of(START), store=FaultyStore())
    system.store.failing = ("head", "model", "job")
    device = device_of(tmp_path, system, add_one, build)
    with pytest.raises(StoreUnavailable):
        device.worker.step()
    system.store.failing = ()
    assert device.worker.step()


def test_the_jobs_codec_is_used_and_its_rounding_is_seeded(tmp_path):
    system = System(ModelImage.of(START), codec="all | int4 | zstd")

    def train(model, context):
        model["w"] += np.random.default_rng(1).standard_normal((2, 3), np.float32)
        return TrainResult(1, 1)

    payloads = []
    for folder, seed in (("x", 0), ("y", 0), ("z", 1)):
        device = device_of(tmp_path / folder, system, train, build, seed=seed)
        device.worker.step()
        device.worker.step()
        [(first, _), (second, _)] = sent(device)
        assert first.codec["name"] == "all | int4 | zstd"
        payloads.append((first.payload, second.payload))
    assert payloads[0] == payloads[1]  # the same seed, client and sequence
    assert payloads[0] != payloads[2]
    assert payloads[0][0] != payloads[0][1]


def test_every_training_gets_its_own_seed_also_after_a_restart(tmp_path, system):
    seeds = []

    def train(model, context):
        seeds.append(context.seed)
        return TrainResult(1, 1)

    for client in ("a", "a", "b"):
        device = device_of(tmp_path, system, train, build, client_id=client)
        device.worker.step()
        device.worker.step()
        device.outbox.close()
    assert len(set(seeds)) == 6


def test_the_context_tells_the_task_what_it_needs(tmp_path, system):
    contexts = []

    def train(model, context):
        contexts.append(context)
        return TrainResult(1, 1)

    device = device_of(tmp_path, system, train, build, task_settings={"lr": "0.1"})
    device.worker.step()
    [context] = contexts
    assert (context.client, context.version, dict(context.settings)) == ("a", 0, {"lr": "0.1"})
    assert not context.stopping()
    device.worker.stop.set()
    assert context.stopping()


# --- the loop -----------------------------------------------------------------------------------------------


def test_run_ends_after_updates_max_and_leaves_nothing_behind(tmp_path, system):
    device = device_of(tmp_path, system, add_one, build, updates_max=3)
    device.worker.run()
    assert device.worker.updates_made == 3
    assert len(device.outbox) == 0
    assert system.broker.depth(JOB) == 3


def test_run_goes_on_after_a_failed_training_and_counts_it(tmp_path, system):
    turns = iter([True, True, False, True, False])

    def train(model, context):
        if next(turns):
            raise RuntimeError("flaky sensor")
        return add_one(model, context)

    device = device_of(tmp_path, system, train, build, updates_max=2)
    device.worker.run()
    assert device.worker.updates_made == 2
    assert device.metrics.failures._value.get() == 3
    assert system.clock.time_s > 0  # it rested after each


def test_a_full_outbox_pauses_the_training(tmp_path, system):
    system.settings = system.settings.model_copy(update={"job": "nobody"})  # its queue does not exist
    device = device_of(tmp_path, system, add_one, build)
    device.outbox._updates_max = 2
    device.worker.settings = device.worker.settings.model_copy(update={"updates_max": 3})
    waited = []

    class Clock:
        now = monotonic = staticmethod(system.clock.now)

        def wait(self, stop, seconds):
            waited.append(seconds)
            stop.set()

    device.worker._clock = Clock()
    device.worker._loop()
    assert device.worker.updates_made == 2
    assert len(device.outbox) == 2
    assert waited


# --- torch --------------------------------------------------------------------------------------------------


def batchnorm():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3), torch.nn.Linear(3, 2))


def test_a_batchnorm_model_from_end_to_end(tmp_path):
    """Running statistics are averaged like weights; the integer counter keeps the value of version 0."""
    model = batchnorm()
    model[1].num_batches_tracked.fill_(5)
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    system = System(read(model), buffer_size=2)
    trained = []

    def train(model, context):
        inputs = torch.randn(8, 2, generator=torch.Generator().manual_seed(ord(context.client)))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        model.train()
        torch.nn.functional.cross_entropy(model(inputs), torch.arange(8) % 2).backward()
        optimizer.step()
        trained.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
        return TrainResult(8, 1)

    for client in ("a", "b"):
        device = device_of(tmp_path, system, train, batchnorm, client_id=client)
        device.worker.step()
        device.publisher.step()
    system.drain()
    assert system.store.head().version == 1
    assert [int(state["1.num_batches_tracked"]) for state in trained] == [6, 6]
    stored = system.store.model(1).tensors()
    assert stored["1.num_batches_tracked"] == 5
    assert stored["1.num_batches_tracked"].dtype == np.int64
    assert not torch.equal(trained[0]["1.running_mean"], start["1.running_mean"])
    for name in start.keys() - {"1.num_batches_tracked"}:
        mean = start[name] + sum(state[name] - start[name] for state in trained) / 2
        np.testing.assert_allclose(stored[name], mean.numpy(), atol=1e-6, err_msg=name)
    system.store.model(1).save(tmp_path / "model")
    batchnorm().load_state_dict(safetensors.torch.load_file(tmp_path / "model"), strict=True)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_a_training_that_changes_nothing_sends_nothing_in_any_precision(tmp_path, dtype):
    """A delta is relative to the weights the training started from: those the model could hold, after the cast."""

    def half():
        torch.manual_seed(0)
        return torch.nn.Linear(3, 4).to(dtype)

    system = System(read(half()), buffer_size=1)
    system.publish(
        np.full(16, 1 / 3, np.float32), layout=read(half()).layout.hash
    )  # the server's weights need more bits than the model has
    system.drain()
    device = device_of(tmp_path, system, lambda model, context: TrainResult(1, 1), half)
    device.worker.step()
    device.publisher.step()
    system.drain()
    assert system.store.head().version == 2
    np.testing.assert_array_equal(system.store.model(2).weights, system.store.model(1).weights)


def test_a_bfloat16_model_declares_its_type(tmp_path):
    image = read(torch.nn.Linear(2, 1).to(torch.bfloat16))
    assert [spec.dtype for spec in image.layout.tensors] == ["bfloat16", "bfloat16"]
    assert image.layout.hash == Layout.of([("weight", (1, 2), "bfloat16"), ("bias", (1,), "bfloat16")]).hash


def test_a_torch_model_on_the_wire_is_the_same_as_one_of_arrays():
    linear = torch.nn.Linear(3, 2)
    arrays = {name: tensor.detach().numpy() for name, tensor in linear.state_dict().items()}
    assert read(linear).sha256 == read(arrays).sha256
