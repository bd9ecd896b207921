"""The names and parameters of everything an aggregator's arithmetic is chosen from, and what goes with what.

Settings are checked against these tables in every program; the arithmetic itself is in `aggregator/`.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from shared.choices import Choice, Number, Table

_BETA1 = Number(0.9, 0, 1, below=True)
_BETA2 = Number(0.99, 0, 1, below=True)
_EPSILON = Number(1e-3, 1e-12)  # its square is v at first: below 1e-19 it would be 0 in float32
_COUNT = Number(None, 1, 100_000, whole=True)

STALENESS: Table = {
    "constant": {},
    "polynomial": {"exponent": Number(None, 0)},
    "hinge": {"slope": Number(None, 0), "threshold": Number(None, 0)},
}

SERVER_OPTIMIZERS: Table = {
    "sgd": {},
    "momentum": {"beta": _BETA1},
    "adagrad": {"epsilon": _EPSILON},
    "adam": {"beta1": _BETA1, "beta2": _BETA2, "epsilon": _EPSILON},
    "yogi": {"beta1": _BETA1, "beta2": _BETA2, "epsilon": _EPSILON},
}
ADAPTIVE = ("adagrad", "adam", "yogi", "fadas")  # their step does not shrink with the delta: another default server_lr
ADAPTIVE_LR = 0.01


@dataclass(frozen=True, slots=True)
class RuleSpec:
    """What one rule takes.

    Attributes:
        uses: the settings that mean something to it; those given for another rule are refused.
        parameters: its own, as in `fadas(delay=1)`.
    """

    uses: tuple[str, ...]
    parameters: Mapping[str, Number] = field(default_factory=dict)


_BUFFERED = ("buffer_size", "server_lr", "server_optimizer", "robust")
RULES: dict[str, RuleSpec] = {
    "fedbuff": RuleSpec((*_BUFFERED, "staleness", "weight_by_samples")),
    "fedasync": RuleSpec(("alpha", "staleness", "robust")),
    "fedavg": RuleSpec((*_BUFFERED, "weight_by_samples")),
    "fednova": RuleSpec(
        (*_BUFFERED, "staleness", "weight_by_samples"),
        {
            "steps": Number(0, 0, 1e9),  # tau_eff; 0: the mean of the buffer's own
            "momentum": Number(0, 0, 0.9999),  # nearer to 1, a is lost to rounding
            "proximal": Number(0, 0, 1, below=True),  # local lr times mu
        },
    ),
    "rescaled": RuleSpec(
        (*_BUFFERED, "staleness", "clients"),
        {"smoothing": Number(0.2, 0, 1, above=True), "weight_max": Number(10, 1)},
    ),
    "fadas": RuleSpec(
        ("buffer_size", "server_lr", "robust"),
        {"delay": Number(1, 0), "beta1": _BETA1, "beta2": _BETA2, "epsilon": Number(1e-8, 1e-12)},
    ),
    "ca2fl": RuleSpec(("buffer_size", "server_lr", "server_optimizer", "robust", "clients")),
    "ace": RuleSpec(("server_lr", "server_optimizer", "robust", "clients")),
    "aced": RuleSpec(
        ("server_lr", "server_optimizer", "robust", "clients"),
        {"staleness": Number(0, 0, 100_000, whole=True)},  # 0: 2 x clients
    ),
    "area": RuleSpec(("buffer_size", "clients")),
    "ringleader": RuleSpec(("server_lr", "server_optimizer", "robust", "clients")),
}
RULE_TABLE: Table = {name: spec.parameters for name, spec in RULES.items()}
EVERY_UPDATE_A_VERSION = ("ace", "aced", "ringleader")  # their mean staleness is the number of workers
AVERAGING = ("fedbuff", "fedavg", "fednova", "rescaled", "fadas")  # a buffer's mean: a robust one may take its place


def rule_problems(rule: Choice, robust: str) -> list[str]:
    """Say what of a rule's parameters does not go together, or not with the defences.

    Args:
        rule: the rule.
        robust: FEDMQ_ROBUST.
    """
    if rule.name != "fednova":
        return []
    problems = []
    if rule["momentum"] and rule["proximal"]:
        problems.append(
            f"FEDMQ_RULE={rule}: it is known how long a delta is of workers with momentum or with a proximal term, not "
            "with both; leave one out"
        )
    if robust and not rule["steps"]:
        problems.append(
            "FEDMQ_RULE=fednova: with FEDMQ_ROBUST give the steps, e.g. fednova(steps=10): a client itself says how "
            "many it took, and their mean would stretch the whole step"
        )
    return problems


ROBUST: Table = {  # guards look at one update, in the order given; then the buffer may be bucketed, then combined
    "norm": {"limit": Number(None, above=True, high=1e11)},
    "norm_median": {"factor": Number(2, 1, above=True), "window": Number(100, 10, 10_000, whole=True)},
    "zeno": {"rho": Number(0.002, 0), "epsilon": Number(0.1, 0), "rate": Number(1, above=True)},
    "aflguard": {"distance": Number(1.5, above=True)},
    "one_slot": {},
    "throttle": {"q": Number(1.5, 1.01, 1e6)},
    "bucketing": {"size": Number(2, 2, 1000, whole=True)},
    "median": {},
    "trimmed_mean": {"share": Number(0.2, 0, 0.5, below=True)},
    "krum": {"attackers": _COUNT},
    "multi_krum": {"attackers": _COUNT, "chosen": Number(0, 0, 100_000, whole=True)},  # 0: buffer_size - attackers - 2
    "centered_clipping": {"radius": Number(None, above=True), "iterations": Number(1, 1, 100, whole=True)},
}
GUARDS = ("norm", "norm_median", "zeno", "aflguard", "one_slot", "throttle")
SLOTS = ("one_slot", "throttle")  # guards that count a client's updates in the open buffer
TRUSTED = ("zeno", "aflguard")  # guards that compare with the updates of FEDMQ_TRUSTED_CLIENT
COMBINERS = ("median", "trimmed_mean", "krum", "multi_krum", "centered_clipping")


def bucket_count(rows: int, size: int) -> int:
    """Return how many buckets of at most `size` rows there are: ceil(rows / size)."""
    return -(-rows // size)


def trimmed_rows(share: float, rows: int) -> int:
    """Return how many rows are trimmed on each side: floor(share * rows); 0.29 of 100 are 29, not 28.999..."""
    return min(int(share * rows + 1e-9), (rows - 1) // 2)


def krum_chosen(rows: int, attackers: int, chosen: int) -> int:
    """Return how many rows Multi-Krum averages: `chosen`, or where that is 0 as many as may be, K - f - 2."""
    return chosen or rows - attackers - 2


def robust_problems(
    stages: Sequence[Choice], rule: str, buffer_size: int, by_samples: bool, trusted_client: str
) -> list[str]:
    """Say what of the defences does not go together, with the rule or with the buffer.

    Args:
        stages: of FEDMQ_ROBUST, each checked by itself.
        rule: the rule's name.
        buffer_size: FEDMQ_BUFFER_SIZE.
        by_samples: FEDMQ_WEIGHT_BY_SAMPLES.
        trusted_client: FEDMQ_TRUSTED_CLIENT, "" where there is none.

    Returns:
        One message a problem, each with what to change.
    """
    names = [stage.name for stage in stages]
    bucket = next((int(stage["size"]) for stage in stages if stage.name == "bucketing"), 1)
    return [
        *_order_problems(names),
        *_rule_problems(names, rule, by_samples),
        *_trust_problems(names, trusted_client),
        *(problem for stage in stages for problem in _row_problems(stage, bucket_count(buffer_size, bucket), bucket)),
    ]


def _order_problems(names: Sequence[str]) -> list[str]:
    """Guards, throttle last as it weighs down what others would measure, then bucketing, then a combiner."""
    problems = []
    places = [1 if n == "throttle" else 2 if n == "bucketing" else 3 if n in COMBINERS else 0 for n in names]
    twice = len(set(names)) < len(names) or set(SLOTS) <= set(names) or places.count(3) > 1
    if places != sorted(places) or twice:
        problems.append(
            f"FEDMQ_ROBUST={' | '.join(names)}: first guards ({', '.join(n for n in GUARDS if n != 'throttle')}), then "
            f"throttle unless there is one_slot, then bucketing, then one of {', '.join(COMBINERS)}, each at most once"
        )
    if 2 in places and 3 not in places:
        problems.append(f"FEDMQ_ROBUST: bucketing prepares for one of {', '.join(COMBINERS)}: add one behind it")
    if "throttle" in names and 3 in places:
        problems.append(
            f"FEDMQ_ROBUST: throttle lets a client into the buffer several times, {names[places.index(3)]} takes every "
            "update for another client's: use one_slot instead of throttle"
        )
    return problems


def _rule_problems(names: Sequence[str], rule: str, by_samples: bool) -> list[str]:
    """Not every rule has a buffer, or can scale an update up."""
    problems = []
    whole = [name for name in names if name in (*COMBINERS, *SLOTS)]
    if whole and rule not in AVERAGING:
        problems.append(
            f"FEDMQ_ROBUST: {', '.join(whole)} {'goes' if len(whole) == 1 else 'go'} with the mean of a buffer, and "
            f"rule {rule} takes none: choose FEDMQ_RULE from {', '.join(AVERAGING)}"
        )
    if "zeno" in names and rule == "fedasync":
        problems.append(
            "FEDMQ_ROBUST: zeno scales an update, fedasync mixes whole models: use aflguard, or another FEDMQ_RULE"
        )
    combiners = [name for name in names if name in COMBINERS]
    if combiners and by_samples:
        problems.append(
            f"FEDMQ_WEIGHT_BY_SAMPLES=true: {combiners[0]} bounds what a lie can do, and a client itself says how many "
            "samples it has; leave it at false"
        )
    if rule == "fedavg" and set(names) & set(SLOTS):
        problems.append("FEDMQ_ROBUST: a round of fedavg takes one update of each client anyway: leave one_slot out")
    return problems


def _trust_problems(names: Sequence[str], trusted_client: str) -> list[str]:
    trusting = [name for name in names if name in TRUSTED]
    if trusting and not trusted_client:
        return [
            f"FEDMQ_TRUSTED_CLIENT must be given for {' and '.join(trusting)}: the id of a worker that trains on the "
            "server's own data"
        ]
    if trusted_client and not trusting:
        return [
            f"FEDMQ_TRUSTED_CLIENT={trusted_client} does nothing without {' or '.join(TRUSTED)} in FEDMQ_ROBUST; its "
            "updates would not be used"
        ]
    return []


def _row_problems(stage: Choice, rows: int, bucket: int) -> list[str]:
    """Say whether a combiner has rows enough: of the buffer, or of its buckets."""
    least, numbers = least_rows(stage), stage.numbers
    if rows < least:
        of = f" in buckets of {bucket}" if bucket > 1 else ""
        return [
            f"FEDMQ_ROBUST={stage} needs at least {least} {'buckets' if bucket > 1 else 'updates'} to choose from, "
            f"there are {rows}{of}: raise FEDMQ_BUFFER_SIZE to {(least - 1) * bucket + 1}"
        ]
    if stage.name == "trimmed_mean" and not trimmed_rows(numbers["share"], rows):
        return [
            f"FEDMQ_ROBUST={stage} trims none of {rows}: share must be in [{math.ceil(1e4 / rows) / 1e4:g}, 0.5) to "
            "trim one on each side"
        ]
    if stage.name == "multi_krum" and numbers["chosen"] > rows - numbers["attackers"] - 2:
        most = rows - int(numbers["attackers"]) - 2
        return [f"FEDMQ_ROBUST={stage}: chosen must be in [1, {rows} - attackers - 2 = {most}], or 0 for {most}"]
    return []


def least_rows(stage: Choice) -> int:
    """Return how many rows a combiner needs to be a defence: 2 f + 3 for Krum, 3 where extremes are left out."""
    if stage.name in ("krum", "multi_krum"):
        return 2 * int(stage["attackers"]) + 3
    return 3 if stage.name in ("median", "trimmed_mean") else 1
