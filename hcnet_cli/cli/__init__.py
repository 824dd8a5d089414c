"""The command line: thin commands that turn flags into a recipe and call one function. Imports nothing heavy."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import hcnet_cli
from hcnet_cli.console import DISK_FULL, UserError, err, is_main_process, notice, out, warn
from hcnet_cli.names import ABLATION_LENGTH, DATA_VARIABLE, EMBEDDED, PAPER
from hcnet_cli.sizes import COMPONENTS, SIZES

if TYPE_CHECKING:
    from hcnet_cli.recipe import Recipe, Resolved
    from hcnet_cli.study.design import Base, StudyRun
    from hcnet_cli.study.runner import Cost

app = typer.Typer(
    help="Train, fine-tune, ablate and report HcNet, the vision backbone that conducts heat.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
recipes_app = typer.Typer(help="List, show and copy the shipped recipes.", no_args_is_help=True)
app.add_typer(recipes_app, name="recipes")
bench_app = typer.Typer()
app.add_typer(bench_app, name="bench")

EMBEDDED_NOTE = {
    "digits": "1,797 real handwritten digits, 32 x 32, those for training also drawn three times anew",
    "digit-scenes": "scenes of handwritten digits with boxes and masks, 128 x 128",
    "digit-stuff": "the same scenes with a class for every pixel, 128 x 128",
}

Size = Annotated[str | None, typer.Option(help=f"Model size: {', '.join(SIZES)}.")]
DataPath = Annotated[str | None, typer.Option("--data", help="A data folder, or the name of an embedded set.")]
RecipeName = Annotated[str | None, typer.Option("--recipe", help="A shipped recipe (hcnet recipes ls) or a YAML file.")]
Epochs = Annotated[int | None, typer.Option(help="Passes over the training data.")]
BatchSize = Annotated[int | None, typer.Option(help="Images per optimizer step, over all processes.")]
Accumulate = Annotated[
    int | None,
    typer.Option(help="Micro-batches a step is divided into; only batch norm can tell."),
]
LearningRate = Annotated[float | None, typer.Option("--lr", help="Peak learning rate; never scaled in silence.")]
Seed = Annotated[int | None, typer.Option(help="Seed of everything random.")]
Init = Annotated[
    str | None,
    typer.Option(
        help="Weights to start from: a run folder, a weights file, none, or auto: the best pretrain run of this size "
        "(on embedded data none if there is none)."
    ),
]
Name = Annotated[str | None, typer.Option(help="Name of the run folder, instead of one made from the recipe.")]
Out = Annotated[Path, typer.Option("--out", help="Results folder; runs go to OUT/runs/.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N or mps.")]
Precision = Annotated[str | None, typer.Option(help="auto, fp32, bf16 or fp16.")]
Compile = Annotated[bool | None, typer.Option("--compile/--no-compile", help="Use torch.compile.")]
Workers = Annotated[int | None, typer.Option(help="Processes that load data.")]
Set = Annotated[list[str] | None, typer.Option("--set", help="Any recipe field: --set optim.weight_decay=0.1")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the plan and stop.")]
Fresh = Annotated[bool, typer.Option("--fresh", help="Start over instead of going on.")]
EvalOnly = Annotated[bool, typer.Option("--eval-only", help="Evaluate the best weights; untrained: --init's.")]


@app.command()
def pretrain(
    ctx: typer.Context,
    size: Size = None,
    data: DataPath = None,
    recipe: RecipeName = None,
    epochs: Epochs = None,
    batch_size: BatchSize = None,
    accumulate: Accumulate = None,
    lr: LearningRate = None,
    seed: Seed = None,
    init: Init = None,
    name: Name = None,
    out_dir: Out = Path("results"),
    device: Device = "auto",
    precision: Precision = None,
    compile_model: Compile = None,
    workers: Workers = None,
    overrides: Set = None,
    dry_run: DryRun = False,
    fresh: Fresh = False,
    eval_only: EvalOnly = False,
) -> None:
    """Train a classifier from scratch: ImageNet-1K, any folder of images by class, or the embedded digits.

    The same command again goes on where the run stopped. Under torchrun it is the same run on more processes.
    """
    _train("pretrain", ctx.params)


@app.command("finetune-det")
def finetune_det(
    ctx: typer.Context,
    size: Size = None,
    data: DataPath = None,
    recipe: RecipeName = None,
    schedule: Annotated[str | None, typer.Option(help="On COCO: 1x, 1x-single-scale or 3x.")] = None,
    epochs: Epochs = None,
    batch_size: BatchSize = None,
    accumulate: Accumulate = None,
    lr: LearningRate = None,
    seed: Seed = None,
    init: Init = None,
    with_masks: Annotated[bool | None, typer.Option("--masks/--no-masks", help="Without: Faster R-CNN.")] = None,
    eval_backend: Annotated[str | None, typer.Option(help="faster-coco-eval or pycocotools.")] = None,
    name: Name = None,
    out_dir: Out = Path("results"),
    device: Device = "auto",
    precision: Precision = None,
    compile_model: Compile = None,
    workers: Workers = None,
    overrides: Set = None,
    dry_run: DryRun = False,
    fresh: Fresh = False,
    eval_only: EvalOnly = False,
) -> None:
    """Fine-tune Mask R-CNN for detection and instance masks: COCO, any COCO-format folder, or embedded digit-scenes.

    Starts from the best finished pretrain run of the same size unless --init says otherwise.
    """
    if schedule is not None:
        if recipe is not None:
            raise UserError("--schedule names a recipe; --recipe does too.", hint="Give one of them.")
        ctx.params["recipe"] = f"coco-{schedule}"
    _train("finetune-det", ctx.params)


@app.command("finetune-seg")
def finetune_seg(
    ctx: typer.Context,
    size: Size = None,
    data: DataPath = None,
    recipe: RecipeName = None,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps.")] = None,
    batch_size: BatchSize = None,
    accumulate: Accumulate = None,
    lr: LearningRate = None,
    seed: Seed = None,
    init: Init = None,
    multi_scale: Annotated[
        bool | None, typer.Option("--multi-scale/--single-scale", help="Also at six scales.")
    ] = None,
    eval_mode: Annotated[str | None, typer.Option(help="whole images, or slide a window over them.")] = None,
    name: Name = None,
    out_dir: Out = Path("results"),
    device: Device = "auto",
    precision: Precision = None,
    compile_model: Compile = None,
    workers: Workers = None,
    overrides: Set = None,
    dry_run: DryRun = False,
    fresh: Fresh = False,
    eval_only: EvalOnly = False,
) -> None:
    """Fine-tune UperNet for semantic segmentation: ADE20K, any folder in its layout, or the embedded digit-stuff.

    Starts from the best finished pretrain run of the same size unless --init says otherwise.
    """
    _train("finetune-seg", ctx.params)


FLAGS = {  # parameter of a command -> (recipe key, flag)
    "size": ("model.size", "--size"),
    "epochs": ("schedule.length", "--epochs"),
    "steps": ("schedule.length", "--steps"),
    "batch_size": ("train.batch_size", "--batch-size"),
    "accumulate": ("train.accumulate", "--accumulate"),
    "lr": ("optim.lr", "--lr"),
    "seed": ("train.seed", "--seed"),
    "init": ("init", "--init"),
    "with_masks": ("head.with_masks", "--masks"),
    "eval_backend": ("data.eval_backend", "--eval-backend"),
    "multi_scale": ("data.multi_scale", "--multi-scale"),
    "eval_mode": ("data.eval_mode", "--eval-mode"),
    "precision": ("train.precision", "--precision"),
    "compile_model": ("train.compile", "--compile"),
    "workers": ("train.workers", "--workers"),
}


def _base(task: str, given: dict[str, Any]) -> tuple[Path, list[tuple[str, Any, str]]]:
    """The recipe file of a training command: named, or the one that belongs to the data; and flags and --set as
    overrides (key, value, source).
    """
    from hcnet_cli import recipe as rcp

    parsed = [rcp.parse_override(text) for text in given["overrides"] or []]
    name, data, source = given["recipe"], given["data"], "--data"
    for key, value in parsed:
        if key == "data.path":
            data, source = str(value), "--set data.path"
    if data is None and (variable := os.environ.get(DATA_VARIABLE[task])):
        data, source = variable, f"${DATA_VARIABLE[task]}"
    file = rcp.recipe_file(name, task) if name else None
    if data is None and file is not None:
        data, source = rcp.resolve(file).recipe.data.path, f"recipe {name}"
    if data is None:
        data, source = EMBEDDED[task], "embedded"
        notice(f"No --data and no ${DATA_VARIABLE[task]}: using the embedded {data} ({EMBEDDED_NOTE[data]}).")
    if file is None:
        file = rcp.recipe_file(data if data == EMBEDDED[task] else PAPER[task], task)
    flags = [
        (key, given[parameter], flag) for parameter, (key, flag) in FLAGS.items() if given.get(parameter) is not None
    ]
    merged = [("data.path", data, source), *flags, *((key, value, f"--set {key}") for key, value in parsed)]
    found = rcp.resolve(file, merged).recipe
    if found.task != task:
        raise UserError(f"The recipe {file} is for {found.task}, not for {task}.")
    for parameter in ("epochs", "steps"):
        if given.get(parameter) is not None and parameter != found.schedule.unit:
            raise UserError(
                f"This recipe counts {found.schedule.unit}, not {parameter}.",
                hint=f"Use --set schedule.length=N, in {found.schedule.unit}.",
            )
    return file, merged


def _resolve(task: str, given: dict[str, Any]) -> Resolved:
    """The recipe of a training command, checked."""
    from hcnet_cli import recipe as rcp

    return rcp.resolve(*_base(task, given))


def _train(task: str, given: dict[str, Any]) -> None:
    name = given["name"]
    if name is not None and (Path(name).name != name or name in ("", ".", "..")):
        raise UserError(f'--name "{name}" is not the name of a folder.', hint="Use --out for the place.")
    if given["eval_only"] and (given["dry_run"] or given["fresh"]):
        raise UserError(f"--eval-only trains nothing, so --{'fresh' if given['fresh'] else 'dry-run'} has no place.")
    resolved = _resolve(task, given)
    from hcnet_cli.run import Options, train

    options = Options(
        results=given["out_dir"],
        name=name or "",
        device=given["device"],
        fresh=given["fresh"],
        dry_run=given["dry_run"],
        eval_only=given["eval_only"],
        argv=sys.argv,
    )
    _, _, stopped_by = train(resolved, options)
    if stopped_by:
        raise typer.Exit(128 + stopped_by)


@app.command()
def check(
    data: Annotated[str, typer.Argument(help="A data folder, or the name of an embedded set.")],
    recipe: RecipeName = None,
    overrides: Set = None,
    output: Annotated[Path | None, typer.Option(help="A .json file with every file of every finding.")] = None,
) -> None:
    """Look at every image and annotation of a data set as training reads them, and say what is wrong, before training.

    The layout tells the task. Exits with 1 if something spoils training or its figures: files that cannot be read,
    sizes that are not those annotated, the same picture in training and validation or in two classes.
    """
    from hcnet_cli import check as checking
    from hcnet_cli.report import render
    from hcnet_cli.runs import check_output, write_output

    if output is not None:
        if output.suffix != ".json":
            raise UserError(f"{output} does not end in .json.")
        check_output(output)
    resolved = _resolve(checking.task_of(data), {"data": data, "recipe": recipe, "overrides": overrides})
    made = checking.check(resolved.recipe)
    sys.stdout.write(render(checking.tables(made), "rich", checking.lines(made)))
    if output is not None:
        write_output(output, checking.json_text(made))
    raise typer.Exit(made.wrong)


@app.command()
def ablate(
    ctx: typer.Context,
    disable: Annotated[
        list[str] | None,
        typer.Option(help=f"Train without a component: {', '.join(COMPONENTS)}; a+b for two at once; all for each."),
    ] = None,
    study_name: Annotated[
        str | None, typer.Option("--study", help="components, stencil, pretraining, or a YAML file.")
    ] = None,
    task: Annotated[
        list[str] | None,
        typer.Option(help="pretrain (default), finetune-det or finetune-seg; may repeat, for one table of all."),
    ] = None,
    size: Size = None,
    data: DataPath = None,
    recipe: RecipeName = None,
    epochs: Epochs = None,
    seeds: Annotated[str | None, typer.Option(help="Seeds of every arm (default: the study's, or 0,1,2).")] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Runs at a time; cores or GPUs are divided between them.")] = 1,
    out_dir: Out = Path("results"),
    device: Device = "auto",
    overrides: Set = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the grid with a time estimate and stop.")] = False,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Start over finished runs of another code version, and broken ones.")
    ] = False,
) -> None:
    """Train the model with and without its parts, on the same data, budget and seeds, and print what they are worth.

    Every cell (arm and seed) is an ordinary run: finished ones are taken as they are, whoever asked for them, and the
    same command again goes on. Without --epochs the embedded digits get 3 epochs a run, fewer than their recipe has,
    so that two arms and three seeds end within minutes. Fine-tuning starts from the same arm's own pretraining when
    pretrain is among the tasks, else from random weights.
    """
    from hcnet_cli.report import render
    from hcnet_cli.study import design, runner

    if bool(disable) == bool(study_name):
        raise UserError(
            "--disable makes a study of its own: leave it or --study out."
            if disable
            else "Name components to --disable, or a --study.",
            hint=f"For example: hcnet ablate --disable refinement. Studies: {', '.join(design.shipped_studies())}.",
        )
    short, asked = design.read_study(study_name) if study_name else design.disable_study(disable or [])
    wanted = design.study_runs(asked, task or [], recipe or "")
    for flag in ("data", "epochs"):
        if len(wanted) > 1 and ctx.params[flag] is not None:
            raise UserError(
                f"--{flag} is for a study of one task.",
                hint="Name recipes, and what all arms change in them, under runs: in a study file.",
            )
    bases = [_ablation_base(kind, one, ctx.params) for kind, one in wanted]
    plan = design.plan(short, asked, bases, design.parse_seeds(seeds) if seeds is not None else (), out_dir)
    settings = runner.Settings(results=out_dir, device=device, jobs=jobs, fresh=fresh, argv=sys.argv)
    if dry_run:
        runner.preview(plan, settings, lambda one: _cost(one, device))
        return
    record, code = runner.run(plan, settings)
    if code <= 1:
        table = design.table(record, design.by_name(out_dir))
        sys.stdout.write(render([table], "rich"))
    raise typer.Exit(code)


def _ablation_base(task: str, one: StudyRun, given: dict[str, Any]) -> Base:
    """What all arms of a study share in one task: the recipe, and what the study and the flags change in it."""
    from hcnet_cli import recipe as rcp
    from hcnet_cli.study.design import Base

    file, overrides = _base(task, {**given, "recipe": one.recipe or None, "data": given["data"] or one.data})
    changes = [(key, value, "the study") for key, value in rcp.flatten(one.changes).items()]
    protocol = rcp.resolve(file).recipe.protocol
    if protocol in ABLATION_LENGTH and "schedule.length" not in {key for key, _, _ in [*overrides, *changes]}:
        changes.append(("schedule.length", ABLATION_LENGTH[protocol], "the default of ablations"))
    return Base(file, (*changes, *overrides), one.init)


def _cost(recipe: Recipe, device: str) -> Cost:
    """What one run of a recipe takes; the time from a short trial."""
    from hcnet_cli import build, profile
    from hcnet_cli.study.runner import Cost

    where = build.pick_device(device)
    data = build.build_data(recipe)
    task = build.build_task(recipe, data)
    params, macs = profile.count_params(task.model), build.macs(task, data)
    images = recipe.train.batch_size * data.steps(recipe).total
    return Cost(images, build.seconds_per_image(recipe, data, task, where), params, macs)


@recipes_app.command("ls")
def recipes_ls() -> None:
    """Names and first lines of the shipped recipes, and of the studies (hcnet ablate)."""
    from hcnet_cli import recipe as rcp
    from hcnet_cli.study.design import shipped_studies

    for name in [*(f"ablate/{study}" for study in shipped_studies()), *rcp.shipped()]:
        first = _any_task(name).read_text(encoding="utf-8").splitlines()[0]
        out.print(f"{name:<34}{first.lstrip('# ')}", markup=False)


@recipes_app.command("show")
def recipes_show(name: Annotated[str, typer.Argument(help="For example pretrain/imagenet.")]) -> None:
    """Print a shipped recipe."""
    out.print(_any_task(name).read_text(encoding="utf-8"), markup=False, end="")


@recipes_app.command("cp")
def recipes_cp(
    name: Annotated[str, typer.Argument(help="For example pretrain/imagenet.")],
    destination: Annotated[Path, typer.Argument(help="A new YAML file.")],
) -> None:
    """Copy a shipped recipe to a file of your own, for --recipe FILE."""
    if destination.suffix not in (".yaml", ".yml"):
        raise UserError(f"{destination} does not end in .yaml.")
    if destination.exists():
        raise UserError(f"{destination} exists and was left alone.")
    text = _any_task(name).read_text(encoding="utf-8")
    try:
        destination.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"{destination} cannot be written: {error.strerror}.") from None
    use = f"hcnet ablate --study {destination}" if "arms:" in text else f"--recipe {destination}"
    notice(f"Wrote {destination}; use it with {use}.")


def _any_task(name: str) -> Path:
    """The shipped recipe's or study's file, by full name or by a short name that is unique."""
    from hcnet_cli import recipe as rcp
    from hcnet_cli.study.design import shipped_studies, study_file

    if name.removeprefix("ablate/") in shipped_studies():
        return study_file(name)
    matches = [full for full in rcp.shipped() if full.split("/", 1)[1] == name]
    return rcp.recipe_file(matches[0] if len(matches) == 1 else name)


@app.command()
def report(
    fmt: Annotated[
        str | None,
        typer.Option("--format", help="rich, markdown, csv, json, latex or html; else what the output's ending names."),
    ] = None,
    table: Annotated[str, typer.Option(help="imagenet, coco, ade20k, ablation or all.")] = "all",
    results: Annotated[list[Path] | None, typer.Option(help="Results folder; may be repeated.")] = None,
    published: Annotated[list[Path] | None, typer.Option(help="CSV of further published numbers; may repeat.")] = None,
    output: Annotated[Path | None, typer.Option(help="A file to write instead of standard output.")] = None,
    check: Annotated[
        Path | None, typer.Option(help="Folder of tables to compare with the runs; 1 if they differ.")
    ] = None,
    watch: Annotated[bool, typer.Option("--watch", help="Write the page anew every 10 seconds, until Ctrl-C.")] = False,
) -> None:
    """Print the paper's tables from the runs, published numbers beside measured ones."""
    from hcnet_cli.report import format_for, report_check
    from hcnet_cli.report import report as make
    from hcnet_cli.runs import write_output
    from hcnet_cli.study import design

    for folder in results or []:
        if not folder.is_dir():
            raise UserError(f"There is no results folder {folder}.")
    where, more = results or [Path("results")], published or []
    studies, unreadable = design.tables(where)
    for line in unreadable:
        warn(f"{line}.")
    if check is not None:
        if output is not None or fmt is not None:
            raise UserError(
                f"--check compares every table in {check}; --{'output' if output else 'format'} has no place."
            )
        for line in (differing := report_check(where, check, published=more, extra=studies)):
            out.print(line, markup=False)
        if not differing:
            notice(f"All tables in {check} agree with the runs.")
        raise typer.Exit(1 if differing else 0)
    fmt = fmt or format_for(output)
    if watch and (fmt != "html" or output is None):
        raise UserError("--watch refreshes a page in a file.", hint="Add --format html --output report.html")
    while True:
        text = make(
            where, table=table, fmt=fmt, published=more, extra=studies, output=output, refresh=10 if watch else None
        )
        if output is None:
            sys.stdout.write(text)
            return
        write_output(output, text)
        if not watch:
            return
        time.sleep(10)
        studies, _ = design.tables(where)


@app.command()
def explain(
    run: Annotated[Path, typer.Argument(help="A run folder, such as results/runs/NAME.")],
    image: Annotated[Path | None, typer.Option(help="A picture to measure on, instead of validation images.")] = None,
    out_dir: Annotated[
        Path | None, typer.Option("--out", help="Folder for the pictures, instead of RUN/explain.")
    ] = None,
) -> None:
    """Draw what the heat layers of a run do: stencils, conduction rates, transfer functions, receptive fields."""
    from hcnet_cli.explain import explain as draw

    for path in draw(run, image, out_dir):
        out.print(str(path), markup=False)


Output = Annotated[Path | None, typer.Option(help="A .md or .json file to write besides.")]


@bench_app.callback(invoke_without_command=True)
def bench(
    ctx: typer.Context,
    models: Annotated[
        str,
        typer.Option(
            help="Comma list: sizes, names of timm, reference (the literal form); SIZE:plain: without kernels."
        ),
    ] = "hcnet_tiny,reference",
    mode: Annotated[str, typer.Option(help="Comma list of infer and train.")] = "infer",
    precision: Annotated[str, typer.Option(help="Comma list of fp32, bf16 and fp16.")] = "fp32",
    compile_models: Annotated[bool, typer.Option("--compile", help="Each also compiled, beside eager.")] = False,
    batch_size: Annotated[int, typer.Option(min=1, help="Images at a time.")] = 8,
    img_size: Annotated[int, typer.Option(min=8, help="Height and width of the images.")] = 224,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads of PyTorch.")] = None,
    device: Device = "auto",
    rounds: Annotated[int, typer.Option(min=1, help="Turns of each contender; figures are medians over them.")] = 7,
    output: Output = None,
) -> None:
    """Time models side by side: images/s, latency, peak memory, share of what the machine can multiply.

    Every model in every mode and precision is a contender; they take turns in one process, so that what else this
    machine does slows all alike, and ratios hold. `hcnet bench data` times the input pipeline.
    """
    if ctx.invoked_subcommand is not None:
        if given := [name for name in ctx.params if "COMMANDLINE" in str(ctx.get_parameter_source(name))]:
            raise UserError(
                f"--{given[0].replace('_', '-')} times models, and {ctx.invoked_subcommand} times something else.",
                hint=f"See hcnet bench {ctx.invoked_subcommand} --help.",
            )
        return
    from hcnet_cli.bench import models as timing
    from hcnet_cli.bench import tables
    from hcnet_cli.report import render
    from hcnet_cli.runs import write_output

    timing.check_output(output)
    settings = timing.settings(batch_size, img_size, rounds, device, threads)
    known = tables.facts(settings.device, sys.argv, settings.threads)
    made = timing.measure(timing.contenders(models, mode, precision, compile_models), settings)
    sys.stdout.write(render(tables.tables(made), "rich"))
    if output is not None:
        write_output(output, (tables.json_text if output.suffix == ".json" else tables.page)(made, known))
    if made.stopped:
        raise typer.Exit(130)
    if all(contender.error for contender in made.contenders):
        raise typer.Exit(1)


@bench_app.command("data")
def bench_data(
    data: Annotated[str | None, typer.Option(help="An image folder (default: synthetic JPEGs).")] = None,
    recipe: Annotated[str, typer.Option(help="The pretrain recipe whose augmentation is timed.")] = "imagenet",
    img_size: Annotated[int | None, typer.Option(min=8, help="Height and width (default: the recipe's).")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images of a batch.")] = 64,
    workers: Annotated[int, typer.Option(min=0, help="Processes that load data; 0: this one.")] = 0,
    rounds: Annotated[int, typer.Option(min=1, help="Turns of each pipeline; figures are medians over them.")] = 5,
    output: Output = None,
) -> None:
    """Time the training input pipeline alone, beside timm's on the same folder with the same augmentation."""
    from hcnet_cli import build
    from hcnet_cli.bench import data as bench_data
    from hcnet_cli.bench import models as bench
    from hcnet_cli.bench import tables
    from hcnet_cli.report import render
    from hcnet_cli.runs import write_output

    bench.check_output(output)
    bench_data.read_recipe(recipe, data or "", img_size)  # before pictures are made for it
    known = tables.facts(build.pick_device("cpu"), sys.argv, threads=1)
    with bench_data.folder(data) as (root, name):
        made = bench_data.measure(
            bench_data.read_recipe(recipe, root, img_size),
            root,
            name,
            batch_size=batch_size,
            workers=workers,
            rounds=rounds,
        )
    sys.stdout.write(render([bench_data.table(made)], "rich"))
    if output is not None:
        write_output(output, (bench_data.json_text if output.suffix == ".json" else bench_data.page)(made, known))
    if made.stopped:
        raise typer.Exit(130)


def _version(value: bool) -> None:
    if value:
        out.print(f"hcnet {hcnet_cli.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")] = False,
) -> None:
    pass


def main() -> None:
    """Runs the program; a user's mistake ends in one sentence and exit code 2, never in a traceback."""
    if sys.argv[1:2] != ["bench"]:  # which measures PyTorch as it comes
        # Read when torch is loaded, so set before any command runs; what the user has set stays.
        os.environ.setdefault("GOMP_SPINCOUNT", "5000")  # waiting threads spin briefly: two runs can share the cores
        os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # tensors in huge pages: far fewer page faults
    try:
        try:
            app(prog_name="hcnet")
        finally:
            sys.stdout.flush()
    except UserError as error:
        if is_main_process():
            err.print("[bold red]error:[/] ", end="")
            err.print(str(error), markup=False)
            if error.hint:
                err.print(error.hint, markup=False)
        sys.exit(error.exit_code)
    except BrokenPipeError:  # the reader of a pipe (head, less) has seen enough
        _close_output()
        sys.exit(0)
    except OSError as error:
        if error.errno not in DISK_FULL:
            raise
        _close_output()
        err.print("[bold red]error:[/] The disk is full: what is printed here could not be written.")
        sys.exit(2)


def _close_output() -> None:
    """What is still to be printed goes nowhere, instead of failing once more when the interpreter ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
