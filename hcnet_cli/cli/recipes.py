"""`hcnet recipes`: list, show, copy and explain."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from hcnet_cli.cli import complete
from hcnet_cli.console import UserError, notice, out
from hcnet_cli.files import read_text

app = typer.Typer(help="List, show, copy and explain recipes.", no_args_is_help=True)
Name = Annotated[str, typer.Argument(help="For example pretrain/imagenet.", autocompletion=complete.shipped)]


@app.command("ls")
def ls() -> None:
    """Names and first lines of the shipped recipes, and of the studies (hcnet ablate)."""
    from hcnet_cli import recipe as rcp
    from hcnet_cli.study.design import shipped_studies

    table = Table.grid(padding=(0, 2, 0, 0))  # broken where a terminal ends, a line each elsewhere
    for name in [*(f"ablate/{study}" for study in shipped_studies()), *rcp.shipped()]:
        first = read_text(_file(name)).splitlines()[0]
        table.add_row(Text(name, no_wrap=True), Text(first.lstrip("# ")))
        if not out.is_terminal:
            out.print(f"{name:<34}{first.lstrip('# ')}")
    if out.is_terminal:
        out.print(table, soft_wrap=False)


@app.command("show")
def show(name: Name) -> None:
    """Print a shipped recipe."""
    out.print(Text(read_text(_file(name))), end="")


@app.command("cp")
def cp(name: Name, destination: Annotated[Path, typer.Argument(help="A new YAML file.")]) -> None:
    """Copy a shipped recipe to a file of your own, for --recipe FILE."""
    if destination.suffix not in (".yaml", ".yml"):
        raise UserError(f"{destination} does not end in .yaml.")
    if destination.exists():
        raise UserError(f"{destination} exists and was left alone.")
    text = read_text(_file(name))
    try:
        destination.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"{destination} cannot be written: {error.strerror}.") from None
    typed = shlex.quote(str(destination))
    use = f"hcnet ablate --study {typed}" if "arms:" in text else f"--recipe {typed}"
    notice(f"Wrote {destination}; use it with {use}.")


@app.command("explain")
def explain(
    key: Annotated[
        str | None,
        typer.Argument(
            help="A field or a section, such as optim.no_decay or optim.", autocompletion=complete.recipe_fields
        ),
    ] = None,
) -> None:
    """Tell what a recipe field means, its type, default and unit, and which tasks have it."""
    from hcnet_cli.recipe_reference import explain_field

    for line in explain_field(key or ""):
        out.print(line)


def _file(name: str) -> Path:
    """The shipped recipe's or study's file, by full name or by a short name that is unique."""
    from hcnet_cli import recipe as rcp
    from hcnet_cli.study.design import shipped_studies, study_file

    if name.removeprefix("ablate/") in shipped_studies():
        return study_file(name)
    matches = [full for full in rcp.shipped() if full.split("/", 1)[1] == name]
    return rcp.recipe_file(matches[0] if len(matches) == 1 else name)
