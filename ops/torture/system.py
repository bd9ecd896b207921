"""What the processes of a run share."""

from dataclasses import dataclass

from ops.torture.fate import World
from ops.torture.history import History
from ops.torture.network import Network
from shared.config import AggregatorSettings
from shared.layout import Layout
from shared.store.inprocess import InProcessStore
from shared.transport.inprocess import InProcessBroker


@dataclass(frozen=True, slots=True)
class System:
    """What the processes of a run share.

    Attributes:
        world: time and what is away.
        store: of the job.
        broker: of the job.
        network: the way to it.
        history: what is seen of it all.
        settings: of the aggregator.
        layout: of the model.
        seed: of the trainings.
    """

    world: World
    store: InProcessStore
    broker: InProcessBroker
    network: Network
    history: History
    settings: AggregatorSettings
    layout: Layout
    seed: int
