"""What every tracker is told about a run, and what it must be able to do."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from hcnet_cli import recipe as rcp
from hcnet_cli.console import UserError
from hcnet_cli.files import read_text
from hcnet_cli.plain_yaml import parse_yaml
from hcnet_cli.record import read_record
from hcnet_cli.runs import RunFolder

PROJECT = "hcnet"  # of runs in a tracker, unless the tracker's own environment names another


@dataclass(frozen=True)
class About:
    """A run: its name, an id that it keeps when it goes on or gets another name, and its recipe as text."""

    name: str
    id: str
    recipe: str

    def settings(self) -> dict[str, Any]:
        """Every value of the recipe by its key, such as "optim.lr"."""
        content = parse_yaml(self.recipe, "recipe.yaml")
        return rcp.flatten(content) if isinstance(content, dict) else {}


class Tracker(Protocol):
    """`whole`: it is sent the whole log each time, and sees to it that no point is twice; else what it has not got."""

    whole: bool

    def begin(self, step: int, about: About) -> None:
        """Opens the run. Unless `whole`, what was sent of `step` and later ones is forgotten; -1: of everything."""

    def send(self, step: int, values: Mapping[str, float]) -> None:
        """Values of a step by their tags."""

    def flush(self) -> None: ...

    def close(self) -> None: ...

    def where(self) -> str:
        """The command that shows or uploads what was sent."""


def about(folder: RunFolder) -> About:
    try:
        record = read_record(folder.record)
        known = f"{record.fingerprint} {record.started}"
    except UserError:
        known = folder.path.resolve().name
    recipe = read_text(folder.recipe_file) if folder.recipe_file.is_file() else ""
    return About(folder.path.resolve().name, hashlib.sha256(known.encode()).hexdigest()[:12], recipe)
