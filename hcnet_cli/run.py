"""One run, from a resolved recipe to a finished run folder: plan, resume or start, train, record."""

from __future__ import annotations

import math
import os
import platform
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import rich.box
import rich.table
import safetensors
import timm
import torch
import torchvision

from hcnet_cli import build, dist, engine, files, optim, profile, runs
from hcnet_cli import recipe as rcp
from hcnet_cli.console import RunFailed, UserError, duration, notice, out, warn
from hcnet_cli.recipe import Recipe, Resolved
from hcnet_cli.runs import RunFolder, RunInfo
from hcnet_cli.weights import Account

WAITING_TOO_LONG = 0.2  # share of the training time spent waiting for data
MANY_PASSES = 1000  # over the training images: a schedule made for a larger data set


@dataclass(frozen=True)
class Options:
    """Where and how to run; nothing here can change a number."""

    results: Path = Path("results")
    name: str = ""
    device: str = "auto"
    fresh: bool = False
    dry_run: bool = False
    eval_only: bool = False
    argv: Sequence[str] = ()


@dataclass(frozen=True)
class Prepared:
    """A run before it starts: all is read and built, nothing is written. `account`: of the weights of `recipe.init`."""

    folder: RunFolder
    recipe: Recipe
    data: build.Data
    task: Any
    device: torch.device
    account: Account | None


def train(resolved: Resolved, options: Options) -> tuple[Path, RunInfo | None, int]:
    """Trains (or goes on with, or plans, or evaluates) the run of a recipe.

    Returns its folder, its record (None after a dry run) and the number of the signal that stopped it, or 0.
    """
    device = build.pick_device(options.device)
    if device.type == "cpu" and dist.world_size() > 1 and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // dist.world_size()))
    with dist.process_group(device):
        precision = build.pick_precision(resolved.recipe.train.precision, device)
        train_part = resolved.recipe.train.model_copy(update={"precision": precision})
        recipe = resolved.recipe.model_copy(update={"train": train_part})
        optim.check_optimizer(recipe.optim.name, recipe.optim.args)
        data = build.build_data(recipe)
        task = build.build_task(recipe, data)
        recipe = recipe.model_copy(update={"init": dist.from_main(lambda: runs.find_init(recipe, options.results))})
        account = build.load_init(task.model, *build.read_init(recipe.init)) if recipe.init != "none" else None
        contents = {"data": data.info.digest, **({"init": account.digest} if account else {})}
        fingerprint = rcp.fingerprint(recipe, **contents)
        name = options.name or runs.run_name(recipe, data.info.name, fingerprint)
        folder = RunFolder(options.results / "runs" / name)
        prepared = Prepared(folder, recipe, data, task, device, account)
        if options.dry_run:
            if dist.is_main():
                _print_plan(prepared, resolved)
            return folder.path, None, 0
        info = _describe(prepared, fingerprint, options)
        if options.eval_only:
            return folder.path, _evaluate_only(prepared, info), 0
        with dist.on_main(folder.lock):  # what goes wrong on the main process, goes wrong on all
            return _train_in(prepared, info, options)


def _train_in(run: Prepared, info: RunInfo, options: Options) -> tuple[Path, RunInfo | None, int]:
    folder, recipe, data, device = run.folder, run.recipe, run.data, run.device
    if options.fresh:
        dist.from_main(folder.clear)
    earlier = dist.from_main(lambda: _look_at_earlier(folder, info, recipe))
    if earlier is not None and earlier.status == "finished":
        dist.from_main(lambda: _check_best(folder))
        notice(f"This run is finished: {folder.path}")
        notice("Start it over with --fresh; `hcnet report` prints the table.")
        return folder.path, earlier, 0
    dist.from_main(lambda: _check_disk(run))
    job = build.build_job(recipe, data, run.task, device)
    state = engine.restore(job, folder.path)
    if earlier is not None:
        info = info.model_copy(update={"started": earlier.started, "metrics": state.metrics})
    info = _progressed(info, state)
    if dist.is_main():
        files.write_text(folder.recipe_file, rcp.dump_yaml(recipe))
        folder.rewind(state.step)
        folder.write(info)
    _announce(run, info, state)

    def on_evaluation(state: engine.State) -> None:
        folder.write(_progressed(info, state))

    try:
        stopped_by = engine.fit(job, folder, state, on_evaluation)
    except BaseException as error:
        failed = not isinstance(error, KeyboardInterrupt)
        update = {"status": "failed" if failed else "interrupted", "error": str(error) if failed else ""}
        if dist.is_main():
            folder.write(_progressed(info, state).model_copy(update=update))
        raise
    info = _progressed(info, state)
    info.peak_memory_mb = round(profile.peak_memory_mb(device), 1)
    if not stopped_by and isinstance(recipe.data, rcp.SceneParsing) and recipe.data.multi_scale:
        info.metrics |= _several_scales(job, recipe, data, folder)
    if stopped_by:
        info.status = "interrupted"
    else:
        info.status = "finished"
        _measure_speed(info, run)
    info.finished = runs.now()
    if dist.is_main():
        folder.write(info)
    _conclude(info, folder, stopped_by)
    return folder.path, info, stopped_by


# --- before -----------------------------------------------------------------------------------------------------------


def _look_at_earlier(folder: RunFolder, info: RunInfo, recipe: Recipe) -> RunInfo | None:
    """The record of an earlier run of this very recipe in the folder; UserError if the folder holds another's."""
    earlier = folder.read()
    if earlier is not None and earlier.fingerprint != info.fingerprint:
        theirs = rcp.resolve(folder.recipe_file).recipe if folder.recipe_file.exists() else None
        keys = rcp.differences(recipe, theirs, rcp.NOT_IN_FINGERPRINT) if theirs else {}
        shown = ", ".join(f"{key} ({b!r} there, {a!r} here)" for key, (a, b) in keys.items())
        raise UserError(
            f"{folder.path} holds a run of another recipe: {shown or 'the data or the initial weights differ'}.",
            hint="Choose another --name, or give --fresh to replace it.",
        )
    return earlier


def _check_best(folder: RunFolder) -> None:
    """UserError for a finished run whose weights are gone or cut short."""
    try:
        build.read_init(str(folder.path))
    except UserError as error:
        raise UserError(
            f"This run is finished, but its weights are lost: {error}", hint="Train it again with --fresh."
        ) from None


def _disk_need(run: Prepared) -> int:
    """Bytes of a run's folder at its largest: three checkpoints while one is written, and the best weights."""
    weights = profile.count_params(run.task.model) * 4
    return weights * (3 * (4 if run.recipe.train.ema_decay is not None else 3) + 1)


def _check_disk(run: Prepared) -> None:
    """UserError before hours of training whose result could not be kept."""
    folder = run.folder.path
    need, there = _disk_need(run), sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
    free = shutil.disk_usage(folder).free
    if free + there < need:
        raise UserError(
            f"The disk has too little space for this run: its checkpoints need about {(need - there) / 2**20:.0f} MiB "
            f"in {folder}, {free / 2**20:.0f} MiB are free.",
            hint="Free some space, or choose another place with --out.",
        )


def _describe(run: Prepared, fingerprint: str, options: Options) -> RunInfo:
    recipe, data, task, device, account = run.recipe, run.data, run.task, run.device, run.account
    commit, dirty = runs.git_state()
    return RunInfo(
        task=recipe.task,
        protocol=recipe.protocol,
        changes=rcp.changes(recipe),
        size=recipe.model.size,
        variant=rcp.variant(recipe),
        seed=recipe.train.seed,
        fingerprint=fingerprint,
        data=data.info,
        steps_total=data.steps(recipe).total,
        batch_size=recipe.train.batch_size,
        params=profile.count_params(task.model),
        macs=build.macs(task, data),
        macs_input="x".join(map(str, (3, *data.img_size))),
        img_size=data.img_size[0],
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        precision=recipe.train.precision,
        processes=dist.processes(),
        init=vars(account) if account else {},
        metric_notes=_how_measured(task, data, recipe),
        git_commit=commit,
        git_dirty=dirty,
        argv=list(options.argv),
        versions={
            "python": platform.python_version(),
            "torch": torch.__version__,
            "torchvision": torchvision.__version__,
            "timm": timm.__version__,
            "safetensors": safetensors.__version__,
        },
        machine=f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        host=platform.node(),
        started=runs.now(),
    )


def _how_measured(task: Any, data: build.Data, recipe: Recipe) -> dict[str, str]:
    """How each score that has several protocols is made, for the tables."""
    if not isinstance(recipe.data, rcp.SceneParsing):
        return {}
    tasks = [task]
    if recipe.data.multi_scale:
        tasks.append(build.several_scales(recipe, data, task.model))
    return {one.primary: one.protocol for one in tasks}


def _announce(run: Prepared, info: RunInfo, state: engine.State) -> None:
    label = info.size + (f" ({info.variant})" if info.variant else "")
    notice(
        f"{info.protocol} · size {label} · {info.data.name}: {info.data.num_train} training and "
        f"{info.data.num_val} validation images, {info.data.num_classes} classes"
    )
    notice(f"{info.steps_total} steps of {info.batch_size} · {info.device}, {info.precision} · {run.folder.path}")
    _tell_passes(info.steps_total, info.batch_size, info.data.num_train)
    if run.recipe.train.compile and info.device == "cpu":
        notice("On a CPU, training is not faster compiled (docs/speed.md).")
    if run.data.steps(run.recipe).shortened:
        notice("The warm-up was shortened to half of the run.")
    if run.account:
        notice(str(run.account))
    if state.step:
        notice(f"Going on from step {state.step}.")


def _tell_passes(steps: int, batch_size: int, images: int) -> None:
    if (passes := steps * batch_size // images) > MANY_PASSES:
        notice(f"That is {passes:,} passes over the training images; --set schedule.length=N gives a shorter schedule.")


# --- after ------------------------------------------------------------------------------------------------------------


def _progressed(info: RunInfo, state: engine.State) -> RunInfo:
    images = (state.step * info.batch_size) / state.seconds if state.seconds else None
    return info.model_copy(
        update={
            "steps_done": state.step,
            "metrics": state.metrics,
            "best_step": state.best_step,
            "train_seconds": round(state.seconds, 1),
            "train_images_per_second": round(images, 2) if images else None,
            "data_wait_share": round(state.waited / state.seconds, 4) if state.seconds else None,
            "unreadable_images": state.unreadable,
        }
    )


def _measure_speed(info: RunInfo, run: Prepared) -> None:
    """Inference images/s of the classifier, for the table."""
    if info.task != "pretrain" or not dist.is_main():
        return
    model, batch = run.task.model, 64
    assert info.img_size is not None
    model.set_grad_checkpointing(False)
    rate = profile.throughput(
        model, info.img_size, batch_size=batch, seconds=1.0, device=run.device, precision=info.precision
    )
    info.images_per_second = round(rate, 1)
    info.speed_notes = f"inference, batch {batch}, {info.precision}, {info.device}, {torch.get_num_threads()} threads"


def _conclude(info: RunInfo, folder: RunFolder, stopped_by: int) -> None:
    shown = ", ".join(f"{name} {value:.2f}" for name, value in list(info.metrics.items())[:6])
    if stopped_by:
        notice(f"Stopped at step {info.steps_done} of {info.steps_total}; everything is saved.")
        notice("The same command goes on from there.")
        return
    notice(f"Finished in {duration(info.train_seconds)} of training. Best at step {info.best_step}: {shown}.")
    if info.train_seconds > 60 and (info.data_wait_share or 0) > WAITING_TOO_LONG:
        warn(f"{info.data_wait_share:.0%} of the training time went into waiting for data; more --workers may help.")
    if info.unreadable_images:
        warn(
            f"{info.unreadable_images} training images could not be read; others took their places. `hcnet check "
            f"{info.data.path}` names them."
        )
    notice(f"The run is in {folder.path}; `hcnet report` prints the table.")


def _several_scales(job: engine.Job, recipe: Recipe, data: build.Data, folder: RunFolder) -> dict[str, float]:
    """mIoU_ms and its companions, of the best weights."""
    notice("Evaluating the best weights at several scales.")
    build.load_init(job.task.model, *build.read_init(str(folder.path)))
    job.ema = None  # the best weights, just loaded, are those of the moving average
    metrics, _ = engine.evaluate(job, build.build_multi_scale(recipe, data, job))
    return metrics


def _lacking(account: Account, task: Any) -> str:
    """What weights that were loaded lack of the task's, for people; "" where they are whole."""
    names = sorted({*account.missing, *account.reinitialised})
    if account.total < len(task.model.state_dict()):
        names.insert(0, "the head")
    return ", ".join(names[:5])


def _evaluate_only(run: Prepared, info: RunInfo) -> RunInfo:
    """Metrics, on the validation data, of the run's best weights; where nothing was trained, of those of --init.

    The latter become a finished run, the only thing that is written.
    """
    folder, recipe, data, task, account = run.folder, run.recipe, run.data, run.task, run.account
    if folder.best.is_file():
        account = build.load_init(task.model, *build.read_init(str(folder.path)))
    elif account is None or (lacking := _lacking(account, task)):
        why = f", and {account.source} lacks {lacking}" if account else ""
        raise UserError(
            f"There are no weights to evaluate: {folder.path} has no best.safetensors{why}.",
            hint="Train it first, or name whole weights with --init RUN, FILE.safetensors or FILE.pth.",
        )
    earlier = dist.from_main(lambda: _look_at_earlier(folder, info, recipe))
    job = build.build_job(recipe, data, task, run.device)
    job.ema = None
    notice(str(account))
    notice(f"Evaluating on {info.data.num_val} images of {info.data.name}.")
    metrics, evaluator = engine.evaluate(job, job.evaluations[0])
    if isinstance(recipe.data, rcp.SceneParsing) and recipe.data.multi_scale:
        metrics |= engine.evaluate(job, build.build_multi_scale(recipe, data, job))[0]
    if dist.is_main():
        out.print("  ".join(f"{name} {value:.3f}" for name, value in metrics.items()))
    if earlier is None:
        info = info.model_copy(
            update={"status": "finished", "metrics": metrics, "evaluated_only": True, "finished": runs.now()}
        )
        info.steps_total = 0
        with dist.on_main(folder.lock):
            if dist.is_main():
                files.write_text(folder.recipe_file, rcp.dump_yaml(recipe))
                (folder.path / "final").mkdir(exist_ok=True)
                evaluator.save(folder.path / "final")
                folder.write(info)
    return info


# --- the plan ---------------------------------------------------------------------------------------------------------


def _print_plan(run: Prepared, resolved: Resolved) -> None:
    """What would happen, on standard output: every value with its origin, batches, learning rate, cost, place."""
    recipe, data, task, device, folder = run.recipe, run.data, run.task, run.device, run.folder
    plan, batch = data.steps(recipe), recipe.train.batch_size
    table = rich.table.Table("key", "value", "from", box=rich.box.SIMPLE_HEAD, pad_edge=False)
    asked = rcp.flatten(resolved.recipe.model_dump(mode="json"))
    for key, value in rcp.flatten(recipe.model_dump(mode="json")).items():
        source = "auto" if asked[key] == "auto" else resolved.sources.get(key, "recipe")
        table.add_row(key, "–" if value is None else str(value), source)
    out.print(table)
    micro = batch // (recipe.train.accumulate * dist.processes())
    params, macs = profile.count_params(task.model), build.macs(task, data)
    size = "x".join(map(str, data.img_size))
    lines = [
        ("data", f"{data.info.name}: {data.info.num_train} training, {data.info.num_val} validation images, "
                 f"{data.info.num_classes} classes ({data.info.path})"),
        ("model", f"{params / 1e6:.2f} M parameters, {macs / 1e9:.2f} G MACs at {size} "
                  "(convolutions, linear layers, matrix products)"),
        ("batch", f"{batch} = {micro} x {recipe.train.accumulate} micro-batches x {dist.processes()} processes"),
        ("steps", f"{plan.total} ({plan.epoch} an epoch), warm-up {plan.warmup}"
                  + (" (shortened to half of the run)" if plan.shortened else "")
                  + f", evaluation {f'every {plan.eval_every}' if plan.eval_every < plan.total else 'at the end'}"),
        ("learning rate", f"peak {recipe.optim.lr:g}" + _scaling_advice(recipe)),
    ]  # fmt: skip
    state_bytes = params * 4 * 4
    activations = _activation_bytes(task, data, recipe)
    if activations:
        lines.append(
            ("memory", f"about {(state_bytes + activations * micro) / 2**30:.1f} GiB a process in fp32: "
                       f"{state_bytes / 2**30:.2f} weights, gradients and optimizer, "
                       f"{activations / 2**20:.0f} MiB activations an image")
        )  # fmt: skip
    notice("Timing some small batches ...")
    per_image = build.seconds_per_image(recipe, data, task, device)
    lines.append(
        ("time", f"about {duration(per_image * batch * plan.total)} on this {device.type} by one process "
                 f"({1 / per_image:.1f} images/s in a short trial), evaluation not counted")
    )  # fmt: skip
    lines.append(("run", f"{folder.path}" + (" (exists)" if folder.record.exists() else "")))
    free, need = shutil.disk_usage(files.existing_parent(folder.path)).free, _disk_need(run)
    lines.append(("disk", f"at most {need / 2**20:.0f} MiB for checkpoints, {free / 2**30:.1f} GiB free"))
    for name, text in lines:
        out.print(f"{name + ':':<15}{text}", markup=False)
    _tell_passes(plan.total, batch, data.info.num_train)
    if free < need:
        warn("The disk has too little space for this run's checkpoints.")


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


def _activation_bytes(task: Any, data: build.Data, recipe: Recipe) -> int:
    if recipe.task != "pretrain":
        return 0
    per_image = build.saved_activations(task, data.img_size)
    return per_image // 2 if math.isclose(engine.BYTES[recipe.train.precision], 2) else per_image


__all__ = ["Options", "RunFailed", "train"]
