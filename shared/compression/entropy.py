"""zstd behind another codec: what the quantiser left regular is squeezed out.

Level 1: on packed integers higher levels gain under 1 % and cost several times the time (RFC 8878;
algorithms notes, section 2.3).
"""

from dataclasses import dataclass

import numpy as np
import zstandard

from shared.compression.codec import Codec, Decoded, Encoded, Params
from shared.errors import Reason, RejectedUpdate
from shared.vector import Vector

LEVEL = 1
WINDOW_BYTES_MAX = 2**23  # what a decoder may be asked to hold besides its output; the format's recommended minimum


@dataclass(frozen=True, slots=True)
class ZstdCodec:
    """`inner | zstd`. Decompression stops at the size the inner codec implies: a bomb costs nothing."""

    inner: Codec

    @property
    def name(self) -> str:
        """The inner codec's name and ours."""
        return f"{self.inner.name} | zstd"

    def payload_bytes(self, num_params: int) -> int:
        """Return the largest payload zstd makes of incompressible input (its documented bound)."""
        plain = self.inner.payload_bytes(num_params)
        return plain + plain // 256 + 64

    def encode(self, delta: Vector, rng: np.random.Generator) -> Encoded:
        """Encode, then compress."""
        plain = self.inner.encode(delta, rng)
        return Encoded(zstandard.ZstdCompressor(level=LEVEL).compress(plain.payload), plain.params)

    def decode(self, payload: bytes | memoryview, params: Params, num_params: int) -> Decoded:
        """Decompress to exactly the inner payload's size, then decode that."""
        size = self.inner.payload_bytes(num_params)
        decompressor = zstandard.ZstdDecompressor(max_window_size=WINDOW_BYTES_MAX)
        try:
            announced = zstandard.frame_content_size(payload)
            if announced not in (-1, size):
                raise RejectedUpdate(Reason.TOO_LARGE, f"zstd frame of {announced} bytes where {size} are expected")
            plain = decompressor.decompress(payload, max_output_size=size, allow_extra_data=False)
        except zstandard.ZstdError as error:
            raise RejectedUpdate(Reason.CODEC, f"{self.name}: {error}") from error
        return self.inner.decode(plain, params, num_params)
