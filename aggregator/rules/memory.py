"""What a rule remembers of every worker: the update it sent last, in the store, and when it was heard from.

A record keeps an update as it came - codec, payload and the factor it is taken with - when that is no longer than int8
makes it; a longer one is written anew in int8, and then the delta *as int8 wrote it* is also what the rule adds now. So
what is subtracted later is what was added, whatever the codec: nothing drifts off but float32's last bit.
"""

import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from aggregator.arrival import Arrival
from aggregator.record import Delta, read_record, write_record
from aggregator.state import State
from shared.compression import decode, parse
from shared.layout import Layout
from shared.vector import Vector

log = logging.getLogger("fedmq.aggregator")

HEARD = "heard"  # facts: client -> base_version of its last update, the one longest unheard first
SHORT = parse("int8 | zstd")  # a payload that is no longer than this codec's stays as it came
SHORTENED = parse("int8(nearest)")
SPARE_BYTES = 1024  # so that small models' updates stay as they came


class Shortener:
    """Writes deltas anew in int8; keeps one scratch vector of model size from the first of them on."""

    def __init__(self) -> None:
        self._scratch: Vector | None = None

    def record_of(self, arrival: Arrival, layout: Layout) -> tuple[bytes, Delta]:
        """Return the record of an update, and its delta as the record says it.

        Args:
            arrival: the update.
            layout: of the model.
        """
        update, delta = arrival.update, Delta(arrival.delta, arrival.weight)
        if len(update.payload) > SHORT.payload_bytes_max(layout) + SPARE_BYTES:
            return self.sum_of([(delta, 1.0)], layout)
        return write_record(update.codec, update.payload, delta.scale), delta

    def sum_of(self, parts: Sequence[tuple[Delta, float]], layout: Layout) -> tuple[bytes, Delta]:
        """Return the record of sum_i factor_i delta_i in int8, and that sum as the record says it.

        Args:
            parts: deltas and their factors.
            layout: of the model.
        """
        if self._scratch is None:
            self._scratch = np.empty(layout.num_params, np.float32)
        self._scratch.fill(0.0)
        for delta, factor in parts:
            delta.add_into(self._scratch, factor)
        encoded = SHORTENED.encode(self._scratch, layout, np.random.default_rng(0))  # nearest: nothing random in it
        codec = {"name": SHORTENED.name, **encoded.params}
        return write_record(codec, encoded.payload), Delta(decode(codec, encoded.payload, layout))


def recall(state: State, name: str) -> Delta | None:
    """Return a recorded delta; None when there is none, or the store lost it.

    A rival that has committed may have dropped it: then this state is about to be reloaded, and nothing of it counts.

    Args:
        state: not changed.
        name: of the record.
    """
    if name not in state.kept.names:
        return None
    record = state.kept.get(name)
    if record is None:
        log.error("record %s is not stored; it counts as zero", name)
        return None
    return read_record(record, state.model.layout)


@dataclass(frozen=True, slots=True)
class Exchange:
    """What an update changes in the memory.

    Attributes:
        new: the delta that is remembered of its client now.
        own: the one remembered until now; None for a client that is new.
        displaced: those of clients that had to leave.
    """

    new: Delta
    own: Delta | None
    displaced: tuple[Delta, ...]

    @property
    def old(self) -> tuple[Delta, ...]:
        """All that is no longer remembered."""
        return (*self.displaced, self.own) if self.own is not None else self.displaced


@dataclass(slots=True)
class Memory:
    """The last update of at most n clients.

    A further client takes the place of the one heard from longest ago, whose delta leaves with it.

    Attributes:
        clients: n >= 1.
        shortener: writes long updates anew.
        warned: whether the log says already that a client was displaced.
    """

    clients: int
    shortener: Shortener = field(default_factory=Shortener)
    warned: bool = False

    def exchange(self, state: State, arrival: Arrival, leaving: Collection[str] = ()) -> Exchange:
        """Remember an update in place of its client's last one.

        Args:
            state: its `kept` and `facts` are changed, after all has been read.
            arrival: the update.
            leaving: other clients to forget.
        """
        update, heard = arrival.update, self.heard(state)
        gone = [*leaving, *self.displaced(heard, update.client, leaving)]
        own = recall(state, name_of(update.client))
        record, new = self.shortener.record_of(arrival, state.model.layout)
        displaced = self.release(state, gone)
        state.kept.put(name_of(update.client), record)
        heard.pop(update.client, None)
        heard[update.client] = update.base_version
        return Exchange(new, own, displaced)

    def release(self, state: State, clients: Collection[str]) -> tuple[Delta, ...]:
        """Forget clients; return what was remembered of them.

        Args:
            state: its `kept` and `facts` are changed, after all has been read.
            clients: to forget; one that is not remembered is no matter.
        """
        deltas = [recall(state, name_of(client)) for client in clients]
        for client in clients:
            state.kept.drop(name_of(client))
            self.heard(state).pop(client, None)
        return tuple(delta for delta in deltas if delta is not None)

    def heard(self, state: State) -> dict[str, int]:
        """Return client -> base_version of its last update, the one longest unheard first; part of the state."""
        table: dict[str, int] = state.facts.setdefault(HEARD, {})
        return table

    def displaced(self, heard: Mapping[str, object], client: str, leaving: Collection[str] = ()) -> list[str]:
        """Return who must go so that `client` fits, longest unheard first.

        Args:
            heard: who is remembered, in the order heard.
            client: whose update comes.
            leaving: who goes anyway.
        """
        others = [name for name in heard if name != client and name not in leaving]
        gone = others[: max(0, len(others) + 1 - self.clients)]
        if gone and not self.warned:
            self.warned = True
            log.warning(
                "more workers than FEDMQ_CLIENTS=%d: %s takes the place of %s, heard from longest ago; raise it if "
                "both are at work",
                self.clients, client, gone[0],
            )  # fmt: skip
        return gone


def name_of(client: str) -> str:
    """Return the name of a client's record."""
    return f"client:{client}"
