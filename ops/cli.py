"""The `fedmq` command."""

import inspect
from pathlib import Path
from typing import Annotated, Any

import typer

from aggregator.__main__ import HELP as AGGREGATOR_HELP
from aggregator.__main__ import run as run_aggregator
from shared.command import exit_codes, setting_option, settings_command
from shared.config import AggregatorSettings, EvaluatorSettings, Settings, WorkerSettings, load
from worker.__main__ import HELP as WORKER_HELP
from worker.__main__ import run as run_worker

app = typer.Typer(
    add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None,
    help="Asynchronous federated learning over RabbitMQ and Redis.",
)  # fmt: skip
models_app = typer.Typer(no_args_is_help=True, help="The versions of a job's model.")
app.add_typer(models_app, name="models")
codecs_app = typer.Typer(invoke_without_command=True, help="How updates can be compressed.")
app.add_typer(codecs_app, name="codecs")
bench_app = typer.Typer(invoke_without_command=True, help="Measurements beside their limits and their peers.")
app.add_typer(bench_app, name="bench")

simulate_app = typer.Typer(help="A fleet of any size in virtual time, and comparisons of them.")
app.add_typer(simulate_app, name="simulate")

StoreUrl = Annotated[str | None, typer.Option(help="Redis URL; FEDMQ_STORE_URL")]
BrokerUrl = Annotated[str | None, typer.Option(help="RabbitMQ URL; FEDMQ_BROKER_URL")]
Job = Annotated[str | None, typer.Option(help="the job's id; FEDMQ_JOB")]


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
settings_command(app, "worker", WorkerSettings, run_worker, WORKER_HELP)


def _run_evaluator(settings: EvaluatorSettings) -> None:
    from ops.evaluator import run

    run(settings)


settings_command(
    app, "evaluator", EvaluatorSettings, _run_evaluator,
    "Evaluate each new version on held-out data; write the numbers to the store and to Prometheus.",
)  # fmt: skip


@app.command()
def status(job: Job = None, broker_url: BrokerUrl = None, store_url: StoreUrl = None) -> None:
    """Show where a job stands, and why nothing moves if nothing does."""
    with exit_codes():
        from ops.status import show

        show(load(Settings, {"job": job, "broker_url": broker_url, "store_url": store_url}))


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


@models_app.command("init")
def models_init(
    task: Annotated[str, typer.Argument(help="digits, mnist or a file")],
    job: Job = None,
    store_url: StoreUrl = None,
    out: Annotated[Path | None, typer.Option(help="write a safetensors file instead of version 0")] = None,
) -> None:
    """Build a task's model and store it as version 0 of a job."""
    with exit_codes():
        from ops.models import init

        init(load(EvaluatorSettings, {"job": job, "store_url": store_url, "task": task}), out)


@models_app.command("list")
def models_list(job: Job = None, store_url: StoreUrl = None) -> None:
    """List the stored versions."""
    with exit_codes():
        from ops.models import list_versions

        list_versions(load(Settings, {"job": job, "store_url": store_url}))


@models_app.command("show")
def models_show(
    version: Annotated[str, typer.Argument(help="a version, or newest")] = "newest",
    job: Job = None,
    store_url: StoreUrl = None,
) -> None:
    """Show what is known of a version, and its tensors."""
    with exit_codes():
        from ops.models import show

        show(load(Settings, {"job": job, "store_url": store_url}), version)


@models_app.command("export")
def models_export(
    out: Annotated[Path, typer.Argument(help="safetensors file to write")],
    version: Annotated[str, typer.Option(help="a version, or newest")] = "newest",
    job: Job = None,
    store_url: StoreUrl = None,
) -> None:
    """Write a version as a safetensors file."""
    with exit_codes():
        from ops.models import export

        export(load(Settings, {"job": job, "store_url": store_url}), version, out)


def main() -> None:
    """Run the command line."""
    app()


if __name__ == "__main__":
    main()
