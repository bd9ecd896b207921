"""What the aggregator publishes for workers beside the model: compressed deltas between versions, and snapshots.

With a codec, xhat_v = xhat_p + Q(x_v - xhat_p) is kept beside the model x_v (see `shared/published.py`); without one
but with bfloat16 snapshots, xhat_v is x_v rounded. With neither, nothing is published and workers train from x_v.
A publication is part of the commit that moves the version: it is computed once, repeated with a commit that was not
answered, and computed anew from what is stored when somebody else committed.
"""

import logging
from typing import Any

import numpy as np

from shared.compression import downlink_codec
from shared.config import AggregatorSettings
from shared.errors import RejectedUpdate, VersionGone
from shared.metrics import AggregatorMetrics
from shared.model_image import ModelImage
from shared.published import Delta, DeltaEntry, Index, Publication, SnapshotEntry, carry_out, decoded, pack, plan
from shared.snapshot import BFLOAT16, snapshot_bytes
from shared.store.ports import Head, WorkerStore
from shared.vector import round_to_bfloat16, squared_norm

log = logging.getLogger("fedmq.aggregator")

SNAPSHOT_SHARE = 0.5  # a snapshot is due when the deltas since the last one exceed this share of its size
DELTAS_PER_SNAPSHOT_MAX = 256
DELTAS_MAX = 2 * DELTAS_PER_SNAPSHOT_MAX  # stored ones, however small
SNAPSHOTS_MIN = 2  # the newest, and the one somebody may be reading


class Downlink:
    """The published weights xhat and the index of what is stored of them.

    Args:
        settings: the job's; `downlink`, `snapshots`, `versions_kept`.
        store: where a published state is read from at start and after a conflict.
    """

    def __init__(self, settings: AggregatorSettings, store: WorkerStore) -> None:
        self._codec, self._dtype = downlink_codec(settings.downlink), settings.snapshots
        # Without deltas every version is a snapshot: they come as fast as models, and stay as long.
        kept = 1 if self._codec else settings.versions_kept
        self._snapshots_kept = max(SNAPSHOTS_MIN, kept)
        self._store = store
        self._image: ModelImage | None = None  # xhat; of model size, only with a codec or bfloat16
        self._version = -1  # whose xhat it is; -1: nothing leads on from it
        self._index = Index()
        self._prepared: Publication | None = None

    def adopt(self, head: Head) -> None:
        """Rebuild xhat from what is stored; where that fails, the next publication begins with a snapshot.

        Where nothing was published yet workers hold the model itself: that is the xhat the first delta starts from.

        Raises:
            StoreUnavailable: nothing has changed.
        """
        index, image = self._store.published(-1), None
        if self._codec is not None and not head.published:
            try:
                image = self._store.model(head.version)
            except VersionGone as error:  # a rival has moved on: nothing that comes of this state will be committed
                log.warning("version %d is gone before it was adopted: %s", head.version, error)
        elif self._codec is not None:
            way = plan(index, head.version, -1)
            try:
                image = carry_out(way, self._store, None) if way is not None else None
            except (VersionGone, RejectedUpdate) as error:
                log.warning("what is published of version %d cannot be read: %s", head.version, error)
            if image is None or image.sha256 != head.published:
                log.warning("the published weights of version %d are lost: the next ones are a snapshot", head.version)
                image = None
        self._index, self._image, self._prepared = index, image, None
        self._version = -1 if image is None else head.version

    def publish(self, version: int, model: ModelImage) -> Publication:
        """Return what to commit with a new version; the same when asked again before `committed` or `adopt`.

        Args:
            version: beyond the last committed one.
            model: x_v, not changed.
        """
        if self._prepared is None:
            self._prepared = self._prepare(version, model)
        return self._prepared

    def committed(self, metrics: AggregatorMetrics) -> None:
        """Note that the publication is durable."""
        done, self._prepared = self._prepared, None
        if done is None:
            return
        snapshots = [entry for entry in self._index.snapshots if entry not in done.dropped_snapshots]
        deltas = [entry for entry in self._index.deltas if entry not in done.dropped_deltas]
        if done.delta is not None:
            deltas.append(done.delta[0])
            metrics.published_bytes.labels("delta").inc(done.delta[0].size_bytes)
        if done.snapshot is not None:
            snapshots.append(done.snapshot[0])
            metrics.published_bytes.labels("snapshot").inc(done.snapshot[0].size_bytes)
        self._index = Index(tuple(snapshots), tuple(deltas))

    def _prepare(self, version: int, model: ModelImage) -> Publication:
        """Move xhat to a version and say what is to be stored of it."""
        if self._codec is None and self._dtype != BFLOAT16:
            return Publication(dropped_deltas=self._index.deltas, dropped_snapshots=self._index.snapshots)
        step = self._advance(version, model) if self._image is not None and self._version >= 0 else None
        if step is None:
            self._start_anew(model)
        image = self._image
        assert image is not None, "made by one of the two"  # noqa: S101
        due = step is None or self._snapshot_due(model, len(step[1]))
        rounded = due and self._dtype == BFLOAT16
        if rounded:
            round_to_bfloat16(image.weights)
        delta = None
        if step is not None:
            record = pack(Delta(version, self._version, rounded, *step))
            delta = (DeltaEntry(version, self._version, len(record)), record)
        size_bytes = snapshot_bytes(model.layout, self._dtype)
        snapshot = (SnapshotEntry(version, self._dtype, size_bytes), image) if due else None
        if self._codec is not None:
            self._version = version
        return self._publication(image.sha256, delta, snapshot, size_bytes)

    def _advance(self, version: int, model: ModelImage) -> tuple[dict[str, Any], bytes] | None:
        """Add Q(x - xhat) to xhat in place; return the codec's map and the payload, None if there is no such step."""
        image, codec = self._image, self._codec
        if image is None or codec is None:
            return None
        difference = model.weights - image.weights
        if not np.isfinite(squared_norm(difference)):
            log.warning("version %d is too far from the one before it for a delta: it is a snapshot", version)
            return None
        encoded = codec.encode(difference, model.layout, np.random.default_rng(version))
        named = {"name": codec.name, **encoded.params}
        try:
            decoded(named, encoded.payload, model.layout).add_into(image.weights, 1.0)  # as every replica does
        except RejectedUpdate as error:
            log.warning("version %d is a snapshot, because its delta cannot be read back: %s", version, error)
            return None
        return named, encoded.payload

    def _start_anew(self, model: ModelImage) -> None:
        """Make xhat the model itself: the beginning of a chain."""
        if self._image is None:
            self._image = model.copy()
        else:
            self._image.data[:] = model.data

    def _snapshot_due(self, model: ModelImage, payload_bytes: int) -> bool:
        """Tell whether the deltas since the last snapshot, this one included, have become too large or too many."""
        newest = self._index.snapshots[-1].version if self._index.snapshots else -1
        sizes = [entry.size_bytes for entry in self._index.deltas if entry.version > newest] + [payload_bytes]
        limit = SNAPSHOT_SHARE * snapshot_bytes(model.layout, self._dtype)
        return newest < 0 or sum(sizes) > limit or len(sizes) >= DELTAS_PER_SNAPSHOT_MAX

    def _publication(
        self, sha256: str, delta: tuple[DeltaEntry, bytes] | None, snapshot: tuple[SnapshotEntry, ModelImage] | None,
        snapshot_size_bytes: int,
    ) -> Publication:  # fmt: skip
        """Decide what of the index may go: old snapshots, and deltas that cost more than a snapshot."""
        snapshots = [*self._index.snapshots, *([snapshot[0]] if snapshot else [])]
        deltas = {entry.version: entry for entry in (*self._index.deltas, *([delta[0]] if delta else []))}
        useful: set[int] = set()
        total_bytes = 0
        step = deltas[delta[0].version] if delta else None
        while step is not None and len(useful) < DELTAS_MAX:
            total_bytes += step.size_bytes
            if total_bytes > snapshot_size_bytes and step.version <= snapshots[-1].version:
                break
            useful.add(step.version)
            step = deltas.get(step.parent)
        return Publication(
            sha256, delta, snapshot,
            dropped_deltas=tuple(entry for entry in self._index.deltas if entry.version not in useful),
            dropped_snapshots=tuple(snapshots[: -self._snapshots_kept]),
        )  # fmt: skip
