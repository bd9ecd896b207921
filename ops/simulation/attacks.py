"""What attackers among the simulated clients send instead of what they trained."""

from collections.abc import Sequence

import numpy as np

from shared.choices import Choice, Number, Table, parse
from shared.vector import Vector

ATTACKS: Table = {
    "sign_flip": {"scale": Number(1, above=True)},  # -scale times the delta
    "noise": {"scale": Number(1, above=True)},  # Gaussian, of scale times the delta's norm
    "flood": {"rate": Number(10, 1)},  # trips take so many times less
}


def parse_attack(text: str) -> tuple[Choice, ...]:
    """Read `sign_flip(2) & flood(10)`; raises `ValueError` when it is not of that form."""
    return tuple(parse(part, ATTACKS) for part in text.split("&")) if text.strip() else ()


def attackers(share: float, clients: int, seed: int) -> frozenset[int]:
    """Choose who attacks: round(share * clients) clients at random."""
    count = round(share * clients)
    return frozenset(np.random.default_rng((seed, 0xA77AC)).choice(clients, count, replace=False).tolist())


def spoil(delta: Vector, attack: Sequence[Choice], seed: int) -> None:
    """Change a trained delta as the attack says, in place.

    Args:
        delta: float32 [n].
        attack: its parts, one after the other.
        seed: of the noise.
    """
    for part in attack:
        if part.name == "sign_flip":
            delta *= np.float32(-part["scale"])
        elif part.name == "noise":
            noise = np.random.default_rng(seed).standard_normal(delta.size, np.float32)
            noise *= np.float32(part["scale"] * np.linalg.norm(delta) / max(1e-30, float(np.linalg.norm(noise))))
            delta[:] = noise


def hurry(attack: Sequence[Choice]) -> float:
    """Return how many times faster than others an attacker is."""
    return float(np.prod([part["rate"] for part in attack if part.name == "flood"]))
