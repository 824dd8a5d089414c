"""Which weights a training starts from: the file that is named, or a run that fits. Torch-free."""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import Any

from hcnet_cli import recipe as rcp
from hcnet_cli import runs
from hcnet_cli.console import UserError, notice
from hcnet_cli.recipe import Recipe
from hcnet_cli.schema import SHAPE_FIELDS
from hcnet_cli.tasks import TASKS
from hcnet_cli.values import as_typed, place_typed

TIMM = "timm"  # as `init`: the weights that timm has for the model, which `--pretrained` asks for


def best_pretraining(recipe: Recipe, results: Path) -> str | None:
    """The finished run, of the task that this one starts from, of the same model on the most training images. Of
    several data sets with as many it is the one that was trained on last; scores on it alone are compared.
    """
    source = TASKS[recipe.spec.starts_from]
    found = [
        (info, folder)
        for folder, info in runs.find_runs(results)[0]
        if (info.task, info.status, info.model or info.size) == (source.name, "finished", recipe.model.label)
        and (info.variant, info.model_file) == (rcp.variant(recipe), recipe.model.digest)
        and (folder / "best.safetensors").exists()
    ]
    if not found:
        return None
    data = max((info.data.num_train, info.finished, info.data.digest) for info, _ in found)[-1]
    candidates = [
        (info.metrics.get(source.primary.key, 0.0), info.finished, str(folder))
        for info, folder in found
        if info.data.digest == data
    ]
    return max(candidates)[-1]


def explain_missing_pretraining(recipe: Recipe, results: Path) -> tuple[str, str]:
    """(that there is none, the command that makes one), for people; no full stops."""
    shape = rcp.variant(recipe)
    label = recipe.model.label + (f" ({shape})" if shape else "")
    source = recipe.spec.starts_from
    flag = f"--model {shlex.quote(recipe.model.name)}" if recipe.model.name else f"--size {recipe.model.size}"
    options = "".join(f" {as_typed(key, value)}" for key, value in _shape(recipe).items())
    command = f"hcnet {source} {flag}{options}{place_typed(results, '--out')}"
    kind = "model" if recipe.model.name else "size"
    return f"There is no finished {source} run of {kind} {label} under {results}", command


def _shape(recipe: Recipe) -> dict[str, Any]:
    """The fields of the model, and their values, that `recipe.variant` tells of."""
    model = recipe.model
    fields = {f"model.{name}": getattr(model, name) for name in ("disable", *SHAPE_FIELDS)}
    given = {key: value for key, value in fields.items() if value not in (None, ())}
    return given | {f"model.args.{name}": value for name, value in model.args.items()}


def find_init(recipe: Recipe, results: Path) -> str:
    """What `init` means here: "auto" is the best pretraining, or "none", with a notice, where embedded data have none.

    A task that trains from scratch starts from nothing.
    """
    if recipe.init != "auto":
        return recipe.init
    if not recipe.spec.starts_from:
        return "none"
    if found := best_pretraining(recipe, results):
        return found
    lacking, command = explain_missing_pretraining(recipe, results)
    if recipe.data.path not in {spec.embedded for spec in TASKS.values()}:
        hint = f"Run `{command}` first, name weights with --init, or start from scratch with --init none."
        raise UserError(f"{lacking}.", hint=hint)
    notice(f"{lacking}: starting from scratch (`{command}` makes one).")
    return "none"


def weights_file(source: str) -> Path:
    """The file of weights that a run, a folder in timm's layout or a path names; `~` is the home folder. UserError
    where there is none.
    """
    path = Path(os.path.expanduser(source))
    if path.is_dir():
        best, exported = path / "best.safetensors", path / "model.safetensors"  # hcnet export --format timm
        if not best.is_file() and exported.is_file():
            best = exported
        if not best.is_file():
            inside = sorted(str(file.parent) for file in path.glob("runs/*/best.safetensors"))
            more = " ..." if len(inside) > 3 else ""
            raise UserError(
                f"{path} is not a run with weights: it has no best.safetensors.",
                hint=f"Runs in it: {', '.join(inside[:3])}{more}" if inside else "",
            )
        path = best
    if not path.is_file():
        raise UserError(f"There is no weights file {path}.", hint="Name a run folder, FILE.safetensors or FILE.pth.")
    return path
