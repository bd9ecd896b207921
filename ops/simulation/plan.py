"""What a simulation runs: every option, checked as a whole before anything runs."""

import difflib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic.fields import FieldInfo

from ops.simulation.attacks import ATTACKS, parse_attack
from ops.simulation.availability import Availability
from ops.simulation.network import Network
from ops.simulation.speeds import Speeds
from shared.choices import parse
from shared.compression import AUTO
from shared.config import AggregatorSettings, GivenAggregatorSettings, parse_pairs
from shared.errors import SettingsError
from shared.rules import RULE_TABLE, RULES
from worker.task import BUILT_IN

CONCURRENCY = 100  # clients at work at once, where there are more: of a large fleet most rest
JOB = "simulation"
NOT_SIMULATED = {  # settings of an aggregator that mean nothing without servers
    "broker_url", "store_url", "job", "wait_s", "metrics_port", "log_level", "durable", "init_model", "prefetch",
    "commit_interval_s", "commit_age_max_s", "store_replicas", "record_dir", "record_bytes_max", "queue_bytes_max",
    "queue_updates_max", "dead_bytes_max", "dead_age_max_s",
}  # fmt: skip
FIXED = {  # what they are: a version is committed at once; bodies that wait for their commit do not fill the memory
    "job": JOB, "commit_interval_s": 0.0, "commit_age_max_s": 1e9, "prefetch": 32,
}  # fmt: skip


def _attack(value: str) -> str:
    parse_attack(value)
    return value


class Fleet(BaseModel):
    """The task, the devices and how long to run."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    task: str = Field("digits", description="file with build(), train() and evaluate(), or a built-in name")
    task_settings: dict[str, str] = Field(default_factory=dict, description="for the task, as a=1,b=2 or JSON")
    clients: int = Field(100, ge=1, le=1_000_000, description="number of devices")
    concurrency: int = Field(0, ge=0, description="devices at work at once; 0: all of them, at most 100")
    updates: int = Field(0, ge=0, description="stop after so many updates were published")
    hours: float = Field(0.0, ge=0, allow_inf_nan=False, description="stop after so many virtual hours")
    target: float = Field(0.0, ge=0, allow_inf_nan=False, description="the value of --metric to be reached; 0: none")
    stop_at_target: bool = Field(False, description="stop once the mean of the last five evaluations is there")
    metric: str = Field("accuracy", description="what --target is about, of what evaluate() returns")
    evaluations: int = Field(60, ge=1, le=100_000, description="evaluations over the run")
    seed: int = Field(0, ge=0, lt=2**32, description="of everything random")
    partition: str = Field("", description="how data is split, e.g. iid, dirichlet(0.3), shards(2); empty: the task's")
    speed: str = Field("lognormal(60, 0.6)", description="seconds of compute a trip: a distribution, or trace:FILE")
    persistent: bool = Field(True, description="a device is fast or slow for good; no: each trip is drawn anew")
    correlated: bool = Field(False, description="the last shares of the data belong to the slowest devices")
    rest_s: float = Field(
        0.0, ge=0, allow_inf_nan=False, description="mean seconds a device rests between two trips, exponential"
    )
    down_mbps: float = Field(0.0, ge=0, description="bandwidth to a device, Mbit/s; 0: unlimited")
    up_mbps: float = Field(0.0, ge=0, description="bandwidth from a device, Mbit/s; 0: unlimited")
    latency_ms: float = Field(0.0, ge=0, description="added to every transfer, milliseconds")
    bandwidth_sigma: float = Field(0.0, ge=0, le=5, description="log-normal spread of bandwidth over the devices")
    availability: str = Field("always", description="always, diurnal(hours), churn(on, period_min), joined by &")
    dropout: float = Field(0.0, ge=0, lt=1, description="share of trips that are lost in mid-training")
    attackers: float = Field(0.0, ge=0, lt=1, description="share of the devices that attack")
    attack: Annotated[str, AfterValidator(_attack)] = Field(
        "sign_flip", description="what they do: sign_flip(scale), noise(scale), flood(rate), joined by &"
    )

    @model_validator(mode="before")
    @classmethod
    def _pairs(cls, given: Any) -> Any:
        if isinstance(given, Mapping) and "task_settings" in given:
            try:
                return {**given, "task_settings": parse_pairs(given["task_settings"])}
            except ValueError as error:
                raise ValueError(f"task_settings: {error}") from error
        return given

    @property
    def in_flight(self) -> int:
        """How many devices are at work at once."""
        return self.concurrency or min(self.clients, CONCURRENCY)


class Plan(BaseModel):
    """One simulation.

    Attributes:
        fleet: the task, the devices, how long to run.
        aggregator: the job's settings.
    """

    model_config = ConfigDict(frozen=True)

    fleet: Fleet
    aggregator: GivenAggregatorSettings

    @property
    def rule(self) -> str:
        """Name of the rule without its parameters."""
        return parse(self.aggregator.rule, RULE_TABLE).name

    @property
    def synchronous(self) -> bool:
        """Whether devices wait for rounds."""
        return self.rule == "fedavg"

    @property
    def trusted(self) -> int | None:
        """The number of the device that trains on the server's own data, after all others; None: there is none."""
        return self.fleet.clients if self.aggregator.trusted_client else None

    @property
    def devices(self) -> int:
        """How many devices there are, the trusted one included."""
        return self.fleet.clients + (self.trusted is not None)


def fields() -> dict[str, FieldInfo]:
    """Return everything that may be given, the fleet's options first."""
    own = dict(Fleet.model_fields)
    rest = {n: f for n, f in AggregatorSettings.model_fields.items() if n not in NOT_SIMULATED and n not in own}
    return own | rest


def option_names() -> list[str]:
    """Return the names of everything that may be given."""
    return list(fields())


def plan_of(given: Mapping[str, Any], where: str = "") -> Plan:
    """Check everything that is given.

    Args:
        given: option -> value; None values were not given.
        where: to say where it stands, e.g. a file's name.

    Raises:
        SettingsError: every problem found, one a line.
    """
    chosen = {name: value for name, value in given.items() if value is not None}
    known = option_names()
    problems = [_unknown(name, known) for name in chosen if name not in known]
    own = {name: value for name, value in chosen.items() if name in Fleet.model_fields}
    rest = {name: value for name, value in chosen.items() if name in known and name not in own}
    fleet, more = _checked(Fleet, own)
    problems += more
    rule = str(rest.get("rule", "")).partition("(")[0].strip()
    if fleet is not None and rule in RULES and "clients" in RULES[rule].uses:
        rest["clients"] = fleet.clients
    aggregator, more = _checked(GivenAggregatorSettings, FIXED | rest)
    problems += more
    if fleet is not None:
        problems += _fleet_problems(fleet)
    if fleet is not None and aggregator is not None:
        problems += _together(fleet, aggregator)
    if problems or fleet is None or aggregator is None:
        raise SettingsError("\n  ".join([f"{where or 'this simulation'} needs a change:", *problems]))
    return Plan(fleet=fleet, aggregator=aggregator)


def _checked(kind: type[Any], given: Mapping[str, Any]) -> tuple[Any, list[str]]:
    try:
        return kind(**given), []
    except ValidationError as error:
        return None, [_readable(item) for item in error.errors()]


def _readable(item: Any) -> str:
    message = str(item["msg"]).removeprefix("Value error, ").replace("FEDMQ_", "")
    return f"{item['loc'][0]}={item['input']}: {message}" if item["loc"] else message


def _unknown(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, 1)
    return f"{name}: no such option" + (f"; did you mean {near[0]}?" if near else f"; there are {', '.join(known)}")


def _fleet_problems(fleet: Fleet) -> list[str]:
    problems = []
    if not fleet.updates and not fleet.hours:
        problems.append("say how long to run: updates or hours, or both (whichever is over first)")
    if fleet.concurrency > fleet.clients:
        problems.append(f"concurrency={fleet.concurrency} exceeds clients={fleet.clients}")
    if fleet.stop_at_target and not fleet.target:
        problems.append("stop_at_target needs a target")
    if round(fleet.attackers * fleet.clients) and not fleet.attack.strip():
        problems.append(f"attackers={fleet.attackers:g} need an attack: {', '.join(ATTACKS)}")
    for name, build in (
        ("speed", lambda: speeds_of(fleet, fleet.clients)),
        ("availability", lambda: Availability(fleet.availability, fleet.dropout, fleet.clients, fleet.seed)),
        ("network", lambda: network_of(fleet, fleet.clients)),
    ):
        try:
            build()
        except ValueError as error:
            problems.append(f"{name}: {error}")
    return problems


def speeds_of(fleet: Fleet, devices: int) -> Speeds:
    """Build the speeds of so many devices; what one of the fleet draws does not depend on those beyond it."""
    slowest_first = range(fleet.clients - 1, -1, -1) if fleet.correlated else None
    return Speeds(fleet.speed, fleet.persistent, devices, fleet.seed, slowest_first=slowest_first)


def network_of(fleet: Fleet, devices: int) -> Network:
    """Build the network of so many devices."""
    return Network(
        fleet.down_mbps, fleet.up_mbps, fleet.latency_ms, fleet.bandwidth_sigma, devices, fleet.seed
    )  # fmt: skip


def _together(fleet: Fleet, aggregator: GivenAggregatorSettings) -> list[str]:
    """Say what of a fleet and a rule does not go together."""
    problems, rule = [], parse(aggregator.rule, RULE_TABLE).name
    size = aggregator.buffer_size if "buffer_size" in RULES[rule].uses else 1
    if size > fleet.clients:
        problems.append(
            f"buffer_size={size} exceeds clients={fleet.clients}: a buffer would wait for somebody's second"
        )
    if rule == "fedavg" and size > fleet.in_flight:
        problems.append(f"buffer_size={size} exceeds concurrency={fleet.in_flight}: no round of fedavg would ever end")
    if fleet.updates and size > fleet.updates:
        problems.append(f"updates={fleet.updates} never fill one buffer_size={size}")
    if rule == "ringleader" and fleet.task_settings.get("steps") != "1":
        problems.append("rule ringleader is for workers of one local step: give task_settings steps=1")
    if aggregator.codec == AUTO:
        problems.append(
            "codec=auto measures how fast the machine compresses, so no two runs would be the same: choose none, safe, "
            "balanced, tiny or any other"
        )
    if aggregator.trusted_client in {client_name(client) for client in _numbers(aggregator.trusted_client, fleet)}:
        problems.append(f"trusted_client={aggregator.trusted_client} is one of the devices: give it another name")
    return problems


def _numbers(name: str, fleet: Fleet) -> list[int]:
    """Return the device a name may be of, none where it is of nobody in the fleet."""
    digits = re.findall(r"[0-9]{1,7}$", name)
    return [int(number) for number in digits if int(number) < fleet.clients]


def client_name(client: int) -> str:
    """Return a device's id."""
    return f"client-{client}"


def share_settings(fleet: Fleet, client: int) -> dict[str, str]:
    """Return a device's settings of the task; one beyond the fleet has an even share of everybody's data."""
    partition = fleet.partition if client < fleet.clients else "iid"
    split = {"partition": partition} if partition else {}
    share = client if client < fleet.clients else 0
    return {**fleet.task_settings, **split, "share": str(share), "shares": str(fleet.clients)}


def path_of_task(task: str) -> str:
    """Return a task's name as another process finds it."""
    return str(Path(task).resolve()) if task not in BUILT_IN and Path(task).is_file() else task


def plain_plan(plan: Plan, given: bool = False) -> dict[str, Any]:
    """Return a plan's options, flat.

    Args:
        plan: the plan.
        given: only those that were given, as `plan_of` takes them; else what means something to its rule.
    """
    unused = {name for spec in RULES.values() for name in spec.uses} - set(RULES[plan.rule].uses)
    aggregator = plan.aggregator.model_dump(mode="json", exclude=NOT_SIMULATED | unused, exclude_unset=given)
    return aggregator | plan.fleet.model_dump(mode="json", exclude_unset=given)
