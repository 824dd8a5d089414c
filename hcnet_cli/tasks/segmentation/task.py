"""Semantic segmentation: per-pixel cross-entropy, and label maps at the size of the original image.

Dimension letters: B batch, K classes, H x W the label's size, h x w the network's input.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from hcnet_cli import pictures, profile
from hcnet_cli.console import UserError
from hcnet_cli.data.balance import class_weights
from hcnet_cli.data.images import read_image, to_picture
from hcnet_cli.data.loader import Collate, RequestDataset
from hcnet_cli.data.splits import DataSplits
from hcnet_cli.engine import Task
from hcnet_cli.engine.finite import require_finite
from hcnet_cli.rng import keyed_uniform
from hcnet_cli.schema import IMAGENET_MEAN, IMAGENET_STD, NORMALISATION, DataPart, EvaluationPart, Part
from hcnet_cli.tasks.segmentation.metric import MeanIoU, legend
from hcnet_cli.tasks.segmentation.scene_parsing import EvalScenes, SceneSplits
from hcnet_cli.tasks.segmentation.spec import SceneEvaluation, SceneParsing
from hcnet_cli.tasks.segmentation.spec import UPerNet as Head
from hcnet_cli.tasks.segmentation.upernet import UPerNet, resize

MAX_ELEMENTS = 2**24  # of a temporary at full resolution: 64 MiB


class SegmentationTask(Task):
    """`model` is a UPerNet. A training batch has `image` [B, 3, S, S], `label` [B, S, S] uint8 and `key` [B].

    An evaluation batch has, for each sample, a list of `images` ([3, h, w], one for each scale) and a
    `label` [H, W]. With several images, or `flip`, the probabilities of all passes are averaged. `mode`:
    the network sees the "whole" image, or windows of `crop_size` every `stride` pixels ("slide") whose
    logits are averaged where they overlap.

    A second task on the same model can evaluate it in another way, such as at several scales.
    """

    primary = "mIoU"
    weights: Tensor | None

    def __init__(
        self,
        model: nn.Module,
        class_names: Sequence[str],
        *,
        aux_weight: float = 0.4,
        class_weights: Sequence[float] = (),
        ignore_index: int = 255,
        mode: Literal["whole", "slide"] = "whole",
        crop_size: int = 512,
        stride: int = 341,
        flip: bool = False,
        protocol: str = "",
        num_pictures: int = 8,
        read: Callable[[str], Image.Image] = read_image,
        normalisation: tuple[Sequence[float], Sequence[float]] = (IMAGENET_MEAN, IMAGENET_STD),
    ) -> None:
        super().__init__()
        self.model: Any = model
        self.class_names = tuple(class_names)
        self.aux_weight = aux_weight
        self.class_weights = tuple(class_weights)
        self.register_buffer("weights", torch.tensor(self.class_weights) if class_weights else None, persistent=False)
        self.ignore_index = ignore_index
        self.mode = mode
        self.crop_size = crop_size
        self.stride = stride
        self.flip = flip
        self.protocol = protocol
        self.num_pictures = num_pictures
        self.read = read
        self.normalisation = normalisation  # mean and std of the pixels

    def forward(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        key = batch["key"]
        image = batch["image"].contiguous(memory_format=torch.channels_last)
        noise = keyed_uniform(key, self.model.backbone.num_blocks) if self.model.pyramid.takes_noise else None
        dropout_noise = keyed_uniform(key, self.model.num_dropout, stream=1)
        logits, aux = self.model(image, noise, dropout_noise)
        return {
            "loss_decode": self.pixel_loss(logits, batch["label"]),
            "loss_aux": self.aux_weight * self.pixel_loss(aux, batch["label"]),
        }

    def pixel_loss(self, logits: Tensor, label: Tensor) -> Tensor:
        """Cross-entropy averaged over all pixels, ignored ones counting as zero (the reference's default).

        So the mean over micro-batches is the mean over the batch, however much of each is ignored, and however the
        classes are weighted.
        """
        logits = resize(logits.float(), label.shape[1:])  # [B, K, S/4, S/4] -> [B, K, S, S]
        total = F.cross_entropy(logits, label.long(), self.weights, ignore_index=self.ignore_index, reduction="sum")
        return total / label.numel()

    def predict(self, batch: dict[str, Any]) -> list[Tensor]:
        """Class indices [H, W] uint8 for each sample. One image at a time: sizes differ, and padding would
        be seen.
        """
        return [
            label_map([view for image in images for view in self.views(image)], label.shape)
            for images, label in zip(batch["images"], batch["label"], strict=True)
        ]

    def views(self, image: Tensor) -> list[View]:
        """Passes over one image [3, h, w]: as it is and, with `flip`, mirrored."""
        height, width = image.shape[1:]
        crop = (self.crop_size, self.crop_size) if self.mode == "slide" else (height, width)
        boxes = windows(height, width, crop, self.stride)
        views = []
        for flipped in (False, True) if self.flip else (False,):
            seen = image.flip(-1) if flipped else image
            logits = [self._logits(seen[:, top : top + crop[0], left : left + crop[1]]) for top, left, *_ in boxes]
            views.append(View((height, width), boxes, logits, flipped))
        return views

    def _logits(self, image: Tensor) -> Tensor:
        """[3, h, w] -> [K, h/4, w/4]."""
        return self.model(image[None].contiguous(memory_format=torch.channels_last))[0].float()

    def draw_batch(self, batch: dict[str, Any], caption: str) -> Image.Image:
        """See engine.Task: each image beside its labels."""
        colours, tiles = pictures.palette(len(self.class_names)), []
        areas = np.zeros(256, dtype=np.int64)
        ignored = False
        for image, label in zip(batch["image"], batch["label"].cpu().numpy(), strict=True):
            picture = to_picture(image, *self.normalisation)
            counted = label[label != self.ignore_index]
            areas += np.bincount(counted, minlength=256)
            ignored |= counted.size < label.size
            labelled = pictures.draw_classes(picture, label, colours, self.ignore_index, pictures.TILE)
            tiles.append(pictures.beside([pictures.enlarged(picture, pictures.TILE), labelled]))
        return pictures.grid(tiles, 4, caption, legend(areas, self.class_names, ignored))

    def evaluator(self) -> MeanIoU:
        return MeanIoU(
            self.class_names,
            ignore_index=self.ignore_index,
            num_pictures=self.num_pictures,
            protocol=self.protocol,
            read=self.read,
        )


def windows(height: int, width: int, crop: tuple[int, int], stride: int) -> list[tuple[int, int, int, int]]:
    """(top, left, height, width) of windows that cover the image; the last of a row is moved back inside
    it.
    """

    def starts(side: int, size: int) -> list[int]:
        count = -(-max(side - size, 0) // stride) + 1
        return [max(min(i * stride, side - size), 0) for i in range(count)]

    return [
        (top, left, min(crop[0], height), min(crop[1], width))
        for top in starts(height, crop[0])
        for left in starts(width, crop[1])
    ]


@dataclass
class View:
    """What one pass over a (resized, perhaps mirrored) image left: the logits of its windows, at stride 4."""

    size: tuple[int, int]
    boxes: list[tuple[int, int, int, int]]
    logits: list[Tensor]  # [K, h/4, w/4] each
    flipped: bool

    def at(self, size: Sequence[int], classes: slice) -> Tensor:
        """Logits of some classes at the original size and unmirrored, [k, H, W]: window -> input size -> H
        x W.
        """
        first = self.logits[0]
        if len(self.boxes) == 1:
            full = resize(first[None, classes], self.size)
        else:
            full = first.new_zeros(1, first[classes].shape[0], *self.size)
            times = first.new_zeros(self.size)
            for (top, left, height, width), logits in zip(self.boxes, self.logits, strict=True):
                place = (slice(top, top + height), slice(left, left + width))
                full[(..., *place)] += resize(logits[None, classes], (height, width))
                times[place] += 1
            full /= times
        full = resize(full, size)[0]
        return full.flip(-1) if self.flipped else full


def label_map(views: Sequence[View], size: Sequence[int]) -> Tensor:
    """The class with the highest mean probability at each pixel, [H, W] uint8.

    Scores at full resolution exist for a few classes at a time, so memory does not grow with K x H x W: a
    first sweep over the classes finds each view's softmax denominator, a second one the best class. A
    single view needs no denominator, its largest logit wins. UserError for logits that are not finite.
    """
    require_finite(*(logits for view in views for logits in view.logits))
    num_classes = views[0].logits[0].shape[0]
    largest = max(size[0] * size[1], *(view.size[0] * view.size[1] for view in views))
    step = max(1, MAX_ELEMENTS // largest)
    chunks = [slice(start, min(start + step, num_classes)) for start in range(0, num_classes, step)]
    denominators: list[Tensor | None] = [None for _ in views]
    if len(views) > 1:
        for i, view in enumerate(views):
            total: Tensor | None = None
            for chunk in chunks:
                part = view.at(size, chunk).logsumexp(dim=0)  # [k, H, W] -> [H, W]
                total = part if total is None else torch.logaddexp(total, part)
            denominators[i] = total
    best = views[0].logits[0].new_full(tuple(size), -torch.inf)
    winner = best.new_zeros(tuple(size), dtype=torch.uint8)
    for chunk in chunks:
        score: Tensor | float = 0.0
        for view, denominator in zip(views, denominators, strict=True):
            logits = view.at(size, chunk)
            score = score + (logits if denominator is None else (logits - denominator).exp())
        assert isinstance(score, Tensor)
        value, index = score.max(dim=0)  # [k, H, W] -> [H, W]
        better = value > best
        winner = torch.where(better, (index + chunk.start).to(torch.uint8), winner)
        best = torch.where(better, value, best)
    return winner


def protocol(
    img_scale: tuple[int, int],
    *,
    ratios: Sequence[float] = (1.0,),
    flip: bool = False,
    mode: str = "whole",
    crop_size: int = 512,
    stride: int = 341,
) -> str:
    """How a score was made, for tables: "ss, whole, 2048x512" or "ms 0.5-1.75 + flip, slide 512/341,
    2048x512".
    """
    scales = "ss" if tuple(ratios) == (1.0,) else f"ms {min(ratios):g}-{max(ratios):g}"
    how = mode if mode == "whole" else f"slide {crop_size}/{stride}"
    return f"{scales}{' + flip' if flip else ''}, {how}, {img_scale[0]}x{img_scale[1]}"


def count_macs(task: SegmentationTask, size: tuple[int, int] = (512, 2048)) -> int:
    """Multiply-accumulates for one image of `size` (height, width), without the auxiliary head, as the tables count."""
    return profile.count_macs(task.model, torch.zeros(1, 3, *size))


def build_task(
    head: Part,
    config: DataPart,
    evaluation: EvaluationPart,
    data: DataSplits,
    backbone: Callable[[int], nn.Module],
    micro_batch: int,
) -> SegmentationTask:
    """See hcnet_cli/build.py."""
    assert isinstance(head, Head)
    if micro_batch < 2:
        raise UserError(
            f"UPerNet trains on two or more images at a time (its batch norm sees 1 x 1 maps), not on {micro_batch}.",
            hint="Choose a larger --batch-size or fewer micro-batches (--accumulate).",
        )
    model = UPerNet(backbone(0), data.info.num_classes, **head.model_dump())
    weights = class_weights(head.class_weights, data)
    return scoring_task(
        model, head.aux_weight, config, evaluation, evaluation, data.class_names, data.info.bits, weights
    )


def build_evaluation(
    task: SegmentationTask, config: DataPart, entry: EvaluationPart, first: EvaluationPart, data: DataSplits
) -> tuple[SegmentationTask, RequestDataset, Collate | None]:
    """See hcnet_cli/build.py."""
    assert isinstance(config, SceneParsing)
    assert isinstance(entry, SceneEvaluation)
    assert isinstance(data, SceneSplits)
    if entry is first and tuple(entry.scales) == (1.0,):
        return task, data.val, data.val_collate
    view = task
    if entry is not first:
        given = (data.class_names, data.info.bits)
        view = scoring_task(task.model, task.aux_weight, config, entry, first, *given)
    images = EvalScenes(data.folder, img_scale=config.img_scale, ratios=entry.scales, mean=config.mean, std=config.std)
    return view, images, data.val_collate


def scoring_task(
    model: UPerNet,
    aux_weight: float,
    config: DataPart,
    entry: EvaluationPart,
    first: EvaluationPart,
    class_names: Sequence[str],
    bits: int | None = None,
    weights: Sequence[float] = (),
) -> SegmentationTask:
    """The task that scores as `entry` says; what it leaves open is as in the first evaluation."""
    assert isinstance(config, SceneParsing)
    assert isinstance(entry, SceneEvaluation)
    assert isinstance(first, SceneEvaluation)
    how: dict[str, Any] = {
        "mode": entry.mode or first.mode or "whole",
        "crop_size": config.crop_size,
        "stride": entry.stride or first.stride or config.crop_size,
        "flip": config.hflip > 0 if entry.flip is None else entry.flip,  # digits are other signs in a mirror
    }
    if how["mode"] == "slide" and how["stride"] > how["crop_size"]:
        raise UserError(
            f"Windows of {how['crop_size']} pixels (data.crop_size) every {how['stride']} pixels leave gaps in which "
            "nothing is predicted.",
            hint=f"For example: --set evaluation.ss.stride={max(8, how['crop_size'] * 2 // 3)}",
        )
    return SegmentationTask(
        model,
        class_names,
        aux_weight=aux_weight,
        class_weights=weights,
        ignore_index=config.ignore_index,
        read=functools.partial(read_image, bits=bits, max_pixels=config.max_pixels),
        normalisation=(config.mean, config.std),
        protocol=protocol(config.img_scale, ratios=entry.scales, **how),
        **how,
    )


def describe_input(config: DataPart, evaluation: EvaluationPart) -> dict[str, Any]:
    """How an image is rescaled and normalised for evaluation, and how labels are read."""
    assert isinstance(config, SceneParsing)
    return {
        "img_size": list(config.img_scale),  # long and short side of the frame that an image is rescaled to fit
        "interpolation": "bilinear, no antialiasing",
        "mean": list(config.mean),
        "std": list(config.std),
        "normalisation": NORMALISATION,
        "crop_pct": 1.0,
        "reduce_zero_label": config.reduce_zero_label,
        "ignore_index": config.ignore_index,
    }
