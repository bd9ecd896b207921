"""Settings: command-line flag, else environment variable `FEDMQ_*`, else TOML file, else default.

All are checked as a whole at start, and every problem stands in one message.
"""

import contextlib
import difflib
import json
import os
import re
import shlex
import socket
import stat
import tomllib
from contextvars import ContextVar
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, PydanticBaseSettingsSource, SettingsConfigDict

from shared import choices, hours, tls
from shared.compression import canonical, downlink_codec
from shared.errors import SettingsError
from shared.messages import ENVELOPE_BYTES_MAX, ID, PART_BYTES, PART_BYTES_MIN
from shared.rules import (
    ADAPTIVE,
    ADAPTIVE_LR,
    EVERY_UPDATE_A_VERSION,
    ROBUST,
    RULE_TABLE,
    RULES,
    SERVER_OPTIMIZERS,
    STALENESS,
    robust_problems,
    rule_problems,
)
from shared.urls import check_port, hide_password

PREFIX = "FEDMQ_"
SECRET = re.compile(r"://[^/\s\"']*:[^/\s\"']+@|PRIVATE KEY")  # a URL with a password, a key
OTHER_VARIABLES = {  # the worked tasks' data; the TOML file; the benchmark task's size; `models watch --exec`
    "FEDMQ_DATA", "FEDMQ_CONFIG", "FEDMQ_NOISE_PARAMS", "FEDMQ_VERSION", "FEDMQ_TAG", "FEDMQ_SHA256",
}  # fmt: skip


def _identifier(value: str) -> str:
    if not ID.fullmatch(value):
        raise ValueError(f"must be of {ID.pattern}")
    return value


def _identifier_or_none(value: str) -> str:
    return _identifier(value) if value else value


def _codec(value: str) -> str:
    try:
        return canonical(value)
    except SettingsError as error:
        raise ValueError(str(error)) from error


def _downlink(value: str) -> str:
    try:
        codec = downlink_codec(value)
    except SettingsError as error:
        raise ValueError(str(error)) from error
    return value.strip() if codec is None or value.strip() == "on" else codec.name


def _hours(value: str) -> str:
    hours.parse(value)
    return value.strip()


def _command(value: str) -> str:
    shlex.split(value)  # a quotation that does not end
    return value.strip()


def _rate(value: int) -> int:
    if value and value < RATE_MIN:
        raise ValueError(f"must be 0, which is no limit, or at least {RATE_MIN} bytes per second")
    return value


def _textfile(value: Path | None) -> Path | None:
    if value is not None and value.suffix != ".prom":
        raise ValueError("must end in .prom: collectors read no others")
    return value


def _push_url(value: str) -> str:
    if not value:
        return value
    if urlsplit(value).scheme not in ("http", "https") or not urlsplit(value).hostname:
        raise ValueError("expected http://host:9091 or https://login:password@host:9091")
    check_port(value)
    return value.rstrip("/")


RATE_MIN = 1024
ADAPTIVE_NAMES = frozenset(ADAPTIVE)
Identifier = Annotated[str, AfterValidator(_identifier)]


def _default_client() -> str:
    name = "".join(c if c.isalnum() or c in "_-" else "-" for c in socket.gethostname())
    return name[:64] or "worker"


def _chosen(table: choices.Table) -> AfterValidator:
    """Check a setting of the form name(numbers); it is kept as it was written."""

    def check(value: str) -> str:
        choices.parse(value, table)
        return value

    return AfterValidator(check)


def _chosen_pipeline(table: choices.Table) -> AfterValidator:
    """Check settings of that form joined by |."""

    def check(value: str) -> str:
        choices.parse_pipeline(value, table)
        return value

    return AfterValidator(check)


class Settings(BaseSettings):
    """What every program needs."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, extra="ignore", frozen=True, env_ignore_empty=True)
    reads_environment: ClassVar[bool] = True

    broker_url: str = Field("amqp://guest:guest@127.0.0.1:5672/fedmq", description="RabbitMQ, amqp:// or amqps://")
    store_url: str = Field("redis://127.0.0.1:6379/0", description="Redis, redis:// or rediss://")
    job: Identifier = Field("default", description="the job's id")
    wait_s: float = Field(0.0, ge=0, description="how long to wait at start for servers that do not answer, seconds")
    tls_ca: str = Field("", description="authority that signed the servers' certificates: a PEM file, or its text")
    tls_cert: str = Field("", description="this program's own certificate, where servers ask for one; file or text")
    tls_key: str = Field("", description="its key; file or text")
    metrics_port: int = Field(0, ge=0, le=65535, description="serve /metrics and /healthz here; 0: do not")
    metrics_cert: str = Field("", description="serve them over TLS with this certificate: a PEM file, or its text")
    metrics_key: str = Field("", description="its key; file or text")
    metrics_push_url: Annotated[str, AfterValidator(_push_url)] = Field(
        "", description="push metrics to this Pushgateway, http(s)://login:password@host:9091"
    )
    metrics_push_s: float = Field(30.0, gt=0, description="how often to push metrics and to write the file, seconds")
    metrics_file: Annotated[Path | None, AfterValidator(_textfile)] = Field(
        None, description="write metrics to this .prom file, for a textfile collector"
    )
    log_level: str = Field("info", description="debug, info, warning or error")
    log_format: Literal["text", "json"] = Field("text", description="text, or json: one object a line")

    @field_validator("log_level")
    @classmethod
    def _known_level(cls, value: str) -> str:
        if value.lower() not in ("debug", "info", "warning", "error"):
            raise ValueError("must be debug, info, warning or error")
        return value.lower()

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Flags, environment, then the TOML file."""
        if not cls.reads_environment:
            return (init_settings,)
        return init_settings, env_settings, _TomlFile(settings_cls)


class AggregatorSettings(Settings):
    """The aggregator's settings; from `init_model` on they are the job's own."""

    prefetch: int = Field(
        1024,
        ge=1,
        le=65535,
        description="deliveries held unacked; at three quarters a commit is made, whatever the buffer holds",
    )
    commit_interval_s: float = Field(0.5, ge=0, description="least seconds between two commits of new versions")
    commit_age_max_s: float = Field(30.0, gt=0, description="longest an accepted update waits to be durable, seconds")
    durable: bool = Field(True, description="refuse a Redis that may forget acknowledged writes")
    store_replicas: int = Field(
        0, ge=0, le=16, description="replicas of Redis that must have a commit before it counts"
    )
    record_dir: Path | None = Field(None, description="keep every received update in this folder, for `fedmq replay`")
    record_bytes_max: int = Field(16 * 2**30, ge=2**20, description="the oldest records go beyond this")
    init_model: Path | None = Field(None, description="start the job from this safetensors file")
    rule: Annotated[str, _chosen(RULE_TABLE)] = Field("fedbuff", description="how updates make versions; see Rules")
    buffer_size: int = Field(10, ge=1, le=100_000, description="updates averaged into one version")
    server_lr: float = Field(
        1.0, gt=0, allow_inf_nan=False, description="step along the averaged delta; adaptive optimizers begin with 0.01"
    )
    server_optimizer: Annotated[str, _chosen(SERVER_OPTIMIZERS)] = Field(
        "sgd", description="what steps along the averaged delta: sgd, momentum, adagrad, adam or yogi"
    )
    robust: Annotated[str, _chosen_pipeline(ROBUST)] = Field(
        "", description="defences against bad updates, joined by |; see Rules"
    )
    trusted_client: Annotated[str, AfterValidator(_identifier_or_none)] = Field(
        "", description="zeno, aflguard: the worker that trains on the server's own data"
    )
    clients: int = Field(0, ge=0, le=1_000_000, description="number of workers, for rules that keep something of each")
    alpha: float = Field(0.6, gt=0, le=1, description="fedasync: weight of a fresh model")
    staleness: Annotated[str, _chosen(STALENESS)] = Field(
        "polynomial(0.5)", description="constant, polynomial(a) or hinge(a,b)"
    )
    staleness_max: int = Field(100, ge=0, le=100_000, description="refuse updates staler than this, versions")
    weight_by_samples: bool = Field(False, description="weigh each update by its num_samples")
    codec: Annotated[str, AfterValidator(_codec)] = Field("int8 | zstd", description="how workers encode updates")
    part_bytes: int = Field(
        PART_BYTES,
        ge=PART_BYTES_MIN,
        le=256 * 2**20,
        description="updates whose payload is longer travel in parts of this size",
    )
    message_bytes_max: int = Field(
        16 * 2**20, ge=1024, le=512 * 2**20, description="largest message; RabbitMQ 4 takes 16 MiB by default"
    )
    update_bytes_max: int = Field(
        2 * 2**30, ge=1024, le=64 * 2**30, description="largest update, all its parts together"
    )
    parts_bytes_max: int = Field(
        4 * 2**30, ge=1024, description="payload of all unfinished updates in parts, held in the store"
    )
    parts_age_max_s: float = Field(
        21_600.0, gt=0, description="an unfinished update is given up so long after its last part, seconds"
    )
    queue_bytes_max: int = Field(
        8 * 2**30, ge=2**20, description="updates waiting in the queue; beyond, workers keep theirs and slow down"
    )
    queue_updates_max: int = Field(1_000_000, ge=1, description="the same as a number of messages")
    dead_bytes_max: int = Field(2**30, ge=2**20, description="dead letters kept, the newest")
    dead_age_max_s: float = Field(2_592_000.0, ge=1, description="dead letters are kept so long, seconds")
    downlink: Annotated[str, AfterValidator(_downlink)] = Field(
        "off", description="send workers compressed differences of versions: off, on, or a codec for them"
    )
    snapshots: Literal["float32", "bfloat16"] = Field(
        "float32", description="what whole models are sent to workers as; bfloat16 rounds the weights they start from"
    )
    versions_kept: int = Field(5, ge=1, description="newest model versions kept readable")
    versions_age_max_s: float = Field(
        0.0,
        ge=0,
        allow_inf_nan=False,
        description="versions beyond those stay until they are so old, seconds; 0: go at once",
    )
    versions_every: int = Field(
        0, ge=0, description="of each so many versions the first that was committed stays for good; 0: none does"
    )

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_the_rule(cls, given: Any) -> Any:
        """Fill in what another default suits better, depending on the rule and the optimizer."""
        rule, optimizer = (str(given.get(key, "")).partition("(")[0].strip() for key in ("rule", "server_optimizer"))
        adaptive = ADAPTIVE_NAMES & {rule, optimizer} and "server_lr" in RULES.get(rule, RULES["fedbuff"]).uses
        defaults: dict[str, Any] = {"server_lr": ADAPTIVE_LR} if adaptive else {}
        if rule == "fedavg":
            defaults |= {"staleness_max": 0}
        if rule in EVERY_UPDATE_A_VERSION and str(clients := given.get("clients", "")).isdecimal():
            defaults |= {"staleness_max": min(100_000, max(100, 10 * int(clients)))}
        if str(limit := given.get("message_bytes_max", "")).isdecimal():
            defaults |= {"part_bytes": min(PART_BYTES, max(PART_BYTES_MIN, int(limit) - ENVELOPE_BYTES_MAX))}
        return defaults | dict(given)

    @model_validator(mode="after")
    def _not_contradictory(self) -> Self:
        chosen = choices.parse(self.rule, RULE_TABLE)
        rule = chosen.name
        problems = [*_unused(self, rule), *rule_problems(chosen, self.robust)]
        if "robust" in RULES[rule].uses:
            stages = choices.parse_pipeline(self.robust, ROBUST)
            problems += robust_problems(stages, rule, self.buffer_size, self.weight_by_samples, self.trusted_client)
        elif self.trusted_client:
            problems.append(f"FEDMQ_TRUSTED_CLIENT={self.trusted_client}: rule {rule} takes no FEDMQ_ROBUST to use it")
        if "clients" in RULES[rule].uses and rule != "rescaled" and not self.clients:
            problems.append(f"FEDMQ_RULE={rule} keeps something of every worker: give their number, FEDMQ_CLIENTS")
        if "clients" in RULES[rule].uses and 0 < self.clients < self.buffer_size and "buffer_size" in RULES[rule].uses:
            problems.append(f"FEDMQ_BUFFER_SIZE={self.buffer_size} exceeds FEDMQ_CLIENTS={self.clients}")
        if rule == "fedavg" and self.staleness_max:
            problems.append(f"FEDMQ_STALENESS_MAX={self.staleness_max}: rule fedavg waits in rounds, leave it at 0")
        if rule == "fedasync" and (self.downlink != "off" or self.snapshots != "float32"):
            problems.append(
                f"FEDMQ_DOWNLINK={self.downlink} and FEDMQ_SNAPSHOTS={self.snapshots} do not go with rule fedasync: it "
                "needs the very weights each worker started from, which are the stored versions only without them"
            )
        if self.message_bytes_max - ENVELOPE_BYTES_MAX < self.part_bytes > PART_BYTES_MIN:
            problems.append(
                f"FEDMQ_PART_BYTES={self.part_bytes} and {ENVELOPE_BYTES_MAX} bytes of envelope exceed "
                f"FEDMQ_MESSAGE_BYTES_MAX={self.message_bytes_max}"
            )
        if self.commit_interval_s > self.commit_age_max_s:
            problems.append(
                f"FEDMQ_COMMIT_INTERVAL_S={self.commit_interval_s:g} exceeds "
                f"FEDMQ_COMMIT_AGE_MAX_S={self.commit_age_max_s:g}"
            )
        if problems:
            raise ValueError("; ".join(problems))
        return self


class GivenAggregatorSettings(AggregatorSettings):
    """An aggregator's settings from what is given alone: a simulation or a replay depends on no environment."""

    reads_environment: ClassVar[bool] = False


def _unused(settings: AggregatorSettings, rule: str) -> list[str]:
    """Name the settings that were given, if only their default, and mean nothing to the rule."""
    problems = []
    optional = {name for spec in RULES.values() for name in spec.uses}
    for name in sorted((optional - set(RULES[rule].uses)) & settings.model_fields_set):
        takers = ", ".join(other for other, spec in RULES.items() if name in spec.uses)
        problems.append(f"{PREFIX}{name.upper()} means nothing to FEDMQ_RULE={rule}; it belongs to rule {takers}")
    return problems


class WorkerSettings(Settings):
    """A worker's settings."""

    client_id: Identifier = Field(default_factory=_default_client, description="this worker's id; the host's name")
    task: str = Field("", description="file with build() and train(), or a built-in: digits, mnist, ...")
    task_settings: Annotated[dict[str, str], NoDecode] = Field(
        default_factory=dict, description="for the task, as a=1,b=2 or JSON"
    )
    state_dir: Path = Field(Path("~/.local/state/fedmq"), description="folder of the outbox and the residual")
    outbox_updates_max: int = Field(100, ge=1, description="unconfirmed updates kept before training pauses")
    outbox_bytes_max: int = Field(2**28, ge=2**16, description="the same in bytes")
    confirm_timeout_s: float = Field(60.0, gt=0, description="longest wait for the broker's confirm, seconds")
    pause_s: float = Field(0.0, ge=0, description="rest between two trainings, seconds")
    updates_max: int = Field(0, ge=0, description="stop after so many updates; 0: never")
    seed: int = Field(0, ge=0, description="seed of everything random in this worker, together with its id")
    hours: Annotated[str, AfterValidator(_hours)] = Field(
        "", description="train only then, local time: 22-6, mon-fri 1:30-5,sat-sun 0-24; empty: always"
    )
    ready_command: Annotated[str, AfterValidator(_command)] = Field(
        "", description="run before each training, without a shell: exit code 0 trains, another waits a minute"
    )
    uplink_bytes_per_s: Annotated[int, AfterValidator(_rate)] = Field(
        0, description="publish no faster than this; 0: as fast as it goes"
    )
    downlink_bytes_per_s: Annotated[int, AfterValidator(_rate)] = Field(
        0, description="pull models no faster than this; 0: as fast as it goes"
    )
    disk_free_min_bytes: int = Field(
        64 * 2**20, ge=0, description="room on the disk of the outbox that stays free: with less, training pauses"
    )

    @field_validator("task_settings", mode="before")
    @classmethod
    def _pairs(cls, value: Any) -> Any:
        return parse_pairs(value)


class EvaluatorSettings(Settings):
    """The evaluator's settings."""

    task: str = Field("", description="file with build() and evaluate(), or a built-in: digits, mnist, ...")
    task_settings: Annotated[dict[str, str], NoDecode] = Field(
        default_factory=dict, description="for the task, as a=1,b=2 or JSON"
    )
    poll_s: float = Field(0.5, gt=0, description="how often to look for a newer version, seconds")
    tensorboard_dir: Path | None = Field(None, description="also write TensorBoard's event files into this folder")

    @field_validator("task_settings", mode="before")
    @classmethod
    def _pairs(cls, value: Any) -> Any:
        return parse_pairs(value)


class ExporterSettings(Settings):
    """The exporter's settings: one for a whole installation."""

    refresh_s: float = Field(5.0, gt=0, description="how often to read the store, seconds; all clients at each third")
    silent_s: float = Field(86_400.0, gt=0, description="an enrolled device unheard for so long is silent, seconds")


class OperatorSettings(Settings):
    """Who enrolls and revokes devices: needs the servers' own logins for that."""

    broker_admin_url: str = Field("", description="RabbitMQ's management API, https://login:password@host:15671")
    ca_dir: str = Field("", description="folder of the private authority (ca.pem, ca.key): signs devices' certificates")


ALL_SETTINGS: tuple[type[Settings], ...] = (
    AggregatorSettings, WorkerSettings, EvaluatorSettings, ExporterSettings, OperatorSettings,
)  # fmt: skip
KNOWN = {name for settings in ALL_SETTINGS for name in settings.model_fields}

S = TypeVar("S", bound=Settings)


def load(kind: type[S], flags: dict[str, Any] | None = None) -> S:
    """Read and check the settings of one program.

    Args:
        kind: which program's.
        flags: what the command line gave; None values were not given.

    Raises:
        SettingsError: every problem found, one a line.
    """
    problems = [_unknown(name) for name in os.environ if _is_unknown(name)]
    flags = dict(flags or {})
    if config := flags.pop("config", None):
        use_file(Path(config))
    try:
        problems += [f"{_file()}: {_unknown(key)}" for key in _read_toml() if _plain(key) not in KNOWN]
        given = {name: value for name, value in flags.items() if value is not None}
        settings = kind(**given)
        changed, tls_problems = _with_tls(settings)
        problems += tls_problems
        settings = settings.model_copy(update=changed)
    except ValidationError as error:
        problems += readable(error, kind)
        settings = None
    if problems or settings is None:
        raise SettingsError("\n  ".join(["these settings need a change:", *problems]) if problems else "settings")
    return settings


_chosen_file: ContextVar[Path | None] = ContextVar("config", default=None)


def use_file(path: Path | None) -> None:
    """Read settings from this TOML file, as `--config` says, instead of the one that FEDMQ_CONFIG names."""
    _chosen_file.set(path)


def _with_tls(settings: Settings) -> tuple[dict[str, str], list[str]]:
    """Return the settings that certificates change - the URLs name their files - and what is wrong with them."""
    changed: dict[str, str] = {}
    problems: list[str] = []
    files: dict[str, str] = {}
    for name in ("tls_ca", "tls_cert", "tls_key", "metrics_cert", "metrics_key"):
        text = getattr(settings, name)
        if not text:
            continue
        try:
            path = tls.as_file(text, name)
        except (OSError, ValueError) as error:
            problems.append(f"{PREFIX}{name.upper()}: {error}")
            continue
        if name.startswith("tls_"):
            files[f"{name.removeprefix('tls_')}_file"] = path
        else:
            changed[name] = path
    for name in ("broker_url", "store_url", "metrics_push_url", "broker_admin_url"):
        url = getattr(settings, name, "")
        if files and name in settings.model_fields_set and url.partition("://")[0] in ("amqp", "redis"):
            problems.append(
                f"{PREFIX}{name.upper()}={hide_password(url)}: certificates are given, but this is without TLS and "
                f"would send the password in the clear: write {url.partition('://')[0]}s://"
            )
        with contextlib.suppress(ValueError):  # it is no URL: whoever connects says so
            changed |= {name: tls.with_files(url, files)} if url else {}
    if bool(settings.metrics_cert) != bool(settings.metrics_key):
        problems.append("FEDMQ_METRICS_CERT and FEDMQ_METRICS_KEY go together: give both")
    return changed, problems


def parse_pairs(given: Any) -> Any:
    """Read `a=1,b=2`, a JSON object or a TOML table as name -> text."""
    if isinstance(given, dict):
        return {str(key): str(value) for key, value in given.items()}
    text = str(given)
    if text.lstrip().startswith("{"):
        return {str(key): str(value) for key, value in json.loads(text).items()}
    parts = re.split(r",(?![^()]*\))", text)  # not inside brackets: partition=rare(2, 0.2)
    pairs = [part.partition("=") for part in parts if part.strip()]
    if not all(equals for _, equals, _ in pairs):
        raise ValueError(f"{text!r} is not of the form a=1,b=2")
    return {key.strip(): value.strip() for key, _, value in pairs}


class _TomlFile(PydanticBaseSettingsSource):
    """The file that FEDMQ_CONFIG names; `job = "x"` and `FEDMQ_JOB = "x"` are the same."""

    def get_field_value(self, field: Any, field_name: str) -> tuple[Any, str, bool]:
        """Unused: `__call__` returns everything at once."""
        return None, field_name, False

    def __call__(self) -> dict[str, Any]:
        """Return the file's settings under their plain names."""
        return {_plain(key): value for key, value in _read_toml().items()}


def _file() -> Path | None:
    path = os.environ.get("FEDMQ_CONFIG")
    return _chosen_file.get() or (Path(path) if path else None)


def _read_toml() -> dict[str, Any]:
    path = _file()
    if path is None:
        return {}
    try:
        text = path.read_text()
        mode = stat.S_IMODE(path.stat().st_mode)
        if SECRET.search(text) and mode & 0o077 & ~_granted(path):
            raise SettingsError(
                f"FEDMQ_CONFIG {path} holds a password or a key and others can read it (mode {mode:04o}): "
                f"chmod 600 {path}"
            )
        return tomllib.loads(text)
    except FileNotFoundError as error:
        mend = "`docker compose up -d secrets` makes it" if path.parts[:2] == ("/", "run") else "name another one"
        raise SettingsError(f"FEDMQ_CONFIG {path} is not there: {mend}") from error
    except (OSError, ValueError) as error:  # TOMLDecodeError and UnicodeDecodeError are ValueErrors
        raise SettingsError(f"FEDMQ_CONFIG {path}: {error}") from error


def _granted(path: Path) -> int:
    """Return the rights on a file that are no danger.

    systemd's LoadCredential grants its service a file by an access list, which shows as the group's right to read.
    """
    credentials = os.environ.get("CREDENTIALS_DIRECTORY")
    return 0o040 if credentials and path.resolve().is_relative_to(Path(credentials).resolve()) else 0


def _plain(name: str) -> str:
    return name.lower().removeprefix(PREFIX.lower())


def _is_unknown(variable: str) -> bool:
    return variable.startswith(PREFIX) and variable not in OTHER_VARIABLES and _plain(variable) not in KNOWN


def _unknown(name: str) -> str:
    """Say that there is no such setting; its value may be a secret and is not repeated."""
    near = difflib.get_close_matches(_plain(name), KNOWN, 1)
    return f"{name}: no such setting" + (f"; did you mean {PREFIX}{near[0].upper()}?" if near else "")


def readable(error: ValidationError, kind: type[Settings]) -> list[str]:
    """Return each problem of settings as `NAME=value: what is wrong`, without pydantic's own text.

    Args:
        error: what building `kind` raised.
        kind: the settings.
    """
    return [_readable(item, kind) for item in error.errors()]


def _readable(item: Any, kind: type[Settings]) -> str:
    message = str(item["msg"]).removeprefix("Value error, ")
    if not item["loc"]:
        return message
    name = str(item["loc"][0])
    shown = hide_password(str(item["input"])) if name.endswith("_url") else item["input"]
    return f"{PREFIX}{name.upper()}={shown}: {message}" if name in kind.model_fields else message
