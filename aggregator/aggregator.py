"""The aggregator's loop.

    consume -> decode + validate -> drop duplicates -> weigh by staleness -> fold -> commit -> ack

State moves in memory first and is committed in groups: only the last version between two commits is written,
because nobody can have pulled the others. Nothing is acked before the commit that holds its effect is durable.
"""

import json
import logging
import threading
import uuid
from dataclasses import replace
from typing import Any

from aggregator.account import APPLIED, Account
from aggregator.downlink import Downlink
from aggregator.intake import Intake
from aggregator.retention import droppable
from aggregator.state import State, forget_old_ids, from_stored, open_buffer_kind, rule_of_state, small_part
from shared.clock import Clock
from shared.config import AggregatorSettings
from shared.errors import (
    Reason,
    RejectedUpdate,
    SettingsError,
    StoreUnavailable,
    Unavailable,
    VersionConflict,
)
from shared.metrics import AggregatorMetrics
from shared.published import NOTHING
from shared.store.ports import REFUSED_IDS_MAX, Commit, StateStore, Stored
from shared.transport.ports import Delivery, UpdateSource

log = logging.getLogger("fedmq.aggregator")

KEPT_BYTES_MAX = 64 * 2**20  # of records that changed: a commit is due, so that memory does not grow with the workers
NOT_STORED = -1  # revision of a state that went another way than the store
RETRY_S = (0.1, 5.0)  # first and longest wait after a store did not answer
ANNOUNCED = (  # the settings a worker, or `fedmq replay`, needs to know
    "rule", "buffer_size", "server_lr", "alpha", "staleness", "staleness_max", "weight_by_samples", "codec",
    "update_bytes_max", "message_bytes_max", "part_bytes", "downlink", "snapshots", "server_optimizer", "robust",
    "clients", "trusted_client",
)  # fmt: skip


class Aggregator:
    """One aggregator of one job. `step` does a bounded piece of work; `run` repeats it until stopped.

    Args:
        settings: checked settings.
        source: where updates come from.
        store: where the state lives; it must hold a version already.
        clock: time.
        metrics: what it counts.
        poll_s: how long a step may wait for a first delivery, seconds.
    """

    def __init__(
        self, settings: AggregatorSettings, source: UpdateSource, store: StateStore, clock: Clock,
        metrics: AggregatorMetrics, poll_s: float = 1.0,
    ) -> None:  # fmt: skip
        self.settings, self.metrics, self.stop = settings, metrics, threading.Event()
        self._source, self._store, self._clock, self._poll_s = source, store, clock, poll_s
        self._intake = Intake(settings, store, clock)
        self._rule = self._intake.rule
        self._held: Delivery | None = None  # received, not yet settled
        self._pending: list[Delivery] = []  # settled in memory, to be acked after the next commit
        self._account = Account()
        self._token = ""
        self._in_doubt = False  # a commit was not answered: it may have happened
        self._retry_s = RETRY_S[0]
        self._pending_since = self._committed_at = self.stepped_at = clock.monotonic()
        self._advanced = False
        self.problem: str | None = None
        metrics.begin(settings.job)
        self._downlink = Downlink(settings, store)
        stored = store.load()
        if stored is None:
            raise SettingsError(f"job {settings.job!r} has no model yet")
        self.state = self._adopt(stored)

    def step(self) -> bool:
        """Receive a delivery, settle it, commit if due; tell whether there was work.

        Raises:
            StoreUnavailable: nothing is lost; call again, and the same is tried again.
        """
        self.stepped_at = self._clock.monotonic()
        if self._in_doubt:  # the same commit again, before anything else is folded that would not be in it
            self._commit()
            return True
        if self._held is None:
            self._held = next(iter(self._source.receive(1, self._wait_s())), None)
        worked = self._held is not None
        newest = True
        if not self._uncommitted:
            newest = self._catch_up(reload=worked)
            self._pending_since = self._clock.monotonic()
        if self._held is not None:
            self._settle(self._held)
            self._held = None
        if newest:  # a standby knows nothing of the parts that came since it looked
            self._intake.give_up_abandoned(self.state, self._account)
        if self._commit_due():
            self._commit()
        return worked

    def run(self) -> None:
        """Step until stopped, then commit what is open."""
        while not self.stop.is_set():
            try:
                self.step()
                self.problem, self._retry_s = None, RETRY_S[0]
            except Unavailable as error:
                self.problem = str(error)
                self.metrics.store_failures.inc()
                log.warning("%s; going on when it answers", error)
                self._clock.wait(self.stop, self._retry_s)
                self._retry_s = min(RETRY_S[1], 2 * self._retry_s)
        self.finish()

    def finish(self) -> None:
        """Commit what is open, once; what cannot be committed now will be delivered again."""
        try:
            if self._uncommitted:
                self._commit()
        except Unavailable as error:
            log.warning("%s; the uncommitted updates stay in the queue", error)

    def _settle(self, delivery: Delivery) -> None:
        """Decide what becomes of one delivery and note it; only a commit makes it final."""
        grown = False
        self.metrics.update_bytes.observe(len(delivery.body))
        try:
            with self.metrics.decode.time():
                grown = self._intake.take_in(self.state, self._account, delivery)
        except RejectedUpdate as error:
            if error.reason is Reason.BASE_VERSION and self._rival_committed():
                self._reload()
                return
            self._source.reject(delivery, error.reason, error.detail)
            self._intake.reject(self.state, self._account, delivery.client, delivery.update_id, error)
        self._pending.append(replace(delivery, body=b""))  # a window of bodies would outweigh the model
        if grown and self._rule.advance(self.state):
            self.state.buffer_since, self._advanced = 0.0, True
            forget_old_ids(self.state, self._floor())
        self.metrics.buffered.set(len(self.state.buffer))

    @property
    def _uncommitted(self) -> bool:
        """Whether anything happened since the last commit."""
        return bool(self._pending or self._account.entries)

    def _commit_due(self) -> bool:
        """Tell whether to commit now.

        After a new version once the interval has passed (the buffer is empty then, which halves what is written);
        when an accepted update has waited long enough; when the prefetch window runs full.
        """
        now = self._clock.monotonic()
        if not self._uncommitted:
            return False
        held = len(self._pending)
        fresh = self._advanced and not self.state.buffer
        if fresh and (
            now - self._committed_at >= self.settings.commit_interval_s or 2 * held >= self.settings.prefetch
        ):
            return True
        if self.state.kept.changed_bytes >= KEPT_BYTES_MAX:
            return True
        aged = self._advanced and now - self._committed_at >= 2 * self.settings.commit_interval_s
        late = now - self._pending_since >= self.settings.commit_age_max_s
        return aged or late or 4 * held >= 3 * self.settings.prefetch

    def _wait_s(self) -> float:
        """Return how long to wait for a first delivery without missing a commit that falls due."""
        if not self._uncommitted:
            return self._poll_s
        due = self._pending_since + self.settings.commit_age_max_s
        if self._advanced:
            due = min(due, self._committed_at + self.settings.commit_interval_s * (2 if self.state.buffer else 1))
        return min(self._poll_s, max(0.0, due - self._clock.monotonic()))

    def _commit(self) -> None:
        """Make everything since the last commit durable in one step, then ack it."""
        state = self.state
        self._token = self._token or uuid.uuid4().hex  # the same when a commit is repeated: it may have happened
        moved = state.version != state.committed_version
        dropped = self._versions_to_drop() if moved else []
        state.totals, before = self._account.add_to(state.totals), state.totals
        commit = self._open_commit(moved, dropped)
        try:
            with self.metrics.commit.time():
                self._store.commit(commit)
        except VersionConflict as error:
            log.warning("another aggregator, a rollback or a restore committed (%s): reloading", error)
            self._reload()
            return
        except Unavailable:
            state.totals, self._in_doubt = before, True
            raise
        self._source.ack(self._pending)
        self._committed(moved)

    def _open_commit(self, moved: bool, dropped: list[int]) -> Commit:
        """Return everything since the last commit."""
        state = self.state
        arrays = self._arrays()
        changed = arrays if state.arrays_changed else tuple(name for name in arrays if name not in state.stored_arrays)
        return Commit(
            expected_revision=state.revision,
            token=self._token,
            version=state.version,
            model=state.model if moved else None,
            arrays={name: state.arrays[name] for name in changed},
            arrays_unchanged=[name for name in arrays if name not in changed],
            state=small_part(state, self._rule.buffer_kind, self._rule.name, arrays),
            applied={e["id"]: e["base_version"] for e in self._account.entries if e["outcome"] == APPLIED},
            applied_floor=self._floor(),
            ledger=json.dumps(self._account.entries),
            clients=self._account.clients,
            meta=self._account.meta(),
            dropped_versions=dropped,
            now=self._clock.now(),
            outcomes=self._account.outcomes,
            publication=self._downlink.publish(state.version, state.model) if moved else NOTHING,
            kept=dict(state.kept.changes),
            refused=dict(state.refused_now),
        )

    def _arrays(self) -> tuple[str, ...]:
        """Return the names of the vectors that go with the state: the buffer's only while it holds something."""
        return (*self._rule.arrays, *(self._rule.sums if self.state.buffer else ()))

    def _committed(self, moved: bool) -> None:
        """Note in memory what is durable now."""
        state = self.state
        state.revision += 1
        state.kept.committed()
        state.refused_now, state.arrays_changed = {}, False
        state.stored_arrays = self._arrays()
        while len(state.refused) > REFUSED_IDS_MAX:
            del state.refused[next(iter(state.refused))]
        if moved:
            state.committed_version = state.version
            self._downlink.committed(self.metrics)
        self._account.observe(self.metrics, self.settings.job, self._clock.now())
        self.metrics.version.set(state.version)
        self.metrics.buffered.set(len(state.buffer))
        self.metrics.commits.inc()
        self.metrics.committed_at.set(self._clock.now())
        self.metrics.serving.set(1)
        self._forget_pending()
        self._committed_at = self._clock.monotonic()

    def _forget_pending(self) -> None:
        self._pending, self._account, self._token = [], Account(), ""
        self._advanced = self._in_doubt = False

    def _catch_up(self, reload: bool) -> bool:
        """Notice that another aggregator has committed; tell whether the state is the newest, as after a reload.

        Args:
            reload: there is work, so the state must be the newest; otherwise only the metrics follow.
        """
        head = self._store.head()
        if head is None:
            raise self._gone()
        self.metrics.version.set(head.version)
        if head.revision != self.state.revision:
            self.metrics.serving.set(0)
        if reload and head.revision != self.state.revision:
            log.info("taking over at revision %d, version %d", head.revision, head.version)
            self.state = self._adopt(self._load())
        return head.revision == self.state.revision

    def _rival_committed(self) -> bool:
        """Tell whether the store has moved on without us: then an unknown base_version may be a rival's."""
        head = self._store.head()
        return head is not None and head.revision != self.state.revision

    def _reload(self) -> None:
        """Go back to what is stored and have the rest delivered again.

        Raises:
            StoreUnavailable: it cannot be read now; the next delivery has it read.
        """
        self._held, self.state.revision = None, NOT_STORED
        self._forget_pending()
        self._source.recover()
        self.state = self._adopt(self._load())

    def _load(self) -> Stored:
        stored = self._store.load()
        if stored is None:
            raise self._gone()
        return stored

    def _gone(self) -> StoreUnavailable:
        return StoreUnavailable(
            f"job {self.settings.job!r} is gone from the store: `fedmq restore FILE` brings a backup back"
        )

    def _adopt(self, stored: Stored) -> State:
        """Take over a stored state; an open buffer of another kind is refused."""
        self._downlink.adopt(stored.head)  # first: it reads, and may find no server
        self._forget_pending()
        kind = open_buffer_kind(stored)
        if kind not in (None, self._rule.buffer_kind):
            raise SettingsError(
                f"the job's open buffer is of {kind}, these settings are of {self._rule.buffer_kind}: start once more "
                "with the old ones until the next version is made (with the smallest FEDMQ_BUFFER_SIZE they allow)"
            )
        if self._rule.needs.base and stored.head.published:
            raise SettingsError(
                f"workers hold version {stored.head.version} as the downlink published it, and rule {self._rule.name} "
                "needs the very weights they started from: start once with FEDMQ_RULE=fedbuff and FEDMQ_DOWNLINK=off "
                "until the next version is made"
            )
        if self._rule.needs.start and stored.head.version and rule_of_state(stored) != self._rule.name:
            raise SettingsError(
                f"rule {self._rule.name} counts from version 0, and this job is at version {stored.head.version} by "
                f"rule {rule_of_state(stored)}: export its model and begin a new job from it"
            )
        state = from_stored(stored, self._rule.name, self._rule.sums, self._rule.arrays, self._store.kept)
        clients = self.settings.clients
        if self._rule.needs.start and state.facts.setdefault("clients", clients) != clients:
            raise SettingsError(
                f"rule {self._rule.name} began with FEDMQ_CLIENTS={state.facts['clients']} and its sum is over those: "
                f"it cannot go on with {clients}; begin a new job from its model"
            )
        self._intake.begin(state.model.layout)
        self.metrics.version.set(state.version)
        self.metrics.parameters.set(state.model.layout.num_params)
        self.metrics.buffered.set(len(state.buffer))
        return state

    def _floor(self) -> int:
        """Return the oldest base_version that is not too stale."""
        return max(0, self.state.floor, self.state.version - self.settings.staleness_max)

    def _versions_to_drop(self) -> list[int]:
        """Return the stored versions nobody needs; the store itself keeps one that is given a tag meanwhile.

        Raises:
            StoreUnavailable: nothing was committed.
        """
        settings, needs, floor = self.settings, self._rule.needs, self._floor()
        older = [entry for entry in self._store.versions() if entry.version < self.state.version]
        return droppable(
            older, settings.versions_kept - 1, settings.versions_age_max_s, settings.versions_every,
            lambda v: (needs.base and v >= floor) or (needs.start and v == 0), self._clock.now(),
        )  # fmt: skip

    def describe(self) -> dict[str, Any]:
        """Return what a worker needs to know of the job."""
        return {name: getattr(self.settings, name) for name in ANNOUNCED}
