"""Hostile messages of every codec, made with their structure in mind or without it.

A valid message is spoiled: fields replaced, left out, repeated, nested, announced larger than they are; the codec's
parameters made to lie; the payload damaged and its checksum made to fit, so that the decoder is reached; bytes flipped,
cut, spliced with another message's, replaced by garbage. A message is a function of (seed, its number).
"""

import math
import random
import struct
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import msgpack

from ops.bench.fuzz import BOMBS, LAYOUT, MUTATIONS, WRONG_VALUES, Valid, compress, valid_encodings
from shared.compression import parse
from shared.compression.registry import EXAMPLES
from shared.transport.ports import Delivery

JOB, CLIENT = "fuzz", "a"
BASE_VERSION, COMMITTED_VERSION = 2, 3
MESSAGE_BYTES_MAX = 2**20


@dataclass(frozen=True, slots=True)
class Raw:
    """Bytes that stand where msgpack would write a value."""

    packed: bytes


class Case(NamedTuple):
    """What a message is made from."""

    codec: str
    number: int  # last word of its update_id


@dataclass(frozen=True, slots=True)
class Hostile:
    """A message to be fed to admission."""

    delivery: Delivery
    kind: str


def hostile(seed: int, number: int) -> Hostile:
    """Make a message; the same for the same arguments.

    Args:
        seed: of a run.
        number: of the message; it also chooses the codec.
    """
    rng = random.Random(seed << 64 | number)  # noqa: S311 - to be repeated, not to be secret
    name = EXAMPLES[number % len(EXAMPLES)]
    kind = rng.choices(tuple(KINDS), [weight for weight, _ in KINDS.values()])[0]
    body = KINDS[kind][1](rng, Case(name, number))
    client = CLIENT if rng.random() < 0.98 else rng.choice(IDS)
    user_id = None if rng.random() < 0.95 else rng.choice((CLIENT, *IDS))
    own = f"{CLIENT}/i/{number}"
    update_id = own if rng.random() < 0.95 else rng.choice(("", "x" * 255, f"{own}\n", "a/i/0", rng.choice(IDS)))
    proof = rng.choices((None, zlib.crc32(body), rng.choice((0, -1, 2**32 - 1, 2**63, True))), (50, 48, 2))[0]
    part = b"payload_bytes" in body if rng.random() < 0.98 else rng.random() < 0.5
    return Hostile(Delivery(body, client, user_id, update_id, (0, number), is_part=part, crc32=proof), kind)


def sound(codec: str, number: int = 0) -> bytes:
    """Return a sound message.

    Args:
        codec: of its payload.
        number: last word of its update_id.
    """
    return _pack(_record(Case(codec, number), 0))


@cache
def _valid(name: str) -> list[Valid]:
    return valid_encodings(name)


def _record(
    case: Case, index: int, plain: bytes | None = None, params: dict[str, object] | None = None
) -> dict[str, Any]:
    """Return a sound message as the contract's map.

    Args:
        case: its codec and its number.
        index: which of the valid encodings.
        plain: takes the place of its bytes before zstd.
        params: take the place of its parameters.
    """
    valid = _valid(case.codec)[index]
    plain = valid.plain if plain is None else plain
    payload = compress(plain, known_size=True) if parse(case.codec).zstd else plain
    return {
        "format": 1, "job": JOB, "client": CLIENT, "update_id": f"{CLIENT}/i/{case.number}",
        "base_version": BASE_VERSION, "num_samples": 100, "num_steps": 10, "layout": LAYOUT.hash,
        "codec": {"name": case.codec, **(valid.params if params is None else params)}, "payload": payload,
        "metrics": {"loss": 0.5}, "train_seconds": 1.0, "created_at": 1.7e9, "checksum": zlib.crc32(payload),
    }  # fmt: skip


def _any(rng: random.Random, case: Case) -> dict[str, Any]:
    return _record(case, rng.randrange(len(_valid(case.codec))))


def _pack(record: dict[Any, Any] | Sequence[tuple[Any, Any]]) -> bytes:
    """Write pairs as a msgpack map: keys may repeat, values may be raw."""
    pairs = list(record.items()) if isinstance(record, dict) else list(record)
    packer = msgpack.Packer(use_bin_type=True)
    parts = [packer.pack_map_header(len(pairs))]
    parts += [part.packed if isinstance(part, Raw) else packer.pack(part) for pair in pairs for part in pair]
    return b"".join(parts)


# --- kinds of damage -------------------------------------------------------------------------------------------------


def _sound(rng: random.Random, case: Case) -> bytes:
    """Change nothing, or only to other values that are allowed."""
    record = _any(rng, case)
    for key in rng.sample(sorted(ALLOWED), rng.randrange(4)):
        record[key] = rng.choice(ALLOWED[key])
    return _pack(record)


def _fields(rng: random.Random, case: Case) -> bytes:
    """Put hostile values into fields."""
    record = _any(rng, case)
    for key in rng.sample(sorted(record), rng.choice((1, 1, 1, 2, 3))):
        record[key] = rng.choice(VALUES)
    return _pack(record)


def _near(rng: random.Random, case: Case) -> bytes:
    """Put a value that is just not, or just still, allowed into a field."""
    record = _any(rng, case)
    key = rng.choice(sorted(NEAR))
    record[key] = rng.choice(NEAR[key])
    if key == "payload" and isinstance(record[key], bytes) and rng.random() < 0.5:
        record["checksum"] = zlib.crc32(record[key])
    return _pack(record)


def _missing(rng: random.Random, case: Case) -> bytes:
    """Leave fields out, add others, repeat some, reorder all."""
    pairs: list[tuple[Any, Any]] = list(_any(rng, case).items())
    for _ in range(rng.choice((1, 1, 2))):
        action = rng.randrange(4)
        if action == 0:
            del pairs[rng.randrange(len(pairs))]
        elif action == 1:
            pairs.append((rng.choice((*KEYS, *PART_FIELDS)), rng.choice(VALUES)))
        elif action == 2:
            pairs.insert(rng.randrange(len(pairs)), (rng.choice(pairs)[0], rng.choice(VALUES)))
        else:
            rng.shuffle(pairs)
    return _pack(pairs)


def _parts(rng: random.Random, case: Case) -> bytes:
    """Claim to be a part of a larger update, soundly or not."""
    record = _any(rng, case)
    payload = record["payload"]
    count = rng.choice((1, 2, 3, 7))
    size = -(-len(payload) // count)
    index = rng.randrange(count)
    record["payload"] = payload[index * size : (index + 1) * size]
    record |= {"checksum": zlib.crc32(record["payload"]), "part": index, "parts": count, "payload_bytes": len(payload)}
    for key in PART_FIELDS:
        if rng.random() < 0.3:
            record[key] = rng.choice((*NUMBERS, *VALUES))
    if rng.random() < 0.2:
        del record[rng.choice(PART_FIELDS)]
    return _pack(record)


def _lying_codec(rng: random.Random, case: Case) -> bytes:
    """Give the codec another name or other parameters than the payload was written with."""
    record = _any(rng, case)
    codec = record["codec"]
    kind = rng.random()
    if kind < 0.4:
        record["codec"] = codec | {"name": rng.choice((rng.choice(EXAMPLES), *NAMES))}
    elif kind < 0.5:
        record["codec"] = {key: value for key, value in codec.items() if key != rng.choice(sorted(codec))}
    elif kind < 0.6:
        names = (f"{index}{'x' * rng.choice((1, 5000))}" for index in range(rng.choice((1, 63, 70))))
        record["codec"] = codec | {name: rng.choice(PACKABLE) for name in names}
    else:
        key = rng.choice((*codec, "scale", "seed", "kept", "draw"))
        record["codec"] = codec | {key: rng.choice(PACKABLE)}
    return _pack(record)


def _payload(rng: random.Random, case: Case) -> bytes:
    """Damage what the decoder reads; the checksum fits."""
    valid = _valid(case.codec)
    chosen = rng.choice(valid)
    plain = chosen.plain
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        plain = rng.choice(MUTATIONS)(rng, plain, rng.choice(valid).plain)
    record = _record(case, 0, plain, chosen.params)
    if parse(case.codec).zstd and rng.random() < 0.2:
        damaged = rng.choice(MUTATIONS)(rng, record["payload"], b"") if rng.random() < 0.9 else rng.choice(BOMBS)
        record |= {"payload": damaged, "checksum": zlib.crc32(damaged)}
    return _pack(record)


def _bits(rng: random.Random, case: Case) -> bytes:
    """Flip single bits of the payload as it travels; the checksum fits in half of them."""
    record = _any(rng, case)
    payload = bytearray(record["payload"])
    for _ in range(rng.choice((1, 1, 2, 5, 40))):
        payload[rng.randrange(len(payload))] ^= 1 << rng.randrange(8)
    record["payload"] = bytes(payload)
    if rng.random() < 0.75:
        record["checksum"] = zlib.crc32(payload)
    return _pack(record)


def _announced(rng: random.Random, case: Case) -> bytes:
    """Announce more than there is: strings, binaries, arrays and maps of any length, nested for ever."""
    record = _any(rng, case)
    key = rng.choice(sorted(record))
    length = rng.choice((1, 255, 2**16, 2**20, 2**24, 2**31 - 1, 2**31, 2**32 - 1))
    head = rng.choice(HEADS)
    announced = head + length.to_bytes(4, "big") + rng.randbytes(rng.choice((0, 1, 100)))
    depth = rng.choice((1, 10, 511, 512, 1023, 1024, 1025, 5000, 100_000))
    nested = rng.choice((b"\x81\xa1a", b"\x91", b"\x81\x80"))
    record[key] = Raw(announced if rng.random() < 0.6 else nested * depth + b"\xc0")
    if rng.random() < 0.1:
        return rng.choice((announced, nested * depth, nested * depth + b"\xc0"))
    return _pack(record)


def _wide(rng: random.Random, case: Case) -> bytes:
    """Fill a map or a string to its limit and beyond."""
    record = _any(rng, case)
    count, chars = rng.choice((1, 63, 64, 65, 1000, 20_000)), rng.choice((1, 63, 64, 65, 200, 5000))
    names = (f"{index:05d}".ljust(chars, "m") if chars > 5 else index for index in range(min(count, 10**6 // chars)))
    many = dict.fromkeys(names, 1.5)
    key = rng.choice(("metrics", "metrics", "codec", "layout", "job", "extra"))
    record[key] = many if key in ("metrics", "codec", "extra") else "x" * min(count * chars, 10**6)
    if rng.random() < 0.1:
        record[rng.choice(("metrics", "codec", "extra"))] = Raw(_tree(rng.choice((0, 1, 2))))
    return _pack(record)


@cache
def _tree(levels: int) -> bytes:
    """Write maps of 60 maps, 3 bytes each on the lowest level, 30 times that in memory; level 2 is of 0.66 MB."""
    inner = _tree(levels - 1) if levels else b"\x80"
    return b"\xde\x00\x3c" + b"".join(bytes([0xA1, 48 + index]) + inner for index in range(60))


def _flipped(rng: random.Random, case: Case) -> bytes:
    """Overwrite bytes anywhere: often in the envelope."""
    body = bytearray(_pack(_any(rng, case)))
    for _ in range(rng.choice((1, 1, 2, 8, 64))):
        at = rng.randrange(min(len(body), 400)) if rng.random() < 0.7 else rng.randrange(len(body))
        body[at] = rng.randrange(256)
    return bytes(body)


def _cut(rng: random.Random, case: Case) -> bytes:
    """Cut anywhere, or append."""
    body = _pack(_any(rng, case))
    if rng.random() < 0.8:
        return body[: rng.randrange(len(body))]
    return body + rng.choice((b"\0", b"\xc0", body, rng.randbytes(50), bytes(MESSAGE_BYTES_MAX)))


def _spliced(rng: random.Random, case: Case) -> bytes:
    """Join the head of one message and the tail of another one's, of another codec."""
    one, two = _pack(_any(rng, case)), _pack(_any(rng, Case(rng.choice(EXAMPLES), case.number)))
    return one[: rng.randrange(len(one))] + two[rng.randrange(len(two)) :]


def _garbage(rng: random.Random, case: Case) -> bytes:
    """Noise, alone or behind a sound beginning."""
    noise = rng.randbytes(rng.choice((0, 1, 2, 10, 100, 1000, 30_000)))
    return noise if rng.random() < 0.5 else _pack(_any(rng, case))[: rng.randrange(300)] + noise


KINDS: dict[str, tuple[int, Callable[[random.Random, Case], bytes]]] = {  # kind -> share, how it is made
    "sound": (4, _sound), "fields": (16, _fields), "near": (10, _near), "missing": (6, _missing), "parts": (8, _parts),
    "codec": (12, _lying_codec), "payload": (16, _payload), "bits": (10, _bits), "announced": (6, _announced),
    "wide": (2, _wide), "flipped": (6, _flipped), "cut": (4, _cut), "spliced": (3, _spliced), "garbage": (3, _garbage),
}  # fmt: skip

PART_FIELDS = ("part", "parts", "payload_bytes")
IDS = (
    "", "b", "A", "a" * 64, "a" * 65, "a/b", "../a", "a b", "a\n", "a\0", "\u202ea", "ä", "\ud7ff", "😀" * 20, "a." * 9,
    "update.fuzz.a", "*", "#", "%s", "{0}", "NaN", "a" * 5000,
)  # fmt: skip
NUMBERS = (
    0, 1, -1, 2, 2**7, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 10**9, 10**9 + 1, 2**53, 2**53 + 1, 2**63 - 1,
    2**63, 2**64 - 1, -(2**31), -(2**63), 0.0, -0.0, 0.5, 1.0, 1e16, 1e38, 1e308, 5e-324, math.nan, math.inf, -math.inf,
)  # fmt: skip
NAMES = (
    "", " ", "morse", "auto", "int8 | int8", "zstd", "float32 | float32", "topk(1e9)", "topk(nan)", "topk(-1)",
    "uniform(step=0)", "uniform(step=1e400)", "qsgd(99999999999)", "eden(5) ", "rotate | eden(9)", "int8()",
    "int8(nearest, nearest)", "a" * 201, "(" * 100, "|" * 150, "topk(" + "9" * 180 + ")", "INT8", "int8\0",
    "\uff49nt8", "balanced", "tiny", "safe", "randomk(1e-9)", "topk(0.999999)", "topk(1e-9) | zstd",
    "uniform(step=1e-9)", "all | all | int8", "ef | ef | nf4",
)  # fmt: skip
PACKABLE = tuple(value for value in WRONG_VALUES if not isinstance(value, int) or -(2**63) <= value < 2**64)
KEYS = ("extra", "", "Format", "payload ", "weights", "__class__", "job\0", 1, -1, None, True, b"job", 1.5)
VALUES: tuple[Any, ...] = (
    *NUMBERS, *IDS, None, True, False, b"", b"\xff" * 40, [], {}, {"a": {"b": {"c": 1}}}, {"name": {}}, {"name": None},
    {"name": "int8", "scale": math.nan}, {1: 2}, {"": 1}, {"loss": math.nan}, {"loss": "0"}, {"loss": True},
    {"x" * 64: 1.0}, {"x" * 65: 1.0}, {"\u202e\0\n": 1}, {"loss": 2**64 - 1}, {"loss": -1e308}, {"loss": 5e-324},
    msgpack.ExtType(1, b"x"), msgpack.Timestamp(0, 0), msgpack.Timestamp(2**34 - 1, 1), msgpack.ExtType(42, bytes(300)),
    Raw(b"\xc1"), Raw(b"\xca\x7f\xc0\x00\x00"), Raw(b"\xa4\xff\xfe\xfd\xfc"), Raw(b"\xa3\xed\xa0\x80"),
    Raw(b"\xd9\x01"), Raw(struct.pack(">Bf", 0xCA, 1e-45)),
)  # fmt: skip
NEAR: dict[str, tuple[Any, ...]] = {
    "format": (0, 2, 1.0, True, "1", -1, 2**64 - 1),
    "base_version": (0, 1, 3, 4, -1, 2**53, 2**53 + 1, 2.0, True, "2"),
    "num_samples": (0, 1, 10**9, 10**9 + 1, -1, 1.0, True, "1", 2**63),
    "num_steps": (0, 1, 10**9, 10**9 + 1, -5, 2.0, True),
    "job": ("Fuzz", "fuzz ", "fuzz\0", "fuzz" * 17, b"fuzz"), "client": IDS,
    "layout": (LAYOUT.hash.upper(), LAYOUT.hash[:-1], LAYOUT.hash + "0", "0" * 64),
    "update_id": (
        "a/i/0", "b/i/0", "a/i", "a/i/0/0", "a/i/-1", "a/i/0 ", "a/i/\u0663", "a/i/" + "9" * 18, "a/i/" + "9" * 19,
        "a//0", "/i/0", f"a/{'i' * 64}/0", f"a/{'i' * 65}/0", "a/i/0\n", "\na/i/0", "a/i/00", "A/i/0", "a/i/0" * 60,
    ),
    "train_seconds": (0, 0.0, -0.0, -1e-300, 1e308, 2**64 - 1, math.nan, math.inf, True, "1", None),
    "created_at": (0, -1, 1e308, 5e-324, 2**63, math.inf, -math.inf, False, []),
    "metrics": (
        {}, {"a": 1}, {f"m{i}": i for i in range(64)}, {f"m{i}": i for i in range(65)}, {"a": True}, {"a": None},
        {1: 1}, [], None,
    ),
    "checksum": (0, -1, 2**32, 1.0, True, None, "0", b""), "payload": (b"", b"\0", "text", None, [], 0),
    "codec": ({}, {"name": "float32"}, {"name": "float32", "name2": 1}, "float32", None, [], {"name": b"float32"}),
}  # fmt: skip
ALLOWED: dict[str, tuple[Any, ...]] = {
    "base_version": (0, 1, 2, 3), "num_samples": (1, 2, 10**9), "num_steps": (1, 10**9),
    "train_seconds": (0, 1e-9, 1e300, 7), "created_at": (0, 1e300, 2**64 - 1),
    "metrics": ({}, {"loss": -1e308, "": 0}, {"x" * 64: 2**64 - 1, "\0\u202e": -0.0}),
    "update_id": ("a/i/0", f"a/{'z' * 64}/{'9' * 18}", "a/j/1"),
    "extra": (None, "x" * 1000, {"a": 1.5}, b"\0" * 1000, True),
}  # fmt: skip
HEADS = (b"\xc6", b"\xc9", b"\xdb", b"\xdd", b"\xdf")  # bin32, ext32, str32, array32, map32
