"""`--dry-run`: what a run would do and cost, on standard output; and the estimates behind it."""

from __future__ import annotations

import math
import shutil
import time

import rich.box
import rich.table
import torch
from torch import Tensor

from hcnet_cli import build, dist, engine, profile
from hcnet_cli import recipe as rcp
from hcnet_cli.console import duration, notice, out, warn
from hcnet_cli.data import loader
from hcnet_cli.data.splits import DataSplits
from hcnet_cli.engine import Task, to_device
from hcnet_cli.files import existing_parent
from hcnet_cli.recipe import Recipe, Resolved
from hcnet_cli.runs import RunFolder

TRIAL_SECONDS = 0.3  # of a step, above which the time estimate tries no larger batch
MANY_PASSES = 1000  # over the training images: a schedule made for a larger data set
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
    table = rich.table.Table("key", "value", "from", box=rich.box.SIMPLE_HEAD, pad_edge=False)
    asked = rcp.flatten(resolved.recipe.model_dump(mode="json"))
    for key, value in rcp.flatten(recipe.model_dump(mode="json")).items():
        source = "auto" if asked[key] == "auto" else resolved.sources.get(key, "recipe")
        table.add_row(key, "–" if value in (None, "") else str(value), source)
    out.print(table)
    notice("Timing some small batches ...")
    seconds = seconds_per_image(recipe, data, task, device)
    for name, text in _lines(folder, recipe, data, task, device, seconds).items():
        out.print(f"{name + ':':<15}{text}", markup=False)
    notice_many_passes(build.steps(recipe, data))
    remark_on_schedule(recipe, build.steps(recipe, data))
    if shutil.disk_usage(existing_parent(folder.path)).free < disk_need(recipe, task):
        warn("The disk has too little space for this run's checkpoints.")


def _lines(
    folder: RunFolder, recipe: Recipe, data: DataSplits, task: Task, device: torch.device, seconds: float
) -> dict[str, str]:
    plan, batch, info = build.steps(recipe, data), recipe.train.batch_size, data.info
    micro = batch // (recipe.train.accumulate * dist.processes())
    params, macs = profile.count_params(task.model), build.count_macs(recipe, task, data)
    size = "x".join(map(str, data.img_size))
    shortened = " (shortened to half of the run)" if plan.shortened else ""
    evaluated = f"every {plan.eval_every}" if plan.eval_every < plan.total else "at the end"
    lines = {
        "data": f"{info.name}: {info.num_train} training, {info.num_val} validation images, {info.num_classes} classes "
        f"({info.path})",
        "model": f"{params / 1e6:.2f} M parameters, {macs / 1e9:.2f} G MACs at {size} (convolutions, linear layers, "
        "matrix products)",
        "batch": f"{batch} = {micro} x {recipe.train.accumulate} micro-batches x {dist.processes()} processes",
        "steps": f"{plan.total} ({plan.epoch} an epoch), warm-up {plan.warmup}{shortened}, evaluation {evaluated}",
        "learning rate": f"peak {recipe.optim.lr:g}{_scaling_advice(recipe)}",
    }
    state_bytes = params * 4 * 4
    if activations := _activation_bytes(recipe, task, data):
        lines["memory"] = (
            f"about {(state_bytes + activations * micro) / 2**30:.1f} GiB a process in fp32: "
            f"{state_bytes / 2**30:.2f} weights, gradients and optimizer, "
            f"{activations / 2**20:.0f} MiB activations an image"
        )
    lines["time"] = (
        f"about {duration(seconds * batch * plan.total)} on this {device.type} by one process "
        f"({1 / seconds:.1f} images/s in a short trial), evaluation not counted"
    )
    lines["run"] = f"{folder.path}{' (exists)' if folder.record.exists() else ''}"
    free = shutil.disk_usage(existing_parent(folder.path)).free
    lines["disk"] = f"at most {disk_need(recipe, task) / 2**20:.0f} MiB for checkpoints, {free / 2**30:.1f} GiB free"
    return lines


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


def notice_many_passes(steps: build.Steps) -> None:
    """Says so where a schedule passes over the images far more often than any shipped recipe does."""
    if (passes := steps.total // max(1, steps.epoch)) > MANY_PASSES:
        notice(f"That is {passes:,} passes over the training images; --set schedule.length=N gives a shorter schedule.")


def remark_on_schedule(recipe: Recipe, steps: build.Steps) -> None:
    """Warns of parts of the schedule that the run does not reach, or that have no effect."""
    for line in schedule_remarks(recipe, steps):
        warn(line)


def schedule_remarks(recipe: Recipe, steps: build.Steps) -> list[str]:
    """What a schedule says and the run does not do, a sentence for each."""
    schedule = recipe.schedule
    length = f"{schedule.length} {schedule.unit}"
    remarks = []
    if schedule.kind == "multistep":
        at = list(zip(map(str, schedule.milestones), steps.milestones, strict=True))
        if missed := [milestone for milestone, step in at if step >= steps.total]:
            remarks.append(
                f"The run ends after {length}, at or before the milestones {', '.join(missed)}: the learning rate does "
                f"not fall there.{_scaled_milestones(recipe)}"
            )
        if early := [milestone for milestone, step in at if step <= 0]:
            remarks.append(f"The milestones {', '.join(early)} are before the first step.")
        if not at:
            remarks.append("schedule.kind is multistep without milestones: the learning rate never falls.")
    for key, kinds in USED_BY.items():
        value, default = getattr(schedule, key), type(schedule).model_fields[key].default
        if value != default and schedule.kind not in kinds:
            remarks.append(f"schedule.{key} has no effect: the schedule is {schedule.kind}, not {' or '.join(kinds)}.")
    if schedule.kind in USED_BY["min_lr"] and schedule.min_lr > recipe.optim.lr:
        remarks.append(f"schedule.min_lr {schedule.min_lr:g} is above optim.lr {recipe.optim.lr:g}: the rate rises.")
    if steps.shortened:
        given = f"{schedule.warmup:g} {schedule.warmup_unit}"
        remarks.append(f"The warm-up ({given}) was shortened to half of the run, {steps.warmup} steps.")
    if steps.eval_every > steps.total:
        remarks.append(
            f"train.eval_every ({recipe.train.eval_every} {schedule.unit}) is longer than the run ({length}): it is "
            "evaluated once, at the end."
        )
    return remarks


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
    return f" In proportion: --set schedule.milestones=[{','.join(map(str, scaled))}]"


def disk_need(recipe: Recipe, task: Task) -> int:
    """Bytes of a run's folder at its largest: three checkpoints while one is written, and the best weights."""
    weights = profile.count_params(task.model) * 4
    return weights * (3 * (4 if recipe.train.ema_decay is not None else 3) + 1)


def _activation_bytes(recipe: Recipe, task: Task, data: DataSplits) -> int:
    if recipe.spec.starts_from or recipe.model.name:
        return 0
    per_image = saved_activations(task, data.img_size)
    return per_image // 2 if math.isclose(engine.BYTES[recipe.train.precision], 2) else per_image


def saved_activations(task: Task, image: tuple[int, int]) -> int:
    """Bytes of activations kept for the backward pass of one image, fp32; counted on the meta device."""
    seen: dict[int, int] = {}

    def count(x: Tensor) -> Tensor:
        seen[id(x.untyped_storage())] = x.untyped_storage().nbytes()
        kept.append(x)  # alive, so that no id is used twice
        return x

    kept: list[Tensor] = []
    model = task.model
    was_training = model.training
    state = {
        name: torch.empty_like(value, device="meta").requires_grad_(value.is_floating_point())
        for name, value in [*model.named_parameters(), *model.named_buffers()]
    }
    own = {id(value.untyped_storage()) for value in state.values()}
    with torch.autograd.graph.saved_tensors_hooks(count, lambda x: x):
        torch.func.functional_call(model.train(), state, (torch.zeros(1, 3, *image, device="meta"),))
    model.train(was_training)
    return sum(size for storage, size in seen.items() if storage not in own)


def seconds_per_image(recipe: Recipe, data: DataSplits, task: Task, device: torch.device) -> float:
    """Forward and backward time of one training image, measured on a few batches of real data. Rough.

    Starts with 2 images and grows, up to the micro-batch, until a step takes TRIAL_SECONDS.
    """
    most = recipe.train.batch_size // (recipe.train.accumulate * dist.processes())
    size, seconds = 0, 0.0
    task.to(device).train()
    while size < most and seconds < TRIAL_SECONDS:
        size = min(4 * size or 2, most)
        batches = loader.TrainLoader(
            data.train, batch_size=size, accumulate=1, total_steps=2, seed=0, workers=0, collate=data.collate
        )
        for batch in batches.iterate(0):
            begun = time.perf_counter()
            losses = task(to_device(batch, device))
            torch.stack(list(losses.values())).sum().backward()
            if device.type == "cuda":
                torch.cuda.synchronize()
            seconds = time.perf_counter() - begun
    task.zero_grad(set_to_none=True)
    return seconds / size
