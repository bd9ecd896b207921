"""Codec names -> codecs: `stage`, `stage(option)`, stages joined by `|`."""

import re
from collections.abc import Callable
from functools import lru_cache

from shared.compression.block_int import BlockIntCodec
from shared.compression.codec import Codec, Decoded, Params
from shared.compression.dense import FLOAT16, FLOAT32
from shared.compression.entropy import ZstdCodec
from shared.errors import Reason, RejectedUpdate, SettingsError

NAME_CHARS_MAX = 200

QUANTIZERS: dict[str, Callable[[], Codec]] = {
    "float32": lambda: FLOAT32,
    "float16": lambda: FLOAT16,
    "int8": lambda: BlockIntCodec(8, "stochastic"),
    "int8(stochastic)": lambda: BlockIntCodec(8, "stochastic"),
    "int8(nearest)": lambda: BlockIntCodec(8, "nearest"),
    "int4": lambda: BlockIntCodec(4, "stochastic"),
    "int4(stochastic)": lambda: BlockIntCodec(4, "stochastic"),
    "int4(nearest)": lambda: BlockIntCodec(4, "nearest"),
}
WRAPPERS: dict[str, Callable[[Codec], Codec]] = {"zstd": ZstdCodec}

ALL_NAMES = tuple(QUANTIZERS) + tuple(f"{name} | zstd" for name in QUANTIZERS)


@lru_cache(maxsize=64)
def parse(name: str) -> Codec:
    """Build the codec a user named.

    Raises:
        SettingsError: an unknown stage, or stages in an order that makes no sense.
    """
    stages = [re.sub(r"\s+", "", stage) for stage in name.split("|")]
    quantizer = QUANTIZERS.get(stages[0])
    if len(name) > NAME_CHARS_MAX or quantizer is None or any(stage not in WRAPPERS for stage in stages[1:]):
        raise SettingsError(
            f"unknown codec {name[:NAME_CHARS_MAX]!r}: choose one of {', '.join(QUANTIZERS)}, "
            "alone or followed by | zstd"
        )
    if len(stages) > 2:
        raise SettingsError(f"codec {name!r} compresses twice: one zstd is enough")
    codec = quantizer()
    for stage in stages[1:]:
        codec = WRAPPERS[stage](codec)
    return codec


def codec_of(name: object) -> Codec:
    """Build the codec a message names.

    Raises:
        RejectedUpdate: the name is unknown here.
    """
    try:
        if isinstance(name, str):
            return parse(name)
    except SettingsError as error:
        raise RejectedUpdate(Reason.CODEC, str(error)) from error
    raise RejectedUpdate(Reason.CODEC, f"the codec's name is {type(name).__name__}, not a string")


def decode(codec: Params, payload: bytes | memoryview, num_params: int) -> Decoded:
    """Check a received payload and return the delta, ready to be added; raises `RejectedUpdate`."""
    return codec_of(codec.get("name")).decode(payload, codec, num_params)
