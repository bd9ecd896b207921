"""A commit in Redis: its large pieces, the script, and the commands the script runs.

A commit first writes its large pieces under stage keys, then one script - Redis runs it alone - compares the
revision and, if it is the expected one, renames the pieces into place, updates all the rest and moves the head
last. The answer is taken as a success only when it is durable (`appendfsync always`, or WAITAOF from 7.2).
"""

import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from shared.layout import Layout
from shared.model_image import ModelImage, chunk_count, cut, piece_count
from shared.published import Publication
from shared.snapshot import write_snapshot
from shared.store.ports import OUTCOMES_MAX, REFUSED_IDS_MAX, Commit
from shared.vector import Vector

LEDGER_ENTRIES_MAX = 100_000  # approximately: Redis trims whole nodes
OUTCOMES_SECONDS = 30 * 86_400  # what became of the updates of a client that sends none any more
META_SECONDS = 3600  # facts about a version whose weights are gone
SCRIPT_ARGS_MAX = 1000  # ids per command inside the script: Lua's stack is small

Command = list[Any]
KeyOf = Callable[[str], str]  # short name -> the job's key


class KeptEntry(NamedTuple):
    """Where a record of a rule is stored: pieces under keys of the revision that wrote it, which never change."""

    revision: int
    pieces: int

    @classmethod
    def read(cls, text: bytes) -> "KeptEntry":
        """Read what stands in the `kept` hash: `<revision> <pieces>`."""
        return cls(*(int(number) for number in text.split()))

    def keys(self, name: str) -> list[str]:
        """Return the short names of the pieces of a record."""
        return [f"{_kept(name, self.revision)}:{index}" for index in range(self.pieces)]


# Part of a script. Whether a version has a tag is looked up here, where nobody can set one meanwhile.
DROP = f"""
local function drop(prefix, version, chunks)
  if redis.call('ZCOUNT', prefix .. 'tagged', version, version) > 0 then return end
  for index = 0, chunks - 1 do redis.call('DEL', prefix .. 'model:' .. version .. ':' .. index) end
  redis.call('EXPIRE', prefix .. 'meta:' .. version, {META_SECONDS})
  redis.call('ZREM', prefix .. 'versions', version)
end
"""

# Part of a script: whether this login may do a command.
_MAY = """
local function may(command)
  if command[1] ~= 'DROP' then return redis.acl_check_cmd(unpack(command)) end
  local prefix, version = command[2], command[3]
  return redis.acl_check_cmd('ZCOUNT', prefix .. 'tagged', version, version)
    and redis.acl_check_cmd('DEL', prefix .. 'model:' .. version .. ':0')
    and redis.acl_check_cmd('EXPIRE', prefix .. 'meta:' .. version, 1)
    and redis.acl_check_cmd('ZREM', prefix .. 'versions', version)
end
"""

# KEYS[1] head; ARGV: expected revision, token, msgpack list of stage keys, msgpack list of commands, where DROP is not
# one of Redis's.
SCRIPT = f"""{DROP}{_MAY}
local revision, token = unpack(redis.call('HMGET', KEYS[1], 'revision', 'token'))
if token == ARGV[2] then
  redis.call('HSET', KEYS[1], 'token', token)  -- WAIT and WAITAOF wait for a connection's last write, and all before it
  return 'again'
end
if (revision or '') ~= ARGV[1] then return 'conflict ' .. (revision or 'none') end
for _, key in ipairs(cmsgpack.unpack(ARGV[3])) do
  if redis.call('EXISTS', key) == 0 then return 'expired ' .. key end
end
local commands = cmsgpack.unpack(ARGV[4])
for _, command in ipairs(commands) do  -- all or nothing: what fails half way leaves what came before
  if not may(command) then return 'forbidden ' .. command[1] end
end
for _, command in ipairs(commands) do
  if command[1] == 'DROP' then drop(command[2], command[3], command[4]) else redis.call(unpack(command)) end
end
return 'done'
"""


def pieces_of(commit: Commit) -> dict[str, Iterator[memoryview]]:
    """Return the short name of everything large in a commit, and its pieces; records of a rule go as large ones."""
    pieces = {f"state:{name}": _cut_array(array) for name, array in commit.arrays.items()}
    for name, record in commit.kept.items():
        if record is not None:
            pieces[_kept(name, commit.expected_revision + 1)] = cut(np.frombuffer(record, np.uint8))
    if commit.model is None:
        return pieces
    pieces[f"model:{commit.version}"] = commit.model.chunks()
    if commit.publication.delta is not None:
        entry, record = commit.publication.delta
        pieces[f"delta:{entry.version}"] = cut(np.frombuffer(record, np.uint8))
    if commit.publication.snapshot is not None:
        taken, image = commit.publication.snapshot
        pieces[f"snapshot:{taken.version}"] = write_snapshot(image, taken.dtype)
    return pieces


def commands_of(
    commit: Commit, key: KeyOf, layout: Callable[[], Layout], kept: Mapping[str, KeptEntry]
) -> list[Command]:
    """Return the commands that make a commit visible once its pieces are in place; the head moves last.

    Args:
        commit: what to commit.
        key: short name -> the job's key.
        layout: the job's.
        kept: where the records that change are stored at the expected revision.
    """
    revision = commit.expected_revision + 1
    commands: list[Command] = [["SET", key("state"), commit.state]]
    members = [part for update_id, base in commit.applied.items() for part in (base, update_id)]
    for start in range(0, len(members), SCRIPT_ARGS_MAX):
        commands.append(["ZADD", key("applied"), *members[start : start + SCRIPT_ARGS_MAX]])
    commands.append(["ZREMRANGEBYSCORE", key("applied"), "-inf", f"({commit.applied_floor}"])
    members = [part for update_id, why in commit.refused.items() for part in (revision, f"{why} {update_id}")]
    for start in range(0, len(members), SCRIPT_ARGS_MAX):
        commands.append(["ZADD", key("refused"), *members[start : start + SCRIPT_ARGS_MAX]])
    if members:
        commands.append(["ZREMRANGEBYRANK", key("refused"), 0, -REFUSED_IDS_MAX - 1])
    entry = ["revision", revision, "version", commit.version, "updates", commit.ledger]
    commands.append(["XADD", key("ledger"), "MAXLEN", "~", LEDGER_ENTRIES_MAX, f"{revision}-0", *entry])
    for client, text in commit.clients.items():
        commands.append(["HSET", key("clients"), client, text])
    for client, pairs in commit.outcomes.items():
        told = ["updates", json.dumps(pairs)]
        commands.append(["XADD", key(f"outcomes:{client}"), "MAXLEN", "~", OUTCOMES_MAX, f"{revision}-0", *told])
        commands.append(["EXPIRE", key(f"outcomes:{client}"), OUTCOMES_SECONDS])
    commands += _kept_commands(commit, key, kept)
    for version in commit.dropped_versions:
        commands.append(["DROP", key(""), str(version), chunk_count(layout())])
    head = {"revision": revision, "version": commit.version, "token": commit.token}
    if commit.model is None:
        return [*commands, ["HSET", key("head"), *flat(head)]]
    commands += _publication_commands(commit.publication, key)
    facts = dict(commit.meta) | _facts(commit.publication)
    head["published"] = commit.publication.sha256
    return commands + version_commands(commit.version, commit.model, commit.now, facts, head, key)


def version_commands(
    version: int, model: ModelImage, now: float, meta: Mapping[str, str], head: dict[str, Any], key: KeyOf
) -> list[Command]:
    """Return the commands that make a version visible; the head moves last."""
    facts = {"sha256": model.sha256, "chunks": chunk_count(model.layout), "created_at": repr(now)}
    return [
        ["HSET", key(f"meta:{version}"), *flat(facts | {"revision": head["revision"]} | dict(meta))],
        ["ZADD", key("versions"), version, version],
        ["HSET", key("head"), *flat(head | facts)],
    ]


def flat(fields: Mapping[str, Any]) -> list[Any]:
    """Return name, value, name, value, ... as HSET takes them."""
    return [part for pair in fields.items() for part in pair]


def _publication_commands(publication: Publication, key: KeyOf) -> list[Command]:
    """Return the commands that move the index of what is published."""
    commands: list[Command] = []
    for step in publication.dropped_deltas:
        commands.append(["DEL", *_keys(key, f"delta:{step.version}", piece_count(step.size_bytes))])
        commands.append(["ZREMRANGEBYSCORE", key("deltas"), step.version, step.version])
    for taken in publication.dropped_snapshots:
        commands.append(["DEL", *_keys(key, f"snapshot:{taken.version}", piece_count(taken.size_bytes))])
        commands.append(["HDEL", key("snapshots"), taken.version])
    if publication.delta is not None:
        step = publication.delta[0]
        commands.append(["ZADD", key("deltas"), step.version, f"{step.version} {step.parent} {step.size_bytes}"])
    if publication.snapshot is not None:
        taken = publication.snapshot[0]
        text = json.dumps({"dtype": taken.dtype, "bytes": taken.size_bytes})
        commands.append(["HSET", key("snapshots"), taken.version, text])
    return commands


def _kept_commands(commit: Commit, key: KeyOf, former: Mapping[str, KeptEntry]) -> list[Command]:
    """Return the commands that move the index of the rule's records, and remove what it named before."""
    commands: list[Command] = []
    revision = commit.expected_revision + 1
    for name, record in commit.kept.items():
        if name in former:
            commands += [["DEL", key(piece)] for piece in former[name].keys(name)]
        if record is None:
            commands.append(["HDEL", key("kept"), name])
        else:
            commands.append(["HSET", key("kept"), name, f"{revision} {piece_count(len(record))}"])
    return commands


def _kept(name: str, revision: int) -> str:
    return f"kept:{name}:{revision}"


def _facts(publication: Publication) -> dict[str, str]:
    """Return what `meta:<version>` says of the published weights."""
    if not publication.sha256:
        return {}
    facts = {"published": publication.sha256}
    if publication.delta is not None:
        facts |= {"parent": str(publication.delta[0].parent), "delta_bytes": str(publication.delta[0].size_bytes)}
    if publication.snapshot is not None:
        facts["snapshot_bytes"] = str(publication.snapshot[0].size_bytes)
    return facts


def _keys(key: KeyOf, name: str, pieces: int) -> list[str]:
    return [key(f"{name}:{index}") for index in range(pieces)]


def _cut_array(array: Vector) -> Iterator[memoryview]:
    return cut(array.view(np.uint8))
