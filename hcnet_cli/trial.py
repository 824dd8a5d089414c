"""A few training steps on real data, before the first one that counts: their time and, on a GPU, their memory."""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hcnet_cli import dist, engine, profile
from hcnet_cli.console import RunFailed, UserError
from hcnet_cli.data import loader
from hcnet_cli.data.splits import DataSplits
from hcnet_cli.engine import Task, to_device
from hcnet_cli.privacy import same_command
from hcnet_cli.recipe import Recipe

QUICK_SECONDS = 2.0  # of the first step, below which it is made again for its time
TRIAL_SECONDS = 3.0  # of all steps but the first, which no larger batch is to exceed
NEARLY_FULL = 0.8  # of the device's memory, from which the micro-batch itself is tried
MOST_OF_MEMORY = 0.9  # of it, that advice fills: allocations leave gaps


def seconds_per_image(recipe: Recipe, data: DataSplits, task: Task, device: torch.device) -> float:
    """Forward and backward time of one training image, by a `trial`."""
    return trial(recipe, data, task, device).seconds


@dataclass(frozen=True)
class Trial:
    """What a few training steps cost. `memory`: bytes on the device at the peak of a whole step; None on a CPU, where
    `per_image` is what the backward pass needs of the forward pass.
    """

    seconds: float  # for an image
    memory: int | None = None
    per_image: float = 0.0  # bytes


def trial(recipe: Recipe, data: DataSplits, task: Task, device: torch.device) -> Trial:
    """Forward and backward passes of a few batches of real data. Rough.

    Starts with 2 images, twice where that is quick, for the first step takes longer; then grows, up to the micro-batch,
    while TRIAL_SECONDS last: the time of a few images is mostly that of a step. On a GPU the memory of the whole
    micro-batch follows from the last two sizes; if it would nearly fill the device, the micro-batch itself is tried.
    UserError for parameters that are not trained, and for a micro-batch that does not fit, with the number of
    micro-batches that does.
    """
    most = recipe.train.batch_size // (recipe.train.accumulate * dist.processes())
    task.to(device)
    fitting = 0
    peaks: dict[int, int] = {}
    saved: dict[int, int] = {}  # storage -> bytes that the first step keeps for its backward pass

    def keep(x: Tensor) -> Tensor:
        saved[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    def step(size: int) -> float:
        nonlocal fitting
        indices = [n * len(data.train) // size for n in range(size)]
        batch = loader.sample_batch(data.train, indices, recipe.train.seed, data.collate)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        begun = time.perf_counter()
        counting = contextlib.nullcontext() if saved else torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x)
        with alone(task, device):
            with counting, engine.autocast(recipe.train.precision, device):
                losses = task(to_device(batch, device))
            torch.stack([loss.float() for loss in losses.values()]).sum().backward()
        if device.type == "cuda":
            torch.cuda.synchronize()
            peaks[size] = torch.cuda.max_memory_allocated(device)
        fitting = size
        return time.perf_counter() - begun

    size = min(2, most)
    try:
        seconds = step(size)
        for one in task.parameters():
            saved.pop(one.untyped_storage().data_ptr(), None)
        activations = sum(saved.values()) / size
        engine.check_unused(task)
        if seconds < QUICK_SECONDS:
            seconds = step(size)
        spent = seconds
        while size < most and (spent + 4 * seconds < TRIAL_SECONDS or len(peaks) == 1):
            size = min(4 * size, most)
            seconds = step(size)
            spent += seconds
        found = _with_memory(seconds / size, peaks, most, recipe, task)
        if found.memory and size < most and found.memory > NEARLY_FULL * device_memory(device):
            step(most)
    except torch.OutOfMemoryError:
        if len(peaks) > 1:
            fitting = images_that_fit(peaks, _room(device, recipe, task))
        raise UserError(
            f"A micro-batch of {most} images does not fit into the memory of this {device.type}.",
            hint=memory_advice(recipe, min(most - 1, fitting)),
        ) from None
    finally:
        task.zero_grad(set_to_none=True)
    return found if found.memory else Trial(found.seconds, per_image=activations)


@contextlib.contextmanager
def alone(task: nn.Module, device: torch.device) -> Iterator[None]:
    """Batch norm inside has the statistics of this process's images: each process decides by its own clock and memory
    how many steps it tries, and a plan is made by the main process only. On a CPU, SyncBatchNorm refuses several
    processes without waiting for them.
    """
    synced = [m for m in task.modules() if isinstance(m, nn.SyncBatchNorm) and device.type == "cuda"]
    for module in synced:
        module.forward = functools.partial(nn.modules.batchnorm._BatchNorm.forward, module)  # type: ignore[method-assign]
    try:
        with dist.without_waiting():
            yield
    finally:
        for module in synced:
            del module.forward


def _with_memory(seconds: float, peaks: Mapping[int, int], most: int, recipe: Recipe, task: Task) -> Trial:
    """Memory is taken as linear in the images; the optimizer's state and the average come on top of a trial."""
    if not peaks:
        return Trial(seconds)
    last, per_image = max(peaks), _per_image(peaks)
    return Trial(seconds, int(peaks[last] + per_image * (most - last) + _later_state(recipe, task)), per_image)


def _per_image(peaks: Mapping[int, int]) -> float:
    """Bytes of one image more, from the two largest sizes."""
    *_, before, last = [0, *sorted(peaks)]
    return max(0.0, (peaks[last] - peaks[before]) / (last - before)) if before else 0.0


def _later_state(recipe: Recipe, task: Task) -> int:
    """Bytes of what a trial does not hold yet: the optimizer's two averages, and that of the weights."""
    return profile.count_params(task.model) * 4 * (2 if recipe.train.ema_decay is None else 3)


def _room(device: torch.device, recipe: Recipe, task: Task) -> int:
    return int(MOST_OF_MEMORY * device_memory(device)) - _later_state(recipe, task)


def images_that_fit(peaks: Mapping[int, int], room: int) -> int:
    """Images whose step takes at most `room` bytes, from the peaks of at least two numbers of images that fit."""
    last, per_image = max(peaks), _per_image(peaks)
    return max(last, int(last + (room - peaks[last]) / per_image)) if per_image else last


def device_memory(device: torch.device) -> int:
    """Bytes that this process can have: what is free, and what PyTorch holds already."""
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device)


@contextlib.contextmanager
def explaining_memory(recipe: Recipe, device: torch.device) -> Iterator[None]:
    """Turns memory that does not suffice during training into a RunFailed with the same advice as before it."""
    try:
        yield
    except torch.OutOfMemoryError:
        images = recipe.train.batch_size // (recipe.train.accumulate * dist.processes())
        raise RunFailed(
            f"The memory of this {device.type} did not suffice for a micro-batch of {images} images; "
            "the last checkpoint is whole.",
            hint=f"{memory_advice(recipe, images // 2)} {same_command().capitalize()} goes on from there.",
        ) from None


def memory_advice(recipe: Recipe, fitting: int) -> str:
    """What to type where a micro-batch does not fit: the smallest --accumulate whose micro-batches are at most
    `fitting` images, which the trial had room for; otherwise less memory for the same images.
    """
    share = recipe.train.batch_size // dist.processes()
    for parts in range(recipe.train.accumulate + 1, share // 2 + 1):
        if share % (2 * parts) == 0 and share // parts <= max(2, fitting):
            return f"--accumulate {parts} computes the same steps in micro-batches of {share // parts} images."
    return "Use --set model.grad_checkpointing=true, a smaller model or smaller images."
