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

Source: Seide et al., Interspeech 2014; Karimireddy et al., arXiv:1901.09847, algorithm 2 (EF-SGD).
"""

import logging
import math

import numpy as np

from shared.compression import Codec, Encoded, decode
from shared.compression.error_feedback import encode_with_feedback
from shared.errors import RejectedUpdate, TaskError, Unavailable
from shared.layout import Layout
from shared.messages import decode as decode_message
from shared.metrics import WorkerMetrics
from shared.store.ports import WorkerStore
from shared.vector import Vector, add_scaled, squared_norm
from worker import residual_file
from worker.outbox import Outbox
from worker.residual_file import Header

log = logging.getLogger("fedmq.worker")

REFUSED = ("stale", "rejected")
NORM_MAX = 1e15  # codecs take values up to 1e16


HORIZONS = 10  # a residual stays whole for so many times the job's staleness_max


def decay(gap: int, horizon: int) -> float:
    """Return the share of a residual that still counts: 1 up to the horizon, halved by every further one.

        d(g) = 2^-(g/h - 1)  for g > h, else 1

    An old residual points where the model no longer is. The horizon is HORIZONS times the staleness the server takes,
    so that a slow worker, whose updates are refused now and then, does not lose again what came back.

    Args:
        gap: g, versions since the residual was last used; negative when the job began anew.
        horizon: h, in versions; less than 1 counts as 1.

    Returns:
        Factor in [0, 1].
    """
    horizon = max(1, horizon)
    return 1.0 if gap <= horizon else 0.5 ** (gap / horizon - 1.0)


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
        self._layout, self._version = "", 0  # what it is of, and when it was last used
        self._returned: list[int] = []  # refused updates it took back since it was written
        self._carries = False  # the update under way holds a residual
        self._dirty = False  # between encode and put: memory is ahead of the file
        self._open()

    def encode(
        self, codec: Codec, delta: Vector, layout: Layout, version: int, horizon: int, rng: np.random.Generator
    ) -> Encoded:
        """Encode a delta together with the residual; `put` must follow.

        With a codec without feedback the residual goes along as a whole and is zero after.

        Args:
            codec: the job's.
            delta: float32 [n], finite; changed in place.
            layout: the model's.
            version: the model version now.
            horizon: versions after which an old residual decays (`decay`).
            rng: of the codec.

        Raises:
            TaskError: a codec with feedback cannot hold a delta this large; the residual stays as it was.
        """
        if self._dirty:
            self._open()
        self._dirty = True  # until put
        self._fit(layout)
        self._age(version, horizon)
        self._settle(layout)
        self._bound()
        self._carries = codec.feedback or self._vector is not None or bool(self._returned)
        if codec.feedback:
            if self._vector is None:
                self._vector = np.zeros(layout.num_params, np.float32)
            try:
                return encode_with_feedback(codec, delta, self._vector, layout, rng)
            except RejectedUpdate as error:  # as the server would: the residual is bounded, so it is the delta
                raise TaskError(f"the update is not sent, its delta is too large: {error}") from error
        if self._vector is not None:
            add_scaled(delta, self._vector, 1.0)
            self._vector = None
        return codec.encode(delta, layout, rng)

    def put(self, body: bytes) -> None:
        """Put the update that `encode` began into the outbox: from here on it happened."""
        if self._carries:
            sequence = self._outbox.stage(body)
            size = 0 if self._vector is None else self._vector.size
            header = Header(self._layout, size, self._version, sequence, self._returned)
            residual_file.write(self._outbox.folder, header, self._vector)
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
        path = self._outbox.folder.path / residual_file.NAME
        made: int | None
        try:
            header, self._vector = residual_file.read(path)
            made = header.made
        except (OSError, ValueError) as error:
            header, made = Header(), None
            log.warning("the residual %s is damaged (%s): what it held is lost; starting from zero", path, error)
        self._layout, self._version = header.layout, header.version
        self._outbox.recover(made, header.returned)
        self._metrics.residual_norm.set(_norm(self._vector))

    def _fit(self, layout: Layout) -> None:
        """Drop a residual of another model."""
        if self._vector is not None and self._layout != layout.hash:
            log.warning(
                "the residual is of another model (layout %s, the job's is %s): its norm of %.4g is lost",
                self._layout[:12], layout.hash[:12], _norm(self._vector),
            )  # fmt: skip
            self._vector = None
        self._layout = layout.hash

    def _age(self, version: int, horizon: int) -> None:
        """Let a residual fade that was not used for long."""
        gap, self._version = version - self._version, version
        if gap < 0:  # the job began anew, and so do its revisions
            self._cursor = 0
        if self._vector is None:
            return
        factor = decay(gap, horizon)
        if factor < 1.0:
            self._say("decay", f"the residual was last used {gap} versions ago: it counts {factor:.3g}")
            self._vector *= np.float32(factor)

    def _settle(self, layout: Layout) -> None:
        """Forget what was applied and take back what was refused, as far as the store tells.

        The mass of a refused update comes back whole, however old it is.
        """
        unsettled = self._outbox.unsettled()
        self._outcomes = {s: self._outcomes[s] for s in unsettled.values() if s in self._outcomes}
        if not unsettled:
            return
        try:
            news, self._cursor = self._store.outcomes(self._outbox.client, self._cursor)
        except Unavailable as error:
            log.debug("%s; settling later", error)
            news = []
        for update_id, outcome in news:
            if update_id in unsettled:  # the first outcome is what happened, a later one is of the same bytes again
                self._outcomes.setdefault(unsettled[update_id], outcome)
        known = [s for s in self._outbox.sent() if s in self._outcomes]  # one not confirmed may be published again
        for sequence in known:
            if self._outcomes[sequence] in REFUSED and self._take_back(sequence, layout):
                self._returned.append(sequence)
        self._outbox.forget([s for s in known if s not in self._returned])
        surplus = self._outbox.surplus(self._returned)
        if surplus:
            self._say("surplus", f"{len(surplus)} sent updates are beyond the outbox's limits: they count as applied")
            self._outbox.forget(surplus)

    def _take_back(self, sequence: int, layout: Layout) -> bool:
        """Add the mass of a refused update to the residual; tell whether it could be read."""
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
        delta.add_into(self._vector, 1.0)
        return True

    def _bound(self) -> None:
        """Drop a residual no update can carry: it would spoil every one to come."""
        norm = _norm(self._vector)
        if not norm <= NORM_MAX:  # nor NaN
            log.warning("the residual's norm of %.4g is beyond %.4g: it is lost, starting from zero", norm, NORM_MAX)
            self._vector = None

    def _say(self, topic: str, message: str) -> None:
        """Warn the first time, then leave it to the debug log."""
        log.log(logging.DEBUG if topic in self._said else logging.WARNING, "%s", message)
        self._said.add(topic)


def _norm(vector: Vector | None) -> float:
    return 0.0 if vector is None else math.sqrt(squared_norm(vector))
