"""Who has which data, in the worked tasks and in experiments: written as `dirichlet(alpha=0.3)`, dealt by a seed.

    iid                          the same mix for all, shares of equal size
    consecutive                  the examples in the order they stand, cut into shares of equal size
    dirichlet(alpha=0.3)         each class spread unevenly: 0.1 is hard, 1 mild, 100 all but iid
    shards(each=2)               sorted by class and cut; each share gets so many pieces, so it sees few classes
    quantity(sigma=1)            the same mix for all, shares of log-normal size
    groups                       each writer's or speaker's examples at one share
    rare(classes=2, share=0.2)   the last classes only at the last shares, which have nothing else

All are pure functions of the labels, the groups and the seed.
"""

import heapq
import zlib
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from shared.choices import Number, Table, parse

PARTITIONS: Table = {
    "iid": {},
    "consecutive": {},
    "dirichlet": {"alpha": Number(0.3, 0.001, 1e6)},
    "shards": {"each": Number(2, 1, 1000, whole=True)},
    "quantity": {"sigma": Number(1.0, 0, 5)},
    "groups": {},
    "rare": {"classes": Number(2, 1, 1000, whole=True), "share": Number(0.2, 0, 1, above=True, below=True)},
}
LEAST = 10  # examples a share gets at least of an uneven deal, where there are four times as many as that takes
REDRAWS = 100  # of a Dirichlet deal that leaves a share with fewer

Labels = npt.NDArray[np.int64]
Indices = npt.NDArray[np.int64]


def deal(labels: Labels, shares: int, how: str, seed: int, groups: Labels | None = None) -> list[Indices]:
    """Split examples among shares.

    Every example goes to exactly one share, and every share gets at least one.

    Args:
        labels: int [examples], classes from 0.
        shares: number of clients, in [1, examples].
        how: one of the forms above.
        seed: of the dealing.
        groups: int [examples], the writer or speaker of each; needed by `groups` alone.

    Returns:
        One array of indices into `labels` per share, disjoint, together all, in no order to rely on.

    Raises:
        ValueError: no such partition, or one that cannot be made of these examples; the message has the numbers.

    Source: `shards`, McMahan et al., arXiv:1602.05629, section 3; `dirichlet`, Hsu et al., arXiv:1909.06335, in the
    form per class of Li et al., arXiv:2102.02079, as CA2FL and FADAS use it.
    """
    choice = parse(how, PARTITIONS)
    if not 1 <= shares <= len(labels):
        raise ValueError(f"{shares:,} shares of {len(labels):,} examples: each share needs one at least")
    rng = np.random.default_rng(seed)
    match choice.name:
        case "iid":
            parts = np.array_split(rng.permutation(len(labels)), shares)
        case "consecutive":
            parts = np.array_split(np.arange(len(labels)), shares)
        case "dirichlet":
            parts = dirichlet(labels, shares, choice["alpha"], rng)
        case "shards":
            parts = label_shards(labels, shares, int(choice["each"]), seed)
        case "quantity":
            parts = log_normal_sizes(len(labels), shares, choice["sigma"], rng)
        case "groups":
            parts = whole_groups(labels, shares, groups)
        case _:
            parts = rare_classes(labels, shares, int(choice["classes"]), choice["share"], rng)
    return [part.astype(np.int64) for part in parts]


def least_of(examples: int, shares: int) -> int:
    """Return how many examples each share of an uneven deal gets at least: min(10, examples / (4 shares)), or 1.

    A quarter of the mean leaves room for skew, and can always be given to all.
    """
    return max(1, min(LEAST, examples // (4 * shares)))


def dirichlet(labels: Labels, shares: int, alpha: float, rng: np.random.Generator) -> list[Indices]:
    """Split the examples of each class c by p_c ~ Dir(alpha 1_shares).

    A draw that leaves a share with fewer than `least_of` examples is thrown away. With a small alpha and many shares
    no draw may ever do, so after a hundred the one with the largest smallest share is kept, and the largest shares
    give the smallest what they lack, examples at random.

    Args:
        labels: int [examples].
        shares: number of clients.
        alpha: > 0; towards 0 each class has one owner, towards infinity all have the same mix.
        rng: draws.
    """
    classes = [rng.permutation(np.flatnonzero(labels == label)) for label in np.unique(labels)]
    sizes = np.array([len(members) for members in classes])
    least, best, kept = least_of(len(labels), shares), -1, np.zeros((len(classes), shares), np.int64)
    for _ in range(REDRAWS):
        up_to = np.cumsum(rng.dirichlet([alpha] * shares, len(classes)), axis=1)
        up_to[:, -1] = 1.0  # a sum of roundings is not
        cuts = np.floor(up_to * sizes[:, None]).astype(np.int64)
        smallest = int(np.diff(cuts, axis=1, prepend=0).sum(axis=0).min())
        if smallest > best:
            best, kept = smallest, cuts
        if best >= least:
            break
    pieces = [np.split(members, cuts[:-1]) for members, cuts in zip(classes, kept, strict=True)]
    parts = [np.concatenate([piece[share] for piece in pieces]) for share in range(shares)]
    return _top_up(parts, least, rng)


def _top_up(parts: list[Indices], least: int, rng: np.random.Generator) -> list[Indices]:
    """Give each share at least `least` examples, taken from what is then the largest; replaces the items of `parts`."""
    largest = [(-len(part), share) for share, part in enumerate(parts)]
    heapq.heapify(largest)
    for share in range(len(parts)):
        while (lacking := least - len(parts[share])) > 0:
            giver = largest[0][1]
            given = min(lacking, len(parts[giver]) - least)
            mixed = rng.permutation(parts[giver])
            parts[share], parts[giver] = np.concatenate([parts[share], mixed[:given]]), mixed[given:]
            heapq.heapreplace(largest, (-len(parts[giver]), giver))
    return parts


def label_shards(labels: Labels, shares: int, shards_each: int, seed: int) -> list[Indices]:
    """Split examples so that each share sees few classes.

    The examples are sorted by label and cut into shares * shards_each shards of equal size; each share gets
    shards_each of them at random.

    Args:
        labels: int [examples].
        shares: number of clients, >= 1.
        shards_each: shards a client gets; 2 is the hard classic.
        seed: of the dealing.

    Returns:
        One array of indices into `labels` per share, disjoint, together all.

    Raises:
        ValueError: more shards than examples.

    Source: McMahan et al., arXiv:1602.05629, section 3.
    """
    if shares * shards_each > len(labels):
        raise ValueError(f"{shares:,} shares of {shards_each:,} shards need more than the {len(labels):,} examples")
    shards = np.array_split(np.argsort(labels, kind="stable"), shares * shards_each)
    order = np.random.default_rng(seed).permutation(len(shards))
    return [
        np.concatenate([shards[i] for i in order[share * shards_each : (share + 1) * shards_each]])
        for share in range(shares)
    ]


def log_normal_sizes(examples: int, shares: int, sigma: float, rng: np.random.Generator) -> list[Indices]:
    """Split examples at random into shares of uneven size.

        size_i = least + (examples - shares least) e^(sigma z_i) / sum_j e^(sigma z_j),   z ~ N(0, 1)

    Args:
        examples: how many.
        shares: number of clients.
        sigma: >= 0; with 1 the largest of a hundred has some ten times the median.
        rng: draws.
    """
    least = least_of(examples, shares)
    weights = np.exp(sigma * rng.standard_normal(shares))
    extra = np.floor(np.cumsum(weights)[:-1] / weights.sum() * (examples - shares * least)).astype(np.int64)
    return np.split(rng.permutation(examples), extra + least * np.arange(1, shares))


def whole_groups(labels: Labels, shares: int, groups: Labels | None) -> list[Indices]:
    """Give each group's examples to one share: the groups by size, the largest first, each to the smallest share.

    With as many shares as groups each share is one group; with fewer the shares come out about equal.

    Args:
        labels: int [examples].
        shares: number of clients, at most the number of groups.
        groups: int [examples].

    Raises:
        ValueError: no groups, or fewer than shares.
    """
    if groups is None or len(groups) != len(labels):
        raise ValueError("these data have no writers or speakers to be dealt by groups")
    names, sizes = np.unique(groups, return_counts=True)
    if shares > len(names):
        raise ValueError(f"{shares:,} shares of {len(names):,} groups: a group is not divided")
    share_of_group, filled = np.zeros(len(names), np.int64), np.zeros(shares, np.int64)
    for group in np.argsort(-sizes, kind="stable"):
        share_of_group[group] = np.argmin(filled)
        filled[share_of_group[group]] += sizes[group]
    share_of_example = share_of_group[np.searchsorted(names, groups)]
    return [np.flatnonzero(share_of_example == share) for share in range(shares)]


def rare_classes(labels: Labels, shares: int, classes: int, share: float, rng: np.random.Generator) -> list[Indices]:
    """Give the last classes to the last shares and to nobody else; both lots are dealt iid among their shares.

    When the last shares are also the slow ones, this is where averaging what arrives forgets the rare classes.

    Args:
        labels: int [examples].
        shares: number of clients, >= 2.
        classes: how many of the last classes are rare, fewer than there are.
        share: part of the clients that have them, rounded to at least one and at most all but one.
        rng: draws.

    Raises:
        ValueError: too few clients, classes or examples.
    """
    names = np.unique(labels)
    if shares < 2 or classes >= len(names):
        raise ValueError(f"{classes} rare of {len(names)} classes among {shares} shares: one of each must be left")
    owners = min(shares - 1, max(1, round(share * shares)))
    rare = np.isin(labels, names[-classes:])
    lots = ((np.flatnonzero(~rare), shares - owners), (np.flatnonzero(rare), owners))
    for lot, among in lots:
        if len(lot) < among:
            raise ValueError(f"{among:,} shares of {len(lot):,} examples: each share needs one at least")
    return [part for lot, among in lots for part in np.array_split(rng.permutation(lot), among)]


def label_counts(labels: Labels, parts: Sequence[Indices], classes: int) -> npt.NDArray[np.int64]:
    """Count the examples of every class at every share, [shares, classes]: who has the rare ones, how skewed it is."""
    return np.stack([np.bincount(labels[part], minlength=classes) for part in parts]).astype(np.int64)


def share_of(client: str, settings: Mapping[str, str], shares: int) -> int:
    """Return which share a worker has: its setting `share`, or one derived from its id."""
    chosen = int(settings["share"]) if "share" in settings else zlib.crc32(client.encode())
    return chosen % shares
