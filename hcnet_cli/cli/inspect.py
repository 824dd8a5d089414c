"""`hcnet check`, `shards`, `explain`, `replay`, `track` and `doctor`: what is in data, models, runs, this machine."""

from __future__ import annotations

import os
import re
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

import typer

from hcnet_cli.cli import complete, options
from hcnet_cli.cli.base import resolve
from hcnet_cli.console import UserError, counted, loading, notice, out, warn
from hcnet_cli.track import TRACKERS

Run = Annotated[
    str,
    typer.Argument(
        help=f"A run: {options.A_RUN}",
        autocompletion=complete.runs,
    ),
]


def check(
    data: Annotated[str, typer.Argument(help="A data folder, or the name of an embedded set.")],
    recipe: options.RecipeName = None,
    overrides: options.Set = None,
    output: Annotated[Path | None, typer.Option(help="A .json file with every file of every finding.")] = None,
) -> None:
    """Look at every image and annotation of a data set as training reads them, and say what is wrong, before training.

    The layout tells the task. Exits with 2 if training would refuse the data, and with 1 if something else spoils
    training or its figures: files that cannot be read, sizes that are not those annotated, the same picture in training
    and validation or in two classes.
    """
    from hcnet_cli.files import check_output, write_output
    from hcnet_cli.inputs import check_data, check_folder, layouts, task_of

    data = os.path.expanduser(data)
    check_folder(data, layouts())
    if output is not None:
        if output.suffix != ".json":
            raise UserError(f"{output} does not end in .json.")
        check_output(output)
    resolved = resolve(task_of(data), {"data": data, "recipe": recipe, "overrides": overrides})
    if output is None:  # before PyTorch is loaded, which takes seconds
        check_data(resolved.recipe)
    with loading():
        from hcnet_cli import check as checking
        from hcnet_cli.report import render

    made = checking.check(resolved.recipe)
    sys.stdout.write(render(checking.tables(made), "rich", checking.lines(made)))
    if output is not None:
        write_output(output, checking.json_text(made))
    if made.problems:
        raise made.problems[0]
    raise typer.Exit(made.wrong)


def shards(
    folder: Annotated[
        str, typer.Argument(help="An image folder or the name of an embedded one, tars, or Parquet files.")
    ],
    out_dir: Annotated[Path, typer.Argument(metavar="OUT", help="A folder that does not exist yet.")],
    size: Annotated[str, typer.Option(help="Bytes of a tar, about: 500MB, 2GB, 512MiB.")] = "500MB",
) -> None:
    """Write an image folder as WebDataset tars with an index, for storage that is slow with many small files.

    --data OUT trains the same run as --data FOLDER, bit for bit. webdataset and timm read the tars too.
    """
    limit = _num_bytes(size)
    if limit < 1000:
        raise UserError(f"--size {size} is not a size of at least 1kB.", hint="For example: --size 500MB")
    from hcnet_cli.inputs import check_folder

    check_folder(os.path.expanduser(folder))
    from hcnet_cli.data.embedded import data_folder
    from hcnet_cli.files import parquet_files
    from hcnet_cli.tasks.classification.parquet import as_tars
    from hcnet_cli.tasks.classification.shards import check_out, write

    out_dir = out_dir.expanduser()
    check_out(out_dir)
    root = data_folder(folder)
    with as_tars(root, out_dir) if parquet_files(root) else nullcontext(root) as images:
        write(images, out_dir, limit)


def _num_bytes(size: str) -> int:
    """500MB, 500 mb and 0.5GB are powers of 1000, 500MiB one of 1024; 0 for what is no size."""
    parts = re.fullmatch(r"(\d{1,9}(?:\.\d{1,9})?) ?(?:([kmgt])(i?))?b", size.lower())
    if not parts:
        return 0
    power = " kmgt".index(parts[2] or " ")
    return int(float(parts[1]) * (1024 if parts[3] else 1000) ** power)


def explain(
    runs: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUN...",
            help="A run folder, such as results/runs/NAME, or several.",
            autocompletion=complete.run_folders,
        ),
    ],
    image: Annotated[Path | None, typer.Option(help="A picture to measure on, instead of validation images.")] = None,
    out_dir: Annotated[
        Path | None, typer.Option("--out", help="Folder for the pictures, instead of RUN/explain.")
    ] = None,
    model: options.OwnModel = None,
) -> None:
    """Draw what the heat layers of a run do: stencils, conduction rates, transfer functions, receptive fields.

    Of several runs, with any backbones, the receptive fields side by side.
    """
    from hcnet_cli.files import open_regular
    from hcnet_cli.runs import RunFolder

    for run in runs:
        RunFolder(run).require_weights()  # before PyTorch is loaded, which takes seconds
    if len(runs) > 1 and out_dir is None:
        raise UserError("The pictures of several runs belong to none of them.", hint="Name a folder: --out FOLDER")
    if image is not None:
        with open_regular(image):
            pass
    with loading():
        from hcnet_cli import explain as explaining

    if len(runs) == 1:
        made = explaining.explain(runs[0], image, out_dir, model)
    else:
        assert out_dir is not None
        made = explaining.compare(runs, image, out_dir, model)
    for path in made:
        out.print(str(path))


def replay(
    run: Run,
    data: options.DataPath = None,
    model: options.OwnModel = None,
    out_dir: options.Out = Path("results"),
    device: options.Device = "auto",
) -> None:
    """Compute again the step at which a run stopped because its loss or gradient was not finite.

    In fp32 and in the run's precision, from the weights, samples and keys in RUN/failure: names the first module whose
    output or gradient is not finite, the parameter and the images. Exits with 1 if everything is finite here.
    """
    from hcnet_cli.failure import read_failure
    from hcnet_cli.inputs import MOVED, check_data, check_device
    from hcnet_cli.recipe import resolve as resolve_recipe
    from hcnet_cli.runs import find_run, with_paths

    folder = find_run(run, out_dir)
    info = folder.require()
    failure, weights = read_failure(folder)  # this and what follows before PyTorch is loaded, which takes seconds
    recipe = with_paths(folder, resolve_recipe(folder.recipe_file).recipe, model, data)
    check_device(device)
    check_data(recipe, MOVED)
    with loading():
        from hcnet_cli import replay as replaying

    losses = ", ".join(f"{name} {value}" for name, value in failure.losses.items())
    out.print(f"Step {failure.step + 1}, {counted(len(failure.samples), 'image')}, {losses} in {failure.precision}")
    if failure.later_steps:
        warn(
            f"The weights are those after {counted(failure.later_steps, 'more step')}: an fp16 step is looked at later."
        )
    found = replaying.replay(folder, info, recipe, failure, weights, device)
    for line in (line for one in found for line in one.lines()):
        out.print(line)
    raise typer.Exit(all(one.origin is None for one in found))


def track(
    run: Run,
    to: Annotated[
        str, typer.Option("--to", help=f"Comma list of: {', '.join(TRACKERS)}.", autocompletion=complete.trackers)
    ],
    out_dir: options.Out = Path("results"),
) -> None:
    """Send the log of a run to experiment trackers: what they have not got yet, each point once.

    Also of a run that was killed, or trained without --track. Nothing leaves this machine unless a tracker's own
    environment variables say so.
    """
    from hcnet_cli.runs import find_run
    from hcnet_cli.track import check_trackers
    from hcnet_cli.track.sending import send, where

    names = check_trackers(to)
    folder = find_run(run, out_dir)
    folder.require()
    for name in names:
        lines = send(folder, name)
        notice(f"{counted(lines, 'line')} sent. Next: {where(folder, name)}")


def doctor(
    results: options.Out = Path("results"),
) -> None:
    """Say what this machine and environment offer and what is wrong with them: one page to paste into an issue.

    Exits with 1 if something is wrong.
    """
    with loading():
        from hcnet_cli.doctor import findings

    problems = []
    for name, value, problem in findings(results):
        out.print(f"{'!' if problem else ' '} {name:<18}{value}")
        if problem:
            problems.append(f"{name}: {problem}")
    for line in problems:
        out.print(line)
    notice("Nothing is wrong." if not problems else f"{len(problems)} to look at.")
    raise typer.Exit(1 if problems else 0)
