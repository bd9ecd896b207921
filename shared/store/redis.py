"""The store port on Redis 7.0 to 8.x.

Keys of a job, all in one hash slot (public contract, version 1, except those marked *):

    fedmq:{<job>}:head               hash    revision version layout sha256 num_params chunks created_at published
                                             token*
    fedmq:{<job>}:layout             string  JSON: the tensors in flat order; its sha256 is the layout hash
    fedmq:{<job>}:model:<v>:<chunk>  string  version v's safetensors file, cut at 64 MiB; never changes
    fedmq:{<job>}:meta:<v>           hash    sha256 chunks created_at updates staleness_mean evaluation:<metric> ...
    fedmq:{<job>}:versions           zset    versions whose weights are stored, scored by themselves
    fedmq:{<job>}:applied            zset    ids of applied updates, scored by their base_version
    fedmq:{<job>}:refused            zset    * "<stale or reason> <id>" of the newest refused updates, by revision
    fedmq:{<job>}:ledger             stream  one entry a commit, its id <revision>-0: revision, version, updates (JSON)
    fedmq:{<job>}:clients            hash    client id -> JSON: when last seen, its last update and the outcome
    fedmq:{<job>}:outcomes:<client>  stream  one entry a commit, its id <revision>-0: updates (JSON); 30 days
    fedmq:{<job>}:job                hash    what a worker needs to start, each value JSON
    fedmq:{<job>}:snapshots          hash    version -> JSON: dtype and bytes of the stored snapshots
    fedmq:{<job>}:snapshot:<v>:<c>   string  the weights workers train from at v, a safetensors file, cut at 64 MiB
    fedmq:{<job>}:deltas             zset    "<version> <parent> <bytes>" of the stored deltas, scored by version
    fedmq:{<job>}:delta:<v>:<chunk>  string  what leads from the parent's to v's (msgpack), cut at 64 MiB
    fedmq:{<job>}:tag:<name>         string  a version with a name, which is not dropped while it has one
    fedmq:{<job>}:tagged             zset    * names of tags, scored by the versions they name
    fedmq:{<job>}:tags               stream  * one entry a change of a tag: time, tag, version, previous
    fedmq:{<job>}:evaluations        stream  * one entry an evaluation: version, metrics (JSON)
    fedmq:{<job>}:state              string  * the small part of the aggregation state (msgpack)
    fedmq:{<job>}:state:<name>:<c>   string  * its model-size parts: float32, little-endian, cut at 64 MiB
    fedmq:{<job>}:kept               hash    * name -> "<revision> <pieces>" of the rule's records: a client's last
                                             delta, an update of the open buffer
    fedmq:{<job>}:kept:<name>:<r>:<c>  string  * a record as revision r wrote it, cut at 64 MiB; never changes
    fedmq:{<job>}:stage:<token>:<i>  any     * pieces of a commit, a backup or a restore on their way; they expire
"""

import contextlib
import json
import uuid
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import msgpack
import numpy as np
import redis

from shared import supported
from shared.errors import Reason, RejectedUpdate, SettingsError, StoreUnavailable, VersionConflict, VersionGone
from shared.layout import Layout
from shared.model_image import ModelImage, chunk_count, fill_file, piece_count
from shared.published import Delta, DeltaEntry, Index, SnapshotEntry, unpack
from shared.snapshot import read_snapshot
from shared.store.ports import CLIENTS_MAX, Commit, Head, Stored, StoredVersion, unheard
from shared.store.redis_commit import SCRIPT, SCRIPT_ARGS_MAX, KeptEntry, commands_of, flat, pieces_of, version_commands
from shared.store.redis_link import CONNECT_S_MAX, connect, translated
from shared.urls import hide_password
from shared.vector import Vector

ANSWER_S_MAX = 20.0  # of silence: a slow disk's fsync of 64 MiB; how long a half-open connection holds us up
STAGE_SECONDS = 3600  # pieces of a commit that never happened
STAGE_BYTES = 2**20  # staged in one round trip; a larger piece has one to itself
WAIT_MS = 10_000  # for a disk or replicas
EVALUATIONS_MAX = 10_000  # approximately
EVALUATION = "evaluation:"  # prefix of an evaluator's numbers in meta:<version>

_SET_IF_EXISTS = "if redis.call('EXISTS', KEYS[1]) == 1 then redis.call('HSET', KEYS[1], unpack(ARGV)) end"


class Pacing(Protocol):
    """What limits how fast weights are read."""

    @property
    def piece_bytes(self) -> int:
        """How much to ask for at once."""

    def take(self, size_bytes: int) -> bool:
        """Wait until so many bytes may be read; False when the waiting was ended."""


class RedisStore:
    """One job in Redis; reads for everybody, writes for the aggregator.

    Args:
        url: `redis://` or `rediss://` URL.
        job: the job's id.
        durable: refuse to commit to a Redis that may forget an acknowledged write.
        replicas: of Redis, that must have a commit before it counts.
        pace: limits how fast weights are read; None: as fast as it goes.
    """

    def __init__(self, url: str, job: str, durable: bool = True, replicas: int = 0, pace: Pacing | None = None) -> None:
        self.url = url
        self._prefix = f"fedmq:{{{job}}}:"
        self._durable, self._waitaof, self._replicas = durable, False, replicas
        self._layout: Layout | None = None
        self._pace = pace
        self._redis = connect(url, ANSWER_S_MAX)
        self._greeted = False

    def check(self) -> str:
        """Return the server's version after making sure that commits will be durable.

        Raises:
            StoreUnavailable: it cannot be reached.
            SettingsError: it refuses the login, or may forget acknowledged writes.
        """
        self._greet()
        with translated(self.url):
            server = self._redis.info("server")
            version = supported.check("Redis", str(server["redis_version"]))
            if self._durable:
                self._check_durability(version)
            return version

    def durability(self) -> str:
        """Say how an acknowledged write is kept: `always`, `everysec`, `no`, or `off` without an append-only file."""
        self._greet()
        with translated(self.url):
            try:
                settings = self._redis.config_get("append*")
            except redis.ResponseError:  # CONFIG is often forbidden to applications
                enabled = self._redis.info("persistence").get("aof_enabled")
                return "unknown" if enabled else "off"
            return str(settings["appendfsync"]) if settings.get("appendonly") == "yes" else "off"

    def clock(self) -> float:
        """Return the server's unix seconds."""
        with translated(self.url):
            seconds, microseconds = self._redis.time()
        return float(seconds) + float(microseconds) / 1e6

    def head(self) -> Head | None:
        """Return where the job stands: one HGETALL."""
        self._greet()
        with translated(self.url):
            return self._parse_head(self._redis.hgetall(self._key("head")))

    def layout(self) -> Layout:
        """Return the job's layout; read once."""
        if self._layout is None:
            with translated(self.url):
                text = self._redis.get(self._key("layout"))
            if text is None:
                raise VersionGone("the job has no model yet")
            self._layout = Layout.from_json(text)
        return self._layout

    def model(self, version: int) -> ModelImage:
        """Return the weights of a version."""
        layout = self.layout()
        with translated(self.url):
            expected = self._redis.hget(self._key(f"meta:{version}"), "sha256")
            try:
                image = ModelImage.from_chunks(layout, self._pieces(f"model:{version}", chunk_count(layout)))
            except ValueError as error:
                raise VersionGone(f"version {version} in the store is damaged: {error}") from error
        if expected is None or image.sha256 != expected.decode():
            raise VersionGone(f"version {version} in the store is damaged or gone: its sha256 is not {expected!r}")
        return image

    def job(self) -> dict[str, Any]:
        """Return what was announced."""
        with translated(self.url):
            fields = self._redis.hgetall(self._key("job"))
        return {name.decode(): json.loads(value) for name, value in fields.items()}

    def outcomes(self, client: str, after: int) -> tuple[list[tuple[str, str]], int]:
        """Return what became of a client's updates after a revision: one XRANGE."""
        with translated(self.url):
            entries = self._redis.xrange(self._key(f"outcomes:{client}"), f"({after}-0")
        pairs = [(update_id, outcome) for _, entry in entries for update_id, outcome in json.loads(entry[b"updates"])]
        return pairs, int(entries[-1][0].split(b"-")[0]) if entries else after

    def published(self, after: int) -> Index:
        """Return what is published, in one round trip."""
        with translated(self.url), self._redis.pipeline(transaction=False) as pipe:
            pipe.hgetall(self._key("snapshots"))
            pipe.zrangebyscore(self._key("deltas"), f"({after}", "+inf")
            taken, steps = pipe.execute()
        snapshots = []
        for version, text in taken.items():
            fields = json.loads(text)
            snapshots.append(SnapshotEntry(int(version), fields["dtype"], fields["bytes"]))
        deltas = [DeltaEntry(*(int(number) for number in step.split())) for step in steps]
        return Index(tuple(sorted(snapshots, key=lambda entry: entry.version)), tuple(deltas))

    def snapshot(self, entry: SnapshotEntry) -> ModelImage:
        """Return the weights of a snapshot."""
        layout = self.layout()
        pieces = self._pieces(f"snapshot:{entry.version}", piece_count(entry.size_bytes))
        with translated(self.url):
            try:
                return read_snapshot(layout, entry.dtype, pieces)
            except ValueError as error:
                raise RejectedUpdate(Reason.MALFORMED, f"snapshot {entry.version} is damaged: {error}") from error

    def deltas(self, entries: Sequence[DeltaEntry]) -> list[Delta]:
        """Return deltas: one MGET, where nothing limits the pace."""
        counts = [piece_count(entry.size_bytes) for entry in entries]
        if self._pace is not None:
            with translated(self.url):
                read = [b"".join(self._pieces(f"delta:{e.version}", n)) for e, n in zip(entries, counts, strict=True)]
            return [unpack(record, entry) for record, entry in zip(read, entries, strict=True)]
        names = [f"delta:{e.version}:{index}" for e, n in zip(entries, counts, strict=True) for index in range(n)]
        with translated(self.url):
            pieces = self._redis.mget([self._key(name) for name in names]) if names else []
        if None in pieces:
            raise VersionGone(f"{names[pieces.index(None)]} is not stored")
        found = iter(pieces)
        return [unpack(b"".join(next(found) for _ in range(n)), e) for e, n in zip(entries, counts, strict=True)]

    def record_evaluation(self, version: int, metrics: Mapping[str, float]) -> None:
        """Append to the `evaluations` stream, and to `meta:<version>` while that is known."""
        fields = {f"{EVALUATION}{name}": repr(float(value)) for name, value in metrics.items()}
        entry: dict[Any, Any] = {"version": version, "metrics": json.dumps(dict(metrics))}
        with translated(self.url):
            self._redis.xadd(self._key("evaluations"), entry, maxlen=EVALUATIONS_MAX, approximate=True)
            self._redis.eval(_SET_IF_EXISTS, 1, self._key(f"meta:{version}"), *flat(fields))

    def announce(self, job: Mapping[str, Any]) -> None:
        """Write the `job` hash."""
        with translated(self.url):
            self._redis.hset(self._key("job"), mapping={name: json.dumps(value) for name, value in job.items()})

    def create(self, model: ModelImage, now: float) -> bool:
        """Store version 0; two that try at once cannot both win."""
        token = f"create {uuid.uuid4().hex}"
        head = {
            "revision": 0, "version": 0, "layout": model.layout.hash, "num_params": model.layout.num_params,
            "token": token,
        }  # fmt: skip
        stage, commands = self._stage(token, {"model:0": model.chunks()})
        commands.append(["SET", self._key("layout"), model.layout.json])
        commands += version_commands(0, model, now, {}, head, self._key)
        return self._run("", token, stage, commands) == "done"

    def load(self) -> Stored | None:
        """Return the newest revision; read again if a commit came in between."""
        while True:
            head = self.head()
            if head is None:
                return None
            with translated(self.url), contextlib.suppress(VersionGone):
                state = self._redis.get(self._key("state")) or b""
                names = _array_names(state)
                arrays = {name: self._array(name, head.num_params) for name in names}
                scored = self._redis.zrange(self._key("applied"), 0, -1, withscores=True)
                members = [member.decode().split(" ", 1) for member in self._redis.zrange(self._key("refused"), 0, -1)]
                versions = [int(member) for member in self._redis.zrange(self._key("versions"), 0, -1)]
                kept = frozenset(name.decode() for name in self._redis.hkeys(self._key("kept")))
                model = self.model(head.version)
                if self._redis.hget(self._key("head"), "revision") == str(head.revision).encode():
                    applied = {member.decode(): int(score) for member, score in scored}
                    refused = {update_id: why for why, update_id in members}
                    return Stored(head, model, arrays, state, applied, versions, refused, kept)
            latest = self.head()
            if latest is None or latest.revision == head.revision:
                raise SettingsError(
                    f"the stored state of revision {head.revision} is incomplete or damaged; restore the job from a "
                    f"backup, or delete the keys {self._prefix}* to begin anew"
                )

    def versions(self) -> list[StoredVersion]:
        """Return the stored versions: their numbers and tags, then when they were made."""
        with translated(self.url), self._redis.pipeline(transaction=True) as pipe:
            pipe.zrange(self._key("versions"), 0, -1)
            pipe.zrange(self._key("tagged"), 0, -1, withscores=True)
            members, named = pipe.execute()
            numbers = [int(member) for member in members]
            for version in numbers:
                pipe.hget(self._key(f"meta:{version}"), "created_at")
            times = pipe.execute()
        tags: dict[int, list[str]] = {}
        for name, version in named:
            tags.setdefault(int(version), []).append(name.decode())
        return [
            StoredVersion(number, float(at or 0), tuple(sorted(tags.get(number, ()))))
            for number, at in zip(numbers, times, strict=True)
        ]

    def kept(self, name: str) -> bytes | None:
        """Return a record of the rule; read again if a commit came in between."""
        last: KeptEntry | None = None
        while True:
            entry = self._kept_entries([name]).get(name)
            if entry is None:
                return None
            if entry == last:
                raise SettingsError(
                    f"record {name!r} of revision {entry.revision} is incomplete; restore the job from a backup, or "
                    f"delete the keys {self._prefix}* to begin anew"
                )
            with translated(self.url), contextlib.suppress(VersionGone):
                return b"".join([self._chunk(piece) for piece in entry.keys(name)])
            last = entry

    def commit(self, commit: Commit) -> None:
        """Stage the large pieces, then compare-and-set."""
        stage, commands = self._stage(commit.token, pieces_of(commit))
        commands += self._forget_clients(commit.clients)
        kept = self._kept_entries(list(commit.kept))  # of another revision only if the script finds a conflict too
        commands += commands_of(commit, self._key, self.layout, kept)
        answer = self._run(str(commit.expected_revision), commit.token, stage, commands)
        if answer.startswith("conflict"):
            raise VersionConflict(f"expected revision {commit.expected_revision}; the store says: {answer}")
        if answer.startswith("forbidden"):
            raise SettingsError(
                f"Redis at {hide_password(self.url)} does not let this login do {answer.split()[1]} on job keys "
                f"{self._prefix}*: nothing was committed; give it the rules of `fedmq secrets make`"
            )
        if answer != "done":
            raise StoreUnavailable(f"a staged piece vanished before the commit ({answer}): is Redis evicting keys?")

    def status(self) -> dict[str, Any]:
        """Return the raw facts `fedmq status` shows: head, job, clients, last ledger entries, versions."""
        with translated(self.url):
            ledger = self._redis.xrevrange(self._key("ledger"), count=20)
            state = self._redis.get(self._key("state"))
            return {
                "job": self.job(),
                "state": msgpack.unpackb(state) if state else {},
                "clients": {k.decode(): json.loads(v) for k, v in self._redis.hgetall(self._key("clients")).items()},
                "ledger": [{k.decode(): v.decode() for k, v in entry.items()} for _, entry in ledger],
                "versions": [int(member) for member in self._redis.zrange(self._key("versions"), 0, -1)],
            }

    def totals(self) -> dict[str, int]:
        """Return outcome -> number of updates, over the job's whole life."""
        with translated(self.url):
            state = self._redis.get(self._key("state"))
        totals: dict[str, int] = msgpack.unpackb(state)["totals"] if state else {}
        return totals

    def meta(self, version: int) -> dict[str, str]:
        """Return what is known of a version; empty when nothing is."""
        with translated(self.url):
            fields = self._redis.hgetall(self._key(f"meta:{version}"))
        return {name.decode(): value.decode() for name, value in fields.items()}

    def tagged(self, name: str) -> int | None:
        """Return the version that a tag names, None when there is no such tag."""
        with translated(self.url):
            text = self._redis.get(self._key(f"tag:{name}"))
        return None if text is None else int(text)

    def ledger(self, after: int = 0) -> Iterator[dict[str, Any]]:
        """Yield the stored ledger entries of revisions beyond `after`, oldest first, with `updates` parsed.

        Entries carry the revision as their stream id (`<revision>-0`), so that a reader finds its place at once.
        """
        last = f"({after}-0"
        while True:
            with translated(self.url):
                page = self._redis.xrange(self._key("ledger"), last, count=500)
            for identifier, entry in page:
                yield {
                    "revision": int(entry[b"revision"]), "version": int(entry[b"version"]),
                    "updates": json.loads(entry[b"updates"]),
                }  # fmt: skip
                last = f"({identifier.decode()}"
            if not page:
                return

    def newest_evaluation(self) -> tuple[int, dict[str, float]]:
        """Return the newest evaluated version and its metrics; (-1, {}) when none is."""
        with translated(self.url):
            newest = self._redis.xrevrange(self._key("evaluations"), count=1)
        if not newest:
            return -1, {}
        return int(newest[0][1][b"version"]), json.loads(newest[0][1][b"metrics"])

    def close(self) -> None:
        """Close the connections."""
        self._redis.close()

    def _greet(self) -> None:
        """Find out, once and quickly, whether Redis answers at all; later answers may take their time."""
        if self._greeted:
            return
        probe = connect(self.url, CONNECT_S_MAX)
        with translated(self.url), contextlib.closing(probe):
            probe.exists(self._key("head"))
        self._greeted = True

    def _key(self, name: str) -> str:
        return self._prefix + name

    def _chunk(self, name: str) -> bytes:
        data = self._redis.get(self._key(name))
        if data is None:
            raise VersionGone(f"{name} is not stored")
        return bytes(data)

    def _pieces(self, name: str, count: int) -> Iterator[bytes]:
        """Yield stored chunks in order, in smaller pieces where a pace is set.

        Raises:
            VersionGone: one is not stored, or no longer; or the waiting was ended.
        """
        for index in range(count):
            if self._pace is None:
                yield self._chunk(f"{name}:{index}")
            else:
                yield from self._paced(f"{name}:{index}", self._pace)

    def _paced(self, name: str, pace: Pacing) -> Iterator[bytes]:
        """Yield a chunk by GETRANGE; a chunk never changes, so its pieces fit together unless it goes meanwhile."""
        key = self._key(name)
        size = int(self._redis.strlen(key))
        if not size:
            raise VersionGone(f"{name} is not stored")
        for start in range(0, size, pace.piece_bytes):
            end = min(size, start + pace.piece_bytes)
            if not pace.take(end - start):
                raise VersionGone(f"{name}: the worker was asked to end at {start} of {size} bytes")
            piece = bytes(self._redis.getrange(key, start, end - 1))
            if len(piece) != end - start:
                raise VersionGone(f"{name} went at {start} of {size} bytes")
            yield piece

    def _array(self, name: str, num_params: int) -> Vector:
        array = np.empty(num_params, np.float32)
        pieces = (self._chunk(f"state:{name}:{index}") for index in range(piece_count(array.nbytes)))
        try:
            fill_file(array.view(np.uint8), pieces, b"")
        except ValueError as error:
            raise VersionGone(f"the pieces of {name} in the state are damaged: {error}") from error
        return array

    def _kept_entries(self, names: Sequence[str]) -> dict[str, KeptEntry]:
        """Return where records are stored, of those that there are."""
        if not names:
            return {}
        with translated(self.url):
            texts = self._redis.hmget(self._key("kept"), names)
        return {name: KeptEntry.read(text) for name, text in zip(names, texts, strict=True) if text is not None}

    def _forget_clients(self, coming: Mapping[str, str]) -> list[list[Any]]:
        """Return the commands that make room for what is known of more clients."""
        key = self._key("clients")
        with translated(self.url):
            if self._redis.hlen(key) + len(coming) <= CLIENTS_MAX:
                return []
            known = {name.decode(): text for name, text in self._redis.hgetall(key).items()}
        gone = unheard(known | dict(coming))
        commands: list[list[Any]] = []
        for at in range(0, len(gone), SCRIPT_ARGS_MAX):
            some = gone[at : at + SCRIPT_ARGS_MAX]
            commands += [["HDEL", key, *some], ["DEL", *(self._key(f"outcomes:{client}") for client in some)]]
        return commands

    def _stage(self, token: str, pieces: Mapping[str, Iterator[memoryview]]) -> tuple[list[str], list[list[Any]]]:
        """Write the large pieces under stage keys; return those and the commands that move them into place.

        Small ones share a round trip: a commit may hold a record of each of a thousand clients.
        """
        stage: list[str] = []
        commands: list[list[Any]] = []
        waiting_bytes = 0
        with translated(self.url), self._redis.pipeline(transaction=False) as pipe:
            for name, chunks in pieces.items():
                for index, chunk in enumerate(chunks):
                    stage.append(self._key(f"stage:{token}:{len(stage)}"))
                    target = self._key(f"{name}:{index}")
                    pipe.set(stage[-1], chunk, ex=STAGE_SECONDS)
                    commands += [["RENAME", stage[-1], target], ["PERSIST", target]]
                    waiting_bytes += chunk.nbytes
                    if waiting_bytes >= STAGE_BYTES:
                        pipe.execute()
                        waiting_bytes = 0
            pipe.execute()
        return stage, commands

    def _run(self, expected: str, token: str, stage: list[str], commands: list[list[Any]]) -> str:
        """Run the script and wait until it is durable; return its answer."""
        # Redis's cmsgpack predates the msgpack type for binary: everything travels as the old raw type.
        argv = [expected, token, msgpack.packb(stage, use_bin_type=False), msgpack.packb(commands, use_bin_type=False)]
        answer = self._evaluate(SCRIPT, argv)
        if answer != "done" and stage:  # also when repeated: its pieces were staged once more
            with translated(self.url):
                self._redis.delete(*stage)
        return "done" if answer == "again" else answer

    def _evaluate(self, script: str, argv: Sequence[Any]) -> str:
        """Run a script on the head and wait until what it did is durable; return its answer."""
        with translated(self.url), self._redis.pipeline(transaction=False) as pipe:
            pipe.execute_command("EVAL", script, 1, self._key("head"), *argv)
            if self._waitaof:
                pipe.execute_command("WAITAOF", 1, self._replicas, WAIT_MS)
            elif self._replicas:
                pipe.execute_command("WAIT", self._replicas, WAIT_MS)
            answers = pipe.execute()
        self._check_copies(answers[1:])
        return str(answers[0].decode())

    def _check_copies(self, answers: list[Any]) -> None:
        """Make sure that a commit is on as many disks as it must; repeated, it is found done and waited for again."""
        if not answers:
            return
        on_disk, copies = answers[0] if self._waitaof else (1, answers[0])
        if on_disk < 1:
            raise StoreUnavailable(f"Redis did not sync the commit to disk within {WAIT_MS / 1000:g} s")
        if copies < self._replicas:
            raise StoreUnavailable(
                f"{copies} of {self._replicas} replicas of Redis had the commit within {WAIT_MS / 1000:g} s: see "
                "FEDMQ_STORE_REPLICAS"
            )

    def _parse_head(self, fields: dict[bytes, bytes]) -> Head | None:
        if not fields:
            return None
        text = {name.decode(): value.decode() for name, value in fields.items()}
        return Head(
            int(text["revision"]), int(text["version"]), text["layout"], text["sha256"], int(text["num_params"]),
            int(text["chunks"]), float(text["created_at"]), text.get("published", ""),
        )  # fmt: skip

    def _check_durability(self, version: str) -> None:
        kept = self.durability()
        major, minor = (int(part) for part in version.split(".")[:2])
        self._waitaof = kept not in ("always", "off") and (major, minor) >= (7, 2)
        if kept != "always" and not self._waitaof:
            raise SettingsError(
                f"Redis {version} at {hide_password(self.url)} may forget commits it has acknowledged (append-only "
                f"file: {kept}): start it with --appendonly yes --appendfsync always, or accept the loss with "
                "FEDMQ_DURABLE=false"
            )


def _array_names(state: bytes) -> list[str]:
    """Read from the small part of a state which arrays go with it."""
    try:
        names: list[str] = msgpack.unpackb(state)["arrays"] if state else []
    except (ValueError, TypeError, KeyError) as error:
        raise VersionGone(f"the small part of the state is damaged: {error}") from error
    return names
