"""From a study file to recipes: arms, what all arms share, and what must not differ."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, Field, ValidationError

from hcnet_cli import pretrained
from hcnet_cli import recipe as rcp
from hcnet_cli.console import UserError, did_you_mean
from hcnet_cli.plain_yaml import parse_yaml
from hcnet_cli.recipe import Recipe
from hcnet_cli.schema import Line, Part, Seed
from hcnet_cli.sizes import COMPONENTS, SIZES, ordered_components
from hcnet_cli.study.analysis import Analysis
from hcnet_cli.study.record import run_key
from hcnet_cli.tasks import FIRST_TASK, TASKS
from hcnet_cli.values import as_written, assigned, first_mistake

SHARED = frozenset(  # fields that no arm may change: budget, data and seeds
    {
        *("task", "protocol", "data.format", "data.path", "data.folds", "train.seed", "train.batch_size"),
        *("schedule.length", "schedule.unit", "train.patience"),
    }
)
Override = tuple[str, Any, str]  # dotted key, value, where it comes from
MOST_ARMS = MOST_SEEDS = 100
MOST_CELLS = 5_000  # each is a training


def _file_name(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._+=-]{0,59}", name):
        raise ValueError(
            f'"{name[:80]}" cannot be the name of an arm: use at most 60 letters, digits and signs of "._+=-"'
        )
    return name


def _distinct(seeds: tuple[int, ...]) -> tuple[int, ...]:
    if len(set(seeds)) < len(seeds):
        raise ValueError("a repeated seed is no new evidence")
    return seeds


def _several(arms: dict[str, Any]) -> dict[str, Any]:
    if not 2 <= len(arms) <= MOST_ARMS:
        raise ValueError(f"a study needs at least two arms, the first is the baseline, and at most {MOST_ARMS}")
    return arms


Name = Annotated[str, AfterValidator(_file_name)]
Changes = dict[str, Any]


# --- the study file ---------------------------------------------------------------------------------------------------


class StudyRun(Part):
    """One training of every arm.

    Args:
        recipe: A shipped recipe or a file.
        init: "none", weights, or the task whose run of the same arm and seed in this study training starts from.
        changes: Recipe fields of all arms, such as the budget.
    """

    recipe: str = Field(json_schema_extra={"example": "pretrain/digits"})
    init: Line = "none"
    changes: Changes = Field(default_factory=dict, json_schema_extra={"example": {"optim.lr": 0.001}})

    @property
    def data(self) -> str | None:
        """The data that the study names, here or in the recipe."""
        if path := rcp.flatten(self.changes).get("data.path"):
            return str(path)
        return rcp.resolve(rcp.recipe_file(self.recipe)).recipe.data.path if self.recipe else None


class Study(Part):
    """A study file. `arms`: by name, the recipe fields that each sets; the first is the baseline.

    Without `runs` every arm is trained once, by the recipe that the command line names. `early_stopping`: arms may
    train for different numbers of steps (train.patience).
    """

    title: Line = Field(max_length=200, json_schema_extra={"example": "refinement"})
    arms: Annotated[dict[Name, Changes], AfterValidator(_several)] = Field(
        json_schema_extra={"example": {"full": {}, "no-gate": {"model.disable": ["gate"]}}}
    )
    runs: tuple[StudyRun, ...] = ()
    early_stopping: bool = False
    seeds: Annotated[tuple[Seed, ...], AfterValidator(_distinct)] = Field(
        default=(0, 1, 2), min_length=1, max_length=MOST_SEEDS
    )
    primary: Analysis = Analysis()


def shipped_studies() -> list[str]:
    return sorted(file.stem for file in (rcp.recipes_dir() / "ablate").glob("*.y*ml"))


def study_file(name: str) -> Path:
    """The file of a study, given by path or by the name of a shipped one."""
    if name.endswith((".yaml", ".yml")):
        if not Path(name).is_file():
            raise UserError(f"There is no study file {name}.", hint="`hcnet recipes ls` lists the shipped ones.")
        return Path(name)
    wanted = name.removeprefix("ablate/")
    for file in (rcp.recipes_dir() / "ablate").glob("*.y*ml"):
        if file.stem == wanted:
            return file
    raise UserError(
        f'There is no study "{name}".{did_you_mean(wanted, shipped_studies())}',
        hint=f"Shipped: {', '.join(shipped_studies())}; or name a YAML file.",
    )


def read_study(name: str) -> tuple[str, Study]:
    """(short name, study) of a shipped study or a YAML file. UserError for the first mistake."""
    file = study_file(name)
    data = rcp.read_mapping(file)
    try:
        return file.stem, Study.model_validate(data)
    except ValidationError as error:
        wrong = first_mistake(error, Study, data, STUDY_KEYS)
        hint = "" if wrong.example is None else f"For example: {as_written(wrong.key, wrong.example)}"
        raise UserError(f"{file}: {wrong.sentence}", hint=hint) from None


STUDY_KEYS = [
    *Study.model_fields,
    *(f"runs.0.{name}" for name in StudyRun.model_fields),
    *(f"primary.{name}" for name in Analysis.model_fields),
]


def disable_study(given: Sequence[str]) -> tuple[str, Study]:
    """The full model, and an arm for each of `given`: a component, several as "a+b", or "all" for each by itself."""
    arms: dict[str, dict[str, Any]] = {"full": {}}
    for text in given:
        for one in COMPONENTS if text == "all" else (text,):
            names = [name.strip() for name in one.split("+")]
            for name in names:
                if name not in COMPONENTS:
                    known = COMPONENTS if "+" in one else (*COMPONENTS, "all")
                    raise UserError(
                        f'--disable {text}: unknown component "{name}".{did_you_mean(name, known)}',
                        hint=f"Known: {', '.join(COMPONENTS)}; several in one arm: a+b; an arm for each: all.",
                    )
            ordered = _ordered(names, f"--disable {text}")
            arms["no-" + "-no-".join(ordered)] = {"model.disable": ordered}
    label = "all" if set(given) == {"all"} else "-".join(arm.removeprefix("no-") for arm in list(arms)[1:])
    return f"disable-{label}", Study(title=", ".join(list(arms)[1:]), arms=arms)


def backbones_study(given: str) -> tuple[str, Study]:
    """The shipped study `backbones` with the arms of `given`, "A,B": its own by name, sizes of HcNet, models as --model
    names them; "timm:" before a name of timm is allowed. The first is the baseline.
    """
    short, study = read_study("backbones")
    arms: dict[str, dict[str, Any]] = {}
    for text in filter(None, (part.strip() for part in given.split(","))):
        model = text.removeprefix("timm:")
        label = model.rpartition(":")[2]
        if label in arms:
            raise UserError(f"--arms: {label} is there twice.", hint="The name of a model is that of its arm.")
        if text in study.arms:
            arms[label] = study.arms[text]
        else:
            arms[label] = {"model.size": text} if text in SIZES else {"model.name": model}
    try:
        return short, Study(title=study.title, arms=arms)
    except ValidationError as error:
        raise UserError(f"--arms: {first_mistake(error, Study, {'arms': arms}, STUDY_KEYS).sentence}") from None


def sweep_study(given: Sequence[str]) -> tuple[str, Study]:
    """An arm for each value of each of `given`, "KEY=VALUE,VALUE"; of several, for each combination. The first is the
    baseline.
    """
    axes: dict[str, list[Any]] = {}
    for text in given:
        key, separator, values = (part.strip() for part in text.partition("="))
        found = parse_yaml(f"[{values}]", f"--sweep {key}") if separator and key else []
        if not isinstance(found, list) or len(found) < 2:
            raise UserError(
                f'"--sweep {text}" is not KEY=VALUE,VALUE with two values or more.',
                hint="For example: --sweep optim.lr=1e-3,3e-3,1e-2",
            )
        if key in axes:
            raise UserError(f"--sweep {key} is there twice.", hint="Name all its values in one.")
        axes[key] = found
    short = {key: key.rpartition(".")[2] for key in axes}
    if len(set(short.values())) < len(axes):
        short = {key: key for key in axes}
    arms: dict[str, dict[str, Any]] = {}
    for combination in itertools.product(*axes.values()):
        changes = dict(zip(axes, combination, strict=True))
        name = "+".join(f"{short[key]}={_in_a_name(value)}" for key, value in changes.items())
        if name in arms:
            raise UserError(f"--sweep: {name} is there twice.", hint="Each value makes an arm of its own.")
        arms[name] = changes
    title = "sweep of " + " and ".join(axes)
    try:
        return f"sweep-{'-'.join(short.values())}", Study(title=title, arms=arms)
    except ValidationError as error:
        raise UserError(f"--sweep: {first_mistake(error, Study, {'arms': arms}, STUDY_KEYS).sentence}") from None


def _in_a_name(value: Any) -> str:
    """A value as a part of an arm's name: 0.001, 2-2-4-2."""
    if isinstance(value, list):
        return "-".join(map(_in_a_name, value))
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _ordered(disable: Sequence[str], origin: str) -> list[str]:
    """The components in one order. UserError, with the origin, for a combination without a meaning."""
    try:
        return list(ordered_components(disable))
    except ValueError as error:
        raise UserError(f"{origin}: {error}.") from None


def study_runs(study: Study, tasks: Sequence[str], recipe: str) -> list[tuple[str, StudyRun]]:
    """(task, run) of each training: those of the study, or those of the tasks or the recipe of the command line.

    A task that starts from another one's weights takes the same arm's run if that task is among `tasks`, else random
    weights.
    """
    if study.runs:
        if tasks or recipe:
            raise UserError("The study names its own recipes.", hint="Leave --task and --recipe out.")
        return [(rcp.resolve(rcp.recipe_file(run.recipe)).recipe.task, run) for run in study.runs]
    for task in tasks:
        if task not in TASKS:
            raise UserError(
                f'--task: unknown task "{task}".{did_you_mean(task, TASKS)}', hint=f"Known: {', '.join(TASKS)}."
            )
    if recipe:
        if len(tasks) > 1:
            raise UserError("--recipe is for a study of one task.", hint="Name recipes under runs: in a study file.")
        file = rcp.recipe_file(recipe, *(tasks or [FIRST_TASK]))
        return [(rcp.resolve(file).recipe.task, StudyRun(recipe=recipe))]
    tasks = tasks or [FIRST_TASK]
    inits = [TASKS[task].starts_from if TASKS[task].starts_from in tasks else "none" for task in tasks]
    return [(task, StudyRun(recipe="", init=init)) for task, init in zip(tasks, inits, strict=True)]


def parse_seeds(text: str) -> tuple[int, ...]:
    """`0,1,2` -> (0, 1, 2)."""
    parts = [part.strip() for part in text.split(",")]
    if not all(re.fullmatch(r"[0-9]{1,9}", part) for part in parts) or len(parts) > MOST_SEEDS:
        raise UserError(
            f'--seeds "{text[:80]}" is not a list of whole numbers below a billion, at most {MOST_SEEDS}.',
            hint="For example: --seeds 0,1,2",
        )
    seeds = tuple(int(part) for part in parts)
    if len(set(seeds)) < len(seeds):
        raise UserError(f'--seeds "{text}" names a seed twice; a repeated seed is no new evidence.')
    return seeds


# --- from a study to recipes ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Base:
    """What all arms of one training share. `init`: as in StudyRun."""

    file: Path
    overrides: tuple[Override, ...]
    init: str = "none"


@dataclass(frozen=True)
class Design:
    """A study with everything resolved.

    Args:
        name: Of the record and the folder of recipes: it covers whatever shapes the study, except the seeds.
        arms: The dotted keys that each sets; the first is the baseline.
        recipes: By (arm, task), complete except for the seed and for weights of the study's own runs.
        sources: For each task that starts from the study's own runs, the task of those runs.
        analysis: The primary analysis that is asked for.
    """

    name: str
    title: str
    arms: Mapping[str, Mapping[str, Any]]
    tasks: tuple[str, ...]
    seeds: tuple[int, ...]
    recipes: Mapping[tuple[str, str], Recipe]
    sources: Mapping[str, str]
    analysis: Analysis

    @property
    def baseline(self) -> str:
        return next(iter(self.arms))

    def recipe(self, arm: str, task: str, seed: int, init: str = "") -> Recipe:
        """The recipe of a cell. `init`: for tasks with a source, the run that it starts from."""
        recipe = self.recipes[arm, task]
        train = recipe.train.model_copy(update={"seed": seed})
        return recipe.model_copy(update={"train": train, **({"init": init} if task in self.sources else {})})


def expand(
    short: str, study: Study, bases: Sequence[Base], seeds: Sequence[int] = (), results: Path = Path("results")
) -> Design:
    """The recipes of every arm. `init: auto` becomes the best run under `results` that the task can start from.

    UserError for an arm with an unknown field, a field that all arms share or a combination without a meaning, and for
    two equal arms.
    """
    seeds = tuple(seeds) or study.seeds
    if (cells := len(bases) * len(study.arms) * len(seeds)) > MOST_CELLS:
        raise UserError(f"The study has {cells:,} cells (arms x seeds x tasks), more than {MOST_CELLS:,}.")
    recipes: dict[tuple[str, str], Recipe] = {}
    inits: dict[str, str] = {}
    for base in bases:
        task, drop_path = "", None
        for arm, changes in study.arms.items():
            recipe = _arm_recipe(arm, changes, base, results)
            if not task:
                drop_path = recipe.model.drop_path_rate
            if recipe.model.name and recipe.model.drop_path_rate is None:  # as strong for all, where the model has one
                model = recipe.model.model_copy(update={"drop_path_rate": drop_path})
                recipe = recipe.model_copy(update={"model": model})
            if recipe.train.patience is not None and not study.early_stopping:
                raise UserError(
                    "With train.patience the arms would train for different numbers of steps: their budgets differ.",
                    hint="Leave it out, or say that it is wanted: --early-stopping (early_stopping: true in a study).",
                )
            check_folds(recipe, seeds, study.primary)
            task = recipe.task
            same = next((a for (a, t), other in recipes.items() if t == task and other == recipe), None)
            if same is not None:
                raise UserError(f"The arms {same} and {arm} are the same recipe for {task}.")
            if (arm, task) in recipes:
                raise UserError(f"{task} appears twice in this study.", hint="A study runs each task once.")
            recipes[arm, task] = recipe
        inits[task] = base.init
    tasks = tuple(task for task in TASKS if task in inits)  # a task's source comes first
    sources = {task: init for task, init in inits.items() if init in TASKS}
    for task, source in sources.items():
        if source != TASKS[task].starts_from or source not in tasks:
            raise UserError(
                f"{task} starts from the {source} run of this study, but there is none in it.",
                hint=f"Put a {source} recipe before it, or name weights or none as its init.",
            )
    first = recipes[next(iter(study.arms)), tasks[0]]
    keys = {f"{arm} {task}": run_key(recipe) for (arm, task), recipe in recipes.items()}
    digest = hashlib.sha256(json.dumps([keys, sorted(sources)], sort_keys=True).encode()).hexdigest()[:8]
    parts = (short, *tasks, Path(first.data.path or "").name, first.model.label, digest)
    return Design(
        name=re.sub(r"[^A-Za-z0-9._=+-]", "_", "-".join(parts)),
        title=study.title,
        arms={arm: rcp.flatten(changes) for arm, changes in study.arms.items()},
        tasks=tasks,
        seeds=seeds,
        recipes=recipes,
        sources=sources,
        analysis=study.primary.check(tasks, seeds),
    )


def check_folds(recipe: Recipe, seeds: Sequence[int], analysis: Analysis) -> None:
    """UserError where seeds of a cross-validation are no new evidence, since two are scored on the same fold."""
    folds = getattr(recipe.data, "folds", None)
    if folds and (analysis.until or len({seed % folds for seed in seeds}) < len(seeds)):
        raise UserError(
            f"With data.folds={folds} a study has {folds} seeds at most: another one is scored on a fold once more.",
            hint=f"For all folds: --seeds {','.join(map(str, range(folds)))}, without --until.",
        )


def check_seeds(design: Design, seeds: Sequence[int]) -> None:
    """UserError for seeds of several commands that are not those of one study."""
    for recipe in design.recipes.values():
        check_folds(recipe, seeds, design.analysis)
    if not design.analysis.until:
        design.analysis.check(design.tasks, seeds)


def _arm_recipe(arm: str, changes: Mapping[str, Any], base: Base, results: Path) -> Recipe:
    origins = {key: origin for key, _, origin in base.overrides}
    for key, hint in (("train.seed", "Seeds: --seeds 0,1,2."), ("init", "Weights: init, under runs in a study.")):
        if key in origins:
            raise UserError(f"{origins[key]} cannot be set in an ablation.", hint=hint)
    own = [(key, value, f"arm {arm}") for key, value in rcp.flatten(changes).items()]
    for key, _, _ in own:
        if key in SHARED:
            raise UserError(f"arm {arm}: {key} is the same for all arms of a study.")
        if key in origins:
            raise UserError(f"{origins[key]}: the arm {arm} sets {key} too; a field is an axis or the same for all.")
    recipe = rcp.resolve(base.file, [*base.overrides, *own]).recipe
    _ordered(recipe.model.disable, f"arm {arm}")
    return recipe.model_copy(update={"init": _init(arm, changes, base, recipe, results)})


def _init(arm: str, changes: Mapping[str, Any], base: Base, recipe: Recipe, results: Path) -> str:
    """Where an arm's weights come from: what the arm sets, else what all arms share; a path, or "none"."""
    if "init" in changes and base.init != "none":
        raise UserError(f"arm {arm}: init is an axis of this study and is set under runs too.")
    wanted = str(changes.get("init", "none" if base.init in TASKS else base.init))
    if wanted != "auto":
        return wanted
    if not TASKS[recipe.task].starts_from:
        return "none"
    if found := pretrained.best_pretraining(recipe, results):
        return found
    lacking, first = pretrained.explain_missing_pretraining(recipe, results)
    raise UserError(f"{lacking}.", hint=f"The arm {arm} starts from one: {first} first.")


def model_arguments(recipe: Recipe) -> dict[str, str]:
    """For a file of the user's own, which runs only if the command line names it."""
    if not recipe.model.digest:
        return {}
    return {"--model": recipe.model.name, "--set": assigned("model.digest", recipe.model.digest)}
