"""`--dry-run`: what a run would do and cost, on standard output; and the estimates behind it."""

from __future__ import annotations

import shlex
import shutil
import statistics
import textwrap
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import rich.box
import rich.table
import torch

from hcnet_cli import build, dist, engine, profile
from hcnet_cli import recipe as rcp
from hcnet_cli.console import UserError, about, counted, duration, notice, out, units, warn
from hcnet_cli.cores import busy
from hcnet_cli.data import embedded
from hcnet_cli.data.splits import DataSplits, training_sizes
from hcnet_cli.engine import Task
from hcnet_cli.files import existing_parent, write_speed
from hcnet_cli.models import hub
from hcnet_cli.recipe import Recipe, Resolved
from hcnet_cli.runs import RunFolder
from hcnet_cli.trial import Trial, device_memory, trial
from hcnet_cli.values import as_typed

MANY_PASSES = 1000  # over the training images: a schedule made for a larger data set
USUAL_PASSES = 300  # those of ImageNet's recipe
FEW_IMAGES, MANY_FOR_FEW = 20_000, 100  # training images, and passes over them that are many for so few
FEW_STEPS = 500  # of training that a recipe for a large data set takes on a small one
ABOUT_DATA = ("head.with_masks", "data.folds", "data.num_classes", "data.reduce_zero_label", "data.ignore_index")
# what a proposed command has flags for, or leaves to its recipe
NOT_SET = ("model.name", "model.size", "model.digest", "model.drop_path_rate")
MUCH_OF_THE_START = 0.1  # share of a moving average that is still what training started from
LONG_SECONDS = 86400.0  # of training, from which the plan proposes less
USED_BY = {  # fields of `schedule` that some kinds alone use
    "milestones": ("multistep",),
    "gamma": ("multistep",),
    "power": ("poly",),
    "warmup_inside": ("cosine",),
    "min_lr": ("cosine", "poly"),
}


def print_plan(
    folder: RunFolder, recipe: Recipe, data: DataSplits, task: Task, device: torch.device, resolved: Resolved
) -> None:
    """Every value with its origin, then batches, learning rate, cost and place."""
    table = rich.table.Table(
        "key", rich.table.Column("value", overflow="fold"), "from", box=rich.box.SIMPLE_HEAD, pad_edge=False
    )
    asked = rcp.flatten(resolved.recipe.model_dump(mode="json"))
    for key, value in rcp.flatten(recipe.model_dump(mode="json")).items():
        source = "auto" if asked[key] == "auto" else resolved.sources.get(key, "recipe")
        table.add_row(key, "–" if value in (None, "") else str(value), source)
    out.print(table)
    notice("Timing some small batches ...")
    tried = trial(recipe, data, task, device)
    seconds = tried.seconds
    for name, text in _lines(folder, recipe, data, task, device, tried).items():
        _print_fact(f"{name}:", text)
    steps = build.steps(recipe, data)
    remark_on_training(recipe, task, notices=False)
    notice_many_passes(recipe, steps)
    remark_on_schedule(recipe, steps, resolved.sources)
    notice_what_fits(recipe, data, training_time(recipe, seconds, steps.total))
    if shutil.disk_usage(existing_parent(folder.path)).free < disk_need(recipe, task):
        warn("The disk has too little space for this run's checkpoints.")


def _lines(
    folder: RunFolder, recipe: Recipe, data: DataSplits, task: Task, device: torch.device, tried: Trial
) -> dict[str, str]:
    plan, batch, info = build.steps(recipe, data), recipe.train.batch_size, data.info
    micro = batch // (recipe.train.accumulate * dist.processes())
    params, macs = profile.count_params(task.model), build.count_macs(recipe, task, data)
    trained = profile.count_params(task.model, trained=True)
    size = "x".join(map(str, data.img_size))
    shortened = " (shortened to half of the run)" if plan.shortened else ""
    evaluated = f"every {plan.eval_every}" if plan.eval_every < plan.total else "at the end"
    remarks = {"data notes": " ".join(info.remarks())} if info.remarks() else {}
    lines = {
        "data": f"{info.name}: {info.num_train} training, {info.num_val} validation images, {info.num_classes} classes "
        f"({info.path})",
        **remarks,
        "model": f"{units(params, 1e6)} M parameters{_trained(recipe, task)}, {units(macs, 1e9)} G MACs at {size} "
        "(convolutions, linear layers, matrix products)",
        "batch": f"{batch} = {micro} x {counted(recipe.train.accumulate, 'micro-batch')} x "
        f"{counted(dist.processes(), 'process')}",
        "steps": f"{plan.total} ({plan.epoch} an epoch), warm-up {plan.warmup}{shortened}, evaluation {evaluated}"
        + (f", stops after {recipe.train.patience} without a better score" if recipe.train.patience else ""),
        "learning rate": f"peak {recipe.optim.lr:g}{_scaling_advice(recipe)}",
    }
    if recipe.train.ema_decay is not None:
        lines["weights"] = _average(recipe)
    state_bytes = (params + 3 * trained) * 4
    if tried.memory:
        lines["memory"] = (
            f"about {tried.memory / 2**30:.1f} GiB of {device_memory(device) / 2**30:.1f} GiB on this {device.type} a "
            f"process, {tried.per_image / 2**20:.0f} MiB an image, measured"
        )
    else:
        program = profile.peak_memory_mb() * 2**20  # with what was loaded and tried by now
        lines["memory"] = (
            f"about {(program + state_bytes + tried.per_image * micro) / 2**30:.1f} GiB a process: "
            f"{program / 2**30:.1f} the program, {state_bytes / 2**30:.2f} weights, gradients and optimizer, "
            f"{tried.per_image / 2**20:.{0 if tried.per_image > 2**23 else 1}f} MiB activations an image"
        )
    total, rate = tried.seconds * batch * plan.total, 1 / tried.seconds
    lines["time"] = (
        f"about {about(total) if total >= LONG_SECONDS else duration(total)} on this {device.type} by one process "
        f"({rate:{'.1f' if rate >= 0.1 else '.3g'}} images/s in a short trial{busy()}), evaluation not counted"
    )
    lines["workers"] = f"for each process that trains, {counted(build.workers(recipe), 'data worker')}"
    lines["stop"] = _stop_words(folder, recipe, task, tried.seconds * batch / dist.processes())
    lines["run"] = f"{folder.path}{' (exists)' if folder.record.exists() else ''}"
    free = shutil.disk_usage(existing_parent(folder.path)).free
    lines["disk"] = f"at most {disk_need(recipe, task) / 2**20:.0f} MiB for checkpoints, {free / 2**30:.1f} GiB free"
    return lines


def _print_fact(name: str, text: str, width: int = 15) -> None:
    """A line of the plan; on a terminal, text that is too long goes on below its first line."""
    room = max(20, out.width - width)
    lines = textwrap.wrap(text, room, break_long_words=False, break_on_hyphens=False) if out.is_terminal else [text]
    for number, line in enumerate(lines):
        out.print(f"{'' if number else name:<{width}}{line}")


def _stop_words(folder: RunFolder, recipe: Recipe, task: Task, step_seconds: float) -> str:
    """How long a run takes to save after a signal, and what it is given for that.

    Its workers and its interpreter end after that, which takes seconds on a busy machine.
    """
    num_bytes = checkpoint_bytes(recipe, task)
    words = f"after a signal a step of about {about(step_seconds)} ends"
    if dist.processes() > 1:
        words += f", agreed on within about {engine.Agreement.SECONDS:g} s"
    words += f", then {num_bytes / 2**20:.0f} MiB are saved"
    if speed := write_speed(existing_parent(folder.path)):
        words += f": about {about(step_seconds + num_bytes / speed)}, and seconds more until the process ends"
    return f"{words} (Slurm's KillWait and torchrun give 30 s by default)"


def checkpoint_bytes(recipe: Recipe, task: Task) -> int:
    """Weights, two moments of the optimizer, and the moving average if there is one."""
    return profile.count_params(task.model) * 4 * (4 if recipe.train.ema_decay is not None else 3)


def _scaling_advice(recipe: Recipe) -> str:
    """What linear scaling would give where the batch is not the protocol's; the rate itself is left alone."""
    if recipe.protocol not in rcp.shipped():
        return ""
    base = rcp.resolve(rcp.recipes_dir() / f"{recipe.protocol}.yaml").recipe
    if base.train.batch_size == recipe.train.batch_size:
        return ""
    scaled = base.optim.lr * recipe.train.batch_size / base.train.batch_size
    return (
        f" for a batch of {recipe.train.batch_size}; the recipe has {base.optim.lr:g} for {base.train.batch_size}: "
        f"linear scaling would give --lr {scaled:g}"
    )


def remark_on_training(recipe: Recipe, task: Task, notices: bool = True) -> None:
    """What is trained, what is kept and how classes are weighted, where that is not the usual; the first two with
    `notices` alone, for the plan has lines of them.
    """
    if notices and recipe.train.freeze != "none":
        params = profile.count_params(task.model)
        notice(f"{units(params, 1e6)} M parameters{_trained(recipe, task)} (train.freeze {recipe.train.freeze}).")
    if notices and recipe.train.ema_decay is not None:
        notice(f"Of the weights {_average(recipe)}.")
    if recipe.train.freeze != "none" and recipe.init == "none":
        warn(f"Random weights are frozen (train.freeze {recipe.train.freeze}): training starts from none (--init).")
    if weights := task.class_weights:
        notice(f"Class weights in the loss from {min(weights):.3g} to {max(weights):.3g} (run.json has all).")


def _trained(recipe: Recipe, task: Task) -> str:
    """How many parameters are trained, after their number; "" where nothing is frozen."""
    trained = profile.count_params(task.model, trained=True)
    return "" if recipe.train.freeze == "none" else f", {units(trained, 1e6)} M of them trained"


def _average(recipe: Recipe) -> str:
    return f"the moving average (train.ema_decay {recipe.train.ema_decay:g}) is evaluated and kept as best.safetensors"


def notice_many_passes(recipe: Recipe, steps: build.Steps) -> None:
    """Says so where a schedule passes over the images far more often than any shipped recipe does."""
    if (passes := steps.total // max(1, steps.epoch)) <= MANY_PASSES:
        return
    fewer = max(USUAL_PASSES, -(-FEW_STEPS // steps.epoch))
    length = fewer if recipe.schedule.unit == "epochs" else fewer * steps.epoch
    notice(f"That is {passes:,} passes over the training images; --set schedule.length={length} makes {fewer:,}.")


def remark_on_schedule(recipe: Recipe, steps: build.Steps, sources: Mapping[str, str] = MappingProxyType({})) -> None:
    """Warns of parts of the schedule that the run does not reach, or that have no effect."""
    for line in schedule_remarks(recipe, steps, sources):
        warn(line)


def remark_on_normalisation(recipe: Recipe) -> None:
    """Warns of images that are normalised otherwise than those that timm's weights were trained on."""
    for key, trained in zip(("mean", "std"), hub.expected_normalisation(recipe.model.name) or (), strict=False):
        if any(abs(a - b) > 1e-3 for a, b in zip(getattr(recipe.data, key), trained, strict=True)):
            typed = as_typed(f"data.{key}", trained)
            warn(f"The weights of {recipe.model.name} were trained with another {key}: {typed}")


def schedule_remarks(
    recipe: Recipe, steps: build.Steps, sources: Mapping[str, str] = MappingProxyType({})
) -> list[str]:
    """What a schedule says and the run does not do, a sentence for each. `sources`: as in recipe.Resolved."""
    schedule = recipe.schedule
    length = counted(schedule.length, schedule.unit.removesuffix("s"))
    remarks = []
    if schedule.kind == "multistep":
        at = list(zip(map(str, schedule.milestones), steps.milestones, strict=True))
        if missed := [milestone for milestone, step in at if step >= steps.total]:
            remarks.append(
                f"The run ends after {length}, at or before the milestones {', '.join(missed)}: the learning rate does "
                f"not fall there.{_scaled_milestones(recipe)}"
            )
        if not at:
            remarks.append("schedule.kind is multistep without milestones: the learning rate never falls.")
    elif schedule.min_lr > recipe.optim.lr:
        remarks.append(
            f"schedule.min_lr ({schedule.min_lr:g}) is above optim.lr ({recipe.optim.lr:g}): the learning rate rises."
        )
    remarks += [f"{key} has no effect: {why}." for key, why in unused(recipe, sources).items()]
    if steps.shortened:
        given = counted(schedule.warmup, schedule.warmup_unit.removesuffix("s"))
        remarks.append(f"The warm-up ({given}) was shortened to half of the run, {counted(steps.warmup, 'step')}.")
    average = recipe.train.ema_decay
    if average is not None and (kept := average**steps.total) > MUCH_OF_THE_START:
        remarks.append(
            f"train.ema_decay {average:g} is for longer runs: after {counted(steps.total, 'step')} {kept:.0%} of the "
            "average is what training started from."
        )
    if (patience := recipe.train.patience) and patience >= -(-steps.total // steps.eval_every):
        remarks.append("train.patience has no effect: the run has no more evaluations than that.")
    if steps.eval_every > steps.total:
        remarks.append(
            f"train.eval_every ({recipe.train.eval_every} {schedule.unit}) is longer than the run ({length}): it is "
            "evaluated once, at the end."
        )
    return remarks


def unused(recipe: Recipe, sources: Mapping[str, str]) -> dict[str, str]:
    """The keys that say something which the run does not use, and why: they leave their default, or were typed."""
    kind = recipe.schedule.kind
    reasons = {
        f"schedule.{key}": f"the schedule is {kind}, not {' or '.join(kinds)}"
        for key, kinds in USED_BY.items()
        if kind not in kinds
    }
    if not recipe.schedule.warmup:
        reasons |= dict.fromkeys(("schedule.warmup_ratio", "schedule.warmup_inside"), "schedule.warmup is 0")
    if not recipe.optim.weight_decay:
        reasons["optim.no_decay"] = "optim.weight_decay is 0"
    if (loss := getattr(recipe.head, "loss", "focal")) != "focal":
        reasons["head.focal_gamma"] = f"the loss is {loss}, not focal"
    if recipe.train.freeze == "backbone":
        reasons["optim.layer_decay"] = "train.freeze is backbone"

    def said(key: str) -> bool:
        section, name = key.split(".")
        part = getattr(recipe, section)
        return getattr(part, name) != type(part).model_fields[name].default or sources.get(key, "").startswith("--")

    return {key: why for key, why in reasons.items() if said(key)}


def _scaled_milestones(recipe: Recipe) -> str:
    """The milestones of the protocol, scaled to the length of the run, as an option to type."""
    if recipe.protocol not in rcp.shipped():
        return ""
    base = rcp.resolve(rcp.recipes_dir() / f"{recipe.protocol}.yaml").recipe.schedule
    if base.unit != recipe.schedule.unit or base.milestones != recipe.schedule.milestones:
        return ""
    scaled = [round(m * recipe.schedule.length / base.length) for m in base.milestones]
    if len({0, *scaled, recipe.schedule.length}) < len(scaled) + 2:
        return ""
    return f" In proportion: {as_typed('schedule.milestones', scaled)}"


def disk_need(recipe: Recipe, task: Task) -> int:
    """Bytes of a run's folder at its largest: three checkpoints while one is written, and the best weights."""
    return 3 * checkpoint_bytes(recipe, task) + profile.count_params(task.model) * 4


def check_disk(folder: Path, recipe: Recipe, task: Task) -> None:
    """UserError before hours of training whose result could not be kept."""
    need, there = disk_need(recipe, task), sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
    free = shutil.disk_usage(folder).free
    if free + there < need:
        raise UserError(
            f"The disk has too little space for this run: its checkpoints need about {(need - there) / 2**20:.0f} MiB "
            f"in {folder}, {free / 2**20:.0f} MiB are free.",
            hint="Free some space, or choose another place with --out.",
        )


# --- what fits the data -----------------------------------------------------------------------------------------------


def training_time(recipe: Recipe, seconds: float, steps: int) -> float:
    """Seconds of `steps` steps by all processes, from the seconds for an image by one."""
    return seconds * recipe.train.batch_size * steps / dist.processes()


def check_enough_images(recipe: Recipe, data: DataSplits) -> None:
    """UserError, with the command that fits, for fewer training images than a batch."""
    if not len(data.train):
        raise UserError(f"{data.info.path} has no training images.")
    try:
        build.steps(recipe, data)
    except UserError as error:
        if not _has_small(recipe) or recipe.protocol == f"{recipe.task}/{recipe.spec.small_recipe}":
            raise
        fitting = _small_command(recipe, data.info.num_train, typical_sides(data))
        raise UserError(str(error), hint=f"{error.hint} Fits better: {fitting}") from None


def notice_what_fits(recipe: Recipe, data: DataSplits, seconds: float) -> None:
    """Says which recipe and flags fit where images are far smaller than the recipe's, where they are few for its
    schedule, or where `seconds` of training are days.
    """
    spec = recipe.spec
    small = f"{spec.name}/{spec.small_recipe}"
    if recipe.protocol == small:
        shipped = _shipped_small(recipe)
        if recipe.data.path not in embedded.EMBEDDED and image_sides(recipe) == image_sides(shipped):
            sides = typical_sides(data)
            if sides and (flags := size_flags(shipped, sides)):
                notice(f"The images have about {min(sides):.0f} pixels a side:{flags} fits them better.")
        return
    sides, img_size = typical_sides(data), min(image_sides(recipe), default=0)
    reasons = []
    if sides and 2 * min(sides) <= img_size:
        reasons.append(f"the images have about {min(sides):.0f} pixels a side and would be enlarged to {img_size}")
    steps, images = build.steps(recipe, data).total, data.info.num_train
    passes = steps * recipe.train.batch_size / images
    if spec.small_recipe and images < FEW_IMAGES and passes > MANY_FOR_FEW:
        reasons.append(f"{images:,} training images are few for {passes:,.0f} passes over them")
    if spec.small_recipe and steps < FEW_STEPS and recipe.protocol == f"{spec.name}/{spec.default_recipe}":
        reasons.append(f"{steps:,} steps are few to learn from")
    if seconds > LONG_SECONDS:
        reasons.append(f"training would take about {about(seconds)} here")
    if not reasons:
        return
    notice(f"Does the recipe fit the data? {'; '.join(reasons)[0].upper()}{'; '.join(reasons)[1:]}.")
    few = images < FEW_IMAGES or (sides and max(sides) <= spec.small_sides[1])
    if few and _has_small(recipe):
        notice(f"Fits better: {_small_command(recipe, images, sides)}")
        return
    if seconds <= LONG_SECONDS:
        return
    length = max(1, int(recipe.schedule.length * LONG_SECONDS / seconds))
    flag = f"--{recipe.schedule.unit} {length}"
    notice(f"{flag} takes about {about(LONG_SECONDS)}; a GPU, or torchrun on several, takes far less.")


def _has_small(recipe: Recipe) -> bool:
    """Whether there is a recipe for small data, which the embedded sets do not need."""
    return bool(recipe.spec.small_recipe) and recipe.data.path not in embedded.EMBEDDED


def _shipped_small(recipe: Recipe) -> Recipe:
    """The shipped recipe of the task for small data."""
    return rcp.resolve(rcp.recipes_dir() / recipe.task / f"{recipe.spec.small_recipe}.yaml").recipe


def _small_command(recipe: Recipe, images: int, sides: tuple[float, float] | None) -> str:
    small, data = f"{recipe.task}/{recipe.spec.small_recipe}", shlex.quote(str(recipe.data.path))
    return f"hcnet {recipe.task} --recipe {small} --data {data}{flags_of_small(recipe, images, sides)}"


def flags_of_small(recipe: Recipe, images: int, sides: tuple[float, float] | None) -> str:
    """What the recipe for small data is to be told: the images' size, a batch of fewer, what was said of the data."""
    model, weights = recipe.model, recipe.init not in ("none", "auto")
    small = _shipped_small(recipe)
    asked, other = rcp.flatten(recipe.model_dump()), rcp.flatten(small.model_dump())
    flags = size_flags(small, sides)
    if model.name:
        flags += f" --model {shlex.quote(model.name)}"
    elif weights:  # which are of this size
        flags += f" --size {model.size}"
    if recipe.init != small.init:
        flags += f" --init {shlex.quote(recipe.init)}"
    if model.name or weights:
        for key in asked:
            if key.startswith("model.") and key not in NOT_SET and asked[key] != other.get(key):
                flags += f" {as_typed(key, asked[key])}"
    for key in ABOUT_DATA:
        if key in other and asked.get(key) != other[key]:
            flags += f" {as_typed(key, asked[key])}"
    if images < small.train.batch_size:
        flags += f" --batch-size {min(recipe.train.batch_size, max(2, images // 8 * 2))}"  # even: for mixing in pairs
    return flags


def size_flags(small: Recipe, sides: tuple[float, float] | None) -> str:
    """The options that set the images' size of the shipped recipe to that of the data; "" where it fits."""
    usual, values = image_sides(small), rcp.flatten(small.model_dump())
    smallest, largest = small.spec.small_sides
    side = (sides or usual)[len(usual) > 1]  # an image is to cover one side, or to fit into two
    fitting = min(range(smallest, largest + 1, 32), key=lambda size: max(size / side, side / size))
    if fitting == usual[0]:
        return ""
    sizes = {key: [fitting, fitting] if isinstance(values[key], tuple) else fitting for key in small.spec.size_keys}
    return "".join(f" {as_typed(key, size)}" for key, size in sizes.items())


def image_sides(recipe: Recipe) -> tuple[int, ...]:
    """The side of the recipe's images, or their long and short side; nothing for a task whose images have no size."""
    sides = rcp.flatten(recipe.model_dump()).get(next(iter(recipe.spec.size_keys), ""), ())
    return sides if isinstance(sides, tuple) else (sides,)


def typical_sides(data: DataSplits) -> tuple[float, float] | None:
    """The medians, over evenly spread training images, of the shorter and the longer side in pixels; None without an
    image.
    """
    sides = [sorted(size) for size in training_sizes(data)]
    shorter, longer = (statistics.median(side) for side in zip(*sides, strict=True)) if sides else (0.0, 0.0)
    return (shorter, longer) if sides else None
