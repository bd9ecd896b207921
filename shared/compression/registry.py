"""Codec strings -> codecs: stages joined by `|`, options in parentheses; or the name of a preset.

[ef |] [all |] [topk(p) | randomk(p) |] [rotate |] quantizer [| pack] [| zstd]
"""

import re
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from typing import Any

from shared.compression.block_int import BlockIntQuantizer
from shared.compression.codec import Decoded, Params
from shared.compression.eden import CENTROIDS, EdenQuantizer
from shared.compression.floats import WIDTH, FloatQuantizer
from shared.compression.nf4 import Nf4Quantizer
from shared.compression.pipeline import Pipeline
from shared.compression.presets import AUTO, DOWNLINK_ON, PRESETS
from shared.compression.qsgd import QsgdQuantizer
from shared.compression.quantizer import Quantizer
from shared.compression.random_k import RandomK
from shared.compression.selection import SHARE, Selection
from shared.compression.sign import SignQuantizer
from shared.compression.ternary import TernaryQuantizer
from shared.compression.top_k import TopK
from shared.compression.uniform import STEP, STEP_STOCHASTIC_MIN, UniformQuantizer
from shared.errors import Reason, RejectedUpdate, SettingsError
from shared.layout import Layout

NAME_CHARS_MAX = 200
ROUNDINGS = ("nearest", "stochastic")

Options = dict[str, str]


def _whole(options: Options, key: str, low: int, high: int) -> int:
    text = options.pop(key, "")
    if not re.fullmatch(r"[0-9]{1,9}", text) or not low <= int(text) <= high:
        raise ValueError(f"needs a whole number from {low} to {high}, got {text or 'none'}")
    return int(text)


def _number(options: Options, key: str, low: float, high: float) -> float:
    text = options.pop(key, "")
    if not re.fullmatch(r"([0-9]{1,9}\.?[0-9]{0,9}|\.[0-9]{1,9})(e-?[0-9]{1,2})?", text):
        raise ValueError(f"needs a number from {low:g} to {high:g}, got {text or 'none'}")
    if not low <= float(text) <= high:
        raise ValueError(f"needs a number from {low:g} to {high:g}, got {text}")
    return float(f"{float(text):g}")  # as the name says it: the decoder knows no more digits


def _rounding(options: Options, default: str) -> str:
    given = options.pop("rounding", default)
    if given not in ROUNDINGS:
        raise ValueError(f"rounds {' or '.join(ROUNDINGS)}, not {given or 'none'}")
    return given


def _uniform(options: Options) -> Quantizer:
    rounding = _rounding(options, "nearest")
    low = STEP[0] if rounding == "nearest" else STEP_STOCHASTIC_MIN
    return UniformQuantizer(_number(options, "step", low, STEP[1]), rounding)


# stage -> (its options in order, how it is built)
QUANTIZERS: dict[str, tuple[tuple[str, ...], Callable[[Options], Quantizer]]] = {
    **{name: ((), lambda _, name=name: FloatQuantizer(name)) for name in WIDTH},  # type: ignore[misc]
    "int8": (("rounding",), lambda o: BlockIntQuantizer(8, _rounding(o, "stochastic"))),
    "int4": (("rounding",), lambda o: BlockIntQuantizer(4, _rounding(o, "stochastic"))),
    "int2": (("rounding",), lambda o: BlockIntQuantizer(2, _rounding(o, "stochastic"))),
    "nf4": ((), lambda _: Nf4Quantizer()),
    "uniform": (("step", "rounding"), _uniform),
    "ternary": (("rounding",), lambda o: TernaryQuantizer(_rounding(o, "nearest"))),
    "sign": ((), lambda _: SignQuantizer()),
    "qsgd": (("levels",), lambda o: QsgdQuantizer(_whole(o, "levels", 1, 127))),
    "eden": (("bits",), lambda o: EdenQuantizer(_whole(o, "bits", 1, max(CENTROIDS)))),
}
SELECTIONS: dict[str, tuple[tuple[str, ...], Callable[[Options], Selection]]] = {
    "topk": (("share",), lambda o: TopK(_number(o, "share", *SHARE))),
    "randomk": (("share",), lambda o: RandomK(_number(o, "share", *SHARE))),
}
WORDS = ("ef", "all", "rotate", "pack", "zstd")
STAGES = (*WORDS[:2], *SELECTIONS, WORDS[2], *QUANTIZERS, *WORDS[3:])

EXAMPLES = (  # every stage in every variant: what the tests and the benchmark go through
    "float32", "float16", "bfloat16", "float32 | zstd", "float16 | zstd", "bfloat16 | zstd",
    "int8", "int8 | zstd", "int8(nearest)", "int4", "int4 | zstd", "int4(nearest) | zstd", "int2",
    "int2(nearest) | zstd", "nf4", "nf4 | zstd", "uniform(step=1)", "uniform(step=1) | pack | zstd",
    "uniform(step=2) | pack | zstd", "uniform(step=4) | pack | zstd", "uniform(step=1, stochastic) | pack | zstd",
    "uniform(step=4, stochastic) | pack | zstd",
    "ternary", "ternary | zstd", "ternary(stochastic) | zstd", "ef | sign", "ef | sign | zstd",
    "qsgd(4)", "qsgd(8) | pack | zstd", "all | qsgd(4)", "all | int8",
    "topk(0.1)", "topk(0.1) | float16", "topk(0.1) | int8", "topk(0.05) | int4(nearest) | zstd",
    "topk(0.018) | ternary | zstd", "topk(0.1) | uniform(step=1) | pack | zstd", "randomk(0.1)",
    "randomk(0.1) | int8 | zstd",
    "rotate | eden(1)", "rotate | eden(2)", "rotate | eden(3)", "rotate | eden(4) | zstd", "rotate | int4",
    "rotate | uniform(step=1, stochastic) | pack | zstd", "topk(0.1) | rotate | eden(2)",
    "ef | uniform(step=2) | pack | zstd", "ef | topk(0.018) | ternary | zstd", "ef | topk(0.1) | int8",
    "ef | int4(nearest)", "ef | nf4", "ef | ternary",
)  # fmt: skip


@lru_cache(maxsize=256)
def parse(name: str) -> Pipeline:
    """Build the codec a user named.

    Args:
        name: a pipeline, or a preset other than `auto`.

    Raises:
        SettingsError: an unknown stage, a wrong option, or stages that make no sense together, with the reason.
    """
    return _parse(name, fed_back=False)


def canonical(name: str) -> str:
    """Return a codec setting as it is stored: `auto`, or the pipeline spelled out.

    Raises:
        SettingsError: as `parse`.
    """
    return AUTO if name.strip() == AUTO else parse(name).name


@lru_cache(maxsize=16)
def downlink_codec(setting: str) -> Pipeline | None:
    """Build the codec of version deltas: None for `off`, the default for `on`, else the codec named.

    The hidden state is its own error feedback, so a preset's `ef` is dropped.

    Raises:
        SettingsError: a codec that is no contraction, or does not decode to the same bits on every machine.
    """
    if setting.strip() == "off":
        return None
    name = DOWNLINK_ON if setting.strip() == "on" else _pipeline_of(setting)
    codec = replace(_parse(name, fed_back=True), feedback=False)
    if not codec.exact:
        raise SettingsError(
            f"downlink codec {codec.name!r}: a rotation's sums differ between machines in the last bit, but every "
            "replica must hold the same bits; choose one without rotate"
        )
    return codec


def codec_of(name: object) -> Pipeline:
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


def decode(codec: Params, payload: bytes | memoryview, layout: Layout) -> Decoded:
    """Check a received payload and return the delta, ready to be added; raises `RejectedUpdate`."""
    return codec_of(codec.get("name")).decode(payload, codec, layout)


def _pipeline_of(name: str) -> str:
    return PRESETS[name.strip()].pipeline if name.strip() in PRESETS else name


def _parse(name: str, fed_back: bool) -> Pipeline:
    if len(name) > NAME_CHARS_MAX:
        raise SettingsError(f"codec {name[:40]!r}...: {len(name)} characters; at most {NAME_CHARS_MAX}")
    left = [_stage(text, name) for text in _pipeline_of(name).split("|")]

    def take(word: str) -> bool:
        return bool(left) and left[0][0] == word and not left[0][1] and bool(left.pop(0))

    feedback, whole = take("ef"), take("all")
    selection = _build(SELECTIONS, left, name)
    rotated = take("rotate")
    quantizer = _build(QUANTIZERS, left, name)
    if quantizer is None and selection is not None and not rotated:
        quantizer = FloatQuantizer("float32")
    packed, zstd = quantizer is not None and take("pack"), quantizer is not None and take("zstd")
    if quantizer is None or left:
        raise SettingsError(
            f"codec {name!r} makes no sense at {left[0][0] if left else 'its end'!r}: the order is "
            "[ef |] [all |] [topk(p) | randomk(p) |] [rotate |] quantizer [| pack] [| zstd], with one quantizer of "
            f"{', '.join(QUANTIZERS)}; `fedmq codecs` explains them"
        )
    if packed:
        quantizer = _packed(quantizer, name)
    if selection is not None and selection.contraction and quantizer.name in ("ternary", "sign"):
        quantizer = SignQuantizer("ternary")  # the zeros are left out already
    codec = Pipeline(quantizer, selection, rotated, zstd, feedback, whole)
    if codec.plain:
        codec = Pipeline(quantizer, zstd=zstd, feedback=feedback, whole=True)
    _refuse_nonsense(codec, name, fed_back)
    return codec


def _stage(text: str, name: str) -> tuple[str, list[str]]:
    """Split `stage(a, key=b)` into its name and its options."""
    match = re.fullmatch(r"\s*([a-z0-9]+)\s*(?:\(([^()]*)\))?\s*", text)
    if match is None or match[1] not in STAGES:
        raise SettingsError(
            f"unknown codec {name!r}: {text.strip()[:40]!r} is no stage; stages are {', '.join(STAGES)}, "
            f"presets {', '.join(PRESETS)}"
        )
    return match[1], [option.strip() for option in match[2].split(",")] if match[2] is not None else []


def _build(table: dict[str, Any], left: list[tuple[str, list[str]]], name: str) -> Any:
    """Take the next stage if the table has it."""
    if not left or left[0][0] not in table:
        return None
    stage, given = left.pop(0)
    order, build = table[stage]
    options: Options = {}
    for position, option in enumerate(given):
        key, equals, value = (part.strip() for part in option.partition("="))
        option_name = key if equals else order[position] if position < len(order) else f"option {position + 1}"
        if option_name in options:
            raise SettingsError(f"codec {name!r}: {stage} is given {option_name} twice")
        options[option_name] = value if equals else key
    try:
        built = build(options)
        if options:
            raise ValueError(f"does not know {', '.join(f'{k}={v}' for k, v in options.items())}")
        return built
    except ValueError as error:
        usage = f"{stage}({', '.join(order)})" if order else stage
        raise SettingsError(f"codec {name!r}: {usage} {error}") from error


def _packed(quantizer: Quantizer, name: str) -> Quantizer:
    if isinstance(quantizer, UniformQuantizer | QsgdQuantizer):
        return quantizer.pack()
    raise SettingsError(f"codec {name!r}: {quantizer.name} fills its bytes already; pack is for uniform and qsgd")


def _refuse_nonsense(codec: Pipeline, name: str, fed_back: bool) -> None:
    """Raise `SettingsError` for stages that work against each other.

    Args:
        codec: what was built.
        name: as the user wrote it.
        fed_back: something else feeds the error back (the hidden state of the downlink).
    """
    quantizer, problem = codec.quantizer, ""
    if isinstance(quantizer, EdenQuantizer) and not codec.rotated:
        problem = "eden's centroids are those of a Gaussian: put rotate in front of it"
    elif codec.rotated and quantizer.name in WIDTH:
        problem = f"rotate gains nothing in front of {quantizer.name}, which treats all values alike"
    elif (codec.feedback or fed_back) and not codec.contraction:
        culprit = codec.selection if codec.selection and not codec.selection.contraction else quantizer
        problem = (
            f"{culprit.name} is unbiased but of high variance, not a contraction: inside error feedback its error "
            "would grow without bound; use a nearest or topk variant there, or drop the feedback"
        )
    elif codec.feedback and codec.plain and quantizer.name == "float32":
        problem = "float32 leaves no error to feed back"
    elif isinstance(quantizer, SignQuantizer) and codec.selection and not codec.selection.contraction:
        problem = "sign turns the zeros of a random selection into numbers, and nothing mends that; use int8 or float16"
    elif isinstance(quantizer, SignQuantizer) and not codec.selection and not (codec.feedback or fed_back):
        problem = "sign is biased and without error feedback training stalls: write ef | sign"
    if problem:
        raise SettingsError(f"codec {name!r} makes no sense: {problem}")
