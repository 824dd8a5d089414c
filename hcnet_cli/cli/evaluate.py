"""`hcnet evaluate`: further scores of a finished run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hcnet_cli.cli import complete, options
from hcnet_cli.console import loading
from hcnet_cli.privacy import command_line


def evaluate(
    run: Annotated[
        str,
        typer.Argument(
            help=f"A finished run: {options.A_RUN}",
            autocompletion=complete.runs,
        ),
    ],
    on: Annotated[
        str | None,
        typer.Option(
            "--on",
            help="Comma list: evaluations of the recipe (default: those without a score, else the first), or, for "
            "classifiers, knn, probe, corruptions, "
            "imagenet-v2, imagenet-real, imagenet-a, imagenet-r, imagenet-sketch, imagenet-c.",
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option("--data", help="The run's data; with --on imagenet-..., the folder of those images, or above it."),
    ] = None,
    model: options.OwnModel = None,
    overrides: options.Set = None,
    out_dir: options.Out = Path("results"),
    device: options.Device = "auto",
    workers: options.Workers = None,
) -> None:
    """Score the weights of a finished run by another protocol, without training.

    Evaluations are entries of the recipe's section `evaluation`: --on ms, or a new one such as
    --set evaluation.tiles.mode=slide. Scores are added to the run's record, with their protocol; none is replaced.
    """
    from hcnet_cli import recipe as rcp
    from hcnet_cli.evaluation_request import read_request
    from hcnet_cli.inputs import check_device
    from hcnet_cli.runs import find_run

    given = [("data.path", data, "--data"), ("model.name", model, "--model"), ("train.workers", workers, "--workers")]
    settings = [(key, value, source) for key, value, source in given if value is not None]
    settings += [(key, value, f"--set {key}") for key, value in map(rcp.parse_override, overrides or [])]
    folder = find_run(run, out_dir)
    names = [name.strip() for name in on.split(",")] if on is not None else []
    request = read_request(folder, settings, names)  # before PyTorch is loaded, which takes seconds
    check_device(device)
    with loading():
        from hcnet_cli.evaluate import evaluate as score

    score(folder, request, device, command_line())
