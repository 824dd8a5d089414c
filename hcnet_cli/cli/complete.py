"""What the Tab key offers: names that begin with what is typed. Called by the shell, so it must be quick."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path

import typer

from hcnet_cli.track import TRACKERS

Offer = Callable[[str], list[str]]


def words(known: Iterable[str]) -> Offer:
    """Offers the words of a list that is known beforehand."""
    names = list(known)

    def offered(incomplete: str) -> list[str]:
        return _beginning(names, incomplete)

    return offered


def recipes(ctx: typer.Context, incomplete: str) -> list[str]:
    """Of a training command those of its task, by their short names too."""
    from hcnet_cli import recipe

    shipped, own = recipe.shipped(), f"{ctx.info_name}/"
    of_task = [name for name in shipped if name.startswith(own)]
    names = [name.removeprefix(own) for name in of_task] + of_task if of_task else shipped
    return _beginning(names, incomplete)


def shipped(incomplete: str) -> list[str]:
    """What `hcnet recipes show` prints: recipes and studies."""
    from hcnet_cli import recipe
    from hcnet_cli.study.design import shipped_studies

    return _beginning([*(f"ablate/{study}" for study in shipped_studies()), *recipe.shipped()], incomplete)


def recipe_fields(incomplete: str) -> list[str]:
    """Fields of recipes and their sections."""
    from hcnet_cli.recipe_reference import entries

    fields = [entry.key for entry in entries()]
    return _beginning(sorted({*fields, *(field.rpartition(".")[0] for field in fields)} - {""}), incomplete)


def report_formats(incomplete: str) -> list[str]:
    from hcnet_cli.report import FORMATS

    return _beginning(FORMATS, incomplete)


def report_tables(incomplete: str) -> list[str]:
    from hcnet_cli.report import TABLES

    return _beginning([*TABLES, "all"], incomplete)


def models(incomplete: str) -> list[str]:
    """Names of timm, read from its source."""
    from hcnet_cli.model_names import registered

    return _beginning(registered(), incomplete)


def trackers(incomplete: str) -> list[str]:
    """The last name of a comma list, among those that it has not got yet."""
    before, comma, last = incomplete.rpartition(",")
    return [f"{before}{comma}{name}" for name in _beginning(TRACKERS, last) if name not in before.split(",")]


def studies(incomplete: str) -> list[str]:
    from hcnet_cli.study.design import shipped_studies

    return _beginning(shipped_studies(), incomplete)


def runs(incomplete: str) -> list[str]:
    """Runs under results/, the place without --out, by name."""
    try:
        return sorted(_beginning(os.listdir(Path("results") / "runs"), incomplete))
    except OSError:
        return []


def run_folders(incomplete: str) -> list[str]:
    """Runs under results/ by folder, for commands that take no names."""
    return _beginning([str(Path("results", "runs", name)) for name in runs("")], incomplete)


def weights(incomplete: str) -> list[str]:
    """What --init takes, weights files left out."""
    return _beginning(["auto", "none", *run_folders("")], incomplete)


def _beginning(names: Iterable[str], incomplete: str) -> list[str]:
    return [name for name in names if name.startswith(incomplete)]
