"""The command line: thin commands that turn flags into a recipe and call one function. Imports nothing heavy."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import hcnet_cli
from hcnet_cli.console import UserError, err, is_main_process, notice, out
from hcnet_cli.names import DATA_VARIABLE, EMBEDDED, PAPER, SIZES

if TYPE_CHECKING:
    from hcnet_cli.recipe import Resolved

app = typer.Typer(
    help="Train, fine-tune, ablate and report HcNet, the vision backbone that conducts heat.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
recipes_app = typer.Typer(help="List, show and copy the shipped recipes.", no_args_is_help=True)
app.add_typer(recipes_app, name="recipes")

EMBEDDED_NOTE = {
    "digits": "1,797 real handwritten digits, 32 x 32",
    "digit-scenes": "scenes of handwritten digits with boxes and masks, 128 x 128",
    "digit-stuff": "scenes of handwritten digits with a label for every pixel, 128 x 128",
}

Size = Annotated[str | None, typer.Option(help=f"Model size: {', '.join(SIZES)}.")]
DataPath = Annotated[str | None, typer.Option("--data", help="A data folder, or the name of an embedded set.")]
RecipeName = Annotated[str | None, typer.Option("--recipe", help="A shipped recipe (hcnet recipes ls) or a YAML file.")]
Epochs = Annotated[int | None, typer.Option(help="Passes over the training data.")]
BatchSize = Annotated[int | None, typer.Option(help="Images per optimizer step, over all processes.")]
Accumulate = Annotated[int | None, typer.Option(help="Micro-batches a step is divided into; changes no result.")]
LearningRate = Annotated[float | None, typer.Option("--lr", help="Peak learning rate; never scaled in silence.")]
Seed = Annotated[int | None, typer.Option(help="Seed of everything random.")]
Init = Annotated[str | None, typer.Option(help="Weights to start from: a run folder, .safetensors or .pth file; none.")]
Name = Annotated[str, typer.Option(help="Name of the run folder, instead of one made from the recipe.")]
Out = Annotated[Path, typer.Option("--out", help="Results folder; runs go to OUT/runs/.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N or mps.")]
Precision = Annotated[str | None, typer.Option(help="auto, fp32, bf16 or fp16.")]
Compile = Annotated[bool | None, typer.Option("--compile/--no-compile", help="Use torch.compile.")]
Workers = Annotated[int | None, typer.Option(help="Processes that load data.")]
Set = Annotated[list[str] | None, typer.Option("--set", help="Any recipe field: --set optim.weight_decay=0.1")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the plan and stop.")]
Fresh = Annotated[bool, typer.Option("--fresh", help="Start over instead of going on.")]
EvalOnly = Annotated[bool, typer.Option("--eval-only", help="Evaluate the run's best weights, or those of --init.")]


@app.command()
def pretrain(
    size: Size = None,
    data: DataPath = None,
    recipe: RecipeName = None,
    epochs: Epochs = None,
    batch_size: BatchSize = None,
    accumulate: Accumulate = None,
    lr: LearningRate = None,
    seed: Seed = None,
    init: Init = None,
    name: Name = "",
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
    flags = {
        "model.size": ("--size", size),
        "schedule.length": ("--epochs", epochs),
        "train.batch_size": ("--batch-size", batch_size),
        "train.accumulate": ("--accumulate", accumulate),
        "optim.lr": ("--lr", lr),
        "train.seed": ("--seed", seed),
        "init": ("--init", init),
        "train.precision": ("--precision", precision),
        "train.compile": ("--compile", compile_model),
        "train.workers": ("--workers", workers),
    }
    resolved = _resolve("pretrain", recipe, data, flags, overrides or [])
    _train(resolved, out_dir, name, device, dry_run, fresh, eval_only)


def _resolve(
    task: str, name: str | None, data: str | None, flags: dict[str, tuple[str, Any]], overrides: list[str]
) -> Resolved:
    """The recipe of a training command: named, or the one that belongs to the data; flags and --set laid over it."""
    from hcnet_cli import recipe as rcp

    parsed = [rcp.parse_override(text) for text in overrides]
    source = "--data"
    for key, value in parsed:
        if key == "data.path":
            data, source = str(value), "--set data.path"
    if data is None and (given := os.environ.get(DATA_VARIABLE[task])):
        data, source = given, f"${DATA_VARIABLE[task]}"
    file = rcp.recipe_file(name, task) if name else None
    if data is None and file is not None:
        data, source = rcp.resolve(file).recipe.data.path, f"recipe {name}"
    if data is None:
        data, source = EMBEDDED[task], "embedded"
        notice(f"No --data and no ${DATA_VARIABLE[task]}: using the embedded {data} ({EMBEDDED_NOTE[data]}).")
    if file is None:
        file = rcp.recipe_file(data if data == EMBEDDED[task] else PAPER[task], task)
    given_flags = [(key, value, flag) for key, (flag, value) in flags.items() if value is not None]
    resolved = rcp.resolve(
        file,
        [("data.path", data, source), *given_flags, *((key, value, f"--set {key}") for key, value in parsed)],
    )
    if resolved.recipe.task != task:
        raise UserError(f"The recipe {file} is for {resolved.recipe.task}, not for {task}.")
    if resolved.recipe.schedule.unit != "epochs" and flags["schedule.length"][1] is not None:
        raise UserError("This recipe counts steps, not epochs.", hint="Use --set schedule.length=STEPS.")
    return resolved


def _train(
    resolved: Resolved, results: Path, name: str, device: str, dry_run: bool, fresh: bool, eval_only: bool
) -> None:
    if name and Path(name).name != name:
        raise UserError(f'--name "{name}" is not the name of a folder.', hint="Use --out for the place.")
    from hcnet_cli.train import Options, train

    options = Options(results, name, device, fresh, dry_run, eval_only, sys.argv)
    _, _, stopped_by = train(resolved, options)
    if stopped_by:
        raise typer.Exit(128 + stopped_by)


@recipes_app.command("ls")
def recipes_ls() -> None:
    """Names and first lines of the shipped recipes."""
    from hcnet_cli import recipe as rcp

    for name in rcp.shipped():
        first = (rcp.recipes_dir() / f"{name}.yaml").read_text(encoding="utf-8").splitlines()[0]
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
    notice(f"Wrote {destination}; use it with --recipe {destination}.")


def _any_task(name: str) -> Path:
    """The shipped recipe's file, by full name or by a short name that is unique."""
    from hcnet_cli import recipe as rcp

    matches = [full for full in rcp.shipped() if full.split("/", 1)[1] == name]
    return rcp.recipe_file(matches[0] if len(matches) == 1 else name)


@app.command()
def report(
    fmt: Annotated[str, typer.Option("--format", help="rich, markdown, csv, json or latex.")] = "rich",
    table: Annotated[str, typer.Option(help="imagenet, coco, ade20k, ablation or all.")] = "all",
    results: Annotated[list[Path] | None, typer.Option(help="Results folder; may be repeated.")] = None,
    published: Annotated[list[Path] | None, typer.Option(help="CSV of further published numbers; may repeat.")] = None,
    output: Annotated[Path | None, typer.Option(help="A file to write instead of standard output.")] = None,
) -> None:
    """Print the paper's tables from the runs, published numbers beside measured ones."""
    from hcnet_cli.report import report as make
    from hcnet_cli.runs import write_text

    text = make(results or [Path("results")], table=table, fmt=fmt, published=published or [])
    if output:
        write_text(output, text)
        notice(f"Wrote {output}.")
    else:
        sys.stdout.write(text)


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
    try:
        app(prog_name="hcnet")
    except UserError as error:
        if is_main_process():
            err.print("[bold red]error:[/] ", end="")
            err.print(str(error), markup=False)
            if error.hint:
                err.print(error.hint, markup=False)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # the reader of a pipe (head, less) has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
