"""zstd: what the stages before left regular is squeezed out.

Two settings of its fastest strategy, and the smaller of both on a sample of the payload:

- `REPEATS` searches for repetitions of seven bytes, with a table somewhat larger than level 1's. Rows of a real local
  update resemble each other (its matrices are of low rank): the payload gets up to a third *smaller* than the order-0
  entropy of its symbols.
- `LITERALS` hardly searches (a table of 64 entries) and leaves all to the Huffman code. What looks like noise gets 1 to
  6 % smaller than by level 1, which pays for chance repetitions, within 3 % of the entropy, at twice the speed.

Each piece of the payload starts a block: float16 tensors, positions and symbols do not share a Huffman code, which
saves up to 15 % of a small payload. Higher levels gain a few per cent more and cost ten times the time (RFC 8878;
measured in `ops/bench/README.md`).
"""

from collections.abc import Sequence

import zstandard

from shared.compression.quantizer import Piece
from shared.errors import Reason, RejectedUpdate

SAMPLE_BYTES = 2**17  # on which the settings are tried, from the middle; a smaller payload is compressed with both
BLOCK_BYTES_MIN = 512  # a block of its own costs a Huffman table, about 100 bytes
WINDOW_BYTES_MAX = 2**23  # what a decoder may be asked to hold besides its output; the format's recommended minimum


def _settings(window_log: int, hash_log: int) -> zstandard.ZstdCompressionParameters:
    return zstandard.ZstdCompressionParameters(
        strategy=zstandard.STRATEGY_FAST, window_log=window_log, hash_log=hash_log, chain_log=6, search_log=1,
        min_match=7, target_length=0,
    )  # fmt: skip


REPEATS, LITERALS = _settings(20, 16), _settings(17, 6)


def compressed_bytes_max(plain: int) -> int:
    """Return the largest frame zstd makes of incompressible input (its documented bound)."""
    return plain + plain // 256 + 64


def compress(pieces: Sequence[Piece]) -> bytes:
    """Compress pieces into one frame that tells its size; no need to join them before."""
    flat = [memoryview(piece).cast("B") for piece in pieces if len(piece)]
    if sum(map(len, flat)) <= SAMPLE_BYTES:
        return min(_frame(flat, LITERALS), _frame(flat, REPEATS), key=len)
    largest = max(flat, key=len)
    middle = max(0, len(largest) - SAMPLE_BYTES) // 2
    sample = [largest[middle : middle + SAMPLE_BYTES]]
    literal, repeated = len(_frame(sample, LITERALS)), len(_frame(sample, REPEATS))
    return _frame(flat, LITERALS if literal <= repeated else REPEATS)


def literal_bytes(pieces: Sequence[Piece]) -> int:
    """Return how small pieces get without any repetition: for choosing between ways to write the same numbers."""
    return len(_frame([memoryview(piece).cast("B") for piece in pieces if len(piece)], LITERALS))


def _frame(pieces: list[memoryview], settings: zstandard.ZstdCompressionParameters) -> bytes:
    """Write a frame in which pieces of some size have blocks, and so Huffman codes, of their own."""
    left = sum(map(len, pieces))
    stream = zstandard.ZstdCompressor(compression_params=settings).compressobj(size=left)
    written = []
    for piece in pieces:
        written.append(stream.compress(piece))
        left -= len(piece)
        if min(len(piece), left) >= BLOCK_BYTES_MIN:
            written.append(stream.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK))
    written.append(stream.flush())
    return b"".join(written)


def decompress(payload: bytes | memoryview, bytes_max: int) -> bytes:
    """Decompress one frame of at most `bytes_max` bytes: a bomb costs nothing.

    Raises:
        RejectedUpdate: damaged, larger than it may be, or followed by something.
    """
    decompressor = zstandard.ZstdDecompressor(max_window_size=WINDOW_BYTES_MAX)
    try:
        announced = zstandard.frame_content_size(payload)
        if announced > bytes_max:
            raise RejectedUpdate(Reason.TOO_LARGE, f"zstd frame of {announced} bytes where at most {bytes_max} are due")
        return decompressor.decompress(payload, max_output_size=max(1, bytes_max), allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise RejectedUpdate(Reason.CODEC, f"zstd: {error}") from error
