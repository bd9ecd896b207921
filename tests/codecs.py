"""Layouts, deltas and a way through a codec, for the tests of every codec."""

import numpy as np

from shared.compression import decode, parse
from shared.compression.presets import PRESETS
from shared.compression.registry import EXAMPLES
from shared.layout import Layout

NAMES = tuple(dict.fromkeys([*EXAMPLES, *(parse(preset).name for preset in PRESETS)]))


def layout_of(*shapes):
    return Layout.of((f"t{index}", shape, "float32") for index, shape in enumerate(shapes))


LAYOUTS = {
    "one element": layout_of((1,)),
    "all small": layout_of((3, 4), (7,), (31, 32)),
    "1-D only": layout_of((5000,), (1200,)),
    "one matrix": layout_of((50, 40)),
    "just large": layout_of((1000, 1)),
    "biases between": layout_of((3,), (33, 40), (33,), (2000, 1), (5, 5), (10, 700), ()),
    "empty tensors": layout_of((0, 5), (40, 30), (0,), (50, 60), (0, 1)),
    "4095": layout_of((4095, 1)),
    "4096": layout_of((16, 4, 64)),
    "4097": layout_of((1, 4097), (3,)),
    "65535": layout_of((65535, 1)),
    "65536": layout_of((256, 256)),
    "65537": layout_of((65537, 1)),
    "70001": layout_of((70001, 1)),
    "slab across tensors": layout_of((10,), (1021, 64), (9, 9), (257, 9), (10,), (255, 13)),
    "sampled": layout_of((1 << 17, 1), (1001, 1)),
}
QUICK = ("one element", "biases between", "empty tensors", "4097", "slab across tensors")


def bumpy(size, seed=0):
    """Return a delta whose stretches of 256 differ wildly in size, in no order."""
    rng = np.random.default_rng(seed)
    magnitudes = 10.0 ** rng.uniform(-4, 2, -(-size // 256))
    return (rng.standard_normal(size) * np.repeat(magnitudes, 256)[:size]).astype(np.float32)


def deltas(size):
    """Return awkward deltas by name; all but `zeros` and the smallest are what a contraction must contract."""
    rng = np.random.default_rng(3)
    normal, places = rng.standard_normal(size), np.arange(size)
    made = {
        "zeros": np.zeros(size),
        "minus zeros": np.full(size, -0.0),
        "one-hot": (places == size // 2) * -3.0,
        "last only": (places == size - 1) * 1.0,
        "normal": normal,
        "bumpy": bumpy(size),
        "huge": normal * 1e8,
        "tiny": normal * 1e-20,
        "vanishing": normal * 1e-23,
        "denormal": normal * 1e-42,
        "constant": np.full(size, 0.37),
        "alternating": np.where(places % 2, -1.0, 1.0),
        "sparse": normal * (places % 100 == 7),
        "with minus zeros": np.where(places % 3, -0.0, normal),
        "cauchy": np.clip(rng.standard_cauchy(size), -1e9, 1e9),
        "outliers": np.where(places % 9973 == 5, 1e6, normal),
        "one huge among halves": np.where(places == 0, 127.0, 0.5),
        "one huge among thirds": np.where(places == 0, 7.0, 0.3),
    }
    return {name: delta.astype(np.float32) for name, delta in made.items()}


def encode(name, delta, layout, seed=0):
    return parse(name).encode(delta, layout, np.random.default_rng(seed))


def decoded(name, encoded, layout):
    return decode({"name": parse(name).name, **encoded.params}, encoded.payload, layout)


def inflate(decoded_delta, layout):
    total = np.zeros(layout.num_params, np.float32)
    decoded_delta.add_into(total, 1.0)
    return total


def through(name, delta, layout, seed=0):
    """Encode, decode, and return the delta the aggregator would add, in float64."""
    return inflate(decoded(name, encode(name, delta, layout, seed), layout), layout).astype(np.float64)


def error(name, delta, layout, seed=0):
    """Return ||x - C(x)||^2 / ||x||^2."""
    exact = delta.astype(np.float64)
    return float(((through(name, delta, layout, seed) - exact) ** 2).sum() / (exact**2).sum())
