"""`fedmq bench fuzz-messages`: hostile messages into admission: refused with a reason, or finite; nothing else.

What is admitted is folded. Whatever is found is printed with the command that repeats it.
"""

import math
import random
import statistics
import time
import tracemalloc
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context

import numpy as np

from aggregator.admission import Admission, admit, delta_of
from ops.bench.fuzz import LAYOUT
from ops.bench.hostile_messages import (
    CLIENT,
    COMMITTED_VERSION,
    JOB,
    KINDS,
    MESSAGE_BYTES_MAX,
    Hostile,
    hostile,
    sound,
)
from ops.bench.process import resident_bytes
from shared.compression import Decoded
from shared.compression.registry import EXAMPLES
from shared.errors import DETAIL_CHARS_MAX, Reason, RejectedUpdate
from shared.messages import Update
from shared.transport.ports import Delivery
from shared.vector import Vector

UPDATE_BYTES_MAX = 2**28
SLOW_S = 0.1  # of processor time: an outlier
AGAIN_S = 0.005  # what takes longer is measured again, the least of three: it may have been the collector's turn
GROWTH = 1.05  # of resident memory from the first to the last quarter ...
GROWTH_BYTES = 4e6  # ... beside what the allocator of a small process moves by
MEMORY_BYTES_MAX = 8_000_000  # what one message may take: its own bytes, a few slabs; one in 500 is measured
MEASURED = 0.002
BUFFER = 20  # admitted updates that are added up before the sum is looked at
SLOWEST = 5  # are printed
QUARTERS, LOOKS = 4, 25  # memory is looked at so often in a quarter


@dataclass(slots=True)
class Tally:
    """What became of the messages of one process.

    Attributes:
        inputs: how many there were.
        admitted: admitted and folded.
        codecs: codec -> how many of it were admitted.
        reasons: reason -> how many were rejected for it.
        kinds: kind of damage -> [how many, of them admitted].
        slowest: (seconds of processor time, number, kind) of the slowest, slowest first.
        pause_s: the longest any took the first time, seconds: Python's collector may have had its turn.
        resident: bytes resident, median of each quarter.
        seconds: on the clock.
    """

    inputs: int = 0
    admitted: int = 0
    codecs: Counter[str] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)
    kinds: dict[str, list[int]] = field(default_factory=dict)
    slowest: list[tuple[float, int, str]] = field(default_factory=list)
    pause_s: float = 0.0
    resident: list[float] = field(default_factory=list)
    seconds: float = 0.0


def admission() -> Admission:
    """Return what the messages are checked against."""
    return Admission(JOB, LAYOUT, MESSAGE_BYTES_MAX, UPDATE_BYTES_MAX)


def fuzz(seed: int, first: int, inputs: int) -> Tally:
    """Feed messages to admission, and fold what is admitted.

    Args:
        seed: of everything.
        first: number of the first message.
        inputs: how many; 100,000 take about 20 s.

    Raises:
        AssertionError: a message raised something else than `RejectedUpdate`, folded to something that is not finite,
            or took more memory than it may; it says how to repeat it.
    """
    against, tally = admission(), Tally()
    total, running = (np.zeros(LAYOUT.num_params, np.float32) for _ in range(2))
    for name in EXAMPLES:  # tables and caches are no outliers
        known = Hostile(Delivery(sound(name), CLIENT, None, "", (0, 0)), "sound")
        _outcome(known, against, total, running)
    looks: list[float] = []
    started = time.perf_counter()
    for number in range(first, first + inputs):
        message = hostile(seed, number)
        measured = random.Random(number).random() < MEASURED  # noqa: S311
        if measured:
            tracemalloc.start()
        start = time.process_time()
        try:
            outcome = _outcome(message, against, total, running)
        except Exception as error:
            raise AssertionError(_repeat(seed, number, message, repr(error))) from error
        finally:
            elapsed_s = time.process_time() - start
            peak = tracemalloc.get_traced_memory()[1] if measured else 0
            if measured:
                tracemalloc.stop()
        if not outcome:
            tally.admitted += 1
            tally.codecs[EXAMPLES[number % len(EXAMPLES)]] += 1
            if tally.admitted % BUFFER == 0:
                running.fill(0)
        if measured or elapsed_s > AGAIN_S:  # the collector's turn, or the message's own?
            tally.pause_s = max(tally.pause_s, 0.0 if measured else elapsed_s)
            elapsed_s = min(_seconds(message, against, total) for _ in range(3))
        _note(tally, message.kind, outcome, elapsed_s, number)
        if peak > MEMORY_BYTES_MAX + 4 * len(message.delivery.body):
            raise AssertionError(_repeat(seed, number, message, f"{peak} bytes"))
        if tally.inputs * QUARTERS * LOOKS // inputs > len(looks):
            looks.append(resident_bytes("self"))
    tally.resident = [statistics.median(looks[at : at + LOOKS]) for at in range(0, len(looks) - LOOKS + 1, LOOKS)]
    tally.seconds = time.perf_counter() - started
    return tally


def _outcome(message: Hostile, against: Admission, total: Vector, running: Vector) -> str:
    """Admit and fold; return the reason of a refusal, nothing for what is admitted."""
    try:
        update = admit(message.delivery, against, COMMITTED_VERSION)
        if update.part is None:
            _fold(update, delta_of(update, against), total, running)
    except RejectedUpdate as error:
        return _checked(error, message)
    return ""


def _seconds(message: Hostile, against: Admission, total: Vector) -> float:
    """Return the processor time a message takes."""
    start = time.process_time()
    _outcome(message, against, total, np.zeros_like(total))
    return time.process_time() - start


def _fold(update: Update, delta: Decoded, total: Vector, running: Vector) -> None:
    """Add a delta as the rules do, also weighed by its samples; the result must be finite."""
    total.fill(0)
    delta.add_into(total, 0.5)
    delta.add_into(running, float(update.num_samples))
    if not (np.isfinite(total).all() and np.isfinite(running).all() and math.isfinite(delta.squared_norm())):
        raise ArithmeticError("what was admitted does not fold to something finite")
    numbers = (update.train_seconds, update.created_at, *update.metrics.values())
    if not all(type(number) is float and math.isfinite(number) for number in numbers):
        raise ArithmeticError(f"{numbers} are no finite numbers")


def _checked(error: RejectedUpdate, message: Hostile) -> str:
    """Return the reason, if it is one and says something that can be stored and sent."""
    if not isinstance(error.reason, Reason) or not 0 < len(error.detail) <= DETAIL_CHARS_MAX:
        raise AssertionError(f"{message.kind}: reason {error.reason!r}, detail of {len(error.detail)} characters")
    error.detail.encode()  # an AMQP header, JSON: no lone surrogates
    return str(error.reason)


def _note(tally: Tally, kind: str, outcome: str, elapsed_s: float, number: int) -> None:
    tally.inputs += 1
    counts = tally.kinds.setdefault(kind, [0, 0])
    counts[0] += 1
    if outcome:
        tally.reasons[outcome] += 1
    else:
        counts[1] += 1
    if len(tally.slowest) < SLOWEST or elapsed_s > tally.slowest[-1][0]:
        tally.slowest = sorted([*tally.slowest, (elapsed_s, number, kind)], reverse=True)[:SLOWEST]


def _repeat(seed: int, number: int, message: Hostile, what: str) -> str:
    body = message.delivery.body
    return (
        f"{message.kind}, {EXAMPLES[number % len(EXAMPLES)]!r}: {what}; {repeat_command(seed, number)}; "
        f"{len(body)} bytes: {body[:2000].hex()}"
    )


def repeat_command(seed: int, number: int) -> str:
    """Return the command that feeds one message again."""
    return f"fedmq bench fuzz-messages --seed {seed} --first {number} --inputs 1"


# --- the command -----------------------------------------------------------------------------------------------------


def run(inputs: int, seed: int, first: int, processes: int) -> None:
    """Fuzz admission and print what became of the messages beside the limits.

    Args:
        inputs: of all processes together.
        seed: of everything random.
        first: number of the first message.
        processes: how many at once; the messages are the same.

    Raises:
        AssertionError: a limit is not kept; it says how to repeat what was found.
    """
    share = -(-inputs // processes)
    shares = [(seed, first + done, min(share, inputs - done)) for done in range(0, inputs, share)]
    started = time.perf_counter()
    if len(shares) == 1:
        tallies = [fuzz(*shares[0])]
    else:
        with ProcessPoolExecutor(len(shares), get_context("spawn")) as pool:
            tallies = list(pool.map(fuzz, *zip(*shares, strict=True)))
    elapsed_s = time.perf_counter() - started
    print("\n".join(_report(tallies, seed, elapsed_s)))
    worst = max((tally.slowest[0] for tally in tallies if tally.slowest), default=(0.0, 0, ""))
    if worst[0] > SLOW_S:
        raise AssertionError(f"{worst[0]:.3f} s of processor time: {repeat_command(seed, worst[1])}")
    for tally in tallies:
        if not steady(tally.resident):
            raise AssertionError(f"resident bytes grow, by quarter: {tally.resident}")


def steady(resident: Sequence[float]) -> bool:
    """Tell whether memory stayed as it was: the last quarter beside the first."""
    return len(resident) < QUARTERS or resident[-1] <= GROWTH * resident[0] + GROWTH_BYTES


def _report(tallies: Sequence[Tally], seed: int, elapsed_s: float) -> Iterator[str]:
    inputs, admitted = sum(t.inputs for t in tallies), sum(t.admitted for t in tallies)
    reasons = sum((t.reasons for t in tallies), Counter[str]())
    yield f"{inputs:,} messages of {len(EXAMPLES)} codecs, {inputs / elapsed_s:,.0f}/s in {len(tallies)} processes; "
    yield f"{admitted:,} admitted, {reasons.total():,} rejected:"
    yield "\n| reason | messages |\n|---|---:|"
    yield from (f"| {reason} | {count:,} |" for reason, count in reasons.most_common())
    yield "\n| damage | messages | of them admitted |\n|---|---:|---:|"
    for kind in KINDS:
        counts = [sum(t.kinds.get(kind, [0, 0])[column] for t in tallies) for column in (0, 1)]
        yield f"| {kind} | {counts[0]:,} | {counts[1]:,} |"
    yield f"\n| slowest, at most {1e3 * SLOW_S:.0f} ms of processor time | damage | codec | again with |"
    yield "|---:|---|---|---|"
    for seconds, number, kind in sorted((s for t in tallies for s in t.slowest), reverse=True)[:SLOWEST]:
        codec = EXAMPLES[number % len(EXAMPLES)].replace("|", "\\|")
        yield f"| {1e3 * seconds:.1f} | {kind} | `{codec}` | `{repeat_command(seed, number)}` |"
    yield f"\nLongest the first time, the collector's turns included: {1e3 * max(t.pause_s for t in tallies):.1f} ms."
    more = f"{GROWTH - 1:.0%} + {GROWTH_BYTES / 1e6:.0f} MB"
    yield f"\nResident MB, median of each quarter, the last at most {more} above the first:"
    yield from (", ".join(f"{resident / 1e6:.1f}" for resident in t.resident) for t in tallies)
