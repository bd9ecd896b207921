"""Codecs to pick without reading papers."""

from dataclasses import dataclass

AUTO = "auto"


@dataclass(frozen=True, slots=True)
class Preset:
    """A name for a pipeline, and when to use it."""

    pipeline: str
    description: str


PRESETS = {
    "none": Preset("float32", "as it is; 1x; to compare with"),
    "safe": Preset("int8 | zstd", "about 4x, unbiased, no state on the device: the default"),
    "balanced": Preset("ef | uniform(step=2) | pack | zstd", "about 30x, error feedback; hardly any more trips"),
    "tiny": Preset("ef | topk(0.018) | ternary | zstd", "200x or more, error feedback; for the thinnest uplinks"),
}
AUTO_DESCRIPTION = "each worker measures its first updates and takes the smallest of the others that serves them"

DOWNLINK_ON = "topk(0.05) | ternary | zstd"  # what `downlink = on` stands for
