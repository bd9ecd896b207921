"""Which of the stored versions may go."""

from collections.abc import Callable, Sequence

from shared.store.ports import StoredVersion


def droppable(
    stored: Sequence[StoredVersion], kept: int, age_max_s: float, every: int, needed: Callable[[int], bool], now: float
) -> list[int]:
    """Return the versions that nobody keeps.

    A version goes when it is beyond the newest `kept` of those stored, AND older than `age_max_s`, AND has no tag, AND
    the rule does not need it, AND it is not the first stored one of its `every` versions (several versions may come
    between two commits: a multiple of `every` need not be among them).

    Args:
        stored: what there is, ascending.
        kept: how many of the newest stay, >= 0.
        age_max_s: seconds, 0: the count alone decides.
        every: 0: no version stays for the curve's sake.
        needed: tells whether the rule needs a version.
        now: unix seconds.
    """
    beyond = stored[: max(0, len(stored) - kept)]
    firsts = {entry.version // every: entry.version for entry in reversed(stored)} if every else {}
    stay = set(firsts.values())
    return [
        entry.version
        for entry in beyond
        if not entry.tags
        and (not age_max_s or now - entry.created_at > age_max_s)
        and entry.version not in stay
        and not needed(entry.version)
    ]
