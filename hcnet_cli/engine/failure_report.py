"""What training leaves of a step whose loss or gradient was not finite, for `hcnet replay`."""

from __future__ import annotations

import math
import shlex
import shutil
from collections.abc import Iterable, Sequence
from typing import NamedTuple, NoReturn

from hcnet_cli import checkpoint, dist
from hcnet_cli.console import RunFailed
from hcnet_cli.engine.job import Batch, Job
from hcnet_cli.engine.state import State
from hcnet_cli.engine.step import NonFiniteGuard
from hcnet_cli.failure import RECORD, WEIGHTS, Failure, MicroBatch, Sample
from hcnet_cli.files import optional, write_text
from hcnet_cli.privacy import same_command
from hcnet_cli.runs import RunFolder
from hcnet_cli.weights import digest


class StepKeys(NamedTuple):
    """What this process's share of a step can be loaded from again: step key, samples and keys of each micro-batch."""

    step: int
    batches: list[tuple[int, list[int], list[int]]]


def step_keys(step: int, batches: Sequence[Batch]) -> StepKeys:
    """Of batches that are still in the host's memory."""
    return StepKeys(step, [(int(b["step_key"]), b["sample"].tolist(), b["key"].tolist()) for b in batches])


def report_non_finite(
    guard: NonFiniteGuard, recent: Iterable[StepKeys], job: Job, folder: RunFolder, state: State
) -> NoReturn:
    """Writes failure/ (weights, losses, samples and files of the step) and raises RunFailed, on every process.

    `state` is left at the step before it where no later one has moved the weights.
    """
    step, parts = guard.found()  # steps made before it
    later_steps = 0
    if job.precision == "fp16":  # the scaler left out this step alone
        later_steps = state.step - step - 1
    else:
        state.step = step
    shares = dist.gather([batch for keys in recent if keys.step == step for batch in keys.batches])
    if dist.is_main():
        _write(step, parts, shares, job, folder, later_steps)
    what = "gradient" if all(map(math.isfinite, parts.values())) else "loss"
    shown = ", ".join(f"{name} {value:g}" for name, value in parts.items())
    left = "the weights were left as they were before it"
    if later_steps:
        more = "1 more was" if later_steps == 1 else f"{later_steps} more were"
        left = f"it was left out, but {more} made before it was noticed"
    own = f" {folder.own_model(folder.require().model)}" if folder.model_file.exists() else ""
    goes_on = "resumes from the last checkpoint" if (folder.path / "last").exists() else "starts from the beginning"
    raise RunFailed(
        f"The {what} of step {step + 1} is not finite ({shown}); {left}.",
        hint=f"`hcnet replay {shlex.quote(str(folder.path))}{own}` names the module and the images. A lower --lr or "
        f"--precision fp32 often helps; {same_command()} {goes_on}.",
    )


def _write(
    step: int,
    parts: dict[str, float],
    shares: Sequence[Sequence[tuple[int, list[int], list[int]]]],
    job: Job,
    folder: RunFolder,
    later_steps: int,
) -> None:
    state = job.task.model.state_dict()
    failure = Failure(
        step=step,
        seed=job.seed,
        precision=job.precision,
        losses={name: str(value) for name, value in parts.items()},
        later_steps=later_steps,
        weights=digest(state),
        batches=[
            MicroBatch(
                process=process,
                step_key=step_key,
                samples=[
                    Sample(sample=sample, key=key, file=str(job.sample_path(sample)))
                    for sample, key in zip(samples, keys, strict=True)
                ],
            )
            for process, share in enumerate(shares)
            for step_key, samples, keys in share
        ],
    )
    place = folder.path / "failure"
    fresh = folder.path / ".failure.tmp"
    with optional(place):
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir()
        checkpoint.save_tensors(fresh / WEIGHTS, state, {**job.describe_weights, **job.identity, "step": step})
        write_text(fresh / RECORD, failure.model_dump_json(indent=1))
        shutil.rmtree(place, ignore_errors=True)
        fresh.rename(place)
