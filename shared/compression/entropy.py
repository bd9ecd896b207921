"""zstd: what the stages before left regular is squeezed out.

Two settings of its fastest strategy, and the smaller of both on a sample of the payload:

- `REPEATS` searches for repetitions of seven bytes, with a table somewhat larger than level 1's. Rows of a real local
  update resemble each other (its matrices are of low rank): the payload gets up to a third *smaller* than the order-0
  entropy of its symbols.
- `LITERALS` hardly searches (a table of 64 entries) and leaves all to the Huffman code. What looks like noise gets 1 to
  6 % smaller than by level 1, which pays for chance repetitions, within 3 % of the entropy, at twice the speed.

Higher levels gain a few per cent more and cost ten times the time: `ops/bench/README.md`. (Format: RFC 8878.)
"""

import zstandard

from shared.errors import Reason, RejectedUpdate

SAMPLE_BYTES = 2**17  # on which the settings are tried, from the middle; a smaller payload is compressed with both
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


def compress(plain: bytes) -> bytes:
    """Compress into one frame that tells its size."""
    middle = max(0, len(plain) - SAMPLE_BYTES) // 2
    sample = memoryview(plain)[middle : middle + SAMPLE_BYTES]
    literal, repeated = _compress(sample, LITERALS), _compress(sample, REPEATS)
    if len(sample) == len(plain):
        return min(literal, repeated, key=len)
    return _compress(plain, LITERALS if len(literal) <= len(repeated) else REPEATS)


def _compress(plain: bytes | memoryview, settings: zstandard.ZstdCompressionParameters) -> bytes:
    return zstandard.ZstdCompressor(compression_params=settings).compress(plain)


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
