"""eden(b): Lloyd-Max centroids of a Gaussian, b = 1 to 4 bits, for rotated values (`rotate | eden(2)`).

    c = nearest centroids of R sqrt(B) / ||R||,    x ~ S c,   S = ||R||^2 / <c, R>

One S per block of the rotation. With that S it is unbiased where R is Gaussian, which the rotation sees to, with error
0.571, 0.133, 0.036, 0.0096 of ||x||^2 at 1 to 4 bits (EDEN's numbers for a Gaussian, whatever the input was).

Payload: float32 S [blocks], then the codes: whole ones in each byte, the first in the low bits, so that zstd finds
what is left to gain (4 to 6 %); those of 3 bits in planes.

Source: Vargaftik et al., EDEN, arXiv:2108.08842, algorithm 1; DRIVE, arXiv:2105.08339, theorem 2.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from shared.compression.bits import from_planes, plane_bytes, to_planes
from shared.compression.codec import Params
from shared.compression.quantizer import Quantized, Written, exactly, read_scales
from shared.compression.rotate import BLOCK, TAIL_BLOCK
from shared.compression.tensors import Indices, Values
from shared.vector import Vector

_POSITIVE = {
    1: (0.7978845608028654,),
    2: (0.4527800398860679, 1.5104176087114887),
    3: (0.24509416307340598, 0.7560052489539643, 1.3439092613750225, 2.151945669890335),
    4: (
        0.12839501671105813, 0.38804823445328507, 0.6567589957631145, 0.9423402689122875,
        1.2562309480263467, 1.6180460517130526, 2.069016730231837, 2.732588804065177,
    ),
}  # fmt: skip
CENTROIDS = {bits: np.array([-c for c in reversed(half)] + list(half), np.float32) for bits, half in _POSITIVE.items()}
# byte -> its centroids [256, 8 / bits]
_TABLES = {bits: CENTROIDS[bits][np.arange(256)[:, None] >> np.arange(0, 8, bits) & 2**bits - 1] for bits in (1, 2, 4)}
_SMALLEST = 1e-30  # a block with a smaller norm is zero


@dataclass(frozen=True, slots=True)
class EdenValues:
    """Decoded centroids, still rotated."""

    codes: npt.NDArray[np.uint8]  # bytes of the payload
    scales: Vector
    bits: int
    count: int

    def inflate(self, start: int, stop: int, weight: float, out: Vector) -> None:
        """Look centroids up and multiply each block by its S."""
        if self.bits in _TABLES:
            table, packed = _TABLES[self.bits], self.codes[start * self.bits // 8 : stop * self.bits // 8]
            np.take(table, packed, axis=0, out=out.reshape(len(packed), -1), mode="clip")
        else:
            codes = from_planes(self.codes, self.bits, self.count, start, stop, np.uint8)
            np.take(CENTROIDS[self.bits], codes, out=out, mode="clip")
        for first, last, order, index in _blocks(start, stop, self.count):
            rows = out[first:last].reshape(-1, order)
            np.multiply(rows, self.scales[index : index + len(rows), None] * np.float32(weight), out=rows)


@dataclass(frozen=True, slots=True)
class EdenQuantizer:
    """Centroids of b bits."""

    bits: int
    unbiased: bool = True
    contraction: bool = True  # its error is below ||x||^2

    @property
    def name(self) -> str:
        """Its stage in the codec's string."""
        return f"eden({self.bits})"

    def bytes_max(self, count: int, tensors: int) -> int:
        """Return the exact size."""
        return 4 * _block_count(count) + self.bits * plane_bytes(count)

    def encode(self, values: Values, rng: np.random.Generator) -> Written:
        """Take the nearest centroids; deterministic."""
        centroids = CENTROIDS[self.bits]
        edges = (centroids[1:] + centroids[:-1]) / 2
        codes = np.zeros(values.size, np.uint8)
        scales = np.zeros(_block_count(values.size), "<f4")
        for start, x in values.slabs():
            for first, last, order, index in _blocks(start, start + x.size, values.size):
                rows = x[first:last].reshape(-1, order)
                norms = np.sqrt(np.einsum("ij,ij->i", rows, rows))
                norms[norms < _SMALLEST] = 0
                normal = rows * (np.sqrt(order) / np.where(norms > 0, norms, 1))[:, None].astype(np.float32)
                code = codes[start + first : start + last].reshape(-1, order)
                for edge in edges:
                    code += normal > edge
                products = np.einsum("ij,ij->i", centroids[code], rows)
                scales[index : index + len(rows)] = np.divide(
                    norms**2, products, out=np.zeros(len(rows), np.float32), where=products > 0
                )
        return Written((scales.data, _pack(codes, self.bits)), {})

    def decode(self, payload: memoryview, params: Params, count: int, ends: Indices) -> Quantized:
        """Check size and scales; the codes cannot be wrong."""
        exactly(self.name, payload, self.bytes_max(count, 0))
        blocks = _block_count(count)
        codes = np.frombuffer(payload, np.uint8, offset=4 * blocks)
        return EdenValues(codes, read_scales(self.name, payload, blocks), self.bits, count)


def _pack(codes: npt.NDArray[np.uint8], bits: int) -> bytes:
    """Put codes into bytes; there are a multiple of 256."""
    if bits not in _TABLES:
        return to_planes(codes, bits)
    per = 8 // bits
    packed = codes[0::per].copy()
    for part in range(1, per):
        packed |= codes[part::per] << (bits * part)
    return packed.tobytes()


def _block_count(count: int) -> int:
    return count // BLOCK + -(-(count % BLOCK) // TAIL_BLOCK)


def _blocks(start: int, stop: int, count: int) -> list[tuple[int, int, int, int]]:
    """Return (from, to, order, first block) of the stretches of equal blocks; from and to relative to `start`."""
    whole = count // BLOCK * BLOCK
    middle = min(max(whole, start), stop)
    stretches = [(0, middle - start, BLOCK, start // BLOCK)]
    stretches += [(middle - start, stop - start, TAIL_BLOCK, whole // BLOCK + (middle - whole) // TAIL_BLOCK)]
    return [stretch for stretch in stretches if stretch[1] > stretch[0]]
