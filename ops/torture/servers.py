"""`fedmq torture --servers`: random faults on real servers and processes under load, an exact account after each."""

import contextlib
import fcntl
import json
import logging
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from ops.torture.server_account import Account, Checker, Claims, Violation, read_trainings
from ops.torture.server_faults import FAULTS, Strike, schedule
from ops.torture.server_rig import BUFFER_SIZE, EXPONENT, JOB, Rig
from ops.torture.server_task import SHAPE
from shared.errors import FedMQError, SettingsError, StoreUnavailable, VersionGone
from shared.transport.rabbitmq import queue_depths

DEFAULT_OUT = Path("runs/torture")
LOAD_S = (0.2, 1.5)  # between two faults
WARM_UP_APPLIED = 20
SETTLE_S_MAX = 120.0  # publishers back off for up to 15 s, and have up to 100 updates each to get rid of
STOP_TRIES = 3
WORDS = {
    "attempted": "set out to be published",
    "confirmed": "the broker said that it has them",
    "applied": "changed the model, once",
    "refused": "too stale",
    "rejected": "dead letters, with a reason",
    "lost": "no outcome, or applied and not in the model",
    "duplicated": "changed the model more than once",
    "unexpected": "have an outcome or a place in the model that nobody made",
    "recovered": "unconfirmed while a fault went on, and they have their one outcome",
    "repeated": "deliveries that came once more and were dropped",
}
EVENTS_S = 0.2  # until the kernel's events have been read
TOGETHER = "two at once"
NEEDS_A_PERSON = 2  # the exit code of a program that wants other settings
CONNECT_S = 10.0


@dataclass(frozen=True, slots=True)
class Line:
    """One fault and what came of it.

    Attributes:
        number: from 1.
        name: of the fault, or `two at once`.
        note: what was done in particular.
        took_s: the fault itself.
        work_s: from its end until work went on.
        settled_s: from its end until everything made by then had its outcome, and was checked.
        account: after it.
    """

    number: int
    name: str
    note: str
    took_s: float
    work_s: float
    settled_s: float
    account: Account


class Torture:
    """A run: it strikes, waits and has the account checked.

    Args:
        rig: what runs.
        seed: of what comes when.
        console: where its lines go.
        with_defects: strike also where a server is known to fail.

    Attributes:
        lines: one a fault.
        account: the newest.
        unavailable: faults that cannot be done here, and why; they are named, never dropped in silence.
        left_out: faults that a server is known not to stand, and why; the same goes for them.
    """

    def __init__(self, rig: Rig, seed: int, console: Console, with_defects: bool = False) -> None:
        self.lines: list[Line] = []
        self.account: Account | None = None
        self._rig, self._rng, self._console = rig, np.random.default_rng(seed), console
        self._checker = Checker(BUFFER_SIZE, float(BUFFER_SIZE), EXPONENT, SHAPE[0] * SHAPE[1])
        self._under_way: set[str] = set()
        disks = {"broker": rig.broker_disk, "store": rig.store_disk}
        problems = {name: f"cannot mount a tmpfs: {disk.problem}" for name, disk in disks.items() if not disk.available}
        self.unavailable = {name: problems[f.disk] for name, f in FAULTS.items() if f.disk in problems}
        self.left_out = {name: f.defect for name, f in FAULTS.items() if f.defect and not with_defects}

    def run(self, faults: int) -> Account:
        """Strike so often; then let everything come to rest and return the last account.

        Raises:
            Violation: something was lost, counted twice, or did not go on by itself.
        """
        for name, why in self.unavailable.items():
            self._console.print(f"[red]not available[/] {name}: {why}", soft_wrap=True)
        self._warm_up()
        for name, why in self.left_out.items():
            self._console.print(f"[yellow]left out[/] {name}: {why}", soft_wrap=True, highlight=False)
        names = [name for name in FAULTS if name not in self.unavailable | self.left_out]
        for number, together in enumerate(schedule(names, faults, self._rng), 1):
            time.sleep(float(self._rng.uniform(*LOAD_S)))
            try:
                self._strike(number, together)
            except FedMQError as error:
                raise Violation(f"fault {number}, {' and '.join(together)}: {error}") from error
        return self._come_to_rest()

    def ended(self) -> dict[str, list[int]]:
        """Return the exit codes of the programs that ended by themselves."""
        return {name: kept.ended for name, kept in self._rig.programs.items() if kept.ended}

    def _warm_up(self) -> None:
        deadline = time.monotonic() + SETTLE_S_MAX
        while (self._rig.applied() or 0) < WARM_UP_APPLIED:
            if time.monotonic() > deadline:
                raise FedMQError(f"{self._rig.applied()} updates applied within {SETTLE_S_MAX:g} s, before any fault")
            time.sleep(0.1)

    def _strike(self, number: int, names: tuple[str, ...]) -> None:
        strikes = [Strike(self._rig, np.random.default_rng(self._rng.integers(2**63))) for _ in names]
        started = time.monotonic()
        self._note_under_way()
        with ThreadPoolExecutor(len(names)) as pool:
            for done in [pool.submit(FAULTS[n].strike, strike) for n, strike in zip(names, strikes, strict=True)]:
                done.result()
        took_s = time.monotonic() - started
        self._note_under_way()
        for strike in strikes:
            strike.wait_for_work()
        account = self._check()
        settled_s = time.monotonic() - max(strike.ended_at for strike in strikes)
        notes = [f"{name}: {strike.note}" for name, strike in zip(names, strikes, strict=True)]
        together = len(names) > 1
        line = Line(
            number, TOGETHER if together else names[0], "; ".join(notes) if together else strikes[0].note, took_s,
            max(strike.work_s for strike in strikes), settled_s, account,
        )  # fmt: skip
        self.lines.append(line)
        self._console.print(_shown(line), highlight=False, soft_wrap=True)

    def _note_under_way(self) -> None:
        claims = self._claims()
        self._under_way |= claims.made - claims.confirmed

    def _check(self) -> Account:
        """Wait until all that is made by now has its outcome, and judge it, while the load goes on."""
        claims = self._claims()
        weights, version = self._settled(claims)
        time.sleep(EVENTS_S)
        now = self._claims()  # what was made meanwhile is not unexpected
        later = now.made - claims.made
        claims.places = now.places
        claims.spoiled = now.spoiled
        claims.made |= {update_id for update_id in later if update_id in self._checker.first}
        claims.confirmed |= now.confirmed & claims.made
        self.account = self._checker.judge(claims, version, weights)
        self._checker.confirm(self.account)
        self._check_exits()
        return self.account

    def _claims(self) -> Claims:
        rig = self._rig
        places = read_trainings(rig.records) | dict(list(rig.visitor.placed.values()))
        seen = rig.watch.seen()
        return Claims(
            set(seen.made) | rig.visitor.made.copy(), set(seen.confirmed) | rig.visitor.confirmed.copy(),
            rig.visitor.spoiled.copy(), self._under_way, places,
        )  # fmt: skip

    def _settled(self, claims: Claims) -> tuple[Any, int]:
        """Follow the ledger until everything made has its outcome; return a model and its version.

        What has none after a long time is left to the checker to name.
        """
        deadline = time.monotonic() + SETTLE_S_MAX
        while True:
            late = time.monotonic() > deadline
            try:
                head = self._rig.reader.head()
                if head is None:
                    raise Violation("the job vanished from the store")
                if head.revision < self._checker.revision:
                    raise Violation(f"the store went back from revision {self._checker.revision} to {head.revision}")
                weights = self._rig.reader.model(head.version).weights
                self._checker.follow(self._rig.reader.ledger(self._checker.revision))
                if late or not self._checker.unsettled(claims.made):
                    return weights, head.version
            except (StoreUnavailable, VersionGone):  # a newer version took its place while we read
                if late:
                    raise
            time.sleep(0.05)

    def _check_exits(self) -> None:
        for name, codes in self.ended().items():
            if NEEDS_A_PERSON in codes:
                raise Violation(f"{name} ended with exit code {NEEDS_A_PERSON}: it asks for a manual step; see its log")

    def _come_to_rest(self) -> Account:
        """Stop the load, let everything be settled, close the open buffer, and look at all of it once more."""
        rig = self._rig
        rig.visitor.stop()
        self._stop_workers()
        self._check()
        while (open_updates := (rig.applied() or 0) % BUFFER_SIZE) or not self._all_in_the_model():
            head = rig.reader.head()
            for _ in range(BUFFER_SIZE - open_updates if open_updates else 0):
                rig.visitor.publish_good(head.version if head else 0)
            self._check()
        account = self._check()
        self._stop_aggregators()
        self._read_all_again()
        self._count_dead_letters(account)
        return account

    def _all_in_the_model(self) -> bool:
        head = self._rig.reader.head()
        return head is not None and head.version * BUFFER_SIZE == self._rig.applied()

    def _stop_workers(self) -> None:
        """Have every worker get its last updates out and end; start those again that could not."""
        for _ in range(STOP_TRIES):
            for worker in self._rig.workers:
                worker.start()
            time.sleep(3)  # a signal that comes while Python starts ends it at once
            codes = {worker.unit.name: worker.end() for worker in self._rig.workers}
            if not any(codes.values()) and not self._rig.watch.waiting():
                return
        raise Violation(f"workers ended with {codes}; {self._rig.watch.waiting()} updates wait in their outboxes")

    def _stop_aggregators(self) -> None:
        codes = {aggregator.unit.name: aggregator.end() for aggregator in self._rig.aggregators}
        if any(codes.values()):
            raise Violation(f"aggregators ended with {codes} after SIGTERM")

    def _read_all_again(self) -> None:
        """Read the whole ledger once more: a store that forgot and began anew would show here."""
        again = Checker(BUFFER_SIZE, float(BUFFER_SIZE), EXPONENT, 1)
        again.follow(self._rig.reader.ledger())
        if (again.revision, again.first) != (self._checker.revision, self._checker.first):
            raise Violation("the ledger read at the end is not the one that was read during the run")

    def _count_dead_letters(self, account: Account) -> None:
        dead = queue_depths(self._rig.rabbitmq.url, JOB, CONNECT_S)["dead"]
        if dead < account.rejected:
            raise Violation(f"{account.rejected} rejected, and only {dead} dead letters")


def command(faults: int, workers: int, seed: int, out: Path | None) -> None:
    """Torture real servers and print the account.

    Args:
        faults: how many; each kind comes once a round.
        workers: processes that train.
        seed: of what comes when.
        out: folder of the account and the logs; what a former run left there is removed.

    Raises:
        Violation: something was lost, counted twice, or did not go on by itself; the logs stay.
    """
    run(faults, workers, seed, out or DEFAULT_OUT, Console())


def run(
    faults: int, workers: int, seed: int, out: Path, console: Console, with_defects: bool = False
) -> Torture:  # fmt: skip
    """Do what `command` says; return the run. `with_defects`: strike also where a server is known to fail."""
    with _alone(out):
        _clear(out)
        _log_to(out / "logs" / "torture.log")
        console.print(f"{faults} faults on real servers, {workers} workers, seed {seed}; logs in {out / 'logs'}")
        torture = _tortured(faults, workers, seed, out, console, with_defects)
    account = torture.account
    assert account is not None, "a run that ends has one"  # noqa: S101
    console.print(_table(torture.lines), _account_table(account), sep="\n")
    ended = sum(map(len, torture.ended().values()))
    console.print(
        f"{len(torture.lines)} faults, {len(torture.unavailable)} kinds not available, "
        f"{len(torture.left_out)} left out, {ended} ends of programs by "
        f"themselves, model equal at version {account.version}: nothing lost, nothing counted twice", highlight=False,
    )  # fmt: skip
    return torture


def _tortured(faults: int, workers: int, seed: int, out: Path, console: Console, with_defects: bool) -> Torture:
    with Rig(out, workers, seed) as rig:
        torture = Torture(rig, seed, console, with_defects)
        try:
            torture.run(faults)
        except KeyboardInterrupt:
            _write(out, torture, seed, "interrupted")
            raise
        except FedMQError as error:
            _write(out, torture, seed, str(error))
            raise Violation(f"{error}; logs in {out / 'logs'}") from error
        _write(out, torture, seed, "")
    return torture


@contextlib.contextmanager
def _alone(out: Path) -> Iterator[None]:
    """Hold a folder: a second run there would mount its disks over ours.

    Raises:
        SettingsError: another run holds it.
    """
    out.mkdir(parents=True, exist_ok=True)
    with (out / "lock").open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise SettingsError(f"another torture runs in {out}: give this one another --out") from error
        yield


def _clear(out: Path) -> None:
    for name in ("logs", "state"):
        shutil.rmtree(out / name, ignore_errors=True)
    for path in (*out.glob("*.trained"), out / "account.json"):
        path.unlink(missing_ok=True)


def _log_to(path: Path) -> None:
    """Have our own client's complaints in a file: the console has a line a fault."""
    path.parent.mkdir(exist_ok=True)
    handler = logging.FileHandler(path)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)-7s %(name)s: %(message)s"))
    log = logging.getLogger("fedmq")
    log.handlers, log.propagate = [handler], False


def _write(out: Path, torture: Torture, seed: int, problem: str) -> None:
    record = {
        "seed": seed,
        "problem": problem,
        "account": torture.account.record() if torture.account else None,
        "unavailable": torture.unavailable,
        "left_out": torture.left_out,
        "ended_by_themselves": torture.ended(),
        "faults": [
            {"number": line.number, "name": line.name, "note": line.note, "took_s": round(line.took_s, 2),
             "work_s": round(line.work_s, 2), "settled_s": round(line.settled_s, 2)} for line in torture.lines
        ],
    }  # fmt: skip
    (out / "account.json").write_text(json.dumps(record, indent=1))


def _shown(line: Line) -> str:
    limit = _limit(line.name)
    over = limit is not None and line.work_s > limit
    beside = f" [{'red' if over else 'green'}](limit {limit:g} s)[/]" if limit is not None else ""
    a = line.account
    return (
        f"{line.number:4} {line.name:24} {line.took_s:5.1f} s; at work after {line.work_s:5.1f} s{beside}, "
        f"all settled after {line.settled_s:5.1f} s: {a.attempted} = {a.applied} + {a.refused} + {a.rejected}, "
        f"model equal at version {a.version}{f' ({line.note})' if line.note else ''}"
    )


def _limit(name: str) -> float | None:
    return FAULTS[name].work_s_max if name in FAULTS else None


def _table(lines: list[Line]) -> Table:
    table = Table(title="seconds from the end of the fault", title_justify="left")
    for column in ("fault", "times", "at work, median", "longest", "limit", "all settled, longest"):
        table.add_column(column, justify="left" if column == "fault" else "right")
    for name in (*FAULTS, TOGETHER):
        times = [line.work_s for line in lines if line.name == name]
        settled = [line.settled_s for line in lines if line.name == name]
        if times:
            limit = "" if _limit(name) is None else f"{_limit(name):g}"
            table.add_row(
                name, str(len(times)), f"{np.median(times):.1f}", f"{max(times):.1f}", limit, f"{max(settled):.1f}"
            )
    return table


def _account_table(account: Account) -> Table:
    table = Table("updates", "number", "meaning", title="the account", title_justify="left")
    for word, meaning in WORDS.items():
        table.add_row(word, f"{account.record()[word]:,}", meaning)
    return table
