"""What a login that can only read sees of a whole installation: every job in Redis, for `fedmq exporter`.

Beside the keys of jobs (`shared/store/redis.py`), those of the installation:

    fedmq:installation:devices  hash    <job>.<client> -> JSON: an enrolled device; `state` is `revoked` once it is
    fedmq:installation:audit    stream  what the operator did, one entry an event: kind, ...
    fedmq:installation:refused  stream  failed logins and refusals, of the same form: strangers fill this one alone
    fedmq:installation:acl_log  string  JSON: what of Redis' own log of refusals stands in there already
"""

import json
import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import msgpack

from shared.errors import StoreUnavailable
from shared.store.redis import RedisStore
from shared.store.redis_link import connect, translated

log = logging.getLogger("fedmq.watch")

DEVICES = "fedmq:installation:devices"
AUDIT = "fedmq:installation:audit"
REFUSALS = "fedmq:installation:refused"
ACL_LOG_SEEN = "fedmq:installation:acl_log"
ANSWER_S_MAX = 5.0
PAGE = 1000  # fields of a hash in one answer: Redis serves others in between
LEDGER_ENTRIES = 200  # the newest, that say who contributes
# What data that make no sense raise where they are read: they cost their own job its metrics, and no other one.
ODD = (ValueError, TypeError, KeyError, AttributeError, IndexError, OverflowError, msgpack.UnpackException)
WRONG_TYPE = "WRONGTYPE"  # Redis: the key holds no hash or stream


@dataclass(frozen=True, slots=True)
class JobFacts:
    """Where a job stands, in a few small reads.

    Attributes:
        head: fields of its head as stored; version, revision and created_at are numbers.
        totals: outcome -> number of updates, over the job's whole life.
        buffered: updates in the open buffer.
        evaluated: version last evaluated, -1 when none was.
        evaluation: its numbers; what else it holds is left out.
        contributions: client -> its applied updates in the newest ledger entries.
    """

    head: dict[str, str]
    totals: dict[str, int]
    buffered: int
    evaluated: int
    evaluation: dict[str, float]
    contributions: dict[str, int] = field(default_factory=dict)


class RedisWatch:
    """Reads all jobs of one Redis; writes nothing.

    Args:
        url: `redis://` or `rediss://` URL.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self._redis = connect(url, ANSWER_S_MAX)
        self._store = RedisStore(url, "installation")
        self._audit_ids: dict[str, str] = {}  # stream -> its newest entry that was counted
        self._odd: set[str] = set()

    def durable(self) -> bool:
        """Tell whether Redis keeps every write that a commit waits for, whatever happens."""
        kept = self._store.durability()
        with translated(self.url):
            version = str(self._redis.info("server")["redis_version"])
        return kept == "always" or (kept != "off" and tuple(int(n) for n in version.split(".")[:2]) >= (7, 2))

    def jobs(self) -> list[str]:
        """Return the ids of all jobs, sorted; it walks over every key's name, so ask rarely."""
        with translated(self.url):
            heads = list(self._redis.scan_iter("fedmq:{*}:head", count=PAGE))
        return sorted(head.decode(errors="replace").split("{", 1)[1].split("}", 1)[0] for head in heads)

    def facts(self, job: str) -> JobFacts | None:
        """Return where a job stands, in one round trip; None when it is gone or makes no sense (logged once)."""
        try:
            with translated(self.url), self._redis.pipeline(transaction=False) as pipe:
                pipe.hgetall(_key(job, "head"))
                pipe.get(_key(job, "state"))
                pipe.xrevrange(_key(job, "evaluations"), count=1)
                pipe.xrevrange(_key(job, "ledger"), count=LEDGER_ENTRIES)
                head, state, evaluations, ledger = pipe.execute()
            if not head:
                return None
            return self._facts(job, head, state, evaluations[0][1] if evaluations else {}, ledger)
        except (*ODD, StoreUnavailable) as error:
            self._left_out(f"job {job}", error)
            return None

    def evaluations(self, job: str, count: int) -> list[tuple[int, dict[str, float]]]:
        """Return the newest evaluations, oldest first: version and metrics."""
        with translated(self.url):
            newest = self._redis.xrevrange(_key(job, "evaluations"), count=count)
        return [(int(entry[b"version"]), json.loads(entry[b"metrics"])) for _, entry in reversed(newest)]

    def clients(self, job: str) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield what is known of each client of a job, page by page; what makes no sense is left out (logged once)."""
        for client, record in self._fields(_key(job, "clients")):
            try:
                record["seen"] = float(record.get("seen", 0.0))
                if "base_version" in record:
                    record["base_version"] = int(record["base_version"])
            except ODD as error:
                self._left_out(f"clients of job {job}: {client}", error, f"clients of job {job}")
                continue
            yield client, record

    def devices(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield `<job>.<client>` and the record of each device, those not enrolled yet or any more too."""
        for login, record in self._fields(DEVICES):
            try:
                times = ("enrolled_at", "certificate_ends_at")
                record |= {name: float(record[name]) for name in times if record.get(name) is not None}
            except ODD as error:
                self._left_out(f"device {login}", error)
                continue
            yield login, record

    def audit_counts(self) -> dict[str, int]:
        """Return kind -> number of the audit log's events since the last call; the first call returns none."""
        counts: dict[str, int] = {}
        with translated(self.url):
            for stream in (AUDIT, REFUSALS):
                if stream not in self._audit_ids:
                    newest = self._redis.xrevrange(stream, count=1)
                    self._audit_ids[stream] = newest[0][0].decode() if newest else "0-0"
                    continue
                while page := self._redis.xrange(stream, f"({self._audit_ids[stream]}", count=PAGE):
                    for _, entry in page:
                        kind = entry.get(b"kind", b"other").decode()
                        counts[kind] = counts.get(kind, 0) + int(entry.get(b"count", 1))
                    self._audit_ids[stream] = page[-1][0].decode()
        return counts

    def close(self) -> None:
        """Close the connections."""
        self._redis.close()
        self._store.close()

    def _facts(
        self, job: str, head: dict[bytes, bytes], state: bytes | None, evaluated: dict[bytes, bytes],
        ledger: list[tuple[bytes, dict[bytes, bytes]]],
    ) -> JobFacts:  # fmt: skip
        small = msgpack.unpackb(state) if state else {}
        facts = JobFacts(
            head={name.decode(): value.decode() for name, value in head.items()},
            totals={name: int(count) for name, count in small.get("totals", {}).items()},
            buffered=len(small.get("buffer", ())),
            evaluated=int(evaluated.get(b"version", -1)),
            evaluation=self._numbers(job, json.loads(evaluated.get(b"metrics", b"{}"))),
            contributions=_contributions(ledger),
        )
        int(facts.head["version"]), int(facts.head["revision"])
        if not math.isfinite(float(facts.head["created_at"])):
            raise ValueError(f"its created_at is {facts.head['created_at']}")
        return facts

    def _numbers(self, job: str, metrics: Any) -> dict[str, float]:
        """Return the numbers of an evaluation; a task may return what it likes."""
        given: dict[str, Any] = metrics if isinstance(metrics, dict) else {"metrics": None}
        odd = {name for name, value in given.items() if not isinstance(value, int | float)}
        if odd:
            self._left_out(f"evaluation of job {job}", TypeError(f"{', '.join(sorted(odd)[:3])}: no number"))
        return {name: float(value) for name, value in given.items() if name not in odd}

    def _left_out(self, what: str, error: Exception, once: str = "") -> None:
        """Log what makes no sense, once in this program's life; that the store does not answer is another matter."""
        if isinstance(error, StoreUnavailable) and WRONG_TYPE not in str(error):
            raise error
        if (once or what) not in self._odd:
            self._odd.add(once or what)
            log.warning("%s makes no sense and is left out: %s: %s", what, type(error).__name__, error)

    def _fields(self, key: str) -> Iterator[tuple[str, dict[str, Any]]]:
        cursor = 0
        while True:
            try:
                with translated(self.url):
                    cursor, page = self._redis.hscan(key, cursor, count=PAGE)
            except StoreUnavailable as error:
                self._left_out(key, error)
                return
            for name, text in page.items():
                try:
                    record = dict(json.loads(text).items())
                except ODD as error:
                    self._left_out(f"{key}: {name.decode(errors='replace')}", error, key)
                    continue
                yield name.decode(errors="replace"), record
            if cursor == 0:
                return


def is_enrolled(record: dict[str, Any]) -> bool:
    """Tell whether a device is enrolled: neither revoked, nor its enrolment begun and not finished."""
    return bool(record.get("state", "enrolled") == "enrolled")


def _contributions(ledger: list[tuple[bytes, dict[bytes, bytes]]]) -> dict[str, int]:
    """Count the applied updates of each client."""
    counts: dict[str, int] = {}
    for _, entry in ledger:
        for update in json.loads(entry[b"updates"]):
            if update["outcome"] == "applied":
                client = update["id"].split("/")[0]
                counts[client] = counts.get(client, 0) + 1
    return counts


def _key(job: str, name: str) -> str:
    return f"fedmq:{{{job}}}:{name}"
