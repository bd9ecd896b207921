"""Aggregation rules, one file each, registered by name."""

from collections.abc import Callable

from aggregator.rules.fedasync import FedAsync
from aggregator.rules.fedbuff import FedBuff
from aggregator.rules.rule import Rule
from shared.choices import Choice, parse
from shared.config import AggregatorSettings
from shared.rules import RULE_TABLE

RULES: dict[str, Callable[[AggregatorSettings, Choice], Rule]] = {
    "fedbuff": lambda s, _: FedBuff(s.buffer_size, s.server_lr, s.weight_by_samples),
    "fedasync": lambda s, _: FedAsync(s.alpha),
}


def rule_of(settings: AggregatorSettings) -> Rule:
    """Build the rule that the settings name."""
    choice = parse(settings.rule, RULE_TABLE)
    return RULES[choice.name](settings, choice)


__all__ = ["RULES", "FedAsync", "FedBuff", "Rule", "rule_of"]
