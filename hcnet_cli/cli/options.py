"""The options that several commands share, each once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from hcnet_cli.cli import complete
from hcnet_cli.sizes import SIZES
from hcnet_cli.track import TRACKERS


def _number_or_word(text: str) -> int | str:
    return int(text) if text.lstrip("-").isdecimal() else text


A_RUN = "its folder, its name under results/runs/, or the last eight characters of that."  # what RUN may be

Size = Annotated[
    str | None, typer.Option("--size", help=f"Size of HcNet: {', '.join(SIZES)}.", autocompletion=complete.words(SIZES))
]
Model = Annotated[
    str | None,
    typer.Option(
        "--model",
        help="Another model than HcNet: a name of timm, or FILE.py:FUNCTION, which runs that file of yours.",
        autocompletion=complete.models,
    ),
]
OwnModel = Annotated[
    str | None,
    typer.Option("--model", help="FILE.py:FUNCTION that made the run's model, such as RUN/model.py:FUNCTION; runs it."),
]
Pretrained = Annotated[
    bool | None,
    typer.Option("--pretrained", help="Start from timm's weights of --model, from the Hugging Face hub or its cache."),
]
DataPath = Annotated[str | None, typer.Option("--data", help="A data folder, or the name of an embedded set.")]
DataTrust = Annotated[
    str | None,
    typer.Option(
        "--data-trust",
        help="How data are told apart: content (default: every file is read once), or names: names and sizes alone.",
    ),
]
RecipeName = Annotated[
    str | None,
    typer.Option(
        "--recipe", help="A shipped recipe (hcnet recipes ls) or a YAML file.", autocompletion=complete.recipes
    ),
]
Epochs = Annotated[int | None, typer.Option("--epochs", help="Passes over the data, of a recipe that counts these.")]
Steps = Annotated[int | None, typer.Option("--steps", help="Optimizer steps, of a recipe that counts these.")]
BatchSize = Annotated[int | None, typer.Option("--batch-size", help="Images per optimizer step, over all processes.")]
Accumulate = Annotated[
    int | None,
    typer.Option(
        "--accumulate",
        help="Micro-batches per optimizer step. Results change only with batch norm, and dropout of other models.",
    ),
]
LearningRate = Annotated[
    float | None, typer.Option("--lr", help="Peak learning rate. It is never scaled by the batch size.")
]
Freeze = Annotated[
    str | None,
    typer.Option("--freeze", help="What is not trained: backbone (all but the head), or the stem and N stages: 2."),
]
Seed = Annotated[int | None, typer.Option("--seed", help="Seed of everything random.")]
Init = Annotated[
    str | None,
    typer.Option(
        "--init",
        help="Weights to start from: a run folder, a weights file, none, or auto: the best pretrain run of the same "
        "model (on embedded data none if there is none).",
        autocompletion=complete.weights,
    ),
]
Name = Annotated[
    str | None, typer.Option("--name", help="Name of the run folder, instead of one made from the recipe.")
]
Out = Annotated[Path, typer.Option("--out", help="Results folder; runs go to OUT/runs/.")]
Device = Annotated[
    str,
    typer.Option(
        "--device",
        help="auto, cpu, cuda, cuda:N or mps.",
        autocompletion=complete.words(("auto", "cpu", "cuda", "mps")),
    ),
]
Precision = Annotated[
    str | None,
    typer.Option(
        "--precision", help="auto, fp32, bf16 or fp16.", autocompletion=complete.words(("auto", "fp32", "bf16", "fp16"))
    ),
]
Compile = Annotated[bool | None, typer.Option("--compile/--no-compile", help="Use torch.compile.")]
Workers = Annotated[
    Any,
    typer.Option(
        "--workers",
        parser=_number_or_word,
        metavar="N|auto",
        help="Processes that load data; auto (default): as many as there are cores for.",
    ),
]
Set = Annotated[
    list[str] | None, typer.Option("--set", help="Any recipe field (hcnet recipes explain): optim.weight_decay=0.1")
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the plan and stop.")]
Fresh = Annotated[bool, typer.Option("--fresh", help="Start over instead of going on.")]
Profile = Annotated[
    int | None,
    typer.Option("--profile", min=1, metavar="N", help="Time N steps by part and keep a Chrome trace: RUN/profile."),
]
Track = Annotated[
    str | None,
    typer.Option(
        "--track",
        help=f"Send what is logged to trackers, a comma list of: {', '.join(TRACKERS)}.",
        autocompletion=complete.trackers,
    ),
]
EvalOnly = Annotated[
    bool,
    typer.Option("--eval-only", help="Evaluate the run's best weights; those of --init where nothing was trained."),
]
Output = Annotated[Path | None, typer.Option("--output", help="Also write a .md or .json file.")]

# Parameter of a training command -> its flag, and the recipe field it sets.
RECIPE_KEYS = {
    "size": ("--size", "model.size"),
    "model": ("--model", "model.name"),
    "epochs": ("--epochs", "schedule.length"),
    "steps": ("--steps", "schedule.length"),
    "batch_size": ("--batch-size", "train.batch_size"),
    "accumulate": ("--accumulate", "train.accumulate"),
    "lr": ("--lr", "optim.lr"),
    "freeze": ("--freeze", "train.freeze"),
    "seed": ("--seed", "train.seed"),
    "init": ("--init", "init"),
    "precision": ("--precision", "train.precision"),
    "compile_model": ("--compile", "train.compile"),
    "workers": ("--workers", "train.workers"),
    "data_trust": ("--data-trust", "data.trust"),
}
