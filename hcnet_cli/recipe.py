"""The recipe: every number of an experiment as typed, frozen data. YAML and overrides in, checked recipe out."""

from __future__ import annotations

import functools
import hashlib
import json
import re
from collections.abc import Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Union

from pydantic import BaseModel, Field, SerializeAsAny, ValidationError, create_model, model_validator

from hcnet_cli import plain_yaml
from hcnet_cli.console import UserError, did_you_mean, nearest_key
from hcnet_cli.files import read_text
from hcnet_cli.own_model import is_own, read_source, source_digest
from hcnet_cli.plain_yaml import parse_yaml
from hcnet_cli.schema import SHAPE_FIELDS, DataPart, EvaluationPart, Line, Model, Optim, Part, Schedule, Train
from hcnet_cli.sizes import COMPONENTS, SIZES
from hcnet_cli.tasks import TASKS
from hcnet_cli.tasks.spec import Spec
from hcnet_cli.values import as_typed, first_mistake, shown


class Recipe(Part):
    """A whole experiment. `protocol` names the shipped recipe it follows; see `changes` for where it departs.

    Head, data and evaluation are those of the task; `schema_of` has the class with their types.
    """

    task: str
    protocol: Line = Field(json_schema_extra={"example": "mine"})
    model: Model = Model()
    head: SerializeAsAny[Part]
    data: SerializeAsAny[DataPart]
    optim: Optim
    schedule: Schedule
    train: Train
    evaluation: dict[str, SerializeAsAny[EvaluationPart]] = Field(default_factory=dict)
    init: Line = "none"

    @model_validator(mode="after")
    def _related(self) -> Recipe:
        if self.train.batch_size % self.train.accumulate:
            raise ValueError(
                f'"train.accumulate" {self.train.accumulate} does not divide "train.batch_size" '
                f"{self.train.batch_size}: micro-batches have equal sizes"
            )
        return self

    @property
    def spec(self) -> Spec:
        """The declaration of the recipe's task."""
        return TASKS[self.task]


@functools.cache
def schema_of(task: str) -> type[Recipe]:
    """The class of recipes of a task."""
    spec = TASKS[task]
    heads = list(spec.heads.values())
    formats = [one.config for one in spec.formats.values()]

    def one_of(parts: list[Any], discriminator: str) -> Any:
        if len(parts) == 1:
            return parts[0]
        return Annotated[Union[tuple(parts)], Field(discriminator=discriminator)]  # noqa: UP007

    made: type[Recipe] = create_model(
        f"Recipe[{task}]",
        __base__=Recipe,
        head=(one_of(heads, "kind"), ...),
        data=(one_of(formats, "format"), ...),
        evaluation=(dict[str, spec.evaluation], {}),  # type: ignore[name-defined]
    )
    return made


# Where a recipe's sections lie. Keys below a dictionary are free.
DICTIONARIES = ("model.args", "optim.args", "evaluation")
# Keys of version 0.1, which old recipes, runs and command lines have: their names today.
RENAMED: dict[str, str | tuple[str, Mapping[Any, Any]]] = {
    "optim.betas": "optim.args.betas",
    "optim.eps": "optim.args.eps",
}


def _renamed(task: object) -> dict[str, str | tuple[str, Mapping[Any, Any]]]:
    return {**RENAMED, **(TASKS[task].renamed if isinstance(task, str) and task in TASKS else {})}


def translate(key: str, value: Any, task: object) -> tuple[str, Any]:
    """A dotted key and its value under today's names."""
    new = _renamed(task).get(key, key)
    if isinstance(new, tuple):
        return new[0], new[1].get(value, value) if isinstance(value, Hashable) else value
    return new, value


def _fields(recipe: Recipe) -> Iterator[tuple[str, str, Any]]:
    """(dotted key, how the field enters the fingerprint, its default) of every field of a recipe's sections."""

    def section(part: BaseModel, prefix: str) -> Iterator[tuple[str, str, Any]]:
        for name, info in type(part).model_fields.items():
            extra = info.json_schema_extra if isinstance(info.json_schema_extra, dict) else {}
            yield f"{prefix}{name}", str(extra.get("fingerprint", "always")), info.get_default()

    for name in ("model", "head", "data", "optim", "schedule", "train"):
        yield from section(getattr(recipe, name), f"{name}.")
    for name, entry in recipe.evaluation.items():
        yield from section(entry, f"evaluation.{name}.")
    yield "init", "never", "none"  # weights enter by content


def not_in_fingerprint(recipe: Recipe) -> frozenset[str]:
    """Dotted keys of what cannot change a number: how the work is divided and shown, where files lie, and evaluations
    but the first, which score weights that are chosen without them.
    """
    first = next(iter(recipe.evaluation), "")
    return frozenset(
        key
        for key, role, _ in _fields(recipe)
        if role == "never" or (key.startswith("evaluation.") and key.split(".")[1] != first)
    )


def is_free(part: type[Part], name: str) -> bool:
    """Whether a field of a section cannot change a number."""
    extra = part.model_fields[name].json_schema_extra
    return isinstance(extra, dict) and extra.get("fingerprint") == "never"


# What a run may vary without departing from its protocol.
ALLOWED_TO_VARY = frozenset({"model.size", "model.disable", "train.seed", "train.precision"})


def dump_yaml(recipe: Recipe) -> str:
    return plain_yaml.dump_yaml(recipe.model_dump(mode="json"))


# --- shipped recipes --------------------------------------------------------------------------------------------------


def recipes_dir() -> Path:
    """The shipped recipes: inside the wheel, or at the top of a source checkout."""
    here = Path(__file__).parent
    return here / "recipes" if (here / "recipes").is_dir() else here.parent / "recipes"


def shipped() -> list[str]:
    """Names of the shipped recipes, such as "pretrain/imagenet"."""
    root = recipes_dir()
    return sorted(str(file.relative_to(root).with_suffix("")).replace("\\", "/") for file in root.glob("*/*.yaml"))


def recipe_file(name: str, task: str = "") -> Path:
    """The file of a recipe given by path, by full name or (with `task`) by short name."""
    if name.endswith((".yaml", ".yml")):
        if not Path(name).is_file():
            raise UserError(f"There is no recipe file {name}.", hint="`hcnet recipes ls` lists the shipped ones.")
        return Path(name)
    for candidate in (name, f"{task}/{name}"):
        if candidate in shipped() and candidate.startswith(f"{task}/" if task else ""):
            return recipes_dir() / f"{candidate}.yaml"
    others = [full for full in shipped() if task and name in (full, full.split("/", 1)[1])]
    if others:
        its = others[0].split("/", 1)[0]
        raise UserError(
            f"The recipe {name} is for {its}, not for {task}.",
            hint=f"Type hcnet {its} --recipe {name}, or, in an ablation, --task {its}.",
        )
    known = [full for full in shipped() if not task or full.startswith(f"{task}/")]
    short = {**{full: full for full in known}, **{full.split("/", 1)[1]: full for full in known}}
    hint = f"Shipped: {', '.join(known)}."
    raise UserError(f'There is no recipe "{name}".{did_you_mean(name, short)}', hint=hint)


# --- from data to a checked recipe ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Resolved:
    """A checked recipe, and for each value (dotted key) that is not the recipe file's where it came from ("default":
    the file says nothing).
    """

    recipe: Recipe
    sources: Mapping[str, str] = field(default_factory=dict)


def flatten(data: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"optim": {"lr": 1}} -> {"optim.lr": 1}."""
    flat: dict[str, Any] = {}
    for key, value in data.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def parse_override(text: str) -> tuple[str, Any]:
    """`optim.lr=1e-3` -> ("optim.lr", 0.001); the value is YAML."""
    key, separator, value = text.partition("=")
    if not separator or not key.strip():
        raise UserError(f'"--set {text}" is not KEY=VALUE.', hint="For example: --set optim.weight_decay=0.1")
    return key.strip(), parse_yaml(value, f"--set {key.strip()}")


def read_mapping(file: Path) -> dict[str, Any]:
    """The content of a YAML file of keys and values; UserError for any other."""
    data = parse_yaml(read_text(file, limit=2**20), str(file))
    if not isinstance(data, dict):
        raise UserError(f"{file} is not a mapping of keys to values.")
    return data


def resolve(file: Path, overrides: Iterable[tuple[str, Any, str]] = ()) -> Resolved:
    """The recipe in `file` with overrides (dotted key, value, source) laid over it, checked.

    Keys of version 0.1 are understood. Raises UserError naming the first unknown key (with a suggestion) or bad value.
    """
    data = read_mapping(file)
    task = data.get("task")
    for old in _renamed(task):
        *sections, last = old.split(".")
        inner = _node(data, sections, add=False)
        if inner is not None and last in inner:
            key, value = translate(old, inner.pop(last), task)
            *sections, last = key.split(".")
            if (node := _node(data, sections)) is not None:
                node[last] = value
    base = check(data, str(file))
    known = flatten(base.model_dump())
    unsaid = known.keys() - flatten(data).keys()
    sources: dict[str, str] = {}
    for key, value, source in overrides:
        key, value = translate(key, value, task)
        if key not in known and not f"{key}.".startswith(tuple(f"{name}." for name in DICTIONARIES)):
            section = [k for k in known if k.startswith(f"{key}.")]
            tip = f" It is a section: set one of {', '.join(section)}." if section else nearest_key(key, known)
            raise UserError(
                f'{source}: unknown recipe key "{key}".{tip}',
                hint="`hcnet recipes show NAME` prints a recipe, `hcnet recipes explain KEY` tells what a key means.",
            )
        *sections, last = key.split(".")
        if (node := _node(data, sections)) is None:
            raise UserError(f'{source}: "{key}" cannot be set: {sections[-1]} is not a section.')
        node[last] = value
        sources[key] = source
    recipe = check(data, str(file), sources)
    named = "model.name" in sources and "model.digest" not in sources
    if is_own(recipe.model.name) and (named or not recipe.model.digest):
        model = recipe.model.model_copy(update={"digest": source_digest(read_source(recipe.model.name))})
        recipe = recipe.model_copy(update={"model": model})
    sources = dict.fromkeys(unsaid, "default") | sources
    if recipe.model.drop_path_rate is None and not recipe.model.name:
        sources["model.drop_path_rate"] = f"size {recipe.model.size}"
        model = recipe.model.model_copy(update={"drop_path_rate": SIZES[recipe.model.size].drop_path_rate})
        recipe = recipe.model_copy(update={"model": model})
    return Resolved(recipe, sources)


def _node(data: dict[str, Any], sections: Iterable[str], add: bool = True) -> dict[str, Any] | None:
    """The mapping that a dotted key lies in, made (with `add`) where it is missing; None where there is none."""
    for name in sections:
        inner = data.setdefault(name, {}) if add else data.get(name)
        if not isinstance(inner, dict):
            return None
        data = inner
    return data


def check(data: Mapping[str, Any], origin: str, sources: Mapping[str, str] = MappingProxyType({})) -> Recipe:
    """A Recipe from plain data, or a UserError about the first thing that is wrong, naming the flag it came from."""
    task = data.get("task")
    if not isinstance(task, str) or task not in TASKS:
        what = f'unknown task "{task}"' if task is not None else 'the key "task" is missing'
        raise UserError(f"{origin}: {what} (known: {', '.join(TASKS)}).{did_you_mean(str(task), TASKS)}")
    whole = _with_task_defaults(data, TASKS[task])
    try:
        recipe = schema_of(task).model_validate(whole)
    except ValidationError as error:
        raise format_validation_error(error, task, whole, origin, sources) from None
    taken = flatten(recipe.model_dump())
    for key, value in flatten(whole).items():
        if _is_one(value, taken.get(key)):
            raise UserError(
                f'{sources.get(key, origin)}: "{key}" cannot be {shown(value)}: true and false are no numbers.'
            )
    return recipe


def _is_one(given: Any, taken: Any) -> bool:
    """Whether pydantic took true for 1, or false for 0, in a value or in a list of values."""
    if isinstance(given, list) and isinstance(taken, list | tuple):
        return any(map(_is_one, given, taken))
    return isinstance(given, bool) and isinstance(taken, int | float) and not isinstance(taken, bool)


def _with_task_defaults(data: Mapping[str, Any], spec: Spec) -> dict[str, Any]:
    """The data with the task's head and evaluations where it says nothing of them."""
    given = data.get("evaluation", {})
    if isinstance(given, Mapping):
        first = next(iter(spec.evaluations))
        names = [*spec.evaluations, *(name for name in given if name not in spec.evaluations)]
        entries = {name: given.get(name, {}) for name in names}
        given = {
            name: {**spec.evaluations.get(name, {}), **entry} if isinstance(entry, Mapping) else entry
            for name, entry in entries.items()
        }
        when = given[first].get("when") if isinstance(given[first], Mapping) else None
        if when not in (None, "training"):
            raise UserError(f'"evaluation.{first}.when" must be training: it decides which weights are best.')
        for name, entry in given.items():
            if name != first and isinstance(entry, Mapping) and entry.get("when") == "training":
                raise UserError(f'"evaluation.{name}.when" cannot be training: only {first} is measured then.')
            if not re.fullmatch(r"[A-Za-z][A-Za-z0-9]*", str(name)):
                raise UserError(f'evaluation: "{name}" cannot be a name: use letters and digits.')
    return {"head": {"kind": next(iter(spec.heads))}, **data, "evaluation": given}


def format_validation_error(
    error: ValidationError, task: str, data: Any, origin: str, sources: Mapping[str, str]
) -> UserError:
    """The first thing that is wrong with a recipe, after what it comes from, and an example to type."""
    key, sentence, example = first_mistake(error, schema_of(task), data, known_keys(task))
    for name, source in sources.items():
        if key == name or key.startswith(f"{name}.") or (name.startswith(key) and f'"{name}"' in sentence):
            origin = source
    flag = origin if origin.startswith("--") else "--set"
    return UserError(
        f"{origin}: {sentence}", hint="" if example is None else f"For example: {as_typed(key, example, flag)}"
    )


def sections(task: str) -> dict[str, list[type[Part]]]:
    """The sections of a task's recipes; several classes where the task has several heads or data formats."""
    spec = TASKS[task]
    return {
        "model": [Model],
        "head": list(spec.heads.values()),
        "data": [one.config for one in spec.formats.values()],
        "optim": [Optim],
        "schedule": [Schedule],
        "train": [Train],
        **{f"evaluation.{name}": [spec.evaluation] for name in spec.evaluations},
    }


def known_keys(task: str) -> list[str]:
    """Dotted keys a recipe of a task may have."""
    inner = [f"{name}.{key}" for name, parts in sections(task).items() for part in parts for key in part.model_fields]
    return [*Recipe.model_fields, *dict.fromkeys(inner)]


# --- what a recipe says about itself ----------------------------------------------------------------------------------


def identity(recipe: Recipe) -> dict[str, Any]:
    """All that can change a number, by dotted key: equal for two recipes of the same run.

    Keys and defaults are those of version 0.1: a field that came later is left out at its default, and a renamed one
    has its old name. So the fingerprints of earlier runs stay what they were.
    """
    flat = flatten(recipe.model_dump(mode="json"))
    for key, role, default in _fields(recipe):
        if key in flat and (role == "never" or (role == "changed" and _plain(flat[key]) == _plain(default))):
            del flat[key]
    for key in not_in_fingerprint(recipe) & flat.keys():
        del flat[key]
    if recipe.model.digest:  # the content of a file is what counts, not where it lies
        flat["model.name"] = recipe.model.label
    old = {new: name for name, new in _renamed(recipe.task).items() if isinstance(new, str)}
    if recipe.optim.name != "adamw":  # version 0.1 had no other
        old = {new: name for new, name in old.items() if not new.startswith("optim.")}
    return {old.get(key, key): value for key, value in flat.items()}


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def fingerprint(recipe: Recipe, **contents: str) -> str:
    """8 hex digits over what can change a number: the recipe's identity, and digests of data and weights."""
    text = json.dumps({**identity(recipe), **contents}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def config_digest(recipe: Recipe, data: str, start: str) -> str:
    """16 hex digits over all that can change a number except the seed: equal for runs that may be averaged.

    `start`: of the weights that training starts from, the config of the run that made them, else their digest.
    """
    kept = {key: value for key, value in identity(recipe).items() if key != "train.seed"}
    text = json.dumps({**kept, "data": data, "start": start}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def changed_keys(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """The keys whose values differ: (ours, theirs)."""
    return {k: (ours.get(k), theirs.get(k)) for k in {**ours, **theirs} if ours.get(k) != theirs.get(k)}


def changes(recipe: Recipe) -> dict[str, Any]:
    """Where the recipe departs from the shipped protocol it names ({} for the protocol itself).

    The model's own shape is told by `variant`; size, seed and how the work is divided may vary.
    """
    if recipe.protocol not in shipped():
        return {}
    base = resolve(recipes_dir() / f"{recipe.protocol}.yaml", [("model.size", recipe.model.size, "--size")]).recipe
    shape = {f"model.{name}" for name in ("name", "args", "digest", *SHAPE_FIELDS)}
    free = ALLOWED_TO_VARY | shape
    if recipe.model.name:
        free |= {"model.drop_path_rate"} if recipe.model.drop_path_rate is None else set()
    differing = changed_keys(identity(recipe), identity(base))
    changed = {
        key: ours
        for key, (ours, _) in sorted(differing.items())
        if key not in free and not key.startswith("model.args.")
    }
    if (recipe.init == "none") != (base.init == "none"):
        changed["init"] = "none" if recipe.init == "none" else "given weights"  # a path differs between machines
    return changed


def variant(recipe: Recipe) -> str:
    """How the model departs from its size: "", "no-refinement", "kernel_size=3" or both joined with "+"."""

    def shown(value: Any) -> str:
        return "-".join(map(str, value)) if isinstance(value, list | tuple) else str(value)

    parts = [f"no-{name}" for name in COMPONENTS if name in recipe.model.disable]
    for name in SHAPE_FIELDS:
        value = getattr(recipe.model, name)
        if value is not None:
            parts.append(f"{name}={shown(value)}")
    parts += [f"{name}={shown(value)}" for name, value in sorted(recipe.model.args.items())]
    return "+".join(parts)
