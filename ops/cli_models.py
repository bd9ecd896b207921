"""The `fedmq models` commands."""

from pathlib import Path
from typing import Annotated

import typer

from shared.command import exit_codes
from shared.config import AggregatorSettings, EvaluatorSettings, Settings, load
from shared.errors import SettingsError

models_app = typer.Typer(no_args_is_help=True, help="The versions of a job's model.")

StoreUrl = Annotated[str | None, typer.Option(help="Redis URL; FEDMQ_STORE_URL")]
Job = Annotated[str | None, typer.Option(help="the job's id; FEDMQ_JOB")]
AsJson = Annotated[bool, typer.Option("--json", help="print JSON")]


@models_app.command("init")
def models_init(
    task: Annotated[str, typer.Argument(help="digits, mnist or a file")],
    job: Job = None,
    store_url: StoreUrl = None,
    out: Annotated[Path | None, typer.Option(help="write a safetensors file instead of version 0")] = None,
    if_missing: Annotated[bool, typer.Option("--if-missing", help="a model of the same layout is well")] = False,
) -> None:
    """Build a task's model and store it as version 0 of a job."""
    with exit_codes():
        from ops.models.start import init

        init(load(EvaluatorSettings, {"job": job, "store_url": store_url, "task": task}), out, if_missing)


@models_app.command("list")
def models_list(job: Job = None, store_url: StoreUrl = None, as_json: AsJson = False) -> None:
    """List the stored versions."""
    with exit_codes():
        from ops.models.listing import list_versions

        list_versions(load(Settings, {"job": job, "store_url": store_url}), as_json)


@models_app.command("show")
def models_show(
    version: Annotated[str, typer.Argument(help="a version, a tag, or newest")] = "newest",
    job: Job = None,
    store_url: StoreUrl = None,
    as_json: AsJson = False,
) -> None:
    """Show what is known of a version, who contributed to it, and its tensors."""
    with exit_codes():
        from ops.models.listing import show

        show(load(Settings, {"job": job, "store_url": store_url}), version, as_json)


@models_app.command("diff")
def models_diff(
    a: Annotated[str, typer.Argument(help="a version, a tag, or newest")],
    b: Annotated[str, typer.Argument(help="what to compare with it")],
    job: Job = None,
    store_url: StoreUrl = None,
    as_json: AsJson = False,
) -> None:
    """Compare two versions: each tensor, all weights together, their evaluations."""
    with exit_codes():
        from ops.models.diff import command

        command(load(Settings, {"job": job, "store_url": store_url}), a, b, as_json)


@models_app.command("tag")
def models_tag(
    name: Annotated[str | None, typer.Argument(help="of the tag, e.g. production; none: list the tags")] = None,
    version: Annotated[str | None, typer.Argument(help="a version, another tag, or newest")] = None,
    delete: Annotated[bool, typer.Option("--delete", help="remove the tag")] = False,
    history: Annotated[bool, typer.Option("--history", help="which version each tag named, and since when")] = False,
    job: Job = None,
    store_url: StoreUrl = None,
    as_json: AsJson = False,
) -> None:
    """Give a version a name; it is not dropped while it has one. Without arguments: list the tags."""
    with exit_codes():
        from ops.models import tags

        if name is None:
            if delete:
                raise SettingsError("--delete: say which tag")
            tags.list_tags(load(Settings, {"job": job, "store_url": store_url}), history, as_json)
            return
        if delete == (version is not None) or history or as_json:
            raise SettingsError("say `tag NAME VERSION`, `tag NAME --delete`, or `tag` (--history, --json) alone")
        settings = load(AggregatorSettings, {"job": job, "store_url": store_url})
        if version is None:
            tags.delete(settings, name)
        else:
            tags.set_tag(settings, name, version)


@models_app.command("promote")
def models_promote(
    source: Annotated[str, typer.Argument(metavar="FROM", help="the tag that names the version, e.g. canary")],
    target: Annotated[str, typer.Argument(metavar="TO", help="the tag that is moved, e.g. production")],
    if_metric: Annotated[str | None, typer.Option(help='only if it holds, e.g. "accuracy>=0.94"')] = None,
    job: Job = None,
    store_url: StoreUrl = None,
) -> None:
    """Move one tag to the version that another one names."""
    with exit_codes():
        from ops.models.tags import promote

        promote(load(AggregatorSettings, {"job": job, "store_url": store_url}), source, target, if_metric)


@models_app.command("export")
def models_export(
    out: Annotated[Path, typer.Argument(help="file to write: .safetensors, .pt, .onnx or .npz")],
    version: Annotated[str, typer.Option(help="a version, a tag, or newest")] = "newest",
    task: Annotated[str | None, typer.Option(help="for .onnx: with build() and example_input(); FEDMQ_TASK")] = None,
    force: Annotated[bool, typer.Option("--force", help="replace the file if it exists")] = False,
    with_metadata: Annotated[
        bool, typer.Option("--with-metadata", help="also write OUT.json: metrics, tags, hashes")
    ] = False,
    job: Job = None,
    store_url: StoreUrl = None,
) -> None:
    """Write a version as a file: safetensors, a torch state_dict, ONNX or numpy's npz."""
    with exit_codes():
        from ops.models.export import export

        settings = load(EvaluatorSettings, {"job": job, "store_url": store_url, "task": task})
        export(settings, version, out, force, with_metadata)


@models_app.command("prune")
def models_prune(
    keep: Annotated[int | None, typer.Option(help="so many of the newest stay", min=1)] = None,
    older_than: Annotated[str | None, typer.Option(help="only those made longer ago: 90s, 30min, 12h, 7d")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="only say what would be done")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="do not ask")] = False,
    job: Job = None,
    store_url: StoreUrl = None,
) -> None:
    """Drop versions, but never the newest, one with a tag, or one that the job's rule needs."""
    with exit_codes():
        from ops.models.prune import prune

        prune(load(AggregatorSettings, {"job": job, "store_url": store_url}), keep, older_than, dry_run, yes)


@models_app.command("watch")
def models_watch(
    tag: Annotated[str | None, typer.Option(help="follow what this tag names, not the newest version")] = None,
    execute: Annotated[
        str | None,
        typer.Option("--exec", help="shell command run for each; it finds FEDMQ_VERSION and FEDMQ_TAG"),
    ] = None,
    poll_s: Annotated[float, typer.Option(help="how often to look, seconds", min=0.05)] = 1.0,
    job: Job = None,
    store_url: StoreUrl = None,
) -> None:
    """Follow new versions, or a tag, until Ctrl-C; run a command for each."""
    with exit_codes():
        from ops.models.watch import command

        command(load(Settings, {"job": job, "store_url": store_url}), tag, execute, poll_s)


@models_app.command("rollback")
def models_rollback(
    version: Annotated[str, typer.Argument(help="a stored version, or a tag")],
    job: Job = None,
    store_url: StoreUrl = None,
) -> None:
    """Make an old version the newest: a new version with its weights, everything after it undone."""
    with exit_codes():
        from ops.rollback import command

        command(load(AggregatorSettings, {"job": job, "store_url": store_url}), version)
