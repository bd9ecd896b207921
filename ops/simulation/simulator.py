"""The simulator: the production worker, publisher and aggregator under a clock that jumps from event to event.

    a device is chosen   -> it pulls, and its training begins           Worker.begin
    TRAINED              -> it compresses, encodes, fills its outbox    Worker.finish (as soon as the training is done)
    PUBLISHED            -> the update is sent, the aggregator works    Publisher.step, Aggregator.step
    WAKE                 -> it has rested and may be chosen again

Times come from the models of speed, network and availability, never from this machine; every draw is a function of
the seed. So the same plan gives the same bytes of weights, wherever the trainings run and however often the run is
interrupted: it goes on from its last checkpoint, which an uninterrupted run makes at the same events.
"""

import heapq
import json
import logging
import math
import random
from array import array
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import msgpack

from aggregator.aggregator import Aggregator
from ops.history import History
from ops.simulation.attacks import attackers, hurry, parse_attack, spoil
from ops.simulation.availability import Availability
from ops.simulation.clients import Clients
from ops.simulation.database import Database, Folders, Records
from ops.simulation.draws import stream, uniform
from ops.simulation.executor import Executor, Failure
from ops.simulation.plan import JOB, Plan, network_of, plain_plan, share_settings
from ops.simulation.speeds import Speeds
from shared.clock import VirtualClock
from shared.errors import FedMQError, TaskError
from shared.metrics import AggregatorMetrics
from shared.model_image import ModelImage
from shared.store.inprocess import InProcessStore
from shared.transport.inprocess import InProcessBroker
from worker.training import Trainer, Training, seed_everything

log = logging.getLogger("fedmq.simulation")

HOUR_S = 3600.0
CHECKPOINTS = 20  # over a run
PICKS = 16  # tries to find a device that is there, before waiting for one
DEAD_LETTERS_MAX = 1000
WINDOW = 5  # evaluations the target is averaged over
TRAINED, PUBLISHED, LOST, WAKE, RETRY = range(5)


@dataclass(slots=True)
class Flight:
    """One trip under way.

    Attributes:
        client: who.
        due_s: when its training ends.
        compute_s: how long that takes.
        training: what; None once it is done.
        size_bytes: of its update.
        failed: the task raised.
        trained: its update is on its way.
    """

    client: int
    due_s: float
    compute_s: float
    training: Training | None
    size_bytes: int = 0
    failed: bool = False
    trained: bool = False


class Simulator:
    """One simulation.

    Args:
        plan: what to run.
        trainer: of its task.
        executor: where trainings run.
        database: where it is kept; holds a checkpoint of the same plan, or nothing.
    """

    def __init__(self, plan: Plan, trainer: Trainer, executor: Executor, database: Database) -> None:
        fleet = plan.fleet
        self.plan, self.clock = plan, VirtualClock()
        self._trainer, self._executor, self._database = trainer, executor, database
        self._records, self._folders = Records(database, "state"), Folders(database)
        self._speeds = Speeds(
            fleet.speed, fleet.persistent, fleet.clients, fleet.seed,
            slowest_first=range(fleet.clients - 1, -1, -1) if fleet.correlated else None,
        )  # fmt: skip
        self._network = network_of(fleet)
        self._availability = Availability(fleet.availability, fleet.dropout, fleet.clients, fleet.seed)
        self._synchronous, self._in_flight = plan.synchronous, fleet.in_flight
        self._attack = parse_attack(fleet.attack)
        self._attackers = attackers(fleet.attackers, fleet.clients, fleet.seed)
        self._broker, self._store = InProcessBroker(DEAD_LETTERS_MAX), InProcessStore(Records(database, "kept"))
        self._rests = [stream(fleet.seed, "rest", client) for client in range(fleet.clients)]
        self._evaluations = self._checkpoints = 1  # the next one, of as many as there are over a run
        self._begin() if "simulation" not in self._records else self._resume()

    @property
    def published(self) -> int:
        """Updates published so far."""
        return self._published

    @property
    def resumed(self) -> bool:
        """Whether it went on from a checkpoint."""
        return self._resumed

    def model(self) -> ModelImage:
        """Return the newest version."""
        return self._store.model(self.aggregator.state.committed_version)

    def run(self) -> Iterator[History]:
        """Run to the end, yielding after each evaluation; what was done before a resume is not done again.

        Raises:
            FedMQError: nothing can happen any more, though the end is not reached.
            SettingsError: the task does not fit.
        """
        if not self.history.rows:
            self._evaluate()
        yield self.history
        if not self._events and not self._over():
            self._fill()
        while not self._over():
            if not self._events:
                raise FedMQError(self._stuck())
            time_s, _, kind, client, number = heapq.heappop(self._events)
            if self._end_s and time_s > self._end_s:
                self.clock.time_s = self._end_s
                break
            self.clock.time_s = time_s
            self._act(kind, client, number)
            if self.progress() * self.plan.fleet.evaluations >= self._evaluations and self._has_news():
                self._evaluations = math.floor(self.progress() * self.plan.fleet.evaluations) + 1
                self._evaluate()
                yield self.history
            if self.progress() * CHECKPOINTS >= self._checkpoints:
                self._checkpoints = math.floor(self.progress() * CHECKPOINTS) + 1
                self.checkpoint()
        self.aggregator.finish()
        self._read_ledger()
        if self._has_news():
            self._evaluate()
        self.checkpoint()
        yield self.history

    # --- events

    def _act(self, kind: int, client: int, number: int) -> None:
        """Carry out one event."""
        if kind == RETRY:
            self._retry_s = math.inf
        elif kind == WAKE:
            self._idle.append(client)
        elif number not in self._flights:  # its round ended without it
            return
        elif kind == LOST:
            self.lost += 1
            self._land(number)
        elif kind == TRAINED:
            self._trained(number)
        else:
            self._publish(number)
        self._fill()

    def _fill(self) -> None:
        """Send devices on trips while fewer are out than may be; in a round of FedAvg each goes once."""
        out = len(self._flights) + (self._reported if self._synchronous else 0)
        while out < self._in_flight and (client := self._pick()) is not None:
            self._start(client)
            out += 1

    def _pick(self) -> int | None:
        """Take a random idle device that is there; when none seems to be, look again when one of them is."""
        soonest_s = math.inf
        for _ in range(min(PICKS, 4 * len(self._idle))):
            at = self._rng.randrange(len(self._idle))
            client = self._idle[at]
            next_s = self._availability.next_available(client, self.clock.time_s)
            if next_s <= self.clock.time_s:
                self._idle[at] = self._idle[-1]
                self._idle.pop()
                return client
            soonest_s = min(soonest_s, next_s)
        if soonest_s < self._retry_s:
            self._retry_s = soonest_s
            self._push(soonest_s, RETRY)
        return None

    def _start(self, client: int) -> None:
        """Let a device pull and begin to train."""
        trip = self._trips[client]
        self._trips[client] += 1
        device = self._clients.client(client, share_settings(self.plan.fleet, client))
        device.replica.fetched_bytes = 0
        training = device.worker.begin()
        assert training is not None, "there is a model, and nobody is asked twice in a round"  # noqa: S101
        self._clients.rest(client)
        fetched = device.replica.fetched_bytes
        self.history.pulled(self.history.bytes_pulled + fetched, self.history.pulls + bool(fetched))
        pulled_s = self.clock.time_s + self._network.down_seconds(client, device.replica.fetched_bytes)
        compute_s = self._speeds.seconds(client, trip) / (hurry(self._attack) if client in self._attackers else 1.0)
        self._number += 1
        dropped_at = self._availability.drops(client, trip)
        if dropped_at is not None:
            self._flights[self._number] = Flight(client, math.inf, compute_s, None)
            self._push(pulled_s + dropped_at * compute_s, LOST, client, self._number)
            return
        flight = Flight(client, pulled_s + compute_s, compute_s, training)
        self._flights[self._number] = flight
        self._push(flight.due_s, TRAINED, client, self._number)
        self._queue(self._number)

    def _trained(self, number: int) -> None:
        """Compress and encode, and send the update off."""
        self._collect(number)
        flight = self._flights[number]
        if flight.failed:
            self._land(number)
            return
        flight.trained = True
        sent_s = self.clock.time_s + self._network.up_seconds(flight.client, flight.size_bytes)
        self._push(self._availability.next_available(flight.client, sent_s), PUBLISHED, flight.client, number)

    def _publish(self, number: int) -> None:
        """Deliver an update and let the aggregator work."""
        client = self._flights[number].client
        self._clients.client(client, share_settings(self.plan.fleet, client)).publisher.step()
        self._published += 1
        self._reported += 1
        while self.aggregator.step():
            pass
        self._read_ledger()
        self._land(number)
        if self._synchronous and self.aggregator.state.committed_version > self._round:
            self._next_round()

    def _land(self, number: int) -> None:
        """End a trip; the device rests."""
        client = self._flights.pop(number).client
        if self._synchronous:
            self._resting.append(client)
        elif self.plan.fleet.rest_s:
            rest_s = -math.log(uniform(self._rests[client], self._trips[client])) * self.plan.fleet.rest_s
            self._push(self.clock.time_s + rest_s, WAKE, client)
        else:
            self._idle.append(client)

    def _next_round(self) -> None:
        """Abort the trips that came too late for the round, as over-selection does, and let everybody take part."""
        self._round, self._reported = self.aggregator.state.committed_version, 0
        late = [number for number, flight in self._flights.items() if not flight.trained]
        for number in late:
            flight = self._flights.pop(number)
            if number in self._submitted:
                self._executor.drop(number)
                del self._submitted[number]
            self._idle.append(flight.client)
            self.aborted += 1
        self._waiting.clear()
        self._idle += self._resting
        self._resting.clear()

    # --- trainings, which run ahead of the clock

    def _queue(self, number: int) -> None:
        """Have a training done some time before it is due.

        Deltas are encoded as soon as they are there: one model-size vector a device would not fit in memory. In rounds
        the late ones are aborted, so there nothing is trained far ahead.
        """
        heapq.heappush(self._waiting, (self._flights[number].due_s, number))
        self._pump()
        while self._waiting and not self._synchronous:
            self._collect(next(iter(self._submitted)))

    def _pump(self) -> None:
        while self._waiting and len(self._submitted) < self._executor.window:
            _, number = heapq.heappop(self._waiting)
            if number in self._flights and number not in self._submitted:
                self._submit(number)

    def _submit(self, number: int) -> None:
        training = self._flights[number].training
        if training is not None:
            self._submitted[number] = None
            self._executor.submit(number, training)

    def _collect(self, number: int) -> None:
        """See to it that a flight's training is done and encoded."""
        flight = self._flights[number]
        if flight.training is None:
            return
        if number not in self._submitted:
            self._submit(number)
        outcome = self._executor.take(number)
        del self._submitted[number]
        self._pump()
        training, flight.training = flight.training, None
        device = self._clients.client(flight.client, share_settings(self.plan.fleet, flight.client))
        try:
            if isinstance(outcome, Failure):
                raise TaskError(outcome.message)
            if flight.client in self._attackers:
                spoil(outcome.delta, self._attack, training.context.seed)
            device.worker.finish(training, replace(outcome, seconds=flight.compute_s), lambda: flight.due_s)
        except TaskError as error:
            trace = outcome.trace if isinstance(outcome, Failure) else ""
            self._failed(flight, str(error), trace)
            return
        waiting = device.outbox.oldest()
        assert waiting is not None, "just put there"  # noqa: S101
        flight.size_bytes = waiting.folder.size(waiting.name)

    def _failed(self, flight: Flight, message: str, trace: str) -> None:
        """Count a training that gave nothing; each message is shown once, with the user's own lines."""
        flight.failed = True
        if not self.failures[message]:
            log.error("client-%d: %s; going on\n%s", flight.client, message, trace)
        self.failures[message] += 1

    # --- what is known of the run

    def _over(self) -> bool:
        fleet = self.plan.fleet
        if fleet.updates and self._published >= fleet.updates:
            return True
        if self._end_s and self.clock.time_s >= self._end_s:
            return True
        return fleet.stop_at_target and self.target_row() is not None

    def progress(self) -> float:
        """Return the share of the run that is done, in [0, 1]."""
        fleet = self.plan.fleet
        by_updates = self._published / fleet.updates if fleet.updates else 0.0
        return min(1.0, max(by_updates, self.clock.time_s / self._end_s if self._end_s else 0.0))

    def target_row(self) -> int | None:
        """Return the first row at which the mean of the last evaluations has reached the target."""
        fleet, values = (
            self.plan.fleet,
            [row.metrics.get(self.plan.fleet.metric, math.nan) for row in self.history.rows],
        )
        for last in range(WINDOW, len(values) + 1) if fleet.target else ():
            if sum(values[last - WINDOW : last]) / WINDOW >= fleet.target:
                return last - 1
        return None

    def _has_news(self) -> bool:
        return not self.history.rows or self.aggregator.state.committed_version != self.history.rows[-1].version

    def _evaluate(self) -> None:
        version = self.aggregator.state.committed_version
        metrics = self._trainer.evaluate(self._store.model(version), version, self.plan.fleet.task_settings)
        self.history.evaluated(self.clock.time_s, version, metrics)

    def _read_ledger(self) -> None:
        for commit in self._store.ledger:
            self.history.add_entries(commit["updates"])
        self._store.ledger.clear()

    def _stuck(self) -> str:
        failed = f"; {sum(self.failures.values())} trainings raised: {next(iter(self.failures), '')}"
        return (
            f"nothing can happen after {self.clock.time_s / HOUR_S:.2f} h: {len(self._idle)} idle devices, "
            f"{len(self._resting)} that took part in the round, {self._published} updates published{failed}"
        )

    def _push(self, time_s: float, kind: int, client: int = -1, number: int = -1) -> None:
        self._order += 1
        heapq.heappush(self._events, (time_s, self._order, kind, client, number))

    # --- beginning, checkpoints, going on

    def _begin(self) -> None:
        fleet = self.plan.fleet
        seed_everything(fleet.seed)
        self._store.create(self._trainer.initial(), self.clock.now())
        self.history = History(self._trainer.layout.num_params)
        self.failures: Counter[str] = Counter()
        self.lost = self.aborted = 0
        self._resumed = False
        self._events: list[tuple[float, int, int, int, int]] = []
        self._flights: dict[int, Flight] = {}
        self._idle, self._resting = list(range(fleet.clients)), list[int]()
        self._trips = array("q", bytes(8 * fleet.clients))
        self._rng = random.Random(fleet.seed)  # noqa: S311 - no secret
        self._order = self._number = self._published = self._reported = self._round = 0
        self._retry_s = math.inf
        self._start_programs({})

    def _start_programs(self, held: dict[int, tuple[int, str]]) -> None:
        """Build the aggregator and the devices over what is stored."""
        self._end_s = self.plan.fleet.hours * HOUR_S
        self._waiting: list[tuple[float, int]] = []
        self._submitted: dict[int, None] = {}
        self.aggregator = Aggregator(
            self.plan.aggregator, self._broker.source(JOB), self._store, self.clock, AggregatorMetrics(), poll_s=0.0
        )
        self._store.announce(self.aggregator.describe())
        self._clients = Clients(
            self._store, self._broker.sink(), self._folders, self._trainer, self.clock, JOB, self.plan.fleet.seed
        )
        self._clients.held = held

    def checkpoint(self) -> None:
        """Make everything so far durable: open updates are committed, trainings under way are waited for."""
        for number in list(self._flights):
            self._collect(number)
        self.aggregator.finish()
        self._read_ledger()
        self._clients.forget()
        self._folders.save()
        state = {
            "time_s": self.clock.time_s, "history": self.history.dump(), "failures": dict(self.failures),
            "lost": self.lost, "aborted": self.aborted, "events": self._events, "idle": self._idle,
            "resting": self._resting, "trips": self._trips.tobytes(), "rng": self._rng.getstate(),
            "order": self._order, "number": self._number, "published": self._published, "reported": self._reported,
            "round": self._round, "evaluations": self._evaluations, "checkpoints": self._checkpoints,
            "retry_s": self._retry_s, "held": self._clients.held,
            "flights": {
                number: [f.client, f.due_s, f.compute_s, None, f.size_bytes, f.failed, f.trained]
                for number, f in self._flights.items()
            },
        }  # fmt: skip
        self._records["simulation"] = msgpack.packb(state)
        self._records["store"] = msgpack.packb(self._store.dump())
        self._records["plan"] = json.dumps(plain_plan(self.plan, given=True)).encode()
        self._database.commit()

    def _resume(self) -> None:
        state: dict[str, Any] = msgpack.unpackb(self._records["simulation"], strict_map_key=False)
        self._store.restore(
            self._trainer.layout, msgpack.unpackb(self._records["store"], strict_map_key=False)
        )  # fmt: skip
        self.clock.time_s = state["time_s"]
        self.history = History.restored(state["history"])
        self.failures = Counter(state["failures"])
        self.lost, self.aborted, self._resumed = state["lost"], state["aborted"], True
        self._events = [tuple(event) for event in state["events"]]
        self._flights = {number: Flight(*fields) for number, fields in state["flights"].items()}
        self._idle, self._resting = state["idle"], state["resting"]
        self._trips = array("q", state["trips"])
        version, inner, gauss = state["rng"]
        self._rng = random.Random()  # noqa: S311 - no secret
        self._rng.setstate((version, tuple(inner), gauss))
        self._order, self._number, self._published = state["order"], state["number"], state["published"]
        self._reported, self._round, self._retry_s = state["reported"], state["round"], state["retry_s"]
        self._evaluations, self._checkpoints = state["evaluations"], state["checkpoints"]
        self._start_programs({client: (version, sha) for client, (version, sha) in state["held"].items()})
