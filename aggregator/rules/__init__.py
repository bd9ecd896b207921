"""Aggregation rules, one file each, registered by name.

Every rule says what it computes, and from which paper. `mean.py` is what most of them do with a buffer, `memory.py`
what some keep of every worker.
"""

from collections.abc import Callable

from aggregator.robust import combiner_of
from aggregator.rules.ace import Ace, Aced
from aggregator.rules.area import Area
from aggregator.rules.averaging import Averaging
from aggregator.rules.ca2fl import Ca2fl
from aggregator.rules.fadas import DelayAdaptive
from aggregator.rules.fedasync import FedAsync
from aggregator.rules.fedavg import Rounds
from aggregator.rules.fedbuff import fedbuff
from aggregator.rules.fednova import PerStep
from aggregator.rules.mean import Mean
from aggregator.rules.memory import Memory
from aggregator.rules.rescaled import Rescaled
from aggregator.rules.ringleader import Ringleader
from aggregator.rules.rule import Rule
from aggregator.server_optimizer import ServerOptimizer, amsgrad, optimizer_of
from aggregator.staleness import constant, parse_staleness
from shared.choices import Choice, parse, parse_pipeline
from shared.config import AggregatorSettings
from shared.errors import SettingsError
from shared.rules import ROBUST, RULE_TABLE, SLOTS
from shared.rules import RULES as SPECS


def _mean(s: AggregatorSettings) -> Mean:
    """Build the mean of a rule that averages a buffer."""
    rule = parse(s.rule, RULE_TABLE).name
    slots = any(stage.name in SLOTS for stage in parse_pipeline(s.robust, ROBUST))
    return Mean(
        s.buffer_size,
        by_samples=s.weight_by_samples,
        distinct=slots or rule == "fedavg",
        combiner=combiner_of(s),
        weigh=parse_staleness(s.staleness) if "staleness" in SPECS[rule].uses else constant,
    )


def _optimizer(s: AggregatorSettings) -> ServerOptimizer:
    return optimizer_of(s.server_optimizer)


RULES: dict[str, Callable[[AggregatorSettings, Choice], Rule]] = {
    "fedbuff": lambda s, _: fedbuff(_mean(s), _optimizer(s), s.server_lr),
    "fedasync": lambda s, _: FedAsync(s.alpha),
    "fedavg": lambda s, _: Averaging("fedavg", _mean(s), _optimizer(s), s.server_lr, Rounds(s.buffer_size)),
    "fednova": lambda s, c: Averaging(
        "fednova", _mean(s), _optimizer(s), s.server_lr, PerStep(c["steps"], c["momentum"], c["proximal"]),
    ),
    "rescaled": lambda s, c: Averaging(
        "rescaled", _mean(s), _optimizer(s), s.server_lr, Rescaled(c["smoothing"], c["weight_max"], s.clients),
    ),
    "fadas": lambda s, c: Averaging(
        "fadas", _mean(s), amsgrad("fadas", c["beta1"], c["beta2"], c["epsilon"]), s.server_lr,
        DelayAdaptive(c["delay"]),
    ),
    "ca2fl": lambda s, _: Ca2fl(Memory(s.clients), _optimizer(s), s.buffer_size, s.server_lr),
    "ace": lambda s, _: Ace(Memory(s.clients), _optimizer(s), s.server_lr),
    "aced": lambda s, c: Aced(Memory(s.clients), _optimizer(s), s.server_lr, int(c["staleness"]) or 2 * s.clients),
    "area": lambda s, _: Area(s.buffer_size, s.clients),
    "ringleader": lambda s, _: Ringleader(Memory(s.clients), _optimizer(s), s.server_lr),
}  # fmt: skip


def rule_of(settings: AggregatorSettings) -> Rule:
    """Build the rule that the settings name.

    Raises:
        SettingsError: its parameters do not go together.
    """
    choice = parse(settings.rule, RULE_TABLE)
    try:
        return RULES[choice.name](settings, choice)
    except ValueError as error:
        raise SettingsError(f"FEDMQ_RULE: {error}") from error


__all__ = ["RULES", "Rule", "rule_of"]
