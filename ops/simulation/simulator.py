"""The simulator: the production worker, publisher and aggregator under a clock that jumps from event to event.

    a device is chosen   -> it pulls, and its training begins           Worker.begin
    TRAINED              -> it compresses, encodes, fills its outbox    Worker.finish (as soon as the training is done)
    PUBLISHED            -> the update is sent, the aggregator works    Publisher.step, Aggregator.step
    WAKE                 -> it has rested and may be chosen again

Times come from the models of speed, network and availability, never from this machine; every draw is a function of
the seed. So the same plan gives the same bytes of weights, wherever the trainings run, and however often the run is
interrupted. A checkpoint may be made between any two events and changes nothing: it is what a crash of the production
system would leave, the store as last committed and the messages after that, which are delivered again.
"""

import heapq
import json
import logging
import math
import random
import threading
import time
from array import array
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
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
from ops.simulation.plan import JOB, Plan, client_name, network_of, plain_plan, share_settings, speeds_of
from shared.clock import VirtualClock
from shared.errors import FedMQError, SettingsError, TaskError
from shared.metrics import AggregatorMetrics
from shared.model_image import ModelImage
from shared.store.inprocess import InProcessStore
from shared.transport.inprocess import InProcessBroker
from shared.transport.ports import Outgoing, UpdateSink
from worker.training import Trainer, Training, seed_everything

log = logging.getLogger("fedmq.simulation")

HOUR_S = 3600.0
CHECKPOINT_S = 30.0  # real seconds between two checkpoints,
CHECKPOINT_SHARE = 0.05  # and at most this share of the time goes into them
PICKS = 16  # tries to find a device that is there, before waiting for one
FAILED_IN_A_ROW_MAX = 500  # trainings that raised with none that did not in between: the task is broken
MESSAGES_MAX = 50  # different ones of failed trainings that are shown and counted apart
OTHER_MESSAGES = "other messages"
WINDOW = 5  # evaluations the target is averaged over
TRAINED, PUBLISHED, LOST, WAKE, RETRY = range(5)


@dataclass(slots=True)
class Flight:
    """One trip under way.

    Attributes:
        client: who.
        due_s: when its training ends.
        compute_s: how long that takes.
        revision: of the store when it began.
        training: what; None once it is done.
        size_bytes: of its update.
        failure: message and trace where the task raised.
        trained: its update is on its way.
        beside: takes none of the places there are: the trusted device, or one whose round is over.
    """

    client: int
    due_s: float
    compute_s: float
    revision: int
    training: Training | None
    size_bytes: int = 0
    failure: tuple[str, str] | None = None
    trained: bool = False
    beside: bool = False


@dataclass(slots=True)
class Counts:
    """Where a simulation stands, in numbers.

    Attributes:
        published: updates.
        lost: trips that were lost in mid-training.
        aborted: trips that came too late for their round.
        failed_in_a_row: trainings that raised since the last one that did not.
        order: of the event that was pushed last.
        number: of the trip that began last.
        round: the version whose round it is.
        evaluations: the next one, of as many as there are over a run.
        retry_s: when idle devices are looked at again; infinite: no need.
        trusted_round: the last round the trusted device has reported in; -1: it never has.
    """

    published: int = 0
    lost: int = 0
    aborted: int = 0
    failed_in_a_row: int = 0
    order: int = 0
    number: int = 0
    round: int = 0
    evaluations: int = 1
    retry_s: float = math.inf
    trusted_round: int = -1


class Simulator:
    """One simulation.

    Args:
        plan: what to run.
        trainer: of its task.
        executor: where trainings run.
        database: where it is kept; holds a checkpoint of the same plan, or nothing.
        stop: when set, `run` ends with a checkpoint and a `KeyboardInterrupt`.
    """

    def __init__(
        self, plan: Plan, trainer: Trainer, executor: Executor, database: Database, stop: threading.Event | None = None
    ) -> None:
        fleet = plan.fleet
        self.plan, self.clock = plan, VirtualClock()
        self._stop = stop or threading.Event()
        self._trainer, self._executor, self._database = trainer, executor, database
        self._records, self._folders = Records(database, "state"), Folders(database)
        self._speeds, self._network = speeds_of(fleet, plan.devices), network_of(fleet, plan.devices)
        self._availability = Availability(fleet.availability, fleet.dropout, fleet.clients, fleet.seed)
        self._synchronous, self._in_flight, self._trusted = plan.synchronous, fleet.in_flight, plan.trusted
        self._attack = parse_attack(fleet.attack)
        self._attackers, self._hurry = attackers(fleet.attackers, fleet.clients, fleet.seed), hurry(self._attack)
        self._end_s = fleet.hours * HOUR_S
        self._broker, self._store = InProcessBroker(dead_max=0), InProcessStore(Records(database, "kept"))
        self._sink = _Noting(self._broker.sink())
        self._waiting: list[tuple[float, int]] = []  # flights whose training may be submitted, by due time
        self._submitted: dict[int, None] = {}
        self._beside, self._trusted_out = 0, False
        seed_everything(fleet.seed)
        self._begin() if "simulation" not in self._records else self._resume()

    @property
    def published(self) -> int:
        """Updates published so far."""
        return self.counts.published

    @property
    def trips(self) -> int:
        """Trips that began so far."""
        return sum(self._trips)

    @property
    def in_flight(self) -> int:
        """Trips under way."""
        return len(self._flights)

    def model(self) -> ModelImage:
        """Return the newest version."""
        return self._store.model(self.aggregator.state.committed_version)

    def run(self) -> Iterator[History]:
        """Run to the end, yielding after each evaluation; what was done before a resume is not done again.

        Raises:
            FedMQError: nothing can happen any more, though the end is not reached; or nothing but failures.
            SettingsError: the task does not fit.
            KeyboardInterrupt: it was asked to stop.
        """
        if not self.history.rows:
            self._evaluate()
        yield self.history
        if not self._events and not self._over():
            self._fill()
        due_s = time.monotonic() + CHECKPOINT_S
        while not self._over():
            if self._next_event() and self._evaluation_due():
                self._evaluate()
                yield self.history
            if self._stop.is_set():
                self.checkpoint()
                raise KeyboardInterrupt
            if time.monotonic() >= due_s:
                due_s = self._checkpoint_in_time()
        self.aggregator.finish()
        self._read_ledger()
        if self._has_news():
            self._evaluate()
        yield self.history

    # --- events

    def _next_event(self) -> bool:
        """Move the clock to the next event and carry it out; tell whether there was one before the end of time."""
        if not self._events:
            raise FedMQError(self._stuck())
        time_s, _, kind, client, number = heapq.heappop(self._events)
        if self._end_s and time_s > self._end_s:
            self.clock.time_s = self._end_s
            return False
        self.clock.time_s = time_s
        self._act(kind, client, number)
        return True

    def _act(self, kind: int, client: int, number: int) -> None:
        """Carry out one event."""
        if kind == RETRY:
            self.counts.retry_s = math.inf
        elif kind == WAKE:
            self._idle.append(client)
        elif number not in self._flights:  # its round ended without it
            return
        elif kind == LOST:
            self.counts.lost += 1
            self._land(number)
        elif kind == TRAINED:
            self._trained(number)
        else:
            self._publish(number)
        if not self._over():
            self._fill()

    def _fill(self) -> None:
        """Send devices on trips while fewer are out than may be.

        In a round of FedAvg those whose update was taken in still have their place, so that each round sees as many
        devices as there are places, and one more for each that was lost or refused.
        """
        if self._trusted is not None:
            self._start_trusted(self._trusted)
            if self.counts.trusted_round < 0:
                return  # all others would be refused: there is nothing yet to compare them with
        out = len(self._flights) - self._beside + (len(self.aggregator.state.buffer) if self._synchronous else 0)
        while out < self._in_flight and (client := self._pick()) is not None:
            self._start(client)
            out += 1

    def _start_trusted(self, client: int) -> None:
        """Let the trusted device train again as soon as it may: it is the server's own, and always there."""
        reported = self._synchronous and self.counts.trusted_round == self.counts.round
        if not self._trusted_out and not reported:
            self._trusted_out = True
            self._start(client)

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
        if soonest_s < self.counts.retry_s:
            self.counts.retry_s = soonest_s
            self._push(soonest_s, RETRY)
        return None

    def _start(self, client: int) -> None:
        """Let a device pull and begin to train."""
        trip = self._trips[client]
        self._trips[client] += 1
        training, fetched_bytes = self._set_out(client)
        self.history.pulled(self.history.bytes_pulled + fetched_bytes, self.history.pulls + (fetched_bytes > 0))
        pulled_s = self.clock.time_s + self._network.down_seconds(client, fetched_bytes)
        compute_s = self._speeds.seconds(client, trip) / (self._hurry if client in self._attackers else 1.0)
        self.counts.number += 1
        number, trusted = self.counts.number, client == self._trusted
        flight = Flight(client, pulled_s + compute_s, compute_s, self._revision(), training, beside=trusted)
        self._flights[number] = flight
        self._beside += trusted
        lost_at = None if trusted else self._availability.drops(client, trip)
        if lost_at is not None:
            flight.training = None
            self._clients.trained(client)
            self._push(pulled_s + lost_at * compute_s, LOST, client, number)
            return
        self._push(flight.due_s, TRAINED, client, number)
        self._queue(number)

    def _set_out(self, client: int, revision: int | None = None) -> tuple[Training, int]:
        """Have a device begin; return what it is to train and how many bytes it fetched for that."""
        device = self._clients.set_out(client, revision)
        training = device.worker.begin()
        assert training is not None, "there is a model, and nobody is asked twice in a round"  # noqa: S101
        self._clients.pulled(client)
        return training, device.replica.fetched_bytes

    def _trained(self, number: int) -> None:
        """Compress and encode, and send the update off."""
        self._collect(number)
        flight = self._flights[number]
        if flight.failure is not None:
            self._failed(flight.client, *flight.failure)
            self._land(number)
            return
        flight.trained, self.counts.failed_in_a_row = True, 0
        sent_s = self.clock.time_s + self._network.up_seconds(flight.client, flight.size_bytes)
        if flight.client != self._trusted:
            sent_s = self._availability.next_available(flight.client, sent_s)
        self._push(sent_s, PUBLISHED, flight.client, number)

    def _publish(self, number: int) -> None:
        """Deliver an update and let the aggregator work."""
        flight = self._flights[number]
        sent = self._clients.publish(flight.client)
        assert sent, "its training put an update there"  # noqa: S101
        self.counts.published += 1
        self._settle()
        if flight.client == self._trusted:
            self.counts.trusted_round = self.counts.round
        self._land(number, took_part=not flight.beside)
        if self._synchronous and self.aggregator.state.committed_version > self.counts.round:
            self._next_round()

    def _settle(self) -> None:
        """Let the aggregator work until nothing is left."""
        while self.aggregator.step():
            pass
        self._read_ledger()

    def _land(self, number: int, took_part: bool = False) -> None:
        """End a trip; the device rests. In a round those that took part wait for the next."""
        flight = self._flights.pop(number)
        self._clients.come_back(flight.client)
        self._beside -= flight.beside
        if flight.client == self._trusted:
            self._trusted_out = False
        elif self._synchronous and took_part:
            self._resting.append(flight.client)
        elif self.plan.fleet.rest_s:
            key = stream(self.plan.fleet.seed, "rest", flight.client)
            rest_s = -math.log(uniform(key, self._trips[flight.client])) * self.plan.fleet.rest_s
            self._push(self.clock.time_s + rest_s, WAKE, flight.client)
        else:
            self._idle.append(flight.client)

    def _next_round(self) -> None:
        """Abort the trips that came too late for the round, as over-selection does, and let everybody take part.

        An update that is on its way arrives, and is refused.
        """
        self.counts.round = self.aggregator.state.committed_version
        for number, flight in list(self._flights.items()):
            if flight.trained:
                self._beside += not flight.beside
                flight.beside = True
                continue
            if number in self._submitted:
                self._executor.drop(number)
                del self._submitted[number]
            self._land(number)
            self.counts.aborted += 1
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
        training = flight.training
        if training is None:
            return
        if number not in self._submitted:
            self._submit(number)
        outcome = self._executor.take(number)
        del self._submitted[number]
        self._pump()
        flight.training, device = None, self._clients.out(flight.client)
        try:
            if isinstance(outcome, Failure):
                raise TaskError(outcome.message)
            if flight.client in self._attackers:
                spoil(outcome.delta, self._attack, training.context.seed)
            device.worker.finish(training, replace(outcome, seconds=flight.compute_s), lambda: flight.due_s)
            waiting = device.outbox.oldest()
            assert waiting is not None, "just put there"  # noqa: S101
            flight.size_bytes = waiting.folder.size(waiting.name)
        except TaskError as error:
            flight.failure = str(error), outcome.trace if isinstance(outcome, Failure) else ""
        self._clients.trained(flight.client)

    def _failed(self, client: int, message: str, trace: str) -> None:
        """Count a training that gave nothing; each message is shown once, with the user's own lines.

        Raises:
            FedMQError: it is not about some of the clients any more.
        """
        if message not in self.failures:
            if len(self.failures) < MESSAGES_MAX:
                log.error("%s: %s; going on\n%s", self._name(client), message, trace)
            else:
                message = OTHER_MESSAGES
        self.failures[message] += 1
        self.counts.failed_in_a_row += 1
        if self.counts.failed_in_a_row >= FAILED_IN_A_ROW_MAX:
            raise FedMQError(
                f"the last {FAILED_IN_A_ROW_MAX} trainings all raised, after {self.published} updates: mend the task; "
                f"the last one: {message}"
            )

    # --- what is known of the run

    def _over(self) -> bool:
        fleet = self.plan.fleet
        if fleet.updates and self.published >= fleet.updates:
            return True
        if self._end_s and self.clock.time_s >= self._end_s:
            return True
        return fleet.stop_at_target and self._reached

    def progress(self) -> float:
        """Return the share of the run that is done, in [0, 1]."""
        fleet = self.plan.fleet
        by_updates = self.published / fleet.updates if fleet.updates else 0.0
        return min(1.0, max(by_updates, self.clock.time_s / self._end_s if self._end_s else 0.0))

    def target_row(self) -> int | None:
        """Return the first row at which the mean of the last evaluations has reached the target."""
        fleet = self.plan.fleet
        values = [row.metrics.get(fleet.metric, math.nan) for row in self.history.rows] if fleet.target else []
        for last in range(WINDOW, len(values) + 1):
            if sum(values[last - WINDOW : last]) / WINDOW >= fleet.target:
                return last - 1
        return None

    def _has_news(self) -> bool:
        return not self.history.rows or self.aggregator.state.committed_version != self.history.rows[-1].version

    def _evaluation_due(self) -> bool:
        done = self.progress() * self.plan.fleet.evaluations
        if done < self.counts.evaluations or not self._has_news():
            return False
        self.counts.evaluations = math.floor(done) + 1
        return True

    def _evaluate(self) -> None:
        version, fleet = self.aggregator.state.committed_version, self.plan.fleet
        metrics = self._trainer.evaluate(self._store.model(version), version, fleet.task_settings)
        if fleet.target and fleet.metric not in metrics:
            raise SettingsError(f"metric={fleet.metric}: evaluate() of {fleet.task} returns {', '.join(metrics)}")
        self.history.evaluated(self.clock.time_s, version, metrics)
        self._reached = self.target_row() is not None

    def _read_ledger(self) -> None:
        """Take in what the aggregator has committed; nothing is open then."""
        if not self._store.ledger:
            return
        for commit in self._store.ledger:
            self.history.add_entries(commit["updates"])
        self._store.ledger.clear()
        self._sink.noted.clear()

    def _stuck(self) -> str:
        self.aggregator.finish()
        self._read_ledger()
        outcomes = ", ".join(f"{count} {outcome}" for outcome, count in self.history.outcomes.items()) or "none settled"
        failed = "".join(f"; {count} trainings raised: {what}" for what, count in self.failures.most_common(1))
        return (
            f"nothing can happen after {self.clock.time_s / HOUR_S:.2f} h: {len(self._idle)} idle devices, "
            f"{len(self._resting)} that took part in the round, {self.published} updates published, {outcomes}{failed}"
        )

    def _push(self, time_s: float, kind: int, client: int = -1, number: int = -1) -> None:
        self.counts.order += 1
        heapq.heappush(self._events, (time_s, self.counts.order, kind, client, number))

    def _name(self, client: int) -> str:
        return self.plan.aggregator.trusted_client if client == self._trusted else client_name(client)

    def _revision(self) -> int:
        head = self._store.head()
        assert head is not None, "the job has begun"  # noqa: S101
        return head.revision

    # --- beginning, checkpoints, going on

    def _begin(self) -> None:
        fleet = self.plan.fleet
        self._store.create(self._trainer.initial(), self.clock.now())
        self.history, self.failures, self.counts = History(self._trainer.layout.num_params), Counter[str](), Counts()
        self.resumed = self._reached = False
        self._events: list[tuple[float, int, int, int, int]] = []
        self._flights: dict[int, Flight] = {}
        self._idle, self._resting = list(range(fleet.clients)), list[int]()
        self._trips = array("q", bytes(8 * self.plan.devices))
        self._rng = random.Random(fleet.seed)  # noqa: S311 - no secret
        self._start_programs({})

    def _start_programs(self, held: dict[int, tuple[int, str]]) -> None:
        """Build the aggregator and the devices over what is stored."""
        fleet, source = self.plan.fleet, self._broker.source(JOB)
        self.aggregator = Aggregator(
            self.plan.aggregator, source, self._store, self.clock, AggregatorMetrics(), poll_s=0.0
        )  # fmt: skip
        self._store.announce(self.aggregator.describe())
        self._clients = Clients(
            self._store, self._sink, self._folders, self._trainer, self.clock, JOB, fleet.seed,
            self._name, lambda client: share_settings(fleet, client), held,
        )  # fmt: skip

    def _checkpoint_in_time(self) -> float:
        """Make a checkpoint; return when the next one is due."""
        started = time.monotonic()
        self.checkpoint()
        now = time.monotonic()
        return now + max(CHECKPOINT_S, (now - started) / CHECKPOINT_SHARE)

    def checkpoint(self) -> None:
        """Make everything so far durable; what comes after is the same as without it.

        Trainings under way are waited for, but in rounds, where some would be for nothing: those are begun again.
        """
        for number in list(self._flights) if not self._synchronous else ():
            self._collect(number)
        self._folders.save()
        state = {
            "time_s": self.clock.time_s, "history": self.history.dump(), "failures": dict(self.failures),
            "counts": _fields(self.counts), "events": self._events, "idle": self._idle, "resting": self._resting,
            "trips": self._trips.tobytes(), "rng": self._rng.getstate(), "held": self._clients.held,
            "flights": {
                number: _fields(flight) | {"training": flight.training is not None}
                for number, flight in self._flights.items()
            },
            "open": [[message.client, message.update_id, message.body] for message in self._sink.noted],
        }  # fmt: skip
        self._records["simulation"] = msgpack.packb(state)
        self._records["store"] = msgpack.packb(self._store.dump())
        self._records["plan"] = json.dumps(plain_plan(self.plan, given=True)).encode()
        self._database.commit()

    def _resume(self) -> None:
        state: dict[str, Any] = msgpack.unpackb(self._records["simulation"], strict_map_key=False)
        stored = msgpack.unpackb(self._records["store"], strict_map_key=False)
        self._store.restore(self._trainer.layout, stored)
        self.clock.time_s = state["time_s"]
        self.history, self.failures = History.restored(state["history"]), Counter[str](state["failures"])
        self.counts, self.resumed, self._reached = Counts(**state["counts"]), True, self.target_row() is not None
        self._events = [tuple(event) for event in state["events"]]
        self._idle, self._resting = state["idle"], state["resting"]
        self._trips = array("q", state["trips"])
        version, inner, gauss = state["rng"]
        self._rng = random.Random()  # noqa: S311 - no secret
        self._rng.setstate((version, tuple(inner), gauss))
        self._start_programs({client: (version, sha) for client, (version, sha) in state["held"].items()})
        for client, update_id, body in state["open"]:
            self._sink.publish(Outgoing(JOB, client, update_id, body), 0.0)
        self._settle()
        self._resume_flights(state["flights"])

    def _resume_flights(self, flights: dict[int, dict[str, Any]]) -> None:
        """Go on with the trips under way; the trainings that were not done begin again."""
        self._flights = {}
        for number, plain in flights.items():
            flight = self._flights[number] = Flight(**plain | {"training": None})
            if plain["training"]:
                flight.training, _ = self._set_out(flight.client, flight.revision)
                heapq.heappush(self._waiting, (flight.due_s, number))
        self._beside = sum(flight.beside for flight in self._flights.values())
        self._trusted_out = any(flight.client == self._trusted for flight in self._flights.values())
        self._pump()


class _Noting:
    """A publisher that remembers what was not committed yet: a checkpoint holds it, to be delivered again."""

    def __init__(self, inner: UpdateSink) -> None:
        self._inner = inner
        self.noted: list[Outgoing] = []

    def publish(self, message: Outgoing, timeout_s: float) -> None:
        """Publish."""
        self._inner.publish(message, timeout_s)
        self.noted.append(message)

    def close(self) -> None:
        """Nothing to close."""


def _fields(record: Counts | Flight) -> dict[str, Any]:
    """Return a record's fields, none of them copied."""
    return {field.name: getattr(record, field.name) for field in fields(record)}
