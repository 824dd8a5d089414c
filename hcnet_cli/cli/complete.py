"""What the Tab key offers: names that begin with what is typed. Called by the shell, so it must be quick."""

from __future__ import annotations

import os
from pathlib import Path

import typer

from hcnet_cli.sizes import SIZES


def sizes(incomplete: str) -> list[str]:
    return [name for name in SIZES if name.startswith(incomplete)]


def recipes(ctx: typer.Context, incomplete: str) -> list[str]:
    """Of a training command those of its task, by their short names too."""
    from hcnet_cli import recipe

    shipped, own = recipe.shipped(), f"{ctx.info_name}/"
    of_task = [name for name in shipped if name.startswith(own)]
    names = [name.removeprefix(own) for name in of_task] + of_task if of_task else shipped
    return [name for name in names if name.startswith(incomplete)]


def studies(incomplete: str) -> list[str]:
    from hcnet_cli.study.design import shipped_studies

    return [name for name in shipped_studies() if name.startswith(incomplete)]


def runs(incomplete: str) -> list[str]:
    """Runs under results/, the place without --out, by name."""
    try:
        return sorted(name for name in os.listdir(Path("results") / "runs") if name.startswith(incomplete))
    except OSError:
        return []
