"""Who has which data, in the worked tasks."""

import zlib
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

Indices = npt.NDArray[np.int64]


def label_shards(labels: npt.NDArray[np.int64], shares: int, shards_each: int, seed: int) -> list[Indices]:
    """Split examples so that each share sees few classes.

    The examples are sorted by label and cut into shares * shards_each shards of equal size; each share gets
    shards_each of them at random.

    Args:
        labels: int [examples].
        shares: number of workers, >= 1.
        shards_each: shards a worker gets; 2 is the hard classic.
        seed: of the dealing.

    Returns:
        One array of indices into `labels` per share, disjoint, together all.

    Source: McMahan et al., arXiv:1602.05629, section 3.
    """
    shards = np.array_split(np.argsort(labels, kind="stable"), shares * shards_each)
    order = np.random.default_rng(seed).permutation(len(shards))
    return [
        np.concatenate([shards[i] for i in order[share * shards_each : (share + 1) * shards_each]])
        for share in range(shares)
    ]


def share_of(client: str, settings: Mapping[str, str], shares: int) -> int:
    """Return which share a worker has: its setting `share`, or one derived from its id."""
    chosen = int(settings["share"]) if "share" in settings else zlib.crc32(client.encode())
    return chosen % shares
