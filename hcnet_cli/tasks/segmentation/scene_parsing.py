"""Images and labels of a SceneParsing folder (see folder.py) as training and evaluation take them, as in Swin's runs.

Dimension letters: H x W the image as stored, h x w after resizing, S the side of a training crop.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from hcnet_cli import dist, rng
from hcnet_cli.cache import cache_dir
from hcnet_cli.console import UserError, warn
from hcnet_cli.data.audit import Audit, Item, distinct
from hcnet_cli.data.folders import counted, dataset_name
from hcnet_cli.data.images import check_headers, first_usable, normalise, rescale
from hcnet_cli.data.loader import SampleRequest
from hcnet_cli.data.problems import Report, refuse, reported
from hcnet_cli.data.splits import DataSplits
from hcnet_cli.runs import DataInfo
from hcnet_cli.schema import IMAGENET_MEAN, IMAGENET_STD, Part
from hcnet_cli.tasks.segmentation import augment, spec
from hcnet_cli.tasks.segmentation.augment import Pixels
from hcnet_cli.tasks.segmentation.folder import SPLITS, SceneFolder, open_folder
from hcnet_cli.tasks.segmentation.labels import by_class, read_label

# --- data sets --------------------------------------------------------------------------------------------------------


class TrainScenes:
    """Augmented crops, in the reference's order: resize, crop, flip, photometric distortion, normalise, pad.

    `img_scale` (long side, short side) times a ratio drawn from `ratio_range` bounds the resized image. An item has
    `image` [3, S, S] float32 and `label` [S, S] uint8; all its randomness comes from the request's key. An image or
    label that cannot be used is replaced by another, chosen by the key, and named under `unreadable`.
    """

    def __init__(
        self,
        folder: SceneFolder,
        split: str = "training",
        *,
        img_scale: tuple[int, int] = (2048, 512),
        ratio_range: tuple[float, float] = (0.5, 2.0),
        crop_size: int = 512,
        cat_max_ratio: float = 0.75,
        hflip: float = 0.5,
        photometric: bool = True,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
    ) -> None:
        self.folder, self.split = folder, split
        self.img_scale = img_scale
        self.ratio_range = ratio_range
        self.crop_size = crop_size
        self.cat_max_ratio = cat_max_ratio
        self.hflip = hflip
        self.photometric = photometric
        self.mean, self.std = mean, std

    def __len__(self) -> int:
        return len(self.folder.images[self.split])

    def __getitem__(self, request: SampleRequest) -> dict[str, Any]:
        index, key, _ = request
        index, (pixels, label), replaced = first_usable(self._read, index, key, range(len(self)))
        with rng.seeded(key):
            pixels, label = self._augment(pixels, label)
        image = normalise(torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1), self.mean, self.std)
        return {
            "sample": index,
            "key": key,
            "image": augment.pad(image, self.crop_size, 0),
            "label": augment.pad(torch.from_numpy(label), self.crop_size, self.folder.ignore_index),
            **replaced,
        }

    def sample_path(self, index: int) -> str:
        """The file of a sample."""
        return str(self.folder.images[self.split][index])

    def _read(self, index: int) -> tuple[Pixels, Pixels]:
        return self.folder.read(self.split, index)

    def _augment(self, pixels: Pixels, label: Pixels) -> tuple[Pixels, Pixels]:
        """[H, W, 3], [H, W] -> a crop of both, of at most S x S. Draws from numpy's global generator."""
        ratio = np.random.uniform(*self.ratio_range)
        long_side, short_side = (int(side * ratio) for side in self.img_scale)
        size = rescale(label.shape, (long_side, short_side))
        label = augment.resize_label(label, size)
        pixels = augment.resize_image(pixels, size)
        window = augment.random_crop(label, self.crop_size, self.cat_max_ratio, self.folder.ignore_index)
        pixels, label = pixels[window], label[window]
        if np.random.uniform() < self.hflip:
            pixels, label = pixels[:, ::-1], label[:, ::-1]
        if self.photometric:
            pixels = augment.photometric_distortion(pixels)
        return pixels, np.ascontiguousarray(label)


class EvalScenes:
    """Whole images, one resized copy for each ratio, and the label at its original size.

    An item has `images`, a list of [3, h, w] float32 (one per ratio, each resized from the original within
    `img_scale` times the ratio), `label` [H, W] uint8 and `path`. Sizes differ, so it needs `collate_scenes`.
    """

    def __init__(
        self,
        folder: SceneFolder,
        split: str = "validation",
        *,
        img_scale: tuple[int, int] = (2048, 512),
        ratios: Sequence[float] = (1.0,),
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
    ) -> None:
        self.folder, self.split = folder, split
        self.scales = [(int(img_scale[0] * ratio), int(img_scale[1] * ratio)) for ratio in ratios]
        self.mean, self.std = mean, std

    def __len__(self) -> int:
        return len(self.folder.images[self.split])

    def __getitem__(self, request: SampleRequest) -> dict[str, Any]:
        index, key, _ = request
        pixels, label = self.folder.read(self.split, index)
        resized = [augment.resize_image(pixels, rescale(label.shape, scale)) for scale in self.scales]
        return {
            "sample": index,
            "key": key,
            "images": [normalise(torch.from_numpy(x).permute(2, 0, 1), self.mean, self.std) for x in resized],
            "label": torch.from_numpy(label),
            "path": str(self.folder.images[self.split][index]),
        }


def collate_scenes(items: list[dict[str, Any]]) -> dict[str, Any]:
    """Lists over the samples, since their sizes may differ; `sample` and `key` as int64 tensors [B]."""
    batch: dict[str, Any] = {name: [item[name] for item in items] for name in items[0]}
    return batch | {name: torch.tensor(batch[name], dtype=torch.int64) for name in ("sample", "key")}


# --- from a recipe's section ------------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class SceneSplits(DataSplits):
    """With the folder, for evaluations at other scales."""

    folder: SceneFolder


def _open(
    config: spec.SceneParsing,
    root: Path,
    verify: bool = False,
    report: Report = refuse,
    validation_only: bool = False,
) -> SceneFolder:
    return open_folder(
        root,
        num_classes=config.num_classes,
        reduce_zero_label=config.reduce_zero_label,
        ignore_index=config.ignore_index,
        scan_cache=cache_dir() / "label-scans",
        trust=config.trust,
        bits=config.bits,
        max_pixels=config.max_pixels,
        verify=verify,
        report=report,
        validation_only=validation_only,
    )


def open_data(
    config: spec.SceneParsing, head: Part, root: Path, seed: int, validation_only: bool = False
) -> SceneSplits:
    """Pairs images with labels, reads every label once, and makes both data sets; UserError for what is wrong."""
    folder = _open(config, root, validation_only=validation_only)
    dist.from_main(lambda: check_headers(folder.images["validation"].tolist(), config.max_pixels, folder.digest))
    for problem in folder.problems:
        warn(f"{root}: {problem}")
    shared: dict[str, Any] = {"img_scale": config.img_scale, "mean": config.mean, "std": config.std}
    names = {"ratio_range", "crop_size", "cat_max_ratio", "hflip", "photometric"}
    train = TrainScenes(folder, **shared, **config.model_dump(include=names))
    return SceneSplits(
        info=DataInfo(
            name=folder.name,
            digest=folder.digest,
            path=str(root),
            num_train=len(train),
            num_val=len(folder.images["validation"]),
            num_classes=folder.num_classes,
            trust=folder.trust,
            bits=folder.identity.bits,
            left_out=counted(folder.left_out),
            notes=list(folder.notes),
        ),
        train=train,
        val=EvalScenes(folder, **shared),
        class_names=list(folder.class_names),
        img_size=(512, 2048),
        val_collate=collate_scenes,
        class_counts=folder.class_counts,
        class_unit="pixels",
        folder=folder,
    )


# --- hcnet check ------------------------------------------------------------------------------------------------------


def audit(config: spec.SceneParsing, head: Part, root: Path) -> Audit:
    """The images and labels of the folder."""
    problems: list[UserError] = []
    folder = None
    with reported(problems.append):
        folder = _open(config, root, verify=True, report=problems.append)
    if folder is None:
        name = dataset_name(root, spec.SPEC.benchmark, False)
        return Audit(name, root, "ADE20K", "% of the pixels", [], {}, problems=problems)
    items = [
        Item(image, split, annotation=label)
        for split in SPLITS
        for image, label in zip(folder.images[split].tolist(), folder.labels[split].tolist(), strict=True)
    ]

    def count_pixels(item: Item) -> NDArray[np.int64]:
        pixels = np.bincount(read_label(item.annotation, folder.table, folder.max_pixels).ravel(), minlength=256)
        return by_class(pixels, folder.num_classes, folder.ignore_index)[[*scored, -1]]

    names = distinct(folder.class_names)
    scored = [i for i in range(folder.num_classes) if i != folder.ignore_index]
    classes: dict[str, dict[str, float]] = {names[i]: {} for i in scored}
    made = Audit(
        *(folder.name, root, "ADE20K", "% of the pixels", items, classes, count_pixels),
        bits=folder.identity.bits,
        max_pixels=folder.max_pixels,
        problems=problems,
    )
    made.note_identity(folder.identity, folder.left_out, folder.notes)
    made.note("scores that mean nothing, or names that are shifted", list(folder.problems), wrong=True)
    return made
