"""The names and parameters of everything an aggregator's arithmetic is chosen from, and what goes with what.

Settings are checked against these tables in every program; the arithmetic itself is in `aggregator/`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from shared.choices import Number, Table

_BETA1 = Number(0.9, 0, 1, below=True)
_BETA2 = Number(0.99, 0, 1, below=True)
_COUNT = Number(None, 1, 100_000, whole=True)

STALENESS: Table = {
    "constant": {},
    "polynomial": {"exponent": Number(None, 0)},
    "hinge": {"slope": Number(None, 0), "threshold": Number(None, 0)},
}

SERVER_OPTIMIZERS: Table = {
    "sgd": {},
    "momentum": {"beta": _BETA1},
    "adagrad": {"epsilon": Number(1e-3, above=True)},
    "adam": {"beta1": _BETA1, "beta2": _BETA2, "epsilon": Number(1e-3, above=True)},
    "yogi": {"beta1": _BETA1, "beta2": _BETA2, "epsilon": Number(1e-3, above=True)},
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
            "momentum": Number(0, 0, 1, below=True),
            "proximal": Number(0, 0, 1, below=True),  # local lr times mu
        },
    ),
    "rescaled": RuleSpec(
        (*_BUFFERED, "staleness", "clients"),
        {"smoothing": Number(0.2, 0, 1, above=True), "weight_max": Number(10, 1)},
    ),
    "fadas": RuleSpec(
        ("buffer_size", "server_lr", "robust"),
        {"delay": Number(1, 0), "beta1": _BETA1, "beta2": _BETA2, "epsilon": Number(1e-8, above=True)},
    ),
    "ca2fl": RuleSpec(("buffer_size", "server_lr", "server_optimizer", "robust", "clients")),
    "ace": RuleSpec(("server_lr", "server_optimizer", "robust", "clients")),
    "aced": RuleSpec(
        ("server_lr", "server_optimizer", "robust", "clients"), {"staleness": Number(10, 0, 100_000, whole=True)}
    ),
    "area": RuleSpec(("buffer_size", "clients")),
    "ringleader": RuleSpec(("server_lr", "server_optimizer", "robust", "clients")),
}
RULE_TABLE: Table = {name: spec.parameters for name, spec in RULES.items()}
AVERAGING = ("fedbuff", "fedavg", "fednova", "rescaled", "fadas")  # a buffer's mean: a robust one may take its place

ROBUST: Table = {  # guards look at one update, in this order; then the buffer may be bucketed, then combined
    "norm": {"limit": Number(None, above=True, high=1e11)},
    "norm_median": {"factor": Number(2, above=True), "window": Number(100, 2, 10_000, whole=True)},
    "zeno": {"rho": Number(0.002, 0), "epsilon": Number(0.1, 0), "rate": Number(1, above=True)},
    "aflguard": {"distance": Number(1.5, above=True)},
    "one_slot": {},
    "throttle": {"q": Number(1.5, 1, 1e6, above=True)},
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
