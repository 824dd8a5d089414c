"""`hcnet replay`: computes again the step at which a run stopped, and names what is not finite in it first."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hcnet_cli import build, engine, kernels
from hcnet_cli.console import UserError, notice
from hcnet_cli.data.loader import SampleRequest, load_batch
from hcnet_cli.data.splits import DataSplits
from hcnet_cli.device import pick_device
from hcnet_cli.engine.nonfinite import Origin, Watch, culprits, largest_gradient, norm_is_finite
from hcnet_cli.engine.step import seed_step
from hcnet_cli.failure import Failure, MicroBatch, Sample
from hcnet_cli.recipe import Recipe
from hcnet_cli.runs import RunFolder, RunInfo
from hcnet_cli.weights import digest, read_weights

MOST_IMAGES = 8  # that are named; where more fail, an image is hardly the cause


@dataclass(frozen=True)
class Replayed:
    """What one precision gave. `origin` None: all was finite. `images`: the files without which it would be."""

    precision: str
    origin: Origin | None
    images: Sequence[str] = ()
    of: int = 0  # images of the micro-batch

    def lines(self) -> list[str]:
        """For people."""
        if self.origin is None:
            return [f"{self.precision}: everything is finite."]
        if len(self.images) >= min(MOST_IMAGES, self.of) > 1:
            cause = (
                f"At least {len(self.images)} of {self.of} images do it: the cause is in the weights or the precision."
            )
            return [f"{self.precision}: {self.origin}.", f"  {cause}"]
        return [f"{self.precision}: {self.origin}.", *(f"  {image}" for image in self.images)]


def replay(
    folder: RunFolder, info: RunInfo, recipe: Recipe, failure: Failure, weights: Path, device: str
) -> list[Replayed]:
    """The step in fp32 and in the run's precision, with its weights, samples and keys, on one process.

    UserError for data or weights that are not those of the step. Nothing is written.
    """
    where = pick_device(device)
    data = build.open_data(recipe)
    if data.info.digest != info.data.digest or max(s.sample for s in failure.samples) >= len(data.train):
        raise UserError(
            f"{data.info.path} holds other data than the run was trained on ({info.data.name}).",
            hint="Name the run's data with --data.",
        )
    state = read_weights(weights)
    if digest(state) != failure.weights:
        raise UserError(f"{weights} is damaged: its tensors are not those that training wrote.")
    task = build.build_task(recipe, data)
    try:
        task.model.load_state_dict(state)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{weights} does not fit {folder.recipe_file}: {reason}") from None
    task.to(where)
    if recipe.train.kernels:
        kernels.accelerate(task.model)
    precisions = ["fp32", failure.precision]
    if failure.precision == "fp16" and where.type == "cpu":
        notice("fp16 needs a GPU: the step is replayed in fp32 alone.")
        precisions.pop()
    step = _Step(failure, data, task, where)
    return [step.replay(precision) for precision in dict.fromkeys(precisions)]


@dataclass(frozen=True)
class _Step:
    failure: Failure
    data: DataSplits
    task: engine.Task
    device: torch.device

    def replay(self, precision: str) -> Replayed:
        """Micro-batch after micro-batch, each process's in its order, until something is not finite."""
        process = -1
        self.task.zero_grad(set_to_none=True)
        for batch in self.failure.batches:
            if batch.process != process:
                process = batch.process
                seed_step(self.failure.seed, self.failure.step, process)
            watch = Watch(self.task)
            total = self._total(batch, batch.samples, precision, watch.losses)
            if watch.origin is None:
                watch.backward(total)
            if watch.origin is not None:
                found = culprits(batch.samples, lambda some: self._fails(batch, some, precision), MOST_IMAGES)  # noqa: B023
                return Replayed(precision, watch.origin, [s.file for s in found], len(batch.samples))
        if norm_is_finite(self.task):
            return Replayed(precision, None)
        everything = self.failure.samples
        return Replayed(precision, largest_gradient(self.task), [s.file for s in everything], len(everything))

    def _fails(self, batch: MicroBatch, some: Sequence[Sample], precision: str) -> bool:
        """Whether the micro-batch is not finite where `some` of its samples, repeated, fill it."""
        size = len(batch.samples)
        seed_step(self.failure.seed, self.failure.step, batch.process)
        self.task.zero_grad(set_to_none=True)
        total = self._total(batch, (list(some) * size)[:size], precision, self.task)
        total.backward()
        return not (bool(total.isfinite()) and norm_is_finite(self.task))

    def _total(
        self,
        batch: MicroBatch,
        samples: Sequence[Sample],
        precision: str,
        losses: Callable[[dict[str, Any]], dict[str, Tensor]],
    ) -> Tensor:
        """The sum of the losses, as a share of the step's."""
        requests = [SampleRequest(sample.sample, sample.key, batch.step_key) for sample in samples]
        loaded = load_batch(self.data.train, requests, self.data.collate)
        with engine.autocast(precision, self.device):
            found = losses(engine.to_device(loaded, self.device))
        return reduce(torch.add, found.values()) / len(self.failure.batches)
