"""What can go wrong: each fault by name, with the probability that it is made ready before an action it can strike."""

from dataclasses import dataclass, fields

import numpy as np

PROBABILITIES = (0.05, 0.15, 0.4)  # of a fault that a seed has; about half of them it has not


@dataclass(frozen=True, slots=True)
class Faults:
    """Probabilities, all zero by default.

    Attributes:
        message_lost: before the broker has it; the publish is not confirmed.
        confirm_lost: the broker has the message, the worker hears nothing.
        duplicate: the message arrives once more, now or much later.
        reorder: it arrives behind the next one.
        delay: it arrives later.
        corrupt_copy: beside the message a copy arrives with a bit of its payload flipped.
        corrupt: the only copy has a bit of its payload flipped, and the broker confirms it.
        truncated: the only copy ends too early, and the broker confirms it.
        publish_refused: the queue is full.
        broker_restart: the broker is away for a while, then delivers everything unacked once more.
        channel_closed: a consumer loses its channel, and with it its turn.
        ack_lost: the same, with the acks it had just sent.
        store_unreachable: nobody reaches the store for a while.
        store_slow: one call takes seconds.
        write_lost: a commit does not reach the store.
        commit_confirm_lost: a commit happens, its answer is lost.
        commit_late: the answer is lost, and the commit happens later, whatever else happened by then.
        aggregator_stopped: it is asked to end, commits what it can, and is started again.
        aggregator_killed: before or after any call of a port.
        killed_in_commit: while the store works on it: it happens, or not, or later.
        aggregator_paused: stands still until the broker gave its turn to the other, then goes on with its old state.
        worker_killed: before or after any call of a port or any change of a file.
        power_cut: a worker is killed, and what its disk had not made durable is undone.
        disk_lost: a worker begins again with an empty disk.
        evaluator_killed: before or after any call of a port.
        letter_replayed: an operator sends a dead letter once more, as `fedmq deadletters replay` does.
        clock_jump: a machine's wall clock jumps, either way; its monotonic one does not.
    """

    message_lost: float = 0.0
    confirm_lost: float = 0.0
    duplicate: float = 0.0
    reorder: float = 0.0
    delay: float = 0.0
    corrupt_copy: float = 0.0
    corrupt: float = 0.0
    truncated: float = 0.0
    publish_refused: float = 0.0
    broker_restart: float = 0.0
    channel_closed: float = 0.0
    ack_lost: float = 0.0
    store_unreachable: float = 0.0
    store_slow: float = 0.0
    write_lost: float = 0.0
    commit_confirm_lost: float = 0.0
    commit_late: float = 0.0
    aggregator_stopped: float = 0.0
    aggregator_killed: float = 0.0
    killed_in_commit: float = 0.0
    aggregator_paused: float = 0.0
    worker_killed: float = 0.0
    power_cut: float = 0.0
    disk_lost: float = 0.0
    evaluator_killed: float = 0.0
    letter_replayed: float = 0.0
    clock_jump: float = 0.0


NAMES = tuple(field.name for field in fields(Faults))

# Which faults can strike an action; the others are of no use to it.
STRIKES: dict[str, tuple[str, ...]] = {
    "pull": ("store_unreachable", "store_slow", "worker_killed", "power_cut", "clock_jump"),
    "train": ("store_unreachable", "worker_killed", "power_cut", "disk_lost", "clock_jump"),
    "publish": (
        "message_lost", "confirm_lost", "duplicate", "reorder", "delay", "corrupt_copy", "corrupt", "truncated",
        "publish_refused", "broker_restart", "worker_killed", "power_cut",
    ),
    "aggregate": (
        "broker_restart", "channel_closed", "ack_lost", "store_unreachable", "store_slow", "write_lost",
        "commit_confirm_lost", "commit_late", "aggregator_stopped", "aggregator_killed", "killed_in_commit",
        "aggregator_paused", "letter_replayed", "clock_jump",
    ),
    "evaluate": ("store_unreachable", "store_slow", "evaluator_killed"),
}  # fmt: skip

RARE = {
    "disk_lost": 0.2,
    "broker_restart": 0.5,
    "store_unreachable": 0.5,
    "aggregator_paused": 0.5,
    "aggregator_stopped": 0.3,
}
CALM = Faults()


def drawn(rng: np.random.Generator) -> Faults:
    """Draw which faults a run has and how often: few at a time say more than all at once (swarm testing).

    Source: Groce et al., "Swarm Testing", ISSTA 2012.
    """
    there, often = rng.random(len(NAMES)).tolist(), rng.integers(len(PROBABILITIES), size=len(NAMES)).tolist()
    chances = [PROBABILITIES[o] * RARE.get(name, 1.0) for name, o in zip(NAMES, often, strict=True)]
    return Faults(*(p if t < 0.5 else 0.0 for p, t in zip(chances, there, strict=True)))
