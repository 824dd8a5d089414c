"""The only translator from a recipe to objects: data, model, task, evaluations, loaders, optimizer, an engine.Job.

Each task's module (Spec.module, tasks/*/task.py) provides

    build_task(head, config, evaluation, data, backbone, micro_batch) -> Task
        The task with fresh weights on the CPU. `head`, `config` and `evaluation` are sections of the recipe (the first
        evaluation), `backbone(num_classes)` makes the backbone, `micro_batch` is the number of images at a time.
    build_evaluation(task, config, entry, first, data) -> (Task, data set, collate)
        What scores the task's model as the entry of `evaluation` says; `first` is the first entry.
    count_macs(task, size) -> int
        Multiply-accumulates for one image of `size`, as the task's tables report them.
    build_predictor(head, config, evaluation, class_names, backbone) -> Predictor
        In predict.py beside the task's module: predictions for images without labels.
    graphs(task), settings(task), ExportedTask(task, files, about), PROGRAM
        In export.py beside the task's module, where Spec.in_parts says why: the model as graphs, by the names of their
        files; what their metadata have more than the weights'; the task that predicts with the files, which takes the
        place of a task with data (`in_place_of`) and then says how both compare (`compare`); the module that is written
        beside them. DECIMALS: of the scores that must be the run's.
    describe_input(config, evaluation) -> dict
        What the model must be given, for the metadata of best.safetensors: plain JSON values.
"""

from __future__ import annotations

import functools
import importlib
import itertools
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol, cast

import timm
import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from hcnet_cli import dist, foreign, kernels, optim, rng
from hcnet_cli.console import UserError
from hcnet_cli.cores import cores
from hcnet_cli.data import embedded, loader
from hcnet_cli.data.splits import DataSplits
from hcnet_cli.engine import Evaluation, Job, Predictor, Task
from hcnet_cli.header import read_metadata
from hcnet_cli.models import backbone as backbones
from hcnet_cli.models import layers
from hcnet_cli.plain_json import unicode
from hcnet_cli.pretrained import weights_file
from hcnet_cli.recipe import Recipe
from hcnet_cli.runs import RunFolder, read_record, weights_contradiction
from hcnet_cli.schema import SHAPE_FIELDS, DataPart, EvaluationPart, Part
from hcnet_cli.sizes import SIZES
from hcnet_cli.weights import LoadReport, digest, load_into, read_weights, special_kind


class TaskModule(Protocol):
    """What the module of a task provides."""

    def build_task(
        self,
        head: Part,
        config: DataPart,
        evaluation: EvaluationPart,
        data: DataSplits,
        backbone: Callable[[int], nn.Module],
        micro_batch: int,
    ) -> Task: ...

    def build_evaluation(
        self, task: Task, config: DataPart, entry: EvaluationPart, first: EvaluationPart, data: DataSplits
    ) -> tuple[Task, loader.RequestDataset, loader.Collate | None]: ...

    def count_macs(self, task: Task, size: tuple[int, int]) -> int: ...

    def describe_input(self, config: DataPart, evaluation: EvaluationPart) -> dict[str, Any]: ...


class FormatModule(Protocol):
    """What the module of a data format provides."""

    def open_data(
        self, config: DataPart, head: Part, root: Path, seed: int, validation_only: bool = False
    ) -> DataSplits: ...


def task_module(recipe: Recipe) -> TaskModule:
    return cast(TaskModule, importlib.import_module(recipe.spec.module))


def task_part(recipe: Recipe, name: str) -> Any:
    """The module `name` beside the task's."""
    return importlib.import_module(f"{recipe.spec.module.rpartition('.')[0]}.{name}")


# --- data, model, task ------------------------------------------------------------------------------------------------


def open_data(recipe: Recipe, eval_only: bool = False) -> DataSplits:
    """Scans the data and makes the data sets; UserError for what is wrong. eval_only: there may be no training part."""
    assert recipe.data.path is not None, "the command line fills in data.path"
    root, form = embedded.data_folder(recipe.data.path), recipe.spec.formats[recipe.data.format]
    module = cast(FormatModule, importlib.import_module(form.module))
    if not (eval_only and form.validation_only(root)):
        return module.open_data(recipe.data, recipe.head, root, recipe.train.seed)
    data = module.open_data(recipe.data, recipe.head, root, recipe.train.seed, validation_only=True)
    data.info.notes.append(f"{data.info.name} had validation images alone, no training images.")
    return data


def build_backbone(recipe: Recipe, num_classes: int) -> nn.Module:
    """The model of the recipe, initialised from the seed; a field left at null is the size's own.

    num_classes: 0 for a head that takes the four feature maps.
    """
    model = recipe.model
    with rng.seeded(rng.derive(recipe.train.seed, "init")):
        if model.name:
            other: Any = backbones.create(
                model.name,
                num_classes,
                model.args,
                drop_path_rate=model.drop_path_rate,
                img_size=getattr(recipe.data, "img_size", None),
                digest=model.digest,
            )
            if model.grad_checkpointing and hasattr(other, "set_grad_checkpointing"):
                other.set_grad_checkpointing(True)
            return cast(nn.Module, other)
        shape = model.model_dump(include={*SHAPE_FIELDS, "drop_path_rate"})
        given = {name: value for name, value in shape.items() if value is not None}
        try:
            made: Any = timm.create_model(
                SIZES[model.size].timm_name, num_classes=num_classes, disable=model.disable, **given
            )
        except ValueError as error:
            raise UserError(f"The model cannot be built: {error}") from None
    made.set_grad_checkpointing(model.grad_checkpointing)
    return cast(nn.Module, made)


def build_task(recipe: Recipe, data: DataSplits) -> Task:
    """The task with freshly initialised weights, on the CPU, channels-last."""
    with rng.seeded(rng.derive(recipe.train.seed, "head")):
        task = task_module(recipe).build_task(
            recipe.head,
            recipe.data,
            next(iter(recipe.evaluation.values())),
            data,
            functools.partial(build_backbone, recipe),
            recipe.train.batch_size // recipe.train.accumulate,
        )
    if recipe.train.freeze != "none":
        layers.freeze(task.model, recipe.train.freeze)
    return task.to(memory_format=torch.channels_last)


def check_trainable(task: Task) -> None:
    """UserError for a model of which nothing is trained, or that holds what a checkpoint could not give back."""
    if not any(parameter.requires_grad for parameter in task.model.parameters()):
        raise UserError(
            "No parameter of the model is trained: requires_grad is False in all of them.",
            hint="--eval-only --init FILE scores weights as they are.",
        )
    for name, value in itertools.chain(task.model.named_parameters(), task.model.named_buffers()):
        if kind := special_kind(value.detach()):
            raise UserError(
                f"The model's {name} is a {kind} tensor, which checkpoints do not hold: weights are plain numbers.",
                hint="A complex parameter can be kept as pairs of real numbers: torch.view_as_complex(pairs).",
            )


def build_evaluations(
    recipe: Recipe, task: Task, data: DataSplits, names: Collection[str] | None = None
) -> list[Evaluation]:
    """The evaluations `names` of the recipe (None: those that training makes), the first among them first."""
    first = next(iter(recipe.evaluation.values()))
    made = []
    for name, entry in recipe.evaluation.items():
        if (entry.when != "asked") if names is None else (name in names):
            view, images, collate = task_module(recipe).build_evaluation(task, recipe.data, entry, first, data)
            made.append(Evaluation(name, view, _eval_loader(recipe, images, collate)))
    return made


def count_macs(recipe: Recipe, task: Task, data: DataSplits) -> int:
    """Multiply-accumulates for one image of `data.img_size`, as the task's tables report them."""
    return task_module(recipe).count_macs(task, data.img_size)


def build_predictor(recipe: Recipe, class_names: Sequence[str]) -> Predictor:
    """The task of a recipe without its data, for predictions; its weights are fresh (see `load_own`)."""
    made = task_part(recipe, "predict").build_predictor(
        recipe.head,
        recipe.data,
        next(iter(recipe.evaluation.values())),
        class_names,
        functools.partial(build_backbone, recipe),
    )
    return cast(Predictor, made)


# --- weights to start from --------------------------------------------------------------------------------------------


def read_init(source: str) -> tuple[str, dict[str, Tensor]]:
    """(name, state dict) of a run folder, a safetensors file or a PyTorch checkpoint."""
    path = weights_file(source)
    state = read_weights(path)
    _check_weights(path, state)
    return str(path), state


def _check_weights(path: Path, state: dict[str, Tensor]) -> None:
    """UserError where the tensors are not those that were written, or not those of the run in whose folder they lie."""
    written = _metadata(path).get("weights")
    if written and written != digest(state):
        raise UserError(
            f"{path} is damaged: its tensors are not those that training wrote.",
            hint="Restore it from a backup, or train the run again with --fresh.",
        )
    folder = RunFolder(path.parent)
    if path != folder.best or not folder.record.exists():
        return
    try:
        info = read_record(folder.record)
    except UserError:
        return  # whoever needs the record says what is wrong with it
    if info.config and not info.altered and (reason := weights_contradiction(folder, info)):
        raise UserError(reason, hint="Restore the file, or copy it elsewhere and name it with --init.")


def _metadata(path: Path) -> dict[str, Any]:
    try:
        return read_metadata(path) if path.suffix == ".safetensors" else {}
    except (OSError, ValueError):
        return {}


def load_init(task: Task, name: str, state: dict[str, Tensor]) -> LoadReport:
    """Loads what fits: a whole model's weights into the whole, a backbone's into the backbone. The names of the
    authors' checkpoints are translated.
    """
    model: Any = task.model
    inside = {key for key in model.state_dict() if not key.startswith("backbone.")}
    whole = not hasattr(model, "backbone") or not inside.isdisjoint(state.keys())
    target: nn.Module = model if whole else model.backbone
    if isinstance(target, backbones.FeatureMaps):
        target = target.model
    about = _metadata(Path(name))
    translate = foreign.translation(target, state)
    report = load_into(target, state, name, translate, foreign.owner_hint(state, about))
    if isinstance(translate, functools.partial):  # timm interpolates, and machines round differently
        report.digest = digest(state)
    return report


def lacking(init: LoadReport, task: Task) -> str:
    """What weights that were loaded lack of the task's, for people; "" where they are whole."""
    names = sorted({*init.missing, *init.reinitialised})
    if init.total < len(task.model.state_dict()):
        names.insert(0, "the head")
    return ", ".join(names[:5])


def load_own(task: Task, folder: Path) -> LoadReport:
    """Loads a run's best weights into its task. UserError unless each tensor of one is in the other.

    Whatever scores or shows the weights of a run loads them here: a head that is left random has a score, too.
    """
    report = load_init(task, *read_init(str(folder)))
    if missing := lacking(report, task):
        problem = f"it lacks {missing}"
    elif report.unexpected:
        problem = f"the model has no {', '.join(report.unexpected[:3])}"
    else:
        return report
    raise UserError(
        f"{report.source} is not of the model in {folder / 'recipe.yaml'}: {problem}.",
        hint="The model, its head or the number of classes are others than those it was trained with.",
    )


# --- the job ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Steps:
    """A schedule in optimizer steps; `epoch` is the steps of one pass over the data."""

    epoch: int
    total: int
    warmup: int
    milestones: tuple[int, ...]
    eval_every: int
    shortened: bool  # the warm-up was cut to half of a short run


def steps(recipe: Recipe, data: DataSplits) -> Steps:
    """Durations of the schedule on these data. UserError for fewer images than a batch."""
    return steps_of_schedule(recipe, data.steps_per_epoch(recipe.train.batch_size))


def steps_of_schedule(recipe: Recipe, epoch: int) -> Steps:
    """Durations of the schedule, given the steps of one epoch. A warm-up takes at most half of the run."""
    schedule = recipe.schedule

    def count(amount: float, unit: str) -> int:
        return round(amount * epoch) if unit == "epochs" else round(amount)

    total = count(schedule.length, schedule.unit)
    warmup = count(schedule.warmup, schedule.warmup_unit)
    return Steps(
        epoch=epoch,
        total=total,
        warmup=min(warmup, total // 2),
        milestones=tuple(count(milestone, schedule.unit) for milestone in schedule.milestones),
        eval_every=count(recipe.train.eval_every, schedule.unit),
        shortened=warmup > total // 2,
    )


MOST_WORKERS = 16  # that `auto` starts: each holds batches in memory


def workers(recipe: Recipe) -> int:
    """Processes that load data for this one. `auto`: its cores but one, which trains; at least 1."""
    asked = recipe.train.workers
    return max(1, min(cores() - 1, MOST_WORKERS)) if asked == "auto" else asked


def build_job(
    recipe: Recipe,
    data: DataSplits,
    task: Task,
    device: torch.device,
    identity: Mapping[str, Any] = MappingProxyType({}),
) -> Job:
    """Everything the engine needs; `task` is moved to `device`. `identity`: of the run, for checkpoints and weights."""
    train, decay = recipe.train, recipe.optim.layer_decay
    plan = steps(recipe, data)
    task.to(device)
    faster = kernels.accelerate(task.model) if train.kernels else ["no kernels: train.kernels is false"]
    if train.compile:
        task.model.compile()  # in place: names in checkpoints stay as they are
    batches = loader.TrainLoader(
        data.train,
        batch_size=train.batch_size,
        accumulate=train.accumulate,
        total_steps=plan.total,
        seed=train.seed,
        workers=workers(recipe),
        collate=data.collate,
        groups=data.groups,
        shards=data.shards,
        **_rank_and_world_size(),
    )
    return Job(
        task=task,
        train=batches,
        evaluations=build_evaluations(recipe, task, data),
        sample_path=data.train.sample_path,
        optimizer=optim.build_optimizer(
            task.model,
            name=recipe.optim.name,
            args=recipe.optim.args,
            lr=recipe.optim.lr,
            weight_decay=recipe.optim.weight_decay,
            no_decay=recipe.optim.no_decay,
            scales=layers.learning_rate_scales(task.model, decay) if decay is not None else {},
        ),
        lr_at=functools.partial(
            optim.lr_at,
            lr=recipe.optim.lr,
            total_steps=plan.total,
            warmup_steps=plan.warmup,
            milestones=plan.milestones,
            **recipe.schedule.model_dump(include={"kind", "warmup_ratio", "warmup_inside", "min_lr", "gamma", "power"}),
        ),
        total_steps=plan.total,
        batch_size=train.batch_size,
        accumulate=train.accumulate,
        eval_every=plan.eval_every,
        log_every=train.log_every,
        save_minutes=train.save_every,
        clip_grad=recipe.optim.clip_grad,
        precision=train.precision,
        device=device,
        seed=train.seed,
        ema=None if train.ema_decay is None else ModelEmaV3(task.model, decay=train.ema_decay),
        patience=train.patience,
        describe_weights=weights_metadata(recipe, data),
        identity=identity,
        kernels=faster,
    )


def scoring_job(recipe: Recipe, data: DataSplits, task: Task, device: torch.device, processes: int = 1) -> Job:
    """A job that only evaluates, on any number of processes, in batches as large as in training by `processes`."""
    train = recipe.train
    size = train.eval_batch_size or max(1, train.batch_size // (train.accumulate * processes))
    alone = {"batch_size": dist.processes(), "accumulate": 1, "eval_batch_size": size, "ema_decay": None}
    return build_job(recipe.model_copy(update={"train": train.model_copy(update=alone)}), data, task, device)


def weights_metadata(recipe: Recipe, data: DataSplits) -> dict[str, Any]:
    """What best.safetensors says of itself: all that whoever loads it needs. README documents the keys."""
    model = recipe.model
    size = getattr(recipe.data, "img_size", None)
    fields = {"size", "name", "args", "digest", "grad_checkpointing"}
    shape = model.model_dump(mode="json", exclude=fields, exclude_none=True)
    return {
        "model": model.name or SIZES[model.size].timm_name,
        "model_args": {**backbones.size_argument(model.name, size), **model.args} if model.name else shape,
        "task": recipe.task,
        "seed": recipe.train.seed,
        "data": data.info.name,
        "classes": [unicode(name) for name in data.class_names],
        **({"ema_decay": recipe.train.ema_decay} if recipe.train.ema_decay is not None else {}),
        **({"bits": data.info.bits} if data.info.bits is not None else {}),
        **task_module(recipe).describe_input(recipe.data, next(iter(recipe.evaluation.values()))),
    }


def _rank_and_world_size() -> dict[str, int]:
    return {"rank": dist.rank() if dist.is_distributed() else 0, "world_size": dist.processes()}


def _eval_loader(recipe: Recipe, images: loader.RequestDataset, collate: loader.Collate | None) -> loader.EvalLoader:
    train = recipe.train
    size = train.eval_batch_size or train.batch_size // (train.accumulate * dist.processes())
    return loader.EvalLoader(
        images, batch_size=size, workers=workers(recipe), collate=collate, **_rank_and_world_size()
    )
