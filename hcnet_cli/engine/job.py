"""The types between the engine and everything else: a task, its batches, its evaluations, and the job of one run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol, TypeAlias, TypeVar, cast

import torch
from PIL import Image
from timm.utils import ModelEmaV3
from torch import Tensor, nn

T = TypeVar("T")

BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}  # per element of an activation, by precision

# One micro-batch of B samples. `sample` [B] int64: data set indices; `key` [B] int64: the samples' keys (rng.py). The
# other entries are the task's own: tensors, or lists, tuples and dicts of them, which `to_device` moves.
Batch: TypeAlias = dict[str, Any]
# What a task's `predict` returns. Only the evaluator of the same task reads it.
Predictions: TypeAlias = Any


class Evaluator(Protocol):
    """Collects the predictions for a whole data set and turns them into metrics.

    `partial` is set for a part of the data set, before a run: metrics are of this part, and may be undefined in it.
    """

    partial: bool

    def update(self, predictions: Predictions, batch: Batch) -> None: ...

    def compute(self) -> dict[str, float]:
        """Metrics in per cent. Every process calls it; all get the same, whatever the number of processes."""
        ...

    def save(self, folder: Path) -> None:
        """Writes the predictions worth keeping into `folder` (main process). No run ends because this fails."""
        ...


class Task(nn.Module):
    """What is trained, around the model that checkpoints hold.

    `forward(batch)` returns named, weighted losses; training minimises their sum.
    """

    model: nn.Module
    primary: str  # the metric that decides which weights are best; higher is better
    protocol: str = ""  # how it is made, where there are several ways
    protocols: Mapping[str, str] = MappingProxyType({})  # how other metrics are made
    class_weights: Sequence[float] = ()  # in the loss, in the order of the classes, for the record; (): none

    def predict(self, batch: Batch) -> Predictions:
        """What the evaluator of the same task reads."""
        raise NotImplementedError

    def evaluator(self) -> Evaluator:
        raise NotImplementedError

    def draw_batch(self, batch: Batch, caption: str) -> Image.Image | None:
        """A picture of a training batch as the model gets it, with its labels, over a caption; None: there is none."""
        return None


class Predictor(Protocol):
    """Predictions for images without labels. One file of them at the end, in a form that other programs read."""

    task: Any  # the Task whose model predicts
    prepare: Callable[[Image.Image], Any]  # an image as evaluation sees it; pickled, since workers call it
    batch_size: int

    def predict(self, items: Sequence[Any], to_device: Callable[[Any], Any]) -> Sequence[Any]:
        """A prediction for each item of `prepare`."""
        ...

    def keep(
        self, folder: Path, name: str, file: str, size: tuple[int, int], prediction: Any, picture: str | None
    ) -> None:
        """Keeps what `finish` writes of one image, or writes it as `name` (NAME.png). Size: height, width. `picture`:
        the file of its picture in the folder; None where none is drawn.
        """
        ...

    def finish(self, folder: Path, about: dict[str, Any]) -> Sequence[Path]:
        """Writes the file of all predictions; `about` says which model made them. Returns the files and folders that
        hold the predictions.
        """
        ...

    def draw(self, image: Image.Image, prediction: Any, title: str) -> Image.Image: ...


class Graph(NamedTuple):
    """A module of tensors that `hcnet export` writes as a file.

    `example(count, size, generator)`: its inputs, random, for `count` images of a size (height, width), or for more and
    more boxes in one. `dynamic`: for each input the dimensions that may have any size, as torch.export takes them.
    `relative`: differences to PyTorch are counted in the largest value of an output, where that is above 1.
    """

    module: nn.Module
    inputs: Sequence[str]
    outputs: Sequence[str]
    example: Callable[[int, tuple[int, int], torch.Generator], tuple[Tensor, ...]]
    dynamic: Sequence[Mapping[int, Any]]
    relative: bool = False


class TrainBatches(Protocol):
    """Training data: `accumulate` micro-batches for each optimizer step."""

    unreadable: list[str]  # files that could not be read so far
    steps_per_epoch: int
    workers: int  # processes that load; 0: this one does
    loading: dict[str, float]  # seconds of "decode" and "augment" in all batches so far, summed over the workers

    def first(self, count: int, most: int) -> Iterator[tuple[Batch, int]]:
        """At most `most` samples of a micro-batch of each of the first `count` steps, and its whole size."""
        ...

    def iterate(self, start_step: int) -> Iterator[Batch]: ...


class EvalBatches(Sized, Iterable[Batch], Protocol):
    """One process's share of an evaluation set: every sample is in exactly one batch of one process."""

    def head(self, count: int) -> EvalBatches:
        """Batches of the first `count` samples of the share."""
        ...


@dataclass(frozen=True)
class Evaluation:
    """One way to score the model, by its name in the recipe.

    Its task has its own `predict` and `evaluator` and shares the model; the first evaluation's is the trained task.
    """

    name: str
    task: Task
    batches: EvalBatches


@dataclass
class Job:
    """Everything a run needs, as build.build_job makes it. Durations are in optimizer steps.

    The first of `evaluations` is made during training and decides which weights are best.
    """

    task: Task
    train: TrainBatches
    evaluations: Sequence[Evaluation]
    sample_path: Callable[[int], Any]  # the file of a training sample, by `str`
    optimizer: torch.optim.Optimizer
    lr_at: Callable[[int], float]
    total_steps: int
    batch_size: int  # of one optimizer step, over all processes and micro-batches
    accumulate: int
    eval_every: int
    log_every: int
    save_minutes: float
    clip_grad: float | None
    precision: str  # fp32, bf16 or fp16
    device: torch.device
    seed: int
    ema: ModelEmaV3 | None = None
    patience: int | None = None  # evaluations without a better score, after which training stops early
    describe_weights: Mapping[str, Any] = field(default_factory=dict)  # safetensors metadata of best.safetensors
    identity: Mapping[str, str] = field(default_factory=dict)  # of the run: kept in checkpoints, compared on restoring
    profile: int = 0  # steps to time by part
    kernels: Sequence[str] = ()  # the faster forms of layers that were applied, in words, for the record

    @property
    def weights(self) -> nn.Module:
        """The model whose weights are evaluated and kept: the moving average if there is one."""
        return self.ema.module if self.ema is not None else self.task.model


def to_device(value: T, device: torch.device) -> T:
    """A batch, or any nesting of dicts, lists and tuples, with its tensors moved; other values are kept."""
    moved: Any = value
    if isinstance(value, Tensor):
        moved = value.to(device, non_blocking=True)
    elif isinstance(value, dict):
        moved = {key: to_device(item, device) for key, item in value.items()}
    elif isinstance(value, (list, tuple)):
        moved = type(value)(to_device(item, device) for item in value)
    return cast(T, moved)


def autocast(precision: str, device: torch.device) -> AbstractContextManager[object]:
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
    return torch.autocast(device.type, dtype) if dtype else nullcontext()
