"""Hostile bytes and parameters: refused with a reason, or a finite delta in bounded memory. The bench throws more."""

import tracemalloc

import numpy as np
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from ops.bench.fuzz import fuzz
from shared.compression import decode, parse
from shared.errors import Reason, RejectedUpdate
from tests.codecs import NAMES, bumpy, encode, layout_of, through

LAYOUT = layout_of((40, 30), (30,), (21, 70))
SELECTED_AND_ROTATED = "randomk(0.1) | rotate | eden(2)"
ZSTD = [name for name in NAMES if parse(name).zstd]


@pytest.mark.parametrize("name", [*NAMES, SELECTED_AND_ROTATED])
def test_fuzz(name):
    result = fuzz(name, 300, seed=0)
    assert result.inputs == result.rejected + result.accepted == 300
    assert result.accepted > 20  # flips of values and valid parameters must pass, or nothing was fuzzed
    assert result.rejected > 100
    assert {Reason.CODEC, Reason.NOT_FINITE, Reason.TOO_LARGE} == set(result.reasons)
    assert result.slowest_s < 5


def test_the_fuzzer_reports_what_a_decoder_lets_through(monkeypatch):
    monkeypatch.setattr("shared.compression.quantizer.SCALE_MAX", np.inf)
    with np.errstate(over="ignore", invalid="ignore"), pytest.raises(AssertionError, match="seed 3, input"):
        fuzz("int8", 3000, seed=3)


def test_the_fuzzer_reports_a_decoder_that_crashes(monkeypatch):
    monkeypatch.setattr("shared.compression.block_int.exactly", lambda *_: None)
    with pytest.raises(AssertionError, match="ValueError"):
        fuzz("int8", 300, seed=3)


def refused(name, payload, params):
    with pytest.raises(RejectedUpdate) as caught:
        decode({"name": name, **params}, payload, LAYOUT)
    assert 0 < len(caught.value.detail) <= 500
    return caught.value.reason


@pytest.mark.parametrize("name", NAMES)
def test_any_truncation_and_any_tail_is_refused(name):
    encoded = encode(name, bumpy(LAYOUT.num_params), LAYOUT)
    for cut in {*range(0, len(encoded.payload), 37), len(encoded.payload) - 1}:
        refused(name, encoded.payload[:cut], encoded.params)
    for tail in (b"\0", b"\xff" * 3, encoded.payload, bytes(10**6)):
        refused(name, encoded.payload + tail, encoded.params)


@pytest.mark.parametrize("name", ["topk(0.1)", "topk(0.1) | ternary | zstd", "topk(0.1) | rotate | eden(2)"])
def test_nothing_may_follow_where_nothing_is_selected(name):
    encoded = encode(name, np.zeros(LAYOUT.num_params, np.float32), LAYOUT)
    assert encoded.params["kept"] == 0
    plain = (zstandard.decompress(encoded.payload) if parse(name).zstd else encoded.payload) + b"\0\0\0\0"
    assert refused(name, frame(plain) if parse(name).zstd else plain, encoded.params) == Reason.CODEC


@pytest.mark.parametrize("name", NAMES)
def test_a_payload_of_another_layout_is_refused(name):
    encoded = encode(name, bumpy(LAYOUT.num_params), LAYOUT)
    for other in (layout_of((40, 30), (31,), (21, 71)), layout_of((90, 80)), layout_of((1,))):
        with pytest.raises(RejectedUpdate):
            decode({"name": name, **encoded.params}, encoded.payload, other)


BAD_NUMBERS = [None, "1", True, [], {}, b"1", np.nan, np.inf, -1, -1.0, -(2**63), 2**64 - 1, 1e300, 10**400]


@pytest.mark.parametrize("value", BAD_NUMBERS, ids=lambda value: repr(value)[:12])
@pytest.mark.parametrize("name", [*NAMES, SELECTED_AND_ROTATED])
def test_wrong_parameters_are_refused_each_by_itself(name, value):
    encoded = encode(name, bumpy(LAYOUT.num_params), LAYOUT)
    for key in encoded.params:
        assert refused(name, encoded.payload, encoded.params | {key: value}) in (Reason.CODEC, Reason.NOT_FINITE)
        refused(name, encoded.payload, {k: v for k, v in encoded.params.items() if k != key})


@pytest.mark.parametrize("key", ["kept", "seed", "draw"])
def test_counts_and_seeds_are_whole_and_in_range(key):
    name = {"kept": "topk(0.1)", "seed": "rotate | eden(2)", "draw": "randomk(0.1)"}[key]
    encoded = encode(name, bumpy(LAYOUT.num_params), LAYOUT)
    assert key in encoded.params
    for value in (float(encoded.params[key]), 2**32, encoded.params[key] + 2**32):
        assert refused(name, encoded.payload, {key: value}) == Reason.CODEC


@pytest.mark.parametrize(
    "name", ["float32", "float16", "bfloat16", "float32 | zstd", "topk(0.1)", "topk(0.1) | float16"]
)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_refused_wherever_they_stand(name, value):
    codec, layout = parse(name), layout_of((300, 300))
    width = 4 if codec.quantizer.name == "float32" else 2
    encoded = encode(name, bumpy(layout.num_params), layout)
    plain = zstandard.decompress(encoded.payload) if codec.zstd else encoded.payload
    bits = int(np.float32(value).view(np.uint32)) >> 8 * (4 - width)
    if codec.quantizer.name == "float16":
        bits = int(np.float16(value).view(np.uint16))
    spoiled = bits.to_bytes(width, "little")
    for at in (len(plain) - width, len(plain) - 7 * width):
        payload = plain[:at] + spoiled + plain[at + width :]
        with pytest.raises(RejectedUpdate) as caught:
            codec.decode(zstandard.compress(payload) if codec.zstd else payload, encoded.params, layout)
        assert caught.value.reason == Reason.NOT_FINITE


@pytest.mark.parametrize("name", ["all | int8", "int8", "int4", "int2", "nf4"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -0.5, 1.001, 65504])
def test_block_scales_out_of_range_are_refused_also_in_the_last_block(name, value):
    layout = layout_of((25, 100))
    encoded, block = encode(name, bumpy(2500), layout), 64 if name == "nf4" else 256
    for at in (0, 2 * (-(-2500 // block) - 1)):
        payload = bytearray(encoded.payload)
        payload[at : at + 2] = np.array([value], "<f2").tobytes()
        with pytest.raises(RejectedUpdate) as caught:
            decode({"name": name, **encoded.params}, bytes(payload), layout)
        assert caught.value.reason == Reason.NOT_FINITE


@pytest.mark.parametrize(
    "name", ["ef | sign", "uniform(step=1)", "qsgd(4)", "ternary", "rotate | eden(2)", "topk(0.1) | ternary"]
)
@pytest.mark.parametrize("value", [np.nan, np.inf, -1e-30, 1.01e16])
def test_scales_out_of_range_are_refused_also_the_last(name, value):
    layout = layout_of((50, 50), (50, 50))
    encoded = encode(name, bumpy(5000), layout)
    first = 4 + int.from_bytes(encoded.payload[:4], "little") if parse(name).selection else 0
    for at in (first, first + 4):
        payload = encoded.payload[:at] + np.array([value], "<f4").tobytes() + encoded.payload[at + 4 :]
        with pytest.raises(RejectedUpdate) as caught:
            decode({"name": name, **encoded.params}, payload, layout)
        assert caught.value.reason == Reason.NOT_FINITE


# --- zstd -------------------------------------------------------------------------------------------------------


def frame(plain, known_size=True, level=1):
    """Compress with or without the size in the frame's header."""
    if known_size:
        return zstandard.ZstdCompressor(level=level).compress(plain)
    compressor = zstandard.ZstdCompressor(level=level).compressobj()
    return compressor.compress(plain) + compressor.flush()


def lying_header(announced):
    """Write a frame header that announces any size, and one empty last block."""
    return b"\x28\xb5\x2f\xfd\xe0" + announced.to_bytes(8, "little") + b"\x01\x00\x00"


BOMBS = {
    "64 MiB": frame(bytes(2**26)), "64 MiB unannounced": frame(bytes(2**26), known_size=False),
    "1 TiB": lying_header(2**40), "-3": lying_header(2**64 - 3), "0": lying_header(0), "empty": frame(b""),
    "empty unannounced": frame(b"", known_size=False), "1 byte more": frame(bytes(300 * 300 * 4 + 300)),
}  # fmt: skip


@pytest.mark.parametrize("bomb", BOMBS)
@pytest.mark.parametrize("name", ZSTD)
def test_a_zstd_bomb_is_refused_and_costs_nothing(name, bomb):
    encoded = encode(name, bumpy(LAYOUT.num_params), LAYOUT)
    tracemalloc.start()
    try:
        assert refused(name, BOMBS[bomb], encoded.params) in (Reason.TOO_LARGE, Reason.CODEC)
        assert tracemalloc.get_traced_memory()[1] < 10**5
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("name", ZSTD)
def test_a_frame_without_its_size_or_of_another_level_is_as_good(name):
    delta = bumpy(LAYOUT.num_params)
    encoded = encode(name, delta, LAYOUT)
    plain = zstandard.decompress(encoded.payload)
    for payload in (frame(plain, known_size=False), frame(plain, level=19)):
        total = np.zeros(LAYOUT.num_params, np.float32)
        decode({"name": name, **encoded.params}, payload, LAYOUT).add_into(total, 1.0)
        assert (total == through(name, delta, LAYOUT)).all()


@pytest.mark.parametrize("name", ZSTD)
def test_nothing_may_follow_the_frame(name):
    encoded = encode(name, bumpy(LAYOUT.num_params), LAYOUT)
    skippable = b"\x50\x2a\x4d\x18\x04\x00\x00\x00abcd"
    for payload in (encoded.payload + b"\0", encoded.payload + skippable, encoded.payload + frame(b"")):
        refused(name, payload, encoded.params)


# --- anything whatever --------------------------------------------------------------------------------------------

SCALARS = st.one_of(
    st.floats(), st.floats(0, 1), st.integers(-(2**63), 2**64 - 1), st.integers(0, 300), st.text(max_size=5),
    st.booleans(), st.none(), st.binary(max_size=5),
)  # fmt: skip
PARAMS = st.dictionaries(st.sampled_from(["scale", "seed", "kept", "draw", ""]), SCALARS, max_size=4)


@given(st.sampled_from(NAMES), st.randoms(use_true_random=False), PARAMS, st.sampled_from([1, 900, 1000, 1801]))
def test_garbage_of_about_the_right_size_is_refused_or_harmless(name, random, params, size):
    layout, codec = layout_of((size, 1)), parse(name)
    payload = random.randbytes(max(0, codec._plain_bytes_max(layout) - random.choice([0, 0, 1, 32])))
    try:
        received = decode({**params, "name": name}, zstandard.compress(payload) if codec.zstd else payload, layout)
    except RejectedUpdate as error:
        assert error.reason in (Reason.CODEC, Reason.NOT_FINITE, Reason.TOO_LARGE)
        return
    total = np.zeros(size, np.float32)
    received.add_into(total, 1.0)
    assert np.isfinite(total).all()
    assert np.isfinite(received.squared_norm())
