"""Codecs: a float32 delta <-> the payload of an update. One file per idea, one registry of names.

A codec is a pipeline named by a readable string that travels in the message: `int8 | zstd`,
`ef | topk(0.01) | ternary | zstd`. What its decoder needs besides the payload travels as parameters beside the name.
"""

from shared.compression.codec import Codec, Decoded, Encoded
from shared.compression.error_feedback import encode_with_feedback
from shared.compression.presets import AUTO, PRESETS
from shared.compression.registry import canonical, codec_of, decode, downlink_codec, parse

__all__ = [
    "AUTO", "PRESETS", "Codec", "Decoded", "Encoded", "canonical", "codec_of", "decode", "downlink_codec",
    "encode_with_feedback", "parse",
]  # fmt: skip
