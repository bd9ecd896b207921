"""What becomes of a delivery: a duplicate, refused as stale, a part to keep, rejected, or folded into the buffer.

Everything here happens in memory; only a commit makes it final. The first outcome of an update is its last: what
comes again under the id of an applied or refused one is a duplicate.
"""

import math
from collections import OrderedDict

from aggregator import partial
from aggregator.account import APPLIED, DUPLICATE, STALE, Account
from aggregator.admission import Admission, admit, delta_of
from aggregator.arrival import Arrival
from aggregator.norm_sample import NormSample
from aggregator.reject_log import RejectLog
from aggregator.robust import guards_of
from aggregator.rules import rule_of
from aggregator.staleness import parse_staleness
from aggregator.state import State
from shared.choices import parse
from shared.clock import Clock
from shared.compression import Decoded
from shared.config import AggregatorSettings
from shared.errors import Reason, RejectedUpdate, VersionGone
from shared.layout import Layout
from shared.messages import Update
from shared.rules import RULE_TABLE, RULES
from shared.store.ports import StateStore
from shared.transport.ports import Delivery
from shared.vector import Vector

BASES_HELD = 2  # base versions FedAsync keeps at hand, each of model size


class Intake:
    """Takes deliveries in, by the job's settings.

    Args:
        settings: checked settings.
        store: where base versions are read from.
        clock: time.
    """

    def __init__(self, settings: AggregatorSettings, store: StateStore, clock: Clock) -> None:
        self.rule = rule_of(settings)
        self._settings, self._store, self._clock = settings, store, clock
        self._guards = guards_of(settings)
        self._said = RejectLog()
        self._norms = NormSample()
        weighed = "staleness" in RULES[parse(settings.rule, RULE_TABLE).name].uses
        self._weight = parse_staleness(settings.staleness if weighed else "constant")
        self._bases: OrderedDict[int, Vector] = OrderedDict()
        self._look_s = -math.inf  # before this nothing can be abandoned; monotonic

    def begin(self, layout: Layout) -> None:
        """Start from a state that was just loaded."""
        s = self._settings
        self._admission = Admission(s.job, layout, s.message_bytes_max, s.update_bytes_max)
        self._bases.clear()
        self._look_s = -math.inf

    def take_in(self, state: State, account: Account, delivery: Delivery) -> bool:
        """Decide what becomes of a delivery and note it; tell whether the buffer has grown.

        Raises:
            RejectedUpdate: it is to go to the dead letters; call `reject`.
            StoreUnavailable: nothing has changed; call again.
        """
        update = admit(delivery, self._admission, state.committed_version)
        try:
            return self._decide(state, account, delivery, update)
        except RejectedUpdate:
            partial.drop(state, update.client, update.update_id)  # `reject` may not know whose parts these are
            raise

    def _decide(self, state: State, account: Account, delivery: Delivery, update: Update) -> bool:
        """Do what `take_in` says with an admitted update, or a part of one."""
        size = len(delivery.body)
        staleness, weight, outcome = state.version - update.base_version, 0.0, APPLIED
        first = None if delivery.replayed else state.refused.get(update.update_id)
        if first not in (None, STALE) and update.part is None:  # its dead letter may not have been safe before a crash
            raise RejectedUpdate(Reason(str(first)), "rejected before, and delivered once more")
        if first or update.update_id in state.applied:
            outcome = DUPLICATE
        elif staleness > self._settings.staleness_max or update.base_version < state.floor:
            outcome = STALE
            state.refuse(update.update_id, STALE)
            partial.drop(state, update.client, update.update_id)
        else:
            whole = self._whole(state, account, update, size)
            if whole is None:
                return False
            update, size = whole
            delta = delta_of(update, self._admission)
            weight = self._apply(state, update, delta, staleness)
            account.norms += self._norms.of(delta)
            partial.drop(state, update.client, update.update_id)
        now = self._clock.now()
        account.settle(update, size, outcome, staleness, weight, state.version, now)
        if outcome != APPLIED or update.client == self._guards.trusted_client:  # whose updates are in no buffer
            return False
        state.buffer_since = state.buffer_since or now
        return True

    def reject(self, state: State, account: Account, client: str, update_id: str, error: RejectedUpdate) -> None:
        """Note a rejection; it is the update's outcome unless that had one, or somebody else may have sent it."""
        self._said.note(client, error, self._clock.monotonic())
        known = update_id in state.applied or update_id in state.refused
        if account.reject(client, update_id, error, state.version, self._clock.now(), known):
            state.refuse(update_id, str(error.reason))
            partial.drop(state, client, update_id)

    def give_up_abandoned(self, state: State, account: Account) -> None:
        """Reject updates of which no part came for too long."""
        age_max_s, now_s = self._settings.parts_age_max_s, self._clock.monotonic()
        self._said.tell(now_s)
        if now_s <= self._look_s:  # to look at thousands in every step would cost more than the step
            return
        for client in partial.abandoned(state, age_max_s, now_s):
            self._give_up(state, account, client, f"no part came for {age_max_s:g} s (parts_age_max_s)")
        self._look_s = age_max_s + min((held.touched_s for held in state.partial.values()), default=now_s)

    def _whole(self, state: State, account: Account, update: Update, size: int) -> tuple[Update, int] | None:
        """Return an update and the bytes of its messages; None while parts of it are missing."""
        if update.part is None:
            return update, size
        held = state.partial.get(update.client)
        if held is not None and held.update_id != update.update_id:
            self._give_up(state, account, update.client, "a newer update of its client came")
        return partial.take(state, update, size, self._settings.parts_bytes_max, self._clock.monotonic())

    def _give_up(self, state: State, account: Account, client: str, why: str) -> None:
        held = state.partial[client]
        detail = f"{len(held.sizes)} of {held.count} parts are here; {why}"
        self.reject(state, account, client, held.update_id, RejectedUpdate(Reason.INCOMPLETE, detail))
        partial.drop(state, client, held.update_id)  # also of a replayed one, which had its outcome before

    def _apply(self, state: State, update: Update, delta: Decoded, staleness: int) -> float:
        """Have an update change the state, once; return its weight, for the ledger."""
        if update.client == self._guards.trusted_client:
            self._guards.trust(state, update, delta)
            weight = 0.0
        else:
            weight = self._fold(state, update, delta, staleness)
        state.applied[update.update_id] = update.base_version
        state.arrays_changed = True
        return weight

    def _fold(self, state: State, update: Update, delta: Decoded, staleness: int) -> float:
        """Have the guards look at an update and the rule take it in; return its factor."""
        base = self._base(update.base_version) if self.rule.needs.base else None
        judged = Arrival(update, delta, staleness, 1.0)
        weight = self._weight(staleness) * self._guards.weigh(state, judged)
        weight = self.rule.fold(state, Arrival(update, delta, staleness, weight, base))
        self._guards.applied(state, judged)
        return weight

    def _base(self, version: int) -> Vector:
        """Return the weights of a published version, from the few at hand or from the store."""
        if version not in self._bases:
            try:
                self._bases[version] = self._store.model(version).weights
            except VersionGone as error:
                raise RejectedUpdate(Reason.BASE_VERSION, f"base_version {version} is not stored: {error}") from error
            while len(self._bases) > BASES_HELD:
                self._bases.popitem(last=False)
        self._bases.move_to_end(version)
        return self._bases[version]
