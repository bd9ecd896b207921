"""What anybody outside could see of a run: all that the checkers are told.

What the workers handed to `publish` and which of it was confirmed, what their disks held, which models were seen under
which version, what the aggregators counted. The ledger and the stored state are read from the store at the end.
"""

import hashlib
from collections import Counter
from dataclasses import dataclass

import msgpack
import numpy as np
import numpy.typing as npt

from shared.model_image import ModelImage
from shared.store.inprocess import InProcessStore
from shared.store.ports import Head
from shared.transport.ports import Outgoing

Exact = npt.NDArray[np.float64]


class Violation(Exception):  # noqa: N818 - a finding about the system, not an error of this program
    """A promise was broken.

    Attributes:
        checker: who found it: ledger, oracle, mass, liveness or crash.
    """

    def __init__(self, checker: str, message: str) -> None:
        super().__init__(f"{checker}: {message}")
        self.checker = checker


@dataclass(frozen=True, slots=True)
class Made:
    """A finished update, as it was found on its worker's disk.

    Attributes:
        update_id: its id.
        client: who made it.
        number: the last part of its id.
        base_version: trained from.
        num_samples: as reported.
        delta: what training changed, float64 [n].
        decoded: what its bytes decode to, float64 [n].
        carries: its mass is to come back when it is refused.
    """

    update_id: str
    client: str
    number: int
    base_version: int
    num_samples: int
    delta: Exact
    decoded: Exact
    carries: bool


class History:
    """The observations of one run.

    Attributes:
        made: update_id -> finished update.
        handed: update_id -> what its worker gave to `publish`.
        confirmations: update_id -> bodies that were confirmed to it.
        open_attempts: update_id -> how many publishes of it were never confirmed.
        needed: update_id -> messages it travels as, where that is more than one.
        damaged: ids of which a message arrived that is not what was handed over.
        bodies: what the broker took, and the ids it was published under; short ones may be the same.
        replayed: ids of which an operator sent a dead letter once more.
        gone: ids that were lost with a disk before they were confirmed.
        models: version -> its file, as first seen.
        heads: where the job stood after each commit.
        starts: version -> weights that workers trained from.
        counted: outcome -> how many updates the aggregators counted in their metrics.
    """

    def __init__(self) -> None:
        self.made: dict[str, Made] = {}
        self.handed: dict[str, set[bytes]] = {}
        self.confirmations: dict[str, set[bytes]] = {}
        self.open_attempts: dict[str, int] = {}
        self.needed: dict[str, int] = {}
        self.damaged: set[str] = set()
        self.bodies: dict[bytes, set[str]] = {}
        self.replayed: set[str] = set()
        self.gone: set[str] = set()
        self.models: dict[int, bytes] = {}
        self.heads: list[Head] = []
        self.starts: dict[int, bytes] = {}
        self.counted: Counter[str] = Counter()

    def attempted(self, message: Outgoing) -> "Attempt":
        """Note that a worker publishes."""
        bodies = self.handed.setdefault(message.update_id, set())
        if message.body not in bodies:
            bodies.add(message.body)
            if message.is_part:
                self.needed[message.update_id] = msgpack.unpackb(message.body)["parts"]
        return Attempt(self, message.update_id, message.body)

    def accepted(self, message: Outgoing) -> None:
        """Note that a message is in the broker's queue."""
        self.bodies.setdefault(message.body, set()).add(message.update_id)
        if message.body not in self.handed[message.update_id]:
            self.damaged.add(message.update_id)

    def confirmed(self) -> set[str]:
        """Return the ids of the updates that were confirmed as a whole."""
        return {i for i, bodies in self.confirmations.items() if len(bodies) >= self.needed.get(i, 1)}

    def saw_model(self, version: int, image: ModelImage) -> None:
        """Note the weights somebody found under a version.

        Raises:
            Violation: they are not what was found there before.
        """
        data = image.data.tobytes()
        known = self.models.setdefault(version, data)
        if known != data:
            raise Violation("ledger", f"version {version} is not what it was: versions are immutable")

    def saw_start(self, version: int, weights: npt.NDArray[np.float32]) -> None:
        """Note the weights a worker trains from.

        Raises:
            Violation: another worker's of the same version differ.
        """
        data = weights.tobytes()
        if self.starts.setdefault(version, data) != data:
            raise Violation("ledger", f"two workers train from different weights of version {version}")

    def committed(self, store: InProcessStore) -> None:
        """Note where the job stands after a commit; a repeated one changes nothing.

        Raises:
            Violation: a revision or version is skipped or goes back, or the head's hash is not its model's.
        """
        head = store.head()
        assert head is not None, "a commit found one"  # noqa: S101
        last = self.heads[-1] if self.heads else None
        if last is not None and head == last:
            return
        if last is not None and (head.revision != last.revision + 1 or head.version < last.version):
            raise Violation("ledger", f"the head moved from {_where(last)} to {_where(head)}")
        self.heads.append(head)
        image = store.model(head.version)
        self.saw_model(head.version, image)
        if hashlib.sha256(self.models[head.version]).hexdigest() != head.sha256:
            raise Violation("ledger", f"the head's hash is not that of version {head.version}")


class Attempt:
    """One publish that has no answer yet."""

    def __init__(self, history: History, update_id: str, body: bytes) -> None:
        self._history, self._update_id, self._body = history, update_id, body
        history.open_attempts[update_id] = history.open_attempts.get(update_id, 0) + 1

    def confirmed(self) -> None:
        """Note that it was confirmed."""
        self._history.open_attempts[self._update_id] -= 1
        self._history.confirmations.setdefault(self._update_id, set()).add(self._body)


def _where(head: Head) -> str:
    return f"revision {head.revision}, version {head.version}"
