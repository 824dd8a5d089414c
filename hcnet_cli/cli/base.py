"""From the flags of a command to a recipe file and the overrides laid over it."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hcnet_cli import own_model
from hcnet_cli.cli.options import RECIPE_KEYS
from hcnet_cli.console import UserError, notice, warn
from hcnet_cli.pretrained import TIMM
from hcnet_cli.tasks import TASKS

if TYPE_CHECKING:
    from hcnet_cli.recipe import Recipe, Resolved

Override = tuple[str, Any, str]  # dotted key, value, where it comes from


def base_recipe(task: str, given: Mapping[str, Any]) -> tuple[Path, list[Override]]:
    """The recipe file of a training command, named or the one that belongs to the data; flags and --set as overrides.

    `given`: the command's parameters; those that are None were not given.
    """
    from hcnet_cli import recipe as rcp

    spec = TASKS[task]
    parsed = [rcp.parse_override(text) for text in given["overrides"] or []]
    name, data, source = _recipe_name(task, given), given["data"], "--data"
    for key, value in parsed:
        if key == "data.path":
            data, source = str(value), "--set data.path"
    if data is None and (variable := os.environ.get(spec.data_variable)):
        data, source = variable, f"${spec.data_variable}"
    file = rcp.recipe_file(name, task) if name else None
    if data is None and file is not None:
        data, source = rcp.resolve(file).recipe.data.path, f"recipe {name}"
    if data is None:
        data, source = spec.embedded, "embedded"
    require_text(data, source)
    if file is None:
        file = rcp.recipe_file(spec.embedded if data == spec.embedded else spec.default_recipe, task)
    data = os.path.expanduser(data)  # a shell expands ~ in an argument, not in a variable or a recipe
    overrides = [("data.path", data, source), *_flags(task, given)]
    for key, value in parsed:
        for flag_key, other, flag in overrides:
            if key == flag_key and value != other:
                warn(f"--set {key}={value} counts, and {flag} {other} does not: they set the same value.")
    overrides += [(key, value, f"--set {key}") for key, value in parsed]
    if given.get("size") is not None and (named := [flag for key, _, flag in overrides if key == "model.name"]):
        raise UserError(f"--size is for HcNet, {named[0]} for other models.", hint="Give one of them.")
    found = rcp.resolve(file, overrides).recipe
    if found.task != task:
        raise UserError(
            f"The recipe {file} is for {found.task}, not for {task}.",
            hint=f"hcnet {found.task} --recipe {shlex.quote(name or str(file))}",
        )
    for parameter in ("epochs", "steps"):
        if given.get(parameter) is not None and parameter != found.schedule.unit:
            raise UserError(
                f"This recipe counts {found.schedule.unit}, not {parameter}.",
                hint=f"Use --{found.schedule.unit} N; with --set schedule.unit={parameter} too it counts {parameter}, "
                "and train.eval_every does.",
            )
    if source == "embedded":
        notice(f"No --data and no ${spec.data_variable}: using the embedded {data} ({spec.embedded_note}).")
    return file, overrides


def require_text(path: str, source: str) -> None:
    """UserError for a path whose bytes are not UTF-8: recipes and records, which are, could not name it."""
    try:
        path.encode()
    except UnicodeEncodeError:
        raise UserError(
            f"{source} is not UTF-8 text: {os.fsencode(path)!r}.",
            hint="Rename what it names, or make a link with another name: ln -s FOLDER NAME.",
        ) from None


def resolve(task: str, given: Mapping[str, Any]) -> Resolved:
    """The recipe of a training command, checked."""
    from hcnet_cli import recipe as rcp

    resolved = rcp.resolve(*base_recipe(task, given))
    require_named(resolved.recipe, resolved.sources.get("model.name", ""))
    return resolved


def require_named(recipe: Recipe, source: str) -> None:
    """UserError for a file of code that no flag names: a recipe or a study from elsewhere must not run one."""
    name = recipe.model.name
    if own_model.is_own(name) and not source.startswith("--"):
        raise UserError(
            f"The model is made by a file, {name}, which runs only if the command line names it.",
            hint=f"Read the file, and give --model {shlex.quote(name)}",
        )


def _recipe_name(task: str, given: Mapping[str, Any]) -> str | None:
    """What --recipe names, or a flag of the task that stands for a recipe."""
    name: str | None = given["recipe"]
    for option in TASKS[task].options:
        if option.recipe and given.get(option.name) is not None:
            if name is not None:
                raise UserError(f"{option.flags[0]} names a recipe; --recipe does too.", hint="Give one of them.")
            name = option.recipe.format(given[option.name])
    return name


def _flags(task: str, given: Mapping[str, Any]) -> list[Override]:
    flags = [
        (key, given[parameter], flag)
        for parameter, (flag, key) in RECIPE_KEYS.items()
        if given.get(parameter) is not None
    ]
    if given.get("pretrained"):
        if given.get("init") is not None:
            raise UserError("--pretrained names the weights to start from; --init does too.", hint="Give one of them.")
        flags.append(("init", TIMM, "--pretrained"))
    for option in TASKS[task].options:
        value = given.get(option.name)
        if option.key and value is not None:
            flags.append((option.key, option.values.get(value, value), option.flags[0].split("/")[0]))
    return flags
