"""Whether a command would find its run finished: told before PyTorch is loaded, which takes seconds.

What is not certain without PyTorch is left to `previous.py`. Torch-free.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hcnet_cli import cache, runs
from hcnet_cli import recipe as rcp
from hcnet_cli.console import UserError, launch, notice
from hcnet_cli.header import tensors_digest
from hcnet_cli.inputs import EMBEDDED, has_no_cuda
from hcnet_cli.pretrained import TIMM, best_pretraining, weights_file
from hcnet_cli.recipe import Recipe
from hcnet_cli.runs import RunFolder
from hcnet_cli.values import place_typed

FINISHED = "This run is finished:"


def data_section(recipe: Recipe) -> dict[str, Any]:
    """What decides, besides the files, which data a folder is read as."""
    return {
        "task": recipe.task,
        "data": recipe.data.model_dump(mode="json", exclude={"path"}),
        "head": recipe.head.model_dump(mode="json"),
    }


def data_root(recipe: Recipe) -> Path:
    """The folder of the recipe's data."""
    path = recipe.data.path or ""
    return cache.embedded_folder(path) if path in EMBEDDED else Path(os.path.expanduser(path))


def finished_run(recipe: Recipe, results: Path, name: str, device: str) -> RunFolder | None:
    """The folder of the finished run of this recipe, whole; None where there is none, or where it cannot be told.

    Its data must have been read on this machine before and be unchanged since, its initial weights and its own must
    be safetensors files, and the number format must not depend on a GPU.
    """
    precision = recipe.train.precision
    if launch().world_size > 1 or (precision == "auto" and device == "auto" and not has_no_cuda()):
        return None
    if precision == "auto":
        if device not in ("auto", "cpu", "mps"):
            return None
        precision = "fp32"
    try:
        data = cache.known_data(data_root(recipe), data_section(recipe))
        if data is None:
            return None
        init = _init_digest(recipe, results)
        train_part = recipe.train.model_copy(update={"precision": precision})
        fixed = recipe.model_copy(update={"train": train_part})
        fingerprint = runs.run_fingerprint(fixed, data.digest, init)
        folder = runs.own_folder(results, name, runs.run_name(fixed, data.name, fingerprint), fingerprint)
        info = folder.read()
        if info is None or info.evaluated_only or not info.weights:
            return None
        if (info.status, info.fingerprint) != ("finished", fingerprint):
            return None
        whole = not runs.contradiction(folder, info) and tensors_digest(folder.best) == info.weights
        return folder if whole else None
    except (UserError, ValueError, OSError):
        return None


def _init_digest(recipe: Recipe, results: Path) -> str:
    """The digest of the weights that training starts from; "" for none. ValueError where only PyTorch can tell."""
    init = recipe.init
    if init == "auto":
        init = (best_pretraining(recipe, results) if recipe.spec.starts_from else None) or "none"
    if init == "none":
        return ""
    if init == TIMM:
        raise ValueError("the hub's cache is looked up by PyTorch's libraries")
    file = weights_file(init)
    return tensors_digest(file)


def notice_finished(folder: RunFolder, recipe: Recipe, profile: int = 0, track: Sequence[str] = ()) -> None:
    """`recipe`: what is asked for now; `profile`: steps to be timed; `track`: trackers that were to follow."""
    notice(f"{FINISHED} {folder.path}{'. Nothing was profiled.' if profile else ''}")
    if track:
        command = f"hcnet track {shlex.quote(str(folder.path))} --to {','.join(track)}"
        notice(f"Nothing was tracked: `{command}` sends its log.")
    metrics = folder.require().metrics
    for name, part in list(recipe.evaluation.items())[1:]:
        if part.when != "asked" and not any(key.endswith(f"_{name}") for key in metrics):
            theirs = rcp.resolve(folder.recipe_file).recipe.evaluation.get(name)
            same = theirs is not None and theirs.model_dump(exclude={"when"}) == part.model_dump(exclude={"when"})
            own = f" --model {shlex.quote(recipe.model.name)}" if recipe.model.digest else ""
            command = f"hcnet evaluate {shlex.quote(str(folder.path))} --on {name}{own}"
            notice(f"{name} has no score yet: `{command}` makes it{'' if same else ', with the same --set options'}.")
    results = place_typed(folder.path.parent.parent, "--results")
    notice(f"Start it over with --fresh; `hcnet report{results}` prints the table.")
