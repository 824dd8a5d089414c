"""`hcnet card`: one page about a run or a study, and whether it still holds."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from hcnet_cli.cli import complete, options
from hcnet_cli.console import UserError, counted, loading, notice, out


def card(
    name: Annotated[
        str | None,
        typer.Argument(
            metavar="RUN|STUDY",
            help="A run with weights: its folder, or its name under results/runs/; or the name of a study.",
            autocompletion=complete.runs,
        ),
    ] = None,
    output: Annotated[Path | None, typer.Option("--output", help="A .md file, instead of standard output.")] = None,
    verify: Annotated[
        Path | None, typer.Option("--verify", help="A card: score its runs (or RUN alone) again, and compare.")
    ] = None,
    data: options.DataPath = None,
    model: options.OwnModel = None,
    out_dir: options.Out = Path("results"),
    device: options.Device = "auto",
) -> None:
    """Write a page about a run or a study: figures, protocol, data, code, model, and what was not measured.

    --verify scores the weights again on the data, and says whether weights, data and scores are equal to the card's.
    Exits with 1 if not; --data, --model and --device are for this. A code version that differs is only said.
    """
    if verify is not None:
        if output is not None:
            raise UserError("--verify compares and writes nothing: --output has no place beside it.")
        raise typer.Exit(0 if _verify(verify, name, data, model, out_dir, device) else 1)
    if name is None:
        raise UserError("A card is of a run or of a study.", hint="hcnet card RUN, or hcnet card --verify FILE")
    for flag, given in (("--data", data), ("--model", model), ("--device", device != "auto")):
        if given:
            raise UserError(f"{flag} is for --verify.")
    if output is not None and output.suffix != ".md":
        raise UserError(f"A card is Markdown: {output} should end in .md.")
    text = _written(name, out_dir)
    if output is None:
        sys.stdout.write(text)
        return
    from hcnet_cli.files import write_output

    write_output(output, text)


def _written(name: str, results: Path) -> str:
    from hcnet_cli.header import read_metadata
    from hcnet_cli.report.card import run_card, study_card
    from hcnet_cli.runs import find_run, trusted_weights
    from hcnet_cli.study.record import read_study
    from hcnet_cli.study.table import runs_by_name

    study = results / "studies" / f"{name}.json"
    if study.is_file() and not (results / "runs" / name).is_dir():
        return study_card(read_study(study), runs_by_name(results))
    if not Path(name).is_dir() and not (results / "runs" / name).is_dir():
        raise UserError(
            f"There is no run and no study {name} in {results}.",
            hint="hcnet runs ls and hcnet studies list what there is.",
        )
    folder = find_run(name, results)
    return run_card(folder, trusted_weights(folder), read_metadata(folder.best))


def _verify(file: Path, name: str | None, data: str | None, model: str | None, results: Path, device: str) -> bool:
    """Whether all runs of a card are as it says. Prints what was compared."""
    from hcnet_cli.inputs import MOVED, check_data, check_device
    from hcnet_cli.report.card import read_card
    from hcnet_cli.runs import find_run, with_weights

    claims = read_card(file)
    if name is not None and len(claims) > 1:
        wanted = find_run(name, results).path.resolve().name
        claims = [claim for claim in claims if claim.run == wanted]
        if not claims:
            raise UserError(f"{file} says nothing of the run {wanted}.")
    folders = [find_run(name or claim.run, results) for claim in claims]
    recipes = [with_weights(folder, model, data, any_weights=True)[1] for folder in folders]
    check_device(device)
    for recipe in recipes:
        check_data(recipe, MOVED)
    with loading():
        from hcnet_cli.verify import CODE, verify

    differing: list[str] = []
    for claim, folder, recipe in zip(claims, folders, recipes, strict=True):
        out.print(str(folder.path))
        for finding in verify(claim, folder, recipe, device):
            out.print(f"  {finding}")
            differing += [finding.what] if not finding.equal and finding.what != CODE else []
    if differing:
        notice(f"Not as the card says: {', '.join(dict.fromkeys(differing))}.")
    else:
        notice(f"Equal to the card's table of {counted(len(claims), 'row')}.")
    return not differing
