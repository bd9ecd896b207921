"""Codecs: a float32 delta <-> the payload of an update. One file per idea, one registry of names.

A codec is named by a readable string that travels in the message: `int8`, `int4(nearest) | zstd`. What its
decoder needs besides the payload travels as parameters beside the name.
"""

from shared.compression.codec import Codec, Decoded, Encoded
from shared.compression.registry import codec_of, decode, parse

__all__ = ["Codec", "Decoded", "Encoded", "codec_of", "decode", "parse"]
