"""Augmentation for classification: timm's, put together with the arguments of Swin's and HcNet's data code.

An image stays uint8, a quarter of the memory, until its whole batch is normalised on the device. Random erasing fills
normalised pixels, so an item carries what is to be pasted.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import Mixup, create_transform
from timm.data import auto_augment as auto_augment_ops
from timm.data.random_erasing import RandomErasing
from torch import Tensor, nn
from torch.utils.data import default_collate
from torchvision import transforms

from hcnet_cli import rng
from hcnet_cli.console import UserError
from hcnet_cli.schema import Triple

LONGEST_RATIO = 100  # of the sides of an image that is resized as a whole for evaluation

# --- one image --------------------------------------------------------------------------------------------------------


class Transform:
    """PIL image -> `image` [H, W, 3] uint8 and `erased`, the patches of random erasing: (top, left, [3, h, w])."""

    def __init__(self, parts: Sequence[Callable[[Any], Any]], erase: RandomErasing | None = None) -> None:
        self.parts, self.erase = parts, erase

    def __call__(self, image: Image.Image) -> dict[str, Any]:
        for part in self.parts:
            image = part(image)
        recorder = EraseRecorder(image.height, image.width)
        if self.erase is not None:
            self.erase(recorder)
        return {"image": torch.from_numpy(np.array(image)), "erased": recorder.patches}


class EraseRecorder:
    """Takes the place of an image [3, H, W] in timm's RandomErasing and records what would be pasted into it."""

    dtype = torch.float32

    def __init__(self, height: int, width: int) -> None:
        self.shape = (3, height, width)
        self.patches: list[tuple[int, int, Tensor]] = []

    def size(self) -> tuple[int, int, int]:
        return self.shape

    def __setitem__(self, place: tuple[slice, slice, slice], patch: Tensor) -> None:
        _, rows, columns = place
        size = 3, rows.stop - rows.start, columns.stop - columns.start
        self.patches.append((rows.start, columns.start, patch.expand(size)))


def train_transform(
    *,
    img_size: int,
    scale: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
    hflip: float = 0.5,
    vflip: float = 0.0,
    color_jitter: float | None = 0.4,
    auto_augment: str | None = "rand-m9-mstd0.5-inc1",
    interpolation: str = "bicubic",
    re_prob: float = 0.25,
    re_mode: str = "pixel",
    re_count: int = 1,
    mean: Triple,
) -> Transform:
    """To [img_size, img_size, 3]: random resized crop, flip, RandAugment, random erasing, in this order.

    Arguments are those of `timm.data.create_transform`; the defaults are Swin's and HcNet's (`data/build.py` of
    either). `color_jitter` has an effect only without `auto_augment` (or with "3a"). RandAugment interpolates as the
    crop does and pads with `mean`.
    """
    transform: Any = create_transform(
        img_size,
        is_training=True,
        use_prefetcher=True,  # leaves normalising and erasing to the caller
        scale=scale,
        ratio=ratio,
        hflip=hflip,
        vflip=vflip,
        color_jitter=color_jitter,  # type: ignore[arg-type]  # timm takes None, though it does not say so
        auto_augment=auto_augment,
        interpolation=interpolation,
        mean=mean,
    )
    allow_zero_bits(transform)
    parts = [
        RandomHorizontalFlip(part.p) if isinstance(part, transforms.RandomHorizontalFlip) else part
        for part in transform.transforms[:-1]  # the last converts to a tensor
    ]
    erase = RandomErasing(re_prob, mode=re_mode, max_count=re_count, device="cpu") if re_prob else None
    return Transform(parts, erase)


class RandomHorizontalFlip(transforms.RandomHorizontalFlip):
    """torchvision's flip with the same draw, by Pillow directly: 0.1 ms faster, of 5 ms for an image."""

    def __call__(self, image: Image.Image) -> Image.Image:
        return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if torch.rand(1).item() < self.p else image


def allow_zero_bits(transform: Any) -> None:
    """Makes the posterizing of a timm transform accept 0 bits, RandAugment's limit.

    timm 1.0.31 passes them to Pillow, which refuses them from version 13 on.
    """
    for part in transform.transforms:
        # RandAugment and AugMix have `ops`, AutoAugment has `policy`
        for op in [*getattr(part, "ops", []), *itertools.chain(*getattr(part, "policy", []))]:
            if op.aug_fn is auto_augment_ops.posterize:
                op.aug_fn = posterize


def posterize(image: Image.Image, bits: int, **_: Any) -> Image.Image:
    """timm's; an image with no bit left is black."""
    return auto_augment_ops.posterize(image, bits) if bits else Image.new(image.mode, image.size)


def eval_transform(*, img_size: int, crop_pct: float = 0.875, interpolation: str = "bicubic") -> Transform:
    """To [img_size, img_size, 3]: shorter side to floor(img_size / crop_pct), centre crop.

    At crop_pct 0.875 that is the reference's int(256 / 224 * img_size).
    """
    transform: Any = create_transform(img_size, crop_pct=crop_pct, interpolation=interpolation, use_prefetcher=True)
    return Transform([without_far_ends, *transform.transforms[:-1]])


def without_far_ends(image: Image.Image) -> Image.Image:
    """The middle of an image that is more than LONGEST_RATIO times as long as wide; the image itself otherwise.

    What is cut off lies far from the centre crop. Resized, 65,535 x 1 pixels would need gigabytes.
    """
    most = LONGEST_RATIO * min(image.size)
    if max(image.size) <= most:
        return image
    left, top = ((side - most) // 2 if side > most else 0 for side in image.size)
    return image.crop((left, top, image.width - left, image.height - top))


# --- a batch ----------------------------------------------------------------------------------------------------------


def collate(items: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """A batch: `image` [B, H, W, 3] uint8; `target`, `sample` and `key` int64 [B]; and the erased regions.

    `holes` is a list of (number in the batch, top, left, height, width), `fill` float32 [N] the values of one hole
    after another.
    """
    rest = [{name: value for name, value in item.items() if name != "erased"} for item in items]
    erased = [(number, *hole) for number, item in enumerate(items) for hole in item["erased"]]
    return {
        **default_collate(rest),  # in a worker straight into shared memory
        "holes": [(number, top, left, *patch.shape[1:]) for number, top, left, patch in erased],
        "fill": torch.cat([torch.empty(0), *(patch.flatten() for *_, patch in erased)]),
    }


class Normalise(nn.Module):
    """A batch -> images [B, 3, H, W], normalised, then erased; float32, channels-last, on the batch's device.

    Arithmetic and values are those of torchvision's ToTensor and Normalize, to the last bit.
    """

    constants: Tensor  # [3, 3]: 255, mean and std for each channel

    def __init__(self, mean: Triple, std: Triple) -> None:
        super().__init__()
        # 255 is a tensor too: CUDA divides by a plain number through its reciprocal, which rounds differently
        self.register_buffer("constants", torch.tensor([(255.0,) * 3, mean, std]), persistent=False)

    def forward(self, batch: dict[str, Any]) -> Tensor:
        pixels = batch["image"]  # [B, H, W, 3]
        scale, mean, std = self.constants.repeat(1, pixels.shape[2])  # [W * 3] each: loops over three would be slow
        rows = pixels.flatten(2).float().div_(scale).sub_(mean).div_(std)  # [B, H, W * 3]
        images: Tensor = rows.view(pixels.shape).permute(0, 3, 1, 2)  # [B, 3, H, W]
        sizes = [(3, height, width) for *_, height, width in batch["holes"]]
        fills = batch["fill"].split([math.prod(size) for size in sizes])
        for (number, top, left, height, width), size, fill in zip(batch["holes"], sizes, fills, strict=True):
            images[number, :, top : top + height, left : left + width] = fill.view(size)
        return images


def make_mixup(
    num_classes: int,
    *,
    mixup: float = 0.8,
    cutmix: float = 1.0,
    prob: float = 1.0,
    switch_prob: float = 0.5,
    smoothing: float = 0.1,
) -> Mixup | None:
    """Timm's mixup and CutMix in batch mode, with label smoothing; None if neither would ever act."""
    if not prob or not (mixup or cutmix):
        return None
    return Mixup(
        mixup_alpha=mixup,
        cutmix_alpha=cutmix,
        prob=prob,
        switch_prob=switch_prob,
        mode="batch",
        label_smoothing=smoothing,
        num_classes=num_classes,
    )


def mix(images: Tensor, target: Tensor, step_key: int, mixup: Mixup) -> tuple[Tensor, Tensor]:
    """Images [B, 3, H, W], mixed in place, and soft targets [B, num_classes].

    All draws come from the step's key, so every micro-batch of a step is mixed as one batch would be. Partners are
    opposite ends of the micro-batch, where the loader puts pairs of the batch.
    """
    if len(images) % 2:
        raise UserError(
            f"Mixup and CutMix mix images in pairs, and a micro-batch of {len(images)} is odd.",
            hint="Choose a --batch-size whose share for each process and micro-batch is even.",
        )
    with rng.seeded(step_key):
        mixed: tuple[Tensor, Tensor] = mixup(images, target)
        return mixed
