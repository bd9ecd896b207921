"""Every registered codec, at every awkward size: error bounds, sizes on the wire, seeds, addition."""

import re

import numpy as np
import pytest

from shared.compression import block_int, codec_of, decode, parse
from shared.compression.registry import ALL_NAMES, QUANTIZERS
from shared.errors import Reason, RejectedUpdate, SettingsError
from shared.vector import BLOCK_ELEMENTS

SLAB = block_int._SLAB * block_int.BLOCK  # elements the integer codecs handle at once
SIZES = (1, 2, 127, 128, 129, 255, 256, 257, 511, 65535, 65536, 65537, SLAB - 1, SLAB, SLAB + 1, 2 * SLAB + 300)
FIXED = tuple(QUANTIZERS)
STOCHASTIC = tuple(n for n in ALL_NAMES if n.startswith("int") and "nearest" not in n)
INTS = tuple(n for n in ALL_NAMES if n.startswith("int"))


def bumpy(size, seed=0):
    """Return a delta whose blocks of 256 differ wildly in size, in no order, the tail too."""
    rng = np.random.default_rng(seed)
    magnitudes = 10.0 ** rng.uniform(-4, 2, -(-size // 256))
    return (rng.standard_normal(size) * np.repeat(magnitudes, 256)[:size]).astype(np.float32)


def encode(name, delta, seed=0):
    return parse(name).encode(delta, np.random.default_rng(seed))


def through(name, delta, seed=0):
    """Encode, decode, and return the delta the aggregator would add, in float64."""
    encoded = encode(name, delta, seed)
    total = np.zeros(delta.size, np.float32)
    decode({"name": parse(name).name, **encoded.params}, encoded.payload, delta.size).add_into(total, 1.0)
    return total.astype(np.float64)


def error_bound(name, delta):
    """Return the largest error a codec may make per element, from its description alone."""
    exact = np.abs(delta.astype(np.float64))
    if name.startswith("float32"):
        return np.zeros(delta.size)
    if name.startswith("float16"):
        return np.maximum(exact * 2.0**-11, 2.0**-25)
    levels = 127 if name.startswith("int8") else 7
    blocks = [exact[start : start + 256].max() for start in range(0, delta.size, 256)]
    largest = np.repeat(blocks, 256)[: delta.size]
    step = (largest * (1 + 2.0**-10) + exact.max() * 2.0**-24) / levels  # float16 scales, rounded up
    return step * (0.5 if "nearest" in name else 1.0) * (1 + 1e-5)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", ALL_NAMES)
def test_round_trip_error_is_bounded(name, size):
    delta = bumpy(size)
    error = np.abs(through(name, delta) - delta)
    assert (error <= error_bound(name, delta)).all()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", ALL_NAMES)
def test_payload_bytes_is_exact_or_an_upper_bound(name, size):
    noise = np.frombuffer(np.random.default_rng(3).bytes(4 * size), np.float32)
    noise = np.nan_to_num(np.clip(noise, -1e10, 1e10))  # as incompressible as a delta gets
    announced = parse(name).payload_bytes(size)
    for delta in (bumpy(size), noise, np.zeros(size, np.float32)):
        payload = encode(name, delta).payload
        assert len(payload) <= announced
        assert len(payload) == announced or name not in FIXED


@pytest.mark.parametrize(
    ("name", "size", "expected"),
    [
        ("float32", 257, 1028), ("float16", 257, 514), ("int8", 256, 258), ("int8", 257, 261),
        ("int4", 256, 130), ("int4", 257, 260), ("int4", 1, 130), ("int8", 1, 3),
    ],
)  # fmt: skip
def test_payload_sizes_of_the_contract(name, size, expected):
    assert len(encode(name, bumpy(size)).payload) == expected


def test_float32_is_the_plain_little_endian_vector():
    delta = bumpy(300)
    encoded = encode("float32", delta)
    assert encoded.payload == delta.astype("<f4").tobytes()
    assert not encoded.params


@pytest.mark.parametrize("name", ALL_NAMES)
def test_the_same_seed_gives_the_same_bytes(name):
    delta = bumpy(1000)
    before = delta.copy()
    one, two = encode(name, delta, seed=5), encode(name, delta, seed=5)
    assert (one.payload, dict(one.params)) == (two.payload, dict(two.params))
    np.testing.assert_array_equal(delta, before)  # the input is not touched


@pytest.mark.parametrize("name", STOCHASTIC)
def test_another_seed_rounds_otherwise(name):
    assert encode(name, bumpy(1000), seed=5).payload != encode(name, bumpy(1000), seed=6).payload


@pytest.mark.parametrize("name", sorted(set(ALL_NAMES) - set(STOCHASTIC)))
def test_a_deterministic_codec_ignores_the_seed(name):
    assert encode(name, bumpy(1000), seed=5).payload == encode(name, bumpy(1000), seed=6).payload


@pytest.mark.parametrize("name", STOCHASTIC)
def test_stochastic_rounding_is_unbiased(name):
    delta = bumpy(2 * 256 + 40, seed=9)
    rng, trials = np.random.default_rng(1), 1500
    total = np.zeros(delta.size, np.float64)
    codec = parse(name)
    for _ in range(trials):
        encoded = codec.encode(delta, rng)
        one = np.zeros(delta.size, np.float32)
        codec.decode(encoded.payload, encoded.params, delta.size).add_into(one, 1.0)
        total += one
    sigma = 0.5 * error_bound(name, delta) / np.sqrt(trials)  # rounding to one of two neighbours: at most step / 2
    assert (np.abs(total / trials - delta) < 5.5 * sigma + 1e-6 * np.abs(delta)).all()


@pytest.mark.parametrize("size", [1, 257, BLOCK_ELEMENTS - 1, BLOCK_ELEMENTS + 300, 2 * SLAB + 300])
@pytest.mark.parametrize("name", ALL_NAMES)
def test_add_into_adds_weight_times_delta(name, size):
    delta, start = bumpy(size), bumpy(size, seed=4)
    encoded = encode(name, delta)
    decoded = parse(name).decode(encoded.payload, encoded.params, size)
    total = start.copy()
    decoded.add_into(total, 0.375)
    decoded.add_into(total, -3.0)
    expected = start.astype(np.float64) + (0.375 - 3.0) * through(name, delta)
    scale = np.abs(start).astype(np.float64) + 4 * np.abs(through(name, delta))
    assert (np.abs(total - expected) <= 1e-6 * scale + 1e-12).all()
    assert not np.array_equal(total, start)


@pytest.mark.parametrize("name", ALL_NAMES)
def test_add_into_takes_a_read_only_payload_and_a_memoryview(name):
    delta = bumpy(300)
    encoded = encode(name, delta)
    total = np.zeros(300, np.float32)
    parse(name).decode(memoryview(encoded.payload), encoded.params, 300).add_into(total, 1.0)
    np.testing.assert_array_equal(total, through(name, delta))


@pytest.mark.parametrize("size", [1, 257])
@pytest.mark.parametrize("name", ALL_NAMES)
def test_zeros_stay_zeros_without_a_warning(name, size):
    with np.errstate(divide="raise", invalid="raise", over="raise"):
        assert not through(name, np.zeros(size, np.float32)).any()


@pytest.mark.parametrize("name", ALL_NAMES)
def test_a_block_of_zeros_beside_others_stays_zero(name):
    delta = bumpy(700)
    delta[256:512] = 0
    with np.errstate(divide="raise", invalid="raise", over="raise"):
        assert not through(name, delta)[256:512].any()


@pytest.mark.parametrize("name", ALL_NAMES)
def test_a_block_far_below_the_largest_is_not_forgotten(name):
    delta = np.full(512, 1e-9, np.float32)
    delta[0] = 100.0  # a ratio that float16 cannot hold
    error = np.abs(through(name, delta) - delta)
    assert (error <= error_bound(name, delta)).all()


@pytest.mark.parametrize("name", ALL_NAMES)
def test_denormals_never_do_worse_than_zeros(name):
    units = np.random.default_rng(2).integers(-400, 400, 300)
    delta = (units * np.finfo(np.float32).smallest_subnormal).astype(np.float32)
    assert np.abs(delta).max() > 0
    error = np.abs(through(name, delta) - delta)
    assert (error <= np.abs(delta).max()).all()


@pytest.mark.parametrize("name", [n for n in ALL_NAMES if not n.startswith("float16")])
def test_huge_values_pass_within_the_bound(name):
    delta = bumpy(600)
    delta *= np.float32(1e16) / np.abs(delta).max()
    error = np.abs(through(name, delta) - delta)
    assert (error <= error_bound(name, delta)).all()


@pytest.mark.parametrize("name", ["float16", "float16 | zstd"])
def test_float16_clips_what_it_cannot_hold(name):
    delta = np.array([1e6, -1e30, 65504, 65520], np.float32)
    assert through(name, delta).tolist() == [65504, -65504, 65504, 65504]


@pytest.mark.parametrize("name", ALL_NAMES)
def test_an_absurd_delta_is_refused_at_the_other_end(name):
    delta = np.full(300, 3e38, np.float32)
    if name.startswith("float16"):
        return  # it has clipped already
    encoded = encode(name, delta)
    with pytest.raises(RejectedUpdate) as caught:
        parse(name).decode(encoded.payload, encoded.params, 300)
    assert caught.value.reason == Reason.NOT_FINITE


@pytest.mark.parametrize("name", INTS)
def test_the_largest_element_of_every_block_is_not_clipped(name):
    """A block scale that is rounded down, or shared between neighbours, clips exactly these."""
    delta = bumpy(10 * 256 + 7, seed=11)
    back = through(name, delta)
    for start in range(0, delta.size, 256):
        block = slice(start, start + 256)
        largest = start + int(np.abs(delta[block]).argmax())
        assert abs(back[largest] - delta[largest]) <= error_bound(name, delta)[largest]
        assert abs(back[largest]) >= abs(delta[largest]) * (1 - 1 / 6)


def test_int4_puts_element_j_and_j_plus_128_into_one_byte():
    delta = np.zeros(256, np.float32)
    delta[3], delta[131] = 7.0, -7.0
    payload = encode("int4(nearest)", delta).payload
    packed = np.frombuffer(payload, np.uint8, offset=2)
    assert packed[3] == 15 | (1 << 4)
    assert (np.delete(packed, 3) == 0x88).all()


# --- what the decoder refuses -------------------------------------------------------------------------------


def refused(name, payload, params, size):
    with pytest.raises(RejectedUpdate) as caught:
        decode({"name": name, **params}, payload, size)
    return caught.value.reason


@pytest.mark.parametrize("name", FIXED)
def test_a_payload_of_another_size_is_refused(name):
    encoded = encode(name, bumpy(300))
    assert refused(name, encoded.payload + b"\0", encoded.params, 300) == Reason.TOO_LARGE
    assert refused(name, encoded.payload[:-1], encoded.params, 300) == Reason.CODEC
    assert refused(name, b"", encoded.params, 300) == Reason.CODEC
    assert refused(name, encoded.payload, encoded.params, 299 - 256) == Reason.TOO_LARGE


@pytest.mark.parametrize("name", [n for n in ALL_NAMES if "zstd" in n])
def test_zstd_payloads_of_another_size_are_refused(name):
    encoded = encode(name, bumpy(300))
    for payload in (
        encoded.payload + b"\0", encoded.payload[:-1], b"", encoded.payload * 2, encode(name, bumpy(600)).payload,
        encode(name, bumpy(1)).payload,
    ):  # fmt: skip
        assert refused(name, payload, encoded.params, 300) in (Reason.TOO_LARGE, Reason.CODEC)


@pytest.mark.parametrize("name", ["float32", "float16", "float32 | zstd"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_refused(name, value):
    delta = np.ones(300, np.float32)
    plain = delta.astype(np.float16 if "16" in name else np.float32)
    plain[299] = value
    payload = plain.tobytes()
    if "zstd" in name:
        import zstandard

        payload = zstandard.compress(payload)
    assert refused(name, payload, {}, 300) == Reason.NOT_FINITE


@pytest.mark.parametrize("name", INTS)
@pytest.mark.parametrize("scale", [np.nan, np.inf, -1.0, -1e-30, 1e17, 2**64 - 1])
def test_a_scale_out_of_range_is_refused(name, scale):
    assert refused(name, encode(name, bumpy(300)).payload, {"scale": scale}, 300) == Reason.NOT_FINITE


@pytest.mark.parametrize("name", INTS)
@pytest.mark.parametrize("params", [{}, {"scale": "1"}, {"scale": True}, {"scale": None}, {"Scale": 1.0}])
def test_a_missing_or_foreign_scale_is_refused(name, params):
    assert refused(name, encode(name, bumpy(300)).payload, params, 300) == Reason.CODEC


@pytest.mark.parametrize("name", ["int8", "int4", "int8(nearest)", "int4(nearest)"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -0.5, 1.001, 65504])
def test_block_scales_out_of_range_are_refused_also_in_the_tail(name, value):
    payload = bytearray(encode(name, bumpy(300)).payload)
    payload[2:4] = np.array([value], "<f2").tobytes()
    assert refused(name, bytes(payload), {"scale": 1.0}, 300) == Reason.NOT_FINITE


@pytest.mark.parametrize(
    "name", ["", "int9", "zstd", "int8 | int8", "int8 |", "| zstd", "float32 | zstd | zstd", "x" * 10**5]
)
def test_an_unknown_name_is_refused_on_both_sides(name):
    with pytest.raises(SettingsError):
        parse(name)
    with pytest.raises(RejectedUpdate) as caught:
        codec_of(name)
    assert caught.value.reason == Reason.CODEC
    assert len(caught.value.detail) < 1000


@pytest.mark.parametrize("name", [None, 3, 1.5, b"int8", ["int8"], {"name": "int8"}])
def test_a_name_that_is_no_string_is_refused(name):
    with pytest.raises(RejectedUpdate) as caught:
        codec_of(name)
    assert caught.value.reason == Reason.CODEC


@pytest.mark.parametrize("name", ALL_NAMES)
def test_the_canonical_name_names_the_same_codec(name):
    assert parse(parse(name).name) == parse(name)
    assert parse(re.sub(r"\s", "", name)) == parse(name)
    assert parse(f"  {name.replace('|', '  |  ')} ") == parse(name)
