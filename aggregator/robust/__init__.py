"""Defences against bad updates: guards look at one, combiners at a whole buffer."""

from collections.abc import Callable

from aggregator.robust.bucketing import Bucketing
from aggregator.robust.clipping import CenteredClipping
from aggregator.robust.coordinates import Median, TrimmedMean
from aggregator.robust.guards import Guards
from aggregator.robust.krum import Krum
from aggregator.robust.norms import NormLimit, NormMedian
from aggregator.robust.protocols import Combiner, Guard, Rows
from aggregator.robust.slots import OneSlot, Throttle
from aggregator.robust.trusted import AflGuard, TrustedUpdate, Zeno
from shared.choices import Choice, parse_pipeline
from shared.config import AggregatorSettings
from shared.rules import ROBUST

GUARDS: dict[str, Callable[[Choice, TrustedUpdate], Guard]] = {
    "norm": lambda choice, _: NormLimit(choice["limit"]),
    "norm_median": lambda choice, _: NormMedian(choice["factor"], int(choice["window"])),
    "zeno": lambda choice, trusted: Zeno(trusted, choice["rho"], choice["epsilon"], choice["rate"]),
    "aflguard": lambda choice, trusted: AflGuard(trusted, choice["distance"]),
    "one_slot": lambda choice, _: OneSlot(),
    "throttle": lambda choice, _: Throttle(choice["q"]),
}
COMBINERS: dict[str, Callable[[Choice], Combiner]] = {
    "median": lambda _: Median(),
    "trimmed_mean": lambda choice: TrimmedMean(choice["share"]),
    "krum": lambda choice: Krum(int(choice["attackers"])),
    "multi_krum": lambda choice: Krum(int(choice["attackers"]), int(choice["chosen"])),
    "centered_clipping": lambda choice: CenteredClipping(choice["radius"], int(choice["iterations"])),
}


def combiner_of(settings: AggregatorSettings) -> Combiner | None:
    """Build what stands in for the mean over a buffer; None: the mean itself."""
    stages = parse_pipeline(settings.robust, ROBUST)
    combiner = next((COMBINERS[stage.name](stage) for stage in stages if stage.name in COMBINERS), None)
    size = next((int(stage["size"]) for stage in stages if stage.name == "bucketing"), 1)
    return Bucketing(size, combiner) if combiner is not None and size > 1 else combiner


def guards_of(settings: AggregatorSettings) -> Guards:
    """Build what looks at each update; the settings may name none."""
    trusted, stages = TrustedUpdate(), parse_pipeline(settings.robust, ROBUST)
    guards = [GUARDS[stage.name](stage, trusted) for stage in stages if stage.name in GUARDS]
    return Guards(guards, settings.trusted_client, trusted)


__all__ = ["COMBINERS", "GUARDS", "Combiner", "Guard", "Guards", "Rows", "combiner_of", "guards_of"]
