"""ModelImage: one buffer that is the flat weights and a plain safetensors file at once."""

import hashlib

import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch

import shared.model_image
from shared.errors import SettingsError
from shared.layout import Layout
from shared.model_image import ModelImage, chunk_count


def tensors():
    return {
        "mask": np.array([True, False, True]),
        "w": np.arange(15, dtype=np.float32).reshape(3, 5) / 7,
        "num_batches_tracked": np.array(2**40 + 3, np.int64),
        "scalar": np.array(0.25, np.float32),
        "half": np.array([1.5, -2.0, 0.1], np.float16),
        "short": np.array([[-3, 4]], np.int16),
        "index": np.array([7], np.uint64),
    }


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(shared.model_image, "CHUNK_BYTES", 100)


def test_safetensors_reads_our_bytes_as_the_same_tensors():
    read = safetensors.numpy.load(ModelImage.of(tensors()).data.tobytes())
    assert read.keys() == tensors().keys()
    for name, array in tensors().items():
        expected = array.astype(np.float32) if array.dtype.kind == "f" else array
        assert (read[name].dtype, read[name].shape) == (expected.dtype, expected.shape)
        np.testing.assert_array_equal(read[name], expected)


def test_torch_reads_our_file_and_loads_it_into_a_batchnorm_model(tmp_path):
    torch.manual_seed(1)
    model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3), torch.nn.Linear(3, 2))
    model(torch.randn(8, 2))
    state = model.state_dict()
    assert sum(t.numel() for t in state.values() if t.is_floating_point()) % 2 == 1  # odd: 8-byte alignment at stake
    image = ModelImage.of({name: tensor.numpy() for name, tensor in state.items()})
    image.save(tmp_path / "deep" / "model.safetensors")
    read = safetensors.torch.load_file(tmp_path / "deep" / "model.safetensors")
    assert read["1.num_batches_tracked"].dtype == torch.int64
    assert all(torch.equal(read[name], tensor) for name, tensor in state.items())
    model.load_state_dict(read, strict=True)


def test_changing_the_weights_changes_the_file_and_its_hash():
    image = ModelImage.of(tensors())
    before = image.sha256
    image.weights += 1
    assert image.sha256 != before
    assert image.sha256 == hashlib.sha256(image.data.tobytes()).hexdigest()
    read = safetensors.numpy.load(image.data.tobytes())
    np.testing.assert_allclose(read["w"], tensors()["w"] + 1)
    assert read["num_batches_tracked"] == 2**40 + 3


def test_a_copy_shares_nothing():
    image = ModelImage.of(tensors())
    twin = image.copy()
    twin.weights[:] = 0
    twin.tensors()["num_batches_tracked"][...] = 0
    assert image.weights.any()
    assert image.tensors()["num_batches_tracked"] == 2**40 + 3
    assert image.copy().sha256 == image.sha256


def test_every_version_of_a_layout_has_the_same_header():
    one, two = ModelImage.of(tensors()), ModelImage(Layout.of((n, a.shape, str(a.dtype)) for n, a in tensors().items()))
    assert one.data[: one._header_bytes].tobytes() == two.data[: two._header_bytes].tobytes()
    assert not two.weights.any()


def test_the_header_names_the_layout():
    image = ModelImage.of(tensors())
    size = int.from_bytes(image.data[:8].tobytes(), "little")
    header = image.data[8 : 8 + size].tobytes()
    assert image.layout.hash.encode() in header
    assert size % 8 == 0


def test_from_file_reads_any_safetensors_file(tmp_path):
    path = tmp_path / "foreign.safetensors"
    safetensors.numpy.save_file(tensors(), path, metadata={"made_by": "somebody else"})
    named = ModelImage.from_file(path).tensors()
    for name, array in tensors().items():
        np.testing.assert_array_equal(named[name], array)


def test_from_file_reads_what_save_wrote(tmp_path):
    image = ModelImage.of({"w": np.ones(3, np.float32), "n": np.array(4)})
    image.save(tmp_path / "m")
    again = ModelImage.from_file(tmp_path / "m")
    assert again.sha256 == image.sha256


@pytest.mark.parametrize("content", [b"", b"hello", b"\xff" * 100, b"\x08" + b"\0" * 7 + b"{}      ", None])
def test_from_file_says_what_is_wrong_with_a_file(tmp_path, content):
    path = tmp_path / "broken.safetensors"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(SettingsError):
        ModelImage.from_file(path)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_from_file_refuses_weights_that_are_not_finite(tmp_path, value):
    safetensors.numpy.save_file({"w": np.array([1, value], np.float32)}, tmp_path / "m")
    with pytest.raises(SettingsError, match="not finite"):
        ModelImage.from_file(tmp_path / "m")


@pytest.mark.usefixtures("small_chunks")
def test_chunks_round_trip_and_are_counted():
    image = ModelImage.of(tensors())
    pieces = [bytes(chunk) for chunk in image.chunks()]
    assert len(pieces) == chunk_count(image.layout) > 2
    assert {len(piece) for piece in pieces[:-1]} == {100}
    assert b"".join(pieces) == image.data.tobytes()
    again = ModelImage.from_chunks(image.layout, pieces)
    assert again.sha256 == image.sha256
    np.testing.assert_array_equal(again.weights, image.weights)


def test_chunks_are_views_of_the_image():
    image = ModelImage.of(tensors())
    assert np.shares_memory(np.frombuffer(next(image.chunks()), np.uint8), image.data)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize(
    "damage",
    [
        lambda p: p[:-1],
        lambda p: [*p[:-1], p[-1][:-1]],
        lambda p: [*p, b"x"],
        lambda p: [*p, *p],
        lambda p: [],
        lambda p: [p[1], p[0], *p[2:]],
        lambda p: [b"\0" + p[0][1:], *p[1:]],
    ],
    ids=["last missing", "short", "long", "twice", "none", "swapped", "header bit"],
)
def test_damaged_chunks_raise_value_error(damage):
    image = ModelImage.of(tensors())
    with pytest.raises(ValueError, match="layout"):
        ModelImage.from_chunks(image.layout, damage([bytes(chunk) for chunk in image.chunks()]))


def test_chunks_of_another_layout_raise_value_error():
    image = ModelImage.of({"w": np.ones(4, np.float32)})
    other = ModelImage.of({"v": np.ones(4, np.float32)})
    with pytest.raises(ValueError, match="not a model of this layout"):
        ModelImage.from_chunks(other.layout, [image.data.tobytes()])


def test_bfloat16_is_declared_in_the_layout_and_stored_as_float32():
    array = np.array([1.0, 2.5], np.float32)
    image = ModelImage.of({"w": array}, {"w": "bfloat16"})
    assert image.layout.tensors[0].dtype == "bfloat16"
    assert image.layout.hash != ModelImage.of({"w": array}).layout.hash
    np.testing.assert_array_equal(safetensors.numpy.load(image.data.tobytes())["w"], array)


def test_wide_integers_keep_every_bit():
    big = np.array([2**63 - 1, -(2**63)], np.int64)
    image = ModelImage.of({"w": np.ones(1, np.float32), "n": big})
    np.testing.assert_array_equal(image.tensors()["n"], big)
