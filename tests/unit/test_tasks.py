"""The worked tasks learn, follow their settings and say what they miss. Those that read files are tried where they lie.

The closed forms of the training itself are in test_local_sgd.py.
"""

import gzip
import os
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from ops.bench.tasks import noise
from shared.errors import SettingsError, TaskError
from worker.task import BUILT_IN, Context, Task, read, write
from worker.tasks import digits, mnist, mushrooms, shakespeare
from worker.tasks.classify import class_weights, measure

needs_data = pytest.mark.skipif(not os.environ.get("FEDMQ_DATA"), reason="FEDMQ_DATA is not set")
TORCH = ("digits", "mnist", "mnist_wide", "mnist_mlp", "shakespeare")


def context(seed=1, **settings):
    return Context("worker-1", 0, seed, {name: str(value) for name, value in settings.items()})


def delta(name, seed=1, **settings):
    """Train once; return what it changed, and the result."""
    task = Task.load(name)
    model = task.build()
    before = read(model).weights.copy()
    result = task.train(model, context(seed, **settings))
    return read(model).weights - before, result


class Answers(torch.nn.Module):
    """Scores that are its inputs."""

    def forward(self, inputs):
        return inputs


def test_accuracy_is_told_by_class_for_the_classes_there_are():
    labels = torch.tensor([0, 0, 0, 2, 2])
    scores = torch.eye(3)[[0, 0, 1, 2, 0]] * 5
    metrics = measure(Answers(), scores, labels)
    assert metrics.keys() == {"accuracy", "loss", "accuracy_class_0", "accuracy_class_2"}
    assert metrics["accuracy"] == pytest.approx(3 / 5)
    assert metrics["accuracy_class_0"] == pytest.approx(2 / 3)
    assert metrics["accuracy_class_2"] == pytest.approx(1 / 2)
    right, wrong = np.log1p(2 * np.exp(-5)), np.log1p(2 * np.exp(-5)) + 5
    assert metrics["loss"] == pytest.approx((3 * right + 2 * wrong) / 5, rel=1e-5)


def test_a_class_weighs_the_same_however_many_examples_it_has():
    weights = class_weights(torch.tensor([3, 3, 3, 0]))
    np.testing.assert_allclose(weights, [2 / 3, 2 / 3, 2 / 3, 2])
    assert float(weights.mean()) == pytest.approx(1)
    np.testing.assert_allclose(class_weights(torch.tensor([5, 5])), [1, 1])


def test_digits_learn_and_tell_every_class():
    task = Task.load("digits")
    model = task.build()
    for seed in range(3):
        result = task.train(model, context(seed, shares=1, share=0, partition="iid", momentum=0.5))
    assert result.num_samples == 1618
    assert result.num_steps == 2 * 102
    metrics = task.evaluate(model, context())
    assert metrics["accuracy"] > 0.9
    assert {f"accuracy_class_{c}" for c in range(10)} <= metrics.keys()


@pytest.mark.parametrize(
    "settings",
    [
        {"share": 4}, {"shares": 9}, {"partition": "iid"}, {"epochs": 3}, {"steps": 3}, {"batch": 7}, {"lr": 0.2},
        {"momentum": 0.5}, {"proximal": 1}, {"clip": 0.1}, {"weight": "class"},
    ],
)  # fmt: skip
def test_every_setting_changes_the_training(settings):
    given = {"share": 3, "partition": "dirichlet(0.5)"} | settings
    plain, changed = delta("digits", share=3, partition="dirichlet(0.5)")[0], delta("digits", **given)[0]
    assert np.abs(plain - changed).max() > 1e-4


def test_the_default_deal_is_what_it_was():
    from worker.tasks.partition import label_shards

    labels = digits._data()[1].numpy()
    for part, expected in zip(digits._shares(10, "shards(3)"), label_shards(labels, 10, 3, seed=1), strict=True):
        np.testing.assert_array_equal(part, expected)


def test_steps_are_counted():
    assert delta("digits", steps=5)[1].num_steps == 5
    assert delta("digits", share=0, epochs=1, batch=10)[1].num_steps == 17  # of 161 to 163 examples


@pytest.mark.parametrize("name", TORCH)
def test_building_twice_is_the_same_model(name):
    task = Task.load(name)
    assert read(task.build()).sha256 == read(task.build()).sha256


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("digits", {"shards": 3}, "no task setting shards"),
        ("digits", {"lr": -1}, "task setting lr=-1"),
        ("digits", {"shares": 600}, "600 shares of 3 shards need more than the 1,618 examples"),
        ("digits", {"partition": "groups"}, "no writers or speakers"),
        ("mushrooms", {"momentum": 0.5}, "no task setting momentum"),
        ("shakespeare", {"weight": "class"}, "no task setting weight"),
    ],
)
def test_wrong_settings_pass_as_settings_errors(name, settings, message):
    task = Task.load(name)
    with pytest.raises(SettingsError, match=message):
        task.train(task.build(), context(**settings))


@pytest.mark.parametrize("name", sorted(BUILT_IN.keys() - {"digits"}))
def test_a_task_without_its_files_says_which(name, monkeypatch, tmp_path):
    for function in (mnist.read_part, mnist.shares_of, mushrooms.mushrooms, shakespeare.speakers):
        function.cache_clear()
    for function in (mushrooms._clients, shakespeare._windows_of, shakespeare._held_out):
        function.cache_clear()
    task = Task.load(name)
    monkeypatch.delenv("FEDMQ_DATA", raising=False)
    with pytest.raises(SettingsError, match=r"\$FEDMQ_DATA/\w+/.*: set FEDMQ_DATA to the folder that holds \w+"):
        task.train(task.build(), context())
    monkeypatch.setenv("FEDMQ_DATA", str(tmp_path))
    with pytest.raises(SettingsError, match=r"cannot read .*: No such file"):
        task.evaluate(task.build(), context())


@pytest.fixture
def data(monkeypatch, tmp_path):
    """A folder of data of the test's own."""
    caches = (
        mnist.read_part, mnist.shares_of, mushrooms.mushrooms, mushrooms._clients, shakespeare.speakers,
        shakespeare._windows_of, shakespeare._held_out,
    )  # fmt: skip
    for function in caches:
        function.cache_clear()
    monkeypatch.setenv("FEDMQ_DATA", str(tmp_path))

    def put(name, content):
        path = Path(tmp_path) / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)

    yield put
    for function in caches:
        function.cache_clear()


@pytest.mark.parametrize(
    ("name", "file", "content", "message"),
    [
        ("mnist", "mnist/train-images-idx3-ubyte.gz", b"no gzip", "is no gzip file"),
        ("mnist", "mnist/train-images-idx3-ubyte.gz", gzip.compress(b"x" * 99)[:-9], "is no gzip file"),
        ("mushrooms", "mushrooms/mushroom.libsvm", b"2 1:1\n1 113:1\n", "line 2: index 112 is out of bounds"),
        ("mushrooms", "mushrooms/mushroom.libsvm", b"2 1:1\n1 2:1\n", "has 2 lines, the optimum is known for 8,124"),
        ("shakespeare", "shakespeare/input.txt", b"A:\nna#ve\n", "characters the model does not know: .'#'"),
    ],
)
def test_a_broken_file_is_told(data, name, file, content, message):
    data(file, content)
    task = Task.load(name)
    with pytest.raises(SettingsError, match=message):
        task.train(task.build(), context())


def image_file(images, labels):
    def idx(array):
        header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">i4").tobytes()
        return gzip.compress(header + array.astype(np.uint8).tobytes())

    return idx(images), idx(labels)


def test_mnist_deals_its_first_images(data):
    images, labels = image_file(np.arange(50 * 784).reshape(50, 28, 28) % 251, np.arange(50) % 10)
    data("mnist/train-images-idx3-ubyte.gz", images)
    data("mnist/train-labels-idx1-ubyte.gz", labels)
    assert delta("mnist", shares=4, samples=5, partition="iid")[1].num_samples == 5
    assert sorted(np.concatenate(mnist.shares_of(4, "iid", 5))) == list(range(20))
    assert delta("mnist", shares=4, partition="iid", share=0)[1].num_samples == 13  # there are no 1,000 each
    read_images, read_labels = mnist.read_part("train")
    assert read_images.shape == (50, 1, 28, 28)
    assert float(read_images[0, 0, 0, 7]) == pytest.approx((7 / 255 - 0.1307) / 0.3081, rel=1e-5)
    assert read_labels.tolist() == [i % 10 for i in range(50)]


@needs_data
@pytest.mark.parametrize("name", ["mnist", "mnist_wide", "mnist_mlp"])
def test_mnist_learns_with_every_model(name):
    task = Task.load(name)
    model = task.build()
    task.train(model, context(shares=1, share=0, partition="iid", steps=150, lr=0.1))
    metrics = task.evaluate(model, context())
    assert metrics["accuracy"] > 0.8
    assert sum(name.startswith("accuracy_class_") for name in metrics) == 10


def by_hand(signed, w, steps, lr):
    """The gradient steps of QAFeL's script, example by example."""
    for _ in range(steps):
        gradient = w / 8124
        for row in signed:
            gradient = gradient - row / (1 + np.exp(row @ w)) / len(signed)
        w = w - lr * gradient
    return w


@needs_data
def test_mushrooms_take_the_steps_of_the_bench():
    from ops.bench import qafel

    inputs, labels = qafel.mushrooms()
    task = Task.load("mushrooms")
    model = {"w": np.random.default_rng(0).standard_normal(112).astype(np.float32)}
    for share in (0, 57, 99):
        part = np.array_split(np.arange(8124), 100)[share]
        signed = inputs[part] * labels[part, None]
        start = model["w"].copy()
        result = task.train(model, context(share=share))
        np.testing.assert_allclose(model["w"] - start, qafel.local_delta(signed, start), atol=2e-6)
        np.testing.assert_allclose(model["w"], by_hand(signed, start.astype(np.float64), 10, 2.0), atol=2e-6)
        assert (result.num_samples, result.num_steps) == (len(part), 10)
        assert model["w"].dtype == np.float32
    metrics = task.evaluate(model, context())
    assert metrics["loss"] == pytest.approx(qafel.loss(model["w"], inputs, labels), rel=1e-12)
    assert metrics["excess"] == pytest.approx(metrics["loss"] - qafel.OPTIMUM)
    right = np.sign(inputs @ model["w"].astype(np.float64)) == labels
    assert metrics["accuracy"] == pytest.approx(right.mean())


@needs_data
def test_mushrooms_settings():
    assert delta("mushrooms", shares=50, share=0)[1].num_samples == 163
    one, two = (delta("mushrooms", share=3, steps=1, lr=lr)[0] for lr in (1, 2))
    np.testing.assert_allclose(two, 2 * one, rtol=1e-4, atol=1e-7)
    mixed = delta("mushrooms", share=3, partition="dirichlet(0.1)")
    assert np.abs(mixed[0] - delta("mushrooms", share=3)[0]).max() > 0.01
    assert Task.load("mushrooms").evaluate({"w": np.zeros(112)}, context())["loss"] == pytest.approx(np.log(2))


def test_margins_beyond_the_floats_stay_finite():
    with np.errstate(all="raise", under="ignore"):
        w, loss = mushrooms.descend(np.full(1, 1e4), np.array([[1.0], [-1.0]]), 2, 1.0)
    assert np.isfinite(w).all()
    assert loss == pytest.approx(5e3, rel=1e-3)


PLAY = b"Ann:\nabcdefghij\n\nBob:\nxyz\nxyz\n\nAnn:\nABC\n"


def test_speeches_are_gathered_by_speaker_the_longest_first(data):
    data("shakespeare/input.txt", PLAY)
    texts = {
        name: "".join(shakespeare.CHARACTERS[place] for place in text) for name, text in shakespeare.speakers().items()
    }
    assert list(texts.items()) == [("Ann", "abcdefghij\nABC\n"), ("Bob", "xyz\nxyz\n")]


def test_windows_predict_every_character_once():
    text = np.arange(23)
    windows = shakespeare.cut(text, 5)
    assert windows.tolist() == [list(range(first, first + 6)) for first in (0, 5, 10, 15)]
    assert windows[:, 1:].ravel().tolist() == list(range(1, 21))
    assert shakespeare.cut(np.arange(6), 5).shape == (1, 6)
    assert shakespeare.cut(np.arange(5), 5).shape == (0, 6)
    assert shakespeare.cut(np.arange(0), 5).shape == (0, 6)


def test_the_end_of_a_text_is_held_out():
    train, held_out = shakespeare.split(np.arange(95))
    assert (len(train), len(held_out)) == (85, 10)
    assert np.concatenate([train, held_out]).tolist() == list(range(95))


@needs_data
def test_clients_are_the_speakers_who_say_most():
    names = list(shakespeare.speakers())
    assert len(names) == 309
    assert names[0] == "GLOUCESTER"
    windows = shakespeare._windows_of(100, "groups", 80, 0, 500)
    for share in (0, 42, 99):
        text = shakespeare.split(shakespeare.speakers()[names[share]])[0]
        np.testing.assert_array_equal(windows[share], shakespeare.cut(text, 80))
    shared = shakespeare._windows_of(10, "groups", 80, 100, 500)
    assert sum(map(len, shared)) == sum(map(len, windows))
    assert max(map(len, shared)) - min(map(len, shared)) < 25
    mixed = shakespeare._windows_of(10, "iid", 80, 100, 500)
    assert max(map(len, mixed)) - min(map(len, mixed)) <= 1


@needs_data
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"shares": 200}, r"200 shares of 18\d groups"),
        ({"shares": 20, "speakers": 10}, "20 shares of 10 groups"),
        ({"characters": 50_000}, "no speaker has 50,000 characters"),
        ({"seq": 900, "shares": 150}, "150 shares of"),
        ({"partition": "dirichlet"}, "text has no classes, must be one of groups, iid, quantity"),
    ],
)
def test_shakespeare_says_what_cannot_be_dealt(settings, message):
    task = Task.load("shakespeare")
    with pytest.raises(SettingsError, match=message):
        task.train(task.build(), context(**settings))


@needs_data
def test_shakespeare_learns_and_its_evaluation_is_quick():
    task = Task.load("shakespeare")
    model = task.build()
    before = task.evaluate(model, context())
    result = task.train(model, context(share=0, shares=100, steps=60))
    assert (result.num_samples, result.num_steps) == (423, 60)
    started = time.perf_counter()
    after = task.evaluate(model, context())
    assert time.perf_counter() - started < 2  # some 0.05 s, alone
    assert before["accuracy"] < 0.1
    assert before["loss"] == pytest.approx(np.log(65), rel=0.02)
    assert after["accuracy"] > 0.2
    assert after["loss"] < 3.2


def test_noise_is_as_large_as_asked_for_and_different_by_seed(monkeypatch):
    file = Path(noise.__file__)
    monkeypatch.setenv("FEDMQ_NOISE_PARAMS", "5000")
    one, again, other = (delta(str(file), seed) for seed in (1, 1, 2))
    assert len(one[0]) == 5000
    assert one[0].std() == pytest.approx(0.01, rel=0.1)
    np.testing.assert_array_equal(one[0], again[0])
    assert not np.array_equal(one[0], other[0])
    assert len(delta(str(file), 2**63)[0]) == 5000
    task = Task.load(str(file))
    model = task.build()
    write(model, read({"w": np.full((1, 5000), 2, np.float32)}))
    assert task.evaluate(model, context()) == {"accuracy": 0.0, "loss": 4.0}
    monkeypatch.delenv("FEDMQ_NOISE_PARAMS")
    assert task.build()["w"].size == 100_000


@pytest.mark.parametrize("text", ["0", "-1", "many", "1e5", ""])
def test_noise_of_no_size_is_refused(monkeypatch, text):
    monkeypatch.setenv("FEDMQ_NOISE_PARAMS", text)
    with pytest.raises(SettingsError, match="must be a whole number"):
        Task.load(noise.__file__).build()


def test_no_worked_task_hides_a_bug_as_a_settings_error():
    task = Task.load("mushrooms")
    with pytest.raises((TaskError, SettingsError)) as caught:
        task.train({"v": np.zeros(3)}, context())
    assert not os.environ.get("FEDMQ_DATA") or isinstance(caught.value, TaskError)
