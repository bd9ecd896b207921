"""Production code broken on purpose, one invariant each; the checkers of `ops/torture` must see every one.

Each takes pytest's `monkeypatch.setattr`.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

import aggregator.admission
import aggregator.aggregator
import shared.messages
from aggregator import partial
from aggregator.account import Account
from aggregator.aggregator import Aggregator
from aggregator.intake import Intake
from aggregator.state import State
from ops.torture.faults import Faults
from ops.torture.jobs import Job
from shared.errors import Reason, RejectedUpdate, Unavailable
from shared.store.inprocess import InProcessStore
from shared.transport.inprocess import InProcessSource
from worker.outbox import Outbox
from worker.publisher import Publisher
from worker.residual import Residual

Patch = Callable[[Any, str, Any], None]


class Forgetful(dict):
    """Ids that nobody finds again."""

    def __contains__(self, update_id: object) -> bool:
        return False


def ack_before_commit(patch: Patch) -> None:
    commit = Aggregator._commit

    def ack_first(self: Aggregator) -> None:
        self._source.ack(self._pending)
        commit(self)

    patch(Aggregator, "_commit", ack_first)


def no_duplicate_check(patch: Patch) -> None:
    from_stored = aggregator.aggregator.from_stored

    def forget(*arguments: Any) -> State:
        state = from_stored(*arguments)
        state.applied = Forgetful(state.applied)
        return state

    patch(aggregator.aggregator, "from_stored", forget)


def the_open_buffers_ids_are_forgotten(patch: Patch) -> None:
    open_commit = Aggregator._open_commit

    def without_them(self: Aggregator, moved: bool, dropped: list[int]) -> Any:
        commit = open_commit(self, moved, dropped)
        waiting = {contribution.update_id for contribution in self.state.buffer}
        return replace(commit, applied={i: base for i, base in commit.applied.items() if i not in waiting})

    patch(Aggregator, "_open_commit", without_them)


def applied_ids_are_forgotten_too_early(patch: Patch) -> None:
    def forget(state: State, floor: int) -> None:
        state.applied = {i: base for i, base in state.applied.items() if base >= state.version}

    patch(aggregator.aggregator, "forget_old_ids", forget)


def a_refusal_is_not_final(patch: Patch) -> None:
    patch(State, "refuse", lambda self, update_id, outcome: None)


def poison_is_requeued(patch: Patch) -> None:
    ack = InProcessSource.ack
    poison: set[bytes] = set()

    def remember(self: InProcessSource, delivery: Any, reason: Any, detail: str) -> None:
        poison.add(self._unacked[delivery.tag].body)

    def requeue(self: InProcessSource, deliveries: Any) -> None:
        back = [
            self._unacked[d.tag] for d in deliveries if d.tag in self._unacked and self._unacked[d.tag].body in poison
        ]
        ack(self, deliveries)
        self._broker._queues[self._job].extend(back)

    patch(InProcessSource, "reject", remember)
    patch(InProcessSource, "ack", requeue)


def a_rejection_is_acked_at_once(patch: Patch) -> None:
    reject = InProcessSource.reject

    def and_ack(self: InProcessSource, delivery: Any, reason: Any, detail: str) -> None:
        reject(self, delivery, reason, detail)
        self.ack([delivery])

    patch(InProcessSource, "reject", and_ack)


def a_rejection_leaves_no_dead_letter(patch: Patch) -> None:
    patch(InProcessSource, "reject", lambda *_: None)


def a_delivery_of_an_older_epoch_is_acked(patch: Patch) -> None:
    recover = InProcessSource.recover

    def count_anew(self: InProcessSource) -> None:  # as a new AMQP channel does
        recover(self)
        self._sequence = 0

    def ack(self: InProcessSource, deliveries: Any) -> None:  # and as `multiple` does
        newest = max((delivery.tag[1] for delivery in deliveries), default=0)
        self._unacked = {tag: message for tag, message in self._unacked.items() if tag[1] > newest}

    patch(InProcessSource, "recover", count_anew)
    patch(InProcessSource, "ack", ack)


def the_outbox_forgets_at_publish(patch: Patch) -> None:
    step = Publisher.step

    def forget_first(self: Publisher, timeout_s: float = 1.0) -> bool:
        waiting = self._outbox.oldest()
        if waiting is None:
            return False
        body = waiting.body()
        self._outbox.confirm(waiting)
        real, self._outbox = self._outbox, OneLetter(waiting, body)
        try:
            return step(self, timeout_s)
        finally:
            self._outbox = real

    patch(Publisher, "step", forget_first)


class OneLetter:
    """An outbox in memory."""

    def __init__(self, waiting: Any, body: bytes) -> None:
        self._waiting, self._body = waiting, body
        self.update_id = waiting.update_id

    def oldest(self) -> "OneLetter":
        return self

    def body(self) -> bytes:
        return self._body

    def confirm(self, _: object) -> None: ...

    def __len__(self) -> int:
        return 0


def staleness_is_noted_off_by_one(patch: Patch) -> None:
    settle = Account.settle

    def one_more(self: Account, update: Any, size: int, outcome: str, staleness: int, *rest: Any) -> None:
        settle(self, update, size, outcome, staleness + 1, *rest)

    patch(Account, "settle", one_more)


def staleness_is_weighed_off_by_one(patch: Patch) -> None:
    apply = Intake._apply
    patch(Intake, "_apply", lambda self, state, update, delta, tau: apply(self, state, update, delta, tau + 1))


def staleness_is_limited_off_by_one(patch: Patch) -> None:
    init = Aggregator.__init__

    def allow_one_more(self: Aggregator, settings: Any, *rest: Any, **named: Any) -> None:
        init(self, settings.model_copy(update={"staleness_max": settings.staleness_max + 1}), *rest, **named)

    patch(Aggregator, "__init__", allow_one_more)


def no_checksum(patch: Patch) -> None:
    decode = shared.messages.decode
    patch(aggregator.admission, "decode", lambda body, most, crc32: decode(body, most))
    patch(shared.messages, "_payload", lambda record: record["payload"])


def the_envelope_has_no_checksum(patch: Patch) -> None:
    decode = shared.messages.decode
    patch(aggregator.admission, "decode", lambda body, most, crc32: decode(body, most))


def the_head_moves_before_the_ids(patch: Patch) -> None:
    commit = InProcessStore.commit

    def piece_by_piece(self: InProcessStore, one: Any) -> None:
        commit(self, replace(one, applied={}))
        if hasattr(one, "tear"):  # its process dies here
            one.tear()
        self._applied.update(one.applied)

    patch(InProcessStore, "commit", piece_by_piece)


def the_head_moves_before_the_buffer(patch: Patch) -> None:
    commit = InProcessStore.commit

    def piece_by_piece(self: InProcessStore, one: Any) -> None:
        before = self._arrays
        commit(self, one)
        if hasattr(one, "tear"):
            self._arrays = before
            one.tear()

    patch(InProcessStore, "commit", piece_by_piece)


def everybody_wins(patch: Patch) -> None:
    commit = InProcessStore.commit

    def without_comparing(self: InProcessStore, one: Any) -> None:
        commit(self, replace(one, expected_revision=self._head.revision))

    patch(InProcessStore, "commit", without_comparing)


def a_version_is_still_written_to(patch: Patch) -> None:
    commit = InProcessStore.commit

    def without_copying(self: InProcessStore, one: Any) -> None:
        commit(self, one)
        if one.model is not None:
            self._models[one.version] = one.model.data

    patch(InProcessStore, "commit", without_copying)


def a_commit_in_doubt_is_folded_again(patch: Patch) -> None:
    commit = Aggregator._commit

    def as_a_new_one(self: Aggregator) -> None:
        try:
            commit(self)
        except Unavailable:
            self._token, self._in_doubt = "", False
            self.state.revision = self._store._inner.head().revision
            raise

    patch(Aggregator, "_commit", as_a_new_one)


def a_commit_in_doubt_is_added_to(patch: Patch) -> None:
    commit = Aggregator._commit

    def and_go_on(self: Aggregator) -> None:
        try:
            commit(self)
        except Unavailable:
            self._in_doubt = False
            raise

    patch(Aggregator, "_commit", and_go_on)


def outcomes_are_counted_before_they_are_durable(patch: Patch) -> None:
    open_commit, observe = Aggregator._open_commit, Account.observe

    def count(self: Aggregator, moved: bool, dropped: list[int]) -> Any:
        observe(self._account, self.metrics, self.settings.job, 0.0)
        return open_commit(self, moved, dropped)

    patch(Aggregator, "_open_commit", count)
    patch(Account, "observe", lambda *_: None)


def what_waits_is_never_committed(patch: Patch) -> None:
    due = Aggregator._commit_due

    def only_versions(self: Aggregator) -> bool:
        return self._advanced and due(self)

    patch(Aggregator, "_commit_due", only_versions)


def parts_are_applied_before_all_are_here(patch: Patch) -> None:
    def take(state: Any, update: Any, size: int, bytes_max: int, now_s: float) -> Any:
        missing = update.part.payload_bytes - len(update.payload)
        return replace(update, payload=update.payload + bytes(missing), part=None), size

    patch(partial, "take", take)


def sound_updates_are_rejected_by_the_rule(patch: Patch) -> None:
    _reject_every_fourth(patch, Reason.RULE)


def sound_updates_are_taken_for_attacks(patch: Patch) -> None:
    _reject_every_fourth(patch, Reason.SUSPICIOUS)


def _reject_every_fourth(patch: Patch, reason: Reason) -> None:
    apply = Intake._apply

    def or_reject(self: Intake, state: State, update: Any, *rest: Any) -> float:
        if int(update.update_id.rpartition("/")[2]) % 4 == 3:
            raise RejectedUpdate(reason, "it looks like it")
        return apply(self, state, update, *rest)

    patch(Intake, "_apply", or_reject)


def clients_have_a_share_where_nobody_said_so(patch: Patch) -> None:
    apply = Intake._apply

    def once(self: Intake, state: State, update: Any, *rest: Any) -> float:
        if state.contributions_of(update.client):
            raise RejectedUpdate(Reason.SURPLUS, "it has its share of the open buffer")
        return apply(self, state, update, *rest)

    patch(Intake, "_apply", once)


def refused_mass_is_not_given_back(patch: Patch) -> None:
    patch(Residual, "_take_back", lambda *_: True)


def refused_mass_is_given_back_twice(patch: Patch) -> None:
    take_back = Residual._take_back

    def twice(self: Residual, *where: Any) -> bool:
        return take_back(self, *where) and take_back(self, *where)

    patch(Residual, "_take_back", twice)


def a_crash_gives_refused_mass_back_again(patch: Patch) -> None:
    forget = Outbox.forget
    patch(Outbox, "forget", lambda self, gone, durable=False: forget(self, [] if durable else gone))


def what_a_codec_leaves_out_is_dropped(patch: Patch) -> None:
    put = Residual.put

    def without_it(self: Residual, body: bytes) -> None:
        if self._vector is not None:
            self._vector = np.zeros_like(self._vector)
        put(self, body)

    patch(Residual, "put", without_it)


MUTANTS: dict[Callable[[Patch], None], set[str]] = {  # -> who may see it first
    ack_before_commit: {"ledger"},
    no_duplicate_check: {"ledger"},
    the_open_buffers_ids_are_forgotten: {"ledger"},
    applied_ids_are_forgotten_too_early: {"ledger"},
    a_refusal_is_not_final: {"ledger"},
    poison_is_requeued: {"liveness"},
    a_rejection_is_acked_at_once: {"ledger"},
    a_rejection_leaves_no_dead_letter: {"ledger"},
    a_delivery_of_an_older_epoch_is_acked: {"ledger"},
    the_outbox_forgets_at_publish: {"ledger"},
    staleness_is_noted_off_by_one: {"ledger"},
    staleness_is_weighed_off_by_one: {"oracle"},
    staleness_is_limited_off_by_one: {"ledger"},
    no_checksum: {"oracle", "ledger"},
    the_envelope_has_no_checksum: {"oracle", "ledger"},
    the_head_moves_before_the_ids: {"ledger"},
    the_head_moves_before_the_buffer: {"oracle", "mass"},
    everybody_wins: {"ledger", "oracle"},
    a_version_is_still_written_to: {"ledger"},
    a_commit_in_doubt_is_folded_again: {"ledger"},
    a_commit_in_doubt_is_added_to: {"ledger"},
    outcomes_are_counted_before_they_are_durable: {"ledger"},
    what_waits_is_never_committed: {"liveness"},
    parts_are_applied_before_all_are_here: {"oracle", "ledger"},
    sound_updates_are_rejected_by_the_rule: {"ledger"},
    sound_updates_are_taken_for_attacks: {"ledger"},
    clients_have_a_share_where_nobody_said_so: {"ledger"},
    refused_mass_is_not_given_back: {"mass"},
    refused_mass_is_given_back_twice: {"mass"},
    a_crash_gives_refused_mass_back_again: {"mass"},
    what_a_codec_leaves_out_is_dropped: {"mass"},
}

# Harmless unless the broker restarts with a consumer's acks under way, which then dies before it gets to what it acked.
CONDITIONS: dict[Callable[[Patch], None], dict[str, Any]] = {  # what `schedule.draw` is told beside the seed
    a_delivery_of_an_older_epoch_is_acked: {
        "actions": 80,
        "chances": Faults(broker_restart=0.5, aggregator_killed=0.4),
        "job": Job(
            {
                "rule": "fedbuff", "buffer_size": 3, "codec": "int8", "staleness": "constant", "staleness_max": 100,
                "prefetch": 64, "commit_interval_s": 0.0, "commit_age_max_s": 6.0, "versions_kept": 2,
            },
            3, (3, 5),
        ),
    },
    the_envelope_has_no_checksum: {"chances": Faults(corrupt=0.5, corrupt_copy=0.3)},
}  # fmt: skip
