"""Random numbers that are pure functions of a key and a count: a run that is resumed draws what it would have drawn.

numpy's generators keep a state, and building one per draw costs some 15 microseconds; a fleet asks thousands of times
a second. Two rounds of the splitmix64 finalizer cost half a microsecond each.

Source: Steele, Lea and Flood, Fast splittable pseudorandom number generators, OOPSLA 2014.
"""

import hashlib
from statistics import NormalDist

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15  # odd, 2^64 over the golden ratio: steps from one state to the next

normal_quantile = NormalDist().inv_cdf


def stream(seed: int, purpose: str, client: int) -> int:
    """Return the key of one client's draws for one purpose.

    Args:
        seed: of the simulation.
        purpose: what is drawn; two purposes have nothing to do with each other.
        client: the client's number.

    Returns:
        64 bits.
    """
    digest = hashlib.sha256(f"{seed} {purpose} {client}".encode()).digest()
    return int.from_bytes(digest[:8], "little")


def uniform(key: int, count: int) -> float:
    """Return draw number `count` of a stream: a number in (0, 1), neither of which is ever drawn.

    Args:
        key: from `stream`.
        count: which draw, any whole number.
    """
    x = (key + count * _GOLDEN) & _MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return (((x ^ (x >> 31)) >> 12) + 0.5) * 2.0**-52
