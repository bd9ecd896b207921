"""Results of simulations that nobody ran: histories with chosen numbers."""

from ops.history import History
from ops.simulation.plan import plan_of
from ops.simulation.run import Result


def history_of(accuracies, *, every=10, s=60.0, up=1000, down=500, staleness=1, clients=4, metrics=lambda _: {}):
    """Return a history with an evaluation each `every` updates, the first before any.

    Args:
        accuracies: of the evaluations.
        every: updates between two of them.
        s: seconds between two.
        up: bytes of an update.
        down: bytes pulled for one.
        staleness: of all.
        clients: they take turns.
        metrics: evaluation -> what else is measured.
    """
    history = History(num_params=100)
    for index, accuracy in enumerate(accuracies):
        if index:
            history.add_entries(
                {"outcome": "applied", "bytes": up, "staleness": staleness, "id": f"client-{i % clients}/x/{i}"}
                for i in range(every)
            )
            history.pulled(history.bytes_pulled + every * down, history.pulls + every)
        history.evaluated(index * s, index, {"accuracy": accuracy, "loss": 1 - accuracy} | metrics(index))
    return history


def result_of(history, *, target=0.0, lost=0, aborted=0, failures=None, seed=0, **options):
    """Return the result with that history; the target's row is found as the simulator does."""
    given = {"task": "digits", "clients": 4, "buffer_size": 2, "updates": 1000, "target": target, "seed": seed}
    values = [row.accuracy for row in history.rows]
    reached = [i for i in range(4, len(values)) if target and sum(values[i - 4 : i + 1]) / 5 >= target]
    return Result(
        plan=plan_of(given | options), history=history, sha256="0" * 64, virtual_s=history.rows[-1].time_s, wall_s=1.5,
        published=history.trips, lost=lost, aborted=aborted, failures=failures or {},
        target_row=reached[0] if reached else None,
    )  # fmt: skip
