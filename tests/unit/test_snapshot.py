import numpy as np
import pytest

from shared.model_image import ModelImage
from shared.snapshot import BFLOAT16, FLOAT32, read_snapshot, snapshot_bytes, write_snapshot
from shared.vector import BLOCK_ELEMENTS, round_to_bfloat16


def nearest(value: float) -> float:
    """Return the nearest bfloat16 by comparing both neighbours in float64; ties go to the even mantissa."""
    low = np.array([value], np.float32).view(np.uint32) & np.uint32(0xFFFF0000)
    high = low + np.uint32(0x10000)
    below, above = (float(bits.view(np.float32)[0]) for bits in (low, high))
    if abs(value - below) != abs(above - value):
        return below if abs(value - below) < abs(above - value) else above
    return below if (int(low[0]) >> 16) % 2 == 0 else above


def test_every_weight_goes_to_the_nearest_bfloat16_and_ties_to_even():
    ties = [1 + 2**-8, 1 + 3 * 2**-8, -(1 + 2**-8), -(1 + 3 * 2**-8), 2**-130 + 2**-137]
    values = np.concatenate([np.random.default_rng(0).standard_normal(2000, np.float32) * 1e-3, ties]).astype("f4")
    values = np.concatenate([values, np.float32([0.0, -0.0, 1.0, 3e38, 1e-40, -1e-45])])
    rounded = values.copy()
    round_to_bfloat16(rounded)
    assert rounded.tolist() == [nearest(float(value)) for value in values]
    assert not np.any(rounded.view(np.uint32) & 0xFFFF)
    again = rounded.copy()
    round_to_bfloat16(again)
    assert again.tobytes() == rounded.tobytes()


def test_torch_rounds_the_same_way():
    torch = pytest.importorskip("torch")
    values = np.random.default_rng(1).standard_normal(3 * BLOCK_ELEMENTS + 7, np.float32)
    expected = torch.from_numpy(values.copy()).to(torch.bfloat16).to(torch.float32).numpy()
    round_to_bfloat16(values)
    assert values.tobytes() == expected.tobytes()


def test_what_is_not_finite_stays_so():
    values = np.array([np.nan, np.inf, -np.inf, 3.4028235e38], np.float32)
    values[0:1].view(np.uint32)[:] = 0x7FFFFFFF  # the NaN whose bits would overflow
    round_to_bfloat16(values)
    assert np.isnan(values[0])
    assert values[1:].tolist() == [np.inf, -np.inf, np.inf]


@pytest.fixture(params=["odd", "kept"])
def image(request):
    rng = np.random.default_rng(0)
    tensors = {"w": rng.standard_normal((3, 5), np.float32)}
    if request.param == "kept":
        tensors |= {"long": np.arange(3), "mask": np.array([True, False]), "i": np.arange(5, dtype=np.int32)}
    made = ModelImage.of(tensors)
    round_to_bfloat16(made.weights)
    return made


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16])
@pytest.mark.parametrize("piece_bytes", [7, 2**26])
def test_a_snapshot_comes_back_as_it_was(monkeypatch, image, dtype, piece_bytes):
    monkeypatch.setattr("shared.model_image.CHUNK_BYTES", piece_bytes)
    pieces = [bytes(piece) for piece in write_snapshot(image, dtype)]
    assert sum(map(len, pieces)) == snapshot_bytes(image.layout, dtype)
    assert max(map(len, pieces)) <= piece_bytes
    assert read_snapshot(image.layout, dtype, pieces).data.tobytes() == image.data.tobytes()


def test_a_bfloat16_snapshot_is_half_as_large():
    image = ModelImage.of({"w": np.zeros(10_000, np.float32)})
    saved = snapshot_bytes(image.layout, FLOAT32) - snapshot_bytes(image.layout, BFLOAT16)
    assert saved == pytest.approx(20_000, abs=8)


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16])
@pytest.mark.parametrize("spoil", [lambda b: b[:-1], lambda b: b + b"\0", lambda b: b"", lambda b: b"\xff" * len(b)])
def test_other_bytes_are_refused(image, dtype, spoil):
    file = b"".join(write_snapshot(image, dtype))
    with pytest.raises(ValueError, match="bytes"):
        read_snapshot(image.layout, dtype, [spoil(file)])
