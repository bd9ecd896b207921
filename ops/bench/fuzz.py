"""Hostile payloads for every codec: a delta or `RejectedUpdate`, finite, in bounded memory; nothing else.

Valid encodings are cut, stretched, overwritten and recombined; behind zstd the plain bytes are, and compressed again,
so that the inner decoder is reached; frames that announce or hold far too much, and parameters of every wrong kind, are
mixed in. An input is a function of (codec, seed, its number): a failure prints what repeats it.
"""

import math
import random
import time
import tracemalloc
import zlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import zstandard

from shared.compression import decode, parse
from shared.compression.codec import Params
from shared.compression.registry import EXAMPLES
from shared.errors import Reason, RejectedUpdate
from shared.layout import Layout

TENSORS = [
    ("matrix", (40, 30), "float32"), ("bias", (30,), "float32"), ("odd", (7, 211), "float32"), ("b", (1,), "float32"),
]  # fmt: skip
LAYOUT = Layout.of(TENSORS)  # two tensors in the body, of no round size, and two small ones between
SEEDS = 6  # valid encodings that are spoiled
MEMORY_BYTES_MAX = 4_000_000  # what one input may take: a few slabs; 1 % of inputs and all bombs are measured
MEASURED = 0.01
PAYLOAD_REASONS = (Reason.CODEC, Reason.NOT_FINITE, Reason.TOO_LARGE)
DETAIL_CHARS_MAX = 500


@dataclass(slots=True)
class FuzzResult:
    """What became of the inputs.

    Attributes:
        inputs: how many there were.
        rejected: refused with a reason.
        accepted: harmless: decoded to a finite delta.
        slowest_s: the longest any took to decode and add.
        reasons: how many were refused for each reason.
    """

    inputs: int
    rejected: int = 0
    accepted: int = 0
    slowest_s: float = 0.0
    reasons: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True, slots=True)
class Valid:
    """A valid encoding: its plain bytes, before zstd, and its parameters."""

    plain: bytes
    params: dict[str, object]


def fuzz(name: str, inputs: int, seed: int) -> FuzzResult:
    """Throw hostile inputs at one codec.

    Args:
        name: a pipeline or preset.
        inputs: how many; 100,000 take 5 to 15 s.
        seed: of everything.

    Raises:
        AssertionError: an input did anything but be refused or decode to a finite delta; it says how to repeat it.
    """
    codec = parse(name)
    valid = valid_encodings(name)
    total, result = np.zeros(LAYOUT.num_params, np.float32), FuzzResult(inputs)
    base = zlib.crc32(codec.name.encode()) << 64 | seed << 32
    for number in range(inputs):
        rng = random.Random(base + number)  # noqa: S311 - inputs are to be repeated, not to be secret
        payload, params, bomb = _hostile(rng, valid, codec.zstd)
        traced = bomb or rng.random() < MEASURED
        total.fill(0)
        if traced:
            tracemalloc.start()
        start = time.perf_counter()
        try:
            decoded = decode({**params, "name": codec.name}, payload, LAYOUT)  # type: ignore[dict-item]
            decoded.add_into(total, 0.5)
            sound = bool(np.isfinite(total).all()) and math.isfinite(decoded.squared_norm())
            outcome = "accepted"
        except RejectedUpdate as error:
            sound = error.reason in PAYLOAD_REASONS and 0 < len(error.detail) <= DETAIL_CHARS_MAX
            outcome = str(error.reason)
        except Exception as error:
            raise AssertionError(_repeat(codec.name, seed, number, payload, params, repr(error))) from error
        finally:
            result.slowest_s = max(result.slowest_s, time.perf_counter() - start)
            peak = tracemalloc.get_traced_memory()[1] if traced else 0
            if traced:
                tracemalloc.stop()
        if not sound or peak > MEMORY_BYTES_MAX:
            raise AssertionError(_repeat(codec.name, seed, number, payload, params, f"{outcome}, {peak} bytes"))
        if outcome == "accepted":
            result.accepted += 1
        else:
            result.rejected += 1
            result.reasons[outcome] += 1
    return result


def _repeat(name: str, seed: int, number: int, payload: bytes, params: Params | dict[str, object], what: str) -> str:
    return (
        f"codec {name!r}, seed {seed}, input {number}: {what}; params {params!r:.300}, "
        f"payload of {len(payload)} bytes: {payload[:4000].hex()}"
    )


def valid_encodings(name: str) -> list[Valid]:
    """Encode deltas of several kinds with a codec: Gaussian, heavy-tailed, sparse, zero, constant, tiny."""
    codec, size, found = parse(name), LAYOUT.num_params, []
    for kind in range(SEEDS):
        rng = np.random.default_rng(kind)
        normal = rng.standard_normal(size)
        deltas = (
            normal, normal * np.exp(3 * rng.standard_normal(size)), normal * (rng.random(size) < 0.02),
            np.zeros(size), np.ones(size), 1e-9 * normal,
        )  # fmt: skip
        encoded = codec.encode(deltas[kind].astype(np.float32), LAYOUT, rng)
        plain = zstandard.decompress(encoded.payload) if codec.zstd else encoded.payload
        found.append(Valid(plain, dict(encoded.params)))
    return found


def _hostile(rng: random.Random, valid: list[Valid], zstd: bool) -> tuple[bytes, dict[str, object], bool]:
    """Return a payload, its parameters, and whether it is a bomb."""
    chosen = rng.choice(valid)
    plain, params = chosen.plain, dict(chosen.params)
    kind = rng.random()
    if kind < 0.2 and params:
        params = _wrong_params(rng, params)
    if kind < 0.1 and params:
        pass  # nothing else is wrong
    else:
        for _ in range(rng.choice((1, 1, 1, 2, 3))):
            plain = rng.choice(MUTATIONS)(rng, plain, rng.choice(valid).plain)
    if not zstd:
        return plain, params, False
    if rng.random() < 0.01:
        return rng.choice(BOMBS), params, True
    payload = compress(plain, known_size=rng.random() < 0.8)
    if rng.random() < 0.2:
        payload = rng.choice(MUTATIONS)(rng, payload, b"")
    return payload, params, False


def compress(plain: bytes, known_size: bool) -> bytes:
    """Compress at level 1, with or without the size in the frame's header."""
    if known_size:
        return _COMPRESSOR.compress(plain)
    compressor = _COMPRESSOR.compressobj()
    return compressor.compress(plain) + compressor.flush()


def _cut(rng: random.Random, plain: bytes, other: bytes) -> bytes:
    return plain[: rng.randrange(len(plain) + 1)] if rng.random() < 0.5 else plain[: max(0, len(plain) - 1)]


def _stretch(rng: random.Random, plain: bytes, other: bytes) -> bytes:
    return plain + rng.choice((b"\0", b"\xff", rng.randbytes(rng.randrange(1, 40)), plain, bytes(20_000)))


def _flip(rng: random.Random, plain: bytes, other: bytes) -> bytes:
    spoiled = bytearray(plain or b"\0")
    for _ in range(rng.choice((1, 1, 2, 8, 64))):
        spoiled[_place(rng, len(spoiled))] ^= 1 << rng.randrange(8)
    return bytes(spoiled)


def _overwrite(rng: random.Random, plain: bytes, other: bytes) -> bytes:
    """Put special floats and numbers, or noise, over a stretch; the size stays."""
    patch = rng.choice((*PATCHES, rng.randbytes(rng.choice((1, 2, 4, 5, 16, 256)))))
    at = _place(rng, max(1, len(plain)))
    return (plain[:at] + patch + plain[at + len(patch) :])[: len(plain)]


def _noise(rng: random.Random, plain: bytes, other: bytes) -> bytes:
    return rng.randbytes(rng.choice((0, 1, 2, 3, 4, 5, 9, len(plain), rng.randrange(2 * len(plain) + 2))))


def _fill(rng: random.Random, plain: bytes, other: bytes) -> bytes:
    """Overwrite all from some place on with one byte."""
    at = rng.choice((0, _place(rng, max(1, len(plain)))))
    return plain[:at] + rng.choice((b"\0", b"\xff", b"\x7f", b"\x80", b"\x01")) * (len(plain) - at)


def _splice(rng: random.Random, plain: bytes, other: bytes) -> bytes:
    """Join the head of one encoding and the tail of another."""
    at = _place(rng, max(1, len(plain)))
    return plain[:at] + other[at:]


def _delete(rng: random.Random, plain: bytes, other: bytes) -> bytes:
    """Take some bytes out, as a count that is too small would."""
    at = _place(rng, max(1, len(plain)))
    return plain[:at] + plain[at + rng.choice((1, 2, 4, 5)) :]


def _place(rng: random.Random, length: int) -> int:
    """Return a position: often where heads and counts stand, near the start or after the small tensors."""
    near = rng.choice((0, 0, SMALL_BYTES, SMALL_BYTES, length - 8, rng.randrange(length)))
    return min(max(0, near + rng.randrange(24)), length - 1) if rng.random() < 0.7 else rng.randrange(length)


def _wrong_params(rng: random.Random, params: dict[str, object]) -> dict[str, object]:
    key = rng.choice(sorted(params))
    value = params[key]
    near = [value + 1, value - 1, -value, value * 2**20, float(value)] if isinstance(value, int | float) else []
    spoiled = params | {key: rng.choice((*WRONG_VALUES, *near))}
    if rng.random() < 0.15:
        del spoiled[key]
    return spoiled


_COMPRESSOR = zstandard.ZstdCompressor(level=1)
SMALL_BYTES = 4 + 2 * 31  # of the float16 section in front, where there is one
MUTATIONS: tuple[Callable[[random.Random, bytes, bytes], bytes], ...] = (
    _cut, _stretch, _flip, _flip, _flip, _overwrite, _overwrite, _overwrite, _noise, _fill, _splice, _delete,
)  # fmt: skip
PATCHES = (
    *(np.array(x, "<f4").tobytes() for x in (math.nan, math.inf, -math.inf, -1, -0.0, 3e38, 1e16, 1.1e16, 1e-45)),
    *(np.array(x, "<f2").tobytes() for x in (math.nan, math.inf, -math.inf, -1, -0.0, 1.001, 65504)),
    *(np.array(x, "<u4").tobytes() for x in (0, 1, 2**16, 2**31 - 1, 2**31, 2**32 - 1)),
    *(np.array([x] * 8, "<i2").tobytes() for x in (32767, -32768)),
    b"\x01", b"\x02", b"\x07", b"\x7f", b"\x20", b"\x21", b"\xff\xff\xff\xff\xff\xff\xff\xff",
)  # fmt: skip
WRONG_VALUES: tuple[object, ...] = (
    math.nan, math.inf, -math.inf, -1.0, -1e-30, -0.0, 0, 0.0, 1e16, 1.1e16, 1e300, 5e-324, 1e-40, -1, 1, 2**31,
    2**32 - 1, 2**32, 2**63, -(2**63), 2**64 - 1, 10**400, True, False, None, "", "1", "nan", b"1", [], [1], {},
    "x" * 10_000,
)  # fmt: skip


def _announcing(size: int) -> bytes:
    """Write a frame header that announces any size, and one empty last block."""
    return b"\x28\xb5\x2f\xfd\xe0" + size.to_bytes(8, "little") + b"\x01\x00\x00"


BOMBS = (
    compress(bytes(2**26), known_size=True), compress(bytes(2**26), known_size=False),
    _announcing(2**40), _announcing(2**64 - 1), _announcing(2**64 - 2), _announcing(2**64 - 3), _announcing(0),
    compress(b"", known_size=True), compress(b"", known_size=False),
    b"\x28\xb5\x2f\xfd\x00\xf8\x01\x00\x00",  # a window of 2^41 bytes, no size, an empty block
    b"\x50\x2a\x4d\x18\x04\x00\x00\x00abcd",  # a frame to be skipped
    compress(b"ab", known_size=True) * 2,
)  # fmt: skip


def run(inputs: int, seed: int) -> None:
    """Fuzz every codec and print a row each; a failure ends with what repeats it.

    Args:
        inputs: for each codec.
        seed: of everything random.
    """
    print("| codec | inputs | rejected | decoded to something finite | slowest, ms |\n|---|---:|---:|---:|---:|")
    for name in EXAMPLES:
        result = fuzz(name, inputs, seed)
        print(
            f"| `{name.replace('|', chr(92) + '|')}` | {result.inputs:,} | {result.rejected:,} | {result.accepted:,} "
            f"| {1e3 * result.slowest_s:.1f} |", flush=True,
        )  # fmt: skip
