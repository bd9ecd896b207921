"""ef: what was not sent is kept and added to the next delta.

    a = delta + e;    send m = C(a);    e <- a - decode(m)

Computed from the decoded bytes, so that everything trained is sent sooner or later: sum(deltas) = sum(sent) + e. It
needs a contraction: around an unbiased codec of high variance e grows without bound.

Source: Seide et al. 2014 (1-bit SGD); Karimireddy et al., arXiv:1901.09847, algorithm 2.
"""

import numpy as np

from shared.compression.codec import Codec, Encoded
from shared.layout import Layout
from shared.vector import Vector, add_scaled


def encode_with_feedback(
    codec: Codec, delta: Vector, residual: Vector, layout: Layout, rng: np.random.Generator
) -> Encoded:
    """Encode `delta + residual`; leave in `residual`, in place, what the message does not carry.

    Args:
        codec: a contraction.
        delta: float32 [n].
        residual: float32 [n], e; changed in place.
        layout: of both.
        rng: drives stochastic rounding and seeds.
    """
    add_scaled(residual, delta, 1.0)
    encoded = codec.encode(residual, layout, rng)
    codec.decode(encoded.payload, encoded.params, layout).add_into(residual, -1.0)
    return encoded
