"""The aggregator with its safety taken out, for `fedmq bench safety` alone: what it costs is measured against this.

Taken out, by replacing functions of this one process:

- checksums: no crc32 of a message or a payload is computed, nor the model's sha256;
- duplicate check: no id of an applied or refused update is looked for, kept or stored;
- ledger: no entry, no client's record, no outcome is written; only the totals, which the benchmark reads.

The durable commit is off by the benchmark's Redis, which keeps no append-only file, and by FEDMQ_DURABLE=false. What
stays as it is: the decoder's own checks, the atomic commit, the ack after it, and the broker's durable queue.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import aggregator.admission
import aggregator.aggregator
import shared.messages
from aggregator.__main__ import app
from aggregator.account import Account
from aggregator.state import State, from_stored
from shared.messages import Update, decode
from shared.model_image import ModelImage
from shared.store.ports import Commit
from shared.store.redis import RedisStore


class Forgetful(dict[Any, Any]):
    """A table that keeps nothing."""

    def __setitem__(self, key: Any, value: Any) -> None:
        """Forget it."""


def take_out() -> None:
    """Replace what makes the aggregator safe."""
    replacements: list[tuple[Any, str, Any]] = [
        (shared.messages, "_payload", _unchecked),
        (aggregator.admission, "decode", _read),
        (Account, "settle", _only_count),
        (RedisStore, "commit", _bare(RedisStore.commit)),
        (aggregator.aggregator, "from_stored", _without_ids(from_stored)),
    ]
    for owner, name, replacement in replacements:
        getattr(owner, name)  # AttributeError where it is called otherwise by now
        setattr(owner, name, replacement)


def _unchecked(record: Any) -> bytes:
    payload: bytes = record["payload"]
    return payload


def _read(body: bytes, message_bytes_max: int, crc32: int | None = None) -> Update:
    return decode(body, message_bytes_max)


def _only_count(
    account: Account, update: Update, size: int, outcome: str, staleness: int, weight: float, version: int, now: float
) -> None:
    account.entries.append({"id": update.update_id, "outcome": outcome, "base_version": 0, "staleness": staleness})


def _bare(commit: Callable[[RedisStore, Commit], None]) -> Callable[[RedisStore, Commit], None]:
    hashed = ModelImage.sha256

    def bare(store: RedisStore, given: Commit) -> None:
        less = dataclasses.replace(given, ledger="[]", applied={}, refused={}, clients={}, outcomes={})
        ModelImage.sha256 = property(lambda _: "")  # type: ignore[assignment, method-assign]
        try:
            commit(store, less)
        finally:
            ModelImage.sha256 = hashed  # type: ignore[method-assign]

    return bare


def _without_ids(load: Callable[..., State]) -> Callable[..., State]:
    def loaded(*stored: Any) -> State:
        state = load(*stored)
        state.applied, state.refused = Forgetful(), Forgetful()
        return state

    return loaded


if __name__ == "__main__":
    take_out()
    app()
