"""`hcnet predict`: a trained run's predictions for photos."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hcnet_cli.cli import complete, options
from hcnet_cli.console import UserError, notice


def predict(
    run: Annotated[
        str,
        typer.Argument(
            help="A run with weights: its folder, or its name under results/runs/.", autocompletion=complete.runs
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
    from hcnet_cli.files import check_output, writing
    from hcnet_cli.inputs import check_device
    from hcnet_cli.runs import find_run, with_weights

    for path in images:
        if not path.exists():
            raise UserError(f"There is no file or folder {path}.")
    if output.suffix == ".html":
        check_output(output)
    else:
        with writing(output):
            if output.exists() and (not output.is_dir() or any(output.iterdir())):
                raise UserError(f"{output} exists already.", hint="Name a new folder, or remove this one.")
    folder = find_run(run, out_dir)
    info, recipe = with_weights(folder, model)
    check_device(device)  # before PyTorch is loaded, which takes seconds
    from hcnet_cli import predict as predicting

    photos = predicting.find_photos(images)
    outcome = predicting.predict(folder, info, recipe, photos, output, device, 2 if workers is None else workers)
    for reason in outcome.unreadable:
        notice(f"Not read: {reason}")
    if outcome.stopped:
        raise typer.Exit(130)
    raise typer.Exit(1 if outcome.unreadable else 0)
