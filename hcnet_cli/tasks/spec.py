"""What a task declares about itself, as plain data: nothing here loads torch.

The command line, recipes, results, reports, studies and `hcnet check` read these declarations; no task's name stands in
them. What a task does lies in the other files of its folder, and is imported when it runs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from hcnet_cli.schema import DataPart, EvaluationPart, Part

Style = Literal["text", "integer", "number", "short", "percent", "difference", "p"]


@dataclass(frozen=True)
class Column:
    """One column of a table. `style` says how its values are printed; `best` marks the highest.

    Secondary columns are left out where there is little room. `measured_only`: published rows never have the value, so
    their cells stay empty instead of showing it as missing.
    """

    key: str
    title: str
    style: Style = "text"
    best: bool = False
    secondary: bool = False
    measured_only: bool = False


@dataclass(frozen=True)
class Metric:
    """A score in per cent, by its key in run.json.

    `published`: its column in published.csv, where that differs. `in_studies`: it is compared beside the primary one.
    """

    key: str
    title: str
    published: str = ""
    in_studies: bool = False


@dataclass(frozen=True)
class Option:
    """A flag that only this training command has. Its value goes to the recipe field `key`.

    `values` translates what is typed; `recipe` is for a flag that names a recipe: "coco-{}".
    """

    name: str  # the parameter, such as "with_masks"
    flags: tuple[str, ...]
    type: type
    help: str
    key: str = ""
    values: Mapping[Any, Any] = field(default_factory=dict)
    recipe: str = ""


@dataclass(frozen=True)
class Format:
    """A data format: its section of the recipe, and the module that reads it.

    The module provides `open_data(config, head, root, seed) -> DataSplits` and `audit(config, head, root) -> Audit`.
    `recognise`: whether a folder looks like this format. `require`: UserError for a recognised folder that lacks what
    even an evaluation needs, by the names of its files alone. `validation_only`: whether a folder has the validation
    part and no training part, which is enough for `--eval-only`; `open_data` then gets `validation_only=True`.
    """

    config: type[DataPart]
    module: str
    layout: str  # one line for people
    recognise: Callable[[Path], bool]
    require: Callable[[Path], object] = bool
    validation_only: Callable[[Path], bool] = lambda root: False


@dataclass(frozen=True)
class Spec:
    """A task: everything that the rest of the program knows about it.

    `module` provides `build_task`, `build_evaluation` and `count_macs` (see hcnet_cli/build.py).
    """

    name: str  # the command, and the `task` of a recipe
    help: str  # of the command
    module: str
    # recipe
    heads: Mapping[str, type[Part]]  # by `head.kind`; the first is what a recipe without a head means
    formats: Mapping[str, Format]  # by `data.format`
    evaluation: type[EvaluationPart]
    evaluations: Mapping[str, Mapping[str, Any]]  # entries that every recipe has, the first is the primary one
    options: Sequence[Option]
    further: Sequence[str] = ()  # values of an entry's `on` that `hcnet evaluate --on` knows by name
    in_folders: Sequence[str] = ()  # those of `further` whose images lie in a folder of their own, the entry's `path`
    check_evaluation: Callable[[EvaluationPart, Sequence[str]], None] | None = None  # an entry, the model's classes
    starts_from: str = ""  # the task whose weights training starts from
    renamed: Mapping[str, str | tuple[str, Mapping[Any, Any]]] = field(default_factory=dict)  # old key -> new, values
    # data
    embedded: str = ""
    embedded_note: str = ""
    default_recipe: str = ""  # for data of the user's own
    size_keys: Sequence[str] = ()  # where a recipe has the size of images: a side, or a long and a short one
    small_recipe: str = ""  # for small images and small data, proposed where the recipe does not fit
    small_sides: tuple[int, int] = (0, 0)  # the smallest and the largest images that `small_recipe` is for
    data_variable: str = ""  # the environment variable that stands in for --data
    ablation_length: int | None = None  # schedule.length of a study's runs on the embedded data
    # results
    table: str = ""
    subject: str = ""  # of the table, for data sets other than the benchmark
    hub_tags: Sequence[str] = ()  # of a model card: the hub's name of the task, and "timm" where timm loads the model
    metrics: Sequence[Metric] = ()  # the first chooses the best weights
    figures: Sequence[Metric] = ()  # of runs alone, beside the metrics, in their own units
    columns: Sequence[Column] = ()  # one that is measured only is left out where no row has a value
    benchmark: str = ""  # the name of the data set of the published rows
    benchmark_title: str = ""
    protocols: Mapping[str, str] = field(default_factory=dict)  # recipe -> protocol of the published rows
    protocol_notes: Mapping[str, str] = field(default_factory=dict)
    macs_note: str = ""  # what MACs are counted at under the benchmark's protocols
    schedule_column: bool = False  # the schedule is named (1x, 3x) instead of its epochs
    compare_by_image_size: bool = False  # a published row compares at its own image size alone
    in_parts: str = ""  # why `hcnet export` writes a folder of graphs, as onnx or pt2; see hcnet_cli/build.py
    times_inference: bool = False  # images/s of the trained model are measured

    @property
    def primary(self) -> Metric:
        """The metric that decides which weights are best; higher is better."""
        return self.metrics[0]
