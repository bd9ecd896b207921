"""float32 and float16: every element as it is, little-endian."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from shared.compression.codec import Encoded, Params, check_size
from shared.errors import Reason, RejectedUpdate
from shared.vector import Vector, add_scaled, squared_norm


@dataclass(frozen=True, slots=True)
class Dense:
    """A decoded delta that is an array already: a view into the message."""

    values: npt.NDArray[np.floating[Any]]

    def add_into(self, total: Vector, weight: float) -> None:
        """Add `weight * delta` to `total` in place."""
        add_scaled(total, self.values, weight)


@dataclass(frozen=True, slots=True)
class DenseCodec:
    """Elements of one float type; `float32` is exact, `float16` keeps 11 bits and clips at +-65504."""

    name: str
    dtype: str

    def payload_bytes(self, num_params: int) -> int:
        """Return the exact payload size."""
        return num_params * np.dtype(self.dtype).itemsize

    def encode(self, delta: Vector, rng: np.random.Generator) -> Encoded:
        """Cast and write; deterministic."""
        limit = float(np.finfo(self.dtype).max)
        return Encoded(np.clip(delta, -limit, limit).astype(self.dtype).tobytes(), {})

    def decode(self, payload: bytes | memoryview, params: Params, num_params: int) -> Dense:
        """Check size and finiteness."""
        check_size(self, payload, num_params)
        values = np.frombuffer(payload, self.dtype)
        if not np.isfinite(squared_norm(values)):
            raise RejectedUpdate(Reason.NOT_FINITE, f"{self.name} payload holds NaN, infinity or absurd values")
        return Dense(values)


FLOAT32 = DenseCodec("float32", "<f4")
FLOAT16 = DenseCodec("float16", "<f2")
