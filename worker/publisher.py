"""The publisher's loop: oldest update of the outbox -> broker -> confirmed -> forgotten, or kept until settled."""

import logging
import threading
import zlib
from collections.abc import Iterator

from shared.clock import Clock
from shared.errors import PublishRefused, PublishUnconfirmed, RejectedUpdate, Unavailable
from shared.messages import PART_BYTES, decode, split
from shared.metrics import WorkerMetrics
from shared.transport.ports import Outgoing, UpdateSink
from worker.outbox import Outbox
from worker.pace import Pace

log = logging.getLogger("fedmq.worker")

RETRY_S = (0.1, 15.0)  # first and longest wait after a publish that was not confirmed


class Publisher:
    """Publishes one worker's updates in order; runs in a thread of its own beside the training.

    Args:
        job, client: of the worker.
        outbox: where finished updates wait.
        sink: the broker.
        clock: time.
        metrics: what it counts.
        confirm_timeout_s: longest wait for a confirm.
        pace: limits its bytes per second, by smaller parts; None: no limit.
    """

    def __init__(
        self, job: str, client: str, outbox: Outbox, sink: UpdateSink, clock: Clock, metrics: WorkerMetrics,
        confirm_timeout_s: float, pace: Pace | None = None,
    ) -> None:  # fmt: skip
        self._job, self._client, self._outbox, self._sink = job, client, outbox, sink
        self._clock, self._metrics, self._confirm_timeout_s = clock, metrics, confirm_timeout_s
        self._pace = pace or Pace(0, clock)
        self.part_bytes = PART_BYTES  # the job's, once it is known: what is longer is published in parts
        self._confirmed: tuple[str, int, int] = ("", 0, 0)  # of the oldest update: its id, part_bytes, parts confirmed
        self.wake = threading.Event()  # set when the outbox has news
        self.problem: str | None = None

    def step(self, timeout_s: float = float("inf")) -> bool:
        """Publish the oldest update, if there is one, in parts if it is long; tell whether one was confirmed.

        None is when the pace does not allow the next part in that time, or its waiting was ended.

        Args:
            timeout_s: wait no longer for the confirm than this, nor than the setting says.

        Raises:
            Unavailable, PublishRefused: it stays in the outbox.
        """
        waiting = self._outbox.oldest()
        if waiting is None:
            return False
        update_id, part_bytes = waiting.update_id, self._pace.part_bytes(self.part_bytes)
        done = self._confirmed[2] if self._confirmed[:2] == (update_id, part_bytes) else 0
        body, deadline = waiting.body(), self._clock.monotonic() + timeout_s
        for index, (piece, crc32) in enumerate(_pieces(update_id, body, part_bytes)):
            if index >= done:
                if not self._pace.take(len(piece), deadline - self._clock.monotonic()):
                    return False
                message = Outgoing(self._job, self._client, update_id, piece, piece is not body, crc32)
                self._publish(message, min(timeout_s, self._confirm_timeout_s))
                self._confirmed = update_id, part_bytes, index + 1
        self._outbox.confirm(waiting)
        self._metrics.outbox.set(len(self._outbox))
        self.problem = None
        return True

    def _publish(self, message: Outgoing, timeout_s: float) -> None:
        outcome = "refused"
        try:
            self._sink.publish(message, timeout_s)
            outcome = "confirmed"
        except PublishUnconfirmed:
            outcome = "unknown"
            raise
        except Unavailable:
            outcome = "unavailable"
            raise
        finally:
            self._metrics.published.labels(outcome).inc()
        self._metrics.sent_bytes.inc(len(message.body))

    def run(self, stop: threading.Event) -> None:
        """Publish until stopped, backing off while the broker does not take updates."""
        retry_s, self._pace.stop = RETRY_S[0], stop
        while not stop.is_set():
            try:
                if not self.step():
                    self.wake.wait(0.5)
                    self.wake.clear()
                retry_s = RETRY_S[0]
            except (Unavailable, PublishRefused, OSError) as error:  # OSError: a disk that does not read
                if self.problem != str(error):
                    log.warning("%s; keeping %d updates in the outbox", error, len(self._outbox))
                self.problem = str(error)
                self._clock.wait(stop, retry_s)
                retry_s = min(RETRY_S[1], 2 * retry_s)

    def flush(self, timeout_s: float) -> bool:
        """Publish what is left before the program ends, no faster; tell whether all was confirmed."""
        self._pace.stop = threading.Event()
        deadline = self._clock.monotonic() + timeout_s
        while len(self._outbox) and (left_s := deadline - self._clock.monotonic()) > 0:
            try:
                self.step(left_s)
            except (Unavailable, PublishRefused, OSError) as error:  # OSError: as in `run`
                self.problem = str(error)
                self._clock.wait(threading.Event(), 0.3)
        return not len(self._outbox)


def _pieces(update_id: str, body: bytes, part_bytes: int) -> Iterator[tuple[bytes, int | None]]:
    """Yield the messages an update travels as, each with its crc32.

    What a disk has damaged gets none, so that the payload's own checksum is looked at, and is no more than one message
    takes: the aggregator rejects it by name, and the updates behind it do not wait for ever.
    """
    try:
        if len(body) <= part_bytes:
            decode(body, len(body))  # `split` does so with a longer one
        for piece in split(body, part_bytes):
            yield piece, zlib.crc32(piece)
    except RejectedUpdate as error:
        log.error("update %s in the outbox is damaged, it will be rejected: %s", update_id, error)
        yield body[:part_bytes], None
