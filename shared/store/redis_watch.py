"""What a login that can only read sees of a whole installation: every job in Redis, for `fedmq exporter`.

Beside the keys of jobs (`shared/store/redis.py`), those of the installation:

    fedmq:installation:devices  hash    <job>.<client> -> JSON: an enrolled device; `state` is `revoked` once it is
    fedmq:installation:audit    stream  one entry an event: kind, ...
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import msgpack

from shared.store.redis import RedisStore
from shared.store.redis_link import connect, translated

DEVICES = "fedmq:installation:devices"
AUDIT = "fedmq:installation:audit"
ANSWER_S_MAX = 5.0
PAGE = 1000  # fields of a hash in one answer: Redis serves others in between
LEDGER_ENTRIES = 200  # the newest, that say who contributes


@dataclass(frozen=True, slots=True)
class JobFacts:
    """Where a job stands, in a few small reads.

    Attributes:
        head: fields of its head as stored.
        totals: outcome -> number of updates, over the job's whole life.
        buffered: updates in the open buffer.
        evaluated: version last evaluated, -1 when none was.
        evaluation: its numbers.
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
        self._audit_id = ""

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
        return sorted(head.decode().split("{", 1)[1].split("}", 1)[0] for head in heads)

    def facts(self, job: str) -> JobFacts | None:
        """Return where a job stands, in one round trip; None when it is gone."""
        with translated(self.url), self._redis.pipeline(transaction=False) as pipe:
            pipe.hgetall(_key(job, "head"))
            pipe.get(_key(job, "state"))
            pipe.xrevrange(_key(job, "evaluations"), count=1)
            pipe.xrevrange(_key(job, "ledger"), count=LEDGER_ENTRIES)
            head, state, evaluations, ledger = pipe.execute()
        if not head:
            return None
        small = msgpack.unpackb(state) if state else {}
        newest = evaluations[0][1] if evaluations else {}
        return JobFacts(
            head={name.decode(): value.decode() for name, value in head.items()},
            totals=small.get("totals", {}),
            buffered=len(small.get("buffer", ())),
            evaluated=int(newest.get(b"version", -1)),
            evaluation=json.loads(newest.get(b"metrics", b"{}")),
            contributions=_contributions(ledger),
        )

    def evaluations(self, job: str, count: int) -> list[tuple[int, dict[str, float]]]:
        """Return the newest evaluations, oldest first: version and metrics."""
        with translated(self.url):
            newest = self._redis.xrevrange(_key(job, "evaluations"), count=count)
        return [(int(entry[b"version"]), json.loads(entry[b"metrics"])) for _, entry in reversed(newest)]

    def clients(self, job: str) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield what is known of each client of a job, page by page."""
        return self._fields(_key(job, "clients"))

    def devices(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield `<job>.<client>` and the record of each enrolled device, revoked ones too."""
        return self._fields(DEVICES)

    def audit_counts(self) -> dict[str, int]:
        """Return kind -> number of the audit log's events since the last call; the first call returns none."""
        counts: dict[str, int] = {}
        with translated(self.url):
            if not self._audit_id:
                newest = self._redis.xrevrange(AUDIT, count=1)
                self._audit_id = newest[0][0].decode() if newest else "0-0"
                return counts
            while page := self._redis.xrange(AUDIT, f"({self._audit_id}", count=PAGE):
                for _, entry in page:
                    kind = entry.get(b"kind", b"other").decode()
                    counts[kind] = counts.get(kind, 0) + int(entry.get(b"count", 1))
                self._audit_id = page[-1][0].decode()
        return counts

    def close(self) -> None:
        """Close the connections."""
        self._redis.close()
        self._store.close()

    def _fields(self, key: str) -> Iterator[tuple[str, dict[str, Any]]]:
        cursor = 0
        while True:
            with translated(self.url):
                cursor, page = self._redis.hscan(key, cursor, count=PAGE)
            for name, text in page.items():
                yield name.decode(), json.loads(text)
            if cursor == 0:
                return


def is_revoked(record: dict[str, Any]) -> bool:
    """Tell whether an enrolled device was thrown out."""
    return bool(record.get("state", "enrolled") != "enrolled")


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
