"""The record of a study, and the search for the run that answers a cell. The numbers stay in the runs."""

from __future__ import annotations

import contextlib
import functools
import json
import os
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ValidationError, model_validator

from hcnet_cli import cache
from hcnet_cli import recipe as rcp
from hcnet_cli.console import UserError, warn
from hcnet_cli.files import writing
from hcnet_cli.finished import data_root, data_section
from hcnet_cli.grouping import Run
from hcnet_cli.header import tensors_digest
from hcnet_cli.locks import Lock
from hcnet_cli.plain_json import read_json
from hcnet_cli.pretrained import weights_file
from hcnet_cli.recipe import Recipe
from hcnet_cli.runs import RunFolder, RunInfo, run_fingerprint
from hcnet_cli.study.analysis import Analysis, Fixed, Points
from hcnet_cli.tasks import TASKS

SCHEMA = 1
Found = tuple[Sequence[tuple[Path, RunInfo]], Sequence[tuple[Path, str]]]  # what runs.find_runs returns


class Cell(BaseModel):
    """One run of a study: an arm, a task, a seed. `run` is the name of its folder under runs/."""

    arm: str
    task: str
    seed: int
    state: Literal["waiting", "running", "finished", "failed", "interrupted"] = "waiting"
    run: str = ""
    fingerprint: str = ""  # of that run when the study took it
    log: str = ""  # relative to the results folder
    jobs: int = 1  # runs that shared the machine, this one included
    error: str = ""


class StudyRecord(BaseModel):
    """studies/<name>.json: what was asked for, and the run of each cell."""

    schema_version: int = SCHEMA
    name: str
    title: str
    argv: list[str] = []
    arms: dict[str, dict[str, Any]]  # the fields that each sets; the first is the baseline
    tasks: list[str]
    seeds: list[int]
    asked: list[int] = []  # every seed that was ever asked for, those without a result too
    cells: list[Cell]
    primary: Fixed | None = None  # None: a record of version 0.1
    detect: Points | None = None  # the difference that matters to the user

    @model_validator(mode="after")
    def _check(self) -> StudyRecord:
        if not (self.arms and self.tasks):
            raise ValueError("it has no arms or no tasks")
        if unknown := [task for task in self.tasks if task not in TASKS]:
            raise ValueError(f"unknown task {unknown[0]}")
        if foreign := [cell for cell in self.cells if cell.arm not in self.arms or cell.task not in self.tasks]:
            raise ValueError(f"a cell of {foreign[0].arm}, {foreign[0].task} belongs to none of its arms and tasks")
        if self.primary and self.primary.analysis.metric not in [TASKS[task].primary.key for task in self.tasks]:
            raise ValueError(f"its primary metric {self.primary.analysis.metric!r:.40} is none of its tasks'")
        return self

    @property
    def ever_asked(self) -> list[int]:
        """Every seed that was asked for; as far as known, in records of before."""
        return list(dict.fromkeys([*self.asked, *(self.primary.seeds if self.primary else ()), *self.seeds]))

    def seeds_beside(self, asked: Collection[int]) -> list[int]:
        """The seeds of this study so far that are not asked for now; none where `until` decides on the seeds."""
        return [] if self.analysis.until else [seed for seed in self.ever_asked if seed not in asked]

    def drop(self, seeds: Collection[int]) -> None:
        self.seeds = [seed for seed in self.seeds if seed not in seeds]
        self.cells = [cell for cell in self.cells if cell.seed not in seeds]

    def stem(self, cell: Cell) -> str:
        """The name of a cell's files in the study's folder, without the ending."""
        return f"{self.recipe_stem(cell.arm, cell.task)}-s{cell.seed}"

    def recipe_stem(self, arm: str, task: str) -> str:
        return f"{arm}-{task}" if len(self.tasks) > 1 else arm

    @property
    def baseline(self) -> str:
        return next(iter(self.arms))

    @property
    def analysis(self) -> Analysis:
        return self.primary.analysis if self.primary else Analysis().check(self.tasks, self.seeds)

    @property
    def first_stage(self) -> tuple[int, ...] | None:
        """The seeds of the first stage of `until`; None for a study with a fixed number of seeds."""
        return self.primary.seeds if self.primary and self.primary.analysis.until else None


def read_study(file: Path) -> StudyRecord:
    """The record of a study, or a UserError saying why it cannot be read."""
    data = read_json(file)
    version = data.get("schema_version", SCHEMA) if isinstance(data, dict) else None
    if version != SCHEMA:
        raise UserError(f"{file} is of version {str(version)[:20]}; this program reads version {SCHEMA}.")
    try:
        record = StudyRecord.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        reason = first["msg"].removeprefix("Value error, ")
        raise UserError(f"{file}: {f'{place}: ' if place else ''}{reason}.") from None
    for cell in record.cells:
        cell.run = cell.run or linked_run(file.with_suffix("") / record.stem(cell))
    return record


@contextlib.contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Refuses a second command at the same study, which would start the same runs."""
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        lock = Lock(folder)
        if not lock.acquire():
            raise UserError(
                f"Another process is working at this study ({folder}): {lock.owner() or 'unknown'}.",
                hint="Wait for it, or stop it.",
            )
    try:
        yield
    finally:
        lock.release()


def read_earlier(file: Path) -> StudyRecord | None:
    """The record that a study has so far, where it has one that can be read."""
    if file.exists():
        try:
            return read_study(file)
        except UserError as error:
            warn(f"{error} The study's record is made again from its runs.")
    return None


def linked_run(stem: Path) -> str:
    """The name of the run that a cell on Slurm trains, from the link that the run has made; "" before that."""
    link = stem.with_name(f"{stem.name}.run")
    return Path(os.readlink(link)).name if link.is_symlink() else ""


def read_studies(results: Path) -> tuple[list[StudyRecord], list[str]]:
    """The studies of a results folder, and a sentence for each one that cannot be read."""
    records, broken = [], []
    for file in sorted((results / "studies").glob("*.json")):
        try:
            records.append(read_study(file))
        except UserError as error:
            broken.append(str(error))
    return records, broken


def run_key(recipe: Recipe) -> str:
    """Equal for two recipes that are the same run. Precision is compared separately, see find_run."""
    kept = {key: value for key, value in rcp.identity(recipe).items() if key != "train.precision"}
    kept["data.path"] = os.path.realpath(os.path.expanduser(recipe.data.path or ""))
    kept["init"] = recipe.init if recipe.init == "none" else os.path.realpath(os.path.expanduser(recipe.init))
    return json.dumps(kept, sort_keys=True)


def same_recipe(folder: Path, recipe: Recipe) -> bool:
    """Whether the run in a folder has this recipe, wherever data and weights to start from lie."""
    try:
        other = rcp.resolve(folder / "recipe.yaml").recipe
    except UserError:
        return False
    kept = [{key: value for key, value in rcp.identity(one).items() if key != "train.precision"}
            for one in (recipe, other)]  # fmt: skip
    return kept[0] == kept[1] and recipe.train.precision in (other.train.precision, "auto")


def likeness(recipe: Recipe) -> tuple[str, str, int]:
    """What a record says of a run's recipe: the task, the variant and the seed."""
    return recipe.task, rcp.variant(recipe), recipe.train.seed


def allowing(recipe: Recipe) -> Callable[[RunInfo], bool]:
    """Tells from the record of a run whether it may have this recipe, before its recipe is read, which takes longer:
    its fingerprint is that of the recipe on the run's own data and initial weights. Old records allow everything.
    """
    train = recipe.train

    @functools.cache
    def expected(precision: str, data: str, init: str) -> str:
        taken = train if train.precision != "auto" else train.model_copy(update={"precision": precision})
        return run_fingerprint(recipe.model_copy(update={"train": taken}), data, init)

    def allows(info: RunInfo) -> bool:
        init = str(info.init.get("digest") or "")
        return not info.config or expected(info.precision, info.data.digest, init) == info.fingerprint

    return allows


class Today:
    """Data and weights to start from as they are now, each looked at once. A run on others answers no cell.

    `changed`: the runs that were passed over, by what is no longer what they saw.
    """

    def __init__(self, read_data: Callable[[Recipe], str]) -> None:
        self.read_data = read_data  # for what this machine did not read before, or what changed since
        self.digests: dict[str, str] = {}
        self.changed: dict[str, set[str]] = {}

    def allows(self, recipe: Recipe, folder: Path, info: RunInfo) -> bool:
        """Whether a run that was asked for like the recipe saw what the recipe would see now. Old records allow all."""
        if not info.config:
            return True
        init = self._init(recipe)
        what = ""
        if info.data.digest != self._data(recipe):
            what = f"the data {recipe.data.path}"
        elif init is not None and init != str(info.init.get("digest") or ""):
            what = f"the weights {recipe.init}"
        if what:
            self.changed.setdefault(what, set()).add(folder.name)
        return not what

    def _data(self, recipe: Recipe) -> str:
        key = json.dumps([str(data_root(recipe)), data_section(recipe)], sort_keys=True)
        if key not in self.digests:
            known = cache.known_data(data_root(recipe), data_section(recipe))
            self.digests[key] = known.digest if known else self.read_data(recipe)
        return self.digests[key]

    def _init(self, recipe: Recipe) -> str | None:
        """None where the weights cannot be looked at. A run's record says those of a run."""
        if recipe.init == "none":
            return ""
        try:
            folder = RunFolder(Path(os.path.expanduser(recipe.init)))
            if folder.path.is_dir() and (info := folder.read()) and info.weights:
                return info.weights
            file = weights_file(recipe.init)
            key = f"{file} {file.stat().st_mtime_ns}"
            if key not in self.digests:
                self.digests[key] = tensors_digest(file)
        except (UserError, ValueError, OSError):  # of an old format, or gone, which whoever needs them will say
            return None
        return self.digests[key]


def find_run(recipe: Recipe, found: Found, today: Today) -> Path | None:
    """The folder of the run with this recipe, whatever command started it: the finished one, else the latest.

    A folder with a broken record is found only if there is no other. Precision "auto" matches any precision.
    """
    quick, allows = likeness(recipe), allowing(recipe)
    good, broken = found
    alike = [
        (folder, info)
        for folder, info in good
        if quick == (info.task, info.variant, info.seed) and not info.evaluated_only and allows(info)
    ]
    if not alike and not broken:
        return None
    key = run_key(recipe)

    def same(folder: Path) -> bool:
        try:
            other = rcp.resolve(folder / "recipe.yaml").recipe
        except UserError:
            return False
        return recipe.train.precision in (other.train.precision, "auto") and run_key(other) == key

    candidates = [
        (Run(folder, info).finished, info.started, folder)
        for folder, info in alike
        if same(folder) and today.allows(recipe, folder, info)
    ]
    if candidates:
        return max(candidates)[-1]
    return next((folder for folder, _ in broken if same(folder)), None)


class RunSearch:
    """Finds the runs of the cells of a study, which are many: a run's recipe is read only where its record leaves a
    doubt.
    """

    def __init__(self, found: Found, today: Today) -> None:
        self.broken, self.today = found[1], today
        self.names = {path.name: (path, info) for path, info in found[0]}
        self.alike: dict[tuple[str, str, int], list[tuple[Path, RunInfo]]] = {}
        for path, info in found[0]:
            self.alike.setdefault((info.task, info.variant, info.seed), []).append((path, info))

    def find(self, recipe: Recipe, before: Cell | None) -> Path | None:
        """As `find_run`; else the run that an earlier record names, if it still is the cell's: its data may have
        another path since, or it may have been replaced.
        """
        allows = allowing(recipe)
        near = [(path, info) for path, info in self.alike.get(likeness(recipe), []) if allows(info)]
        path, info = self.names.get(before.run, (None, None)) if before else (None, None)
        known = before is not None and info is not None and before.fingerprint in ("", info.fingerprint)
        if known and path and info and info.config and [one for one, _ in near] == [path]:
            return path if self.today.allows(recipe, path, info) else None
        if (found := find_run(recipe, (near, self.broken), self.today)) is not None:
            return found
        same = known and path and info and same_recipe(path, recipe) and self.today.allows(recipe, path, info)
        return path if same else None
