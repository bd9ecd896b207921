"""A whole job in Redis, as it stood at one revision: what `fedmq backup` reads and `fedmq restore` writes.

Freezing: every key of the job is copied to a stage key, and the aggregator commits on while the copies are read. Large
keys that never change are copied one by one; then one script, which Redis runs alone, copies all others and lists what
there is: that makes the copies those of one revision. The price: while the script runs (a second or two a GB of
optimizer state and open buffer) Redis answers nobody, and until they are read the copies take as much memory as the
job does. Each goes as soon as it is read, and all of them expire when nobody reads on.

Installing: everything is written under stage keys, then one script puts it in the place of what was there, the head
last. The revision moves beyond any that the lost store may have reached: an aggregator that still holds one of those
must neither commit over the restored state nor take it for its own, and workers that count revisions miss none.
"""

import contextlib
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import msgpack

from shared.clock import Clock
from shared.errors import SettingsError, StoreUnavailable
from shared.store.ports import Head
from shared.store.redis import STAGE_BYTES, STAGE_SECONDS, RedisStore
from shared.store.redis_link import translated

STAGE = "stage:"
COPY_SECONDS = 600  # a copy lives so long after the last sign of its reader
RENEW_S = 60.0
PIECE_BYTES = 8 * 2**20  # about as much of a value is held at once
STAGE_COMMANDS = 2000  # staged in one round trip at most
PAGE_MAX = 500  # elements of a hash, a set or a stream read at once
REVISIONS_BEYOND = 1_000_000  # commits that a lost store may have seen since its backup

SIZE_COMMANDS = {"string": "STRLEN", "hash": "HLEN", "zset": "ZCARD", "stream": "XLEN"}
NEVER_CHANGE = ("model:", "snapshot:", "delta:", "kept:")  # they only vanish
LARGE_BYTES = 2**20

Piece = bytes | list[Any]

# KEYS[1] head; ARGV: prefix of the job's keys, prefix of the copies, seconds they live.
_FREEZE = """
if redis.call('EXISTS', KEYS[1]) == 0 then return {} end
local size = {string = 'STRLEN', hash = 'HLEN', zset = 'ZCARD', stream = 'XLEN'}
local found = {}
for _, key in ipairs(redis.call('KEYS', ARGV[1] .. '*')) do
  local name = string.sub(key, #ARGV[1] + 1)
  if string.sub(name, 1, 6) ~= 'stage:' then
    local kind = redis.call('TYPE', key).ok
    found[#found + 1] = {name, kind, redis.call('PTTL', key), size[kind] and redis.call(size[kind], key) or -1}
    if redis.call('EXISTS', ARGV[2] .. name) == 0 then redis.call('COPY', key, ARGV[2] .. name) end
    redis.call('EXPIRE', ARGV[2] .. name, ARGV[3])
  end
end
return found
"""

# KEYS[1] head; ARGV: prefix, token, '1' to replace, revision of the backup, revisions beyond, unix seconds,
# msgpack list of [stage key, name, ttl in ms or -1, what tells the size, size], the head last.
_INSTALL = """
local old = redis.call('HMGET', KEYS[1], 'revision', 'version', 'token')
if old[3] == ARGV[2] then
  redis.call('HSET', KEYS[1], 'token', old[3])  -- a write for WAIT and WAITAOF to wait for, as in a commit
  return 'done ' .. old[1]
end
local staged, present = cmsgpack.unpack(ARGV[7]), {}
for _, key in ipairs(redis.call('KEYS', ARGV[1] .. '*')) do
  if string.sub(key, #ARGV[1] + 1, #ARGV[1] + 6) ~= 'stage:' then present[#present + 1] = key end
end
if #present > 0 and ARGV[3] ~= '1' then return 'exists ' .. (old[1] or 'none') end
for _, item in ipairs(staged) do
  if redis.call('EXISTS', item[1]) == 0 then return 'expired ' .. item[2] end
  local size = redis.call(item[4], item[1])
  if size ~= item[5] then return 'incomplete ' .. item[2] .. ' ' .. size .. '/' .. item[5] end
end
local job = ARGV[1] .. 'job'
local announced = redis.call('EXISTS', job) == 1  -- what runs here now says how
for _, key in ipairs(present) do
  if key ~= job then redis.call('UNLINK', key) end
end
local head = KEYS[1]
local revision = string.format('%.0f', math.max(tonumber(old[1] or 0), tonumber(ARGV[4])) + tonumber(ARGV[5]))
for _, item in ipairs(staged) do
  local key = ARGV[1] .. item[2]
  if key == job and announced then
    redis.call('UNLINK', item[1])
  else
    redis.call('RENAME', item[1], key)
    if item[3] < 0 then redis.call('PERSIST', key) else redis.call('PEXPIRE', key, item[3]) end
  end
end
local told = {id = '', outcome = 'restore', revision = tonumber(ARGV[4]), replaced = tonumber(old[1] or -1)}
local version = redis.call('HGET', head, 'version')
redis.call('XADD', ARGV[1] .. 'ledger', revision .. '-0', 'revision', revision, 'version', version,
  'updates', cjson.encode({told}))
redis.call('HSET', head, 'revision', revision, 'token', ARGV[2], 'created_at', ARGV[6])
return 'done ' .. revision .. ' ' .. (old[1] or '')
"""


# KEYS[1] a stream; ARGV: msgpack list of [id, [field, value, ...]]. The answer may have been lost: what is there stays.
_APPEND = """
for _, entry in ipairs(cmsgpack.unpack(ARGV[1])) do
  if #redis.call('XRANGE', KEYS[1], entry[1], entry[1]) == 0 then
    redis.call('XADD', KEYS[1], entry[1], unpack(entry[2]))
  end
end
"""


@dataclass(frozen=True, slots=True)
class Entry:
    """A key of a job.

    Attributes:
        name: without the job's prefix.
        kind: Redis's type: string, hash, zset or stream.
        ttl_ms: how long it still had to live, -1 for ever.
        size: bytes of a string, elements of others.
        last: id of the newest entry a stream ever had, "" for others.
    """

    name: str
    kind: str
    ttl_ms: int
    size: int
    last: str = ""


class RedisArchive(RedisStore):
    """A job in Redis, to be read or written as a whole."""

    @contextlib.contextmanager
    def frozen(self, clock: Clock) -> Iterator["FrozenJob"]:
        """Hold the job as it stands now for as long as the `with` block lasts.

        Args:
            clock: time, for renewing the copies' lives.

        Raises:
            SettingsError: there is no such job, Redis has no room for the copies, or a key is none of FedMQ's.
            StoreUnavailable: Redis does not answer.
        """
        sizes = self._sizes()
        self._check_room(sum(sizes.values()))
        prefix = self._key(f"{STAGE}{uuid.uuid4().hex}:")
        try:
            with translated(self.url):
                for name in (name for name, size in sizes.items() if size >= LARGE_BYTES):
                    if name.startswith(NEVER_CHANGE):
                        self._redis.copy(self._key(name), prefix + name)
                        self._redis.expire(prefix + name, COPY_SECONDS)
                found = self._redis.eval(_FREEZE, 1, self._key("head"), self._prefix, prefix, COPY_SECONDS)
            if not found:
                raise SettingsError(f"there is no job at {self._prefix}* in this store: nothing to back up")
            yield FrozenJob(self, prefix, sorted(found), clock)
        finally:
            self._discard(prefix)

    def install(
        self, records: Iterable[tuple[Entry, Iterable[Piece]]], revision: int, now: float, replace: bool
    ) -> int:
        """Make the job what was read elsewhere, all or nothing; return the revision it stands at.

        Args:
            records: every key and its value in pieces.
            revision: the one they are of.
            now: unix seconds.
            replace: a job that is there goes.

        Raises:
            SettingsError: the job exists and is not to be replaced.
            StoreUnavailable: nothing has changed, unless only the answer was lost.
        """
        token = uuid.uuid4().hex
        prefix = self._key(f"{STAGE}{token}:")
        try:
            staged = self._stage_all(prefix, records)
            argv = [self._prefix, f"restore {token}", "1" if replace else "", revision, REVISIONS_BEYOND, repr(now)]
            answer = self._evaluate(_INSTALL, [*argv, msgpack.packb(staged, use_bin_type=False)]).split()
        finally:
            self._discard(prefix)
        if answer[0] == "exists":
            raise SettingsError(
                f"{self._prefix}* appeared meanwhile, at revision {answer[1]}: say --replace to drop it"
            )
        if answer[0] != "done":
            raise StoreUnavailable(
                f"a staged piece was lost before it was used ({' '.join(answer)}): is Redis evicting keys?"
            )
        return int(answer[1])

    def names(self) -> list[str]:
        """Return the names of all keys of the job, those under way left out."""
        with translated(self.url):
            found = self._redis.scan_iter(match=f"{self._prefix}*", count=1000)
            names = {key.decode().removeprefix(self._prefix) for key in found}
        return sorted(name for name in names if not name.startswith(STAGE))

    def _sizes(self) -> dict[str, int]:
        """Return what each key of the job takes of Redis's memory, bytes."""
        names = self.names()
        with translated(self.url), self._redis.pipeline(transaction=False) as pipe:
            for name in names:
                pipe.execute_command("MEMORY USAGE", self._key(name))
            return {name: size or 0 for name, size in zip(names, pipe.execute(), strict=True)}

    def _check_room(self, needed: int) -> None:
        """Refuse copies that Redis has no memory for; the system would rather end it than say no."""
        with translated(self.url):
            memory = self._redis.info("memory")
        limit = int(memory["maxmemory"]) or int(memory["total_system_memory"])
        free = limit - int(memory["used_memory"])
        if needed > free:
            raise SettingsError(
                f"a backup holds a copy of the job in Redis while it is read: {needed / 2**20:,.0f} MiB, and "
                f"{max(0, free) / 2**20:,.0f} of {limit / 2**20:,.0f} MiB are free; raise maxmemory, or keep fewer "
                "versions (FEDMQ_VERSIONS_KEPT)"
            )

    def _stage_all(self, prefix: str, records: Iterable[tuple[Entry, Iterable[Piece]]]) -> list[list[Any]]:
        """Write all keys under stage names, small ones together; return what `_INSTALL` takes of each.

        redis-py sends a round trip again when its answer is lost: each command comes to the same when it is repeated.
        """
        staged, waiting_bytes = [], 0
        with self._redis.pipeline(transaction=True) as pipe:  # a key has its expiry from the first piece on
            for entry, pieces in records:
                key = prefix + entry.name
                offset = 0
                for piece in pieces:
                    for command in _commands(key, entry.kind, piece, offset):
                        pipe.execute_command(*command)
                    pipe.expire(key, STAGE_SECONDS)
                    offset += len(piece)
                    waiting_bytes += len(piece) if isinstance(piece, bytes) else len(msgpack.packb(piece))
                    if waiting_bytes >= STAGE_BYTES or len(pipe) >= STAGE_COMMANDS:
                        self._flush(pipe)
                        waiting_bytes = 0
                if entry.last:
                    pipe.execute_command("XSETID", key, entry.last)
                staged.append([key, entry.name, entry.ttl_ms, SIZE_COMMANDS[entry.kind], entry.size])
            self._flush(pipe)
        return sorted(staged, key=lambda item: item[1] == "head")

    def _flush(self, pipe: Any) -> None:
        with translated(self.url):
            pipe.execute()

    def _discard(self, prefix: str) -> None:
        """Remove stage keys; those that stay, because Redis is away, expire."""
        with contextlib.suppress(StoreUnavailable), translated(self.url):
            for key in list(self._redis.scan_iter(match=f"{prefix}*", count=1000)):
                self._redis.unlink(key)


class FrozenJob:
    """A job as it stood at one revision.

    Args:
        archive: where it is.
        prefix: of the copies.
        found: name, type, time to live and size of every key, as the script lists them.
        clock: time.

    Attributes:
        head: where it stood.
        entries: its keys.
    """

    def __init__(self, archive: RedisArchive, prefix: str, found: list[list[Any]], clock: Clock) -> None:
        self._archive, self._redis, self._prefix, self._clock = archive, archive._redis, prefix, clock
        self._renewed_at = clock.monotonic()
        self.entries = [self._entry(name.decode(), kind.decode(), ttl_ms, size) for name, kind, ttl_ms, size in found]
        self._read = 0  # keys of which the copy is gone
        with translated(archive.url):
            head = archive._parse_head(self._redis.hgetall(prefix + "head"))
        if head is None:
            raise StoreUnavailable("the copies vanished: is Redis evicting keys?")
        self.head: Head = head

    def records(self) -> Iterator[tuple[Entry, Iterator[Piece]]]:
        """Yield every key and its value in pieces, to be read in this order; its copy goes after that."""
        for entry in self.entries:
            yield entry, self._pieces(entry)
            self._read += 1
            with translated(self._archive.url):
                self._redis.unlink(self._prefix + entry.name)

    def _entry(self, name: str, kind: str, ttl_ms: int, size: int) -> Entry:
        if size < 0:
            raise SettingsError(
                f"key {name!r} of the job is a {kind}, which FedMQ writes none of: rename or delete it, and try again"
            )
        if kind != "stream":
            return Entry(name, kind, ttl_ms, size)
        with translated(self._archive.url):
            last = self._redis.xinfo_stream(self._prefix + name)["last-generated-id"]
        return Entry(name, kind, ttl_ms, size, last.decode())

    def _pieces(self, entry: Entry) -> Iterator[Piece]:
        key = self._prefix + entry.name
        read = {"string": self._string, "hash": self._hash, "zset": self._zset, "stream": self._stream}[entry.kind]
        with translated(self._archive.url):
            for piece in read(key, entry.size):
                yield piece
                self._renew()
            if not self._redis.exists(key):
                raise StoreUnavailable(f"the copy of {entry.name} vanished while it was read: is Redis evicting keys?")

    def _renew(self) -> None:
        """Tell Redis now and then that the copies are still wanted."""
        if self._clock.monotonic() - self._renewed_at < RENEW_S:
            return
        with self._redis.pipeline(transaction=False) as pipe:
            for entry in self.entries[self._read :]:
                pipe.expire(self._prefix + entry.name, COPY_SECONDS)
            pipe.execute()
        self._renewed_at = self._clock.monotonic()

    def _string(self, key: str, size: int) -> Iterator[Piece]:
        for start in range(0, max(1, size), PIECE_BYTES):
            yield self._redis.getrange(key, start, start + PIECE_BYTES - 1)

    def _hash(self, key: str, _size: int) -> Iterator[Piece]:
        cursor = -1
        while cursor != 0:
            cursor, fields = self._redis.hscan(key, max(0, cursor), count=PAGE_MAX)
            yield [part for pair in fields.items() for part in pair]

    def _zset(self, key: str, size: int) -> Iterator[Piece]:
        for start in range(0, size, PAGE_MAX):
            page = self._redis.zrange(key, start, start + PAGE_MAX - 1, withscores=True)
            yield [part for pair in page for part in pair]

    def _stream(self, key: str, _size: int) -> Iterator[Piece]:
        after, count = "-", 1
        while page := self._redis.xrange(key, after, count=count):
            yield [[identifier, [part for pair in fields.items() for part in pair]] for identifier, fields in page]
            after = f"({page[-1][0].decode()}"
            page_bytes = sum(len(value) for _, fields in page for value in fields.values())
            count = max(1, min(PAGE_MAX, PIECE_BYTES * len(page) // max(1, page_bytes)))


def _commands(key: str, kind: str, piece: Any, offset: int) -> Iterator[list[Any]]:
    """Yield the commands that put a piece of a value in its place; of a string it may be sent twice."""
    if kind == "string":
        yield ["SETRANGE", key, offset, piece] if offset else ["SET", key, piece]
    elif kind == "hash" and piece:
        yield ["HSET", key, *piece]
    elif kind == "zset":
        scored = zip(piece[1::2], piece[::2], strict=True)
        yield ["ZADD", key, *(part for pair in scored for part in pair)]
    elif kind == "stream" and piece:
        yield ["EVAL", _APPEND, 1, key, msgpack.packb(piece, use_bin_type=False)]
