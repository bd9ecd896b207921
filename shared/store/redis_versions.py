"""The versions of a job in Redis, as an operator sees them: tags and their history, what may go, who contributed.

A tag is one key, `tag:<name>`, and a member of `tagged`, where every script that drops a version looks. Tagging and
dropping are one script each, which Redis runs alone: of a tag and a drop that meet, whichever comes second sees the
first.
"""

import json
from collections.abc import Iterator, Sequence
from typing import Any

from shared.errors import VersionConflict, VersionGone
from shared.model_image import chunk_count
from shared.store.ports import TagChange
from shared.store.redis import RedisStore
from shared.store.redis_commit import DROP
from shared.store.redis_link import translated

TAG_CHANGES_MAX = 10_000  # approximately
PAGE = 100  # ledger entries read at once

# KEYS[1] head; ARGV: prefix, name, version, unix seconds, another tag that must name this version or '', changes kept.
_TAG = """
local prefix, name, version, now, source = unpack(ARGV)
if source ~= '' then
  local named = redis.call('GET', prefix .. 'tag:' .. source) or 'none'
  if named ~= version then return 'moved ' .. named end
end
local stored = redis.call('ZSCORE', prefix .. 'versions', version)
if not stored or redis.call('EXISTS', prefix .. 'model:' .. version .. ':0') == 0 then return 'gone' end
local previous = redis.call('GET', prefix .. 'tag:' .. name) or ''
redis.call('ZADD', prefix .. 'tagged', version, name)
if previous ~= version then
  redis.call('SET', prefix .. 'tag:' .. name, version)
  redis.call('XADD', prefix .. 'tags', 'MAXLEN', '~', ARGV[6], '*',
    'time', now, 'tag', name, 'version', version, 'previous', previous)
end
return 'done ' .. previous
"""

# KEYS[1] head; ARGV: prefix, name, unix seconds, changes kept.
_UNTAG = """
local prefix, name, now = unpack(ARGV)
local previous = redis.call('GET', prefix .. 'tag:' .. name)
redis.call('ZREM', prefix .. 'tagged', name)
if not previous then return '' end
redis.call('DEL', prefix .. 'tag:' .. name)
redis.call('XADD', prefix .. 'tags', 'MAXLEN', '~', ARGV[4], '*',
  'time', now, 'tag', name, 'version', '', 'previous', previous)
return previous
"""

# KEYS[1] head; ARGV: prefix, pieces of a version, versions ...
_PRUNE = f"""{DROP}
local prefix, pieces, newest = ARGV[1], tonumber(ARGV[2]), tonumber(redis.call('HGET', KEYS[1], 'version') or -1)
local gone = ''
for place = 3, #ARGV do
  local version = ARGV[place]
  if tonumber(version) < newest then drop(prefix, version, pieces) end
  if not redis.call('ZSCORE', prefix .. 'versions', version) then gone = gone .. ' ' .. version end
end
return gone
"""


class RedisVersions(RedisStore):
    """A job in Redis whose versions are named, dropped and looked into."""

    def tag(self, name: str, version: int, now: float, source: str = "") -> int | None:
        """Give a version a name, or move the name to it: one script."""
        argv = [self._prefix, name, str(version), repr(now), source, TAG_CHANGES_MAX]
        answer, _, rest = self._evaluate(_TAG, argv).partition(" ")
        if answer == "moved":
            raise VersionConflict(f"tag {source!r} names version {rest} by now, not {version}")
        if answer == "gone":
            raise VersionGone(f"version {version} is not stored")
        return int(rest) if rest else None

    def untag(self, name: str, now: float) -> int | None:
        """Remove a tag: one script."""
        previous = self._evaluate(_UNTAG, [self._prefix, name, repr(now), TAG_CHANGES_MAX])
        return int(previous) if previous else None

    def tag_changes(self) -> list[TagChange]:
        """Return the history of tags, oldest first; about the newest `TAG_CHANGES_MAX`."""
        with translated(self.url):
            entries = self._redis.xrange(self._key("tags"))
        return [
            TagChange(
                float(entry[b"time"]), entry[b"tag"].decode(), _number(entry[b"version"]), _number(entry[b"previous"])
            )
            for _, entry in entries
        ]

    def drop(self, versions: Sequence[int]) -> list[int]:
        """Drop the weights of versions that are neither the newest nor tagged: one script."""
        if not versions:
            return []
        argv = [self._prefix, chunk_count(self.layout()), *(str(version) for version in versions)]
        return [int(version) for version in self._evaluate(_PRUNE, argv).split()]

    def ledger_before(self, revision: int) -> Iterator[dict[str, Any]]:
        """Yield the ledger's entries of a revision and those before it, newest first, with `updates` parsed."""
        last = f"{revision}-0"
        while True:
            with translated(self.url):
                page = self._redis.xrevrange(self._key("ledger"), last, count=PAGE)
            for identifier, entry in page:
                yield {
                    "revision": int(entry[b"revision"]), "version": int(entry[b"version"]),
                    "updates": json.loads(entry[b"updates"]),
                }  # fmt: skip
                last = f"({identifier.decode()}"
            if not page:
                return


def _number(text: bytes) -> int | None:
    return int(text) if text else None
