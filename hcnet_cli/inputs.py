"""What can be said of data and weights before PyTorch is loaded: whether they are there, and what they look like."""

from __future__ import annotations

from pathlib import Path

from hcnet_cli.console import UserError
from hcnet_cli.own_model import is_own
from hcnet_cli.pretrained import TIMM, find_init, weights_file
from hcnet_cli.recipe import Recipe
from hcnet_cli.tasks import TASKS

EMBEDDED = frozenset(spec.embedded for spec in TASKS.values())


def check_inputs(recipe: Recipe, results: Path) -> None:
    """UserError for data, or weights to start from, that are not there or are plainly of another kind."""
    check_data(recipe)
    if recipe.init == TIMM:
        if not recipe.model.name or is_own(recipe.model.name):
            raise UserError(
                f"There are no weights in timm of {recipe.model.name or 'HcNet'}.",
                hint="--pretrained goes with --model NAME, a name of timm; --init names weights of HcNet.",
            )
    elif recipe.init not in ("auto", "none"):
        weights_file(recipe.init)
    elif recipe.init == "auto" and recipe.data.path not in EMBEDDED:
        find_init(recipe, results)


def check_data(recipe: Recipe) -> None:
    """UserError unless the data folder has the layout of the recipe's format, as far as its folders show."""
    path, form = recipe.data.path or "", recipe.spec.formats[recipe.data.format]
    if path in EMBEDDED:
        return
    check_folder(path, f"Its layout is to be {form.layout}.")
    root = Path(path)
    if form.recognise(root):
        return
    others = [name for name, spec in TASKS.items() if any(other.recognise(root) for other in spec.formats.values())]
    found = sorted(entry.name for entry in root.iterdir())
    inside = f"It has {', '.join(found[:5])}{', ...' if len(found) > 5 else ''}." if found else "It is empty."
    raise UserError(
        f"The data folder {root} is not laid out as {recipe.task} reads it: {form.layout}.",
        hint=f"It looks like data for another command: hcnet {others[0]} --data {root}" if others else inside,
    )


def check_folder(path: str, hint: str = "") -> None:
    """UserError unless this is a folder, or an embedded set's name."""
    if path not in EMBEDDED and not Path(path).is_dir():
        what = "is a file, not a folder" if Path(path).exists() else "does not exist"
        raise UserError(f"The data folder {path} {what}.", hint=hint)


def layouts() -> str:
    """What a data folder may hold, for a hint."""
    known = [f"{spec.name}: {form.layout}" for spec in TASKS.values() for form in spec.formats.values()]
    return "A data folder holds, for " + "; for ".join(known) + "."
