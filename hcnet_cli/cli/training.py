"""The training commands: one for each task, made from its spec."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from hcnet_cli.cli import options, studies
from hcnet_cli.cli.base import resolve
from hcnet_cli.console import UserError, loading
from hcnet_cli.privacy import command_line
from hcnet_cli.tasks import TASKS
from hcnet_cli.tasks.spec import Spec

Parameters = dict[str, tuple[Any, Any]]  # name -> annotation, default


def training_command(spec: Spec) -> Callable[..., None]:
    """The function that Typer makes the command of a task from: the shared options, and the task's own."""

    def command(ctx: typer.Context, **_: Any) -> None:
        train_task(spec.name, ctx.params)

    parameters = [inspect.Parameter("ctx", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context)]
    parameters += [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
        for name, (annotation, default) in _parameters(spec).items()
    ]
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {one.name: one.annotation for one in parameters}
    command.__doc__ = spec.help
    command.__name__ = spec.name.replace("-", "_")
    return command


def _parameters(spec: Spec) -> Parameters:
    own: Parameters = {
        option.name: (Annotated[option.type | None, typer.Option(*option.flags, help=option.help)], None)
        for option in spec.options
    }
    return {
        "size": (options.Size, None),
        "model": (options.Model, None),
        "data": (options.DataPath, None),
        "data_trust": (options.DataTrust, None),
        "recipe": (options.RecipeName, None),
        "epochs": (options.Epochs, None),
        "steps": (options.Steps, None),
        "batch_size": (options.BatchSize, None),
        "accumulate": (options.Accumulate, None),
        "lr": (options.LearningRate, None),
        "freeze": (options.Freeze, None),
        "seed": (options.Seed, None),
        "init": (options.Init, None),
        "pretrained": (options.Pretrained, None),
        **own,
        "name": (options.Name, None),
        "out_dir": (options.Out, Path("results")),
        "device": (options.Device, "auto"),
        "precision": (options.Precision, None),
        "compile_model": (options.Compile, None),
        "workers": (options.Workers, None),
        "overrides": (options.Set, None),
        "dry_run": (options.DryRun, False),
        "fresh": (options.Fresh, False),
        "eval_only": (options.EvalOnly, False),
        "profile": (options.Profile, None),
        "track": (options.Track, None),
        **studies.OPTIONS,
    }


def train_task(task: str, given: dict[str, Any]) -> None:
    """Runs a training command with the parameters that were given."""
    from hcnet_cli.finished import finished_run, notice_finished
    from hcnet_cli.inputs import check_batch, check_device, check_inputs
    from hcnet_cli.track import check_trackers

    name = given["name"]
    if name is not None and (Path(name).name != name or name in ("", ".", "..")):
        raise UserError(f'--name "{name}" is not the name of a folder.', hint="Use --out for the place.")
    for flag, others in (
        ("eval_only", ("fresh", "dry_run", "profile", "track", "on")),
        ("dry_run", ("profile", "track")),
    ):
        if given[flag] and (found := [other for other in others if given[other]]):
            one, other = (word.replace("_", "-") for word in (flag, found[0]))
            raise UserError(f"--{one} trains nothing: it cannot be combined with --{other}.")
    track = check_trackers(given["track"]) if given["track"] is not None else []
    cluster = studies.cluster(given)
    resolved = resolve(task, given)
    if cluster is None:
        check_device(given["device"])  # this and what follows before PyTorch is loaded, which takes seconds
    check_inputs(resolved.recipe, given["out_dir"], given["eval_only"])
    if not given["eval_only"]:
        check_batch(resolved.recipe)
    if cluster is not None:
        from hcnet_cli.study.submit import run_label, submit_run

        recipe, words = resolved.recipe, studies.ordinary_command()
        label = name or run_label(recipe, words)
        submit_run(recipe, words, label, given["out_dir"], cluster, given["dry_run"])
        return
    started = not (given["dry_run"] or given["eval_only"] or given["fresh"])
    if started and (whole := finished_run(resolved.recipe, given["out_dir"], name or "", given["device"])):
        notice_finished(whole, resolved.recipe, given["profile"] or 0, track)
        return
    with loading():
        from hcnet_cli.run import Options, train

    chosen = Options(
        results=given["out_dir"],
        name=name or "",
        device=given["device"],
        fresh=given["fresh"],
        dry_run=given["dry_run"],
        eval_only=given["eval_only"],
        profile=given["profile"] or 0,
        track=track,
        argv=command_line(),
    )
    _, _, stopped_by = train(resolved, chosen)
    if stopped_by:
        raise typer.Exit(128 + stopped_by)


def register(app: typer.Typer) -> None:
    """Adds the command of every task."""
    for spec in TASKS.values():
        app.command(spec.name)(training_command(spec))
