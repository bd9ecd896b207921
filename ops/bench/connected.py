"""Many connected workers in one process: each has a connection and a channel of its own, and rarely sends.

`python -m ops.bench.connected` says `ready` when all are connected, sends at the rate it is given until its input ends,
and prints what was confirmed. One loop serves all connections: two thousand threads would measure threads.
"""

import json
import sys
import threading
import time
from dataclasses import asdict, dataclass, replace
from typing import Any

import pika
from pika.adapters.select_connection import IOLoop

from ops.bench.updates import JOB, encoded_update, model_of
from shared.messages import CONTENT_TYPE, decode, encode
from shared.transport import names

BATCH, BATCH_S = 40, 0.2  # connections opened at a time: a broker takes some hundred a second
HEARTBEAT_S = 60


@dataclass(frozen=True, slots=True)
class Fleet:
    """What is connected.

    Attributes:
        broker_url: where to.
        connections: how many.
        rate: updates/s of all together.
        num_params, codec: of the updates.
    """

    broker_url: str
    connections: int
    rate: float
    num_params: int
    codec: str


class Connected:
    """All connections of a fleet on one loop."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet, self._loop = fleet, IOLoop()
        body = encoded_update(model_of(fleet.num_params), 1, codec=fleet.codec)[1]
        self._update = decode(body, len(body))
        self._parameters = pika.URLParameters(fleet.broker_url)
        self._parameters.heartbeat, self._parameters.stack_timeout = HEARTBEAT_S, 120
        self._connections: list[Any] = []
        self._channels: list[Any] = []
        self._turn = self._sent = self._confirmed = 0
        self.lost: list[str] = []
        self._stopping = False

    def run(self) -> dict[str, Any]:
        """Connect, send until the input ends, and return what was confirmed."""
        self._connect()
        threading.Thread(target=self._wait_for_the_end, daemon=True).start()
        self._loop.start()
        return {"sent": self._sent, "confirmed": self._confirmed, "lost": len(self.lost), "why": self.lost[:3]}

    def _connect(self) -> None:
        for _ in range(min(BATCH, self._fleet.connections - len(self._connections))):
            self._connections.append(
                pika.SelectConnection(
                    self._parameters, on_open_callback=self._open, on_open_error_callback=self._closed,
                    on_close_callback=self._closed, custom_ioloop=self._loop,
                )
            )  # fmt: skip
        if len(self._connections) < self._fleet.connections:
            self._loop.call_later(BATCH_S, self._connect)

    def _open(self, connection: Any) -> None:
        connection.channel(on_open_callback=self._ready)

    def _ready(self, channel: Any) -> None:
        channel.confirm_delivery(self._on_confirm)
        self._channels.append(channel)
        if len(self._channels) == self._fleet.connections:
            print("ready", flush=True)
            self._send()

    def _closed(self, _connection: Any, error: Any) -> None:
        if not self._stopping:
            self.lost.append(repr(error))

    def _on_confirm(self, frame: Any) -> None:
        self._confirmed += isinstance(frame.method, pika.spec.Basic.Ack)

    def _send(self) -> None:
        """Have the next worker send an update; each has had its turn before one has another."""
        if self._stopping:
            return
        index = self._turn % len(self._channels)
        client, sequence = f"worker-{index}", self._turn // len(self._channels)
        update_id = f"{client}/0/{sequence}"
        update = replace(self._update, client=client, update_id=update_id, created_at=time.time())
        properties = pika.BasicProperties(
            content_type=CONTENT_TYPE, delivery_mode=2, message_id=update_id, type="update"
        )  # fmt: skip
        self._channels[index].basic_publish(
            names.EXCHANGE, names.routing_key(JOB, client), encode(update), properties, mandatory=True
        )
        self._turn += 1
        self._sent += 1
        self._loop.call_later(1 / self._fleet.rate, self._send)

    def _wait_for_the_end(self) -> None:
        sys.stdin.read()
        self._loop.add_callback_threadsafe(self._stop)

    def _stop(self) -> None:
        """Send no more, and leave when all is confirmed."""
        self._stopping = True
        if self._confirmed < self._sent and not self.lost:
            self._loop.call_later(0.1, self._stop)
        else:
            self._loop.stop()


def arguments(fleet: Fleet) -> list[str]:
    """Return the command of a process that is such a fleet."""
    return [sys.executable, "-m", "ops.bench.connected", json.dumps(asdict(fleet))]


if __name__ == "__main__":
    print(json.dumps(Connected(Fleet(**json.loads(sys.argv[1]))).run()), flush=True)
