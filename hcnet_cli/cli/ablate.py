"""`hcnet ablate`: studies of the model with and without its parts."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hcnet_cli.cli import complete, options, studies
from hcnet_cli.cli.base import base_recipe, require_named
from hcnet_cli.console import UserError
from hcnet_cli.privacy import command_line
from hcnet_cli.sizes import COMPONENTS
from hcnet_cli.tasks import TASKS

if TYPE_CHECKING:
    from hcnet_cli.recipe import Recipe
    from hcnet_cli.study.design import Base, StudyRun
    from hcnet_cli.study.preview import Cost


def ablate(
    ctx: typer.Context,
    disable: Annotated[
        list[str] | None,
        typer.Option(
            help=f"Train without a component: {', '.join(COMPONENTS)}; a+b for two at once; all for each.",
            autocompletion=complete.words((*COMPONENTS, "all")),
        ),
    ] = None,
    study_name: Annotated[
        str | None,
        typer.Option(
            "--study",
            help="components, stencil, depth, pretraining, backbones, or a YAML file.",
            autocompletion=complete.studies,
        ),
    ] = None,
    arms: Annotated[
        str | None,
        typer.Option(help="Models of --study backbones, the baseline first: t,convnext_tiny,FILE.py:FUNCTION."),
    ] = None,
    sweep: Annotated[
        list[str] | None,
        typer.Option(help="An arm for each value of a recipe field: optim.lr=1e-3,3e-3; several make a grid."),
    ] = None,
    task: Annotated[
        list[str] | None,
        typer.Option(
            help="pretrain (default), finetune-det or finetune-seg; may repeat, for one table of all.",
            autocompletion=complete.words(TASKS),
        ),
    ] = None,
    size: options.Size = None,
    model: options.Model = None,
    data: options.DataPath = None,
    recipe: options.RecipeName = None,
    epochs: options.Epochs = None,
    steps: options.Steps = None,
    batch_size: options.BatchSize = None,
    seeds: Annotated[str | None, typer.Option(help="Seeds of every arm (default: the study's, or 0,1,2).")] = None,
    test: Annotated[
        str | None, typer.Option(help="Primary test: paired-t (default) or sign-flip. Fixed before training.")
    ] = None,
    margin: Annotated[
        float | None, typer.Option(help="Points; a difference shown to be smaller counts as equivalence.")
    ] = None,
    detect: Annotated[
        float | None, typer.Option(help="Points; the plan says how many seeds show such a difference.")
    ] = None,
    until: Annotated[
        float | None, typer.Option(help="Points; add seeds until each arm's interval is at most ± this wide.")
    ] = None,
    max_seeds: Annotated[int | None, typer.Option(help="Seeds at most, with --until (default 20).")] = None,
    early_stopping: Annotated[
        bool, typer.Option("--early-stopping", help="Allow train.patience: arms then train for different steps.")
    ] = False,
    jobs: Annotated[int, typer.Option(min=1, help="Runs at a time; cores or GPUs are divided between them.")] = 1,
    out_dir: options.Out = Path("results"),
    device: options.Device = "auto",
    overrides: options.Set = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the grid with a time estimate and stop.")] = False,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Start over finished runs of another code version, and broken ones.")
    ] = False,
    on: studies.On = None,
    partition: studies.Partition = None,
    gpus: studies.Gpus = None,
    cpus: studies.Cpus = None,
    time: studies.Time = None,
    at_once: studies.AtOnce = None,
    sbatch_args: studies.SbatchArgs = None,
) -> None:
    """Train the model with and without its parts, on the same data, budget and seeds, and print what they are worth.

    Every cell (arm and seed) is an ordinary run: finished ones are taken as they are, whoever asked for them, and the
    same command again goes on. Without --epochs the embedded digits get 3 epochs a run, fewer than their recipe has,
    so that two arms and three seeds end within minutes. Fine-tuning starts from the same arm's own pretraining when
    pretrain is among the tasks, else from random weights.
    """
    from hcnet_cli.inputs import check_data, check_device, check_model
    from hcnet_cli.report import render
    from hcnet_cli.study import analysis, design, preview, runner
    from hcnet_cli.study.table import runs_by_name, table

    cluster = studies.cluster(ctx.params)
    if cluster is None:
        check_device(device)
    if cluster is not None and jobs > 1:
        raise UserError("--jobs is for this machine.", hint="--at-once says how many runs Slurm starts at a time.")
    if arms is not None and study_name != "backbones":
        raise UserError(
            "--arms names models for --study backbones.", hint="hcnet ablate --study backbones --arms t,convnext_tiny"
        )
    given = [flag for flag, value in (("--disable", disable), ("--study", study_name), ("--sweep", sweep)) if value]
    if len(given) != 1:
        raise UserError(
            f"{' and '.join(given)} each make a study of their own: leave one out."
            if given
            else "Name components to --disable, a --study, or a field to --sweep.",
            hint=f"For example: hcnet ablate --disable refinement. Studies: {', '.join(design.shipped_studies())}.",
        )
    if study_name:
        short, asked = design.backbones_study(arms) if arms is not None else design.read_study(study_name)
    else:
        short, asked = design.sweep_study(sweep) if sweep else design.disable_study(disable or [])
    if early_stopping:
        asked = asked.model_copy(update={"early_stopping": True})
    flags = {"test": test, "margin": margin, "until": until, "max_seeds": max_seeds}
    asked = asked.model_copy(update={"primary": analysis.with_flags(asked.primary, flags)})
    if detect is not None and not 0 < detect < float("inf"):
        raise UserError(f"--detect {detect:g} is no difference in points.", hint="For example: --detect 0.3")
    wanted = design.study_runs(asked, task or [], recipe or "")
    for flag in ("data", "epochs", "steps", "batch_size"):
        if len(wanted) > 1 and ctx.params[flag] is not None:
            raise UserError(
                f"--{flag.replace('_', '-')} is for a study of one task.",
                hint="Name recipes, and what all arms change in them, under runs: in a study file.",
            )
    bases = [_study_base(kind, one, ctx.params) for kind, one in wanted]
    expanded = design.expand(short, asked, bases, design.parse_seeds(seeds) if seeds is not None else (), out_dir)
    for one in {(one.task, one.data.path): one for one in expanded.recipes.values()}.values():
        check_model(one)
        check_data(one)
    named = {value for base in bases for key, value, flag in base.overrides if key == "model.name" and flag[:2] == "--"}
    if arms is not None:
        named |= {one.model.name for one in expanded.recipes.values()}
    for one in expanded.recipes.values():
        require_named(one, "--model" if one.model.name in named else "")
    settings = runner.Settings(
        _read_data, results=out_dir, device=device, jobs=jobs, fresh=fresh, argv=command_line(), detect=detect
    )
    if cluster is not None:
        from hcnet_cli.study.submit import submit_study

        finished = submit_study(expanded, settings, cluster, dry_run)
        if finished is not None:
            sys.stdout.write(render([table(finished, runs_by_name(out_dir))], "rich"))
        return
    if dry_run:
        preview.preview(expanded, settings, lambda one: _cost(one, device))
        return
    record, code = runner.run(expanded, settings)
    if code <= 1:
        made = table(record, runs_by_name(out_dir))
        sys.stdout.write(render([made], "rich"))
    raise typer.Exit(code)


def _study_base(task: str, one: StudyRun, given: dict[str, Any]) -> Base:
    """What all arms of a study share in one task: the recipe, and what the study and the flags change in it."""
    from hcnet_cli import recipe as rcp
    from hcnet_cli.study.design import Base

    file, overrides = base_recipe(task, {**given, "recipe": one.recipe or None, "data": given["data"] or one.data})
    changes = [(key, value, "the study") for key, value in rcp.flatten(one.changes).items()]
    protocol = rcp.resolve(file).recipe.protocol
    spec = TASKS[task]
    embedded = protocol == f"{task}/{spec.embedded}"
    if embedded and spec.ablation_length and "schedule.length" not in {key for key, _, _ in [*overrides, *changes]}:
        changes.append(("schedule.length", spec.ablation_length, "the default of ablations"))
    return Base(file, (*changes, *overrides), one.init)


def _read_data(recipe: Recipe) -> str:
    """The digest of a recipe's data, read now."""
    from hcnet_cli import reading

    return reading.open_data(recipe).info.digest


def _cost(recipe: Recipe, device: str) -> Cost:
    """What one run of a recipe takes; the time from a short trial."""
    from hcnet_cli import build, profile, trial
    from hcnet_cli.device import pick_device
    from hcnet_cli.study.preview import Cost

    data = build.open_data(recipe)
    task = build.build_task(recipe, data)
    return Cost(
        images=recipe.train.batch_size * build.steps(recipe, data).total,
        seconds=trial.seconds_per_image(recipe, data, task, pick_device(device)),
        params=profile.count_params(task.model),
        macs=build.count_macs(recipe, task, data),
    )
