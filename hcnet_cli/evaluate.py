"""`hcnet evaluate`: scores the weights of a finished run by another protocol, without training."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Sequence
from typing import Any

from hcnet_cli import build, dist, engine, files, run, runs
from hcnet_cli import recipe as rcp
from hcnet_cli.console import UserError, notice, out, warn
from hcnet_cli.device import pick_device, use_cores
from hcnet_cli.privacy import host_id
from hcnet_cli.recipe import Recipe
from hcnet_cli.runs import RunFolder, RunInfo

ALLOWED = ("evaluation.", "data.path", "train.workers", "train.eval_batch_size")  # what may be set for an evaluation


def evaluate(
    folder: RunFolder, overrides: Sequence[tuple[str, Any, str]], names: Sequence[str], device: str, argv: Sequence[str]
) -> RunInfo:
    """Makes the evaluations `names` of the run's recipe (those that have no score yet, if none are named) and adds
    them to its record. The first evaluation is made again and compared with the record; nothing of it is replaced.

    UserError for a run that is not finished, for other data than the run's, and for an entry whose score is there and
    was made in another way.
    """
    info, recipe = _read(folder, overrides)
    first = next(iter(recipe.evaluation))
    set_now = [key.split(".")[1] for key, _, _ in overrides if key.startswith("evaluation.")]
    wanted = _wanted(info, recipe, names, set_now)
    _check_settings(info, recipe, wanted)
    _check_record(folder, info, adding=wanted != [first])
    where = pick_device(device)
    use_cores(where)
    with dist.process_group(where), dist.on_main(folder.lock):
        data = build.open_data(recipe)
        if data.info.digest != info.data.digest:
            raise UserError(
                f"{data.info.path} holds other data than the run was trained and validated on ({info.data.name}).",
                hint="Name the run's data with --data."
                if info.data.digest.startswith("v2")
                else "The run is of an older version, which knew data by names and sizes; train it again.",
            )
        task = build.build_task(recipe, data)
        build.load_own(task, folder.path)
        job = dataclasses.replace(build.build_job(recipe, data, task, where), ema=None)
        made = build.build_evaluations(recipe, task, data, when=("training", "end", "asked"))
        for evaluation in [one for one in made if one.name in wanted]:
            primary = evaluation.name == first
            notes = run.protocols([evaluation], first=primary)
            _check_protocol(info, notes, evaluation.name)
            how = f": {evaluation.task.protocol}" if evaluation.task.protocol else ""
            notice(f"Evaluating {evaluation.name} on {info.data.num_val} images of {info.data.name}{how}.")
            metrics, evaluator = engine.evaluate(job, evaluation)
            scores = run.suffixed(metrics, evaluation, first=primary)
            if dist.is_main():
                out.print("  ".join(f"{name} {value:.3f}" for name, value in scores.items()))
            if primary or scores.keys() <= info.metrics.keys():
                _compare(info, scores)
                continue
            if dist.is_main():
                engine.save_final(evaluator, folder.path / "final" / evaluation.name)
            commit, dirty = runs.git_state()
            settings = recipe.evaluation[evaluation.name].model_dump(mode="json")
            info.metrics |= scores
            info.metric_notes |= notes
            info.evaluations.append(
                {
                    "name": evaluation.name,
                    "settings": settings,
                    "argv": list(argv),
                    "at": runs.now(),
                    "git_commit": commit,
                    "git_dirty": dirty,
                    "host": host_id(),
                }
            )
        if dist.is_main() and wanted != [first]:
            files.write_text(folder.recipe_file, rcp.dump_yaml(recipe))
            info.recipe_digest = runs.text_digest(rcp.dump_yaml(recipe))
            folder.write(info)
    return info


def _read(folder: RunFolder, overrides: Sequence[tuple[str, Any, str]]) -> tuple[RunInfo, Recipe]:
    """Record and recipe of a finished run, the recipe with what the command line sets."""
    info = folder.require()
    if info.status != "finished":
        raise UserError(
            f"{folder.path} is not finished ({info.status} at step {info.steps_done} of {info.steps_total}).",
            hint="The command that started it goes on with it.",
        )
    recipe = rcp.resolve(folder.recipe_file).recipe
    first = next(iter(recipe.evaluation))
    own = recipe.model.digest
    if own and not any(key == "model.name" for key, _, _ in overrides):
        raise UserError(
            f"The model of this run is made by a file, {folder.model_file}, which runs only if you name it.",
            hint=f"Read the file, and give --model {shlex.quote(f'{folder.model_file}:{recipe.model.label}')}",
        )
    for key, _, source in overrides:
        key, _ = rcp.translate(key, None, recipe.task)
        if key.startswith(f"evaluation.{first}."):
            raise UserError(
                f"{source}: {first} is how the run's best weights were chosen, so it stays as it is.",
                hint=f"Give the new score a name: --set evaluation.NAME.{key.split('.', 2)[2]}=...",
            )
        if not key.startswith(ALLOWED) and not (own and key == "model.name"):
            raise UserError(f"{source}: an evaluation changes nothing but its own section, evaluation.NAME.KEY.")
    found = rcp.resolve(folder.recipe_file, overrides).recipe
    if (found.model.label, found.model.digest) != (recipe.model.label, own):
        raise UserError(
            f"{found.model.name} is not what made the model of this run: the file has changed, or it is another.",
            hint=f"The run's own copy: --model {shlex.quote(f'{folder.model_file}:{recipe.model.label}')}",
        )
    return info, found


def _check_record(folder: RunFolder, info: RunInfo, adding: bool) -> None:
    """UserError for files that contradict the record. A changed record is compared, but not added to."""
    if info.altered and not adding:
        warn(f"{folder.record} was changed after it was written: its checksum does not match.")
    elif reason := runs.contradiction(folder, info):
        raise UserError(reason, hint="Restore the file, or train the run again with --fresh.")


def _wanted(info: RunInfo, recipe: Recipe, names: Sequence[str], set_now: Sequence[str]) -> list[str]:
    """The evaluations to make: those named, else those without a score and those that the command line sets."""
    known = list(recipe.evaluation)
    for name in names:
        if name not in known:
            raise UserError(
                f'--on: this run has no evaluation "{name}" (known: {", ".join(known)}).',
                hint=f"A new one: --set evaluation.{name}.KEY=VALUE",
            )
    first, *further = known
    primary = recipe.spec.primary.key
    missing = [name for name in further if f"{primary}_{name}" not in info.metrics]
    return list(names) or list(dict.fromkeys([*missing, *set_now])) or [first]


def _check_settings(info: RunInfo, recipe: Recipe, wanted: Sequence[str]) -> None:
    """UserError where a recorded score was made with other settings than those of now."""
    for one in info.evaluations:
        name, before = str(one.get("name")), one.get("settings")
        if name not in wanted or name not in recipe.evaluation or not isinstance(before, dict):
            continue
        now = recipe.evaluation[name].model_dump(mode="json")
        if changed := [key for key in now if key != "when" and now[key] != before.get(key, now[key])]:
            raise UserError(
                f"The score {name} of this run was made with {changed[0]}={before[changed[0]]}, not {now[changed[0]]}.",
                hint=f"Give the new score another name than {name}: --set evaluation.NAME.{changed[0]}=...",
            )


def _check_protocol(info: RunInfo, notes: dict[str, str], name: str) -> None:
    for metric, protocol in notes.items():
        before = info.metric_notes.get(metric)
        if metric in info.metrics and before is not None and before != protocol:
            raise UserError(
                f"{metric} of this run was made as {before}, and would now be made as {protocol}.",
                hint=f"Give the new score another name than {name}: --set evaluation.NAME.KEY=VALUE",
            )


def _compare(info: RunInfo, scores: dict[str, float]) -> None:
    differing = run.differing_scores(info, scores)
    if not differing:
        notice("Equal to the run's record.")
        return
    raise UserError(
        f"The weights score otherwise than the run's record says: {differing}.",
        hint="Weights or data were changed, or another machine or version of PyTorch rounds differently.",
    )
