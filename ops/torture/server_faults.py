"""The faults, by name. Each is a function that does it, undoes it and says when it is over; nobody mends anything.

A program that is killed is started again as an init system would. What a fault measures beside the time until work
goes on, it measures as the issue states its limits: a standby from the kill, an aggregator from its start.
"""

import contextlib
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from ops.torture.proxy import Proxy
from ops.torture.server_kept import Kept, SmallDisk
from ops.torture.server_rig import AGGREGATORS, Rig
from shared.errors import FedMQError, Unavailable

STANDBY_S_MAX = 10.0  # from the kill of the active aggregator until its standby has committed
RESTART_S_MAX = 5.0  # from the start of an aggregator, when there is no other, until it has committed
EFFECT_S_MAX = 60.0
WORK_S_MAX = 120.0  # work that does not go on by itself by then never does
ALARM_BYTES_LEFT = 20 * 2**20  # less than the broker wants to see free
QUEUE_DIES = (
    "RabbitMQ 3.10.8: a write without room may leave a gap in the log of a quorum queue (corrupt_log), which then "
    "never starts again; disk_free_limit must keep the disk from becoming that full"
)
WATERMARK = "0.4"  # RabbitMQ's default


@dataclass
class Strike:
    """One fault while it happens.

    Attributes:
        rig: what is struck.
        rng: of this fault alone.
        note: what was done in particular.
        work_s: from the end of the fault until work went on; the longest, where that happens twice.
        ended_at: when the fault was over, monotonic seconds.
    """

    rig: Rig
    rng: np.random.Generator
    note: str = ""
    work_s: float = 0.0
    ended_at: float = 0.0
    _goes_on: Callable[[], bool] | None = None

    def hold(self, low_s: float, high_s: float) -> None:
        """Let time pass."""
        time.sleep(float(self.rng.uniform(low_s, high_s)))

    def chance(self, probability: float) -> bool:
        """Draw."""
        return bool(self.rng.random() < probability)

    def until(self, condition: Callable[[], object], what: str) -> None:
        """Wait until a fault has its effect, or a server is back.

        Raises:
            FedMQError: it did not come true: `what` did not happen.
        """
        deadline = time.monotonic() + EFFECT_S_MAX
        while not condition():
            if time.monotonic() > deadline:
                raise FedMQError(f"within {EFFECT_S_MAX:g} s {what}")
            time.sleep(0.05)

    def ended(self, goes_on: Callable[[], bool] | None = None) -> None:
        """Say that the fault is over from now on.

        Args:
            goes_on: how to see that work goes on; None: a further update is applied.
        """
        self.ended_at = time.monotonic()
        if goes_on is None:
            before = self.rig.applied()
            while before is None:
                self._give_up_late()
                before = self.rig.applied()

            def goes_on() -> bool:
                return (self.rig.applied() or 0) > before

        self._goes_on = goes_on

    def wait_for_work(self) -> None:
        """Return when work goes on after the fault.

        Raises:
            FedMQError: it does not.
        """
        if self._goes_on is None:  # it was waited for
            return
        while not self._goes_on():
            self._give_up_late()
        self.work_s = max(self.work_s, time.monotonic() - self.ended_at)
        self._goes_on = None

    def _give_up_late(self) -> None:
        if time.monotonic() - self.ended_at > WORK_S_MAX:
            raise FedMQError(f"no work for {WORK_S_MAX:g} s after the end of the fault")
        time.sleep(0.02)


@dataclass(frozen=True, slots=True)
class Fault:
    """A named fault.

    Attributes:
        strike: does and undoes it.
        work_s_max: the limit stated for it, seconds; None: none is.
        disk: whose small disk it needs.
        defect: of a server, which makes it fail now and then whatever we do; it is left out unless asked for.
    """

    strike: Callable[[Strike], None]
    work_s_max: float | None = None
    disk: str | None = None
    defect: str = ""


def aggregator_killed(strike: Strike) -> None:
    """Kill the active aggregator: its standby takes over; it comes back as the standby."""
    active = strike.rig.aggregators[strike.rig.active()]
    strike.note = active.unit.name
    active.kill()
    strike.ended()
    strike.wait_for_work()
    strike.hold(0, 1)
    active.start()


def aggregators_killed(strike: Strike) -> None:
    """Kill both aggregators; start one, and when that is at work the other."""
    first = int(strike.rng.integers(AGGREGATORS))
    for aggregator in strike.rig.aggregators:
        aggregator.kill()
    strike.hold(0, 1.5)
    strike.ended()
    strike.rig.aggregators[first].start()
    strike.wait_for_work()
    strike.rig.aggregators[1 - first].start()


def aggregator_paused(strike: Strike) -> None:
    """Stop the active aggregator in whatever it does until its standby took over; then it goes on as if nothing was."""
    rig, number = strike.rig, strike.rig.active()
    active = rig.aggregators[number]
    strike.note = active.unit.name
    active.pause()
    try:
        strike.hold(0, 0.5)
        rig.proxies[active.unit.name, "broker"].drop(reset=strike.chance(0.5))  # the broker gives it up
        strike.ended()
        strike.wait_for_work()
        strike.hold(0, 1.5)
    finally:
        active.resume()
    strike.ended()


def standby_killed(strike: Strike) -> None:
    """Kill the aggregator that stands by."""
    standby = strike.rig.aggregators[1 - strike.rig.active()]
    strike.note = standby.unit.name
    standby.kill()
    strike.ended()
    strike.hold(0, 1)
    standby.start()


def workers_killed(strike: Strike) -> None:
    """Kill some of the workers."""
    rig = strike.rig
    chosen = [i for i in range(len(rig.workers)) if strike.chance(0.5)] or [int(strike.rng.integers(len(rig.workers)))]
    names = [rig.workers[i].unit.name for i in chosen]
    strike.note = ", ".join(names)
    for i in chosen:
        rig.workers[i].kill()
    goes_on = _further_of(rig, names)
    strike.hold(0, 2)
    for i in chosen:
        rig.workers[i].start()
    strike.ended(goes_on)


def broker_killed(strike: Strike) -> None:
    """Kill RabbitMQ; the fault is over when it answers again."""
    _killed(strike, strike.rig.broker.kill, strike.rig.broker)


def store_killed(strike: Strike) -> None:
    """Kill Redis; the fault is over when it answers again."""
    _killed(strike, strike.rig.store.kill, strike.rig.store)


def store_torn(strike: Strike) -> None:
    """Kill Redis and leave half of a further write at the end of its append-only file, as a power cut does."""
    rig = strike.rig
    tails = {
        "half a command": _command("SET", "fedmq:{torture}:head", "x" * 100)[:-60],
        "a transaction without its end": _command("MULTI") + _command("HSET", "fedmq:{torture}:head", "revision", "0"),
    }
    strike.note = list(tails)[int(strike.rng.integers(len(tails)))]

    def kill() -> None:
        for aggregator in rig.aggregators:  # so that the kill does not leave half a write of its own before ours
            aggregator.pause()
        try:
            time.sleep(0.3)
            rig.store.kill()
            with rig.aof.open("ab") as file:
                file.write(tails[strike.note])
        finally:
            for aggregator in rig.aggregators:
                aggregator.resume()

    _killed(strike, kill, rig.store)


def connections_cut(strike: Strike) -> None:
    """Close connections and take no new ones for a while."""
    reset = strike.chance(0.5)
    _on_connections(strike, lambda proxy: proxy.cut(reset), 0, 3)


def connections_slow(strike: Strike) -> None:
    """Let connections be slow: latency, and few bytes a second."""
    rng = strike.rng
    _on_connections(strike, lambda p: p.slow(float(rng.uniform(0.01, 0.1)), float(rng.uniform(1e6, 1e7))), 1.5, 4)


def connections_stalled(strike: Strike) -> None:
    """Hold every byte for a while, as a partition does."""
    _on_connections(strike, Proxy.stall, 0.5, 6)


def connections_half_open(strike: Strike) -> None:
    """Swallow every byte of the present connections for ever; new ones are served after a while."""
    _on_connections(strike, Proxy.half_open, 0, 2)


def broker_memory_alarm(strike: Strike) -> None:
    """Let RabbitMQ believe that its memory is full: it reads nothing more from publishers."""
    strike.rig.rabbitmqctl("set_vm_memory_high_watermark", "0.0000001")
    _until_blocked(strike)
    strike.hold(1, 3)
    strike.rig.rabbitmqctl("set_vm_memory_high_watermark", WATERMARK)
    strike.ended()


def broker_disk_alarm(strike: Strike) -> None:
    """Leave RabbitMQ less of its disk than it wants: it reads nothing more from publishers."""
    _filled(strike, strike.rig.broker_disk, ALARM_BYTES_LEFT, lambda: _until_blocked(strike))


def broker_disk_full(strike: Strike) -> None:
    """Leave RabbitMQ nothing of its disk: it blocks publishers, or its queue dies first; see `restart_sick_broker`."""
    _filled(strike, strike.rig.broker_disk, 0, lambda: _until_blocked(strike))
    if strike.rig.restart_sick_broker():
        strike.note = "its queue was dead: its liveness check restarted it"
        strike.ended()


def store_disk_full(strike: Strike) -> None:
    """Leave Redis nothing of its disk: with `appendfsync always` it ends at its next write."""
    store, before = strike.rig.store, len(strike.rig.store.ended)

    def until_ended() -> None:
        strike.until(lambda: len(store.ended) > before, "Redis did not end on its full disk")

    _filled(strike, strike.rig.store_disk, 0, until_ended)


FAULTS: dict[str, Fault] = {
    "aggregator killed": Fault(aggregator_killed, STANDBY_S_MAX),
    "both aggregators killed": Fault(aggregators_killed, RESTART_S_MAX),
    "aggregator paused": Fault(aggregator_paused),
    "standby killed": Fault(standby_killed),
    "workers killed": Fault(workers_killed),
    "broker killed": Fault(broker_killed),
    "store killed": Fault(store_killed),
    "store's file torn": Fault(store_torn),
    "connections cut": Fault(connections_cut),
    "connections slow": Fault(connections_slow),
    "connections stalled": Fault(connections_stalled),
    "connections half-open": Fault(connections_half_open),
    "broker's memory alarm": Fault(broker_memory_alarm),
    "broker's disk alarm": Fault(broker_disk_alarm, disk="broker"),
    "broker's disk full": Fault(broker_disk_full, disk="broker", defect=QUEUE_DIES),
    "store's disk full": Fault(store_disk_full, disk="store"),
}


PROCESSES = ("aggregator killed", "both aggregators killed", "aggregator paused", "standby killed", "workers killed")
PAIRS = 5  # in every round but the first: a process and a server or a connection at once


def schedule(names: Iterable[str], faults: int, rng: np.random.Generator) -> list[tuple[str, ...]]:
    """Draw which faults come: each kind once in every round, in an order that is drawn anew; later also two at once.

    Args:
        names: of the faults that are available.
        faults: how many to draw.
        rng: decides.
    """
    kinds = list(names)
    others = [name for name in kinds if name not in PROCESSES]
    drawn: list[tuple[str, ...]] = []
    while len(drawn) < faults:
        turns: list[tuple[str, ...]] = [(name,) for name in kinds]
        if drawn:
            turns += [(_one(PROCESSES, rng), _one(others, rng)) for _ in range(PAIRS)]
        drawn += [turns[i] for i in rng.permutation(len(turns))]
    return drawn[:faults]


def _one(names: Sequence[str], rng: np.random.Generator) -> str:
    return names[int(rng.integers(len(names)))]


def _killed(strike: Strike, kill: Callable[[], None], server: Kept) -> None:
    kill()
    strike.hold(0, 2)
    started = time.monotonic()
    with contextlib.suppress(Unavailable):  # then it is started again, and again
        server.start()
    strike.until(server.answers, f"{server.unit.name} did not come back")
    strike.note += f"{', ' if strike.note else ''}answers after {time.monotonic() - started:.1f} s"
    strike.ended()


def _further_of(rig: Rig, names: Sequence[str]) -> Callable[[], bool]:
    """Return how to see that each of these workers has made a further update, and that it has its outcome."""
    due = {name: rig.next_sequence(name) for name in names}
    return lambda: all(rig.settled_of(name) >= number for name, number in due.items())


def _some(strike: Strike) -> list[tuple[str, Proxy]]:
    """Choose connections: whose, and to which servers; return also whose each is."""
    who = (("aggregator-0", "aggregator-1"), ("workers",), ("aggregator-0", "aggregator-1", "workers"))
    servers = (("broker",), ("store",), ("broker", "store"))
    chosen = who[int(strike.rng.integers(len(who)))], servers[int(strike.rng.integers(len(servers)))]
    strike.note = f"{', '.join(chosen[0])} - {', '.join(chosen[1])}"
    return [(name, strike.rig.proxies[name, server]) for name in chosen[0] for server in chosen[1]]


def _on_connections(strike: Strike, toxic: Callable[[Proxy], None], least_s: float, most_s: float) -> None:
    """Do something to some connections for a while."""
    proxies = _some(strike)
    for _, proxy in proxies:
        toxic(proxy)
    strike.hold(least_s, most_s)
    for _, proxy in proxies:
        proxy.heal()
    rig = strike.rig
    workers = any(name == "workers" for name, _ in proxies)
    strike.ended(_further_of(rig, [worker.unit.name for worker in rig.workers]) if workers else None)


def _filled(strike: Strike, disk: SmallDisk, left_bytes: int, until_felt: Callable[[], None]) -> None:
    disk.fill(left_bytes)
    try:
        until_felt()
        strike.hold(0, 4)
    finally:
        disk.empty()
    strike.ended()


def _until_blocked(strike: Strike) -> None:
    strike.until(lambda: strike.rig.sink.link.blocked, "RabbitMQ did not block publishers")


def _command(*words: str) -> bytes:
    """Return a command as Redis appends it to its file."""
    parts = [f"${len(word)}\r\n{word}\r\n" for word in words]
    return f"*{len(words)}\r\n{''.join(parts)}".encode()
