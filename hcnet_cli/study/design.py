"""Ablations: a study as ordinary recipes, the statistics of its runs, and the table made of them."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, ValidationError

from hcnet_cli import recipe as rcp
from hcnet_cli import runs
from hcnet_cli.console import UserError, did_you_mean, duration
from hcnet_cli.names import EMBEDDED
from hcnet_cli.recipe import Part, Recipe
from hcnet_cli.results import (
    FAMILIES,
    METRICS,
    Column,
    Row,
    Run,
    Table,
    command,
    epochs,
    is_number,
    mean_interval,
    model_name,
)
from hcnet_cli.sizes import COMPONENTS, INCLUDES

SCHEMA = 1
SIGNIFICANT = 0.05
WILCOXON_FROM = 6  # pairs: with fewer no outcome of the signed-rank test has a two-sided p under 0.05
EXACT_UP_TO = 13  # pairs: 2^13 sign patterns are counted out; beyond it scipy's own choice
METRIC_TITLES = {"top1": "top-1", "box_AP": "box AP", "mIoU": "mIoU"}
# What an arm may not change: the budget, the data and the seeds are every arm's.
SHARED = frozenset(
    {
        *("task", "protocol", "data.format", "data.path", "train.seed", "train.batch_size"),
        *("schedule.length", "schedule.unit"),
    }
)
Override = tuple[str, Any, str]  # dotted key, value, where it comes from
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._+=-]*$", max_length=60)]
Seed = Annotated[int, Field(ge=0)]


# --- the study file ---------------------------------------------------------------------------------------------------


class StudyRun(Part):
    """One training of every arm. `init`: "none", "pretrain" (the same arm's and seed's own pretraining in this study)
    or weights; `changes`: recipe fields of all arms, such as the budget.
    """

    recipe: str
    init: str = "none"
    changes: dict[str, Any] = Field(default_factory=dict)

    @property
    def data(self) -> str | None:
        """The data the study itself names, here or in the recipe."""
        if path := rcp.flatten(self.changes).get("data.path"):
            return str(path)
        return rcp.resolve(rcp.recipe_file(self.recipe)).recipe.data.path if self.recipe else None


class Study(Part):
    """Arms by name, each with the recipe fields in which it differs; the others are compared with the first.

    Without `runs` every arm is trained once, by the recipe the command line names.
    """

    title: str
    arms: dict[Name, dict[str, Any]] = Field(min_length=2)
    runs: tuple[StudyRun, ...] = ()
    seeds: tuple[Seed, ...] = Field(default=(0, 1, 2), min_length=1)


def shipped_studies() -> list[str]:
    return sorted(file.stem for file in (rcp.recipes_dir() / "ablate").glob("*.y*ml"))


def study_file(name: str) -> Path:
    """The file of a study given by path or, shipped, by name."""
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
    """(short name, study) of a shipped study or a YAML file. UserError for the first thing that is wrong."""
    file = study_file(name)
    try:
        data = rcp.parse_yaml(file.read_text(encoding="utf-8"), str(file))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"The study {file} cannot be read: {error}.") from None
    if not isinstance(data, dict):
        raise UserError(f"The study {file} is not a mapping of keys to values.")
    try:
        return file.stem, Study.model_validate(data)
    except ValidationError as error:
        raise UserError(f"{file}: {_first(error)}") from None


def _first(error: ValidationError) -> str:
    first = min(error.errors(), key=lambda one: one["type"] != "extra_forbidden")  # a misspelt key explains the rest
    key = ".".join(str(part) for part in first["loc"] if part != "[key]")
    if first["type"] == "extra_forbidden":
        known = StudyRun.model_fields if len(first["loc"]) > 1 else Study.model_fields
        return f'unknown key "{key}".{did_you_mean(str(first["loc"][-1]), known)}'
    if first["type"] == "missing":
        return f'the key "{key}" is missing.'
    if first["type"] == "string_pattern_mismatch":
        return f'"{first["input"]}" cannot be the name of an arm: use letters, digits and . _ + = -'
    if first["type"] == "too_short" and key == "arms":
        return "a study needs at least two arms, the one to compare with first."
    return f'"{key}" cannot be {first["input"]!r}: {first["msg"][0].lower()}{first["msg"][1:]}.'


def disable_study(given: Sequence[str]) -> tuple[str, Study]:
    """The full model and, for each of `given`, an arm without it: a component, several as "a+b", or "all" in turn."""
    arms: dict[str, dict[str, Any]] = {"full": {}}
    for text in given:
        for one in COMPONENTS if text == "all" else (text,):
            names = [name.strip() for name in one.split("+")]
            for name in names:
                if name not in COMPONENTS:
                    known = COMPONENTS if "+" in one else (*COMPONENTS, "all")
                    raise UserError(
                        f'--disable {text}: unknown component "{name}".{did_you_mean(name, known)}',
                        hint=f"Known: {', '.join(COMPONENTS)}; several in one arm: a+b; each by itself: all.",
                    )
            ordered = [name for name in COMPONENTS if name in names]
            _meaningful(ordered, f"--disable {text}")
            arms["no-" + "-no-".join(ordered)] = {"model.disable": ordered}
    label = "all" if set(given) == {"all"} else "-".join(arm.removeprefix("no-") for arm in list(arms)[1:])
    return f"disable-{label}", Study(title=", ".join(list(arms)[1:]), arms=arms)


def study_runs(study: Study, tasks: Sequence[str], recipe: str) -> list[tuple[str, StudyRun]]:
    """(task, run) of the study itself, or of the tasks or the recipe a command line names (default: pretrain).

    Fine-tuning starts from the arm's own pretraining if that is among the tasks, else from random weights.
    """
    if study.runs:
        if tasks or recipe:
            raise UserError("The study names its own recipes.", hint="Leave --task and --recipe out.")
        return [(rcp.resolve(rcp.recipe_file(run.recipe)).recipe.task, run) for run in study.runs]
    for task in tasks:
        if task not in EMBEDDED:
            raise UserError(
                f'--task: unknown task "{task}".{did_you_mean(task, EMBEDDED)}', hint=f"Known: {', '.join(EMBEDDED)}."
            )
    if recipe:
        if len(tasks) > 1:
            raise UserError("--recipe is for a study of one task.", hint="Name recipes under runs: in a study file.")
        file = rcp.recipe_file(recipe, *(tasks or ["pretrain"]))
        return [(rcp.resolve(file).recipe.task, StudyRun(recipe=recipe))]
    own = "pretrain" if "pretrain" in tasks else "none"
    return [(task, StudyRun(recipe="", init="none" if task == "pretrain" else own)) for task in tasks or ["pretrain"]]


def _meaningful(disable: Sequence[str], origin: str) -> None:
    for name, inner in INCLUDES.items():
        gone = [other for other in inner if other in disable]
        if name in disable and gone:
            raise UserError(f"{origin}: without {name} there is no {' or '.join(gone)} to disable; name {name} alone.")


def parse_seeds(text: str) -> tuple[int, ...]:
    """`0,1,2` -> (0, 1, 2)."""
    parts = [part.strip() for part in text.split(",")]
    if not all(re.fullmatch(r"\d{1,9}", part) for part in parts):
        raise UserError(f'--seeds "{text}" is not a list of whole numbers.', hint="For example: --seeds 0,1,2")
    seeds = tuple(int(part) for part in parts)
    if len(set(seeds)) < len(seeds):
        raise UserError(f'--seeds "{text}" names a seed twice; a repeated seed is no new evidence.')
    return seeds


# --- from a study to recipes ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Base:
    """What all arms of one training share: a recipe file, overrides, and where weights come from ("pretrain": the
    arm's own).
    """

    file: Path
    overrides: tuple[Override, ...]
    init: str = "none"


@dataclass(frozen=True)
class Plan:
    """A study made concrete: `recipes` by (arm, task), complete but for the seed and the weights of the arm's own
    pretraining. `arms` holds what each sets (dotted keys); the first is the one to compare with.
    """

    name: str
    title: str
    arms: Mapping[str, Mapping[str, Any]]
    tasks: tuple[str, ...]
    seeds: tuple[int, ...]
    recipes: Mapping[tuple[str, str], Recipe]
    from_pretrain: frozenset[str]  # tasks

    def recipe(self, arm: str, task: str, seed: int, init: str = "") -> Recipe:
        """The whole recipe of a cell; `init` is the run of its own pretraining, for tasks that start from it."""
        base = self.recipes[arm, task]
        train = base.train.model_copy(update={"seed": seed})
        return base.model_copy(update={"train": train, **({"init": init} if task in self.from_pretrain else {})})


def plan(
    short: str, study: Study, bases: Sequence[Base], seeds: Sequence[int] = (), results: Path = Path("results")
) -> Plan:
    """The recipes of every arm. UserError for an arm that names an unknown field, changes what all arms share, has no
    meaning or is the same as another. `init: auto` becomes the best pretrain run under `results`.
    """
    recipes: dict[tuple[str, str], Recipe] = {}
    tasks: list[str] = []
    for base in bases:
        common = {key: source for key, _, source in base.overrides}
        for key, value in (("train.seed", "Seeds: --seeds 0,1,2"), ("init", "Weights: init, under runs in a study")):
            if key in common:
                raise UserError(f"{common[key]} has no place in an ablation.", hint=f"{value}.")
        for arm, changes in study.arms.items():
            own = [(key, value, f"arm {arm}") for key, value in rcp.flatten(changes).items()]
            for key, _, _ in own:
                if key in SHARED:
                    raise UserError(f"arm {arm}: {key} is the same for all arms of a study.")
                if key in common:
                    raise UserError(
                        f"{common[key]}: the arm {arm} sets {key} too; a field is an axis or the same for all."
                    )
            recipe = rcp.resolve(base.file, [*base.overrides, *own]).recipe
            recipe = recipe.model_copy(update={"init": _init(arm, changes, base, recipe, results)})
            _meaningful(recipe.model.disable, f"arm {arm}")
            same = next((a for (a, t), other in recipes.items() if t == recipe.task and other == recipe), None)
            if same is not None:
                raise UserError(f"The arms {same} and {arm} are the same recipe for {recipe.task}.")
            if (arm, recipe.task) in recipes:
                raise UserError(f"{recipe.task} stands twice in this study.", hint="A study runs each task once.")
            recipes[arm, recipe.task] = recipe
        tasks.append(recipe.task)
    from_pretrain = {task for base, task in zip(bases, tasks, strict=True) if base.init == "pretrain"}
    if "pretrain" in from_pretrain or (from_pretrain and "pretrain" not in tasks):
        raise UserError(
            f"{', '.join(sorted(from_pretrain))} starts from this study's pretraining, but there is none in it.",
            hint="Put a pretrain recipe before it, or name weights or none as its init.",
        )
    tasks.sort(key=list(EMBEDDED).index)  # pretraining first
    first = recipes[next(iter(study.arms)), tasks[0]]
    keys = {f"{arm} {task}": run_key(recipe) for (arm, task), recipe in recipes.items()}
    digest = hashlib.sha256(json.dumps([keys, sorted(from_pretrain)], sort_keys=True).encode()).hexdigest()[:8]
    place = Path(first.data.path or "").name
    name = re.sub(r"[^A-Za-z0-9._=+-]", "_", "-".join((short, *tasks, place, first.model.size, digest)))
    return Plan(
        name=name,
        title=study.title,
        arms={arm: rcp.flatten(changes) for arm, changes in study.arms.items()},
        tasks=tuple(tasks),
        seeds=tuple(seeds) or study.seeds,
        recipes=recipes,
        from_pretrain=frozenset(from_pretrain),
    )


def _init(arm: str, changes: Mapping[str, Any], base: Base, recipe: Recipe, results: Path) -> str:
    """Where an arm's weights come from: what the arm sets, else what all arms share; a path, or "none"."""
    wanted = str(changes.get("init", "none" if base.init == "pretrain" else base.init))
    if "init" in changes and base.init != "none":
        raise UserError(f"arm {arm}: init is an axis of this study and stands under runs too.")
    if wanted != "auto":
        return wanted
    if found := runs.best_pretraining(recipe, results):
        return found
    lacking, first = runs.explain_missing_pretraining(recipe, results)
    raise UserError(f"{lacking}.", hint=f"The arm {arm} starts from one: {first} first.")


# --- finding the runs of cells ----------------------------------------------------------------------------------------


def run_key(recipe: Recipe) -> str:
    """What two recipes share if they are the same run: all that can change a number. Precision is apart (see find)."""
    kept = {key: value for key, value in rcp.identity(recipe).items() if key != "train.precision"}
    kept["data.path"] = str(Path(recipe.data.path or "").resolve())
    kept["init"] = recipe.init if recipe.init == "none" else str(Path(recipe.init).resolve())
    return json.dumps(kept, sort_keys=True)


Found = tuple[Sequence[tuple[Path, runs.RunInfo]], Sequence[tuple[Path, str]]]  # what runs.find_runs gives


def find(recipe: Recipe, found: Found) -> Path | None:
    """The folder of the run of this very recipe, whoever asked for it: the finished one, else the latest; one whose
    record is broken only where there is no other. A recipe of precision "auto" takes what its run took.
    """

    def same(folder: Path) -> bool:
        try:
            theirs = rcp.resolve(folder / "recipe.yaml").recipe
        except UserError:
            return False
        precisions = (theirs.train.precision, "auto")
        return recipe.train.precision in precisions and run_key(theirs) == run_key(recipe)

    about = (recipe.task, recipe.model.size, rcp.variant(recipe), recipe.train.seed)
    good, broken = found
    candidates = [
        (Run(folder, info).finished, info.started, folder)
        for folder, info in good
        if about == (info.task, info.size, info.variant, info.seed) and not info.evaluated_only and same(folder)
    ]
    if candidates:
        return max(candidates)[-1]
    return next((folder for folder, _ in broken if same(folder)), None)


# --- the record of a study --------------------------------------------------------------------------------------------


class Cell(BaseModel):
    """One run of a study: an arm, a task, a seed. `run` is its folder's name under runs/."""

    arm: str
    task: str
    seed: int
    state: Literal["waiting", "running", "finished", "failed", "interrupted"] = "waiting"
    run: str = ""
    log: str = ""  # relative to the results folder
    jobs: int = 1  # runs that shared the machine with it, itself included
    error: str = ""


class StudyRecord(BaseModel):
    """studies/<name>.json: what was asked for and which runs answer it. The numbers stay in the runs."""

    schema_version: int = SCHEMA
    name: str
    title: str
    argv: list[str] = []
    arms: dict[str, dict[str, Any]]  # what each sets; the first is the one to compare with
    tasks: list[str]
    seeds: list[int]
    cells: list[Cell]


def read_studies(results: Path) -> tuple[list[StudyRecord], list[str]]:
    """The studies of a results folder; and why those that cannot be read cannot."""
    records, broken = [], []
    for file in sorted((results / "studies").glob("*.json")):
        try:
            record = StudyRecord.model_validate_json(file.read_text(encoding="utf-8"))
            assert record.schema_version == SCHEMA
            records.append(record)
        except (OSError, ValueError, AssertionError) as error:
            broken.append(f"{file} cannot be read: {str(error).splitlines()[0] if str(error) else 'unknown version'}")
    return records, broken


# --- statistics -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Comparison:
    """Arm minus reference over the seeds both have. None: `n` or the spread does not allow it.

    low, high: 95 % interval (t). p: two-sided paired t-test. p_wilcoxon: signed ranks, exact, zeros left out. effect:
    Hedges' g_z, the mean difference in standard deviations of the differences, corrected for small n.
    """

    n: int
    difference: float
    low: float | None = None
    high: float | None = None
    p: float | None = None
    p_wilcoxon: float | None = None
    effect: float | None = None


def compare(arm: Mapping[int, float], reference: Mapping[int, float]) -> Comparison | None:
    """Paired by seed; None without a common seed.

    Where every seed gives the same difference there is nothing to estimate an error from: no interval, no p.
    """
    seeds = sorted(arm.keys() & reference.keys())
    if not seeds:
        return None
    ours, theirs = [arm[seed] for seed in seeds], [reference[seed] for seed in seeds]
    differences = [a - b for a, b in zip(ours, theirs, strict=True)]
    n = len(seeds)
    mean, half = mean_interval(differences)
    spread = max(differences) - min(differences)
    if half is None or spread <= 1e-9 * max(1.0, *map(abs, (*ours, *theirs))):  # equal but for rounding
        return Comparison(n, mean)
    from scipy import special, stats

    deviation = math.sqrt(math.fsum((d - mean) ** 2 for d in differences) / (n - 1))
    correction = math.exp(special.gammaln((n - 1) / 2) - special.gammaln((n - 2) / 2)) if n > 2 else None
    return Comparison(
        n=n,
        difference=mean,
        low=mean - half,
        high=mean + half,
        p=float(stats.ttest_rel(ours, theirs).pvalue),
        p_wilcoxon=_wilcoxon(differences),
        effect=None if correction is None else mean / deviation * correction / math.sqrt((n - 1) / 2),
    )


def _wilcoxon(differences: Sequence[float]) -> float | None:
    """Two-sided p of the signed-rank test; ties share ranks, and up to EXACT_UP_TO pairs all signs are counted out."""
    import numpy as np
    from scipy import stats

    d = np.round([x for x in differences if abs(x) > 1e-9], 9)  # equal differences are ties, whatever their last bits
    if len(d) < WILCOXON_FROM:
        return None
    if len(d) > EXACT_UP_TO:
        return float(stats.wilcoxon(d).pvalue)

    def statistic(x: Any, axis: int = -1) -> Any:
        return (np.sign(x) * stats.rankdata(np.abs(x), axis=axis)).sum(axis=axis)

    return float(stats.permutation_test((d,), statistic, permutation_type="samples", n_resamples=np.inf).pvalue)


def holm(ps: Sequence[float | None]) -> list[float | None]:
    """Holm's step-down correction over those that are there."""
    order = sorted((p, i) for i, p in enumerate(ps) if p is not None)
    corrected: list[float | None] = [None] * len(ps)
    highest = 0.0
    for rank, (p, i) in enumerate(order):
        highest = max(highest, min(1.0, (len(order) - rank) * p))
        corrected[i] = highest
    return corrected


# --- which runs count -------------------------------------------------------------------------------------------------


def aspects(info: runs.RunInfo) -> dict[str, str]:
    """What runs must share to be compared, by name, as people read it."""
    data = info.data
    return {
        "data": f"{data.name} {data.digest[:12]} {data.split}",
        "budget": f"{info.steps_total} steps of {info.batch_size}",
        "precision": info.precision,
        "evaluation": "; ".join(f"{name}: {text}" for name, text in sorted(info.metric_notes.items())) or "plain",
        "code version": (info.git_commit[:12] or "unknown") + (" with changes" if info.git_dirty else ""),
    }


Counted = dict[str, dict[int, Run]]  # arm -> seed -> run


def count(record: StudyRecord, task: str, found: Mapping[str, Run | str]) -> tuple[Counted, list[str]]:
    """The finished cells of a task that are alike, and a line for each cell that is left out, with the reason.

    `found`: by folder name the run, or why its record cannot be read. Where runs differ in what all should share, the
    larger number counts (the first arm's, of two equal). A seed counts in an arm if the first arm has it too.
    """
    first = next(iter(record.arms))
    metric = METRICS[FAMILIES[task]][0]
    cells = [cell for cell in record.cells if cell.task == task]
    reasons: dict[tuple[str, int], str] = {}
    finished: dict[tuple[str, int], Run] = {}
    for cell in cells:
        run = found.get(cell.run)
        key = (cell.arm, cell.seed)
        if isinstance(run, Run) and run.finished and is_number(run.info.metrics.get(metric)):
            if run.info.seed == cell.seed:
                finished[key] = run
            else:
                reasons[key] = f"its run has seed {run.info.seed}"
        elif isinstance(run, Run) and run.finished:
            reasons[key] = f"its record has no {metric}"
        elif isinstance(run, Run):
            state = "running" if run.info.status == "running" else "unfinished"
            reasons[key] = f"{state} at {run.info.steps_done} of {run.info.steps_total} steps"
        elif isinstance(run, str):
            reasons[key] = f"its record cannot be read ({run})"
        else:
            reasons[key] = "its run is gone" if cell.run else "started" if cell.state == "running" else "not run"
        if key in reasons and cell.state == "failed":
            log = f" (log: {cell.log})" if cell.log else ""
            reasons[key] += f"; failed: {cell.error.rstrip('.') or 'no message'}{log}"
    for aspect in aspects(next(iter(finished.values())).info) if finished else ():
        values = {key: aspects(run.info)[aspect] for key, run in finished.items()}
        votes = Counter(values.values())
        mine = Counter(value for (arm, _), value in values.items() if arm == first)
        usual = max(votes, key=lambda value: (votes[value], mine[value], value))
        for key, value in values.items():
            if value != usual:
                reasons.setdefault(key, f"unlike the others in {aspect}: {value} instead of {usual}")
    alike = {key: run for key, run in finished.items() if key not in reasons}
    for arm, seed in alike:
        if (first, seed) not in alike:
            reasons[arm, seed] = f"{first} has no run of this seed to compare it with"
    counted: Counted = {arm: {} for arm in record.arms}
    for (arm, seed), run in sorted(alike.items(), key=lambda item: item[0][1]):
        if (arm, seed) not in reasons:
            counted[arm][seed] = run
    names = {(cell.arm, cell.seed): cell.run for cell in cells}
    several = f" ({task})" if len(record.tasks) > 1 else ""
    lines = []
    for cell in cells:
        key = (cell.arm, cell.seed)
        if key in reasons:
            which = f" [{names[key]}]" if names[key] else ""
            lines.append(f"Not counted: {cell.arm}, seed {cell.seed}{several}: {reasons[key]}{which}.")
    return counted, lines


# --- the table --------------------------------------------------------------------------------------------------------


def tables(results: Iterable[Path]) -> tuple[list[Table], list[str]]:
    """The table of every study under the results folders; and the studies that cannot be read."""
    made: dict[str, Table] = {}
    broken: list[str] = []
    for folder in results:
        records, unreadable = read_studies(folder)
        broken += unreadable
        if records:
            found = by_name(folder)
            for record in records:
                made.setdefault(record.name, table(record, found))
    return list(made.values()), broken


def by_name(results: Path) -> dict[str, Run | str]:
    """The runs of a results folder by folder name; a text says why a record cannot be read."""
    good, bad = runs.find_runs(results)
    return {**{path.name: Run(path, info) for path, info in good}, **{path.name: reason for path, reason in bad}}


def table(record: StudyRecord, found: Mapping[str, Run | str]) -> Table:
    """Variant, cost, and for each task the metric with its interval, the paired difference and its corrected p."""
    several = len(record.tasks) > 1
    values: dict[str, dict[str, Any]] = {arm: {"model": arm, "variant": arm} for arm in record.arms}
    members: dict[str, list[Path]] = {arm: [] for arm in record.arms}
    forest: list[tuple[str, float, float, float]] = []
    left_out: list[str] = []
    verdicts: list[str] = []
    every: list[Run] = []
    wilcoxon: set[str] = set()
    for number, task in enumerate(record.tasks):
        metric = METRICS[FAMILIES[task]][0]
        counted, lines = count(record, task, found)
        left_out += lines
        every += [run for of_arm in counted.values() for run in of_arm.values()]
        if number == 0:
            _costs(counted, values)
        compared = _compare_arms(metric, counted, values)
        for arm, of_arm in counted.items():
            members[arm] += [run.folder for run in of_arm.values()]
        title = METRIC_TITLES[metric]
        wilcoxon |= {metric} if any(c is not None and c.p_wilcoxon is not None for c in compared.values()) else set()
        for arm, c in compared.items():
            if c is not None and c.low is not None and c.high is not None:
                forest.append((f"{arm}{f', {title}' if several else ''}", c.difference, c.low, c.high))
        verdicts += _verdicts(next(iter(record.arms)), title, compared, values, f"{metric}_p")
    for arm, row in values.items():
        _provenance(row, [run for run in every if run.folder in members[arm]], record)
    rows = [Row("measured" if members[arm] else "unfinished", values[arm], tuple(members[arm])) for arm in record.arms]
    rows.sort(key=lambda row: row.kind == "unfinished")  # stable: renderers group by kind
    notes = [*verdicts, *left_out, *_notes(record, every, values)]
    return Table("ablation", _title(record, every), _columns(record.tasks, wilcoxon), rows, notes, forest)


def _columns(tasks: Sequence[str], wilcoxon: set[str]) -> list[Column]:
    """Of one task: cost, metric, difference. Of several: the metrics side by side first, what is behind them after."""
    cost = [
        Column("params_m", "#params (M)", "number", secondary=True),
        Column("macs_g", "MACs (G)", "number", secondary=True),
        Column("images_per_second", "images/s", "short", secondary=True),
    ]
    metrics = [METRICS[FAMILIES[task]][0] for task in tasks]
    several = len(tasks) > 1

    def each(suffix: str, title: str, style: Any, secondary: bool = several) -> list[Column]:
        of = (lambda m: f"{title} {METRIC_TITLES[m]}") if several else (lambda m: title)
        return [Column(f"{m}{suffix}", of(m), style, secondary=secondary) for m in metrics]

    shown = [Column(m, METRIC_TITLES[m], "percent") for m in metrics]
    number, interval = each("_n", "n", "integer"), each("_interval", "95% interval", "text")
    difference, p = each("_difference", "diff." if several else "difference", "difference"), each("_p", "p (Holm)", "p")
    effect = each("_effect", "effect size", "number", secondary=True)
    ranks = [c for c in each("_p_wilcoxon", "p (Wilcoxon)", "p", secondary=True) if c.key.split("_p_")[0] in wilcoxon]
    head, tail = Column("model", "variant"), Column("source", "source", secondary=True)
    if several:
        return [head, *shown, *difference, *p, *cost, *number, *interval, *effect, *ranks, tail]
    return [head, *cost, *shown, *number, *difference, *interval, *p, *effect, *ranks, tail]


def _title(record: StudyRecord, every: Sequence[Run]) -> str:
    if not every:
        return f"Ablation: {record.title}"
    names = dict.fromkeys(f"{run.info.data.name} {run.info.data.split}" for run in every)
    sizes = dict.fromkeys(model_name(run.info.model_copy(update={"variant": ""})) for run in every)
    return f"Ablation: {record.title}, {', '.join(sizes)} on {', '.join(names)}"


def _costs(counted: Counted, values: dict[str, dict[str, Any]]) -> None:
    """Parameters, MACs and the median images/s of each arm; speeds only where all were measured alike."""
    all_runs = [run.info for of_arm in counted.values() for run in of_arm.values()]
    timed = [i for i in all_runs if i.images_per_second is not None]
    alike = len({(i.machine, i.device, i.speed_notes) for i in timed}) == 1
    for arm, of_arm in counted.items():
        infos = [run.info for run in of_arm.values()]
        if not infos:
            continue
        speeds = sorted(i.images_per_second for i in infos if i.images_per_second is not None)
        middle = speeds[(len(speeds) - 1) // 2 : len(speeds) // 2 + 1]
        values[arm] |= {
            "params_m": None if infos[0].params is None else infos[0].params / 1e6,
            "macs_g": None if infos[0].macs is None else infos[0].macs / 1e9,
            "macs_input": infos[0].macs_input,
            "images_per_second": sum(middle) / len(middle) if alike and middle else None,
            "speed_notes": infos[0].speed_notes if alike else "",
        }


def _compare_arms(metric: str, counted: Counted, values: dict[str, dict[str, Any]]) -> dict[str, Comparison | None]:
    """Fills in the figures of one metric; returns the comparisons of all arms but the first."""
    scores = {arm: {s: run.info.metrics[metric] for s, run in of_arm.items()} for arm, of_arm in counted.items()}
    first, *others = counted
    compared = {arm: compare(scores[arm], scores[first]) for arm in others}
    corrected = dict(zip(others, holm([None if c is None else c.p for c in compared.values()]), strict=True))
    for arm, by_seed in scores.items():
        row = values[arm]
        if by_seed:
            row[metric], row[f"{metric}_ci"] = mean_interval(list(by_seed.values()))
        row[f"{metric}_n"] = len(by_seed)
        row[f"{metric}_by_seed"] = ", ".join(f"{seed}: {value:.4f}" for seed, value in by_seed.items())
        c = compared.get(arm)
        if c is None:
            continue
        row |= {
            f"{metric}_difference": c.difference,
            f"{metric}_low": c.low,
            f"{metric}_high": c.high,
            f"{metric}_interval": "" if c.low is None else f"[{c.low:+.2f}, {c.high:+.2f}]".replace("-", "−"),
            f"{metric}_p": corrected[arm],
            f"{metric}_p_uncorrected": c.p,
            f"{metric}_p_wilcoxon": c.p_wilcoxon,
            f"{metric}_effect": c.effect,
        }
    return compared


def _verdicts(
    first: str, title: str, compared: Mapping[str, Comparison | None], values: Mapping[str, Mapping[str, Any]], p: str
) -> list[str]:
    """What the numbers do and do not show, in words."""
    there = {arm: c for arm, c in compared.items() if c is not None}
    lines = []
    single = [arm for arm, c in there.items() if c.n == 1]
    same = [arm for arm, c in there.items() if c.n > 1 and c.p is None]
    tested = [arm for arm, c in there.items() if c.p is not None]
    sure = [arm for arm in tested if values[arm][p] < SIGNIFICANT]
    if sure:
        lines.append(f"{title}: differs from {first} (corrected p < {SIGNIFICANT}): {', '.join(sure)}.")
    if unsure := [arm for arm in tested if arm not in sure]:
        lines.append(
            f"{title}: no difference from {first} is shown for {', '.join(unsure)}; differences inside the intervals "
            "remain possible."
        )
    if same:
        lines.append(
            f"{title}: every seed gives the same difference for {', '.join(same)}: there is no spread to judge it by, "
            "so no interval and no p."
        )
    if single:
        lines.append(
            f"{title}: one seed for {', '.join(single)}: these are numbers, not findings. Nothing can be said about "
            "a difference without repeated runs (--seeds 0,1,2)."
        )
    return lines


def _provenance(row: dict[str, Any], of_arm: Sequence[Run], record: StudyRecord) -> None:
    """What the renderers tell of a row besides its figures (results.COLUMNS)."""
    infos = [run.info for run in of_arm]

    def joined(texts: Iterable[str]) -> str:
        return ", ".join(dict.fromkeys(text for text in texts if text))

    row |= {
        "seeds": joined(str(i.seed) for i in infos),
        "study": record.name,
        "source": "measured",
        "runs": ", ".join(run.name for run in of_arm),
        "command": _command(record),
        "data": joined(i.data.name for i in infos),
        "data_digest": joined(i.data.digest for i in infos),
        "commit": joined(aspects(i)["code version"] for i in infos),
        "machine": joined(i.machine for i in infos),
        "device": joined(i.device for i in infos),
        "precision": joined(i.precision for i in infos),
        "finished": max((i.finished for i in infos), default=""),
    }


def _command(record: StudyRecord) -> str:
    """As a person would type it; seeds and arms stand in the record, so it is the whole study."""
    plain = runs.RunInfo.model_construct(argv=record.argv)
    return command(plain)


def _notes(record: StudyRecord, every: Sequence[Run], values: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """How the figures were made: the method, the budget, the conventions, the command."""
    infos = [run.info for run in every]
    first, *others = record.arms
    notes = []
    repeated = any(is_number(row.get(key)) for row in values.values() for key in row if key.endswith("_ci"))
    if repeated:
        corrected = f"Holm-corrected over {len(others)} arms" if len(others) > 1 else "of one arm: nothing to correct"
        notes.append(
            f"Differences are arm minus {first}, paired by seed. ±: half of the 95 % t-interval over n seeds. p: "
            f"paired t-test, two-sided, {corrected}. Effect size: Hedges' "
            "g_z (mean difference over the standard deviation of the differences, corrected for small n)."
        )
        most = max((row.get(key) or 0 for row in values.values() for key in row if key.endswith("_n")), default=0)
        if most < WILCOXON_FROM:
            notes.append(
                f"No Wilcoxon test: with fewer than {WILCOXON_FROM} seeds no outcome of it has p < {SIGNIFICANT}."
            )
        elif any(is_number(row.get(key)) for row in values.values() for key in row if key.endswith("_wilcoxon")):
            notes.append(
                "p (Wilcoxon): signed ranks, two-sided, without correction; seeds without a difference left out."
            )
    if infos:
        budgets = dict.fromkeys(
            f"{i.task} {i.steps_total} steps of {i.batch_size} images"
            + (f" ({passes:g} epochs)" if (passes := epochs(i)) else "")
            for i in infos
        )
        notes.append(f"Every run: {'; '.join(budgets)}; the best of its evaluations on the validation data.")
        changes = [f"{arm}: {_said(changed)}" for arm, changed in record.arms.items() if changed]
        notes.append(f"{'; '.join(changes)}.")
        inputs = ", ".join(dict.fromkeys(i.macs_input for i in infos if i.task == record.tasks[0] and i.macs_input))
        notes.append(
            "MACs: multiply-adds of convolutions, linear layers and matrix products"
            f"{f', at {inputs}' if inputs else ''}; norms, pooling and element-wise work are not counted."
        )
        speeds = dict.fromkeys(str(row["speed_notes"]) for row in values.values() if row.get("speed_notes"))
        if speeds:
            most_jobs = max(cell.jobs for cell in record.cells)
            beside = f", while up to {most_jobs} runs shared the machine" if most_jobs > 1 else ""
            notes.append(f"images/s: median of the runs; {'; '.join(speeds)}{beside}.")
        if any(i.git_dirty for i in infos):
            notes.append("The code had uncommitted changes; it is taken to have been the same for runs of one commit.")
        seconds = sum(i.train_seconds for i in infos)
        machines = ", ".join(dict.fromkeys(i.machine for i in infos if i.machine))
        notes.append(
            f"{len(infos)} runs, {duration(seconds)} of training in all"
            f"{f' on {machines}' if machines else ''}: {_command(record) or record.name}"
        )
    return notes


def _said(changes: Mapping[str, Any]) -> str:
    def plain(value: Any) -> str:
        return f"[{', '.join(map(plain, value))}]" if isinstance(value, list | tuple) else str(value)

    return ", ".join(f"{key}={plain(value)}" for key, value in rcp.flatten(changes).items())
