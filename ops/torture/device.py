"""A worker and its disk, which outlives it."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from ops.torture.disk import Disk
from ops.torture.fate import Fate, Killed, MachineClock
from ops.torture.history import Exact, Made, Violation
from ops.torture.jobs import JOB
from ops.torture.ledger import Ledger
from ops.torture.mass import REFUSED, Mass, numbers, residual_of
from ops.torture.meters import UNREAD
from ops.torture.network import TortureSink
from ops.torture.store import TortureStore
from ops.torture.system import System
from ops.torture.task import trainer_of
from shared.compression import decode as decode_delta
from shared.config import WorkerSettings
from shared.errors import PublishRefused, Unavailable
from shared.messages import decode
from worker.outbox import STATE, Outbox
from worker.publisher import Publisher
from worker.training import Training
from worker.worker import Worker

UPDATE_BYTES_MAX = 2**20
OUTBOX_UPDATES_MAX, OUTBOX_BYTES_MAX = 1000, 2**30
SEEDS = 32  # different ones of trainings


@dataclass(slots=True)
class UnderWay:
    """An update that is being made.

    Attributes:
        number: the last part of its id.
        update_id: its id.
        delta: what training changed.
        residual: on the disk before.
        carried: numbers on the disk before.
    """

    number: int
    update_id: str
    delta: Exact
    residual: Exact
    carried: set[int]


class WorkerProcess:
    """One device: its disk outlives its process."""

    def __init__(self, system: System, number: int) -> None:
        self.name = f"w{number}"
        self._system = system
        self.fate, self.clock = Fate(system.world, self.name), MachineClock(system.world)
        self.disk = Disk(self.fate)
        self._lives = 0
        self._store = TortureStore(system.store, system.world, self.fate, system.history)
        self._sink = TortureSink(system.network, system.world, self.fate, system.history)
        self._trainer = trainer_of(system.layout.averaged[0].shape)
        self._mass: Mass | None = None
        self._under_way: UnderWay | None = None
        self._training: Training | None = None
        self._pulled: tuple[Exact, set[int]] | None = None  # residual and numbers before the pull
        self._worker: Worker | None = None
        self.new_disk()

    def new_disk(self) -> None:
        """Begin with an empty disk; what was on it is gone, after its account was checked."""
        if self._lives:
            self._die()
            self.fate.clear()
            self._start()  # finishes what it had begun
            self.check_mass()
            waiting = {name for name in self.disk.files if name.endswith(".update")}
            here = f"{self.name}/i{self._lives - 1}/"
            self._system.history.gone |= {f"{here}{int(name.split('.')[0])}" for name in waiting}
            self._die()
        self.disk.wipe()
        incarnation = f"i{self._lives}"  # else it would be random
        self.disk.files[STATE] = b'{"incarnation": "%s", "next_sequence": 0}' % incarnation.encode()
        self._lives += 1
        if "ef" in self._system.settings.codec.split():
            self._mass = Mass(self._system.layout.num_params, 10 * self._system.settings.staleness_max)

    def pull(self) -> None:
        """Pull the newest weights and begin a training."""
        self._live(self._begin)

    def train(self) -> None:
        """Finish the training that was begun, or do a whole one."""
        self._live(self._train)

    def publish(self, times: int) -> bool:
        """Publish some updates; tell whether there was one."""
        before = len(self._system.history.confirmations)
        self._live(lambda: self._publish(times))
        return self.waiting > 0 or len(self._system.history.confirmations) > before

    @property
    def waiting(self) -> int:
        """How many updates are on the disk that are not confirmed."""
        return sum(name.endswith(".update") for name in self.disk.files)

    def start(self) -> None:
        """Be alive."""
        self._live(lambda: None)

    def check_mass(self) -> None:
        """Check this worker's account."""
        if self._mass is not None and self._under_way is None:
            self._mass.check(self.name, Ledger.of(self._system.store).first, self.disk.files)

    def _live(self, action: Callable[[], None]) -> None:
        """Do something, started if the process is dead, until it is done, the process dies or a server is away."""
        try:
            if self._worker is None:
                self._start()
            action()
        except (Unavailable, PublishRefused) as error:
            if self._system.world.trace is not None:
                self._system.world.note(self.name, f"-> {error}")
        except Killed as death:
            if death.args == ("power_cut",):
                self.disk.cut_power(self.fate.last["kept"])
            self._die()

    def _begin(self) -> None:
        assert self._worker is not None, "alive"  # noqa: S101
        if self._pulled is None:
            files = self.disk.files
            self._pulled = residual_of(files, self._system.layout.num_params), numbers(files)
        self._training = self._worker.begin()

    def _train(self) -> None:
        assert self._worker is not None, "alive"  # noqa: S101
        if self._training is None:
            self._begin()
        training, self._training = self._training, None
        if training is None or self._pulled is None:
            return
        self._system.history.saw_start(training.context.version, training.base.weights)
        trained = self._trainer.train(training)
        number, delta = self._outbox.next_sequence, trained.delta.astype(np.float64)
        self._under_way = UnderWay(number, self._outbox.next_id(), delta, *self._pulled)
        self._pulled = None
        self._worker.finish(training, trained, self.clock.now)
        self._resolve()

    def _publish(self, times: int) -> None:
        for _ in range(times):
            if not self._publisher.step():
                break

    def _die(self) -> None:
        self._worker = self._training = None

    def _start(self) -> None:
        self._pulled = None
        self._outbox = Outbox(self.disk, self.name, OUTBOX_UPDATES_MAX, OUTBOX_BYTES_MAX)
        settings = _settings(self.name, self._system.seed % SEEDS)
        self._publisher = Publisher(
            JOB, self.name, self._outbox, self._sink, self.clock, UNREAD, settings.confirm_timeout_s
        )  # fmt: skip
        worker = Worker(settings, self._trainer, self._store, self._outbox, self._publisher, self.clock, UNREAD)
        self._resolve()
        self._worker = worker

    def _resolve(self) -> None:
        """See on the disk whether the update under way was made, and book it."""
        one, self._under_way = self._under_way, None
        if one is None:
            return
        files, history = self.disk.files, self._system.history
        found = [name for name in (f"{one.number:012d}.update", f"{one.number:012d}.kept.update") if name in files]
        if not found:
            return
        update = decode(files[found[0]], UPDATE_BYTES_MAX)
        if update.update_id != one.update_id:
            raise Violation("ledger", f"{self.name} made {update.update_id} under the id {one.update_id}")
        decoded = np.zeros(self._system.layout.num_params, np.float32)
        decode_delta(update.codec, update.payload, self._system.layout).add_into(decoded, 1.0)
        made = Made(
            update.update_id, self.name, one.number, update.base_version, update.num_samples, one.delta,
            decoded.astype(np.float64), found[0].endswith(".kept.update"),
        )  # fmt: skip
        history.made[update.update_id] = made
        if self._mass is not None:
            first, here = Ledger.of(self._system.store).first, numbers(files)
            prefix = update.update_id.rsplit("/", 1)[0]
            gone = [f"{prefix}/{number}" for number in sorted(one.carried - here)]
            self._mass.add(made, one.residual, [i for i in gone if first.get(i) in REFUSED])


@lru_cache(maxsize=4 * SEEDS)
def _settings(name: str, seed: int) -> WorkerSettings:
    return WorkerSettings(job=JOB, client_id=name, seed=seed)
