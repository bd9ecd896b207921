"""What every codec promises, for every name in EXAMPLES and the presets, over awkward layouts and deltas."""

import re
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.compression import decode, parse
from shared.compression.entropy import decompress
from shared.compression.registry import EXAMPLES, QUANTIZERS, SELECTIONS, WORDS
from shared.compression.tensors import SLAB, SMALL
from shared.errors import RejectedUpdate
from tests.codecs import (
    LAYOUTS,
    NAMES,
    QUICK,
    bumpy,
    decoded,
    deltas,
    encode,
    error,
    inflate,
    layout_of,
    through,
)

STOCHASTIC = [n for n in NAMES if parse(n).rotated or re.search(r"stochastic|qsgd|randomk|int[842](?!\()", n)]
LOSSY = [n for n in NAMES if not parse(n).plain]
BLOCKED = layout_of((3,), (300, 7), (1500,))  # 2,100 in the body: odd tails of blocks of 256 and 64


def test_every_stage_is_among_the_examples():
    stages = {stage.split("(")[0].strip() for name in EXAMPLES for stage in name.split("|")}
    assert stages == {*WORDS, *QUANTIZERS, *SELECTIONS}


@pytest.mark.parametrize("name", NAMES)
def test_the_canonical_name_names_the_same_codec(name):
    codec = parse(name)
    assert parse(codec.name) == codec
    assert parse(codec.name).name == codec.name
    assert parse(re.sub(r"\s", "", name)) == codec
    assert parse(f"  {name.replace('|', '  |  ')} ") == codec


@given(st.floats(1e-6, 0.25), st.floats(0.5, 32), st.sampled_from([10**6, 12_345_678, 2**31 + 1]))
def test_options_survive_the_name(share, step, size):
    """A share or a step of many digits must not differ between the two ends: k would."""
    codec = parse(f"topk({share:.9f}) | uniform(step={step:.9f}, stochastic)")
    again = parse(codec.name)
    assert again == codec
    assert again.selection.count_max(size) == codec.selection.count_max(size)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("name", [n for n in NAMES if not n.startswith("ef")])
def test_any_delta_goes_through_within_the_announced_size(name, layout):
    """Also: nothing is touched, nothing warns, everything is finite, and norms agree."""
    codec = parse(name)
    most = codec.payload_bytes_max(layout)
    kinds = deltas(layout.num_params)
    if layout.num_params > 20_000:  # the awkward ones
        kinds = {k: kinds[k] for k in ("bumpy", "vanishing", "cauchy", "constant")}
    for kind, delta in kinds.items():
        before = delta.tobytes()
        with np.errstate(divide="raise", invalid="raise", over="raise"):
            encoded = encode(name, delta, layout)
            back = inflate(received := decoded(name, encoded, layout), layout)
        assert delta.tobytes() == before, kind
        assert len(encoded.payload) <= most, kind
        assert np.isfinite(back).all(), kind
        square = float((back.astype(np.float64) ** 2).sum())
        assert abs(received.squared_norm() - square) <= 1e-4 * square + 1e-34, kind
        if "zeros" in kind and "with" not in kind:
            assert not back.any(), kind
        if codec.contraction and delta.any() and kind not in ("vanishing", "denormal"):
            lost = float(((back - delta.astype(np.float64)) ** 2).sum())
            assert lost < (delta.astype(np.float64) ** 2).sum() * (1 - 1e-7) or codec.rotated, kind


@pytest.mark.parametrize("layout", [LAYOUTS[k] for k in QUICK], ids=QUICK)
@pytest.mark.parametrize("name", NAMES)
def test_the_same_seed_gives_the_same_bytes(name, layout):
    delta = bumpy(layout.num_params)
    one, two = encode(name, delta, layout, seed=5), encode(name, delta, layout, seed=5)
    assert (one.payload, dict(one.params)) == (two.payload, dict(two.params))
    first, second = (inflate(decoded(name, encoded, layout), layout) for encoded in (one, two))
    assert first.tobytes() == second.tobytes()


@pytest.mark.parametrize("name", NAMES)
def test_only_stochastic_codecs_depend_on_the_seed(name):
    delta = bumpy(BLOCKED.num_params)
    one, two = encode(name, delta, BLOCKED, seed=5), encode(name, delta, BLOCKED, seed=6)
    assert ((one.payload, one.params) != (two.payload, two.params)) == (name in STOCHASTIC)


@pytest.mark.parametrize("layout", [LAYOUTS[k] for k in QUICK], ids=QUICK)
@pytest.mark.parametrize("name", NAMES)
def test_add_into_adds_weight_times_delta_and_nothing_else(name, layout):
    size = layout.num_params
    encoded = encode(name, bumpy(size, seed=1), layout)
    received = decoded(name, encoded, layout)
    delta = inflate(received, layout).astype(np.float64)
    start = bumpy(size + 2, seed=4)  # the total lies between two guards
    buffer = start.copy()
    received.add_into(buffer[1:-1], 0.375)
    received.add_into(buffer[1:-1], -3.0)
    scale = np.abs(start[1:-1]) + 4 * np.abs(delta) + 2 * np.abs(delta).max() * parse(name).rotated
    assert (np.abs(buffer[1:-1] - (start[1:-1] - 2.625 * delta)) <= 2e-6 * scale + 1e-30).all()
    assert (buffer[0], buffer[-1]) == (start[0], start[-1])
    untouched = delta == 0
    assert (buffer[1:-1][untouched] == start[1:-1][untouched]).all() or parse(name).rotated
    assert inflate(received, layout).astype(np.float64).tobytes() == delta.tobytes()  # decoding again says the same


@pytest.mark.parametrize("name", [n for n in NAMES if parse(n).exact])
def test_exact_codecs_decode_the_same_by_element_and_by_slab(name):
    """Slabs of the last few elements give the bits that whole slabs gave: sums do not depend on where they are cut."""
    layout = layout_of((1 << 17, 1))
    encoded = encode(name, bumpy(layout.num_params), layout)
    received = decode({"name": name, **encoded.params}, memoryview(encoded.payload), layout)
    whole = inflate(received, layout)
    (part,) = received.parts
    count = getattr(part, "at", np.arange(layout.num_params)).size
    piece = np.empty(100, np.float32)
    for start in range(0, count, SLAB):
        length = min(100, count - start)
        part.quantized.inflate(start, start + length, 1.0, piece[:length])
        at = part.at[start : start + length] if hasattr(part, "at") else np.arange(start, start + length)
        assert (whole[at] == piece[:length]).all()


@pytest.mark.parametrize("scale", [1.0, 1e-9, 1e9])
@pytest.mark.parametrize("name", LOSSY)
def test_small_and_one_dimensional_tensors_keep_float16s_precision(name, scale):
    layout = layout_of((40, 50), (40,), (3000,), (31, 32), (60, 70), ())
    delta = (np.random.default_rng(2).uniform(0.01, 1, layout.num_params) * scale).astype(np.float32)
    back = layout.unflatten(through(name, delta, layout).astype(np.float32))
    for key, tensor in layout.unflatten(delta).items():
        large = tensor.ndim > 1 and tensor.size >= SMALL
        if not large and not name.startswith("all"):
            assert (np.abs(back[key] - tensor) <= np.abs(tensor) * 2.0**-10.9).all(), key


@pytest.mark.parametrize("name", [n for n in NAMES if not parse(n).plain and not parse(n).selection])
def test_a_large_tensor_is_not_scaled_by_its_neighbour(name):
    """Per-tensor or per-block scales: an update of 1e-4 beside one of 1e4 is not lost."""
    if parse(name).rotated:
        return  # one rotation goes through all
    layout = layout_of((64, 64), (32, 128))
    delta = np.random.default_rng(0).standard_normal(8192).astype(np.float32)
    delta[:4096] *= np.float32(1e-2)
    delta[4096:] *= np.float32(1e2)
    exact = delta[:4096].astype(np.float64)
    if parse(name).contraction:
        assert ((through(name, delta, layout)[:4096] - exact) ** 2).sum() < 0.9 * (exact**2).sum()
    else:
        assert through(name, delta, layout)[:4096].any()


# --- unbiased and contracting ---------------------------------------------------------------------------------


def mean_error(name, delta, layout, trials):
    """Return the mean of decode(encode(x)) - x, and its standard error, per element."""
    codec, rng = parse(name), np.random.default_rng(1)
    total, squares = np.zeros(delta.size), np.zeros(delta.size)
    for _ in range(trials):
        encoded = codec.encode(delta, layout, rng)
        difference = inflate(codec.decode(encoded.payload, encoded.params, layout), layout) - delta.astype(np.float64)
        total += difference
        squares += difference**2
    mean = total / trials
    return mean, np.sqrt(np.maximum(squares / trials - mean**2, 0) / trials)


EDEN_BIAS = {
    "eden(1)": 0.02,
    "eden(2)": 0.002,
    "eden(3)": 0.001,
    "eden(4)": 0.0005,
}  # a block of 256 is not quite Gaussian


@pytest.mark.parametrize("kind", ["normal", "heavy"])
@pytest.mark.parametrize("name", [n for n in NAMES if parse(n).unbiased])
def test_unbiased_codecs_are_unbiased(name, kind):
    """Per element, and summed in three directions: x, its signs, and all ones.

    EDEN is so for values that the rotation makes Gaussian: nearly, in a block of 256.
    """
    layout, trials = layout_of((562, 4)), 1500
    rng = np.random.default_rng(9)
    delta = rng.standard_normal(2248).astype(np.float32)
    if kind == "heavy":
        delta *= np.exp(rng.standard_normal(2248)).astype(np.float32)
    mean, sigma = mean_error(name, delta, layout, trials)
    rms = float(np.sqrt(np.mean(delta.astype(np.float64) ** 2)))
    relative = EDEN_BIAS.get(parse(name).quantizer.name, 0.0) * 1.0
    allowed = 2e-4 * rms + relative * (np.abs(delta) + 0.1 * rms)  # the dither's grid, float32
    assert (np.abs(mean) <= 5.5 * np.maximum(sigma, np.median(sigma)) + allowed).all()
    for direction in (delta, np.sign(delta), np.ones(2248)):
        unit = direction / np.linalg.norm(direction)
        spread = 6 * float(np.sqrt((sigma**2 * unit**2).sum()))
        assert abs(float(mean @ unit)) <= spread + 2e-4 * rms * np.sqrt(2248) + relative * rms * np.sqrt(2248) / 5


@pytest.mark.parametrize("name", [n for n in NAMES if parse(n).unbiased and "float" not in n and "eden" not in n])
def test_what_claims_to_be_unbiased_is_no_nearest_rounding(name):
    """A value of a tenth of a step comes through a tenth of the time: E[q] is not 0."""
    layout = layout_of((562, 4))
    delta = np.full(2248, 0.02, np.float32)
    delta[::64] = 1.0
    mean, sigma = mean_error(name, delta, layout, 200)
    low = np.abs(delta) < 0.5
    assert abs(mean[low].mean()) < 5 * np.sqrt((sigma[low] ** 2).mean() / low.sum()) + 2e-4


ADVERSARIAL = {
    "one-hot": [1.0],
    "two equal": [1.0, 1.0],
    "four equal": [1.0] * 4,
    "eight equal": [1.0] * 8,
    "16 equal": [1.0] * 16,
    "three to one": [3.0, 1.0],
    "half": [1.0] * 1024,
    "constant": [0.37] * 2048,
    "alternating": [1.0, -1.0] * 1024,
    "one huge, halves of int8's step": [127.0] + [0.5] * 2047,
    "one huge, 0.28 of int4's step": [7.0] + [0.28] * 2047,
    "one huge, 0.45 of int2's step": [1.0] + [0.45] * 2047,
    "geometric": [2.0**-k for k in range(60)],
}


@pytest.mark.parametrize("kind", ADVERSARIAL)
@pytest.mark.parametrize("name", [n for n in NAMES if parse(n).contraction])
def test_contractions_contract(name, kind):
    layout = layout_of((2048, 1))
    delta = np.zeros(2048, np.float32)
    delta[: len(ADVERSARIAL[kind])] = ADVERSARIAL[kind]
    trials = 60 if name in STOCHASTIC else 1
    assert np.mean([error(name, delta, layout, seed) for seed in range(trials)]) < 0.9999


@pytest.mark.parametrize(
    ("name", "values"),
    [("int2", [1.0] + [0.2] * 255), ("qsgd(4)", [1.0] * 2048),
     ("uniform(step=4, stochastic)", [1.0] * 2048), ("ternary(stochastic)", [1.0] + [0.1] * 2047)],
)  # fmt: skip
def test_what_is_not_called_a_contraction_is_none(name, values):
    """The vectors for which feedback around these would diverge."""
    delta = np.zeros(2048, np.float32)
    delta[: len(values)] = values
    assert not parse(name).contraction
    assert np.mean([error(name, delta, layout_of((2048, 1)), seed) for seed in range(100)]) > 1


# --- memory ----------------------------------------------------------------------------------------------------

WIDE = layout_of((2000, 2000), (2000,))  # 4M parameters: 16 MB as float32


@pytest.fixture(scope="module")
def wide():
    rng = np.random.default_rng(0)
    return (rng.standard_normal(WIDE.num_params, np.float32) * rng.exponential(1, WIDE.num_params)).astype(np.float32)


FAMILIES = [
    "float32", "float16", "bfloat16", "int8 | zstd", "int4", "int2(nearest) | zstd", "nf4", "uniform(step=1)",
    "uniform(step=2) | pack | zstd", "ternary(stochastic) | zstd", "ef | sign", "qsgd(8) | pack | zstd",
    "rotate | eden(3)", "rotate | int4", "topk(0.01) | ternary | zstd", "randomk(0.01) | int8",
]  # fmt: skip


@pytest.mark.parametrize("name", FAMILIES)
def test_folding_needs_no_memory_of_model_size(name, wide):
    codec, total = parse(name), np.zeros(WIDE.num_params, np.float32)
    encoded = encode(name, wide, WIDE)
    if codec.selection is None or codec.exact:
        codec.decode(encoded.payload, encoded.params, WIDE)  # what is cached once per layout is not counted
    plain = len(decompress(encoded.payload, codec._plain_bytes_max(WIDE))) if codec.zstd else 0
    tracemalloc.start()
    try:
        codec.decode(encoded.payload, encoded.params, WIDE).add_into(total, 0.5)
        peak = tracemalloc.get_traced_memory()[1] - plain
    finally:
        tracemalloc.stop()
    chosen = codec.selection.count_max(WIDE.num_params) if codec.selection else 0
    signs = WIDE.num_params // 4 * codec.rotated  # two bits a value
    assert peak < 1.2e6 + 50 * chosen * (chosen > 0) - 0.6e6 * (chosen > 0) + signs


@settings(max_examples=60)
@given(st.one_of(st.none(), st.integers(), st.text(), st.binary(), st.lists(st.text(max_size=3), max_size=3)))
def test_any_codec_name_is_refused_or_known(name):
    with pytest.raises(RejectedUpdate):
        decode({"name": name}, b"", layout_of((1,)))


@pytest.mark.parametrize("name", ["topk(0.25) | ternary | zstd", "topk(0.25)", "randomk(0.25) | int8 | zstd"])
def test_the_densest_selection_costs_less_than_three_models(name, wide):
    """A hundred bytes can name any codec: what its decoder may take is bounded by the layout."""
    codec, total = parse(name), np.zeros(WIDE.num_params, np.float32)
    encoded = encode(
        name, np.repeat(np.float32([1, 0, 0, 0]), WIDE.num_params // 4 + 1)[: WIDE.num_params].copy(), WIDE
    )
    tracemalloc.start()
    try:
        codec.decode(encoded.payload, encoded.params, WIDE).add_into(total, 0.5)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 3 * total.nbytes
