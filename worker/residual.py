"""The residual: what a worker's updates have not carried yet, and what the server gave back.

    a = delta + e;  send C(a);  e <- a - what C(a) decodes to

Nothing is lost or counted twice, whatever fails when (power cuts included): an update made with the residual is
finished by one rename, that of the residual's file. Around it, in this order,

    1. the encoded update is written as `<sequence>.staged`: not to be published yet;
    2. the residual's file is replaced; it names this update (`made`) and the refused ones it took back (`returned`);
    3. `.staged` becomes `.kept.update`, to be published, and the refused ones' files go.

After a crash the residual's file tells what of step 3 is left to do; a staged update that it does not name never
happened. In memory there is only a copy of the file: whatever raises, the next step starts from the file.

An update that carried a residual is kept after the broker's confirm until the store says what became of it: an
applied one goes, the mass of a refused one comes back. A refused update made without a residual stays lost, as its
codec keeps no account either. Whenever an outcome is not certain - more updates sent than are kept, a kept file that
cannot be read - the update counts as applied: mass may be lost then, never doubled.

Mass grows old. The residual and every kept update know their mean version, that is when their mass was trained:

    u <- (|e| u + |v| u_v) / (|e| + |v|)    when v joins e: the delta at the version now, a refused update at its own u

What is older than the horizon decays (`decay`), wherever it was meanwhile: mass that goes round, sent and refused and
sent again, is as old as if it had stayed. Only the last flight of a refused update counts as one horizon at most: a
delta that was refused once comes back whole, however late. If all updates are refused, each a share x <= 1 of a
horizon after the one before, the next is as large as 1 / (1 - f) deltas at most, f = 2^(1 - x - f): 25 for x = 1/10.

With rule area the same file holds a memory, y_mem with its sign turned: what the server has of this worker. An update
is C(y - y_mem), y the trained weights; a refused one comes back by the same addition, and nothing fades.

Source: Seide et al., Interspeech 2014; Karimireddy et al., arXiv:1901.09847, algorithm 2 (EF-SGD).
"""

import logging
import math
from collections.abc import Callable

import numpy as np

from shared.compression import Codec, Encoded, decode
from shared.compression.error_feedback import encode_with_feedback
from shared.errors import DiskFull, RejectedUpdate, TaskError, Unavailable
from shared.layout import Layout
from shared.messages import decode as decode_message
from shared.metrics import WorkerMetrics
from shared.store.ports import WorkerStore
from shared.vector import NORM_MAX, Vector, add_scaled, squared_norm
from worker import residual_file
from worker.outbox import Outbox
from worker.residual_file import MEANS_MAX, MEMORY, RESIDUAL, Header

log = logging.getLogger("fedmq.worker")

REFUSED = ("stale", "rejected")
KEPT_FOR_EVER = 1 << 60  # a horizon: a memory does not fade
HORIZONS = 10  # a residual stays whole for so many times the job's staleness_max


def decay(gap: float, horizon: int) -> float:
    """Return the share of a residual that still counts: 1 up to the horizon, halved by every further one.

        d(g) = 2^-(g/h - 1)  for g > h, else 1

    An old residual points where the model no longer is. The horizon is HORIZONS times the staleness the server takes,
    so that a slow worker, whose updates are refused now and then, does not lose again what came back.

    Args:
        gap: g, the mean age of what is in it, in versions.
        horizon: h, in versions; less than 1 counts as 1.

    Returns:
        Factor in [0, 1].
    """
    horizon = max(1, horizon)
    return 1.0 if gap <= horizon else 0.5 ** (gap / horizon - 1.0)


def fade(mean: float, version: int, horizon: int) -> tuple[float, float]:
    """Return the share of some mass that is left, and the mean version it has from here on.

    What has decayed counts as one horizon old: how often a worker trains makes no difference to how fast it decays.

    Args:
        mean: mean version of the mass.
        version: the model version now.
        horizon: as of `decay`.
    """
    return decay(version - mean, horizon), max(mean, version - max(1, horizon))


def mean_version(norm: float, mean: float, norm_joining: float, mean_joining: float) -> float:
    """Return the mean version of two parts, weighted by their norms; when the first is zero that of the second."""
    if norm == 0.0:
        return mean_joining
    return (norm * mean + norm_joining * mean_joining) / (norm + norm_joining)


class Residual:
    """The residual of one worker, in its outbox's folder. Used by the training thread.

    Args:
        outbox: of the worker.
        store: tells what became of its updates.
        metrics: what it counts.
    """

    def __init__(self, outbox: Outbox, store: WorkerStore, metrics: WorkerMetrics) -> None:
        self._outbox, self._store, self._metrics = outbox, store, metrics
        self._outcomes: dict[int, str] = {}  # first outcome of the updates that wait to be settled
        self._cursor = 0  # of the store's outcomes
        self._said: set[str] = set()
        self._vector: Vector | None = None  # None is zero
        self._kind = RESIDUAL
        self._layout, self._mean = "", 0.0  # what it is of, and the mean version of what is in it
        self._means: dict[int, float] = {}  # the same of the updates kept, by number
        self._newest = (0, 0)  # version and revision seen
        self._first = 0  # number of the first update of this run of the job
        self._returned: list[int] = []  # refused updates it took back since it was written
        self._carries = False  # the update under way holds a residual
        self._dirty = False  # between encode and put: memory is ahead of the file
        self._open()

    def prepare(
        self,
        layout: Layout,
        version: int,
        revision: int | None,
        horizon: int,
        start: Callable[[], Vector] | None = None,
    ) -> None:
        """Bring the residual up to date before a training: settle what was sent, let old mass fade.

        Args:
            layout: the model's.
            version: the model version now.
            revision: of the head it was pulled with; None when the store was away.
            horizon: age in versions from which a residual decays (`decay`).
            start: for rule area: gives the weights all memories start from. None: error feedback.

        Raises:
            StoreUnavailable: there is no memory yet and `start` cannot be read.
        """
        if self._dirty:
            self._open()
        self._dirty = True  # until put
        self._carries = self._vector is not None  # then the file must not keep it
        self._carries |= self._began_anew(version, revision)
        self._fit(layout, RESIDUAL if start is None else MEMORY)
        if start is not None and self._vector is None:
            self._vector = -start()
        self._age(version, horizon)
        self._settle(layout, version, horizon)

    def encode(
        self, codec: Codec, delta: Vector, layout: Layout, version: int, rng: np.random.Generator
    ) -> Encoded:  # fmt: skip
        """Encode what was trained after `prepare`, together with the residual; `put` must follow.

        With a codec without feedback the residual goes along as a whole and is zero after.

        Args:
            codec: the job's.
            delta: float32 [n], finite; changed in place. With a memory (rule area): the weights after training.
            layout: the model's.
            version: the training started from.
            rng: of the codec.

        Raises:
            TaskError: a codec with feedback cannot hold a delta this large; the residual stays as it was.
        """
        self._mean = mean_version(self._bound(), self._mean, _norm(delta), version)
        self._carries |= codec.feedback or self._vector is not None or bool(self._returned)
        try:
            if self._kind == MEMORY and self._vector is None:
                raise TaskError("the memory of rule area is beyond all bounds: the update is not sent")
            if self._kind == MEMORY and self._vector is not None:
                return self._encode_against_memory(codec, delta, self._vector, layout, rng)
            if codec.feedback:
                if self._vector is None:
                    self._vector = np.zeros(layout.num_params, np.float32)
                return encode_with_feedback(codec, delta, self._vector, layout, rng)
        except RejectedUpdate as error:  # as the server would: the residual is bounded, so it is the delta
            raise TaskError(f"the update is not sent, its delta is too large: {error}") from error
        if self._vector is not None:
            add_scaled(delta, self._vector, 1.0)
            self._vector = None
        return codec.encode(delta, layout, rng)

    def _encode_against_memory(
        self, codec: Codec, trained: Vector, negative: Vector, layout: Layout, rng: np.random.Generator
    ) -> Encoded:  # fmt: skip
        """Encode y - y_mem and remember what the server gets of it: y_mem <- y_mem + C(y - y_mem).

        Args:
            codec: the job's.
            trained: float32 [n], y; changed in place.
            negative: float32 [n], -y_mem; changed in place, so that refused mass comes back as it does in a residual.
            layout: the model's.
            rng: of the codec.

        Source: AREA, arXiv:2405.10123, algorithm 1, with the compressed difference in the memory's place.
        """
        add_scaled(trained, negative, 1.0)
        encoded = codec.encode(trained, layout, rng)
        sent = decode({"name": codec.name, **encoded.params}, encoded.payload, layout)
        sent.add_into(negative, -1.0)
        return encoded

    def put(self, body: bytes) -> None:
        """Put the update that `encode` began into the outbox: from here on it happened.

        Raises:
            DiskFull: it did not happen yet; call again with the same.
        """
        if self._carries:
            sequence = self._outbox.stage(body)
            size = 0 if self._vector is None else self._vector.size
            kept = sorted({*self._outbox.unsettled().values()}.difference(self._returned))[-MEANS_MAX:]
            self._means = {s: self._means[s] for s in kept if s in self._means} | {sequence: self._mean}
            header = Header(
                self._layout, size, self._mean, sequence, self._returned,
                means=self._means, newest_version=self._newest[0], newest_revision=self._newest[1], first=self._first,
                kind=self._kind,
            )  # fmt: skip
            try:
                residual_file.write(self._outbox.folder, header, self._vector)
            except DiskFull:
                self._outbox.unstage(sequence)
                raise
            self._outbox.release(sequence)
            self._outbox.forget(self._returned, durable=True)
            self._metrics.residual_norm.set(_norm(self._vector))
            self._metrics.returned.inc(len(self._returned))
            self._returned = []
        else:
            self._outbox.put(body)
        self._dirty = False

    def _open(self) -> None:
        """Start from what is on disk, and finish what a crash interrupted."""
        self._dirty, self._returned, self._vector = False, [], None
        made: int | None
        try:
            header, self._vector = residual_file.read(self._outbox.folder)
            made = header.made
        except (OSError, ValueError) as error:
            header, made = Header(), None
            log.warning(
                "the residual of %s is damaged (%s): what it held is lost; starting from zero. Under rule area the "
                "server counts what this worker sent so far twice from here on: begin such a job anew",
                self._outbox.client, error,
            )  # fmt: skip
        self._layout, self._mean, self._means = header.layout, header.version, header.means
        self._kind = header.kind
        self._newest, self._first = (header.newest_version, header.newest_revision), header.first
        self._outbox.recover(made, header.returned)
        self._metrics.residual_norm.set(_norm(self._vector))

    def _began_anew(self, version: int, revision: int | None) -> bool:
        """Tell whether this is another run of the job; then all that is of the former one goes."""
        newest_version, newest_revision = self._newest[0], max(self._newest[1], self._cursor)
        now = newest_revision if revision is None else revision
        if version >= newest_version and now >= newest_revision:
            self._newest = version, now
            return False
        log.warning(
            "the job began anew, or its store went back (to version %d from %d, revision %d from %d): the residual's "
            "norm of %.4g and %d sent updates are of the former run and count no more (under rule area a store that "
            "went back counts this worker twice: begin such a job anew)",
            version, newest_version, now, newest_revision, _norm(self._vector), len(self._outbox.unsettled()),
        )  # fmt: skip
        self._newest, self._cursor = (version, revision or 0), 0
        self._vector, self._outcomes, self._first = None, {}, self._outbox.next_sequence
        return True

    def _fit(self, layout: Layout, kind: str) -> None:
        """Drop a residual of another model, or of a rule that means something else by it."""
        if self._kind != kind:
            if self._vector is not None:
                log.warning("the job's rule changed: what is kept is a %s, not a %s, and begins anew", self._kind, kind)
            self._vector, self._outcomes, self._first = None, {}, self._outbox.next_sequence
            self._carries = True  # the file is to say so
        self._kind = kind
        if self._vector is not None and self._layout != layout.hash:
            log.warning(
                "the residual is of another model (layout %s, the job's is %s): its norm of %.4g is lost",
                self._layout[:12], layout.hash[:12], _norm(self._vector),
            )  # fmt: skip
            self._vector = None
        self._layout = layout.hash

    def _age(self, version: int, horizon: int) -> None:
        """Let a residual fade that is old."""
        if self._vector is None:
            return
        share, mean = fade(self._mean, version, horizon)
        if share < 1.0:
            self._say("decay", f"the residual is {version - self._mean:.0f} versions old: it counts {share:.3g}")
            self._vector *= np.float32(share)
        self._mean = mean

    def hear(self) -> list[int]:
        """Forget what was applied, as far as the store tells; return the numbers of those that were refused.

        Also called while no training may begin: what became of an update is not told for ever.
        """
        unsettled = self._outbox.unsettled()
        self._outcomes = {s: self._outcomes[s] for s in unsettled.values() if s in self._outcomes}
        if not unsettled:
            return []
        try:
            news, self._cursor = self._store.outcomes(self._outbox.client, self._cursor)
        except Unavailable as error:
            log.debug("%s; settling later", error)
            news = []
        for update_id, outcome in news:
            if update_id in unsettled:  # the first outcome is what happened, a later one is of the same bytes again
                self._outcomes.setdefault(unsettled[update_id], outcome)
        known = [s for s in self._outbox.sent() if s in self._outcomes]  # one not confirmed may be published again
        refused = [s for s in known if self._outcomes[s] in REFUSED]
        self._outbox.forget([s for s in known if s not in refused])
        return refused

    def _settle(self, layout: Layout, version: int, horizon: int) -> None:
        """Forget what was applied and take back what was refused, as far as the store tells."""
        self._outbox.forget([s for s in self._outbox.sent() if s < self._first])
        for sequence in (refused := self.hear()):
            if self._take_back(sequence, layout, version, horizon):
                self._returned.append(sequence)
        self._outbox.forget([s for s in refused if s not in self._returned])
        surplus = self._outbox.surplus(self._returned)
        if surplus:
            self._say("surplus", f"{len(surplus)} sent updates are beyond the outbox's limits: they count as applied")
            self._outbox.forget(surplus)

    def _take_back(self, sequence: int, layout: Layout, version: int, horizon: int) -> bool:
        """Add the mass of a refused update to the residual; tell whether it could be read.

        What was trained for it comes back whole, however late: its flight counts as one horizon at most. What it held
        of a residual older than that fades as if it had stayed.
        """
        try:
            body = self._outbox.sent_body(sequence)
            update = decode_message(body, len(body))
            if update.layout != layout.hash:
                raise ValueError(f"it is of another model, layout {update.layout[:12]}")
            delta = decode(update.codec, update.payload, layout)
        except (OSError, ValueError, RejectedUpdate) as error:
            log.warning("the refused update %d cannot be taken back, its mass is lost: %s", sequence, error)
            return False
        if self._vector is None:
            self._vector = np.zeros(layout.num_params, np.float32)
        forgiven = max(0, version - update.base_version - max(1, horizon))
        share, mean = fade(self._means.get(sequence, update.base_version) + forgiven, version, horizon)
        norm = share * math.sqrt(delta.squared_norm())
        self._mean = mean_version(_norm(self._vector), self._mean, norm, mean)
        delta.add_into(self._vector, share)
        return True

    def _bound(self) -> float:
        """Drop a residual no update can carry: it would spoil every one to come; return the norm."""
        norm = _norm(self._vector)
        if not norm <= NORM_MAX:  # nor NaN
            log.warning("the residual's norm of %.4g is beyond %.4g: it is lost, starting from zero", norm, NORM_MAX)
            self._vector, norm = None, 0.0
        return norm

    def _say(self, topic: str, message: str) -> None:
        """Warn the first time, then leave it to the debug log."""
        log.log(logging.DEBUG if topic in self._said else logging.WARNING, "%s", message)
        self._said.add(topic)


def _norm(vector: Vector | None) -> float:
    return 0.0 if vector is None else math.sqrt(squared_norm(vector))
