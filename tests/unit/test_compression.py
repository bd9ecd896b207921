"""The bytes of the contract: what a client in another language has to write."""

import struct

import numpy as np
import pytest
import zstandard

from shared.compression import decode, parse
from shared.errors import Reason, RejectedUpdate
from tests.codecs import bumpy, encode, layout_of, through

MIXED = layout_of((3,), (30, 40), (2, 2))  # 1,200 in the body, 7 small


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        ("float32", (1, 257), 1028), ("bfloat16", (1, 257), 514), ("float16", (1, 257), 4 + 514),
        ("all | int8", (1, 256), 258), ("all | int8", (1, 257), 261), ("all | int8", (1,), 3),
        ("all | int4", (1, 256), 130), ("all | int4", (1, 257), 260), ("all | int4", (1,), 130),
        ("all | int2", (1, 257), 2 * (2 + 64)), ("all | nf4", (1, 65), 2 * (2 + 32)),
        ("ef | all | sign", (1, 257), 4 + 33), ("all | ternary", (1, 257), 4 + 5 + 52),
        ("all | uniform(step=1)", (1, 257), 4 + 5 + 257), ("all | qsgd(4)", (1, 257), 4 + 5 + 257),
        ("all | rotate | eden(3)", (1, 4097), 2 * 4 + 3 * 4352 // 8), ("all | randomk(0.1)", (1, 257), 4 + 26 * 4),
        ("int8", (1000,), 4 + 2000), ("int8", (1, 999), 4 + 2 * 999), ("int8", (1, 1000), 4 * 2 + 1000),
    ],
)  # fmt: skip
def test_payload_sizes_of_the_contract(name, shape, expected):
    layout = layout_of(shape)
    assert len(encode(name, bumpy(layout.num_params) / 1000, layout).payload) == expected


def test_float32_is_the_plain_little_endian_vector():
    delta = bumpy(1207)
    encoded = encode("float32", delta, MIXED)
    assert encoded.payload == delta.astype("<f4").tobytes()
    assert not encoded.params
    assert zstandard.decompress(encode("float32 | zstd", delta, MIXED).payload) == encoded.payload


def test_small_tensors_stand_first_as_float16_over_a_power_of_two():
    delta = np.zeros(1207, np.float32)
    delta[:3], delta[1203:] = (3.0, -1.5, 0.75), (0.5, 0.25, 0.0, -3.0)
    payload = encode("int8", delta, MIXED).payload
    power = struct.unpack("<f", payload[:4])[0]
    assert power == 2.0**-9  # 3 = 1536 * 2^-9, in [1024, 2048)
    assert (np.frombuffer(payload, "<f2", 7, 4) * power).tolist() == [3.0, -1.5, 0.75, 0.5, 0.25, 0.0, -3.0]
    assert len(payload) == 4 + 14 + 2 * 5 + 1200


@pytest.mark.parametrize("scale", [1e-38, 1e-30, 1e-9, 1.0, 1e9, 1e15])
def test_float16_keeps_eleven_bits_of_any_magnitude(scale):
    delta = (np.random.default_rng(0).uniform(0.01, 1, 300) * scale).astype(np.float32)
    assert (np.abs(through("float16", delta, layout_of((300,))) - delta) <= 2.0**-11 * np.abs(delta)).all()


def test_bfloat16_rounds_to_nearest_ties_to_even():
    x = np.array([1, 1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-20, -1 - 2**-8, 0, 1e-40, 1e18], np.float32)
    back = through("bfloat16", x, layout_of((x.size,)))
    assert back[:6].tolist() == [1, 1, 1 + 4 * 2**-8, 1 + 2**-7, -1, 0]
    assert (np.abs(back[6:] - x[6:]) <= np.abs(x[6:]) * 2.0**-8 + 1e-41).all()


@pytest.mark.parametrize(("name", "part"), [("int4(nearest)", 128), ("int2(nearest)", 64)])
def test_narrow_integers_share_bytes_a_part_of_a_block_apart(name, part):
    layout, bits = layout_of((4, 256)), 4 if part == 128 else 2
    delta = np.zeros(1024, np.float32)
    delta[3], delta[3 + part] = 7.0, -7.0
    offset = 2 ** (bits - 1)
    level = offset - 1
    packed = np.frombuffer(encode(name, delta, layout).payload, np.uint8, offset=8)
    rest = sum(offset << bits * k for k in range(256 // part))
    assert packed[3] == rest - (offset << bits) - offset + (offset + level) + ((offset - level) << bits)
    assert (np.delete(packed, 3) == rest).all()


def test_nf4_keeps_the_even_element_in_the_low_half():
    delta = np.zeros(1024, np.float32)
    delta[0], delta[1], delta[65] = 1.0, -1.0, 0.5
    payload = encode("nf4", delta, layout_of((1024, 1))).payload
    packed = np.frombuffer(payload, np.uint8, offset=2 * 16)
    assert packed[0] == 15 | 0 << 4  # the largest and the smallest of sixteen levels
    assert packed[1] == 7 | 7 << 4  # zero is the eighth
    assert packed[32] == 7 | 15 << 4  # the second block has its own scale


def test_signs_and_ternary_values():
    layout = layout_of((1000, 1), (1000, 1))
    delta = np.tile(np.array([1, -1, 3, -3], np.float32), 500)
    delta[1000:] *= 10
    payload = encode("ef | sign", delta, layout).payload
    assert struct.unpack("<2f", payload[:8]) == (2.0, 20.0)
    assert payload[8:] == b"\xaa" * 250  # first element in the high bit
    ternary = encode("ternary", delta, layout).payload
    assert struct.unpack("<2fBI", ternary[:13]) == (3.0, 30.0, 1, 0)  # 1 < 0.7 * 2 < 3
    assert ternary[13] == sum((digit + 1) * 3**k for k, digit in enumerate([0, 0, 1, -1, 0]))


def test_a_selection_tells_the_length_of_its_positions():
    delta = np.zeros(1207, np.float32)
    delta[[3, 70, 1202]] = 1.0, 2.0, 3.0
    encoded = encode("topk(0.0025)", delta, MIXED)
    assert encoded.params["kept"] == 3
    small = 4 + 14
    (length,) = struct.unpack_from("<I", encoded.payload, small)
    assert np.frombuffer(encoded.payload, "<f4", offset=small + 4 + length).tolist() == [1.0, 2.0, 3.0]


@pytest.mark.parametrize("name", ["int8", "int4", "int2", "int8(nearest)", "int4(nearest)", "nf4"])
def test_block_scales_are_relative_to_the_largest_and_rounded_up(name):
    """A block scale that is rounded down, or shared between neighbours, would clip the block's largest."""
    layout, block = layout_of((2567, 1)), 64 if name == "nf4" else 256
    delta = bumpy(2567, seed=11)
    encoded = encode(name, delta, layout)
    blocks = -(-2567 // block)
    factors = np.frombuffer(encoded.payload, "<f2", blocks).astype(np.float64) * encoded.params["scale"]
    levels = {"int8": 127, "int4": 7, "int2": 1, "nf4": 1}[name.split("(")[0]]
    largest = np.array([np.abs(delta[start : start + block]).max() for start in range(0, 2567, block)])
    assert (factors * levels >= largest * (1 - 1e-6)).all()
    assert (factors * levels <= largest * (1 + 2.0**-10) + largest.max() * 2.0**-24).all()
    back = through(name, delta, layout)
    if "nearest" in name or name == "nf4":
        at = [start + int(np.abs(delta[start : start + block]).argmax()) for start in range(0, 2567, block)]
        np.testing.assert_allclose(back[at], delta[at], atol=1.01 * largest.max() * 2.0**-24, rtol=2e-3)


@pytest.mark.parametrize("name", ["int8", "int4", "int8(nearest)", "int4(nearest)"])
def test_the_error_of_each_element_is_a_step_of_its_block_or_half_one(name):
    for size in (1000, 65_535, 65_536, 65_537, 70_001):
        delta = bumpy(size)
        blocks = [np.abs(delta[start : start + 256]).max() for start in range(0, size, 256)]
        largest = np.repeat(blocks, 256)[:size].astype(np.float64)
        step = (largest * (1 + 2.0**-10) + largest.max() * 2.0**-24) / (127 if "int8" in name else 7)
        error = np.abs(through(name, delta, layout_of((size, 1))) - delta)
        assert (error <= step * (0.5 if "nearest" in name else 1.0) * (1 + 1e-5)).all()


def test_a_tensor_all_of_whose_bytes_are_read_only_decodes():
    encoded = encode("int8", bumpy(1207), MIXED)
    total = np.zeros(1207, np.float32)
    decode({"name": "int8", **encoded.params}, memoryview(bytearray(encoded.payload)).toreadonly(), MIXED).add_into(
        total, 1.0
    )
    assert (total == through("int8", bumpy(1207), MIXED)).all()


@pytest.mark.parametrize("value", [3e38, 1e20])
@pytest.mark.parametrize("name", ["float32", "bfloat16", "float16", "int8", "nf4", "ef | sign", "ternary"])
def test_an_absurd_delta_is_refused_at_the_other_end_not_applied(name, value):
    delta = np.full(1207, value, np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        encoded = parse(name).encode(delta, MIXED, np.random.default_rng(0))
    with pytest.raises(RejectedUpdate) as caught:
        decode({"name": parse(name).name, **encoded.params}, encoded.payload, MIXED)
    assert caught.value.reason == Reason.NOT_FINITE


@pytest.mark.parametrize(
    "name", ["qsgd(4)", "ef | sign", "ternary(stochastic)", "ternary", "uniform(step=1, stochastic)"]
)
def test_a_tensors_scale_is_that_of_all_its_slabs(name):
    """Tensors go through in slabs of 65,536: here the first is ten times the others."""
    delta = np.random.default_rng(0).uniform(0.5, 1, 140_000).astype(np.float32)
    delta[1000 : 1 << 16] *= 10
    exact = delta.astype(np.float64)
    expected = {
        "qsgd(4)": np.linalg.norm(exact) / 4,
        "ef | sign": exact.mean(),
        "ternary(stochastic)": exact.max(),
        "ternary": exact[exact > 0.7 * exact.mean()].mean(),
        "uniform(step=1, stochastic)": np.sqrt((exact**2).mean()),
    }[name]
    (scale,) = struct.unpack_from("<f", encode(name, delta, layout_of((70_000, 2))).payload)
    assert abs(scale / expected - 1) < 1e-5
