"""The worker's copy of the weights it trains from, and the cheapest way to the newest ones.

Deltas from the version at hand if they are smaller than a snapshot, else a snapshot and the deltas after it, else -
where nothing is published beside the model - the model itself. Published weights must have the hash the head
announces; deltas that lead elsewhere are made good with a snapshot.
"""

import logging

from shared.errors import RejectedUpdate, VersionGone
from shared.metrics import WorkerMetrics
from shared.model_image import ModelImage
from shared.published import Plan, carry_out, plan
from shared.store.ports import Head, WorkerStore

log = logging.getLogger("fedmq.worker")


class Replica:
    """What a worker holds of the job's weights.

    Args:
        store: where they are pulled from.
        metrics: what is counted.

    Attributes:
        image: the weights; None before the first pull, and after one that left them half done.
        version: theirs; -1 while there are none.
        sha256: their hash, as the head announced it.
    """

    def __init__(self, store: WorkerStore, metrics: WorkerMetrics) -> None:
        self._store, self._metrics = store, metrics
        self.image: ModelImage | None = None
        self.version = -1
        self.sha256 = ""

    def differs(self, head: Head) -> bool:
        """Tell whether the head announces other weights; also of the same version, in a job that began anew."""
        return (head.version, head.published or head.sha256) != (self.version, self.sha256)

    def pull(self, head: Head) -> ModelImage:
        """Move to the head's version, in place where deltas lead there.

        Args:
            head: as just read; its version need not be newer than the one at hand.

        Raises:
            VersionGone: what leads there was replaced meanwhile, or is damaged; look again.
            StoreUnavailable: the weights at hand are as they were, unless they had proved damaged.
        """
        if not head.published:
            image = self._store.model(head.version)
            self._count("model", image.data.size)
            return self._take(image, head)
        held = self.version if self.image is not None else -1
        if held >= head.version:  # the job began anew, or went back
            held = -1
        way = plan(self._store.published(held), head.version, held)
        if way is not None and way.snapshot is None:
            if (pulled := self._follow(way, head)) is not None:
                return pulled
            self.forget()
            way = None
        if way is None and held >= 0:  # what leads on from there is not the whole index
            way = plan(self._store.published(-1), head.version, -1)
        if way is None:
            raise VersionGone(f"nothing that is stored leads to the published weights of version {head.version}")
        if (pulled := self._follow(way, head)) is None:
            raise VersionGone(f"the published weights of version {head.version} are damaged")
        return pulled

    def forget(self) -> None:
        """Let go of the weights: they are no longer the job's, or damaged."""
        self.image, self.version, self.sha256 = None, -1, ""

    def _follow(self, way: Plan, head: Head) -> ModelImage | None:
        """Carry out a plan; None and counted when what comes out is not what the head announces."""
        try:
            image = carry_out(way, self._store, self.image)
            problem = "" if image.sha256 == head.published else "their hash is not the head's"
        except RejectedUpdate as error:
            problem = str(error)
        self._count("deltas" if way.snapshot is None else "snapshot", way.size_bytes)
        if problem:
            self._metrics.mismatches.inc()
            log.warning("pulled weights of version %d do not fit (%s): pulling a snapshot", head.version, problem)
            return None
        return self._take(image, head)

    def _take(self, image: ModelImage, head: Head) -> ModelImage:
        self.image, self.version, self.sha256 = image, head.version, head.published or head.sha256
        return image

    def _count(self, how: str, size_bytes: int) -> None:
        self._metrics.pulls.labels(how).inc()
        self._metrics.pulled_bytes.inc(size_bytes)
