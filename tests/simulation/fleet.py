"""A small fleet under faults, in one process, from one seed: production loops, in-process adapters, real files.

Faults: workers killed between any two file operations (also while they recover), aggregators killed, commits that
fail or whose answer is lost, a store that is away, publishes that fail or are not confirmed, duplicates, corrupted
messages, refusals as too stale, and the job's codec changed under way.
"""

import contextlib
from pathlib import Path
from typing import Any

import numpy as np

import worker.worker
from shared.compression import Codec, parse
from shared.compression import decode as decode_delta
from shared.errors import BrokerUnavailable, PublishUnconfirmed, Unavailable
from shared.messages import decode
from shared.model_image import ModelImage
from shared.transport.ports import Outgoing
from tests.builders import Device, FaultyStore, System, device_of
from tests.simulation.mass import (
    REFUSED,
    Account,
    Made,
    first_outcomes,
    numbers_on_disk,
    residual_on_disk,
)
from worker.folder import Folder
from worker.residual import HORIZONS
from worker.task import TrainResult

EVENTS = 45
KILL_POINTS = 18  # about as many as a worker's step passes
CODECS = (
    "ef | topk(0.1) | ternary", "ef | uniform(step=2) | pack | zstd", "ef | int4(nearest)", "ef | topk(0.2)",
    "ef | sign", "float32", "int8 | zstd", "float16",
)  # fmt: skip


class Killed(BaseException):
    """The process is gone; nothing may catch it on the way."""


class Killer:
    """Kills at the n-th point from now; points are before, amid and after every file operation."""

    def __init__(self) -> None:
        self.left = -1

    def point(self) -> None:
        """Die here, if it is the point."""
        self.left -= 1
        if self.left == 0:
            raise Killed

    def patches(self) -> dict[str, Any]:
        """Return `Folder`'s methods with points in them."""
        write, rename, remove = Folder.write, Folder.rename, Folder.remove

        def write_(folder: Folder, name: str, *parts: Any) -> None:
            self.point()
            if self.left == 1:
                (folder.path / name).with_suffix(".new").write_bytes(b"".join(bytes(part) for part in parts)[:-1])
            self.point()
            write(folder, name, *parts)
            self.point()

        def rename_(folder: Folder, old: str, new: str) -> None:
            self.point()
            rename(folder, old, new)
            self.point()

        def remove_(folder: Folder, *names: str, durable: bool = False) -> None:
            for name in names:
                self.point()
                remove(folder, name, durable=durable)
            self.point()

        return {"write": write_, "rename": rename_, "remove": remove_}


class Spy:
    """A codec that notes what it is given."""

    given: np.ndarray

    def __init__(self, codec: Codec) -> None:
        self._codec = codec

    def __getattr__(self, name: str) -> Any:
        return getattr(self._codec, name)

    def encode(self, delta: np.ndarray, *rest: Any) -> Any:
        """Encode, after a copy."""
        Spy.given = delta.astype(np.float64)
        return self._codec.encode(delta, *rest)


class Sink:
    """A broker's sink that fails, forgets to confirm, delivers twice, and corrupts: the same update always alike."""

    def __init__(self, fleet: "Fleet") -> None:
        self._fleet, self._inner = fleet, fleet.system.broker.sink()

    def publish(self, message: Outgoing, timeout_s: float) -> None:
        """Publish, more or less."""
        rng, body = self._fleet.rng, message.body
        if not self._fleet.calm and rng.random() < 0.1:
            raise BrokerUnavailable("away")
        number = int(message.update_id.rsplit("/", 1)[1])
        if (number * 7 + self._fleet.seed) % 8 == 0:
            place = body.index(b"checksum") + 10  # its value, behind the name
            body = body[:place] + bytes([body[place] ^ 1]) + body[place + 1 :]
        message = Outgoing(message.job, message.client, message.update_id, body)
        self._inner.publish(message, timeout_s)
        self._fleet.published.append(message)
        if not self._fleet.calm and rng.random() < 0.1:
            raise PublishUnconfirmed("no confirm")


class Fleet:
    """The job, its workers and what the checker needs to know of them."""

    def __init__(self, seed: int, folder: Path, killer: Killer) -> None:
        self.seed, self.folder, self.killer, self.calm = seed, folder, killer, False
        self.rng = rng = np.random.default_rng(seed)
        self.published: list[Outgoing] = []
        shapes = {"w": tuple(rng.integers(28, 50, 2)), "b": tuple(rng.integers(1, 30, 1)), "s": ()}  # codecs treat a
        # matrix of 1000 elements and more apart from the rest
        self.start = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
        image = ModelImage.of(self.start)
        self.layout = image.layout
        self.store = FaultyStore()
        self.system = System(
            image, store=self.store, codec=str(rng.choice(CODECS[:5])), staleness="constant",
            staleness_max=int(rng.integers(0, 4)), buffer_size=int(rng.integers(1, 4)),
        )  # fmt: skip
        self.names = [f"w{i}" for i in range(int(rng.integers(2, 4)))]
        self.accounts = {name: Account(self.layout.num_params) for name in self.names}
        self.devices: dict[str, Device] = {name: self._open(name) for name in self.names}
        self.delta = np.zeros(0)  # of the last training, as it left the task

    def run(self) -> None:
        """Let things happen, checking all along; then let everything settle, and check that it did."""
        actions = [
            self._train, self._train, self._train, self._train_and_kill, self._publish, self._publish,
            self._publish_and_kill, self._aggregate, self._aggregate, self._aggregate, self._kill_aggregator,
            self._change_codec, self._duplicate, self._store_comes_or_goes, self._commit_fails,
        ]  # fmt: skip
        away = self.names[-1] if self.rng.random() < 0.3 else ""  # sleeps through the first two thirds but the start
        for event in range(EVENTS):
            here = [n for n in self.names if n != away or not 10 < event < 2 * EVENTS // 3]
            name = str(self.rng.choice(here))
            actions[self.rng.integers(len(actions))](name)
            self.system.clock.time_s += float(self.rng.uniform(0, 15))
            self.check(name)
        self._settle()

    def check(self, name: str) -> None:
        """Check one worker's account."""
        folder = self.folder / name
        _, residual = residual_on_disk(folder, self.layout.num_params)
        outcomes = first_outcomes(self.store.inner.ledger)
        imbalance = self.accounts[name].imbalance(outcomes, numbers_on_disk(folder), residual)
        assert imbalance <= 1, f"seed {self.seed}: {name}'s mass is off by {imbalance:.3g} times what rounding explains"

    def check_model(self) -> None:
        """Check that what the ledger calls applied is what the model moved by (every version is a mean of K)."""
        applied = np.zeros(self.layout.num_params)
        for update_id, outcome in first_outcomes(self.store.inner.ledger).items():
            if outcome == "applied":
                applied += self.accounts[update_id.split("/")[0]].made[update_id].decoded
        moved = self.system.weights.astype(np.float64) - ModelImage.of(self.start).weights
        np.testing.assert_allclose(moved, applied, rtol=1e-4, atol=1e-3, err_msg=f"seed {self.seed}")

    def _train(self, name: str) -> None:
        folder, outbox = self.folder / name, self.devices[name].outbox
        _, residual = residual_on_disk(folder, self.layout.num_params)
        here = numbers_on_disk(folder)
        update_id, number = outbox.next_id(), outbox.next_sequence
        try:
            if not self.devices[name].worker.step():
                return
        except Unavailable:
            return
        except Killed:
            self._restart(name)
        found = [path for end in (".update", ".kept.update") for path in folder.glob(f"*{number}{end}")]
        if not found:
            return
        update = decode(found[0].read_bytes(), 10**6)
        assert update.update_id == update_id
        decoded = np.zeros(self.layout.num_params, np.float32)
        decode_delta(update.codec, update.payload, self.layout).add_into(decoded, 1.0)
        exact = decoded.astype(np.float64)
        feedback = parse(str(update.codec["name"])).feedback
        noise = 0 * exact if feedback else Spy.given - exact
        account = self.accounts[name]
        carries = found[0].name.endswith(".kept.update")
        outcomes, gone = first_outcomes(self.store.inner.ledger), here - numbers_on_disk(folder)
        settled = [i for i, made in account.made.items() if int(i.rsplit("/", 1)[1]) in gone and made.carries]
        returned = [i for i in settled if outcomes[i] in REFUSED]
        horizon = HORIZONS * self.system.settings.staleness_max
        account.mix(residual, returned, self.delta, update.base_version, horizon)
        made = Made(self.delta, exact, noise, carries, update.base_version, account.birth)
        account.made[update_id] = made
        if carries:
            version, _ = residual_on_disk(folder, self.layout.num_params)
            assert abs(version - account.birth) < 0.01, f"seed {self.seed}: {name}'s residual has the wrong age"

    def _train_and_kill(self, name: str) -> None:
        self.killer.left = int(self.rng.integers(1, KILL_POINTS))
        self._train(name)
        self.killer.left = -1

    def _publish(self, name: str) -> None:
        with contextlib.suppress(Unavailable):
            while self.devices[name].publisher.step():
                pass

    def _publish_and_kill(self, name: str) -> None:
        self.killer.left = int(self.rng.integers(1, 4))
        try:
            self._publish(name)
        except Killed:
            self._restart(name)
        self.killer.left = -1

    def _aggregate(self, name: str) -> None:
        self.system.clock.time_s += float(self.rng.choice([0, 40]))  # enough for what waits in the buffer to commit
        for _ in range(int(self.rng.integers(1, 12))):
            self.system.step()

    def _kill_aggregator(self, name: str) -> None:
        self._mend_store()
        self.system.restart()

    def _change_codec(self, name: str) -> None:
        self._mend_store()
        self.system.restart(codec=str(self.rng.choice(CODECS)))

    def _duplicate(self, name: str) -> None:
        if self.published:
            message = self.published[self.rng.integers(max(0, len(self.published) - 6), len(self.published))]
            self.system.broker.sink().publish(message, 1.0)

    def _store_comes_or_goes(self, name: str) -> None:
        self.store.failing = () if self.store.failing else ("head", "job", "model", "outcomes")

    def _mend_store(self) -> None:
        self.store.failing = ()
        self.store.faults.clear()

    def _commit_fails(self, name: str) -> None:
        self.store.faults.append(str(self.rng.choice(["before", "after"])))

    def _settle(self) -> None:
        """Quiet: everything is published and decided, and every worker trains once more."""
        self.calm = True
        self._mend_store()
        for train in (self._train_and_kill, self._train, self._train):  # the last learns what became of all before
            for name in self.names:
                train(name)
                self._publish_all(name)
                self.check(name)
        self.check_model_when_exact()
        told = set(first_outcomes(self.store.inner.ledger))
        dead = {letter.body for letter in self.system.broker.dead}
        for name in self.names:
            last = self.devices[name].outbox.next_sequence - 1
            for path in (self.folder / name).glob("*.sent"):
                number = int(path.stem)
                untold = f"{name}/{self.devices[name].outbox.incarnation}/{number}" not in told
                died = untold and any(m.body in dead for m in self.published if m.update_id.endswith(f"/{number}"))
                assert number == last or died, f"seed {self.seed}: {path.name} of {name} was never settled"

    def check_model_when_exact(self) -> None:
        """Check the model when every update makes a version."""
        if self.system.settings.buffer_size == 1:
            self.check_model()

    def _publish_all(self, name: str) -> None:
        while self.devices[name].publisher.step():
            pass
        self.system.drain()
        self.system.clock.time_s += 100
        self.system.drain()

    def _restart(self, name: str) -> None:
        """Start the worker again from its files; it may be killed while it recovers."""
        self.devices[name].outbox.close()
        self.killer.left = int(self.rng.integers(1, 10)) if self.rng.random() < 0.2 else -1
        with contextlib.suppress(Killed):
            self.devices[name] = self._open(name)
            self.killer.left = -1
            return
        self.killer.left = -1
        self.devices[name] = self._open(name)

    def _open(self, name: str) -> Device:
        return device_of(
            self.folder, self.system, self._task, lambda: {k: a.copy() for k, a in self.start.items()},
            sink=Sink(self), client_id=name, seed=self.seed,
        )  # fmt: skip

    def _task(self, model: dict[str, np.ndarray], context: Any) -> TrainResult:
        """Move every weight by a random amount of a random size."""
        before = {name: array.copy() for name, array in model.items()}
        scale = 10 ** self.rng.uniform(-1, 1)
        for array in model.values():
            array += (scale * self.rng.standard_normal(array.shape)).astype(np.float32)
        self.delta = self.layout.flatten({name: model[name] - before[name] for name in model}).astype(np.float64)
        return TrainResult(1, 1)


def run(seed: int, folder: Path, monkeypatch: Any) -> None:
    """Run one seed in a folder of its own."""
    killer = Killer()
    with monkeypatch.context() as patch:
        for name, method in killer.patches().items():
            patch.setattr(Folder, name, method)
        patch.setattr(worker.worker, "parse", lambda name: Spy(parse(name)))
        Fleet(seed, folder / str(seed), killer).run()
