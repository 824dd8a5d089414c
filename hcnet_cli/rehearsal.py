"""Before step 1: everything that a run needs later, once, on a few samples. What fails, fails before hours of training.

One training step, one evaluation of a few samples for each entry of the recipe, with what it saves and a picture, and
the weights as best.safetensors has them. All of it leaves weights, buffers, random generators and the run folder as
they were.
"""

from __future__ import annotations

import contextlib
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import nn

from hcnet_cli import checkpoint, dist, engine, trial
from hcnet_cli.console import UserError
from hcnet_cli.data.splits import DataSplits
from hcnet_cli.files import writing
from hcnet_cli.recipe import Recipe

T = TypeVar("T")
SAMPLES = 2  # of each process's share of the validation data, for the first evaluation; 1 for each further one


def rehearse(job: engine.Job, recipe: Recipe, data: DataSplits, folder: Path) -> float:
    """Rehearses the job; seconds of training for an image, by one process. UserError for what fails, on every process.

    Files are written into a folder inside the run's, which is removed at the end.
    """
    scratch = folder / ".rehearsal"
    if dist.is_main():
        shutil.rmtree(scratch, ignore_errors=True)  # of a rehearsal that was killed
    with unchanged(job.task):
        try:
            seconds = together("A training step", lambda: trial.seconds_per_image(recipe, data, job.task, job.device))
            for number, evaluation in enumerate(job.evaluations):
                _rehearse_evaluation(job, evaluation, 1 if number else SAMPLES, scratch)
            together("Saving the weights", lambda: _save(job, scratch))
        finally:
            if dist.is_main():
                shutil.rmtree(scratch, ignore_errors=True)
    return float(max(dist.gather(seconds)))


def _rehearse_evaluation(job: engine.Job, evaluation: engine.Evaluation, samples: int, scratch: Path) -> None:
    evaluator = evaluation.task.evaluator()
    evaluator.partial = True
    what = f"The evaluation {evaluation.name}".rstrip()
    batches = evaluation.batches.head(samples)
    together(what, lambda: engine.predict(job, evaluation, evaluator, batches))
    together(what, evaluator.compute)  # every process takes part in it
    if dist.is_main():
        place = scratch / evaluation.name
        with writing(place):
            place.mkdir(parents=True, exist_ok=True)
    together(what, lambda: evaluator.save(scratch / evaluation.name) if dist.is_main() else None)


def _save(job: engine.Job, scratch: Path) -> None:
    if dist.is_main():
        with writing(scratch):
            scratch.mkdir(parents=True, exist_ok=True)
        checkpoint.save_tensors(scratch / "best.safetensors", job.weights.state_dict(), dict(job.describe_weights))


def together(what: str, work: Callable[[], T]) -> T:
    """Does the work on every process; if it fails on one, all raise: none waits for another that has ended."""
    result, error = None, None
    try:
        result = work()
    except UserError as raised:
        error = raised
    except Exception as raised:
        reason = str(raised).strip().splitlines()[0].rstrip(".") if str(raised).strip() else ""
        error = UserError(
            f"{what} fails, as a rehearsal before training shows: {type(raised).__name__}: {reason}.",
            hint="HCNET_TRACEBACK=1 shows where.",
        )
        error.__cause__ = raised
    for found in dist.gather(error):
        if found is not None:
            raise found
    assert error is None
    return result  # type: ignore[return-value]


@contextlib.contextmanager
def unchanged(task: nn.Module) -> Iterator[None]:
    """Puts weights, buffers, gradients, the mode and all random generators back as they were, byte for byte."""
    tensors = [*task.parameters(), *task.buffers()]
    before = [tensor.detach().clone() for tensor in tensors]
    modes = {module: module.training for module in task.modules()}
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    devices = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, value in zip(tensors, before, strict=True):
                tensor.copy_(value)
                tensor.grad = None
        for module, mode in modes.items():
            module.training = mode
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(cpu)
        if devices:
            torch.cuda.set_rng_state_all(devices)
