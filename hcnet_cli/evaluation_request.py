"""What `hcnet evaluate` is asked for, checked against the run before PyTorch is loaded."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from hcnet_cli import recipe as rcp
from hcnet_cli import runs
from hcnet_cli.console import UserError, did_you_mean, warn
from hcnet_cli.header import read_metadata
from hcnet_cli.inputs import MOVED, check_data
from hcnet_cli.privacy import home
from hcnet_cli.recipe import Recipe
from hcnet_cli.runs import RunFolder, RunInfo
from hcnet_cli.tasks import TASKS

Override = tuple[str, Any, str]  # dotted key, value, source

ALLOWED = ("evaluation.", "data.path", "train.workers", "train.eval_batch_size")  # what may be set for an evaluation


class EvaluationRequest(NamedTuple):
    """A finished run's record and recipe, with what the command line sets, and the names of the evaluations to make."""

    info: RunInfo
    recipe: Recipe
    wanted: list[str]


def read_request(
    folder: RunFolder, overrides: Sequence[tuple[str, Any, str]], names: Sequence[str]
) -> EvaluationRequest:
    """The evaluations `names` of the run's recipe; those that have no score yet, if none are named.

    UserError for a run that is not finished, for data that are not there, and for an entry whose score is there and
    was made with other settings.
    """
    overrides, names = _by_name(folder, overrides, names)
    info, recipe = _read(folder, overrides)
    set_now = [key.split(".")[1] for key, _, _ in overrides if key.startswith("evaluation.")]
    wanted = _wanted(info, recipe, names, set_now)
    _check_settings(info, recipe, wanted)
    _check_record(folder, info, adding=wanted != [next(iter(recipe.evaluation))])
    check_data(recipe, MOVED)
    if check := recipe.spec.check_evaluation:
        for name in wanted:
            check(recipe.evaluation[name], _classes(folder))
    return EvaluationRequest(info, recipe, wanted)


def _by_name(
    folder: RunFolder, overrides: Sequence[Override], names: Sequence[str]
) -> tuple[list[Override], list[str]]:
    """`--on imagenet-a` as the entry `imageneta` of the recipe, which is added; --data is then the folder of its images
    or holds that folder, imagenet-a.
    """
    spec = TASKS.get(folder.require().task)
    if spec is None:
        return list(overrides), list(names)  # the recipe says the same, and is refused
    entries = [name.replace("-", "") if name in spec.further else name for name in names]
    added: list[Override] = []
    rest = list(overrides)
    data = [value for _, value, source in overrides if source == "--data"]
    for name, entry in zip(names, entries, strict=True):
        if name in spec.further:
            added.append((f"evaluation.{entry}.on", name, "--on"))
        if name in spec.in_folders and data:
            inside = Path(os.path.expanduser(data[0])) / name
            added.append((f"evaluation.{entry}.path", home(str(inside) if inside.is_dir() else data[0]), "--data"))
            rest = [one for one in rest if one[2] != "--data"]
    return [*rest, *added], entries


def _classes(folder: RunFolder) -> list[str]:
    """The classes of a run's model, as its weights say; empty where they do not."""
    try:
        return list(read_metadata(folder.best).get("classes", []))
    except (OSError, ValueError):
        return []


def _read(folder: RunFolder, overrides: Sequence[tuple[str, Any, str]]) -> tuple[RunInfo, Recipe]:
    """Record and recipe of a finished run, the recipe with what the command line sets."""
    info = folder.require()
    if info.status != "finished":
        raise UserError(
            f"{folder.path} is not finished ({info.status} at step {info.steps_done} of {info.steps_total}).",
            hint="The command that started it goes on with it.",
        )
    recipe = rcp.resolve(folder.recipe_file).recipe
    first = next(iter(recipe.evaluation))
    own = recipe.model.digest
    runs.require_own_model(folder, recipe, named=any(key == "model.name" for key, _, _ in overrides))
    for key, _, source in overrides:
        key, _ = rcp.translate(key, None, recipe.task)
        if key.startswith(f"evaluation.{first}."):
            raise UserError(
                f"{source}: {first} is how the run's best weights were chosen, so it stays as it is.",
                hint=f"Give the new score a name: --set evaluation.NAME.{key.split('.', 2)[2]}=...",
            )
        if not key.startswith(ALLOWED) and not (own and key == "model.name"):
            raise UserError(f"{source}: an evaluation changes nothing but its own section, evaluation.NAME.KEY.")
    found = rcp.resolve(folder.recipe_file, overrides).recipe
    if (found.model.label, found.model.digest) != (recipe.model.label, own):
        raise UserError(
            f"{found.model.name} is not what made the model of this run: the file has changed, or it is another.",
            hint=f"The run's own copy: {folder.own_model(recipe.model.label)}",
        )
    return info, found


def _check_record(folder: RunFolder, info: RunInfo, adding: bool) -> None:
    """UserError for files that contradict the record. A changed record is compared, but not added to."""
    if info.altered and not adding:
        warn(f"{folder.record} was changed after it was written: its checksum does not match.")
    elif reason := runs.contradiction(folder, info):
        raise UserError(reason, hint="Restore the file, or train the run again with --fresh.")


def _wanted(info: RunInfo, recipe: Recipe, names: Sequence[str], set_now: Sequence[str]) -> list[str]:
    """The evaluations to make: those named, else those without a score and those that the command line sets."""
    known = list(recipe.evaluation)
    for name in names:
        if name not in known:
            choices = [*known, *recipe.spec.further]
            near = did_you_mean(name, choices)
            others = [task.name for task in TASKS.values() if name in task.further]
            raise UserError(
                f'--on: this run has no evaluation "{name}"{f", which is for {others[0]} runs" if others else ""} '
                f"(known: {', '.join(choices)}).{near}",
                hint="" if near or others else "One with other settings: --set evaluation.NAME.KEY=VALUE",
            )
    first, *further = known
    primary = recipe.spec.primary.key
    missing = [name for name in further if f"{primary}_{name}" not in info.metrics]
    return list(names) or list(dict.fromkeys([*missing, *set_now])) or [first]


def _check_settings(info: RunInfo, recipe: Recipe, wanted: Sequence[str]) -> None:
    """UserError where a recorded score was made with other settings than those of now."""
    for one in info.evaluations:
        name, before = str(one.get("name")), one.get("settings")
        if name not in wanted or name not in recipe.evaluation or not isinstance(before, dict):
            continue
        entry = recipe.evaluation[name]
        now = entry.model_dump(mode="json")
        matters = [key for key in now if not rcp.is_free(type(entry), key)]
        if changed := [key for key in matters if now[key] != before.get(key, now[key])]:
            raise UserError(
                f"The score {name} of this run was made with {changed[0]}={before[changed[0]]}, not {now[changed[0]]}.",
                hint=f"Give the new score another name than {name}: --set evaluation.NAME.{changed[0]}=...",
            )
