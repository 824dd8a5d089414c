"""What the Tab key offers: names that begin with what is typed. Called by the shell, so it must be quick."""

from __future__ import annotations

import os
from pathlib import Path

from hcnet_cli.sizes import SIZES


def sizes(incomplete: str) -> list[str]:
    return [name for name in SIZES if name.startswith(incomplete)]


def recipes(incomplete: str) -> list[str]:
    from hcnet_cli import recipe

    return [name for name in recipe.shipped() if name.startswith(incomplete)]


def studies(incomplete: str) -> list[str]:
    from hcnet_cli.study.design import shipped_studies

    return [name for name in shipped_studies() if name.startswith(incomplete)]


def runs(incomplete: str) -> list[str]:
    """Runs under results/, the place without --out, by name."""
    try:
        return sorted(name for name in os.listdir(Path("results") / "runs") if name.startswith(incomplete))
    except OSError:
        return []
