"""The `fedmq` command."""

import inspect
from pathlib import Path
from typing import Annotated, Any

import typer

from aggregator.__main__ import HELP as AGGREGATOR_HELP
from aggregator.__main__ import run as run_aggregator
from ops.cli_devices import devices_app, secrets_app
from ops.cli_models import models_app
from shared.command import exit_codes, setting_option, settings_command
from shared.config import (
    AggregatorSettings,
    EvaluatorSettings,
    ExporterSettings,
    Settings,
    WorkerSettings,
    load,
    use_file,
)
from worker.__main__ import HELP as WORKER_HELP
from worker.__main__ import run as run_worker
from worker.check import run as check_worker

app = typer.Typer(
    add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None,
    help="Asynchronous federated learning over RabbitMQ and Redis.",
)  # fmt: skip
app.add_typer(models_app, name="models")
app.add_typer(devices_app, name="devices")
app.add_typer(secrets_app, name="secrets")
codecs_app = typer.Typer(invoke_without_command=True, help="How updates can be compressed.")
app.add_typer(codecs_app, name="codecs")
bench_app = typer.Typer(invoke_without_command=True, help="Measurements beside their limits and their peers.")
app.add_typer(bench_app, name="bench")

deadletters_app = typer.Typer(no_args_is_help=True, help="Messages that were rejected, and what to do with them.")
app.add_typer(deadletters_app, name="deadletters")

simulate_app = typer.Typer(help="A fleet of any size in virtual time, and comparisons of them.")
app.add_typer(simulate_app, name="simulate")

StoreUrl = Annotated[str | None, typer.Option(help="Redis URL; FEDMQ_STORE_URL")]
BrokerUrl = Annotated[str | None, typer.Option(help="RabbitMQ URL; FEDMQ_BROKER_URL")]
Job = Annotated[str | None, typer.Option(help="the job's id; FEDMQ_JOB")]


@app.callback()
def settings_file(
    config: Annotated[
        Path | None, typer.Option(help="TOML file with settings, before the command; FEDMQ_CONFIG")
    ] = None,
) -> None:
    """Asynchronous federated learning over RabbitMQ and Redis."""
    if config is not None:
        use_file(config)


@app.command()
def demo(
    task: Annotated[str, typer.Option(help="digits, mnist or a file")] = "digits",
    servers: Annotated[bool, typer.Option("--servers", help="run on real servers, one process per worker")] = False,
    broker_url: Annotated[str | None, typer.Option(help="with --servers: use this RabbitMQ")] = None,
    store_url: Annotated[str | None, typer.Option(help="with --servers: use this Redis")] = None,
    updates: Annotated[int | None, typer.Option(help="local trainings in all [default: depends on the task]")] = None,
    workers: Annotated[int, typer.Option(help="number of devices")] = 10,
    codec: Annotated[str, typer.Option(help="how updates are encoded; `fedmq codecs` lists them")] = "balanced",
    downlink: Annotated[
        str | None, typer.Option(help="off, on or a codec of version deltas [default: on, off with codec none]")
    ] = None,
    buffer_size: Annotated[int | None, typer.Option(help="FedBuff's K [default: 10, or all workers]")] = None,
    seed: Annotated[int, typer.Option(help="of everything random", min=0)] = 0,
    out: Annotated[Path | None, typer.Option(help="folder for the report [default: runs/demo]")] = None,
) -> None:
    """Train a small model with ten workers and look at it: in this process, or on real servers."""
    with exit_codes():
        from ops import demo as main_job

        plan = main_job.plan(task, updates, workers, codec, downlink, buffer_size, seed, out)
        if (broker_url or store_url) and not servers:
            raise typer.BadParameter("--broker-url and --store-url go with --servers")
        history = main_job.on_servers(plan, broker_url, store_url) if servers else main_job.embedded(plan)
        print(history.last_line())


settings_command(app, "aggregator", AggregatorSettings, run_aggregator, AGGREGATOR_HELP)
settings_command(app, "worker", WorkerSettings, run_worker, WORKER_HELP, check_worker)


def _run_evaluator(settings: EvaluatorSettings) -> None:
    from ops.evaluator import run

    run(settings)


def _run_exporter(settings: ExporterSettings) -> None:
    from ops.exporter import run

    run(settings)


settings_command(
    app, "exporter", ExporterSettings, _run_exporter,
    "Show a whole installation to Prometheus: every job, its fleet, durability, certificates, the audit log.",
)  # fmt: skip


settings_command(
    app, "evaluator", EvaluatorSettings, _run_evaluator,
    "Evaluate each new version on held-out data; write the numbers to the store and to Prometheus.",
)  # fmt: skip


@app.command()
def status(
    job: Job = None,
    broker_url: BrokerUrl = None,
    store_url: StoreUrl = None,
    watch: Annotated[bool, typer.Option("--watch", help="stay, and show it anew until Ctrl-C")] = False,
    every_s: Annotated[float, typer.Option(help="with --watch: how often, seconds", min=0.2)] = 2.0,
) -> None:
    """Show where a job stands, and why nothing moves if nothing does."""
    with exit_codes():
        from ops.status import show
        from ops.status_watch import watch as stay

        settings = load(Settings, {"job": job, "broker_url": broker_url, "store_url": store_url})
        if watch:
            stay(settings, every_s)
        else:
            show(settings)


@app.command()
def doctor(
    job: Job = None,
    broker_url: BrokerUrl = None,
    store_url: StoreUrl = None,
    task: Annotated[str | None, typer.Option(help="also try this task once; FEDMQ_TASK")] = None,
) -> None:
    """Check broker, store, durability, clock, job and task: each ok, or what to do."""
    with exit_codes():
        from ops.doctor import examine

        flags = {"job": job, "broker_url": broker_url, "store_url": store_url, "task": task}
        raise typer.Exit(examine(load(WorkerSettings, flags)))


@app.command()
def init(path: Annotated[Path, typer.Argument(help="file to write")]) -> None:
    """Write a commented task that runs as it is."""
    with exit_codes():
        from ops.template import write

        write(path)


@bench_app.callback()
def bench(
    context: typer.Context,
    params: Annotated[str, typer.Option(help="model sizes, comma separated")] = "100k,1M,10M",
    out: Annotated[Path | None, typer.Option(help="also write the tables to this Markdown file")] = None,
    repeats: Annotated[int, typer.Option(help="runs per number; the median is shown", min=1)] = 5,
) -> None:
    """Measure fold, end-to-end throughput and memory beside their limits, on private servers."""
    if context.invoked_subcommand is None:
        with exit_codes():
            from ops.bench.main import run

            run(params, repeats, out)


@bench_app.command("codecs")
def bench_codecs(
    params: Annotated[str, typer.Option(help="model sizes, comma separated")] = "1M,10M",
    out: Annotated[Path | None, typer.Option(help="also write the tables to this Markdown file")] = None,
    repeats: Annotated[int, typer.Option(help="runs per number; the median is shown", min=1)] = 5,
) -> None:
    """Measure every codec: bits against the entropy, error, speed; and other compressors at equal error."""
    with exit_codes():
        from ops.bench.codecs import run

        run(params, repeats, out)


@bench_app.command("fuzz")
def bench_fuzz(
    inputs: Annotated[int, typer.Option(help="damaged payloads for each codec", min=1)] = 100_000,
    seed: Annotated[int, typer.Option(help="of everything random", min=0)] = 0,
) -> None:
    """Feed every codec's decoder damaged and lying payloads."""
    with exit_codes():
        from ops.bench.fuzz import run

        run(inputs, seed)


@bench_app.command("fuzz-messages")
def bench_fuzz_messages(
    inputs: Annotated[int, typer.Option(help="damaged messages in all", min=1)] = 1_000_000,
    seed: Annotated[int, typer.Option(help="of everything random", min=0)] = 0,
    first: Annotated[int, typer.Option(help="number of the first message: one alone is repeated so", min=0)] = 0,
    processes: Annotated[int, typer.Option(help="at once; the messages are the same", min=1)] = 1,
) -> None:
    """Feed damaged and lying messages of every codec to the aggregator's admission."""
    with exit_codes():
        from ops.bench.fuzz_messages import run

        run(inputs, seed, first, processes)


@bench_app.command("soak")
def bench_soak(
    minutes: Annotated[float, typer.Option(help="of load, after a warm-up of one", min=0.1)] = 10.0,
    out: Annotated[Path | None, typer.Option(help="also write the tables to this Markdown file")] = None,
) -> None:
    """Send an hour of fifty workers in ten minutes; nothing may grow, and the account must be exact."""
    with exit_codes():
        from ops.bench.soak import run

        run(minutes, out)


@bench_app.command("safety")
def bench_safety(
    params: Annotated[str, typer.Option(help="model sizes, comma separated")] = "100k,1M",
    out: Annotated[Path | None, typer.Option(help="also write the table to this Markdown file")] = None,
    repeats: Annotated[int, typer.Option(help="pairs of runs; the median is shown", min=1)] = 5,
) -> None:
    """Measure what checksums, duplicate check, ledger and durable commit cost end to end."""
    with exit_codes():
        from ops.bench.safety import run

        run(params, repeats, out)


@bench_app.command("backlog")
def bench_backlog(
    updates: Annotated[int, typer.Option(help="small ones, in the queue at first", min=100)] = 100_000,
    out: Annotated[Path | None, typer.Option(help="also write the table to this Markdown file")] = None,
) -> None:
    """Drain a large backlog of small updates: the rate of each tenth."""
    with exit_codes():
        from ops.bench.backlog import run

        run(updates, out)


@bench_app.command("connections")
def bench_connections(
    connections: Annotated[int, typer.Option(help="workers connected at once", min=11)] = 2000,
    out: Annotated[Path | None, typer.Option(help="also write the table to this Markdown file")] = None,
    repeats: Annotated[int, typer.Option(help="runs of each; the median is shown", min=1)] = 3,
) -> None:
    """Measure the aggregator's memory with many connected workers that rarely send, beside ten."""
    with exit_codes():
        from ops.bench.connections import run

        run(connections, repeats, out)


@bench_app.command("large")
def bench_large(
    params: Annotated[str, typer.Option(help="model size")] = "100M",
    updates: Annotated[int, typer.Option(help="in all, from two workers", min=2)] = 4,
) -> None:
    """Train a model larger than one message through the default limits of RabbitMQ 4 and Redis; measure memory."""
    with exit_codes():
        from ops.bench.large import run

        run(params, updates)


@bench_app.command("simulator")
def bench_simulator(
    trips: Annotated[int, typer.Option(help="of each run", min=100)] = 3000,
    out: Annotated[Path | None, typer.Option(help="also write the tables to this Markdown file")] = None,
    repeats: Annotated[int, typer.Option(help="runs per number; the median is shown", min=1)] = 5,
) -> None:
    """Measure what a simulated trip costs beside its training, a fleet's memory, and a second process."""
    with exit_codes():
        from ops.bench.simulator import run

        run(trips, repeats, out)


def _simulate(context: typer.Context, processes: int, out: Path, **given: Any) -> None:
    if context.invoked_subcommand is None:
        with exit_codes():
            from ops.simulation.run import command

            command(given, processes, out)


def _simulate_options() -> None:
    """Give `simulate` an option for everything a simulation can be told."""
    from ops.simulation.plan import fields

    fixed = inspect.signature(_simulate).parameters
    parameters = [fixed["context"]]
    own = {
        "processes": (int, typer.Option(help="trainings at once; the result is the same", min=1), 1),
        "out": (
            Path,
            typer.Option(help="folder for the report; an interrupted run in it goes on"),
            Path("runs/simulation"),
        ),
    }
    for name, (kind, option, default) in own.items():
        parameters.append(fixed[name].replace(annotation=Annotated[kind, option], default=default))
    for name, info in fields().items():
        parameters.append(setting_option(name, info))
    _simulate.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    _simulate.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    help_text = "Simulate a fleet: the production worker and aggregator in virtual time, deterministic by seed."
    simulate_app.callback(invoke_without_command=True, help=help_text)(_simulate)


_simulate_options()


@simulate_app.command("compare")
def simulate_compare(
    experiment: Annotated[Path, typer.Argument(help="TOML file: seeds, [base], [grid], [[variant]]")],
    out: Annotated[
        Path | None, typer.Option(help="folder; what is finished in it is kept [default: runs/NAME]")
    ] = None,
    processes: Annotated[int, typer.Option(help="runs at once; the results are the same", min=1)] = 1,
    tensorboard: Annotated[bool, typer.Option("--tensorboard", help="also write TensorBoard's event files")] = False,
) -> None:
    """Run variants of a simulation with several seeds; leave one table, pictures and CSV files behind."""
    with exit_codes():
        from ops.simulation.compare import command

        command(experiment, out, processes, tensorboard)


@codecs_app.callback()
def codecs(context: typer.Context) -> None:
    """List the presets and the stages a codec is made of; `try` measures them on your task."""
    if context.invoked_subcommand is None:
        with exit_codes():
            from ops.codecs import show

            show()


@codecs_app.command("try")
def codecs_try(
    task: Annotated[str, typer.Argument(help="digits, mnist or a file")],
    codec: Annotated[list[str] | None, typer.Option(help="one more codec to try; may be repeated")] = None,
    task_settings: Annotated[str, typer.Option(help="for the task, as a=1,b=2 or JSON")] = "",
    seed: Annotated[int, typer.Option(help="of everything random", min=0)] = 0,
    out: Annotated[Path, typer.Option(help="picture of error against bytes")] = Path("runs/codecs.png"),
) -> None:
    """Run one local training of a task through each codec: bytes, error, bias, time, and a picture."""
    with exit_codes():
        from ops.codecs import try_task

        try_task(task, task_settings, codec or [], seed, out)


@app.command()
def backup(
    file: Annotated[Path, typer.Argument(help="file to write")],
    job: Job = None,
    store_url: StoreUrl = None,
    force: Annotated[bool, typer.Option("--force", help="replace the file if it exists")] = False,
) -> None:
    """Write a whole job to a file as it stands at one revision, while its aggregator runs."""
    with exit_codes():
        from ops.backup import backup as write

        write(load(Settings, {"job": job, "store_url": store_url}), file, force)


@app.command()
def restore(
    file: Annotated[Path, typer.Argument(help="what `fedmq backup` wrote")],
    job: Annotated[str | None, typer.Option(help="the job to make of it [default: the one in the file]")] = None,
    store_url: StoreUrl = None,
    replace: Annotated[bool, typer.Option("--replace", help="put it in the place of a job that exists")] = False,
) -> None:
    """Make a job what a backup holds of it, all or nothing."""
    with exit_codes():
        from ops.backup import restore as read

        read({"job": job, "store_url": store_url}, file, replace)


@app.command()
def torture(
    seeds: Annotated[int, typer.Option(help="how many runs, each with faults of its own", min=1)] = 1000,
    first_seed: Annotated[int, typer.Option(help="of those", min=0)] = 0,
    seed: Annotated[int | None, typer.Option(help="replay one run and print what happens, line by line", min=0)] = None,
    events: Annotated[int, typer.Option(help="actions of a run, faults not counted", min=1)] = 20,
    processes: Annotated[int, typer.Option(help="runs at once; the account is the same", min=1)] = 1,
    servers: Annotated[bool, typer.Option("--servers", help="real faults on private servers instead")] = False,
    faults: Annotated[int, typer.Option(help="with --servers: how many", min=1)] = 20,
    workers: Annotated[int, typer.Option(help="with --servers: how many", min=1)] = 4,
    out: Annotated[
        Path | None, typer.Option(help="file for the shortened schedule of a failure; with --servers a folder")
    ] = None,
) -> None:
    """Break everything that can break, in virtual time or on real servers, and draw up the account."""
    with exit_codes():
        if servers:
            from ops.torture.servers import command as on_servers

            on_servers(faults, workers, seed or 0, out)
        else:
            from ops.torture import command

            if seed is not None:
                command.one(seed, events, out)
            else:
                command.many(first_seed, seeds, events, processes, out)


Ids = Annotated[list[str] | None, typer.Argument(help="update ids, their beginnings, or numbers from the list")]
Every = Annotated[bool, typer.Option("--all", help="all of them")]
Reasoned = Annotated[str | None, typer.Option(help="only those rejected for this reason")]
OfClient = Annotated[str | None, typer.Option(help="only those of this client")]


@deadletters_app.command("list")
def deadletters_list(
    reason: Reasoned = None,
    client: OfClient = None,
    limit: Annotated[int, typer.Option(help="rows, the oldest letters first", min=1)] = 50,
    job: Job = None,
    broker_url: BrokerUrl = None,
) -> None:
    """List a job's dead letters; nothing is removed or reordered."""
    with exit_codes():
        from ops.dead_letters import list_letters

        list_letters(load(Settings, {"job": job, "broker_url": broker_url}), reason, client, limit)


@deadletters_app.command("show")
def deadletters_show(
    name: Annotated[str, typer.Argument(metavar="ID", help="an update id, its beginning, or a number from the list")],
    out: Annotated[Path | None, typer.Option(help="write the message's body to this file")] = None,
    job: Job = None,
    broker_url: BrokerUrl = None,
) -> None:
    """Show everything known of a dead letter, and what to do about it."""
    with exit_codes():
        from ops.dead_letters import show

        show(load(Settings, {"job": job, "broker_url": broker_url}), name, out)


@deadletters_app.command("replay")
def deadletters_replay(
    ids: Ids = None,
    every: Every = False,
    reason: Reasoned = None,
    client: OfClient = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="only say what would be done")] = False,
    job: Job = None,
    broker_url: BrokerUrl = None,
) -> None:
    """Publish dead letters once more, after a fix; each update still counts once at most."""
    with exit_codes():
        from ops.dead_letters import replay, select

        settings = load(Settings, {"job": job, "broker_url": broker_url})
        replay(settings, select(ids or [], every, reason, client, None), dry_run)


@deadletters_app.command("drop")
def deadletters_drop(
    ids: Ids = None,
    every: Every = False,
    reason: Reasoned = None,
    client: OfClient = None,
    older_than: Annotated[str | None, typer.Option(help="only those rejected longer ago: 90s, 30min, 12h, 7d")] = None,
    yes: Annotated[bool, typer.Option("--yes", help="do not ask")] = False,
    job: Job = None,
    broker_url: BrokerUrl = None,
) -> None:
    """Remove dead letters for good."""
    with exit_codes():
        from ops.dead_letters import drop, select

        settings = load(Settings, {"job": job, "broker_url": broker_url})
        drop(settings, select(ids or [], every, reason, client, older_than), yes)


@app.command()
def replay(
    records: Annotated[Path, typer.Option(help="what the aggregator kept: its FEDMQ_RECORD_DIR")],
    version: Annotated[str, typer.Option(help="the version to recompute, or newest")] = "newest",
    every: Annotated[
        bool, typer.Option("--all", help="recompute up to the newest and show every known version")
    ] = False,
    start: Annotated[
        Path | None,
        typer.Option("--from", help="safetensors file of the version to begin with [default: a stored one]"),
    ] = None,
    start_version: Annotated[
        int | None, typer.Option("--from-version", help="which version that is [default: 0]", min=0)
    ] = None,
    out: Annotated[Path | None, typer.Option(help="write the recomputed version to this safetensors file")] = None,
    job: Job = None,
    store_url: StoreUrl = None,
) -> None:
    """Recompute a version from the ledger and the recorded updates, and compare it byte by byte."""
    with exit_codes():
        from ops.replay import Wanted, command

        settings = load(Settings, {"job": job, "store_url": store_url})
        command(settings, records, Wanted(version, every, start, start_version, out))


def main() -> None:
    """Run the command line."""
    app()


if __name__ == "__main__":
    main()
