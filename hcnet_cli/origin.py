"""What a file of weights says of itself: where they come from, and what contradicts the use they are to have."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from hcnet_cli import build
from hcnet_cli.console import UserError, warn
from hcnet_cli.data.splits import DataSplits
from hcnet_cli.engine import Task
from hcnet_cli.header import read_metadata
from hcnet_cli.plain_json import read_json, unicode
from hcnet_cli.pretrained import weights_file
from hcnet_cli.recipe import Recipe
from hcnet_cli.values import as_typed
from hcnet_cli.weights import LoadReport

# Arguments of models that may differ between training and its use: the size of images, and what is drawn in training
OF_USE = re.compile(r"img_size|\w+_img_size|\w*drop\w*|num_classes")


KINDS: dict[str, type] = {"model": str, "model_args": dict, "classes": list, "mean": list, "std": list}


def about(path: Path) -> dict[str, Any]:
    """The metadata of a safetensors file, or of timm's config.json beside it in the same names; {} for other files."""
    if path.suffix != ".safetensors":
        return {}
    try:
        known = read_metadata(path)
        if "classes" not in known and (path.parent / "config.json").is_file():
            config: Any = read_json(path.parent / "config.json")
            normalised = config.get("pretrained_cfg") or {}
            known |= {"model": config.get("architecture"), "model_args": config.get("model_args")}
            known |= {
                "classes": config.get("label_names"),
                "mean": normalised.get("mean"),
                "std": normalised.get("std"),
            }
        return {key: value for key, value in known.items() if isinstance(value, KINDS.get(key, object))}
    except (OSError, ValueError, AttributeError):  # UserError is a ValueError
        return {}


def init_origin(source: str) -> dict[str, Any]:
    """What weights to start from say of the run that made them: its config and its seed, where they are known."""
    known = about(weights_file(source))
    return {key: known[key] for key in ("config", "seed") if key in known}


def check(init: LoadReport, task: Task, recipe: Recipe, data: DataSplits, eval_only: bool) -> None:
    """Says where weights were made for another use than they are to have; UserError if they are only to be scored."""
    if eval_only and (reason := _other_number_of_classes(init, recipe, data)):
        raise UserError(f"{reason}.", hint="Weights are scored on data of the same classes.")
    for other in _contradictions(init, task, recipe, data):
        if eval_only:
            raise UserError(f"{other}: the score would mean nothing.")
        warn(f"{other}. Training starts from what was learned there.")
    if seen := _seen_before(init, recipe, data):
        warn(f"{seen}.")


def _contradictions(init: LoadReport, task: Task, recipe: Recipe, data: DataSplits) -> Iterator[str]:
    """What differs, though all tensors fit."""
    theirs, ours = about(Path(init.source)), build.weights_metadata(recipe, data)
    whole = not build.lacking(init, task)
    if whole:
        yield from _other_classes(init.source, theirs.get("classes") or (), ours["classes"])
    for key in ("mean", "std", "bits", *(["reduce_zero_label"] if whole else [])):
        if key in theirs and key in ours and not _equal(theirs[key], ours[key]):
            yield f"{init.source} was trained with {as_typed(f'data.{key}', theirs[key])}, here it is {ours[key]}"
    yield from _other_arguments(init.source, theirs, ours)


def _other_number_of_classes(init: LoadReport, recipe: Recipe, data: DataSplits) -> str:
    """What is wrong with weights of this task that are of more or of fewer classes than the data have."""
    known = about(Path(init.source))
    there, here = known.get("classes") or [], [unicode(name) for name in data.class_names]
    if not there or known.get("task", recipe.task) != recipe.task or len(there) == len(here):
        return ""
    return f"{init.source} is of {len(there)} classes ({_first(there)}), the data have {len(here)} ({_first(here)})"


def _first(names: Sequence[str]) -> str:
    return ", ".join([*map(str, names[:5]), *(["..."] if len(names) > 5 else [])])


def _equal(one: Any, other: Any) -> bool:
    """Of numbers and lists of them, but for rounding: another framework may have written one of them."""
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_equal, one, other))
    return abs(one - other) < 1e-3 if isinstance(one, float) and isinstance(other, float) else bool(one == other)


def _other_classes(source: str, known: Sequence[str], names: Sequence[str]) -> Iterator[str]:
    """As many classes as the data have, but other ones, or in another order."""
    if differing := [pair for pair in zip(known, names, strict=False) if pair[0] != pair[1]]:
        first, here = differing[0]
        yield f"{source} is of other classes than the data: one of them is {first} there and {here} here"


def _other_arguments(source: str, theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> Iterator[str]:
    """Arguments that change what a model computes, and no shape of a tensor, which loading would have found.

    HcNet's fields that are not given are left out of both; timm's arguments are those that were given.
    """
    one, other = theirs.get("model_args"), ours["model_args"]
    name = str(theirs.get("model", "")).partition(".")[0]
    if not isinstance(one, dict) or name != str(ours["model"]).partition(".")[0]:
        return
    keys = one.keys() & other.keys() if name.startswith("hcnet_") else one.keys() | other.keys()
    for key in sorted(keys):
        if not OF_USE.fullmatch(key) and one.get(key) != other.get(key):
            there, here = (args.get(key, "its default") for args in (one, other))
            yield f"{source} is of a model with {key} {there}, here it is {here}"


def _seen_before(init: LoadReport, recipe: Recipe, data: DataSplits) -> str:
    """What is wrong where cross-validation starts from weights that were trained on images of the fold it scores."""
    folds = getattr(recipe.data, "folds", None)
    if not folds:
        return ""
    known = about(Path(init.source))
    of, seed = str(known.get("data")), known.get("seed")
    equal = known.get("data_digest") == data.info.digest
    if not equal and data.info.name != f"{re.sub(r'-[0-9]+-folds$', '', of)}-{folds}-folds":
        return ""
    if equal and isinstance(seed, int) and seed % folds == recipe.train.seed % folds:
        return ""  # the same fold
    return f"{init.source} was trained on {of}, with images that this fold is scored on: the score will be too good"
