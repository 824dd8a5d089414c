"""`hcnet export`: a trained model as a file for other programs."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hcnet_cli.cli import complete, options
from hcnet_cli.console import UserError, did_you_mean, loading, notice

if TYPE_CHECKING:
    from hcnet_cli.recipe import Recipe

IN_PARTS = ("onnx", "pt2")
ENDINGS = {"onnx": ".onnx", "pt2": ".pt2", "torchscript": ".pt", "timm": ""}


def export(
    run: Annotated[
        str,
        typer.Argument(
            help=f"A run with weights: {options.A_RUN}",
            autocompletion=complete.runs,
        ),
    ],
    output: Annotated[
        Path, typer.Option("--output", help="The new file, or the new folder of a detector or of --format timm.")
    ],
    fmt: Annotated[
        str | None,
        typer.Option(
            "--format",
            help="onnx, pt2, torchscript or timm; else what the output's ending says.",
            autocompletion=complete.words(ENDINGS),
        ),
    ] = None,
    features: Annotated[
        bool, typer.Option("--features", help="The backbone's maps at strides 4, 8, 16 and 32, instead of its answers.")
    ] = False,
    data: options.DataPath = None,
    model: options.OwnModel = None,
    out_dir: options.Out = Path("results"),
) -> None:
    """Write a run's best weights for other programs, and check that the file computes and scores as the run did.

    onnx (ONNX Runtime), pt2 (torch.export), torchscript, or a folder that timm loads. Preprocessing and class names
    travel in the file.
    """
    from hcnet_cli.files import check_output
    from hcnet_cli.runs import find_run, with_weights

    kind = fmt or {ending: name for name, ending in ENDINGS.items()}.get(output.suffix)
    if kind is None:
        raise UserError(f"The ending of {output} names no format.", hint="Known: .onnx, .pt2, .pt; or --format timm.")
    if kind not in ENDINGS:
        raise UserError(f'Unknown format "{kind}".{did_you_mean(kind, ENDINGS)}', hint=f"Known: {', '.join(ENDINGS)}.")
    if output.exists():
        raise UserError(f"{output} exists already.", hint="Name a new one, or remove it.")
    folder = find_run(run, out_dir)
    info, recipe = with_weights(folder, model, data)
    parts = "" if features else recipe.spec.in_parts
    if features and kind == "timm":
        raise UserError(
            "The folder of --format timm holds the whole model: timm takes the maps from it.",
            hint='timm.create_model("local-dir:FOLDER", pretrained=True, features_only=True)',
        )
    if parts:
        check_parts(recipe, kind, output)
    elif kind == "timm":
        check_timm(recipe)
    elif output.suffix != ENDINGS[kind]:
        raise UserError(f"A file of the format {kind} ends in {ENDINGS[kind]}.")
    check_output(output)
    with loading():
        from hcnet_cli import export as exporting

    exporting.check_extra(kind)
    if kind == "timm":
        compared = exporting.export_folder(folder, info, recipe, output)
        notice(f"Wrote {output}. {compared}")
    elif parts:
        exporting.export_parts(folder, info, recipe, kind, output)
    else:
        exporting.export(folder, info, recipe, kind, output, features)


def check_parts(recipe: Recipe, kind: str, output: Path) -> None:
    """UserError for a format or an output that a model in parts does not have."""
    place = shlex.quote(str(output.with_suffix("")))
    hint = f"hcnet export RUN --format {kind if kind in IN_PARTS else IN_PARTS[0]} --output {place}"
    if kind not in IN_PARTS:
        raise UserError(f"{recipe.spec.in_parts}: it is written as {' or '.join(IN_PARTS)}, not as {kind}.", hint=hint)
    if output.suffix:
        raise UserError(f"{recipe.spec.in_parts}: it is written as a folder, and {output} names a file.", hint=hint)


def check_timm(recipe: Recipe) -> None:
    """UserError for a run whose model timm cannot make."""
    if "timm" not in recipe.spec.hub_tags:
        raise UserError("Only a classifier can be written for timm.", hint="hcnet export takes --format onnx or pt2.")
    if recipe.model.digest:
        raise UserError(
            "A model of a file of your own cannot be made by timm.", hint="hcnet export takes --format onnx or pt2."
        )
