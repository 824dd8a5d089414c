"""`hcnet runs`: list, show, remove and rename runs."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from hcnet_cli.cli import complete, options
from hcnet_cli.console import UserError, notice, out, warn

app = typer.Typer(help="List, show, remove and rename runs.", no_args_is_help=True)
Name = Annotated[
    str,
    typer.Argument(
        help=f"A run: {options.A_RUN}",
        autocompletion=complete.runs,
    ),
]


@app.command("ls")
def ls(results: options.Out = Path("results")) -> None:
    """The runs with their scores and sizes on disk; unfinished ones first."""
    from hcnet_cli.manage import listed
    from hcnet_cli.report import FIRST_RUN, render

    table, broken = listed(results)
    sys.stdout.write(render([table] if table.rows else [], "rich", [] if table.rows else [FIRST_RUN]))
    for line in broken:
        warn(line)


@app.command("show")
def show(run: Name, results: options.Out = Path("results")) -> None:
    """What a run is, how far it is, what it scored, and the command that goes on with it."""
    from hcnet_cli.manage import shown
    from hcnet_cli.runs import find_run

    for name, lines in shown(find_run(run, results)):
        for number, line in enumerate(lines):
            out.print(f"{'' if number else name:<13}{line}")


@app.command("rm")
def rm(
    names: Annotated[
        list[str], typer.Argument(metavar="RUN...", help="Runs, by folder or name.", autocompletion=complete.runs)
    ],
    results: options.Out = Path("results"),
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
) -> None:
    """Remove runs: their weights, checkpoints, records and pictures."""
    from hcnet_cli.manage import counted_by, in_units, remove, size_of, started_from
    from hcnet_cli.runs import find_run

    folders = [find_run(name, results) for name in names]
    for folder in folders:
        info = folder.require()
        out.print(f"{folder.path}: {info.status}, {in_units(size_of(folder.path))}")
        for study in counted_by(folder, results):
            warn(f"The study {study} counts it.")
        for run in started_from(folder, results):
            warn(f"The unfinished run {run} starts from its weights.")
    if not yes:
        if not sys.stdin.isatty():
            raise UserError("Nothing was removed.", hint="Give --yes to remove without a question.")
        if not typer.confirm("Remove?", err=True):
            raise typer.Exit(1)
    for folder in folders:
        remove(folder)


@app.command("mv")
def mv(
    run: Name,
    name: Annotated[str, typer.Argument(help="Its new name, beside the other runs.")],
    results: options.Out = Path("results"),
) -> None:
    """Rename a run. Its record and its place in tables stay; --name NAME goes on with it."""
    from hcnet_cli.manage import rename
    from hcnet_cli.runs import find_run

    notice(f"It is {rename(find_run(run, results), name, results)} now.")
