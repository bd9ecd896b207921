"""What stands between admission and the arithmetic."""

from dataclasses import dataclass

from shared.compression import Decoded
from shared.messages import Update
from shared.vector import Vector


@dataclass(frozen=True, slots=True)
class Arrival:
    """One admitted update on its way into a rule.

    Attributes:
        update: the message, for its counts; its payload is that of `delta`.
        delta: the update's delta, still compressed.
        staleness: tau in versions, >= 0.
        weight: s(tau), times what the guards leave of the update; finite, >= 0.
        base: float32 [n], weights of `update.base_version`, where the rule needs the base.
    """

    update: Update
    delta: Decoded
    staleness: int
    weight: float
    base: Vector | None = None
