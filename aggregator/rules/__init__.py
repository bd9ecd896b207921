"""Aggregation rules, one file each, registered by name."""

from collections.abc import Callable

from aggregator.rules.fedasync import FedAsync
from aggregator.rules.fedbuff import FedBuff
from aggregator.rules.rule import Rule
from shared.config import AggregatorSettings

RULES: dict[str, Callable[[AggregatorSettings], Rule]] = {
    "fedbuff": lambda s: FedBuff(s.buffer_size, s.server_lr, s.weight_by_samples),
    "fedasync": lambda s: FedAsync(s.alpha),
}


def rule_of(settings: AggregatorSettings) -> Rule:
    """Build the rule that the settings name."""
    return RULES[settings.rule](settings)


__all__ = ["RULES", "FedAsync", "FedBuff", "Rule", "rule_of"]
