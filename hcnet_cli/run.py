"""One run, from a resolved recipe to a finished run folder: start or resume, train, evaluate, record."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import timm
import torch
import torchvision

from hcnet_cli import (
    build,
    dist,
    engine,
    files,
    finished,
    first_batches,
    optim,
    origin,
    own_model,
    plan,
    pretrained,
    profile,
    reading,
    rehearsal,
    runs,
    trial,
)
from hcnet_cli import recipe as rcp
from hcnet_cli.console import UserError, about, counted, duration, main_metrics, notice, out, warn
from hcnet_cli.cores import busy
from hcnet_cli.data.splits import DataSplits
from hcnet_cli.device import pick_device, pick_precision, use_cores
from hcnet_cli.engine import Task
from hcnet_cli.locks import of_slurm
from hcnet_cli.models import hub
from hcnet_cli.previous import check_finished, identity, notice_others, previous_record
from hcnet_cli.privacy import home, host_id, same_command
from hcnet_cli.recipe import Recipe, Resolved
from hcnet_cli.runs import RunFolder, RunInfo, Session
from hcnet_cli.scores import differing_scores, protocols, suffixed
from hcnet_cli.track import tracking
from hcnet_cli.values import place_typed
from hcnet_cli.weights import LoadReport

WAITING_TOO_LONG = 0.2  # share of the training time spent waiting for data


@dataclass(frozen=True)
class Options:
    """Where and how to run; nothing here can change a number."""

    results: Path = Path("results")
    name: str = ""
    device: str = "auto"
    fresh: bool = False
    dry_run: bool = False
    eval_only: bool = False
    profile: int = 0  # steps to time
    track: Sequence[str] = ()  # trackers to send the log to
    argv: Sequence[str] = ()


@dataclass(frozen=True)
class RunSetup:
    """A run before it starts: all is read and built, nothing is written."""

    folder: RunFolder
    recipe: Recipe
    data: DataSplits
    task: Task
    device: torch.device
    init: LoadReport | None  # what became of the weights that recipe.init names
    fingerprint: str
    source: str  # of the file of the user's own that makes the model, "" for another model


def train(resolved: Resolved, options: Options) -> tuple[Path, RunInfo | None, int]:
    """Trains (or goes on with, or plans, or evaluates) the run of a recipe.

    Returns its folder, its record (None after a dry run) and the number of the signal that stopped it, or 0.
    """
    device = pick_device(options.device)
    use_cores(device)
    with dist.process_group(device):
        setup = _setup(resolved, options, device)
        if options.eval_only:
            return setup.folder.path, _evaluate_only(setup, _describe(setup, options)), 0
        there = (setup.folder, setup.recipe, setup.data.info, setup.fingerprint, resolved.recipe)
        dist.from_main(lambda: notice_others(*there))
        if options.dry_run:
            if dist.is_main():
                plan.print_plan(setup.folder, setup.recipe, setup.data, setup.task, device, resolved)
            return setup.folder.path, None, 0
        info = _describe(setup, options)
        # what goes wrong on the main process, goes wrong on all
        with dist.on_main(setup.folder.lock), contextlib.ExitStack() as trackers:
            return _train_in(setup, info, options, trackers)


def _setup(resolved: Resolved, options: Options, device: torch.device) -> RunSetup:
    precision = pick_precision(resolved.recipe.train.precision, device)
    train_part = resolved.recipe.train.model_copy(update={"precision": precision})
    recipe = resolved.recipe.model_copy(update={"train": train_part})
    own = recipe.model.digest
    source = own_model.read_source(recipe.model.name, own) if own else ""
    optim.check_optimizer(recipe.optim.name, recipe.optim.args)
    data = reading.open_data(recipe, options.eval_only)
    if not options.eval_only:
        plan.check_enough_images(recipe, data)
    task = build.build_task(recipe, data)
    if not options.eval_only:
        build.check_trainable(task)
    recipe = recipe.model_copy(update={"init": dist.from_main(lambda: _find_init(recipe, options.results))})
    init = build.load_init(task, *build.read_init(recipe.init)) if recipe.init != "none" else None
    if init:
        init = dataclasses.replace(init, **origin.init_origin(recipe.init))
        origin.check(init, task, recipe, data, options.eval_only)
    fingerprint = runs.run_fingerprint(recipe, data.info.digest, init.digest if init else "")
    default = runs.run_name(recipe, data.info.name, fingerprint)
    folder = dist.from_main(lambda: runs.own_folder(options.results, options.name, default, fingerprint))
    if options.eval_only and init and not options.name and not folder.best.is_file():  # never in the way of training
        folder = RunFolder(folder.path.with_name(f"{folder.path.name}-evaluated"))
    recipe = _with_short_paths(recipe)
    return RunSetup(folder, recipe, data, task, device, init, fingerprint, source)


def _find_init(recipe: Recipe, results: Path) -> str:
    """What `init` means here; timm's weights are fetched now, if they are not in the cache."""
    if recipe.init != pretrained.TIMM:
        return pretrained.find_init(recipe, results)
    plan.remark_on_normalisation(recipe)
    return str(hub.pretrained_weights(recipe.model.name))


def _with_short_paths(recipe: Recipe) -> Recipe:
    """The recipe as it is kept: `~` for the home folder, so that a run that is shared does not name its user."""
    data = recipe.data.model_copy(update={"path": home(recipe.data.path or "")})
    model = recipe.model.model_copy(update={"name": home(recipe.model.name)})
    return recipe.model_copy(update={"data": data, "model": model, "init": home(recipe.init)})


def _train_in(
    run: RunSetup, info: RunInfo, options: Options, trackers: contextlib.ExitStack
) -> tuple[Path, RunInfo | None, int]:
    folder, recipe = run.folder, run.recipe
    fresh = options.fresh and not dist.from_main(lambda: folder.waited)  # what was waited for is fresh
    if fresh or dist.from_main(folder.is_cleared):
        if not fresh:
            notice(f"A --fresh was stopped while it cleared {folder.path}: the rest of the old run is removed.")
        dist.from_main(folder.clear)
    earlier = dist.from_main(lambda: previous_record(folder, info, recipe))
    if earlier is not None and earlier.status == "finished":
        dist.from_main(lambda: check_finished(folder, earlier))
        finished.notice_finished(folder, recipe, options.profile, options.track)
        return folder.path, earlier, 0
    dist.from_main(lambda: plan.check_disk(folder.path, recipe, run.task))
    job = build.build_job(recipe, run.data, run.task, run.device, identity(info))
    job.describe_weights = {**job.describe_weights, "config": info.config}
    job.profile = options.profile
    state = engine.restore(job, folder.path)
    if earlier is not None:
        if earlier.steps_done and not state.step:
            warn(f"{folder.path} had reached step {earlier.steps_done}, but has no checkpoint.")
            notice("Training starts from the beginning.")
            dist.from_main(folder.set_aside)
        info = info.model_copy(update={"started": earlier.started, "metrics": state.metrics})
    if folder.replaced.exists():
        notice(f"The weights of the run before are kept until this run has finished: {folder.replaced}")
    info.sessions = [*(earlier.all_sessions() if earlier else ()), _session(info, state.step)]
    info = with_progress(info, state)
    info.metric_notes = protocols(job.evaluations)
    info.kernels = list(job.kernels)
    _announce(run, info, state)
    seconds = rehearsal.rehearse(job, recipe, run.data, folder.path)
    _announce_time(run, info, state, seconds)
    if dist.is_main():
        _write_recipe(run, info)
        first_batches.show_data(job, folder, info, earlier, run.data)
        folder.rewind(state.step)
        folder.write(info)
        trackers.enter_context(tracking(folder, options.track))

    try:
        with trial.explaining_memory(recipe, run.device):
            stopped_by = engine.fit(job, folder, state, lambda state: folder.write(with_progress(info, state)))
        further = {} if stopped_by else _score_best_weights(job, folder)
    except BaseException as error:
        failed = not isinstance(error, KeyboardInterrupt)
        update = {"status": "failed" if failed else "interrupted", "error": str(error) if failed else ""}
        if dist.is_main():
            folder.write(with_progress(info, state).model_copy(update=update))
        raise
    info = with_progress(info, state)
    info.peak_memory_mb = round(profile.peak_memory_mb(run.device), 1)
    info.status = "interrupted" if stopped_by else "finished"
    info.stopped_early = not stopped_by and state.step < info.steps_total
    if not stopped_by:
        info.metrics |= further
        _note_changed_data(info, run)
        _measure_speed(info, run)
    info.finished = runs.now()
    if dist.is_main():
        if not stopped_by:
            folder.replaced.unlink(missing_ok=True)
        folder.write(info)
    dist.barrier()  # torchrun ends all processes once one has ended: none ends before the record is written
    _conclude(info, folder, stopped_by)
    return folder.path, info, stopped_by


def _write_recipe(run: RunSetup, info: RunInfo) -> None:
    """The recipe as the run has it, and a copy of the file of the user's own that makes its model."""
    text = rcp.dump_yaml(run.recipe)
    files.write_text(run.folder.recipe_file, text)
    info.recipe_digest = runs.text_digest(text)
    if run.source:
        files.write_text(run.folder.model_file, run.source)


# --- before -----------------------------------------------------------------------------------------------------------


def _describe(run: RunSetup, options: Options) -> RunInfo:
    recipe, data, task, device = run.recipe, run.data, run.task, run.device
    commit, dirty = runs.git_state()
    steps = build.steps_of_schedule(recipe, 0) if options.eval_only else build.steps(recipe, data)
    start: Any = {**vars(run.init), "source": home(run.init.source)} if run.init else {}
    return RunInfo(
        task=recipe.task,
        protocol=recipe.protocol,
        changes=rcp.changes(recipe),
        size="" if recipe.model.name else recipe.model.size,
        model=recipe.model.label if recipe.model.name else "",
        model_file=recipe.model.digest,
        variant=rcp.variant(recipe),
        seed=recipe.train.seed,
        fingerprint=run.fingerprint,
        config=rcp.config_digest(recipe, data.info.digest, (run.init.config or run.init.digest) if run.init else ""),
        data=data.info.model_copy(update={"path": home(data.info.path)}),
        steps_total=steps.total,
        steps_per_epoch=steps.epoch,
        batch_size=recipe.train.batch_size,
        params=profile.count_params(task.model),
        params_trained=profile.count_params(task.model, trained=True),
        class_weights=list(task.class_weights),
        macs=build.count_macs(recipe, task, data),
        macs_input="x".join(map(str, (3, *data.img_size))),
        img_size=min(plan.image_sides(recipe), default=None),
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        precision=recipe.train.precision,
        processes=dist.processes(),
        init=start,
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
        host=host_id(),
        **of_slurm(),
        started=runs.now(),
    )


def _session(info: RunInfo, from_step: int) -> Session:
    common = info.model_dump(include=Session.model_fields.keys() & RunInfo.model_fields.keys())
    return Session(**{**common, "from_step": from_step, "started": runs.now()})


def _announce(run: RunSetup, info: RunInfo, state: engine.State) -> None:
    label = (f"model {info.model}" if info.model else f"size {info.size}") + f" ({info.variant})" * bool(info.variant)
    notice(
        f"{info.protocol} · {label} · {info.data.name}: {info.data.num_train} training and "
        f"{info.data.num_val} validation images, {info.data.num_classes} classes"
    )
    length = counted(info.steps_total, "step")
    notice(f"{length} of {info.batch_size} · {info.device}, {info.precision} · {run.folder.path}")
    for line in info.data.remarks():
        notice(line)
    plan.notice_many_passes(run.recipe, build.steps(run.recipe, run.data))
    if run.recipe.train.compile and info.device == "cpu":
        notice("On a CPU, training is not faster compiled (docs/speed.md).")
    plan.remark_on_schedule(run.recipe, build.steps(run.recipe, run.data))
    for line in str(run.init).splitlines() if run.init else ():
        notice(line)
    plan.remark_on_training(run.recipe, run.task)
    if state.step:
        notice(f"Going on from step {state.step}.")


def _announce_time(run: RunSetup, info: RunInfo, state: engine.State, seconds: float) -> None:
    """How long the training takes, from the rehearsed step, and what would fit the data better."""
    left = plan.training_time(run.recipe, seconds, info.steps_total - state.step)
    if state.step < info.steps_total:
        to_go = " to go" if state.step else ""
        by = f", {dist.processes()} processes" if dist.processes() > 1 else ""
        notice(f"About {about(left)}{to_go} on this {run.device.type}{by}{busy()}, evaluation not counted.")
    if not state.step and dist.is_main():
        plan.notice_what_fits(run.recipe, run.data, left)


# --- after ------------------------------------------------------------------------------------------------------------


def with_progress(info: RunInfo, state: engine.State) -> RunInfo:
    """The record with what the run has reached."""
    images = (state.step * info.batch_size) / state.seconds if state.seconds else None
    return info.model_copy(
        update={
            "steps_done": state.step,
            "metrics": dict(state.metrics),
            "best_step": state.best_step,
            "weights": state.weights,
            "train_seconds": round(state.seconds, 1),
            "train_images_per_second": round(images, 2) if images else None,
            "data_wait_share": round(state.waited / state.seconds, 4) if state.seconds else None,
            "unreadable_images": len(state.unreadable_files),
        }
    )


def _note_changed_data(info: RunInfo, run: RunSetup) -> None:
    """Says in the record, and so under every table, that the data folder is no longer what training began with."""
    if reading.current_digest(run.recipe) != info.data.digest:
        note = f"The data folder {info.data.path} changed while the run {run.folder.path.name} trained."
        warn(f"{note} Its scores belong to no one state of the data.")
        info.data.notes.append(note)


def _measure_speed(info: RunInfo, run: RunSetup) -> None:
    """Inference images/s of the model, for the table, where the task's has such a column."""
    if not run.recipe.spec.times_inference or not dist.is_main():
        return
    assert info.img_size is not None
    try:
        speed = profile.inference_speed(run.task.model, info.img_size, run.device, info.precision, batch := 64)
    except Exception as error:  # too little memory for the batch, say: a column stays empty, the run is whole
        warn(f"The speed of inference could not be measured: {str(error).splitlines()[0] if str(error) else error!r}.")
        return
    info.images_per_second = speed
    info.speed_notes = f"inference, batch {batch}, {info.precision}, {info.device}, {torch.get_num_threads()} threads"


def _conclude(info: RunInfo, folder: RunFolder, stopped_by: int) -> None:
    shown = ", ".join(f"{name} {info.metrics[name]:.2f}" for name in main_metrics(info.metrics))
    if stopped_by:
        notice(f"Stopped at step {info.steps_done} of {info.steps_total}; everything is saved.")
        notice(f"{same_command().capitalize()} goes on from there.")
        return
    if info.stopped_early:
        notice(f"Stopped early at step {info.steps_done} of {info.steps_total}: no better score (train.patience).")
    notice(f"Finished in {duration(info.train_seconds)} of training. Best at step {info.best_step}: {shown}.")
    if info.train_seconds > 60 and (info.data_wait_share or 0) > WAITING_TOO_LONG:
        warn(f"{info.data_wait_share:.0%} of the training time went into waiting for data; more --workers may help.")
    if info.unreadable_images:
        warn(
            f"{info.unreadable_images} training images could not be read; others took their places. `hcnet check` "
            "names them."
        )
    results = place_typed(folder.path.parent.parent, "--results")
    notice(f"The run is in {folder.path}; `hcnet report{results}` prints the table.")


# --- scores -----------------------------------------------------------------------------------------------------------


def _score_best_weights(job: engine.Job, folder: RunFolder) -> dict[str, float]:
    """The evaluations that take place when training ends, of the best weights."""
    further = job.evaluations[1:]
    if not further:
        return {}
    build.load_own(job.task, folder.path)
    scores: dict[str, float] = {}
    for evaluation in further:
        notice(f"Evaluating the best weights as {evaluation.name}: {evaluation.task.protocol}.")
        metrics, evaluator = engine.evaluate(dataclasses.replace(job, ema=None), evaluation)
        scores |= suffixed(metrics, evaluation, first=False)
        if dist.is_main():
            engine.save_final(evaluator, folder.path / "final" / evaluation.name)
    return scores


def _evaluate_only(run: RunSetup, info: RunInfo) -> RunInfo:
    """Metrics, on the validation data, of the run's best weights; where nothing was trained, of those of --init.

    The latter become a finished run, the only thing that is written.
    """
    folder, recipe, task, init = run.folder, run.recipe, run.task, run.init
    earlier = dist.from_main(lambda: previous_record(folder, info, recipe))
    if folder.best.is_file() and not (earlier and earlier.evaluated_only):
        if earlier is None:
            raise UserError(
                f"{folder.path} has weights, but no run.json that says of what.",
                hint="Restore run.json, or name the weights with --init and the run with another --name.",
            )
        init = build.load_own(task, folder.path)
    elif init is None or (missing := build.lacking(init, task)):
        why = f", and {init.source} lacks {missing}" if init else ""
        raise UserError(
            f"There are no weights to evaluate: {folder.path} has no best.safetensors{why}.",
            hint="Train it first, or name whole weights with --init RUN, FILE.safetensors or FILE.pth.",
        )
    job = build.scoring_job(recipe, run.data, task, run.device, earlier.processes if earlier else 1)
    for line in str(init).splitlines():
        notice(line)
    notice(f"Evaluating on {info.data.num_val} images of {info.data.name}.")
    scored = [(one, *engine.evaluate(job, one)) for one in job.evaluations]
    metrics: dict[str, float] = {}
    for number, (one, found, _) in enumerate(scored):
        metrics |= suffixed(found, one, first=number == 0)
    if dist.is_main():
        out.print("  ".join(f"{name} {value:.3f}" for name, value in metrics.items()))
    if earlier is not None and (differing := differing_scores(earlier, metrics)):
        warn(f"The weights score otherwise than the run's record says: {differing}.")
    if earlier is None:
        info = info.model_copy(
            update={
                "status": "finished",
                "metrics": metrics,
                "metric_notes": protocols(job.evaluations),
                "evaluated_only": True,
                "finished": runs.now(),
                "steps_total": 0,
            }
        )
        with dist.on_main(folder.lock):
            if dist.is_main():
                _write_recipe(run, info)
                info.sessions = [_session(info, 0)]
                for number, (one, _, evaluator) in enumerate(scored):
                    engine.save_final(evaluator, folder.path / "final" / (one.name if number else ""))
                folder.write(info)
    return info
