"""The mass checker: whatever fails when, a worker's deltas are all accounted for, each once.

For every worker, in float64, coordinate by coordinate, with error feedback:

    sum of the deltas of its finished updates
        = sum of what its updates' bytes decode to, but for those whose mass it has taken back
        + the residual on its disk + what of it decayed

An update whose mass was taken back is one that the ledger calls refused, that carried a residual, and whose file is
gone from the disk. All others count as they are: applied, under way, or refused and not settled yet. Nothing here uses
the worker's own arithmetic: deltas come from the training, decoded bytes from the codec, outcomes from the ledger, and
what decayed from ages that are reckoned here from the versions of the trainings.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ops.torture.history import Exact, Made, Violation

REFUSED = ("stale", "rejected")
ROUNDING = 1e-6  # float32 rounds each of an update's few additions to 6e-8 of what is added
HORIZONS = 10  # mass stays whole for so many times staleness_max versions


class Mass:
    """The account of one worker's disk.

    Args:
        num_params: of the model.
        horizon: age in versions from which mass decays.
    """

    def __init__(self, num_params: int, horizon: int) -> None:
        self.made: dict[str, Made] = {}
        self._births: dict[str, float] = {}  # update_id -> mean version at which what it carries was trained
        self._birth, self._horizon = 0.0, max(1, horizon)
        self._decayed = np.zeros(num_params)

    def add(self, made: Made, residual: Exact, returned: Sequence[str]) -> None:
        """Book a finished update.

        Args:
            made: the update.
            residual: on the disk before it was made.
            returned: ids of the refused updates whose mass came back for it, in order.
        """
        version = made.base_version
        parts = [(residual, version - self._birth)]
        for update_id in returned:
            back = self.made[update_id]
            flight = min(version - back.base_version, self._horizon)
            parts.append((back.decoded, back.base_version - self._births[update_id] + flight))
        total, age = np.zeros_like(residual), 0.0
        for mass, its_age in [*parts, (made.delta, 0.0)]:
            gone = 1.0 - 2.0 ** -max(0.0, its_age / self._horizon - 1.0)
            if gone:
                self._decayed += gone * mass
            left = (1.0 - gone) * mass
            norm, more = float(np.sqrt(total @ total)), float(np.sqrt(left @ left))
            age = (norm * age + more * min(its_age, self._horizon)) / (norm + more) if norm + more else 0.0
            total += left
        self._birth = version - age
        self._births[made.update_id] = self._birth
        self.made[made.update_id] = made

    def check(self, client: str, outcomes: Mapping[str, str], files: Mapping[str, bytes]) -> None:
        """Make sure that the account is even.

        Args:
            client: whose it is.
            outcomes: update_id -> first outcome in the ledger.
            files: on its disk.

        Raises:
            Violation: mass is missing or surplus.
        """
        here, residual = numbers(files), residual_of(files, self._decayed.size)
        total, size = -residual - self._decayed, np.abs(residual) + np.abs(self._decayed) + 1e-3
        for update_id, made in self.made.items():
            back = outcomes.get(update_id) in REFUSED and made.carries and made.number not in here
            total += made.delta if back else made.delta - made.decoded
            size += np.abs(made.delta) + np.abs(made.decoded)
        imbalance = float(np.max(np.abs(total) / size)) / ROUNDING
        if not imbalance <= 1.0:
            worst = int(np.argmax(np.abs(total) / size))
            raise Violation(
                "mass", f"{client}'s mass is off by {total[worst]:.4g} of {size[worst]:.4g} at parameter {worst}: "
                f"{imbalance:.3g} times what rounding explains",
            )  # fmt: skip


def check_open_sum(open_sum: Exact, stored: Mapping[str, Any]) -> None:
    """Make sure that the open buffer holds what was applied since the last version and nothing else.

    Args:
        open_sum: what the applied updates since the last version come to.
        stored: model-size arrays of the stored state.

    Raises:
        Violation: it does not.
    """
    found = stored.get("delta_sum")
    there = np.zeros_like(open_sum) if found is None else found.astype(np.float64)
    if not np.allclose(there, open_sum, rtol=1e-4, atol=1e-4):
        off = float(np.abs(there - open_sum).max())
        raise Violation("mass", f"the stored buffer is off by {off:.4g} from the updates that were applied to it")


def residual_of(files: Mapping[str, bytes], num_params: int) -> Exact:
    """Return the residual on a disk, by the file format's description."""
    if "residual" not in files:
        return np.zeros(num_params)
    _, header, array = files["residual"].split(b"\n", 2)
    assert json.loads(header)["kind"] == "residual", "no rule here has another kind"  # noqa: S101
    values = np.frombuffer(array, "<f4").astype(np.float64)
    return values if values.size else np.zeros(num_params)


def numbers(files: Mapping[str, bytes]) -> set[int]:
    """Return the numbers of the finished updates on a disk."""
    return {int(name.split(".")[0]) for name in files if name.endswith((".update", ".sent"))}
