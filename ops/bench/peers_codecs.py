"""Other compressors on the same delta, each beside our cheapest pipeline of the same or a smaller error.

The error-bounded SZ3 and ZFP (which APPFL uses), blosc2's truncated floats, bitsandbytes' NF4 and 8-bit blocks. Each is
called as APPFL calls it: tensor by tensor, flattened, with a bound relative to the tensor's range; tensors that our
policy sets apart stay float32. None of them is needed to run this: what is not installed is named.

    pip install zfpy pysz blosc2 bitsandbytes
"""

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from ops.bench.measuring import dot, errors, median_s, times
from ops.bench.recorded import Delta
from shared.compression import parse
from shared.compression.registry import EXAMPLES
from shared.compression.tensors import parts_of
from shared.vector import Vector

STEPS = tuple(float(f"{0.05 * 2 ** (k / 16):.3g}") for k in range(117))  # 0.05 to 7.6 RMS
SHARES = (0.001, 0.003, 0.01, 0.03, 0.1)


@dataclass(frozen=True, slots=True)
class Peer:
    """One setting of another compressor.

    Attributes:
        name: as the table shows it.
        module: which it needs.
        compress: float32 [n] -> something.
        decompress: (something, n) -> float32 [n].
        size: of something, in bytes.
    """

    name: str
    module: str
    compress: Callable[[Vector], Any]
    decompress: Callable[[Any, int], Vector]
    size: Callable[[Any], int] = len


@dataclass(frozen=True, slots=True)
class Result:
    """Size, errors and times of one compressor on the tensors of a delta.

    Attributes:
        name: of the compressor.
        ratio: float32 bytes over compressed bytes.
        nmse: ||x - decoded||^2 / ||x||^2.
        rms: root mean square of (error / range of its tensor).
        encode: MB of float32 per second of processor time.
        decode: the same; ours includes adding into the buffer, a peer's does not.
    """

    name: str
    ratio: float
    nmse: float
    rms: float
    encode: float
    decode: float


def _sz3(x: Vector, bound: float) -> Any:
    pysz: Any = importlib.import_module("pysz")
    config = pysz.szConfig()
    config.errorBoundMode, config.absErrorBound = pysz.szErrorBoundMode.ABS, bound * float(np.ptp(x))
    return pysz.sz.compress(x, config)[0]


def _un_sz3(compressed: Any, count: int) -> Vector:
    values: Vector = importlib.import_module("pysz").sz.decompress(compressed, np.float32, (count,))[0]
    return values


def _zfp(x: Vector, bound: float) -> Any:
    return importlib.import_module("zfpy").compress_numpy(x, tolerance=bound * float(np.ptp(x)))


def _un_zfp(compressed: Any, count: int) -> Vector:
    values: Vector = importlib.import_module("zfpy").decompress_numpy(compressed)
    return values


def _blosc2(x: Vector, bits: int) -> Any:
    blosc2: Any = importlib.import_module("blosc2")
    return blosc2.compress2(
        x, codec=blosc2.Codec.ZSTD, clevel=1, typesize=4, nthreads=1,
        filters=[blosc2.Filter.TRUNC_PREC, blosc2.Filter.BITSHUFFLE], filters_meta=[bits, 0],
    )  # fmt: skip


def _un_blosc2(compressed: Any, count: int) -> Vector:
    return np.frombuffer(importlib.import_module("blosc2").decompress2(compressed, nthreads=1), np.float32, count)


def _bits_and_bytes(x: Vector, kind: str) -> Any:
    import torch

    functional: Any = importlib.import_module("bitsandbytes.functional")
    quantize = functional.quantize_nf4 if kind == "nf4" else functional.quantize_blockwise
    return quantize(torch.from_numpy(x))


def _un_bits_and_bytes(compressed: Any, count: int, kind: str) -> Vector:
    functional: Any = importlib.import_module("bitsandbytes.functional")
    restore = functional.dequantize_nf4 if kind == "nf4" else functional.dequantize_blockwise
    values: Vector = restore(*compressed).numpy()
    return values.reshape(-1)[:count]


def _tensor_bytes(compressed: Any) -> int:
    """Return the bytes of bitsandbytes' codes and of its float32 scales."""
    codes, state = compressed
    return int(codes.numel() * codes.element_size() + state.absmax.numel() * state.absmax.element_size())


PEERS = (
    *(Peer(f"SZ3, relative bound {b:g}", "pysz", partial(_sz3, bound=b), _un_sz3, lambda c: int(c.nbytes))
      for b in (1e-1, 3e-2, 1e-2, 1e-3)),
    *(Peer(f"ZFP, relative bound {b:g}", "zfpy", partial(_zfp, bound=b), _un_zfp) for b in (1e-1, 1e-2, 1e-3)),
    *(Peer(f"blosc2, {bits} bits of mantissa, bitshuffle, zstd", "blosc2", partial(_blosc2, bits=bits), _un_blosc2)
      for bits in (1, 4, 8)),
    Peer("bitsandbytes NF4", "bitsandbytes", partial(_bits_and_bytes, kind="nf4"),
         partial(_un_bits_and_bytes, kind="nf4"), _tensor_bytes),
    Peer("bitsandbytes 8 bit", "bitsandbytes", partial(_bits_and_bytes, kind="8"),
         partial(_un_bits_and_bytes, kind="8"), _tensor_bytes),
)  # fmt: skip


def absent() -> list[str]:
    """Return the modules that are not installed."""
    return sorted({peer.module for peer in PEERS if importlib.util.find_spec(peer.module) is None})


def compare(delta: Delta, repeats: int) -> list[tuple[Result, Result | None]]:
    """Return each installed peer, and ours beside it: None if nothing of ours has so small an error."""
    missing = absent()
    if "bitsandbytes" not in missing:
        import torch

        torch.set_num_threads(1)
    ours = candidates(delta)
    pairs = []
    for peer in PEERS:
        if peer.module in missing:
            continue
        theirs = _measure(peer, delta, repeats)
        name = min((n for n in ours if ours[n][1] <= theirs.nmse), key=lambda n: ours[n][0], default=None)
        pairs.append((theirs, our_result(name, delta, repeats) if name else None))
    return pairs


def candidates(delta: Delta) -> dict[str, tuple[float, float]]:
    """Return bits per parameter and NMSE of all our pipelines that need no error feedback."""
    names = [n for n in EXAMPLES if not n.startswith(("ef", "float32"))]
    names += [f"uniform(step={s:g}) | pack | zstd" for s in STEPS] + [f"topk({p:g}) | ternary | zstd" for p in SHARES]
    names += ["int8(nearest) | zstd"]
    found = {}
    for name in names:
        codec = parse(name)
        encoded = codec.encode(delta.values, delta.layout, np.random.default_rng(1))
        found[name] = (8 * len(encoded.payload) / delta.values.size, errors(codec, delta)[0])
    return found


def our_result(name: str, delta: Delta, repeats: int) -> Result:
    """Measure one of our pipelines as the peers are."""
    codec, x = parse(name), delta.values
    encoded = codec.encode(x, delta.layout, np.random.default_rng(1))
    decoded = np.zeros_like(x)
    codec.decode(encoded.payload, encoded.params, delta.layout).add_into(decoded, 1.0)
    encode_s, decode_s = times(codec, delta, repeats)
    rate = x.nbytes / 1e6
    return Result(
        f"`{name}`", x.nbytes / len(encoded.payload), *_errors(decoded, delta), rate / encode_s, rate / decode_s
    )


def _measure(peer: Peer, delta: Delta, repeats: int) -> Result:
    """Run a peer over the tensors our lossy stages see."""
    body = parts_of(delta.layout, False).body
    tensors = [
        delta.values[spec.offset : spec.offset + spec.size]
        for spec in delta.layout.averaged
        if any(first <= spec.offset < first + length for first, _, length in body.pieces(0, body.size))
    ]
    compressed = [peer.compress(x) for x in tensors]
    decoded = delta.values.copy()
    for x, code in zip(tensors, compressed, strict=True):
        offset = (x.ctypes.data - delta.values.ctypes.data) // 4
        decoded[offset : offset + x.size] = peer.decompress(code, x.size)
    encode_s = median_s(lambda: [peer.compress(x) for x in tensors], repeats)
    decode_s = median_s(lambda: [peer.decompress(c, x.size) for c, x in zip(compressed, tensors, strict=True)], repeats)
    plain = delta.values.size - sum(x.size for x in tensors)
    size = sum(map(peer.size, compressed)) + 4 * plain
    rate = delta.values.nbytes / 1e6
    return Result(peer.name, delta.values.nbytes / size, *_errors(decoded, delta), rate / encode_s, rate / decode_s)


def _errors(decoded: Vector, delta: Delta) -> tuple[float, float]:
    """Return NMSE, and the root mean square of errors relative to the range of their tensor."""
    difference = decoded - delta.values
    relative = 0.0
    for spec in delta.layout.averaged:
        part = slice(spec.offset, spec.offset + spec.size)
        spread = float(np.ptp(delta.values[part])) or 1.0
        relative += dot(difference[part], difference[part]) / spread**2
    nmse = dot(difference, difference) / dot(delta.values, delta.values)
    return nmse, float(np.sqrt(relative / delta.values.size))
