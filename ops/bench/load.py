"""Workers' worth of load on real servers: pulls, updates of many clients over a few connections, some of them bad.

`python -m ops.bench.load` runs it as a process of its own and prints what was sent; it ends when its input does.
"""

import itertools
import json
import random
import sys
import threading
import time
import zlib
from collections import Counter
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from ops.bench.updates import encoded_update, model_of
from shared.errors import FedMQError, VersionGone
from shared.messages import Update, decode, encode
from shared.store.redis import RedisStore
from shared.transport.ports import Outgoing
from shared.transport.rabbitmq import RabbitSink

CONFIRM_S_MAX = 60.0
READY_S = 30.0
DELTAS = 8  # different ones, made before the start


@dataclass(frozen=True, slots=True)
class Load:
    """What is sent.

    Attributes:
        broker_url, store_url, job: where to.
        num_params: of the model.
        codec: of the updates.
        connections: publishers; each is a thread with a connection to the broker and one to the store.
        clients: workers, shared out among them.
        rate: updates/s of all together.
        staleness_max: the job's; what is to be stale is trained from further back.
        duplicates, stale, rejected: shares of the updates that are sent twice, too stale, or damaged.
        seed: of everything random.
    """

    broker_url: str
    store_url: str
    job: str
    num_params: int
    codec: str
    connections: int
    clients: int
    rate: float
    staleness_max: int
    duplicates: float = 0.02
    stale: float = 0.02
    rejected: float = 0.02
    seed: int = 0


class Group:
    """Some workers on one connection, one after the other: pull what is new, send an update.

    Args:
        load: of all groups.
        index: which group.
        stop: set when enough is sent.
    """

    def __init__(self, load: Load, index: int, stop: threading.Event) -> None:
        self.sent: Counter[str] = Counter()
        self.problems: list[str] = []
        self._load, self._stop = load, stop
        self._clients = [f"worker-{number}" for number in range(index, load.clients, load.connections)]
        self._rng = random.Random(load.seed * 1000 + index)  # noqa: S311 - which updates are bad
        self._updates = _updates(load)
        self._store = RedisStore(load.store_url, load.job)
        self._sink = RabbitSink(load.broker_url, f"group-{index}")
        self._version = -1

    def run(self) -> None:
        """Send until stopped."""
        interval_s = self._load.connections / self._load.rate
        try:
            self._sink.link.wait_ready(READY_S)
            due = time.monotonic() + self._rng.random() * interval_s
            for sequence, client in enumerate(itertools.cycle(self._clients)):
                if self._stop.wait(max(0.0, due - time.monotonic())):
                    break
                due += interval_s
                self._pull()
                self._send(client, sequence)
        except FedMQError as error:
            self.problems.append(f"{type(error).__name__}: {error}")
        finally:
            self._sink.close()
            self._store.close()

    def _pull(self) -> None:
        """Fetch the newest weights when there are newer ones, as a worker does before each training."""
        head = self._store.head()
        if head is None or head.version == self._version:
            return
        try:
            self._store.model(head.version)
        except VersionGone:  # newer ones have come meanwhile
            return
        self._version = head.version
        self.sent["pulls"] += 1

    def _send(self, client: str, sequence: int) -> None:
        base_version, chance, load = max(0, self._version), self._rng.random(), self._load
        update = replace(
            self._updates[sequence % DELTAS], client=client, update_id=f"{client}/0/{sequence}",
            base_version=base_version, created_at=time.time(),
        )  # fmt: skip
        too_old = base_version - load.staleness_max - 10
        if chance < load.duplicates:
            self._publish(update, "applied")
            self._publish(update, "duplicate")
        elif chance < load.duplicates + load.stale and too_old >= 0:
            self._publish(replace(update, base_version=too_old), "stale")
        elif chance > 1 - load.rejected:
            self._publish(replace(update, payload=update.payload[:-1]), "rejected")
        else:
            self._publish(update, "applied")

    def _publish(self, update: Update, due: str) -> None:
        body = encode(update)
        message = Outgoing(self._load.job, update.client, update.update_id, body, crc32=zlib.crc32(body))
        self._sink.publish(message, CONFIRM_S_MAX)
        self.sent[due] += 1


def _updates(load: Load) -> list[Update]:
    model = model_of(load.num_params)
    bodies = (encoded_update(model, sequence, codec=load.codec)[1] for sequence in range(DELTAS))
    return [replace(decode(body, len(body)), job=load.job) for body in bodies]


def main() -> None:
    """Send what the argument says until the input ends; print how many of what outcome are due."""
    load = Load(**json.loads(sys.argv[1]))
    np.seterr(all="raise")
    stop = threading.Event()
    groups = [Group(load, index, stop) for index in range(load.connections)]
    threads = [threading.Thread(target=group.run) for group in groups]
    for thread in threads:
        thread.start()
    print("ready", flush=True)
    sys.stdin.read()
    stop.set()
    for thread in threads:
        thread.join()
    sent: Counter[str] = sum((group.sent for group in groups), Counter())
    print(json.dumps({"sent": sent, "problems": [text for group in groups for text in group.problems]}), flush=True)


def arguments(load: Load) -> list[str]:
    """Return the command of a process that sends a load."""
    return [sys.executable, "-m", "ops.bench.load", json.dumps(asdict(load))]


def outcome(output: str) -> dict[str, Any]:
    """Return what such a process printed at its end."""
    last: dict[str, Any] = json.loads(output.splitlines()[-1])
    return last


if __name__ == "__main__":
    main()
