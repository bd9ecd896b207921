"""A client that misbehaves: old updates, updates sent twice, and messages that no aggregator may take.

It lives in the torture itself, so its own record of what it sent is never lost.
"""

import threading
import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from shared.compression import parse
from shared.errors import PublishRefused, Unavailable
from shared.layout import Layout
from shared.messages import Update, encode
from shared.transport.ports import Outgoing, UpdateSink

CLIENT = "visitor"
CODEC = "float32 | zstd"
CONFIRM_S_MAX = 5.0
RETRY_S = 0.2
FUTURE = 10**6  # versions ahead

Spoil = Callable[[Update], bytes]


def _wrong_checksum(update: Update) -> bytes:
    body = bytearray(encode(update))
    at = body.find(update.payload) + len(update.payload) // 2
    body[at] ^= 0x10
    return bytes(body)


SPOILED: dict[str, Spoil] = {
    "garbage": lambda update: b"\xc1" + encode(update)[:40],
    "checksum": _wrong_checksum,
    "future": lambda update: encode(replace(update, base_version=update.base_version + FUTURE)),
    "layout": lambda update: encode(replace(update, layout="0" * len(update.layout))),
    "codec": lambda update: encode(replace(update, payload=update.payload[: len(update.payload) // 2])),
    "samples": lambda update: encode(replace(update, num_samples=0)),
}


class Visitor:
    """Publishes at a steady rate from a thread of its own, each message again and again until it is confirmed.

    Args:
        job: the job's id.
        layout: the job's.
        sink: where it publishes.
        rng: what it sends.
        first, stride: its places in the model; see `server_task.py`.
        pause_s: between two messages.

    Attributes:
        made: ids of all messages it set out to send.
        confirmed: of those the broker confirmed.
        spoiled: of those that must never be applied.
        placed: id -> (place, base_version) of the good ones.
    """

    def __init__(
        self, job: str, layout: Layout, sink: UpdateSink, rng: np.random.Generator, first: int, stride: int,
        pause_s: float,
    ) -> None:  # fmt: skip
        self.made: set[str] = set()
        self.confirmed: set[str] = set()
        self.spoiled: set[str] = set()
        self.placed: dict[str, tuple[int, int]] = {}
        self._job, self._layout, self._sink, self._rng = job, layout, sink, rng
        self._first, self._stride, self._pause_s = first, stride, pause_s
        self._sent: list[Outgoing] = []
        self._sequence = 0
        self._stop, self._closed = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name=CLIENT, daemon=True)

    def start(self) -> None:
        """Begin to publish."""
        self._thread.start()

    def stop(self) -> None:
        """Publish no more; what was begun is finished first."""
        self._stop.set()
        self._thread.join()

    def publish_good(self, base_version: int) -> None:
        """Publish one good update and wait for its confirm; only while it is stopped."""
        self._publish(self._good(base_version))

    def close(self) -> None:
        """Close the connection; what is not confirmed stays so."""
        self._stop.set()
        self._closed.set()
        self._sink.close()

    def _run(self) -> None:
        while not self._stop.is_set():
            draw = self._rng.random()
            if draw < 0.4:
                self._publish(self._good(0))  # stale, but for the first versions
            elif draw < 0.5 and self._sent:
                self._publish(self._sent[int(self._rng.integers(len(self._sent)))])
            else:
                self._publish(self._spoiled())
            self._stop.wait(self._pause_s)

    def _good(self, base_version: int) -> Outgoing:
        update = self._update(base_version)
        self.placed[update.update_id] = (update.num_samples - 1, base_version)
        return self._outgoing(update.update_id, encode(update))

    def _spoiled(self) -> Outgoing:
        kind = list(SPOILED)[int(self._rng.integers(len(SPOILED)))]
        update = self._update(0)
        self.spoiled.add(update.update_id)
        return self._outgoing(update.update_id, SPOILED[kind](update))

    def _update(self, base_version: int) -> Update:
        place = self._first + self._sequence * self._stride
        update_id = f"{CLIENT}/0/{self._sequence}"
        self._sequence += 1
        delta = np.zeros(self._layout.num_params, np.float32)
        delta[place] = 1.0
        payload = parse(CODEC).encode(delta, self._layout, np.random.default_rng(0)).payload
        return Update(
            self._job, CLIENT, update_id, base_version, place + 1, 1, self._layout.hash, {"name": CODEC}, payload, {},
            0.0, time.time(),
        )  # fmt: skip

    def _outgoing(self, update_id: str, body: bytes) -> Outgoing:
        return Outgoing(self._job, CLIENT, update_id, body)

    def _publish(self, message: Outgoing) -> None:
        self.made.add(message.update_id)
        while not self._closed.is_set():
            try:
                self._sink.publish(message, CONFIRM_S_MAX)
                break
            except (Unavailable, PublishRefused):
                time.sleep(RETRY_S)
        else:
            return
        if message.update_id not in self.confirmed:
            self.confirmed.add(message.update_id)
            self._sent = [*self._sent[-50:], message]
