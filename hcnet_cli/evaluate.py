"""`hcnet evaluate`: scores the weights of a finished run by another protocol, without training."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from hcnet_cli import build, dist, engine, files, runs
from hcnet_cli import recipe as rcp
from hcnet_cli.console import UserError, notice, out
from hcnet_cli.device import pick_device, use_cores
from hcnet_cli.evaluation_request import EvaluationRequest
from hcnet_cli.privacy import host_id
from hcnet_cli.recipe import Recipe
from hcnet_cli.runs import RunFolder, RunInfo
from hcnet_cli.scores import differing_scores, protocols, suffixed


def evaluate(folder: RunFolder, request: EvaluationRequest, device: str, argv: Sequence[str]) -> RunInfo:
    """Makes the evaluations that are asked for and adds them to the run's record. The first evaluation is made again
    and compared with the record; nothing of it is replaced.

    UserError for other data than the run's, and for an entry whose score is there and was made in another way.
    """
    info, recipe, wanted = request
    first = next(iter(recipe.evaluation))
    where = pick_device(device)
    use_cores(where)
    with dist.process_group(where), dist.on_main(folder.lock):
        data = build.open_data(recipe)
        if data.info.digest != info.data.digest:
            raise UserError(
                f"{data.info.path} holds other data than the run was trained and validated on ({info.data.name}).",
                hint=_what_scores(folder, info, data.info.path),
            )
        task = build.build_task(recipe, data)
        build.load_own(task, folder.path)
        job = build.scoring_job(recipe, data, task, where, info.processes)
        for evaluation in build.build_evaluations(recipe, task, data, wanted):
            primary = evaluation.name == first
            notes = protocols([evaluation], first=primary)
            _check_protocol(info, notes, evaluation.name)
            how = evaluation.task.protocol or f"{info.data.num_val} images of {info.data.name}"
            notice(f"Evaluating {evaluation.name}: {how}.")
            metrics, evaluator = engine.evaluate(job, evaluation)
            scores = suffixed(metrics, evaluation, first=primary)
            if dist.is_main():
                out.print("  ".join(f"{name} {value:.3f}" for name, value in scores.items()))
            if primary or scores.keys() <= info.metrics.keys():
                _compare(info, scores)
                if primary and not info.altered and (missing := scores.keys() - info.metrics.keys()):
                    info.metrics |= {name: scores[name] for name in scores if name in missing}  # of an older version
                    info.metric_notes = notes | info.metric_notes
                    _record(folder, info, recipe)
                continue
            if dist.is_main():
                engine.save_final(evaluator, folder.path / "final" / evaluation.name)
            commit, dirty = runs.git_state()
            settings = recipe.evaluation[evaluation.name].model_dump(mode="json", exclude={"path"})
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
            _record(folder, info, recipe)
    return info


def _what_scores(folder: RunFolder, info: RunInfo, data: str) -> str:
    """What to do about data that are not the run's, for people."""
    if not info.data.digest.startswith("v2"):
        return "The run is of an older version, which knew data by names and sizes; train it again."
    words = [info.task, "--recipe", folder.recipe_file, "--eval-only", "--init", folder.path, "--data", data]
    command = shlex.join(map(str, ["hcnet", *words]))
    return f"--data is for the run's own data. Other data of the same classes are scored with: {command}"


def _record(folder: RunFolder, info: RunInfo, recipe: Recipe) -> None:
    """Writes what is known by now, from the main process: a later evaluation may be interrupted."""
    if dist.is_main():
        files.write_text(folder.recipe_file, rcp.dump_yaml(recipe))
        info.recipe_digest = runs.text_digest(rcp.dump_yaml(recipe))
        folder.write(info)


def _check_protocol(info: RunInfo, notes: dict[str, str], name: str) -> None:
    for metric, protocol in notes.items():
        before = info.metric_notes.get(metric)
        if metric in info.metrics and before is not None and before != protocol:
            raise UserError(
                f"{metric} of this run was made as {before}, and would now be made as {protocol}.",
                hint=f"Give the new score another name than {name}: --set evaluation.NAME.KEY=VALUE",
            )


def _compare(info: RunInfo, scores: dict[str, float]) -> None:
    differing = differing_scores(info, scores)
    if not differing:
        notice("Equal to the run's record.")
        return
    raise UserError(
        f"The weights score otherwise than the run's record says: {differing}.",
        hint="Weights or data were changed, or another machine or version of PyTorch rounds differently.",
    )
