"""What is tortured: a RabbitMQ and a Redis on small disks, two aggregators, workers, and proxies between them."""

import contextlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType

import numpy as np

from ops.servers import find_program, private_rabbitmq, private_redis, stop_port_mapper
from ops.torture import server_task
from ops.torture.proxy import Proxy
from ops.torture.server_kept import Kept, Program, SmallDisk
from ops.torture.server_visitor import Visitor
from ops.torture.server_watch import OutboxWatch
from shared.errors import FedMQError, StoreUnavailable, Unavailable
from shared.model_image import ModelImage
from shared.store.redis import RedisStore
from shared.transport.names import VHOST, queue
from shared.transport.rabbitmq import RabbitSink

JOB = "torture"
BUFFER_SIZE = 4
EXPONENT = 0.5
STALENESS_MAX = 20  # low, so that outages make some updates too old
SLEEP_S = 0.1  # a training
VISITOR_PAUSE_S = 0.25
HEARTBEAT_S = 3  # so that both ends notice a half-open connection within 16 s; FedMQ's own 30 s take up to 70
ANSWER_S = 5  # the same for Redis: FedMQ's own 60 s are for slow links and large pieces
BROKER_DISK_BYTES = 320 * 2**20
STORE_DISK_BYTES = 512 * 2**20
START_S_MAX = 120.0
AGGREGATORS = 2
QUEUE_LOOKS = 4
WORKERS = "workers"  # they share their proxies
SETTINGS = {
    "CODEC": "float32 | zstd", "STALENESS": f"polynomial({EXPONENT:g})", "STALENESS_MAX": STALENESS_MAX,
    "BUFFER_SIZE": BUFFER_SIZE, "SERVER_LR": BUFFER_SIZE, "COMMIT_INTERVAL_S": 0.3, "COMMIT_AGE_MAX_S": 1,
    "PREFETCH": 64,
}  # fmt: skip


class Rig:
    """Everything that runs. `with Rig(...) as rig` has all programs at work.

    Args:
        out: folder of the logs and the workers' state.
        workers: their number.
        seed: of the visitor.
    """

    def __init__(self, out: Path, workers: int, seed: int) -> None:
        self.out = out.resolve()
        self._stack = contextlib.ExitStack()
        self._workers, self._seed = workers, seed
        (self.out / "logs").mkdir(parents=True, exist_ok=True)

    def __enter__(self) -> "Rig":
        """Start everything.

        Raises:
            Unavailable: something did not come up.
        """
        try:
            self._start_servers()
            self._start_programs()
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop everything and unmount the disks; logs and outboxes stay."""
        self._stack.close()

    def applied(self) -> int | None:
        """Return how many updates were applied so far; None while the store does not answer."""
        try:
            return self.reader.totals().get("applied", 0)
        except StoreUnavailable:
            return None

    def settled_of(self, client: str) -> int:
        """Return the sequence number of a client's newest settled update, -1 for none."""
        try:
            known = self.reader.status()["clients"].get(client)
        except StoreUnavailable:
            return -1
        return int(known["id"].rsplit("/", 1)[-1]) if known else -1

    def next_sequence(self, client: str) -> int:
        """Return the number of a worker's next update."""
        return int(json.loads((self.outbox(client) / "outbox.json").read_text())["next_sequence"])

    def active(self) -> int:
        """Return which aggregator the broker serves: the one that it sends more."""
        for _ in range(20):
            before = [self.proxies[f"aggregator-{i}", "broker"].down_bytes for i in range(AGGREGATORS)]
            time.sleep(0.25)
            after = [self.proxies[f"aggregator-{i}", "broker"].down_bytes for i in range(AGGREGATORS)]
            grown = [new - old for old, new in zip(before, after, strict=True)]
            if max(grown) > 3000:  # a heartbeat has 8 bytes, a reconnection 1,500
                return grown.index(max(grown))
        return 0

    def outbox(self, client: str) -> Path:
        """Return the folder of a worker's outbox."""
        return self.out / "state" / JOB / client

    def rabbitmqctl(self, *arguments: str) -> str:
        """Run `rabbitmqctl` against our node; return what it printed.

        Raises:
            FedMQError: it failed.
        """
        server = self.rabbitmq
        command = [find_program("rabbitmqctl"), "--quiet", "-n", server.environment["RABBITMQ_NODENAME"], *arguments]
        done = subprocess.run(command, env=os.environ | server.environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise FedMQError(f"rabbitmqctl {' '.join(arguments)}: {done.stdout}{done.stderr}")
        return done.stdout

    def restart_sick_broker(self) -> bool:
        """Do what the liveness check of an init system does: restart a RabbitMQ whose queue is dead.

        Where a write finds no room, the queue's process may end for good while the node goes on and takes connections:
        it does not end by itself, so that a restart policy alone never restarts it.

        Returns:
            Whether it was restarted.

        Raises:
            FedMQError: the queue does not start any more, and what was confirmed in it is out of reach.
        """
        if self._queue_lives():
            return False
        self.broker.kill()
        self.broker.start()
        if not self._queue_lives():
            raise FedMQError(
                "RabbitMQ was restarted, and the queue of the updates does not start any more: see corrupt_log in its "
                "log; what was confirmed in it is out of reach without a manual step"
            )
        return True

    def _queue_lives(self) -> bool:
        """Tell whether the queue's process is there, within a few seconds in which it may be restarted."""
        for _ in range(QUEUE_LOOKS):
            if "undefined" not in self.rabbitmqctl("eval", f"whereis('{VHOST}_{queue(JOB)}')."):
                return True
            time.sleep(1)
        return False

    @property
    def programs(self) -> dict[str, Kept]:
        """All that is kept running, by name."""
        return {kept.unit.name: kept for kept in (self.broker, self.store, *self.aggregators, *self.workers)}

    @property
    def aof(self) -> Path:
        """The file Redis appends to at present."""
        return max(self.store_disk.folder.glob("appendonlydir/*.incr.aof"), key=lambda path: path.stat().st_mtime)

    def _start_servers(self) -> None:
        disks = self.out / "disks"
        self.broker_disk = SmallDisk(disks / "broker", BROKER_DISK_BYTES)
        self._stack.callback(self.broker_disk.close)
        self.store_disk = SmallDisk(disks / "store", STORE_DISK_BYTES)
        self._stack.callback(self.store_disk.close)
        self.redis = private_redis(self.out / "logs" / "redis", {"dir": str(self.store_disk.folder)})
        self.rabbitmq = private_rabbitmq(self.out / "logs" / "rabbitmq")
        self.rabbitmq.environment["RABBITMQ_MNESIA_BASE"] = str(self.broker_disk.folder)
        self._stack.callback(stop_port_mapper, self.rabbitmq)
        self.broker, self.store = Kept(self.rabbitmq), Kept(self.redis)
        for server in (self.broker, self.store):
            self._stack.callback(server.close)
            server.start()
        who = (*(f"aggregator-{i}" for i in range(AGGREGATORS)), WORKERS)
        ports = {"broker": self.rabbitmq.port, "store": self.redis.port}
        self.proxies = {(name, server): Proxy(ports[server]) for name in who for server in ports}
        for proxy in self.proxies.values():
            self._stack.callback(proxy.close)
        self.reader = RedisStore(self.redis.url, JOB)
        self._stack.callback(self.reader.close)

    def _start_programs(self) -> None:
        initial = ModelImage.of({"hits": np.zeros(server_task.SHAPE, np.float32)})
        initial.save(self.out / "v0.safetensors")
        given = {f"FEDMQ_{name}": str(value) for name, value in SETTINGS.items()}
        given["FEDMQ_INIT_MODEL"] = str(self.out / "v0.safetensors")
        self.aggregators = [self._kept(f"aggregator-{i}", "aggregator", f"aggregator-{i}", given) for i in (0, 1)]
        self.aggregators[0].start()
        self._wait_for_start()
        self.aggregators[1].start()
        clients = [f"worker-{i}" for i in range(self._workers)]
        self.records = [self.out / f"{client}.trained" for client in clients]
        self.watch = OutboxWatch({client: self.outbox(client) for client in clients})
        self._stack.callback(self.watch.close)
        self.workers = [self._worker(client, i) for i, client in enumerate(clients)]
        for worker in self.workers:
            worker.start()
        self.sink = RabbitSink(self._broker_url(WORKERS), "visitor")
        self.visitor = Visitor(
            JOB, initial.layout, self.sink, np.random.default_rng(self._seed), self._workers, self._workers + 1,
            VISITOR_PAUSE_S,
        )  # fmt: skip
        self._stack.callback(self.visitor.close)
        self.visitor.start()

    def _worker(self, client: str, index: int) -> Kept:
        settings = {
            "record": str(self.records[index]), "first": index, "stride": self._workers + 1, "sleep_s": SLEEP_S,
        }  # fmt: skip
        return self._kept(client, "worker", WORKERS, {
            "FEDMQ_CLIENT_ID": client, "FEDMQ_TASK": str(Path(server_task.__file__)),
            "FEDMQ_TASK_SETTINGS": json.dumps(settings), "FEDMQ_STATE_DIR": str(self.out / "state"),
        })  # fmt: skip

    def _kept(self, name: str, module: str, proxied: str, given: dict[str, str]) -> Kept:
        inherited = {key: value for key, value in os.environ.items() if not key.startswith("FEDMQ_")}
        environment = inherited | given | {
            "FEDMQ_BROKER_URL": self._broker_url(proxied), "FEDMQ_STORE_URL": self._store_url(proxied),
            "FEDMQ_JOB": JOB, "FEDMQ_WAIT_S": "60", "OMP_NUM_THREADS": "1",
        }  # fmt: skip
        program = Program(name, [sys.executable, "-m", module], environment, self.out / "logs" / f"{name}.log")
        kept = Kept(program)
        self._stack.callback(kept.close)
        return kept

    def _broker_url(self, who: str) -> str:
        port = self.proxies[who, "broker"].port
        return f"{self.rabbitmq.url.replace(f':{self.rabbitmq.port}/', f':{port}/')}?heartbeat={HEARTBEAT_S}"

    def _store_url(self, who: str) -> str:
        port = self.proxies[who, "store"].port
        return f"{self.redis.url.replace(f':{self.redis.port}/', f':{port}/')}?socket_timeout={ANSWER_S}"

    def _wait_for_start(self) -> None:
        """Wait until the job has its first version and says what it is."""
        deadline = time.monotonic() + START_S_MAX
        while not (self.reader.head() and self.reader.job()):
            if time.monotonic() > deadline:
                log = (self.out / "logs" / "aggregator-0.log").read_text(errors="replace")[-1500:]
                raise Unavailable(f"the aggregator did not start the job; its log ends:\n{log}")
            time.sleep(0.1)
