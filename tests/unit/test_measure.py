"""What is measured of a codec, beside closed forms."""

import numpy as np
import pytest

from shared.compression import parse
from shared.compression.measure import measure
from shared.errors import RejectedUpdate
from tests.codecs import layout_of

N = 2048
LAYOUT = layout_of((32, 64))
NORMAL = np.random.default_rng(0).standard_normal(N, np.float32)


def of(name, delta=NORMAL, layout=LAYOUT, **changes):
    return measure(parse(name), delta, layout, **{"seed": 1} | changes)


def test_float32_is_the_delta_itself():
    m = of("float32")
    assert (m.payload_bytes, m.ratio, m.nmse, m.bias) == (4 * N, 1.0, 0.0, 0.0)
    assert m.encode_s > 0
    assert m.decode_s > 0


@pytest.mark.parametrize(
    ("name", "payload_bytes"),
    [
        ("bfloat16", 2 * N),
        ("ternary", -(-N // 5)),  # five to a byte: 3^5 < 256
        ("ef | sign", N // 8),
        ("all | rotate | eden(1)", N // 8),
        ("all | rotate | eden(2)", 2 * N // 8),
    ],
)
def test_a_code_of_fixed_width_has_its_size(name, payload_bytes):
    m = of(name)
    assert payload_bytes <= m.payload_bytes <= payload_bytes + N // 64  # and at most a scale for every 256
    assert m.ratio == pytest.approx(4 * N / m.payload_bytes)


def test_the_error_of_what_top_k_drops():
    delta = np.ones(N, np.float32)
    delta[:: N // 128] = -4  # a sixteenth, with 16 times the energy
    m = of("topk(0.0625)", delta)
    assert m.nmse == pytest.approx(15 / (15 + 16))
    assert m.bias == pytest.approx(m.nmse**0.5)  # it errs the same way every time


def test_the_error_of_a_sign():
    delta = np.where(np.arange(N) % 2, 1, -3).astype(np.float32)  # mean magnitude 2, off by 1 everywhere
    assert of("ef | sign", delta).nmse == pytest.approx(1 / 5, rel=1e-3)


def test_the_error_of_what_is_exact_in_three_levels():
    delta = np.resize(np.array([0.5, -0.5, 0, 0], np.float32), N)
    assert of("ternary", delta).nmse == pytest.approx(0, abs=1e-6)


def test_the_bias_of_an_unbiased_codec_is_far_below_its_error():
    m = of("int2", draws=50)
    assert m.nmse > 0.1
    assert m.bias < 0.3 * m.nmse**0.5


def test_a_seed_makes_it_reproducible():
    assert of("int4").nmse == of("int4").nmse
    assert of("int4").nmse != of("int4", seed=2).nmse


def test_a_delta_of_zeros_has_no_error():
    m = of("int8", np.zeros(N, np.float32))
    assert (m.nmse, m.bias) == (0.0, 0.0)


def test_the_delta_stays_as_it_was():
    delta = NORMAL.copy()
    for name in ("float32", "int8 | zstd", "ef | topk(0.01) | ternary | zstd", "rotate | eden(1)"):
        of(name, delta)
    np.testing.assert_array_equal(delta, NORMAL)


def test_a_delta_that_no_decoder_takes_is_rejected():
    with pytest.raises(RejectedUpdate, match="scale"):
        of("int8", NORMAL * np.float32(1e17))
