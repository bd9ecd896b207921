"""Whatever bytes and parameters arrive, a codec gives a finite delta or `RejectedUpdate`, and spends no memory."""

import tracemalloc

import numpy as np
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from shared.compression import decode, parse
from shared.compression.registry import ALL_NAMES
from shared.errors import Reason, RejectedUpdate

SIZES = st.sampled_from([1, 2, 255, 256, 257, 600])
NAMES = st.sampled_from(ALL_NAMES)
SCALARS = st.one_of(
    st.floats(), st.floats(0, 1), st.integers(-(2**63), 2**64 - 1), st.text(max_size=5), st.booleans(), st.none(),
    st.binary(max_size=5),
)  # fmt: skip
PARAMS = st.dictionaries(st.sampled_from(["scale", "seed", "bits", ""]), SCALARS, max_size=3)


def settle(name, payload, params, size):
    """Decode; what is accepted must be finite when added, what is not must be a RejectedUpdate."""
    try:
        decoded = decode({**params, "name": name}, payload, size)
    except RejectedUpdate as error:
        assert error.reason in (Reason.CODEC, Reason.NOT_FINITE, Reason.TOO_LARGE)
        assert len(error.detail) < 2000
        return
    total = np.zeros(size, np.float32)
    decoded.add_into(total, 1.0)
    assert np.isfinite(total).all()


@given(NAMES, st.binary(max_size=700), PARAMS, SIZES)
def test_garbage_is_refused_or_harmless(name, payload, params, size):
    settle(name, payload, params, size)


@given(NAMES, st.randoms(use_true_random=False), PARAMS, SIZES)
def test_garbage_of_the_right_size_is_refused_or_harmless(name, random, params, size):
    inner = parse(name.split("|", maxsplit=1)[0])
    payload = random.randbytes(inner.payload_bytes(size))
    settle(name, zstandard.compress(payload) if "zstd" in name else payload, params, size)


@given(NAMES, st.data(), SIZES)
def test_a_flipped_bit_is_refused_or_harmless(name, data, size):
    delta = np.random.default_rng(size).standard_normal(size, np.float32)
    encoded = parse(name).encode(delta, np.random.default_rng(0))
    payload = bytearray(encoded.payload)
    payload[data.draw(st.integers(0, len(payload) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    settle(name, bytes(payload), dict(encoded.params), size)


@given(NAMES, st.data(), SIZES)
def test_a_truncated_payload_is_refused(name, data, size):
    encoded = parse(name).encode(np.ones(size, np.float32), np.random.default_rng(0))
    cut = data.draw(st.integers(0, len(encoded.payload) - 1))
    with pytest.raises(RejectedUpdate):
        decode({"name": name, **encoded.params}, encoded.payload[:cut], size)


@given(st.one_of(st.none(), st.integers(), st.text(), st.binary(), st.lists(st.text(max_size=3), max_size=3)))
def test_any_codec_name_is_refused_or_known(name):
    try:
        decode({"name": name}, b"", 1)
    except RejectedUpdate:
        return
    raise AssertionError("an empty payload was accepted")


def frame(plain, known_size=True, level=1):
    """Compress with or without the size in the frame's header."""
    if known_size:
        return zstandard.ZstdCompressor(level=level).compress(plain)
    compressor = zstandard.ZstdCompressor(level=level).compressobj()
    return compressor.compress(plain) + compressor.flush()


def lying_header(announced):
    """Write a frame header that announces any size, and one empty last block."""
    return b"\x28\xb5\x2f\xfd\xe0" + announced.to_bytes(8, "little") + b"\x01\x00\x00"


@pytest.mark.parametrize("name", [n for n in ALL_NAMES if "zstd" in n])
@pytest.mark.parametrize(
    "bomb",
    [
        frame(bytes(2**26)), frame(bytes(2**26), known_size=False), lying_header(2**40), lying_header(2**64 - 3),
        lying_header(0), frame(b""), frame(b"", known_size=False),
    ],
    ids=["64 MiB", "64 MiB unannounced", "1 TiB", "-3", "0", "empty", "empty unannounced"],
)  # fmt: skip
def test_a_zstd_bomb_is_refused_and_costs_nothing(name, bomb):
    tracemalloc.start()
    try:
        with pytest.raises(RejectedUpdate) as caught:
            decode({"name": name, "scale": 1.0}, bomb, 1000)
        assert caught.value.reason in (Reason.TOO_LARGE, Reason.CODEC)
        assert tracemalloc.get_traced_memory()[1] < 10**6
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("name", [n for n in ALL_NAMES if "zstd" in n])
def test_a_frame_without_its_size_is_as_good(name):
    delta = np.linspace(-1, 1, 300, dtype=np.float32)
    inner = parse(name.split("|", maxsplit=1)[0]).encode(delta, np.random.default_rng(0))
    total = np.zeros(300, np.float32)
    decode({"name": name, **inner.params}, frame(inner.payload, known_size=False), 300).add_into(total, 1.0)
    assert np.abs(total - delta).max() < 0.2


@pytest.mark.parametrize("name", [n for n in ALL_NAMES if "zstd" in n])
def test_nothing_may_follow_the_frame(name):
    encoded = parse(name).encode(np.ones(300, np.float32), np.random.default_rng(0))
    skippable = b"\x50\x2a\x4d\x18\x04\x00\x00\x00abcd"
    for payload in (encoded.payload + b"\0", encoded.payload + skippable, encoded.payload + encoded.payload):
        with pytest.raises(RejectedUpdate):
            decode({"name": name, **encoded.params}, payload, 300)


@pytest.mark.parametrize("name", ALL_NAMES)
def test_adding_needs_no_memory_of_model_size(name):
    size = 2**21  # 8 MiB as float32
    encoded = parse(name).encode(np.zeros(size, np.float32), np.random.default_rng(0))
    decoded = parse(name).decode(encoded.payload, encoded.params, size)
    total = np.zeros(size, np.float32)
    tracemalloc.start()
    try:
        decoded.add_into(total, 0.5)
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()
