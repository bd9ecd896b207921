"""The jobs that are tortured: every kind of rule, codec, defence and downlink, tiny."""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from shared.config import AggregatorSettings

JOB = "torture"
CODECS = ("float32", "int8", "int8 | zstd", "ef | int4(nearest)", "ef | sign", "ef | topk(0.2) | ternary")
STALENESS = ("constant", "polynomial(0.5)", "hinge(10,1)")
OPTIMIZERS = ("sgd", "sgd", "momentum(0.7)", "adam(0.8,0.95,0.1)")
MATRIX_PARAMS = 1000  # codecs treat a matrix of so many elements apart from the rest
JOBS = 400  # different ones
PART_BYTES = 64  # small enough that even these updates travel in parts


@dataclass(frozen=True, slots=True)
class Job:
    """One job and who works for it.

    Attributes:
        settings: of the aggregator, without those every job here has.
        workers: their number, 2 or 3.
        shape: of the model's one matrix.
    """

    settings: dict[str, Any]
    workers: int
    shape: tuple[int, int]


def drawn(rng: np.random.Generator) -> Job:
    """Draw a job: one of so many, whose settings are then checked once only."""
    return _job(int(rng.integers(JOBS)))


@lru_cache(maxsize=JOBS)
def _job(number: int) -> Job:
    u = np.random.default_rng(number).random(12).tolist()
    workers = 2 + int(u[0] < 0.5)
    codec = _pick(CODECS, u[1])
    settings: dict[str, Any] = {
        "codec": codec, "prefetch": _pick((1, 2, 4, 64), u[2]), "commit_interval_s": _pick((0.0, 0.5), u[3]),
        "commit_age_max_s": _pick((2.0, 6.0), u[4]), "versions_kept": _pick((1, 2, 5), u[5]),
        "staleness_max": _pick((1, 2, 4, 100), u[6]),
    }  # fmt: skip
    rule = _pick(("fedbuff", "fedbuff", "fedbuff", "fedasync", "ace", "ca2fl", "fedavg"), u[7])
    settings |= {"rule": rule}
    if rule == "fedbuff":
        settings |= {"buffer_size": 1 + int(3 * u[8]), "server_optimizer": _pick(OPTIMIZERS, u[9])}
        settings |= {"staleness": _pick(STALENESS, u[10]), "weight_by_samples": u[11] < 0.3}
        settings |= {"robust": _pick(("", "", "norm(2.5)", "one_slot"), (7 * u[11]) % 1)}
        if settings["robust"] == "one_slot":
            settings["buffer_size"] = min(settings["buffer_size"], workers)
    elif rule == "fedavg":
        settings |= {"buffer_size": 1 + int(workers * u[8]), "server_optimizer": _pick(OPTIMIZERS, u[9])}
        settings |= {"staleness_max": 0, "weight_by_samples": u[11] < 0.5}
    elif rule == "fedasync":
        settings |= {"alpha": 0.6, "staleness": _pick(STALENESS, u[10])}
    else:
        settings |= {"clients": workers, "server_optimizer": _pick(OPTIMIZERS, u[9])}
        settings |= {"buffer_size": 1 + int(2 * u[8])} if rule == "ca2fl" else {}
    if rule != "fedasync" and (5 * u[10]) % 1 < 0.3:
        settings |= {"downlink": "int8", "snapshots": _pick(("float32", "bfloat16"), (9 * u[10]) % 1)}
    if (5 * u[1]) % 1 < 0.25:
        settings |= {"part_bytes": PART_BYTES}
    large = codec.startswith("ef") and u[0] * 4 % 1 < 0.3 and "part_bytes" not in settings
    rows = 16 if "part_bytes" in settings else 3
    return Job(settings, workers, (25, MATRIX_PARAMS // 25) if large else (rows, 5))


def aggregator_settings(job: Job) -> AggregatorSettings:
    """Return a job's settings, checked; those of an equal job once."""
    return _settings(tuple(sorted(job.settings.items())))


@lru_cache(maxsize=4096)
def _settings(given: tuple[tuple[str, Any], ...]) -> AggregatorSettings:
    return AggregatorSettings(job=JOB, **dict(given))


def _pick(choices: tuple[Any, ...], u: float) -> Any:
    return choices[min(len(choices) - 1, int(u * len(choices)))]
