"""`hcnet predict`: a trained run's predictions for photos."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from hcnet_cli.cli import complete, options
from hcnet_cli.console import UserError, loading, notice


def predict(
    run: Annotated[
        str,
        typer.Argument(
            help=f"A run with weights: {options.A_RUN}",
            autocompletion=complete.runs,
        ),
    ],
    images: Annotated[list[Path], typer.Argument(help="Photos, and folders of them.")],
    output: Annotated[
        Path, typer.Option("--output", help="A new folder for predictions and pictures, or a page (.html) of pictures.")
    ],
    model: options.OwnModel = None,
    out_dir: options.Out = Path("results"),
    device: options.Device = "auto",
    workers: options.Workers = None,
) -> None:
    """Predict with the best weights of a run: classes with probabilities, boxes and masks, or label maps.

    Writes one file that other programs read (JSON Lines, COCO JSON, or PNG labels) and a picture of each image. Exits
    with 1 if an image could not be read.
    """
    from hcnet_cli import recipe as rcp
    from hcnet_cli.files import check_output, made_folder, writing
    from hcnet_cli.inputs import check_device
    from hcnet_cli.runs import find_run, with_weights

    for path in images:
        if not path.exists():
            raise UserError(f"There is no file or folder {path}.")
    page = output.suffix == ".html"
    with writing(output):
        if output.exists() and (page or not output.is_dir() or any(output.iterdir())):
            raise UserError(f"{output} exists already.", hint="Name a new one, or remove it.")
    if output.suffix[1:].isalpha() and not page:  # a folder may be called run-0.1
        raise UserError(
            f"{output} names a file: predictions are written as a folder, or as a page of pictures that ends in .html.",
            hint=" or ".join(f"--output {shlex.quote(str(output.with_suffix(end)))}" for end in ("", ".html")),
        )
    folder = find_run(run, out_dir)
    info, recipe = with_weights(folder, model)
    asked = [("train.workers", "auto" if workers is None else workers, "--workers")]
    recipe = recipe.model_copy(update={"train": rcp.resolve(folder.recipe_file, asked).recipe.train})
    check_device(device)
    with made_folder(output.parent if page else output):
        if page:
            check_output(output)
        with loading():
            from hcnet_cli import predict as predicting

        photos = predicting.find_photos(images)
        outcome = predicting.predict(folder, info, recipe, photos, output, device)
    for reason in outcome.unreadable:
        notice(f"Not read: {reason}")
    if outcome.stopped:
        raise typer.Exit(128 + outcome.stopped)
    raise typer.Exit(1 if outcome.unreadable else 0)
